"""Each task's own settings, the section of the configuration that carries the task's name. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Settings(BaseModel):
    """Frozen; an unknown key is a fault; numbers given where text is wanted are taken as text, true never as 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        return _number(value) if {int, float} & {annotation, *get_args(annotation)} else value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


class Options(Settings):
    """The settings of one task."""


class DecodingOptions(Options):
    """How text is generated; names as in transformers' ``GenerationConfig``. A checkpoint's own habits are left."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    num_beams: int = Field(default=1, ge=1)
    """1 is greedy search."""
    length_penalty: float = 1.0
    repetition_penalty: float = Field(default=1.0, gt=0)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    min_new_tokens: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise ValueError("length_penalty has no effect without num_beams")
        return self


class GenerationOptions(Options):
    """Settings of ``generation``."""

    packing: bool = True
    """Plain text: put several short documents into one example, none of which sees another."""
    decoding: DecodingOptions = DecodingOptions()


class TextToTextOptions(Options):
    """What ``summarization`` and ``translation`` have in common."""

    max_target_length: int = Field(default=128, ge=2)
    """Longest target in training, in tokens; beside ``model.max_length``, the longest source."""
    source_prefix: str = ""
    """Put before each source of an encoder-decoder; T5 was trained with ``summarize: `` and the like."""
    prompt_template: str = "{source}\n"
    """How a source is put to a decoder-only model, which then goes on with the target."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    decoding: DecodingOptions = DecodingOptions()

    @field_validator("prompt_template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if template.count("{source}") != 1:
            raise ValueError("{source} must stand in it once")
        return template


class SummarizationOptions(TextToTextOptions):
    """Settings of ``summarization``."""

    prompt_template: str = "{source}\n\nSummary:\n"


class TranslationOptions(TextToTextOptions):
    """Settings of ``translation``."""

    prompt_template: str = "{source}\n\nTranslation:\n"
    source_lang: str | None = None
    """The language codes of models for many languages (mBART, M2M100, NLLB), as their tokenizers write them."""
    target_lang: str | None = None
    tokenize: Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "spm", "flores101", "flores200", "none"] = (
        "13a"
    )
    """sacrebleu's tokenizer for BLEU."""


class MlmOptions(Options):
    """Settings of ``mlm``; names as in ``DataCollatorForLanguageModeling``."""

    mlm_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens to be predicted."""
    mask_replace_prob: float = Field(default=0.8, ge=0, le=1)
    """Share of those that are replaced by the mask token."""
    random_replace_prob: float = Field(default=0.1, ge=0, le=1)
    """Share of those that are replaced by a random token; the rest stays."""
    whole_word_mask: bool = False
    """Mask all tokens of a word or none."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MlmOptions:
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError("mask_replace_prob + random_replace_prob is more than 1")
        return self


class ClassificationOptions(Options):
    """Settings of ``classification``."""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """As in ``PretrainedConfig.problem_type``; null finds it from the labels and says what it found."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weight of each class in the loss; ``balanced`` is n / (classes * n_class), as in scikit-learn."""
    long_documents: Literal["truncate", "windows"] = "truncate"
    """A document longer than ``model.max_length``: cut it, or average the logits over overlapping windows."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_are_numbers(cls, value: Any) -> Any:
        return {name: _number(weight) for name, weight in value.items()} if isinstance(value, dict) else value


class NerOptions(Options):
    """Settings of ``ner``."""

    scheme: Literal["auto", "IOB1", "IOB2", "BIOES"] = "auto"
    """Tag scheme of the data; converted to IOB2 for training and scoring."""
    strict: bool = False
    """Score with seqeval's strict IOB2 mode; off, an I- without a B- opens an entity, as in conlleval."""


class QaOptions(Options):
    """Settings of ``qa``."""

    version_2_with_negative: bool = False
    """Questions may have no answer (SQuAD v2)."""
    n_best_size: int = Field(default=20, ge=1)
    """Start and end candidates kept from each window."""
    max_answer_length: int = Field(default=30, ge=1)
    """Longest answer, in tokens."""
    null_score_diff_threshold: float = 0.0
    """SQuAD v2: predict no answer when its score exceeds the best span's by more than this."""
