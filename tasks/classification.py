"""Classification of texts and pairs of texts: single label, multi-label, regression.

Shapes: B examples in a batch, T tokens, C classes (1 for regression), F features, N rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import AutoModelForSequenceClassification

from heedful import UserError
from tasks.batching import model_inputs, pad_batch
from tasks.fitting import require_fast
from tasks.labels import ProblemType, find_labels, find_problem_type, read_label, weigh_classes
from tasks.metrics import resampling
from tasks.metrics.loading import load_metric
from tasks.options import ClassificationOptions
from tasks.protocol import Batch, Columns, Features, Output, Prediction, Resample, Rows
from tasks.windows import window_room

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

HEADLINES: dict[ProblemType, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "spearman",
}
MULTI_LABEL_THRESHOLD = 0.5
"""A label is given where its probability is greater."""

logger = logging.getLogger("heedful.tasks.classification")


@dataclass(frozen=True)
class Classification:
    """Classify a text, or a text and its ``text_pair``; implements ``Task``.

    Args:
        tokenizer: Of the model.
        max_length: Longest feature, in tokens.
        stride: Tokens that two windows of a long document share.
        problem_type: As in ``PretrainedConfig.problem_type``.
        labels: Names of the classes, in the order of the logits; empty for regression.
        class_weights: Weight of each class in the loss; single label only.
        long_documents: ``truncate``, or ``windows``: each window is a training example with the document's label, and
            the answer is that of the mean logits. A longer document thus counts for more in training, not in the score.
    """

    name: ClassVar[str] = "classification"
    auto_class: ClassVar[type] = AutoModelForSequenceClassification
    tokenizer_kwargs: ClassVar[dict[str, Any]] = {}

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int
    problem_type: ProblemType
    labels: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None
    long_documents: str = "truncate"
    pairs: bool = False
    """Whether it was trained on pairs of texts."""

    @property
    def headline(self) -> str:
        """The metric that picks the best checkpoint."""
        return HEADLINES[self.problem_type]

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        model_config: PreTrainedConfig,
        max_length: int,
        stride: int,
        options: ClassificationOptions,
    ) -> Self:
        """Find the problem type and the labels in the training rows. Labels are sorted, as numbers if all are integers.

        Raises:
            UserError: One class only, a label that does not fit the problem type, class weights for other classes,
                windows over pairs of texts, or a tokenizer without a padding token.
        """
        cells = [row["label"] for row in rows]
        problem_type = options.problem_type or find_problem_type(cells)
        parsed = [read_label(cell, problem_type, where=f"data.train, row {i}") for i, cell in enumerate(cells)]
        labels = find_labels(parsed, problem_type)
        logger.info("problem type: %s; labels: %s", problem_type, ", ".join(labels) or "numbers")
        _check_tokenizer(tokenizer)
        if options.long_documents == "windows":
            _check_windows(tokenizer, rows, max_length=max_length, stride=stride)
        weights = weigh_classes(options.class_weights, parsed, labels=labels, problem_type=problem_type)
        pairs = "text_pair" in rows[0]
        return cls(tokenizer, max_length, stride, problem_type, labels, weights, options.long_documents, pairs)

    def check(self, rows: Rows, *, where: str) -> None:
        """Refuse labels that training has not seen, numbers that are none, and single texts for a model of pairs.

        Raises:
            UserError: Naming the first such row.
        """
        if len(rows) and ("text_pair" in rows[0]) != self.pairs:
            raise UserError(
                "single texts" if self.pairs else "pairs of texts",
                where=where,
                expected="pairs of texts, as in training" if self.pairs else "single texts, as in training",
                fix="give the column text_pair (`first ||| second` on the command line)" if self.pairs else "",
            )
        for i, row in enumerate(rows):
            if "label" in row:
                self._target(row["label"], where=f"{where}, row {i}")

    def sequences(self) -> list[dict[str, int]]:
        """What it reads."""
        return [{"model.max_length": self.max_length}]

    def prepare_model(self, model: nn.Module) -> None:
        """Any model with this head will do."""

    def model_kwargs(self) -> dict[str, Any]:
        """Size and names of the head. The padding token tells decoder-only models where a text ends."""
        names = self.labels or ("score",)
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": self.problem_type,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def encode(self, rows: Columns, *, training: bool) -> Features:
        """Tokenize; one feature a row, or one a window.

        Raises:
            UserError: A text without any token.
        """
        windows = {"stride": self.stride, "return_overflowing_tokens": True} if self.long_documents == "windows" else {}
        encoded = self.tokenizer(*_texts(rows), truncation=True, max_length=self.max_length, **windows)
        source_F = encoded["overflow_to_sample_mapping"] if windows else range(len(rows["row"]))
        features: Features = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        features["row"] = [rows["row"][i] for i in source_F]
        features["length"] = [len(ids) for ids in encoded["input_ids"]]
        if 0 in features["length"]:
            row = features["row"][features["length"].index(0)]
            raise UserError("a text without any token", where=f"row {row}", expected="some text", fix="leave it out")
        if training or "label" in rows:
            targets = [self._target(cell, where=f"row {i}") for i, cell in zip(rows["row"], rows["label"], strict=True)]
            features["label"] = [targets[i] for i in source_F]
        return features

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad to a batch; ``labels`` is B (class index or number) or BC (0/1 for each label)."""
        batch = pad_batch(examples, tokenizer=self.tokenizer)
        if "label" in examples[0]:
            dtype = torch.int64 if self.problem_type == "single_label_classification" else torch.float32
            batch["labels"] = torch.tensor([example["label"] for example in examples], dtype=dtype)
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Rows; rows times labels for multi-label; with class weights the sum of the rows' weights."""
        if self.class_weights is not None:
            return torch.tensor(self.class_weights, device=batch["labels"].device)[batch["labels"]].sum()
        return torch.tensor(float(batch["labels"].numel()), device=batch["labels"].device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy, binary cross-entropy or squared error."""
        logits_BC, labels = model(**model_inputs(batch)).logits.float(), batch["labels"]
        if self.problem_type == "regression":
            return mse_loss(logits_BC[:, 0], labels, reduction="sum")
        if self.problem_type == "multi_label_classification":
            return binary_cross_entropy_with_logits(logits_BC, labels, reduction="sum")
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=logits_BC.device)
        return cross_entropy(logits_BC, labels, weight=weights, reduction="sum")

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        """Logits ``logits`` (BC) of each feature."""
        return {"logits": model(**model_inputs(batch)).logits.float(), "row": batch["row"]}

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        """Average the logits over the windows of each row; a multi-label answer holds the labels above one half.

        Returns:
            ``{"label", "score", "scores"}``, ``{"labels", "scores"}`` or, for regression, ``{"score"}``.
        """
        logits_NC = _mean_logits(predictions, num_rows=len(rows))
        if self.problem_type == "regression":
            return [{"score": score} for score in logits_NC[:, 0].tolist()]
        if self.problem_type == "multi_label_classification":
            return [self._labels_above(scores) for scores in (1 / (1 + np.exp(-logits_NC))).tolist()]
        exp_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        return [self._best_label(scores) for scores in (exp_NC / exp_NC.sum(axis=1, keepdims=True)).tolist()]

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        """Metrics of ``metrics/classification`` or ``metrics/regression``."""
        predictions, references = self._answers(outputs, rows)
        if self.problem_type == "regression":
            scores = load_metric("regression").compute(predictions=predictions, references=references)
        else:
            metric = load_metric("classification", self.problem_type.removesuffix("_classification"))
            scores = metric.compute(predictions=predictions, references=references, labels=list(self.labels))
        return dict(scores)

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        """The same metrics as a function of row indices."""
        predictions, references = self._answers(outputs, rows)
        if self.problem_type == "regression":
            return resampling.regression(predictions, references)
        if self.problem_type == "multi_label_classification":
            return resampling.multi_label(predictions, references, labels=self.labels)
        return resampling.single_label(predictions, references, labels=self.labels)

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        """Count ``tokens`` of the rows, special ones included, and what truncation cut: ``tokens_lost``."""
        lengths = list(zip(features["row"], features["length"], strict=True))
        length_of = dict(lengths)
        # Only a feature that fills the model's input can be a part of a row, so the others need no second look.
        full = sorted({row for row, length in lengths if length >= self.max_length})
        length_of |= self._whole_lengths(full, rows)
        cut = [length - self.max_length for length in length_of.values() if length > self.max_length]
        lost = cut if self.long_documents == "truncate" else []
        return {"tokens": sum(length_of.values()), "tokens_lost": sum(lost), "rows_truncated": len(lost)}

    def _whole_lengths(self, indices: Sequence[int], rows: Rows) -> dict[int, int]:
        if not indices:
            return {}
        cells = [rows[i] for i in indices]
        columns = {name: [cell[name] for cell in cells] for name in ("text", "text_pair") if name in cells[0]}
        whole = self.tokenizer(*_texts(columns), truncation=False, verbose=False)["input_ids"]
        return {i: len(ids) for i, ids in zip(indices, whole, strict=True)}

    def _target(self, cell: Any, *, where: str) -> int | float | list[float]:
        label = read_label(cell, self.problem_type, where=where)
        if isinstance(label, float):
            return label
        names = [label] if isinstance(label, str) else label
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            known = ", ".join(self.labels)
            fix = "correct the label, or give training a row with it"
            raise UserError(f"label {unknown[0]!r}", where=where, expected=f"one seen in training: {known}", fix=fix)
        return self.labels.index(label) if isinstance(label, str) else [float(name in label) for name in self.labels]

    def _answers(self, outputs: Sequence[Output], rows: Rows) -> tuple[list[Any], list[Any]]:
        references = [self._target(row["label"], where=f"row {i}") for i, row in enumerate(rows)]
        if self.problem_type == "regression":
            return [output["score"] for output in outputs], references
        given = [output["label"] if "label" in output else output["labels"] for output in outputs]
        return [self._target(label, where=f"output {i}") for i, label in enumerate(given)], references

    def _best_label(self, scores: list[float]) -> Output:
        best = int(np.argmax(scores))
        return {
            "label": self.labels[best],
            "score": scores[best],
            "scores": dict(zip(self.labels, scores, strict=True)),
        }

    def _labels_above(self, scores: list[float]) -> Output:
        named = dict(zip(self.labels, scores, strict=True))
        return {"labels": [name for name, score in named.items() if score > MULTI_LABEL_THRESHOLD], "scores": named}


def _texts(rows: Columns) -> list[list[str]]:
    return [list(rows[name]) for name in ("text", "text_pair") if name in rows]


def _mean_logits(predictions: Sequence[Prediction], *, num_rows: int) -> NDArray[np.float64]:
    logits_FC = np.stack([prediction["logits"] for prediction in predictions]).astype(np.float64)
    row_F = np.array([prediction["row"] for prediction in predictions])
    sums_NC = np.zeros((num_rows, logits_FC.shape[1]))
    np.add.at(sums_NC, row_F, logits_FC)
    return sums_NC / np.bincount(row_F, minlength=num_rows)[:, None]


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no padding token",
            where=tokenizer.name_or_path,
            expected="one, since a classifier over a decoder finds the end of a text by it",
            fix="set tokenizer.pad_token (often to eos_token) and save the tokenizer",
        )


def _check_windows(tokenizer: PreTrainedTokenizerBase, rows: Rows, *, max_length: int, stride: int) -> None:
    where = "classification.long_documents"
    if "text_pair" in rows[0]:
        raise UserError("windows over a pair of texts", where=where, expected="a single text", fix="use truncate")
    require_fast(tokenizer, fix=f"{where}=truncate")
    window_room(tokenizer, max_length, stride=stride)
