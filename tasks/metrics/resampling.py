"""The metrics once more, as fast functions of row indices for the bootstrap; tests hold them equal to the libraries'.

What does not depend on the choice of rows is computed once, beforehand.

Shapes: N rows, I indices of rows (repeats allowed), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sacrebleu.metrics import BLEU, CHRF

from tasks.metrics.classification.classification import MOST_CLASSES_SHOWN
from tasks.metrics.rouge.rouge import KINDS, rows_of_rouge
from tasks.metrics.squad.squad import best_threshold, rows_of_scores, threshold_gains
from tasks.protocol import Resample

Indices = NDArray[np.int64]


def single_label(predictions: Sequence[int], references: Sequence[int], *, labels: Sequence[str]) -> Resample:
    """Resampled form of ``metrics.classification.single_label``; MCC by Gorodkin 2004, equation 8."""
    predicted_N, true_N = np.asarray(predictions), np.asarray(references)
    hit_N = predicted_N == true_N
    num_classes = len(labels)

    def metrics(rows_I: Indices) -> dict[str, float]:
        true_I = true_N[rows_I]
        hits_C = np.bincount(true_I[hit_N[rows_I]], minlength=num_classes).astype(np.float64)
        predicted_C = np.bincount(predicted_N[rows_I], minlength=num_classes).astype(np.float64)
        true_C = np.bincount(true_I, minlength=num_classes).astype(np.float64)
        accuracy, f1_C = hits_C.sum() / len(rows_I), _f1(hits_C, predicted_C, true_C)
        spread = (len(rows_I) ** 2 - predicted_C @ predicted_C) * (len(rows_I) ** 2 - true_C @ true_C)
        mcc = (hits_C.sum() * len(rows_I) - predicted_C @ true_C) / np.sqrt(spread) if spread > 0 else 0.0
        return {"accuracy": float(accuracy), "macro_f1": float(f1_C.mean()), "mcc": float(mcc)} | _shown(labels, f1_C)

    return metrics


def multi_label(predictions: ArrayLike, references: ArrayLike, *, labels: Sequence[str]) -> Resample:
    """Resampled form of ``metrics.classification.multi_label``."""
    predicted_NC, true_NC = np.asarray(predictions, dtype=bool), np.asarray(references, dtype=bool)
    equal_N1 = (predicted_NC == true_NC).all(axis=1, keepdims=True)
    facts = np.hstack([equal_N1, predicted_NC & true_NC, predicted_NC, true_NC]).astype(np.float64)

    def metrics(rows_I: Indices) -> dict[str, float]:
        # How often each row was drawn, times what it contributes: a product of matrices instead of a gather.
        sums = np.bincount(rows_I, minlength=len(facts)) @ facts
        hits_C, predicted_C, true_C = np.split(sums[1:], 3)
        f1_C = _f1(hits_C, predicted_C, true_C)
        micro = _f1(hits_C.sum(keepdims=True), predicted_C.sum(keepdims=True), true_C.sum(keepdims=True))
        accuracy = sums[0] / len(rows_I)
        means = {"accuracy": float(accuracy), "micro_f1": float(micro[0]), "macro_f1": float(f1_C.mean())}
        return means | _shown(labels, f1_C)

    return metrics


def regression(predictions: ArrayLike, references: ArrayLike) -> Resample:
    """Resampled form of ``metrics.regression.regression``."""
    predicted_N, true_N = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    predicted_level_N, true_level_N = (np.unique(x, return_inverse=True)[1] for x in (predicted_N, true_N))

    def metrics(rows_I: Indices) -> dict[str, float]:
        predicted_I, true_I = predicted_N[rows_I], true_N[rows_I]
        ranks = _ranks(predicted_level_N[rows_I]), _ranks(true_level_N[rows_I])
        error = float(np.mean((predicted_I - true_I) ** 2))
        return {"pearson": _correlation(predicted_I, true_I), "spearman": _correlation(*ranks), "mse": error}

    return metrics


def squad(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> Resample:
    """Resampled form of ``metrics.squad.squad``."""
    exact_N, f1_N = rows_of_scores(answers, golds, version_2=False)
    return lambda rows_I: {"exact_match": float(exact_N[rows_I].mean()), "f1": float(f1_N[rows_I].mean())}


def squad_v2(
    answers: Sequence[str], golds: Sequence[Sequence[str]], *, spans: Sequence[str], null_score_diffs: Sequence[float]
) -> Resample:
    """Resampled form of ``metrics.squad.squad_v2``; NaN for a kind of question that was not drawn at all."""
    exact_N, f1_N = rows_of_scores(answers, golds, version_2=True)
    answerable_N, null_N = np.array([len(texts) > 0 for texts in golds]), np.asarray(null_score_diffs)
    gains_N = threshold_gains(spans, rows_of_scores(spans, golds, version_2=True)[1], answerable_N)
    kinds = {"HasAns": answerable_N, "NoAns": ~answerable_N}

    def metrics(rows_I: Indices) -> dict[str, float]:
        exact_I, f1_I = exact_N[rows_I], f1_N[rows_I]
        scores = {"exact_match": float(exact_I.mean()), "f1": float(f1_I.mean())}
        for prefix, kind_N in kinds.items():
            if kind_N.any():
                scores[f"{prefix}_exact_match"] = _mean(exact_I[kind_N[rows_I]])
                scores[f"{prefix}_f1"] = _mean(f1_I[kind_N[rows_I]])
        best = best_threshold(gains_N[rows_I], null_N[rows_I], answerable_N[rows_I])
        return scores | dict(zip(("best_f1", "best_f1_thresh"), best, strict=True))

    return metrics


def perplexity(nlls: Sequence[float], tokens: Sequence[int]) -> Resample:
    """Resampled form of ``metrics.perplexity.perplexity``."""
    nll_N, tokens_N = np.asarray(nlls, dtype=np.float64), np.asarray(tokens, dtype=np.float64)

    def metrics(rows_I: Indices) -> dict[str, float]:
        total = tokens_N[rows_I].sum()
        with np.errstate(over="ignore"):
            return {"perplexity": float(np.exp(nll_N[rows_I].sum() / total)) if total else float("nan")}

    return metrics


def rouge(texts: Sequence[str], golds: Sequence[str]) -> Resample:
    """Resampled form of ``metrics.rouge.rouge``."""
    scores = rows_of_rouge(texts, golds)
    return lambda rows_I: dict(zip(KINDS, scores[rows_I].mean(axis=0).tolist(), strict=True))


def bleu(texts: Sequence[str], golds: Sequence[str], *, tokenize: str) -> Resample:
    """Resampled form of ``metrics.bleu.bleu``: both are functions of counts that add up over rows."""
    metrics = {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF()}
    counts = {
        name: np.array(metric._extract_corpus_statistics(list(texts), [list(golds)]))
        for name, metric in metrics.items()
    }
    return lambda rows_I: {
        name: float(metric._compute_score_from_stats(counts[name][rows_I].sum(axis=0).tolist()).score)
        for name, metric in metrics.items()
    }


def answers(texts: Sequence[str], golds: Sequence[str]) -> Resample:
    """Resampled form of ``metrics.rouge.rouge``, with exact match."""
    hit_N = np.array([one == other for one, other in zip(texts, golds, strict=True)])
    means = rouge(texts, golds)
    return lambda rows_I: means(rows_I) | {"exact_match": float(hit_N[rows_I].mean())}


def _f1(hits_C: NDArray[Any], predicted_C: NDArray[Any], true_C: NDArray[Any]) -> NDArray[np.float64]:
    # Where the denominator is 0 the numerator is 0 too, and so is F1 (zero_division=0).
    return np.asarray(2 * hits_C / np.maximum(predicted_C + true_C, 1))


def _shown(labels: Sequence[str], f1_C: NDArray[np.float64]) -> dict[str, float]:
    names = [f"f1_{label}" for label in labels]
    return dict(zip(names, f1_C.tolist(), strict=True)) if len(labels) <= MOST_CLASSES_SHOWN else {}


def _ranks(level_I: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ranks, with the average rank for ties, by counting: the levels were sorted once for all resamples."""
    counts = np.bincount(level_I)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[level_I])


def _correlation(x_I: NDArray[np.float64], y_I: NDArray[np.float64]) -> float:
    if np.ptp(x_I) == 0 or np.ptp(y_I) == 0:
        return 0.0
    x_I, y_I = x_I - x_I.mean(), y_I - y_I.mean()
    return float(x_I @ y_I / np.sqrt((x_I @ x_I) * (y_I @ y_I)))


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
