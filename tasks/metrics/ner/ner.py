"""Precision, recall and F1 of whole entities (micro-averaged, and F1 of each type) and accuracy of words, by seqeval.

By default as in conlleval (Tjong Kim Sang & De Meulder 2003): an I- that continues no entity begins one. ``strict`` is
seqeval's mode of that name with IOB2, where such an I- belongs to no entity. What has no entities scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import evaluate
from seqeval.metrics import sequence_labeling, v1
from seqeval.scheme import IOB2, Tokens

Entity = tuple[str, int, int]
"""Type, first word, one past the last."""
PRECISION_RECALL_F1 = {
    False: sequence_labeling.precision_recall_fscore_support,
    True: partial(v1.precision_recall_fscore_support, scheme=IOB2),
}


def entities(tags: Sequence[str], *, strict: bool) -> list[Entity]:
    """Entities of one sentence, in order."""
    if strict:
        return [(entity.tag, entity.start, entity.end) for entity in Tokens(list(tags), scheme=IOB2).entities]
    return [(kind, start, last + 1) for kind, start, last in sequence_labeling.get_entities(list(tags))]


def ner(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, strict: bool) -> dict[str, float]:
    """Score IOB2 tags: ``precision``, ``recall``, ``f1``, ``accuracy`` and ``f1_<TYPE>`` of each type that occurs."""
    score = partial(PRECISION_RECALL_F1[strict], references, predictions, zero_division=0)
    precision, recall, f1, _ = score(average="micro")
    kinds = sorted({kind for tags in (*predictions, *references) for kind, *_ in entities(tags, strict=strict)})
    num_words = sum(map(len, references))
    accuracy = sequence_labeling.accuracy_score(references, predictions) if num_words else 0.0
    metrics = {"precision": precision, "recall": recall, "f1": f1, "accuracy": accuracy}
    by_kind = dict(zip(kinds, score(average=None)[2], strict=True)) if kinds else {}
    return {name: float(x) for name, x in (metrics | {f"f1_{kind}": x for kind, x in by_kind.items()}).items()}


class Ner(evaluate.Metric):  # type: ignore[misc]  # untyped base
    """Predictions and references are lists of IOB2 tags; ``compute`` takes ``strict``."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="seqeval: Nakayama 2018; conlleval: Tjong Kim Sang & De Meulder, CoNLL 2003",
            inputs_description="predictions, references: IOB2 tags of each sentence; strict: mode, see above",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, *, predictions: Any, references: Any, strict: bool) -> dict[str, float]:
        return ner(predictions, references, strict=strict)
