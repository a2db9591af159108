"""Summarization and translation: one text into another, by an encoder-decoder or by a decoder-only model.

They are one task that is scored in two ways. On a decoder-only checkpoint the source stands in a prompt and the loss is
on what follows it; data, metrics and verbs are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from heedful import UserError
from sources.texts import first_few, first_line
from tasks import causal
from tasks.batching import IGNORED, model_inputs, pad_batch
from tasks.decoding import described, generate, to_texts
from tasks.fitting import require_fast
from tasks.lm_loss import summed_loss
from tasks.metrics import resampling
from tasks.metrics.bleu.bleu import signatures
from tasks.metrics.loading import load_metric
from tasks.options import TextToTextOptions, TranslationOptions
from tasks.prompts import completion_pieces, tokenize_pieces
from tasks.protocol import Batch, Columns, Features, Output, Prediction, Resample, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("heedful.tasks.text_to_text")


@dataclass(frozen=True)
class TextToText:
    """Write the target of a source; implements ``Task``.

    Args:
        tokenizer: Of the model.
        max_length: Longest source, in tokens, special ones (or the prompt) included; the rest is cut off.
        decoder_start: The token that an encoder-decoder's answer follows; None for a decoder-only model.
        options: Their type says which of the two tasks it is.
    """

    tokenizer_kwargs: ClassVar[dict[str, Any]] = {}

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    decoder_start: int | None
    options: TextToTextOptions

    def __post_init__(self) -> None:
        # Tokenizers for many languages write the codes themselves, once they know them; they do not keep them.
        for side, language in _languages(self.options).items():
            setattr(self.tokenizer, side, language)

    @property
    def name(self) -> str:
        """``summarization`` or ``translation``."""
        return _name(self.options)

    @property
    def headline(self) -> str:
        """The metric that picks the best checkpoint."""
        return "bleu" if isinstance(self.options, TranslationOptions) else "rougeL"

    @property
    def scored_by(self) -> str:
        """sacrebleu's signature, without which its figures can not be compared; empty where it does not score."""
        return _signature(self.options) if isinstance(self.options, TranslationOptions) else ""

    @property
    def auto_class(self) -> type:
        """What the checkpoint is."""
        return AutoModelForCausalLM if self.decoder_start is None else AutoModelForSeq2SeqLM  # type: ignore[no-any-return]

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        model_config: PreTrainedConfig,
        max_length: int,
        stride: int,
        options: TextToTextOptions,
    ) -> Self:
        """Find out what kind of model it is for.

        Raises:
            UserError: Languages that the tokenizer does not know or wants to be told, settings of the other kind of
                model, no token to begin or to end an answer with, or a tokenizer for BLEU that can not be had.
        """
        _check_languages(tokenizer, options)
        _check_source_settings(options, encoder_decoder=model_config.is_encoder_decoder)
        logger.info("decoding: %s", described(options.decoding))
        if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
            raise UserError(
                "a tokenizer without eos_token", where=tokenizer.name_or_path, expected="a token that ends a text"
            )
        if isinstance(options, TranslationOptions):
            logger.info("scored by %s", _signature(options))
        if model_config.is_encoder_decoder:
            _suggest_prefix(model_config, options)
            return cls(tokenizer, max_length, _decoder_start(tokenizer, model_config, options), options)
        require_fast(tokenizer)
        if tokenizer.eos_token is None:
            raise UserError(
                "a tokenizer without eos_token", where=tokenizer.name_or_path, expected="a token that ends an answer"
            )
        logger.info("a decoder-only model: each source is put as %r", options.prompt_template)
        task = cls(tokenizer, max_length, None, options)
        if task._source_room() < 1:
            raise UserError(
                f"a prompt_template that leaves no room for a source in model.max_length={max_length}",
                where=f"{task.name}.prompt_template",
                fix="raise model.max_length",
            )
        return task

    def check(self, rows: Rows, *, where: str) -> None:
        """Any two texts will do.

        Raises:
            UserError: An empty source, or an empty target: it would teach to say nothing.
        """
        for i, row in enumerate(rows):
            for side in ("source", "target"):
                if side in row and not row[side].strip():
                    raise UserError(f"an empty {side}", where=f"{where}, row {i}", fix="leave the row out")

    def sequences(self) -> list[dict[str, int]]:
        """A source and what is written, apart in an encoder-decoder and one behind the other elsewhere."""
        source = {"model.max_length": self.max_length}
        targets = [
            {f"{self.name}.max_target_length": self.options.max_target_length},
            {f"{self.name}.decoding.max_new_tokens": self.options.decoding.max_new_tokens},
        ]
        return [source, *targets] if self.decoder_start is not None else [source | target for target in targets]

    def prepare_model(self, model: nn.Module) -> None:
        """Any encoder-decoder will do; what continues a prompt must look back only.

        Raises:
            UserError: It sees what it is to predict.
        """
        if self.decoder_start is None:
            causal.check_causal(model)

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the head is the checkpoint's."""
        return {}

    def encode(self, rows: Columns, *, training: bool) -> Features:
        """Tokenize; one feature a row. Sources and targets beyond their limits are cut, see ``account``."""
        features = self._prompts(rows) if self.decoder_start is None else self._pairs(rows)
        return {name: [feature[name] for feature in features] for name in features[0]}

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad to a batch: ``labels`` (BT for a decoder-only model, else BS with ``decoder_input_ids``)."""
        if self.decoder_start is None:
            return causal.collate(examples, self.tokenizer)
        batch = pad_batch(examples, tokenizer=self.tokenizer)
        if "labels" not in examples[0]:
            return batch
        targets = [{"input_ids": example["labels"], "row": example["row"]} for example in examples]
        padded = pad_batch(targets, tokenizer=self.tokenizer, side="right")
        batch["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, IGNORED)
        batch["decoder_input_ids"] = padded["input_ids"].roll(1, dims=1)
        batch["decoder_input_ids"][:, 0] = self.decoder_start
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Tokens of the targets, with the one that ends each."""
        return causal.count(batch) if self.decoder_start is None else (batch["labels"] != IGNORED).sum().float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy of the targets' tokens, smoothed as set (Szegedy et al. 2016, section 7)."""
        smoothing = self.options.label_smoothing_factor
        if self.decoder_start is None:
            return causal.loss(model, batch, label_smoothing=smoothing)
        inputs = {**model_inputs(batch), "use_cache": False}
        return summed_loss(model, inputs, batch["labels"], label_smoothing=smoothing)

    def predict(self, model: nn.Module, batch: Batch) -> Batch:
        """The most likely target as found by search, ``generated`` (BG)."""
        options = self.options.decoding
        if self.decoder_start is None:
            return {"generated": causal.answer(model, batch, self.tokenizer, options), "row": batch["row"]}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        language = _language_id(self.tokenizer, self.options)
        generated = generate(
            model,
            inputs,
            self.tokenizer,
            options,
            decoder_start_token_id=self.decoder_start,
            forced_bos_token_id=language if language != self.decoder_start else None,
        )
        return {"generated": generated, "row": batch["row"]}

    def decode(self, predictions: Sequence[Prediction], rows: Rows) -> list[Output]:
        """``{"generated"}`` for each row."""
        texts = to_texts(self.tokenizer, [prediction["generated"] for prediction in predictions])
        outputs: list[Output] = [{} for _ in range(len(rows))]
        for prediction, text in zip(predictions, texts, strict=True):
            outputs[int(prediction["row"])] = {"generated": text}
        return outputs

    def score(self, outputs: Sequence[Output], rows: Rows) -> dict[str, float]:
        """ROUGE, or BLEU and chrF."""
        texts, golds = _texts(outputs), [row["target"] for row in rows]
        if isinstance(self.options, TranslationOptions):
            return dict(
                load_metric("bleu").compute(predictions=texts, references=golds, tokenize=self.options.tokenize)
            )
        return dict(load_metric("rouge").compute(predictions=texts, references=golds))

    def resample(self, outputs: Sequence[Output], rows: Rows) -> Resample:
        """The same metrics as a function of row indices."""
        texts, golds = _texts(outputs), [row["target"] for row in rows]
        if isinstance(self.options, TranslationOptions):
            return resampling.bleu(texts, golds, tokenize=self.options.tokenize)
        return resampling.rouge(texts, golds)

    def account(self, features: Columns, rows: Rows) -> dict[str, int]:
        """Count the tokens of sources and targets, and how many of them were cut off."""
        prefix = self.options.source_prefix
        sources, targets = [prefix + row["source"] for row in rows], [row["target"] for row in rows if "target" in row]
        side = "text" if self.decoder_start is None else "text_target"
        whole = {"source_tokens": self._sizes(sources), "target_tokens": self._sizes(targets, side=side)}
        special = 1 if self.decoder_start is None else self.tokenizer.num_special_tokens_to_add()
        limits = {"source_tokens": self._source_room(), "target_tokens": self.options.max_target_length - special}
        counts = {name: sum(sizes) for name, sizes in whole.items()}
        return counts | {
            f"{name}_lost": sum(max(0, size - limits[name]) for size in sizes) for name, sizes in whole.items()
        }

    def _pairs(self, rows: Columns) -> list[dict[str, Any]]:
        sources = [self.options.source_prefix + text for text in rows["source"]]
        ids = self.tokenizer(sources, truncation=True, max_length=self.max_length)["input_ids"]
        features = [{"input_ids": i, "row": row, "length": len(i)} for i, row in zip(ids, rows["row"], strict=True)]
        if "target" not in rows:
            return features
        limit = self.options.max_target_length
        labels = self.tokenizer(text_target=list(rows["target"]), truncation=True, max_length=limit)["input_ids"]
        for feature, target in zip(features, labels, strict=True):
            feature["labels"] = self._ended(target)
            feature["length"] += len(feature["labels"])
        return features

    def _ended(self, target: list[int]) -> list[int]:
        """The target without the token that it follows anyway, and with the one that ends it."""
        kept = target[1:] if target[:1] == [self.decoder_start] else target
        if kept[-1:] == [_language_id(self.tokenizer, self.options)]:  # mBART's, which its decoder begins with
            kept = kept[:-1]
        ends = [token for token in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) if token is not None]
        return kept if kept[-1:] and kept[-1] in ends else [*kept[: self.options.max_target_length - 1], ends[0]]

    def _prompts(self, rows: Columns) -> list[dict[str, Any]]:
        before, after = self.options.prompt_template.split("{source}")
        targets: Sequence[str | None] = rows.get("target", [None] * len(rows["row"]))
        end = self.tokenizer.eos_token
        pieces = [
            completion_pieces(before + source + after, target, end=end)
            for source, target in zip(self._cut(rows["source"], self._source_room()), targets, strict=True)
        ]
        tokenized = tokenize_pieces(self.tokenizer, pieces, special=True)
        limit = self.options.max_target_length
        features = []
        for row, ((prompt, _), *target) in zip(rows["row"], tokenized, strict=True):
            kept = target[0][0] if target else []
            answer = kept if len(kept) <= limit else [*kept[: limit - 1], kept[-1]]
            features.append({**causal.join_pieces([(prompt, False), (answer, True)]), "row": row})
        return features

    def _source_room(self) -> int:
        """Tokens of a source that there is room for."""
        if self.decoder_start is not None:
            return int(self.max_length - self.tokenizer.num_special_tokens_to_add())
        frame = self.tokenizer(self.options.prompt_template.replace("{source}", ""))["input_ids"]
        # One more: a token may fall apart where the source is cut.
        return self.max_length - len(frame) - 1

    def _cut(self, texts: Sequence[str], room: int) -> list[str]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [_end(offsets, room) for offsets in encoded["offset_mapping"]]
        return [text[:end] for text, end in zip(texts, ends, strict=True)]

    def _sizes(self, texts: Sequence[str], *, side: str = "text") -> list[int]:
        if not texts:
            return []
        encoded = self.tokenizer(**{side: list(texts)}, add_special_tokens=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]


