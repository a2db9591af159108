"""Predict and score one split: the same path during training, at its end, and in ``heedful evaluate``."""

from __future__ import annotations

from typing import Any

import datasets
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from tasks.protocol import Output, Task
from tasks.uncertainty import bootstrap
from training.evaluation import Tick, predict, untold


def evaluate_split(
    task: Task,
    model: nn.Module,
    rows: datasets.Dataset,
    features: datasets.Dataset,
    *,
    accelerator: Accelerator,
    batch_size: int,
    tick: Tick = untold,
    final: bool = False,
) -> dict[str, Any]:
    """The metrics of one split, the same on every rank.

    Args:
        final: Of the model as it is saved, its adapter merged, with ``<metric>_ci95`` by the bootstrap over rows.
    """
    predictions = predict(
        task, model, features, accelerator=accelerator, batch_size=batch_size, tick=tick, as_saved=final
    )
    result: list[dict[str, Any]] = [{}]
    if accelerator.is_main_process:
        result = [_score(task, task.decode(predictions, rows), rows, intervals=final)]
    return broadcast_object_list(result)[0]  # type: ignore[no-any-return]


def scored_by(task: Task) -> str:
    """What has to stand beside the figures, such as sacrebleu's signature; of most tasks nothing."""
    return getattr(task, "scored_by", "")


def _score(task: Task, outputs: list[Output], rows: datasets.Dataset, *, intervals: bool) -> dict[str, Any]:
    metrics: dict[str, Any] = task.score(outputs, rows)
    if intervals:
        limits = bootstrap(task.resample(outputs, rows), len(rows))
        metrics = metrics | {name: list(interval) for name, interval in limits.items()}
    return metrics
