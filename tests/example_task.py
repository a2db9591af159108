"""The worked example of CONTRIBUTING: 1 to 5 stars for a text, learned as a number, answered as a whole one.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from heedful import UserError
from tasks.batching import model_inputs, pad_batch
from tasks.protocol import Batch, Columns, Features, Output, Prediction, Resample, Rows


@dataclass(frozen=True)
class Stars:
    name: ClassVar[str] = "stars"
    auto_class: ClassVar[type] = AutoModelForSequenceClassification
    headline: ClassVar[str] = "exact"
    tokenizer_kwargs: ClassVar[dict[str, Any]] = {}
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @classmethod
    def build(
        cls, tokenizer: Any, rows: Rows, *, model_config: Any, max_length: int, stride: int, options: Any
    ) -> Self:
        task = cls(tokenizer, max_length)
        task.check(rows, where="data.train")
        return task

    def check(self, rows: Rows, *, where: str) -> None:
        for row in rows:
            if row["label"] not in {"1", "2", "3", "4", "5"}:
                raise UserError(f"{row['label']!r} stars", where=f"{where}, row {row['row'] + 1}", expected="1 to 5")

    def sequences(self) -> list[dict[str, int]]:
        return [{"model.max_length": self.max_length}]

    def prepare_model(self, model: nn.Module) -> None:
        return None

    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, rows: Columns, *, training: bool) -> Features:
        encoded = self.tokenizer(list(rows["text"]), truncation=True, max_length=self.max_length)
        features = dict(encoded) | {"row": list(rows["row"]), "length": [len(ids) for ids in encoded["input_ids"]]}
        return features | ({"stars": [float(label) for label in rows["label"]]} if "label" in rows else {})

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        batch = pad_batch(examples, tokenizer=self.tokenizer)
        if "stars" in examples[0]:
            batch["stars"] = torch.tensor([example["stars"] for example in examples])
        return batch

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(float(len(batch["stars"])))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self._answer_B(model, batch) - batch["stars"]).square().sum()

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        return {"stars": self._answer_B(model, batch), "row": batch["row"]}

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        return [{"stars": int(np.clip(np.round(float(p["stars"])), 1, 5))} for p in predictions]

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        return self.resample(outputs, rows)(np.arange(len(outputs)))

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        exact = np.array([output["stars"] == int(row["label"]) for output, row in zip(outputs, rows, strict=True)])
        return lambda index: {"exact": float(exact[index].mean())}

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        return {"tokens": sum(features["length"])}

    def _answer_B(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**model_inputs(batch)).logits[:, 0].float()