def _end(offsets: Sequence[tuple[int, int]], room: int) -> int | None:
    """Where to cut a text of these tokens so that ``room`` of them hold it; None keeps it whole.

    Several tokens may share one character, such as an emoji: it is left out rather than cut through.
    """
    if len(offsets) <= room:
        return None
    while room and offsets[room][0] < offsets[room - 1][1]:
        room -= 1
    return offsets[room - 1][1] if room else 0


def _texts(outputs: Sequence[Output]) -> list[str]:
    return [output["generated"] for output in outputs]


def _languages(options: TextToTextOptions) -> dict[str, str]:
    if not isinstance(options, TranslationOptions) or options.source_lang is None or options.target_lang is None:
        return {}
    return {"src_lang": options.source_lang, "tgt_lang": options.target_lang}


def _name(options: TextToTextOptions) -> str:
    return "translation" if isinstance(options, TranslationOptions) else "summarization"


def _signature(options: TranslationOptions) -> str:
    try:
        return f"sacrebleu: {'; '.join(signatures(options.tokenize))}"
    except (RuntimeError, ImportError, OSError) as error:  # a package that is not there, or a model that is fetched
        raise UserError(
            f"a tokenizer for BLEU that can not be had: {first_line(error)}",
            where=f"translation.tokenize={options.tokenize}",
            fix="install what sacrebleu asks for (sacrebleu[ja], sacrebleu[ko]), be online, or take another: char, 13a",
        ) from error


