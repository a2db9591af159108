"""Masked language modelling (Devlin et al. 2018, section 3.1), with masks that are a function of (seed, epoch, row)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from heedful import UserError
from tasks.batching import IGNORED, NO_WORD, model_inputs, pad_batch
from tasks.fitting import require_fast
from tasks.lm_loss import likelihoods, scored, summed_loss
from tasks.metrics import resampling
from tasks.metrics.loading import load_metric
from tasks.options import MlmOptions
from tasks.protocol import Batch, Columns, Features, Output, Prediction, Resample, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANDIDATES = 5
"""Fillings of each mask that ``predict`` names."""


@dataclass(frozen=True)
class Mlm:
    """Fill in masked tokens; implements ``Task``.

    In training the masks are drawn anew each epoch, from (seed, epoch, row, window) alone: neither a resumed run nor
    another number of processes changes them. In evaluation they are drawn from (row, window): each evaluation, and
    each model, is asked the same. A text that holds mask tokens itself is filled in, not scored.

    Args:
        tokenizer: Of the model.
        max_length: Longest feature, in tokens; a longer text becomes several.
        options: How tokens are masked.
    """

    name: ClassVar[str] = "mlm"
    headline: ClassVar[str] = "perplexity"
    auto_class: ClassVar[type] = AutoModelForMaskedLM
    tokenizer_kwargs: ClassVar[dict[str, Any]] = {}

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    options: MlmOptions

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        model_config: PreTrainedConfig,
        max_length: int,
        stride: int,
        options: MlmOptions,
    ) -> Self:
        """Nothing of it depends on the rows.

        Raises:
            UserError: A slow tokenizer, or one without a mask or a padding token.
        """
        require_fast(tokenizer)
        for token in ("mask_token", "pad_token"):
            if getattr(tokenizer, token) is None:
                raise UserError(
                    f"a tokenizer without {token}",
                    where=tokenizer.name_or_path,
                    fix="task: generation suits decoder-only models",
                )
        return cls(tokenizer, max_length, options)

    def check(self, rows: Rows, *, where: str) -> None:
        """Any text will do."""

    def sequences(self) -> list[dict[str, int]]:
        """What it reads."""
        return [{"model.max_length": self.max_length}]

    def prepare_model(self, model: nn.Module) -> None:
        """Any model with this head will do."""

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the vocabulary is the checkpoint's."""
        return {}

    def encode(self, rows: Columns, *, training: bool) -> Features:
        """Tokenize, and cut into pieces of at most ``max_length`` tokens, special ones included."""
        encoded = self.tokenizer(
            list(rows["text"]),
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        features: Features = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        features["row"] = [rows["row"][i] for i in encoded["overflow_to_sample_mapping"]]
        features["window"] = _numbered(features["row"])
        features["length"] = [len(ids) for ids in encoded["input_ids"]]
        features["word"] = [
            [NO_WORD if special or word is None else word for special, word in zip(mask, words, strict=True)]
            for mask, words in zip(
                encoded["special_tokens_mask"], map(encoded.word_ids, range(len(features["row"]))), strict=True
            )
        ]
        return features

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Mask and pad to a batch, with ``labels`` (BT). The examples' ``draw`` is the (seed, epoch) of training."""
        return pad_batch([self._masked(e) for e in examples], tokenizer=self.tokenizer, extra={"labels": IGNORED})

    def count(self, batch: Batch) -> Tensor:
        """Masked tokens."""
        return (batch["labels"] != IGNORED).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy of the masked tokens."""
        return summed_loss(model, model_inputs(batch), batch["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        """Summed loss ``nll`` (B) over ``tokens`` (B) masked ones; the best ``candidates`` at the text's own masks."""
        answers = {"row": batch["row"], **likelihoods(model, model_inputs(batch), batch["labels"])}
        blank_BT = (batch["input_ids"] == self.tokenizer.mask_token_id) & (answers["tokens"] == 0)[:, None]
        if blank_BT.any():
            top_BTK = model(**model_inputs(batch)).logits.topk(CANDIDATES).indices
            answers["candidates"] = top_BTK.where(blank_BT[:, :, None], torch.full_like(top_BTK, IGNORED))
        return answers

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        """One answer a row.

        Returns:
            ``{"nll", "tokens"}`` in nats over the masked tokens; ``{"fillings"}``, a list for each mask, of a text with
            masks.
        """
        outputs: list[Output] = [{"nll": 0.0, "tokens": 0, "fillings": []} for _ in range(len(rows))]
        for prediction in predictions:
            output = outputs[int(prediction["row"])]
            output["nll"] += float(prediction["nll"])
            output["tokens"] += int(prediction["tokens"])
            if "candidates" in prediction:
                output["fillings"] += [
                    [self.tokenizer.decode([token]).strip() for token in best]
                    for best in prediction["candidates"]
                    if best[0] != IGNORED
                ]
        return [
            {"fillings": output["fillings"]} if output["fillings"] else {k: output[k] for k in ("nll", "tokens")}
            for output in outputs
        ]

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        """Perplexity of the masked tokens."""
        nlls, tokens = scored(outputs)
        return dict(load_metric("perplexity").compute(predictions=nlls, references=tokens))

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        """The same metric as a function of row indices."""
        return resampling.perplexity(*scored(outputs))

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        """Count ``features``, ``tokens`` and the ``learned_tokens``, those that may be masked; nothing is cut off."""
        learned = sum(word != NO_WORD for words in features["word"] for word in words)
        return {"features": len(features["length"]), "tokens": sum(features["length"]), "learned_tokens": learned}

    def _masked(self, example: Mapping[str, Any]) -> dict[str, Any]:
        ids_T, word_T = np.array(example["input_ids"]), np.array(example["word"])
        blank = self.tokenizer.mask_token_id in example["input_ids"]
        rng = np.random.default_rng([*example.get("draw", ()), example["row"], example["window"]])
        chosen_T = np.zeros(len(ids_T), dtype=bool) if blank else self._chosen(word_T, rng)
        fate_T = rng.random(len(ids_T))
        mask = self.options.mask_replace_prob
        random_T = rng.integers(len(self.tokenizer), size=len(ids_T))
        shown_T = np.where(chosen_T & (fate_T < mask), self.tokenizer.mask_token_id, ids_T)
        swapped_T = chosen_T & (fate_T >= mask) & (fate_T < mask + self.options.random_replace_prob)
        labels_T = np.where(chosen_T, ids_T, IGNORED)
        return {**example, "input_ids": np.where(swapped_T, random_T, shown_T).tolist(), "labels": labels_T.tolist()}

    def _chosen(self, word_T: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
        """The tokens to be predicted: a fixed share, and at least one where there is any."""
        words = word_T[word_T != NO_WORD]
        if not len(words):
            return np.zeros(len(word_T), dtype=bool)
        budget = max(1, round(self.options.mlm_probability * len(words)))
        if not self.options.whole_word_mask:
            positions = np.flatnonzero(word_T != NO_WORD)
            return np.isin(np.arange(len(word_T)), rng.choice(positions, budget, replace=False))
        names, sizes = np.unique(words, return_counts=True)
        order = rng.permutation(len(names))
        # The words that fit into the budget, and the first in any case.
        fits = (np.cumsum(sizes[order]) <= budget) | (np.arange(len(order)) == 0)
        return np.isin(word_T, names[order[fits]])


def _numbered(rows: Sequence[int]) -> list[int]:
    """0, 1, ... within each run of equal row numbers."""
    numbers: list[int] = []
    for i, row in enumerate(rows):
        numbers.append(numbers[-1] + 1 if i and rows[i - 1] == row else 0)
    return numbers
