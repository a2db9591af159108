"""Pearson's and Spearman's correlation by SciPy, and the mean squared error.

A correlation with a constant is undefined; it is reported as 0.0, the value of a model that has learned nothing.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, spearmanr


def regression(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Score numbers: ``pearson``, ``spearman`` and ``mse``."""
    predicted, true = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    constant = np.ptp(predicted) == 0 or np.ptp(true) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(predicted, true).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predicted, true).statistic),
        "mse": float(np.mean((predicted - true) ** 2)),
    }


class Regression(evaluate.Metric):  # type: ignore[misc]  # untyped base
    """Pearson, Spearman and mean squared error."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="SciPy: Virtanen et al., Nature Methods 17, 2020",
            inputs_description="predictions, references: numbers",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return regression(predictions, references)