def _check_source_settings(options: TextToTextOptions, *, encoder_decoder: bool) -> None:
    """Refuse the setting that the other kind of model takes its sources by."""
    idle, useful = ("prompt_template", "source_prefix") if encoder_decoder else ("source_prefix", "prompt_template")
    # By value, not by model_fields_set: a resolved configuration writes every default out.
    if (value := getattr(options, idle)) != type(options).model_fields[idle].default:
        raise UserError(
            f"{idle}={value!r} has no effect on {'an encoder-decoder' if encoder_decoder else 'a decoder-only model'}",
            where=f"{_name(options)}.{idle}",
            fix=f"write it into {useful}",
        )


def _suggest_prefix(model_config: PreTrainedConfig, options: TextToTextOptions) -> None:
    """Say that a T5 was trained with prefixes, where none is set."""
    prefixes = getattr(model_config, "task_specific_params", None) or {}
    if model_config.model_type == "t5" and not options.source_prefix and prefixes:
        known = ", ".join(repr(p["prefix"]) for p in prefixes.values() if "prefix" in p)
        setting = f"{_name(options)}.source_prefix"
        logger.warning("! this T5 was trained with prefixes (%s) and %s is not set", known, setting)


def _check_languages(tokenizer: PreTrainedTokenizerBase, options: TextToTextOptions) -> None:
    if not isinstance(options, TranslationOptions):
        return
    wanted, given = hasattr(tokenizer, "src_lang"), _languages(options)
    half = (options.source_lang is None) != (options.target_lang is None)
    if half or wanted != bool(given):
        raise UserError(
            "no languages are set, or only one" if wanted else "languages for a tokenizer that knows none",
            where="translation.source_lang, translation.target_lang",
            expected="both codes, as this tokenizer writes them" if wanted else "none",
        )
    codes = _codes(tokenizer)
    for language in given.values():
        if language not in (codes or {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}):
            raise UserError(
                f"a language that the tokenizer does not know: {language!r}",
                where="translation",
                expected=f"one of {first_few(sorted(codes))}" if codes else "",
            )


def _language_id(tokenizer: PreTrainedTokenizerBase, options: TextToTextOptions) -> int | None:
    """The token that an answer in the target language begins with, for models of many languages."""
    if not (languages := _languages(options)):
        return None
    target = languages["tgt_lang"]
    return int(tokenizer.convert_tokens_to_ids(_codes(tokenizer).get(target, target)))


def _codes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The token of each code, where the tokenizer writes another (M2M100 ``__en__`` for ``en``); else empty."""
    return getattr(tokenizer, "lang_code_to_token", {})


def _decoder_start(
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    options: TextToTextOptions,
) -> int:
    """The checkpoint's own; mBART's is the target language."""
    own = getattr(model_config, "decoder_start_token_id", None)
    start = own if own is not None else _language_id(tokenizer, options)
    if start is None:
        raise UserError(
            "no decoder_start_token_id",
            where="model.name: config.json",
            expected="the token that the decoder begins with",
        )
    return int(start)
