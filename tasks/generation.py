"""Causal language modelling: plain text, a prompt with its completion, or a chat."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from heedful import UserError
from sources.texts import counted
from tasks import causal
from tasks.batching import IGNORED
from tasks.decoding import described, end_with, to_texts
from tasks.lm_loss import likelihoods, next_tokens, scored
from tasks.metrics import resampling
from tasks.metrics.loading import load_metric
from tasks.options import GenerationOptions
from tasks.packing import keeps_apart, pack
from tasks.prompts import (
    Piece,
    answer_end,
    chat_pieces,
    check_system,
    completion_pieces,
    render,
    start_ids,
    tokenize_pieces,
)
from tasks.protocol import Batch, Columns, Features, Output, Prediction, Resample, Rows
from tasks.windows import plan_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["text", "completion", "chat"]
FORM_OF: dict[str, Form] = {"completion": "completion", "messages": "chat", "text": "text"}
"""The column that tells what form the rows have."""
ROLES = ("system", "user", "assistant", "tool")

logger = logging.getLogger("heedful.tasks.generation")


@dataclass(frozen=True)
class Generation:
    """Continue a text; implements ``Task``.

    Plain text is learned from its first token to the one that ends it; of prompts and chats only the answers are. A
    text beyond ``max_length`` becomes windows that share ``stride`` tokens, each learned from once. A prompt that
    would leave no room for its completion loses its beginning.

    Args:
        tokenizer: Of the model.
        max_length: Longest feature, in tokens.
        stride: Tokens that two windows of a text share.
        form: What the training rows hold.
        options: Whether texts are packed, and how answers are generated.
    """

    name: ClassVar[str] = "generation"
    auto_class: ClassVar[type] = AutoModelForCausalLM
    tokenizer_kwargs: ClassVar[dict[str, Any]] = {}

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int
    form: Form
    options: GenerationOptions

    @property
    def packing(self) -> bool:
        """Whether several short texts are put into one training example."""
        return self.form == "text" and self.options.packing

    @property
    def headline(self) -> str:
        """The metric that picks the best checkpoint."""
        return "perplexity" if self.form == "text" else "rougeL"

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        model_config: PreTrainedConfig,
        max_length: int,
        stride: int,
        options: GenerationOptions,
    ) -> Self:
        """Take the form from the columns of the training rows.

        Raises:
            UserError: Rows of no form or of several, no token that ends a text, a chat without a template, or windows
                that would not move on.
        """
        form = _form(rows[0], where="data.train")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "a tokenizer without eos_token", where=tokenizer.name_or_path, expected="a token that ends a text"
            )
        if form == "chat" and tokenizer.chat_template is None:
            raise UserError(
                "a tokenizer without a chat template",
                where=tokenizer.name_or_path,
                fix="take a chat model, or give the data as prompt and completion",
            )
        if form == "chat":
            answer_end(tokenizer)  # refuses a template under which no end can be learned
        if form == "text" and not 1 <= stride <= max_length // 2:
            raise UserError(
                f"data.stride={stride}",
                expected=f"1 to {max_length // 2}, half of model.max_length: the context that a window takes over",
            )
        logger.info("rows of the form %s; decoding: %s", form, described(options.decoding))
        return cls(tokenizer, max_length, stride, form, options)

    def check(self, rows: Rows, *, where: str) -> None:
        """Refuse rows of another form, and chats that can not be learned from.

        Raises:
            UserError: Naming the first such row.
        """
        form = _form(rows[0], where=where) if "prompt" not in rows[0] or "completion" in rows[0] else self.form
        if form != self.form:
            raise UserError(f"rows of the form {form}", where=where, expected=f"{self.form}, as in training")
        for i, row in enumerate(rows):
            if "messages" in row:
                _check_chat(row["messages"], where=f"{where}, row {i}")
        if any(message["role"] == "system" for row in rows for message in row.get("messages", [])):
            check_system(self.tokenizer, where=where)
        if silent := [i for i, row in enumerate(rows) if not _answer(row, "-").strip()]:
            logger.warning(
                "! %s: %s with an empty answer, the first of them row %d: to say nothing is learned from them",
                where,
                counted(len(silent), "rows"),
                silent[0],
            )

    def check_answers(self, rows: Rows, *, where: str) -> None:
        """Refuse prompts to score that have no answers; ``predict`` takes them.

        Raises:
            UserError: Naming the first such row.
        """
        if self.form == "text" or (self.form == "completion" and "completion" in rows[0]):
            return
        for i, row in enumerate(rows):
            if row.get("messages", [{"role": "user"}])[-1]["role"] != "assistant":
                raise UserError(
                    "a prompt without an answer to compare with",
                    where=f"{where}, row {i}",
                    expected="completions, or chats that end with the assistant's answer",
                )

    def sequences(self) -> list[dict[str, int]]:
        """A text, which is only read, or a prompt with its answer."""
        answer = {"generation.decoding.max_new_tokens": self.options.decoding.max_new_tokens}
        return [{"model.max_length": self.max_length} | (answer if self.form != "text" else {})]

    def prepare_model(self, model: nn.Module) -> None:
        """Try out whether the model looks back only, and keeps packed texts apart; let it end its turn in a chat.

        Raises:
            UserError: It sees what it is to predict, or does not look at the positions (one text would be learned with
                another before it).
        """
        causal.check_causal(model)
        if self.form == "chat":
            end_with(model, self.tokenizer, answer_end(self.tokenizer))
        if self.packing and not keeps_apart(model, self.max_length):
            raise UserError(
                f"{type(model).__name__} answers otherwise where a text is packed behind another",
                where="generation.packing",
                fix="generation.packing=false, or, if attention= names a variant, one that goes by distances alone",
            )

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the head is the checkpoint's."""
        return {}

    def encode(self, rows: Columns, *, training: bool) -> Features:
        """Tokenize; one feature a row, a window, or in training a block of packed texts.

        Raises:
            UserError: A prompt that is empty, or in training one without an answer.
        """
        if "text" in rows:
            windows = self._windows(rows)
            features = list(pack(windows, self.max_length)) if self.packing and training else list(windows)
        else:
            features = self._answers(rows)
            if training and (bare := [f["row"] for f in features if len(f["input_ids"]) == f["prompt_length"]]):
                raise UserError(
                    f"{counted(len(bare), 'rows')} without an answer to learn",
                    where=f"row {bare[0]}",
                    expected="a completion, or a chat that ends with the assistant's answer",
                    fix="leave these rows out, or the turns after the last answer",
                )
        return {name: [feature[name] for feature in features] for name in features[0]}

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad on the right, with ``labels`` and, where texts are packed, ``position_ids`` (each BT)."""
        return causal.collate(examples, self.tokenizer)

    def count(self, batch: Batch) -> Tensor:
        """Tokens that carry loss."""
        return causal.count(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy of the next tokens."""
        return causal.loss(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        """Summed loss ``nll`` (B) over ``tokens`` (B); of prompts also the answers, ``generated`` (BG)."""
        labels_BT = next_tokens(batch["labels"])
        answers = {"row": batch["row"], **likelihoods(model, causal.inputs(batch), labels_BT)}
        if "prompt_length" in batch:
            answers["generated"] = causal.answer(model, batch, self.tokenizer, self.options.decoding)
        return answers

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        """One answer a row.

        Returns:
            ``{"nll", "tokens"}`` in nats, where there is something to score; ``{"generated"}`` for prompts.
        """
        outputs: list[Output] = [{"nll": 0.0, "tokens": 0} for _ in range(len(rows))]
        for prediction in predictions:
            output = outputs[int(prediction["row"])]
            output["nll"] += float(prediction["nll"])
            output["tokens"] += int(prediction["tokens"])
        if predictions and "generated" in predictions[0]:
            texts = to_texts(self.tokenizer, [prediction["generated"] for prediction in predictions])
            for prediction, text in zip(predictions, texts, strict=True):
                outputs[int(prediction["row"])]["generated"] = text
        return [output if output["tokens"] else {"generated": output.get("generated", "")} for output in outputs]

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        """Perplexity of the learned tokens; of answers also ROUGE and exact match."""
        nlls, tokens = scored(outputs)
        scores = dict(load_metric("perplexity").compute(predictions=nlls, references=tokens))
        if self.form == "text":
            return scores
        generated, references = [output["generated"] for output in outputs], self._references(rows)
        rouge = load_metric("rouge").compute(predictions=generated, references=references)
        hits = [one == other for one, other in zip(generated, references, strict=True)]
        return {**rouge, "exact_match": float(np.mean(hits)), **scores}

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        """The same metrics as a function of row indices."""
        perplexity = resampling.perplexity(*scored(outputs))
        if self.form == "text":
            return perplexity
        generated, references = [output["generated"] for output in outputs], self._references(rows)
        answers = resampling.answers(generated, references)
        return lambda rows_I: answers(rows_I) | perplexity(rows_I)

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        """Count ``tokens``, ``learned_tokens`` and, of prompts with answers, the ``tokens_lost``."""
        lengths = list(features["length"])
        learned = sum(label != IGNORED for labels in features["labels"] for label in labels[1:])
        counts = {"features": len(lengths), "tokens": sum(lengths), "learned_tokens": learned}
        if self.form == "text":
            return counts
        whole = [sum(len(ids) for ids, _ in pieces) for pieces in self._pieces(_columns(rows))]
        return counts | {"tokens": sum(whole), "tokens_lost": sum(whole) - sum(lengths)}

    def _references(self, rows: Rows) -> list[str]:
        """What the answers are compared with: as the template writes them, where there is one."""
        self.check_answers(rows, where="the rows to score")
        if self.form == "completion":
            return [row["completion"].strip() for row in rows]
        learned = [self._row_pieces(row)[-1].text for row in rows]
        ids = self.tokenizer(learned, add_special_tokens=False)["input_ids"]
        return to_texts(self.tokenizer, [np.array(row) for row in ids])

    def _windows(self, rows: Columns) -> Iterator[dict[str, Any]]:
        start, end = start_ids(self.tokenizer), self.tokenizer.eos_token_id
        texts = self.tokenizer(list(rows["text"]), add_special_tokens=False, verbose=False)["input_ids"]
        for row, ids in zip(rows["row"], texts, strict=True):
            whole = [*start, *ids, end]
            seen = 0
            for first, last in plan_windows([1] * len(whole), room=self.max_length, stride=self.stride):
                labels = [IGNORED] * (seen - first) + whole[seen:last]
                yield {"input_ids": whole[first:last], "labels": labels, "row": row, "length": last - first}
                seen = last

    def _answers(self, rows: Columns) -> list[dict[str, Any]]:
        start = start_ids(self.tokenizer)
        features = [
            {**causal.join_pieces(_fitted(pieces, self.max_length, start=start)), "row": row}
            for row, pieces in zip(rows["row"], self._pieces(rows), strict=True)
        ]
        for feature in features:
            if not feature["prompt_length"]:
                raise UserError("an empty prompt", where=f"row {feature['row']}", expected="some text to go on from")
        return features

    def _pieces(self, rows: Columns) -> list[list[tuple[list[int], bool]]]:
        chat = self.form == "chat"
        return tokenize_pieces(self.tokenizer, [self._row_pieces(row) for row in _as_rows(rows)], special=not chat)

    def _row_pieces(self, row: Mapping[str, Any]) -> list[Piece]:
        if self.form != "chat":
            return completion_pieces(row["prompt"], row.get("completion"), end=self.tokenizer.eos_token)
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        if messages[-1]["role"] == "assistant":
            return chat_pieces(self.tokenizer, messages, where=f"row {row['row']}")
        return [Piece(render(self.tokenizer, messages, answer_next=True), learned=False)]


def _form(row: Mapping[str, Any], *, where: str) -> Form:
    forms = [form for column, form in FORM_OF.items() if column in row]
    if len(forms) == 1 and ("prompt" in row) == (forms[0] == "completion"):
        return forms[0]
    raise UserError(
        f"the columns {', '.join(name for name in row if name != 'row') or 'have none of the usual names'}",
        where=where,
        expected="text, or prompt and completion, or messages",
        fix="say which they are: data.columns.text=..., or .prompt and .completion, or .messages; drop the others",
    )


def _answer(row: Mapping[str, Any], none: str) -> str:
    """The completion, or the assistant's last turn."""
    turns = [message["content"] for message in row.get("messages", []) if message["role"] == "assistant"]
    answer: str = row.get("completion", turns[-1] if turns else none)
    return answer


def _check_chat(messages: Sequence[Mapping[str, str]], *, where: str) -> None:
    roles = [message["role"] for message in messages]
    if unknown := sorted(set(roles) - set(ROLES)):
        raise UserError(f"a message of the role {unknown[0]!r}", where=where, expected=f"one of {', '.join(ROLES)}")
    if roles[:1] == ["assistant"]:
        raise UserError("a chat that begins with an answer", where=where, expected="a question, of the user, before it")
    if not roles or roles[-1] not in ("user", "assistant"):
        raise UserError("a chat without an answer", where=where, expected="messages that end with the assistant's")


def _fitted(pieces: list[tuple[list[int], bool]], max_length: int, *, start: list[int]) -> list[tuple[list[int], bool]]:
    """Cut the beginning of what comes before the last answer, and only if that is not enough the answer's end.

    Args:
        start: What every text begins with (Llama's and Gemma's first token): it stays where it stood.
    """
    if start and pieces[0][0][: len(start)] == start:
        rest = [(pieces[0][0][len(start) :], pieces[0][1]), *pieces[1:]]
        (first, flag), *others = _fitted(rest, max_length - len(start), start=[])
        return [([*start, *first], flag), *others]
    *before, (last, learned) = pieces
    if not learned:
        before, last = pieces, []
    last = last[: max_length - 1]
    excess = sum(len(ids) for ids, _ in before) + len(last) - max_length
    kept = []
    for ids, flag in before:
        cut = min(max(excess, 0), len(ids))
        kept.append((ids[cut:], flag))
        excess -= cut
    return [*kept, (last, True)]


def _as_rows(rows: Columns) -> list[dict[str, Any]]:
    return [dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)]


def _columns(rows: Rows) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}
