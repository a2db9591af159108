"""Accuracy, F1 and Matthews' correlation of single-label and multi-label classification, by scikit-learn.

A class with neither a true nor a predicted row has F1 0 (``zero_division=0``), and macro F1 averages over every class
of the task, so that a class the model never finds pulls it down even where a split lacks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

MOST_CLASSES_SHOWN = 20
"""With more classes than this, no F1 of each class is reported."""


def single_label(predictions: Sequence[int], references: Sequence[int], *, labels: Sequence[str]) -> dict[str, float]:
    """Score class indices: ``accuracy``, ``macro_f1``, ``mcc`` and, with few classes, ``f1_<label>``."""
    classes = list(range(len(labels)))
    f1_C = f1_score(references, predictions, labels=classes, average=None, zero_division=0)
    shown = dict(zip(labels, f1_C, strict=True)) if len(labels) <= MOST_CLASSES_SHOWN else {}
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_C.mean()),
        "mcc": float(matthews_corrcoef(references, predictions)),
    } | {f"f1_{label}": float(f1) for label, f1 in shown.items()}


def multi_label(predictions: Any, references: Any, *, labels: Sequence[str]) -> dict[str, float]:
    """Score 0/1 indicators [N, C]: ``micro_f1``, ``macro_f1`` and ``accuracy`` of the whole set of labels of a row."""
    f1_C = f1_score(references, predictions, average=None, zero_division=0)
    shown = dict(zip(labels, f1_C, strict=True)) if len(labels) <= MOST_CLASSES_SHOWN else {}
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "micro_f1": float(f1_score(references, predictions, average="micro", zero_division=0)),
        "macro_f1": float(f1_C.mean()),
    } | {f"f1_{label}": float(f1) for label, f1 in shown.items()}


SCORES = {"single_label": single_label, "multi_label": multi_label}


class Classification(evaluate.Metric):  # type: ignore[misc]  # untyped base
    """Configurations: ``single_label`` (class indices) and ``multi_label`` (0/1 indicators, a list a row)."""

    def _info(self) -> evaluate.MetricInfo:
        index = datasets.Value("int32")
        cell = index if self.config_name == "single_label" else datasets.List(index)
        return evaluate.MetricInfo(
            description=__doc__,
            citation="scikit-learn: Pedregosa et al., JMLR 12, 2011",
            inputs_description="predictions, references: class indices or rows of 0/1; labels: names of the classes",
            features=datasets.Features({"predictions": cell, "references": cell}),
        )

    def _compute(self, *, predictions: Any, references: Any, labels: Sequence[str]) -> dict[str, float]:
        return SCORES[self.config_name](predictions, references, labels=labels)
