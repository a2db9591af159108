"""Named entity recognition, and any other labelling of spans of words.

A word is labelled at its first sub-word. A document longer than the model's input is cut into overlapping windows at
word boundaries; each word is trained and predicted in the one window where it has most context, so that none is lost
and none counts twice.

Shapes: B features in a batch, T tokens, C labels, L labelled words in the batch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification, BatchEncoding

from heedful import UserError
from sources.texts import counted
from tasks.batching import IGNORED, NO_WORD, model_inputs, pad_batch
from tasks.fitting import require_fast
from tasks.metrics import counts
from tasks.metrics.loading import load_metric
from tasks.metrics.ner.ner import entities
from tasks.options import NerOptions
from tasks.protocol import Batch, Columns, Features, Output, Prediction, Resample, Rows
from tasks.tags import check_tags, detect_scheme, opens_with_inside, to_iob2
from tasks.windows import owners, plan_windows, window_room
from tasks.words import first_subwords, subwords_per_word, tokenize_words, word_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger("heedful.tasks.ner")


class _Feature(NamedTuple):
    position: int
    """Of the row among the rows that are encoded together."""
    input_ids: list[int]
    token_type_ids: list[int] | None
    word_index: list[int]
    """The word that is labelled at each token, NO_WORD for none."""


@dataclass(frozen=True)
class Ner:
    """Tag the words of a row; implements ``Task``.

    Args:
        tokenizer: Of the model.
        max_length: Longest feature, in tokens.
        stride: Tokens that two windows of a long document share, at most.
        labels: All IOB2 tags, ``O`` first, in the order of the logits.
        scheme: Tag scheme of the data.
        strict: Score with seqeval's strict mode.
    """

    name: ClassVar[str] = "ner"
    auto_class: ClassVar[type] = AutoModelForTokenClassification
    headline: ClassVar[str] = "f1"
    tokenizer_kwargs: ClassVar[dict[str, Any]] = {"add_prefix_space": True}

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int
    labels: tuple[str, ...]
    scheme: str
    strict: bool

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        model_config: PreTrainedConfig,
        max_length: int,
        stride: int,
        options: NerOptions,
    ) -> Self:
        """Find the tag scheme and the entity types in the training rows.

        Raises:
            UserError: Tags that are none, no entity at all, a stride that does not fit, or a tokenizer that runs words
                together.
        """
        where = "data.train"
        sentences = [row["tags"] for row in rows]
        check_tags(sentences, where=where)
        found = detect_scheme(sentences, where=where)
        scheme, finding = found if options.scheme == "auto" else (options.scheme, "as set by ner.scheme")
        types = {tag[2:] for tags in sentences for tag in tags} - {""}
        if not types:
            raise UserError("no entity in any row", where=where, expected="tags other than O", fix="check data.columns")
        labels = ("O", *sorted(f"{prefix}-{kind}" for prefix in "BI" for kind in types))
        logger.info("tag scheme %s (%s); entity types: %s", scheme, finding, ", ".join(sorted(types)))
        require_fast(tokenizer)
        window_room(tokenizer, max_length, stride=stride)
        word_prefix(tokenizer)
        task = cls(tokenizer, max_length, stride, labels, scheme, options.strict)
        task.check(rows, where=where)
        return task

    def check(self, rows: Rows, *, where: str) -> None:
        """Refuse tags outside the scheme or unseen in training, and rows with more or fewer tags than words.

        Raises:
            UserError: Naming the first such row.
        """
        tagged = [(i, row) for i, row in enumerate(rows) if "tags" in row]
        check_tags([row["tags"] for _, row in tagged], where=where, scheme=self.scheme)
        for i, row in tagged:
            self._check_row(row["tokens"], row["tags"], where=f"{where}, row {i}")

    def sequences(self) -> list[dict[str, int]]:
        """What it reads."""
        return [{"model.max_length": self.max_length}]

    def prepare_model(self, model: nn.Module) -> None:
        """Any model with this head will do."""

    def model_kwargs(self) -> dict[str, Any]:
        """Size and names of the head."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def encode(self, rows: Columns, *, training: bool) -> Features:
        """Tokenize; one feature a row, or several windows of a long one.

        A row without words, or whose words the tokenizer maps to nothing, has nothing to learn or to predict and
        makes no feature.
        """
        found = list(self._features(rows["tokens"]))
        features: Features = {
            "input_ids": [feature.input_ids for feature in found],
            "word_index": [feature.word_index for feature in found],
            "row": [rows["row"][feature.position] for feature in found],
            "length": [len(feature.input_ids) for feature in found],
        }
        if "token_type_ids" in self.tokenizer.model_input_names:
            features["token_type_ids"] = [feature.token_type_ids for feature in found]
        if training or "tags" in rows:
            index_of = {label: i for i, label in enumerate(self.labels)}
            ids = [[index_of[tag] for tag in to_iob2(tags, self.scheme)] for tags in rows["tags"]]
            features["labels"] = [
                [IGNORED if word == NO_WORD else ids[feature.position][word] for word in feature.word_index]
                for feature in found
            ]
        return features

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad to a batch with ``labels`` and ``word_index`` (both BT)."""
        return pad_batch(examples, tokenizer=self.tokenizer, extra={"labels": IGNORED, "word_index": NO_WORD})

    def count(self, batch: Batch) -> Tensor:
        """Labelled words."""
        return (batch["labels"] != IGNORED).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy over the labelled words."""
        logits_BTC = model(**model_inputs(batch)).logits
        chosen_BT = batch["labels"] != IGNORED
        # Most tokens carry no label: to choose first saves their softmax and its gradient.
        return cross_entropy(logits_BTC[chosen_BT].float(), batch["labels"][chosen_BT], reduction="sum")

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        """The best label (``prediction``, BT) and the word that it is for (``word_index``, BT)."""
        prediction_BT = model(**model_inputs(batch)).logits.argmax(dim=-1)
        # int32, since the collectives of NCCL know no int16.
        narrow = {"prediction": prediction_BT.to(torch.int32), "word_index": batch["word_index"].to(torch.int32)}
        return {**narrow, "row": batch["row"]}

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        """Join the windows of each row; a word that no feature holds is tagged O.

        Returns:
            ``{"tokens", "tags", "entities": [{"type", "start", "end", "text"}]}`` with word positions, end exclusive.
        """
        words = [row["tokens"] for row in rows]
        tags = [["O"] * len(tokens) for tokens in words]
        for prediction in predictions:
            row_tags = tags[int(prediction["row"])]
            chosen_T = prediction["word_index"] != NO_WORD
            pairs = zip(prediction["word_index"][chosen_T], prediction["prediction"][chosen_T], strict=True)
            for word, label in pairs:
                row_tags[word] = self.labels[label]
        return [self._output(*pair) for pair in zip(words, tags, strict=True)]

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        """Entity-level metrics of ``metrics/ner``, over every word of every row."""
        predictions, references = self._tags(outputs, rows)
        metric = load_metric("ner")
        return dict(metric.compute(predictions=predictions, references=references, strict=self.strict))

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        """The same metrics as a function of row indices."""
        return counts.ner(*self._tags(outputs, rows), strict=self.strict)

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        """Count tokens (special ones included), words and entities, and which of them no feature holds.

        ``tokens_lost`` are the last sub-words of a word too long for a window. ``words_without_tokens`` are those that
        the tokenizer maps to nothing, whatever the length: an empty word, a lone control character;
        ``entities_with_a_word_without_tokens`` hold one. ``windows`` is the number of features beyond one a row.
        """
        found = [np.zeros(len(row["tokens"]), dtype=bool) for row in rows]
        for row, word_index in zip(features["row"], features["word_index"], strict=True):
            index_T = np.asarray(word_index)
            found[row][index_T[index_T != NO_WORD]] = True
        return {
            **self._account_tokens(features, rows),
            "words": sum(map(len, found)),
            "words_without_tokens": sum(int((~found_N).sum()) for found_N in found),
            **self._account_entities(found, rows),
            "windows": sum(number - 1 for number in Counter(features["row"]).values()),
        }

    def _features(self, sentences: Sequence[Sequence[str]]) -> Iterator[_Feature]:
        prefix = word_prefix(self.tokenizer)
        whole = tokenize_words(self.tokenizer, sentences, prefix=prefix)
        for position, words in enumerate(sentences):
            if len(whole["input_ids"][position]) <= self.max_length:
                index_T = first_subwords(whole.word_ids(position))
                candidates = iter([_feature(whole, position, position, index_T)])
            else:
                candidates = self._windows(position, words, whole.word_ids(position), prefix=prefix)
            yield from (feature for feature in candidates if max(feature.word_index) != NO_WORD)

    def _windows(
        self, position: int, words: Sequence[str], word_ids: Sequence[int | None], *, prefix: str
    ) -> Iterator[_Feature]:
        room = window_room(self.tokenizer, self.max_length, stride=self.stride)
        windows = plan_windows(subwords_per_word(word_ids, len(words)), room=room, stride=self.stride)
        owner_N = owners(windows, len(words))
        parts = [words[start:end] for start, end in windows]
        encoded = tokenize_words(self.tokenizer, parts, prefix=prefix, max_length=self.max_length)
        for i, (start, _) in enumerate(windows):
            words_T = [NO_WORD if word == NO_WORD else start + word for word in first_subwords(encoded.word_ids(i))]
            own_T = [word if word != NO_WORD and owner_N[word] == i else NO_WORD for word in words_T]
            yield _feature(encoded, i, position, own_T)

    def _check_row(self, words: Sequence[str], tags: Sequence[str], *, where: str) -> None:
        if len(words) != len(tags):
            found = f"{counted(len(tags), 'tags')} for {counted(len(words), 'words')}"
            raise UserError(found, where=where, expected="one tag a word")
        iob2 = to_iob2(tags, self.scheme)
        unknown = next((i for i, tag in enumerate(iob2) if tag not in self.labels), None)
        if unknown is not None:
            raise UserError(
                f"tag {tags[unknown]!r}, unseen in training",
                where=f"{where}, word {unknown}",
                expected=f"one of {', '.join(self.labels)}",
                fix="correct the tag, or give training a row with it",
            )
        stray = opens_with_inside(iob2) if self.strict else None
        if stray is not None:
            raise UserError(
                f"tag {tags[stray]!r} continues no entity, so the strict mode would not count it",
                where=f"{where}, word {stray}",
                expected=f"B-{tags[stray][2:]}, as {self.scheme} has it",
                fix="set ner.strict=false or ner.scheme=IOB1, or correct the tag",
            )

    def _output(self, words: Sequence[str], tags: list[str]) -> Output:
        spans = [
            {"type": kind, "start": start, "end": end, "text": " ".join(words[start:end])}
            for kind, start, end in entities(tags, strict=self.strict)
        ]
        return {"tokens": list(words), "tags": tags, "entities": spans}

    def _tags(self, outputs: Sequence[Output], rows: Rows) -> tuple[list[list[str]], list[list[str]]]:
        return [output["tags"] for output in outputs], [to_iob2(row["tags"], self.scheme) for row in rows]

    def _account_tokens(self, features: Columns, rows: Rows) -> dict[str, int]:
        parts_of = Counter(features["row"])
        length_of = dict(zip(features["row"], features["length"], strict=True))
        # A row that is one feature, and does not fill it, is whole; only the others need a second look.
        whole = [i for i in range(len(rows)) if parts_of[i] == 1 and length_of[i] < self.max_length]
        tokens = sum(length_of[i] for i in whole)
        rest = [rows[i]["tokens"] for i in sorted(set(range(len(rows))) - set(whole))]
        if not rest:
            return {"tokens": tokens, "tokens_lost": 0}
        room = window_room(self.tokenizer, self.max_length, stride=self.stride)
        encoded = tokenize_words(self.tokenizer, rest, prefix=word_prefix(self.tokenizer))
        lengths = [num for i, words in enumerate(rest) for num in subwords_per_word(encoded.word_ids(i), len(words))]
        tokens += sum(map(len, encoded["input_ids"]))
        return {"tokens": tokens, "tokens_lost": sum(max(0, length - room) for length in lengths)}

    def _account_entities(self, found: Sequence[Any], rows: Rows) -> dict[str, int]:
        spans = [
            found[i][start:end].all()
            for i, row in enumerate(rows)
            if "tags" in row
            for _, start, end in entities(to_iob2(row["tags"], self.scheme), strict=self.strict)
        ]
        return {"entities": len(spans), "entities_with_a_word_without_tokens": len(spans) - sum(map(int, spans))}


def _feature(encoded: BatchEncoding, i: int, position: int, word_index: list[int]) -> _Feature:
    type_ids = encoded["token_type_ids"][i] if "token_type_ids" in encoded else None
    return _Feature(position, encoded["input_ids"][i], type_ids, word_index)
