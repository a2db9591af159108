"""Evaluation: every feature predicted once, on whichever rank; the answers gathered and joined by row.

Nothing is padded to make ranks even and nothing is dropped: the ranks' predictions carry their feature's number, and
the whole is checked to be complete before it is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import nn

from tasks.protocol import Prediction, Task
from training.batches import Indices, examples
from training.lora import merged
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
    as_saved: bool = False,
) -> list[Prediction]:
    """Predict every feature; on every rank the whole list, in the order of the features.

    Args:
        batch_size: Features in one forward pass. Ranks beyond the number of batches have nothing to do.
        tick: Called after each batch, to show progress.
        as_saved: Merge an adapter meanwhile, as the saved model will have it.
    """
    lengths = np.asarray(features["length"])
    order = np.argsort(-lengths, kind="stable")  # batches of like length: little padding, and the largest comes first
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # Dealt whole: cut anew on each rank, they would be padded otherwise, and figures would go by the number of ranks.
    own = batches[accelerator.process_index :: accelerator.num_processes]
    total = sum(map(len, own))
    was_training = model.training
    model.eval()
    answers: list[tuple[int, Prediction]] = []
    with whole(model), merged(model) if as_saved else nullcontext():
        for indices in own:
            answers += zip(indices.tolist(), _forward(task, model, features, indices, accelerator), strict=True)
            tick(len(answers), total)
    model.train(was_training)
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
