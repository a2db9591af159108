"""What a simple rule answers, learned from the training rows alone: a model that does not beat it learned nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from tasks.batching import IGNORED
from tasks.labels import read_label
from tasks.protocol import Output, Rows, Task

Baseline = tuple[str, list[Output]]
"""What the rule is, and its outputs, one a row, as ``Task.decode`` gives them."""


def baseline(task: Task, train: Rows, rows: Rows) -> Baseline | None:
    """The answers of the task's rule to these rows; None where it has none."""
    rule = BASELINES.get(task.name)
    return None if rule is None else rule(task, train, rows)


def majority(task: Any, train: Rows, rows: Rows) -> Baseline | None:
    """The most frequent label; of single labels only."""
    if task.problem_type != "single_label_classification":
        return None
    labels = Counter(read_label(row["label"], task.problem_type, where=f"row {i}") for i, row in enumerate(train))
    label, _ = labels.most_common(1)[0]
    return f"always {label}", [{"label": label}] * len(rows)


def lead(task: Any, train: Rows, rows: Rows) -> Baseline:
    """The beginning of the source, as many words as a training target usually has."""
    words = int(median(len(row["target"].split()) for row in train))
    return f"first {words} words", [{"generated": " ".join(row["source"].split()[:words])} for row in rows]


def copy(task: Any, train: Rows, rows: Rows) -> Baseline:
    """The source as it is: names and numbers are the same in many languages."""
    return "source copied", [{"generated": row["source"]} for row in rows]


def unigram(task: Any, train: Rows, rows: Rows) -> Baseline | None:
    """Each token as likely as it is frequent in training, one added to every count; not of prompts and chats."""
    if "text" not in rows[0]:
        return None
    learned = task.encode(train[:], training=True)
    counts_V = np.ones(len(task.tokenizer))
    for labels in learned.get("labels", learned["input_ids"]):
        ids, counts = np.unique([label for label in labels if label != IGNORED], return_counts=True)
        counts_V[ids] += counts
    nats_V = np.log(counts_V.sum()) - np.log(counts_V)
    outputs: list[Output] = [{"nll": 0.0, "tokens": 0} for _ in range(len(rows))]
    features = task.encode(rows[:], training=False)
    for cells in zip(*features.values(), strict=True):
        example = dict(zip(features, cells, strict=True))
        asked = _asked(task, example)
        outputs[example["row"]]["nll"] += float(nats_V[asked].sum())
        outputs[example["row"]]["tokens"] += len(asked)
    return "unigram", outputs


def _asked(task: Any, example: Mapping[str, Any]) -> list[int]:
    """The tokens that the model is asked for: the masked ones, or all but the first."""
    labels = task.collate([example])["labels"][0].tolist()
    return [label for label in (labels if task.name == "mlm" else labels[1:]) if label != IGNORED]


BASELINES: dict[str, Callable[[Any, Rows, Rows], Baseline | None]] = {
    "classification": majority,
    "summarization": lead,
    "translation": copy,
    "generation": unigram,
    "mlm": unigram,
}
