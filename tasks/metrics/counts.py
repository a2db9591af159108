"""Metrics that are ratios of counts, resampled by summing each row's counts.

Shapes: N rows, K types of entities, I indices of rows (repeats allowed).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.ner.ner import Entity, entities
from tasks.protocol import Resample


def ner(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, strict: bool) -> Resample:
    """Resampled form of ``metrics.ner.ner``; F1 of a type is NaN where no entity of it was drawn."""
    predicted = [entities(tags, strict=strict) for tags in predictions]
    true = [entities(tags, strict=strict) for tags in references]
    kinds = sorted({kind for found in (*predicted, *true) for kind, *_ in found})
    hits = [list(set(a) & set(b)) for a, b in zip(predicted, true, strict=True)]
    entities_NK = [_per_kind(found, kinds) for found in (hits, predicted, true)]
    pairs = zip(predictions, references, strict=True)
    words_N2 = [(sum(a == b for a, b in zip(given, gold, strict=True)), len(gold)) for given, gold in pairs]
    facts = np.hstack([np.array(words_N2, dtype=np.float64).reshape(-1, 2), *entities_NK])

    def metrics(rows_I: NDArray[np.int64]) -> dict[str, float]:
        # How often each row was drawn, times what it contributes: a product of matrices instead of a gather.
        right, words, *sums = np.bincount(rows_I, minlength=len(facts)) @ facts
        hit_K, predicted_K, true_K = np.split(np.array(sums), 3)
        hit, guessed, gold = hit_K.sum(), predicted_K.sum(), true_K.sum()
        scores = {
            "precision": float(hit / max(guessed, 1)),
            "recall": float(hit / max(gold, 1)),
            "f1": float(2 * hit / max(guessed + gold, 1)),
            "accuracy": float(right / max(words, 1)),
        }
        drawn_K = predicted_K + true_K
        f1_K = np.divide(2 * hit_K, drawn_K, out=np.full(len(kinds), np.nan), where=drawn_K > 0)
        return scores | {f"f1_{kind}": float(f1) for kind, f1 in zip(kinds, f1_K, strict=True)}

    return metrics


def _per_kind(found: Sequence[Sequence[Entity]], kinds: Sequence[str]) -> NDArray[np.float64]:
    column = {kind: i for i, kind in enumerate(kinds)}
    counts_NK = np.zeros((len(found), len(kinds)))
    for row, row_entities in enumerate(found):
        for kind, *_ in row_entities:
            counts_NK[row, column[kind]] += 1
    return counts_NK
