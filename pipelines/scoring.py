"""Predict and score one split: the same path during training, at its end, and in ``heedful evaluate``."""

from __future__ import annotations

from typing import Any

import datasets
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from tasks.baselines import Split
from tasks.protocol import Output, Task
from tasks.uncertainty import bootstrap
from training.evaluation import Tick, predict, untold


def evaluate_split(
    task: Task,
    model: nn.Module,
    split: Split,
    *,
    accelerator: Accelerator,
    batch_size: int,
    tick: Tick = untold,
    intervals: bool = False,
) -> dict[str, Any]:
    """The metrics of one split, the same on every rank.

    Args:
        intervals: Add ``<metric>_ci95`` by the bootstrap over rows.
    """
    predictions = predict(task, model, split.features, accelerator=accelerator, batch_size=batch_size, tick=tick)
    result: list[dict[str, Any]] = [{}]
    if accelerator.is_main_process:
        result = [_score(task, task.decode(predictions, split.rows), split.rows, intervals=intervals)]
    return broadcast_object_list(result)[0]  # type: ignore[no-any-return]


def check_answers(task: Task, rows: datasets.Dataset, *, where: str) -> None:
    """Refuse rows without what figures are made by, before hours are spent on them; of most tasks ``check`` did.

    Raises:
        UserError: There is nothing to compare the model's answers with.
    """
    if check := getattr(task, "check_answers", None):
        check(rows, where=where)


def scored_by(task: Task) -> str:
    """What has to stand beside the figures, such as sacrebleu's signature; of most tasks nothing."""
    return getattr(task, "scored_by", "")


def _score(task: Task, outputs: list[Output], rows: datasets.Dataset, *, intervals: bool) -> dict[str, Any]:
    metrics: dict[str, Any] = task.score(outputs, rows)
    if intervals:
        limits = bootstrap(task.resample(outputs, rows), len(rows))
        metrics = metrics | {name: list(interval) for name, interval in limits.items()}
    return metrics
