"""From the candidates of each window to the best spans of each question.

Shapes: F windows, K candidates for the start and K for the end, P = K * K pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.protocol import Prediction

Span = tuple[float, int, int]
"""Score (the sum of the two logits), first character, one past the last."""
CHUNK = 4096
"""Windows whose pairs are scored at once, to bound the memory."""


def best_spans(predictions: Sequence[Prediction], n_best_size: int, *, max_answer_length: int) -> dict[int, list[Span]]:
    """Find the ``n_best_size`` best spans of each row over all its windows, best first.

    A pair of candidates is a span if its end is not before its start and it has at most ``max_answer_length`` tokens.
    Equal scores keep the order of windows and candidates, as in ``run_qa.py``.
    """
    found: dict[int, list[Span]] = defaultdict(list)
    for first in range(0, len(predictions), CHUNK):
        chunk = predictions[first : first + CHUNK]
        score, start, end = _best_pairs(chunk, n_best_size, max_answer_length=max_answer_length)
        for i, prediction in enumerate(chunk):
            valid = np.isfinite(score[i])
            spans = zip(score[i, valid].tolist(), start[i, valid].tolist(), end[i, valid].tolist(), strict=True)
            found[int(prediction["row"])].extend(spans)
    return {row: _distinct(spans)[:n_best_size] for row, spans in found.items()}


def softmax(scores: Sequence[float]) -> list[float]:
    """Probabilities; of nothing, nothing."""
    exp = np.exp(np.array(scores) - max(scores, default=0.0))
    return list((exp / exp.sum()).tolist())


def _best_pairs(
    predictions: Sequence[Prediction], n_best_size: int, *, max_answer_length: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Score, first and last character of the best pairs of each window; score -inf where there are fewer."""
    names = ("start_logit", "start_index", "start_char", "end_logit", "end_index", "end_char")
    stacked = {name: np.stack([prediction[name] for prediction in predictions]) for name in names}
    length_FKK = stacked["end_index"][:, None, :] - stacked["start_index"][:, :, None] + 1
    score_FKK = stacked["start_logit"][:, :, None].astype(np.float64) + stacked["end_logit"][:, None, :]
    score_FP = np.where((length_FKK >= 1) & (length_FKK <= max_answer_length), score_FKK, -np.inf).reshape(
        len(predictions), -1
    )
    best = np.argsort(-score_FP, axis=1, kind="stable")[:, :n_best_size]
    num_candidates = stacked["end_char"].shape[1]
    start = np.take_along_axis(stacked["start_char"], best // num_candidates, axis=1)
    end = np.take_along_axis(stacked["end_char"], best % num_candidates, axis=1)
    return np.take_along_axis(score_FP, best, axis=1), start, end


def _distinct(spans: list[Span]) -> list[Span]:
    """Best first; of a span that several windows found, the best."""
    best: dict[tuple[int, int], Span] = {}
    for span in sorted(spans, key=lambda span: -span[0]):
        best.setdefault(span[1:], span)
    return list(best.values())
