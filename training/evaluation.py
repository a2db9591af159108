"""Evaluation: every feature predicted once, on whichever rank; the answers gathered and joined by row.

Nothing is padded to make ranks even and nothing is dropped: the ranks' predictions carry their feature's number, and
the whole is checked to be complete before it is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn

from tasks.evaluating import in_eval_mode
from tasks.protocol import Prediction, Task
from training.batches import Indices, examples
from training.sharding import whole

Tick = Callable[[int, int], None]
"""Told how many of this rank's features are done, and how many there are."""


def untold(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def predict(
    task: Task,
    model: nn.Module,
    features: Any,
    *,
    accelerator: Accelerator,
    batch_size: int,
    tick: Tick = untold,
) -> list[Prediction]:
    """Predict every feature; on every rank the whole list, in the order of the features.

    Args:
        batch_size: Features in one forward pass. Ranks beyond the number of batches make the first one again.
        tick: Called after each batch, to show progress.
    """
    lengths = np.asarray(features["length"])
    order = np.argsort(-lengths, kind="stable")  # batches of like length: little padding, and the largest comes first
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # Dealt whole: cut anew on each rank, they would be padded otherwise, and figures would go by the number of ranks.
    # A rank without one makes the first too: what is found out with a process's first batch (tasks.lm_loss) must be on
    # all of them, or ranks that share a model would fall out of step later.
    own = batches[accelerator.process_index :: accelerator.num_processes] or batches[:1]
    total = sum(map(len, own))
    answers: list[tuple[int, Prediction]] = []
    with in_eval_mode(model), whole(model):
        for indices in own:
            answers += zip(indices.tolist(), _forward(task, model, features, indices, accelerator), strict=True)
            tick(len(answers), total)
    gathered = dict(gather_object(answers)) if accelerator.num_processes > 1 else dict(answers)
    if sorted(gathered) != list(range(len(lengths))):
        raise RuntimeError(f"evaluation covered {len(gathered)} of {len(lengths)} features")
    return [gathered[number] for number in range(len(lengths))]


@torch.inference_mode()
def _forward(
    task: Task, model: nn.Module, features: Any, indices: Indices, accelerator: Accelerator
) -> list[Prediction]:
    batch = send_to_device(task.collate(examples(features, indices)), accelerator.device)
    with accelerator.autocast():
        answers = task.predict(model, batch)
    columns = {name: tensor.cpu().numpy() for name, tensor in answers.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(indices))]
