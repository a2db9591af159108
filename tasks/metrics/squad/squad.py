"""Exact match and F1 of SQuAD, equal to the official scripts but for the scale: ratios from 0 to 1.

Sources: evaluate-v1.1.py (Rajpurkar et al. 2016) and evaluate-v2.0.py (Rajpurkar et al. 2018). They differ: v2 leaves
out gold answers that normalize to nothing and holds two empty texts equal in F1; v1 does neither.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower the text; remove punctuation, then articles, then superfluous spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if the normalized texts are equal."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1(prediction: str, gold: str, *, both_empty: float = 1.0) -> float:
    """F1 of the two bags of normalized words.

    Args:
        prediction: Predicted answer.
        gold: Gold answer.
        both_empty: F1 of two texts without words: 1 in v2, 0 in v1.
    """
    predicted, true = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not predicted or not true:
        return both_empty if predicted == true else 0.0
    same = sum((Counter(predicted) & Counter(true)).values())
    # Written as in the script, so that the last bit agrees as well.
    precision, recall = same / len(predicted), same / len(true)
    return 2 * precision * recall / (precision + recall) if same else 0.0


def best_over_golds(prediction: str, golds: Sequence[str], *, version_2: bool) -> tuple[float, float]:
    """Exact match and F1 against the gold answer that fits best; v2 without gold answers wants the empty text."""
    if version_2:
        golds = [gold for gold in golds if normalize_answer(gold)] or [""]
    both_empty = 1.0 if version_2 else 0.0
    exact = max(exact_match(prediction, gold) for gold in golds)
    return exact, max(f1(prediction, gold, both_empty=both_empty) for gold in golds)


def rows_of_scores(
    predictions: Sequence[str], golds: Sequence[Sequence[str]], *, version_2: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Exact match and F1 of each row, N numbers each."""
    pairs = zip(predictions, golds, strict=True)
    scores_N2 = np.array([best_over_golds(text, texts, version_2=version_2) for text, texts in pairs]).reshape(-1, 2)
    return scores_N2[:, 0], scores_N2[:, 1]


def threshold_gains(spans: Sequence[str], f1_N: NDArray[np.float64], answerable_N: NDArray[np.bool_]) -> Any:
    """What answering each question adds to the summed F1 of answering none (``find_best_thresh`` of v2)."""
    wrong_N = np.array([-1.0 if span else 0.0 for span in spans])
    return np.where(answerable_N, f1_N, wrong_N)


def best_threshold(
    gains_N: NDArray[np.float64], null_N: NDArray[np.float64], answerable_N: NDArray[np.bool_]
) -> tuple[float, float]:
    """Best mean F1, and the ``null_score_diff`` up to which to answer for it.

    Chosen on the data that it scores, so an upper bound, as in the official script.
    """
    order = np.argsort(null_N, kind="stable")
    totals = np.cumsum(gains_N[order])
    best = int(np.argmax(totals))
    unanswerable = float(np.sum(~answerable_N))
    if totals[best] <= 0:
        return unanswerable / len(null_N), 0.0
    return (unanswerable + float(totals[best])) / len(null_N), float(null_N[order[best]])


def squad(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score v1: every question has an answer."""
    exact_N, f1_N = rows_of_scores(answers, golds, version_2=False)
    return {"exact_match": float(exact_N.mean()), "f1": float(f1_N.mean())}


def squad_v2(
    answers: Sequence[str], golds: Sequence[Sequence[str]], *, spans: Sequence[str], null_score_diffs: Sequence[float]
) -> dict[str, float]:
    """Score v2, where questions may have no answer.

    Args:
        answers: The answer given, empty for none.
        golds: Gold answers of each question, none if it has no answer.
        spans: The best answer if one had to be given; what ``best_f1`` chooses from.
        null_score_diffs: By how much no answer scored above that span.

    Returns:
        ``exact_match``, ``f1``, the same as ``HasAns_`` and ``NoAns_`` over the questions with and without an answer
        (left out if there are none), ``best_f1`` and ``best_f1_thresh``.
    """
    answerable_N = np.array([len(texts) > 0 for texts in golds])
    exact_N, f1_N = rows_of_scores(answers, golds, version_2=True)
    scores = {"exact_match": float(exact_N.mean()), "f1": float(f1_N.mean())}
    for prefix, chosen_N in (("HasAns", answerable_N), ("NoAns", ~answerable_N)):
        if chosen_N.any():
            scores[f"{prefix}_exact_match"] = float(exact_N[chosen_N].mean())
            scores[f"{prefix}_f1"] = float(f1_N[chosen_N].mean())
    span_f1_N = rows_of_scores(spans, golds, version_2=True)[1]
    gains_N = threshold_gains(spans, span_f1_N, answerable_N)
    scores["best_f1"], scores["best_f1_thresh"] = best_threshold(gains_N, np.asarray(null_score_diffs), answerable_N)
    return scores


class Squad(evaluate.Metric):  # type: ignore[misc]  # untyped base
    """Configurations: ``v1`` and ``v2``."""

    def _info(self) -> evaluate.MetricInfo:
        text, number = datasets.Value("string"), datasets.Value("float64")
        v2 = {"span": text, "null_score_diff": number} if self.config_name == "v2" else {}
        features = {"predictions": {"answer": text} | v2, "references": {"text": datasets.List(text)}}
        return evaluate.MetricInfo(
            description=__doc__,
            citation="SQuAD: Rajpurkar et al., EMNLP 2016 and ACL 2018",
            inputs_description="predictions: answer (v2: span, null_score_diff); references: text, the gold answers",
            features=datasets.Features(features),
        )

    def _compute(
        self, *, predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        answers, golds = [one["answer"] for one in predictions], [one["text"] for one in references]
        if self.config_name == "v1":
            return squad(answers, golds)
        diffs = [one["null_score_diff"] for one in predictions]
        return squad_v2(answers, golds, spans=[one["span"] for one in predictions], null_score_diffs=diffs)
