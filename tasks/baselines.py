"""What a simple rule answers, learned from the training rows alone: a model that does not beat it learned nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from sources.texts import counted
from tasks.batching import IGNORED, NO_WORD
from tasks.labels import read_label
from tasks.protocol import Output, Rows, Task

Baseline = tuple[str, list[Output]]
"""What the rule is, and its outputs, one a row, as ``Task.decode`` gives them."""


class Split(NamedTuple):
    """A split's rows, and the features that the task made of them."""

    rows: Rows
    features: Any


def baseline(task: Task, train: Split, test: Split) -> Baseline | None:
    """The answers of the task's rule to the test rows; None where it has none."""
    rule = BASELINES.get(task.name)
    return None if rule is None else rule(task, train, test)


def majority(task: Any, train: Split, test: Split) -> Baseline | None:
    """The most frequent label; of single labels only."""
    if task.problem_type != "single_label_classification":
        return None
    labels = Counter(read_label(row["label"], task.problem_type, where=f"row {i}") for i, row in enumerate(train.rows))
    label, _ = labels.most_common(1)[0]
    return f"always {label}", [{"label": label}] * len(test.rows)


def lead(task: Any, train: Split, test: Split) -> Baseline:
    """The beginning of the source, as many words as a training target usually has."""
    words = int(median(len(row["target"].split()) for row in train.rows))
    answers = [{"generated": " ".join(row["source"].split()[:words])} for row in test.rows]
    return f"first {counted(words, 'words')}", answers


def copy(task: Any, train: Split, test: Split) -> Baseline:
    """The source as it is: names and numbers are the same in many languages."""
    return "source copied", [{"generated": row["source"]} for row in test.rows]


def unigram(task: Any, train: Split, test: Split) -> Baseline | None:
    """Each next token as likely as it is frequent in training; not of prompts and chats."""
    if "text" not in test.rows[0]:
        return None
    learned = (label for labels in train.features["labels"] for label in labels)
    asked = ((feature["row"], feature["labels"][1:]) for feature in test.features)
    return "unigram", _by_frequency(learned, asked, vocabulary=len(task.tokenizer), rows=len(test.rows))


def unigram_of_masked(task: Any, train: Split, test: Split) -> Baseline:
    """Each masked token as likely as it is frequent in training, special tokens aside: they are never masked."""
    cells = zip(train.features["input_ids"], train.features["word"], strict=True)
    learned = (token for ids, words in cells for token, word in zip(ids, words, strict=True) if word != NO_WORD)
    asked = ((feature["row"], task.collate([feature])["labels"][0].tolist()) for feature in test.features)
    return "unigram", _by_frequency(learned, asked, vocabulary=len(task.tokenizer), rows=len(test.rows))


def _by_frequency(
    learned: Iterable[int], asked: Iterable[tuple[int, list[int]]], *, vocabulary: int, rows: int
) -> list[Output]:
    """``nll`` in nats and ``tokens`` of each row, one added to every count (Laplace)."""
    ids = np.fromiter((token for token in learned if token != IGNORED), dtype=np.int64)
    counts_V = 1 + np.bincount(ids, minlength=vocabulary)
    nats_V = np.log(counts_V.sum()) - np.log(counts_V)
    outputs: list[Output] = [{"nll": 0.0, "tokens": 0} for _ in range(rows)]
    for row, labels in asked:
        tokens = [label for label in labels if label != IGNORED]
        outputs[row]["nll"] += float(nats_V[tokens].sum())
        outputs[row]["tokens"] += len(tokens)
    return outputs


BASELINES: dict[str, Callable[[Any, Split, Split], Baseline | None]] = {
    "classification": majority,
    "summarization": lead,
    "translation": copy,
    "generation": unigram,
    "mlm": unigram_of_masked,
}
