"""Extractive question answering, with or without questions that have no answer (SQuAD v1.1, v2).

Long contexts become overlapping windows, as in the example ``run_qa.py`` of transformers. How an answer is chosen from
the windows is in ``tasks/spans.py``.

Shapes: B windows in a batch, T tokens, K candidates (``n_best_size``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForQuestionAnswering

from heedful import UserError
from tasks.batching import model_inputs, pad_batch
from tasks.fitting import require_fast
from tasks.metrics import resampling
from tasks.metrics.loading import load_metric
from tasks.options import QaOptions
from tasks.protocol import Batch, Columns, Features, Output, Prediction, Resample, Rows
from tasks.spans import best_spans, softmax
from tasks.windows import window_room

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase

OUTSIDE = -1
"""Character offset of a token that is not of the context."""
N_BEST_SHOWN = 3


@dataclass(frozen=True)
class Qa:
    """Find the answer to a question in its context; implements ``Task``.

    A window that does not hold the whole answer is labeled with the position of CLS, in v1 too, as in ``run_qa.py``.
    Of several gold answers, training uses the first and the score takes the best.

    Args:
        tokenizer: Of the model; a fast one.
        max_length: Longest window, question included, in tokens.
        stride: Tokens of context that two windows share.
        version_2_with_negative: Questions may have no answer.
        n_best_size: Start and end candidates kept from each window, and answers kept of each question.
        max_answer_length: Longest answer, in tokens.
        null_score_diff_threshold: No answer is given when it scores above the best span by more than this.
    """

    name: ClassVar[str] = "qa"
    auto_class: ClassVar[type] = AutoModelForQuestionAnswering
    headline: ClassVar[str] = "f1"
    tokenizer_kwargs: ClassVar[dict[str, Any]] = {}

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int
    version_2_with_negative: bool = False
    n_best_size: int = 20
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        model_config: PreTrainedConfig,
        max_length: int,
        stride: int,
        options: QaOptions,
    ) -> Self:
        """Make the task and check its training rows.

        Raises:
            UserError: A slow tokenizer, windows that would not move forward, or as ``check``.
        """
        require_fast(tokenizer)
        window_room(tokenizer, max_length, stride=stride, pair=True)
        task = cls(tokenizer, max_length, stride, **options.model_dump())
        task.check(rows, where="data.train")
        return task

    def check(self, rows: Rows, *, where: str) -> None:
        """Refuse answers that are not in the context where they say, and, in v1, questions without an answer.

        Raises:
            UserError: Naming the first such row.
        """
        for i, row in enumerate(rows):
            if "answers" in row:
                self._check_answers(row, where=f"{where}, row {i}")

    def sequences(self) -> list[dict[str, int]]:
        """What it reads."""
        return [{"model.max_length": self.max_length}]

    def prepare_model(self, model: nn.Module) -> None:
        """Any model with this head will do."""

    def model_kwargs(self) -> dict[str, Any]:
        """The start and the end of an answer."""
        return {"num_labels": 2}

    def encode(self, rows: Columns, *, training: bool) -> Features:
        """Tokenize; one feature a window.

        Positions of the answer are given where the rows have answers, character offsets unless ``training``.

        Raises:
            UserError: A question that leaves no room for the context.
        """
        questions = [question.strip() for question in rows["question"]]
        self._check_questions(questions, rows["row"])
        encoded = self._tokenize(questions, list(rows["context"]))
        source_F = encoded["overflow_to_sample_mapping"]
        spans = [self._context(encoded, i) for i in range(len(source_F))]
        features: Features = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        features["row"] = [rows["row"][i] for i in source_F]
        features["length"] = [len(ids) for ids in encoded["input_ids"]]
        if training or "answers" in rows:
            answers = [_first_span(answer) for answer in rows["answers"]]
            nulls = [self._null_position(ids) for ids in encoded["input_ids"]]
            pairs = [
                _positions(spans_T2, answers[i], null=null)
                for spans_T2, i, null in zip(spans, source_F, nulls, strict=True)
            ]
            features["start_positions"], features["end_positions"] = map(list, zip(*pairs, strict=True))
        if not training:
            features["char_starts"] = [spans_T2[:, 0].tolist() for spans_T2 in spans]
            features["char_ends"] = [spans_T2[:, 1].tolist() for spans_T2 in spans]
            features["null_position"] = [self._null_position(ids) for ids in encoded["input_ids"]]
        return features

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad to a batch; ``char_starts`` and ``char_ends`` are BT, -1 outside the context."""
        extra = {"char_starts": OUTSIDE, "char_ends": OUTSIDE}
        batch = pad_batch(examples, tokenizer=self.tokenizer, extra=extra)
        lengths_B = torch.tensor([len(example["input_ids"]) for example in examples])
        padding_B = batch["input_ids"].shape[1] - lengths_B
        shift_B = padding_B if self.tokenizer.padding_side == "left" else torch.zeros_like(padding_B)
        for name in ("start_positions", "end_positions", "null_position"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples]) + shift_B
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Windows."""
        return torch.tensor(float(len(batch["input_ids"])), device=batch["input_ids"].device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy over the tokens of a window, the mean of that of the start and that of the end."""
        answer, padding_BT = model(**model_inputs(batch)), batch["attention_mask"] == 0
        # Padding is no candidate: left in, the loss would depend on how far the batch happens to be padded.
        start_BT, end_BT = (
            logits_BT.float().masked_fill(padding_BT, -torch.inf)
            for logits_BT in (answer.start_logits, answer.end_logits)
        )
        start = cross_entropy(start_BT, batch["start_positions"], reduction="sum")
        return (start + cross_entropy(end_BT, batch["end_positions"], reduction="sum")) / 2

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        """The best candidates for start and end among the tokens of the context, and the score of no answer.

        Returns:
            ``{start,end}_{logit,index,char}``, each BK, of logit -inf where a window has fewer tokens; ``null_score``,
            ``row`` (B).
        """
        answer = model(**model_inputs(batch))
        null_B1 = batch["null_position"][:, None]
        scores = [logits_BT.gather(1, null_B1)[:, 0] for logits_BT in (answer.start_logits, answer.end_logits)]
        found: Batch = {"row": batch["row"], "null_score": scores[0].float() + scores[1].float()}
        for name, logits_BT in (("start", answer.start_logits), ("end", answer.end_logits)):
            found |= self._candidates(name, logits_BT.float(), batch[f"char_{name}s"])
        return found

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        """Choose the answer among all windows of a question, as ``postprocess_qa_predictions`` of ``run_qa.py``.

        It differs in three points: the candidates of a window are the best tokens of the context, not those of all
        tokens that happen to be in the context; a span found in two windows counts once; outer spaces are removed.

        Returns:
            ``{"id", "answer", "score", "start", "n_best"}``, for v2 with ``null_score_diff``. The score is a
            probability among the n best. ``start`` is a character of the context, -1 for no answer.
        """
        best = best_spans(predictions, self.n_best_size, max_answer_length=self.max_answer_length)
        nulls = np.full(len(rows), np.inf)
        for prediction in predictions:
            nulls[prediction["row"]] = min(nulls[prediction["row"]], prediction["null_score"])
        return [self._answer(row, best.get(i, []), null=float(nulls[i])) for i, row in enumerate(rows)]

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        """Metrics of ``metrics/squad``."""
        predictions = [{"answer": output["answer"]} for output in outputs]
        if self.version_2_with_negative:
            for prediction, output in zip(predictions, outputs, strict=True):
                prediction |= {"span": _best_span(output), "null_score_diff": output["null_score_diff"]}
        metric = load_metric("squad", "v2" if self.version_2_with_negative else "v1")
        return dict(metric.compute(predictions=predictions, references=[{"text": texts} for texts in _golds(rows)]))

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        """The same metrics as a function of row indices."""
        answers, golds = [output["answer"] for output in outputs], _golds(rows)
        if not self.version_2_with_negative:
            return resampling.squad(answers, golds)
        diffs = [output["null_score_diff"] for output in outputs]
        return resampling.squad_v2(answers, golds, spans=[_best_span(one) for one in outputs], null_score_diffs=diffs)

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        """Count ``windows``, their ``tokens`` (shared ones again), ``answers`` and ``answers_lost``.

        Lost are the answers that no window holds whole. No question is cut: ``encode`` refuses one that is too long.
        """
        counts = {"windows": len(features["row"]), "tokens": sum(features["length"])}
        if "answers" not in rows[0]:
            return counts
        held = {
            row
            for row, ids, start in zip(features["row"], features["input_ids"], features["start_positions"], strict=True)
            if start != self._null_position(ids)
        }
        answered = {i for i, texts in enumerate(_golds(rows)) if texts}
        return counts | {"answers": len(answered), "answers_lost": len(answered - held)}

    def _tokenize(self, questions: list[str], contexts: list[str]) -> BatchEncoding:
        # The context goes where the padding is, as in run_qa.py: XLNet pads and cuts on the left.
        question_first = self.tokenizer.padding_side == "right"
        return self.tokenizer(
            *((questions, contexts) if question_first else (contexts, questions)),
            truncation="only_second" if question_first else "only_first",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def _context(self, encoded: BatchEncoding, i: int) -> Any:
        """Character spans of window i, [T, 2], -1 outside the context."""
        context = 1 if self.tokenizer.padding_side == "right" else 0
        inside_T = np.array([sequence == context for sequence in encoded.sequence_ids(i)])
        return np.where(inside_T[:, None], np.array(encoded["offset_mapping"][i]), OUTSIDE)

    def _null_position(self, input_ids: Sequence[int]) -> int:
        """Where no answer points to: the CLS token, or the first token of a model that has none."""
        cls = self.tokenizer.cls_token_id
        return input_ids.index(cls) if cls in input_ids else 0

    def _candidates(self, name: str, logits_BT: Tensor, chars_BT: Tensor) -> Batch:
        size = min(self.n_best_size, logits_BT.shape[1])
        logit_BK, index_BK = logits_BT.masked_fill(chars_BT == OUTSIDE, -torch.inf).topk(size)
        char_BK = chars_BT.gather(1, index_BK)
        # Of one width in every batch, so that several processes can gather them.
        missing = (0, self.n_best_size - size)
        found = {"logit": (logit_BK, -torch.inf), "index": (index_BK, OUTSIDE), "char": (char_BK, OUTSIDE)}
        return {f"{name}_{kind}": pad(values, missing, value=fill) for kind, (values, fill) in found.items()}

    def _answer(self, row: Mapping[str, Any], spans: Sequence[tuple[float, int, int]], *, null: float) -> Output:
        context, negative = row["context"], self.version_2_with_negative
        found = [_trim(context, start, end) for _, start, end in spans]
        scores = [score for score, _, _ in spans]
        chances = softmax([*scores, null] if negative else scores)
        n_best = [
            {"answer": text, "score": chance, "start": start}
            for (text, start), chance in zip(found, chances[: len(found)], strict=True)
            if text
        ]
        output: Output = {"id": row.get("id", str(row["row"])), "answer": "", "score": 0.0, "start": -1}
        if negative:
            best = max((score for score, (text, _) in zip(scores, found, strict=True) if text), default=0.0)
            output |= {"null_score_diff": null - best, "score": chances[-1]}
        if n_best and not (negative and output["null_score_diff"] > self.null_score_diff_threshold):
            output |= n_best[0]
        return output | {"n_best": n_best[:N_BEST_SHOWN]}

    def _check_answers(self, row: Mapping[str, Any], *, where: str) -> None:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        if not texts and not self.version_2_with_negative:
            raise UserError(
                "a question without an answer",
                where=where,
                expected="an answer to each question (SQuAD v1)",
                fix="set qa.version_2_with_negative=true, or leave out the row",
            )
        for text, start in zip(texts, starts, strict=True):
            found = row["context"][max(start, 0) : start + len(text)]
            if found != text or not text:
                raise UserError(
                    f"answer {text!r}, but the context has {found!r} at character {start}",
                    where=where,
                    expected="answer_start where the answer begins in the context, in characters from 0",
                    fix="correct the row or leave it out",
                )

    def _check_questions(self, questions: list[str], rows: Sequence[int]) -> None:
        # The tokenizer itself would panic here, naming no row.
        room = window_room(self.tokenizer, self.max_length, stride=self.stride, pair=True)
        for row, ids in zip(rows, self.tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
            if len(ids) + self.stride >= room:
                raise UserError(
                    f"a question of {len(ids)} tokens, with model.max_length={self.max_length}",
                    where=f"row {row}",
                    expected=f"less than {room - self.stride}, so that windows of the context can move on",
                    fix="raise model.max_length, lower data.stride, or shorten the question",
                )


def _first_span(answers: Mapping[str, Any]) -> tuple[int, int] | None:
    """First and one past the last character of the first gold answer."""
    if not answers["text"]:
        return None
    return answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])


def _positions(spans_T2: Any, answer: tuple[int, int] | None, *, null: int) -> tuple[int, int]:
    """First and last token that touch the answer; ``null`` for both if the window does not hold it whole."""
    inside = np.flatnonzero(spans_T2[:, 0] != OUTSIDE)
    if answer is None or not len(inside):
        return null, null
    first, last = answer[0], answer[1]
    starts, ends = spans_T2[inside, 0], spans_T2[inside, 1]
    if starts[0] > first or ends[-1] < last:
        return null, null
    touching = inside[(ends > first) & (starts < last)]
    return (int(touching[0]), int(touching[-1])) if len(touching) else (null, null)


def _trim(context: str, start: int, end: int) -> tuple[str, int]:
    text = context[start:end]
    return text.strip(), start + len(text) - len(text.lstrip())


def _golds(rows: Rows) -> list[list[str]]:
    return [list(row["answers"]["text"]) for row in rows]


def _best_span(output: Output) -> str:
    return str(output["n_best"][0]["answer"]) if output["n_best"] else ""
