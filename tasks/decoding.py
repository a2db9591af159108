"""Text out of a model: greedy or beam search with its cache, and what every generating task asks of it.

Shapes: B examples, T tokens of the input, G generated tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig

from sources.texts import counted
from tasks.options import DecodingOptions
from tasks.protocol import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORCED = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What a checkpoint's answers begin and end with: how it was trained, not how answers are searched for."""


def generate(
    model: nn.Module,
    inputs: Batch,
    tokenizer: PreTrainedTokenizerBase,
    options: DecodingOptions,
    **special: int | None,
) -> Tensor:
    """Continue each input, or answer it; the most likely tokens, never sampled.

    Args:
        model: Without a wrapper of data parallelism.
        inputs: ``input_ids`` and ``attention_mask``; for a decoder-only model padded on the left (``pad_left``).
        special: Further token ids of ``GenerationConfig``, such as ``forced_bos_token_id``.

    Returns:
        The new tokens alone (BG), filled with the padding token after the end of each.
    """
    padding, ends = padding_id(tokenizer), end_ids(model, tokenizer)
    config = GenerationConfig(
        **options.model_dump(),
        do_sample=False,
        num_return_sequences=1,
        early_stopping=False,
        use_cache=True,
        pad_token_id=padding,
        eos_token_id=ends,
        # No answer is made of padding; Marian's checkpoints forbid it as a habit, and theirs are left.
        suppress_tokens=None if padding in ends else [padding],
        **{name: token for name, token in special.items() if token is not None},
    )
    with _without_habits(model):
        # No rank waits for another here: where weights are sharded, they are whole in evaluation.
        ids = model.generate(**inputs, generation_config=config, synced_gpus=False)  # type: ignore[operator]
    # An encoder-decoder answers with its decoder's start token first, a decoder repeats the input.
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]  # type: ignore[union-attr]
    return ids[:, start:]  # type: ignore[no-any-return]


@contextmanager
def _without_habits(model: nn.Module) -> Iterator[None]:
    """Within, the checkpoint's settings of decoding are not there: transformers takes from them what it is not given.

    BART for news asks for 56 tokens at least, others for several answers each, or for no cache.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model  # whose method PEFT's calls
    own = bare.generation_config
    bare.generation_config = GenerationConfig(**{name: getattr(own, name) for name in FORCED})
    try:
        yield
    finally:
        bare.generation_config = own


def described(options: DecodingOptions) -> str:
    """How answers are searched for, in words."""
    search = "greedy" if options.num_beams == 1 else f"{options.num_beams} beams"
    return f"{search}, at most {counted(options.max_new_tokens, 'new tokens')}"


def pad_left(ids_BT: Tensor, lengths_B: Tensor, padding: int) -> Batch:
    """The first ``lengths_B`` tokens of each row, moved to the right end of the shortest width that holds them."""
    width = int(lengths_B.max())
    source_BT = torch.arange(width, device=ids_BT.device) - (width - lengths_B)[:, None]
    mask_BT = source_BT >= 0
    moved_BT = ids_BT.gather(1, source_BT.clamp(min=0)).where(mask_BT, torch.full_like(source_BT, padding))
    return {"input_ids": moved_BT, "attention_mask": mask_BT.long()}


def to_texts(tokenizer: PreTrainedTokenizerBase, generated: Sequence[NDArray[Any]]) -> list[str]:
    """Generated ids as texts, without special tokens and blanks around them."""
    vocabulary = len(tokenizer)  # a model may have rows for more tokens than there are
    kept = [ids[(ids >= 0) & (ids < vocabulary)] for ids in map(np.asarray, generated)]
    return [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or where there is none (GPT-2) that which ends a text: it is masked out anyway."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(token or 0)


def end_with(model: nn.Module, tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """Let answers end at this token too, here and wherever the model is used later: it is saved with the model."""
    config: Any = model.generation_config
    config.eos_token_id = sorted({*end_ids(model, tokenizer), token})


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: the tokenizer's, and those that the checkpoint names (chat models have several)."""
    own: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(token) for token in found if token is not None})
