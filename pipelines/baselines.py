"""What the model has to beat: a simple rule's score (``tasks.baselines``), and its own before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets

from pipelines.runs import Run
from tasks.baselines import Split, baseline
from tasks.protocol import Task
from training.checkpoints import Position

Baselines = dict[str, dict[str, dict[str, Any]]]
"""For each split what was scored on it, by name, with its metrics."""
BEFORE_TRAINING = "before training"


def score_baselines(
    task: Task, rows: Mapping[str, datasets.Dataset], features: Mapping[str, datasets.Dataset]
) -> Baselines:
    """What the task's rule, learned from the training rows, scores on each other split; empty where it has none."""
    pairs = {split: Split(rows[split], features[split]) for split in rows}
    found = {split: baseline(task, pairs["train"], pair) for split, pair in pairs.items() if split != "train"}
    return {
        split: {} if answer is None else {answer[0]: task.score(answer[1], rows[split])}
        for split, answer in found.items()
    }


def score_before_training(
    run: Run, position: Position, score: Callable[[str], dict[str, Any]], *, splits: Sequence[str]
) -> Baselines:
    """The same of the model before its first update; a run that goes on keeps what its beginning found."""
    if not position.step:
        return {split: {BEFORE_TRAINING: score(split)} for split in splits}
    stored = json.loads(run.baselines.read_text(encoding="utf-8")) if run.baselines.is_file() else {}
    return {
        split: {name: found for name, found in stored.get(split, {}).items() if name == BEFORE_TRAINING}
        for split in splits
    }


def merged(one: Baselines, other: Baselines) -> Baselines:
    """Both, split by split."""
    return {split: found | other[split] for split, found in one.items()}


def described(baselines: Baselines, headline: str) -> list[str]:
    """A line for each, with its headline metric."""
    return [
        f"{split}, {name}: {headline} {metrics[headline]:.4f}"
        for split, found in baselines.items()
        for name, metrics in found.items()
    ]
