"""BLEU (Papineni et al. 2002) and chrF (Popovic 2015) by sacrebleu, from 0 to 100 as it gives them (Post 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF


def bleu(predictions: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> dict[str, float]:
    """Corpus BLEU and chrF2, one reference a row.

    Args:
        tokenize: sacrebleu's tokenizer for BLEU: ``13a``, ``zh``, ``ja-mecab``, ``char``, ...
    """
    texts, golds = list(predictions), [list(references)]
    return {
        "bleu": float(BLEU(tokenize=tokenize).corpus_score(texts, golds).score),
        "chrf": float(CHRF().corpus_score(texts, golds).score),
    }


def signatures(tokenize: str = "13a") -> list[str]:
    """How the scores were made, in sacrebleu's words, for a report."""
    metrics = BLEU(tokenize=tokenize), CHRF()
    names = [metric.corpus_score(["a"], [["a"]]).name for metric in metrics]
    return [f"{name}|{metric.get_signature()}" for name, metric in zip(names, metrics, strict=True)]


class Bleu(evaluate.Metric):  # type: ignore[misc]  # untyped base
    """``predictions`` and ``references``: one text a row; ``tokenize`` as in sacrebleu."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Post 2018, https://aclanthology.org/W18-6319",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, *, predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a"
    ) -> dict[str, float]:
        return bleu(predictions, references, tokenize=tokenize)
