"""Each task's own settings, the section of the configuration that carries the task's name. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Frozen; an unknown key is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class ClassificationOptions(Options):
    """Settings of ``classification``."""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """As in ``PretrainedConfig.problem_type``; null finds it from the labels and says what it found."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weight of each class in the loss; ``balanced`` is n / (classes * n_class), as in scikit-learn."""
    long_documents: Literal["truncate", "windows"] = "truncate"
    """A document longer than ``model.max_length``: cut it, or average the logits over overlapping windows."""


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
