"""Models of random weights, out of a configuration alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from heedful import UserError
from sources.texts import first_line
from training.configurations import load_config, token_ids
from training.models import Loaded

ARCHITECTURE = "model.architecture"
DECIDED = {"vocab_size", "architectures", "dtype", "num_labels", "id2label", "label2id", "problem_type"}
"""Arguments of a configuration that follow from the tokenizer, the task and the project, as all ``*_token_id`` do."""


def new_model(
    auto_class: Any, architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **kwargs: Any
) -> Loaded:
    """Make a model of random weights for ``auto_class``, in fp32; every parameter is new.

    Args:
        architecture: ``model_type`` and arguments of its configuration class.
        tokenizer: Decides ``vocab_size`` and every token id: the class's defaults are those of another tokenizer.
        kwargs: The task's: ``num_labels``, ``id2label``, ...

    Raises:
        UserError: As ``new_config``; or sizes that do not go together, or no such head for this ``model_type``.
    """
    model = _from_config(auto_class.from_config, new_config(architecture, tokenizer, **kwargs), where=ARCHITECTURE)
    return Loaded(model, tuple(sorted(name for name, _ in model.named_parameters())), ())


def empty_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **changed: Any
) -> PreTrainedModel:
    """Make the model that ``name`` describes, without a head, from its configuration alone: its weights are random.

    Args:
        changed: What the configuration shall say otherwise.

    Raises:
        UserError: No such model, or none that transformers can make.
    """
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code, **changed)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModel  # which knows no joined encoders
    return _from_config(partial(kind.from_config, trust_remote_code=trust_remote_code), config, where=name)


def _from_config(make: Callable[..., Any], config: PreTrainedConfig, *, where: str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = make(config, dtype=torch.float32)
    except Exception as error:  # whatever its class makes of sizes that do not go together
        raise UserError(f"the model could not be made: {first_line(error)}", where=where) from error
    return model.eval()


def new_config(architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedConfig:
    """Make the configuration of a model that fits the tokenizer; see ``new_model``.

    Raises:
        UserError: An unknown ``model_type`` or argument (transformers would keep it and use it for nothing), one that
            the tokenizer or the task decides, or a value of another type.
    """
    values = dict(architecture)
    config_class = _config_class(values.pop("model_type"))
    fields = {field.name for field in dataclasses.fields(config_class)}
    decided = {name for name in fields if name.endswith("_token_id")} | DECIDED | kwargs.keys()
    # T5's class reads tie_word_embeddings without naming it among its arguments.
    known = sorted((fields | config_class.attribute_map.keys() | {"tie_word_embeddings"}) - decided)
    for key in values:
        if key in decided:
            raise UserError(
                f"{key}={values[key]!r}",
                where=f"{ARCHITECTURE}.{key}",
                expected="what the tokenizer and the task decide",
            )
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            raise UserError(
                f"unknown key {key!r} for {config_class.__name__}",
                where=f"{ARCHITECTURE}.{key}",
                expected=f"one of: {', '.join(known)}",
                fix=f"did you mean {near[0]}?" if near else "",
            )
    ids = token_ids(config_class(), tokenizer)
    try:
        return config_class(**{**values, "vocab_size": len(tokenizer), **ids, **kwargs})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(
            " ".join(str(error).split()), where=ARCHITECTURE, expected=f"arguments of {config_class.__name__}"
        ) from error


def _config_class(model_type: Any) -> type[PreTrainedConfig]:
    if model_type not in CONFIG_MAPPING:
        near = get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        raise UserError(
            f"unknown model_type {model_type!r}",
            where=f"{ARCHITECTURE}.model_type",
            expected="one that transformers knows, e.g. bert, distilbert, t5, bart, gpt2",
            fix=f"did you mean {near[0]}?" if near else "",
        )
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    if config_class.sub_configs or "vocab_size" not in {field.name for field in dataclasses.fields(config_class)}:
        raise UserError(
            f"model_type {model_type!r}, which is composed of other models or has no vocabulary",
            where=f"{ARCHITECTURE}.model_type",
            expected="a single model of text, e.g. bert, distilbert, t5, bart, gpt2",
        )
    return config_class
