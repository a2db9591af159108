"""Perplexity: exp of the mean negative log-likelihood of a token, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate


def perplexity(nlls: Sequence[float], tokens: Sequence[int]) -> float:
    """Perplexity over rows of which the summed negative log-likelihoods and the numbers of tokens are given.

    Each token counts the same, so a long row counts for more. Infinite where it exceeds what a float holds.
    """
    total = sum(tokens)
    mean = math.fsum(nlls) / total if total else math.nan
    return math.exp(mean) if not mean >= math.log(1e308) else math.inf


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """``predictions``: summed nats a row; ``references``: tokens a row."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        return {"perplexity": perplexity(predictions, references)}
