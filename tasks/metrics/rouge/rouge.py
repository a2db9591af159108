"""ROUGE (Lin 2004) by rouge-score: F1 of 1-grams, 2-grams and the longest common subsequence, from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from nltk.stem.porter import PorterStemmer
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer

WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u4e00-\u9fff]+")
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Words:
    """rouge-score's own tokenizer for any script: on ASCII it is the same, elsewhere that one drops every letter.

    Lower case, runs of letters and digits, longer ones stemmed if they are ASCII; each Chinese or Japanese character is
    a word.
    """

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """Words of a text."""
        words = WORD.findall(text.lower())
        return [self._stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def rows_of_rouge(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """F1 of each row (N) in each of ``KINDS``, words stemmed as in run_summarization.py.

    ``rougeLsum`` takes lines as sentences; the texts are taken as they are, not split into sentences.
    """
    scorer = RougeScorer(KINDS, tokenizer=Words())
    scores = [scorer.score(gold, text) for text, gold in zip(predictions, references, strict=True)]
    return np.array([[score[kind].fmeasure for kind in KINDS] for score in scores]).reshape(-1, len(KINDS))


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means over the rows."""
    means = rows_of_rouge(predictions, references).mean(axis=0)
    return dict(zip(KINDS, means.tolist(), strict=True))


class Rouge(evaluate.Metric):  # type: ignore[misc]  # untyped base
    """``predictions`` and ``references``: one text a row."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lin 2004, https://aclanthology.org/W04-1013",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return rouge(predictions, references)
