"""An encoder-decoder out of one pretrained encoder, used twice (Rothe et al. 2020, https://arxiv.org/abs/1907.12461)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from attention.seam import PLAN
from heedful import UserError
from training.configurations import load_config, token_ids
from training.models import Loaded, load_model
from training.positions import Wanted


def joined_config(name: str, tokenizer: PreTrainedTokenizerBase, **where: Any) -> PreTrainedConfig:
    """Configuration of an encoder-decoder of which both halves are ``name``.

    Args:
        where: ``revision`` and ``trust_remote_code``.

    Raises:
        UserError: No such model, one that is an encoder-decoder already, or a tokenizer without a token to begin with.
    """
    half = load_config(name, **where)
    if half.is_encoder_decoder:
        raise UserError("an encoder-decoder already", where=name, fix="model.init=pretrained")
    if type(half) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"a {half.model_type}, which is no encoder", where=name, expected="such as bert or roberta")
    if hasattr(half, PLAN):  # it would be lost with the halves' configurations
        raise UserError("a model with another attention", where=name, expected="full attention in both halves")
    ids = token_ids(half, tokenizer)
    if ids["bos_token_id"] is None or ids["eos_token_id"] is None:
        raise UserError("a tokenizer without a token to begin and one to end a text with", where=name)
    # It makes a decoder's of the second in place; were they one, the encoder would look back only, without a word.
    config = EncoderDecoderConfig.from_encoder_decoder_configs(half, deepcopy(half))
    config.decoder_start_token_id, config.eos_token_id = ids["bos_token_id"], ids["eos_token_id"]
    config.pad_token_id, config.vocab_size = ids["pad_token_id"], half.vocab_size
    return config


def join_encoders(
    name: str, tokenizer: PreTrainedTokenizerBase, *, positions: Wanted | None = None, **where: Any
) -> Loaded:
    """Load ``name`` as an encoder and, with new cross-attention and a language modelling head, as a decoder.

    Args:
        positions: How many positions each half needs; None leaves them as they are.
        where: ``revision`` and ``trust_remote_code``.

    Raises:
        UserError: As ``joined_config`` and ``load_model``; or an architecture that can be no decoder.
    """
    config = joined_config(name, tokenizer, **where)
    try:
        # The pooler would take no part in the loss, and data parallelism waits for every gradient.
        encoder = load_model(AutoModel, name, add_pooling_layer=False, positions=positions, **where)
        decoder = load_model(
            AutoModelForCausalLM,
            name,
            is_decoder=True,
            add_cross_attention=True,
            initializer_range=config.decoder.hidden_size**-0.5,  # of what is new: normalized states keep their scale
            positions=positions,
            **where,
        )
    except TypeError as error:
        raise UserError(
            f"{config.encoder.model_type} can not be made a decoder ({error})",
            where="model.init=encoder_decoder",
            expected="an encoder such as BERT or RoBERTa",
        ) from error
    config.encoder, config.decoder = encoder.model.config, decoder.model.config
    model = EncoderDecoderModel(config=config, encoder=encoder.model, decoder=decoder.model)
    model.generation_config.decoder_start_token_id = config.decoder_start_token_id
    new = (*(f"encoder.{key}" for key in encoder.new), *(f"decoder.{key}" for key in decoder.new))
    return Loaded(
        model.eval(), tuple(sorted(new)), tuple(sorted({*encoder.unused} & {*decoder.unused})), encoder.growth
    )
