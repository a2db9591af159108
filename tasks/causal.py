"""What the tasks on decoder-only models share: a prompt and its answer in one sequence, loss on the answer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tasks.batching import IGNORED, pad_batch
from tasks.decoding import generate, pad_left, padding_id
from tasks.lm_loss import next_tokens, summed_loss
from tasks.options import DecodingOptions
from tasks.protocol import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def join_pieces(pieces: Sequence[tuple[list[int], bool]]) -> dict[str, Any]:
    """One feature of token pieces (see ``tokenize_pieces``), the last of which is the answer, perhaps empty."""
    ids = [token for part, _ in pieces for token in part]
    labels = [token if learned else IGNORED for part, learned in pieces for token in part]
    prompt_length = sum(len(part) for part, _ in pieces[:-1])
    return {"input_ids": ids, "labels": labels, "prompt_length": prompt_length, "length": len(ids)}


def collate(examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Pad on the right, with ``labels`` and, where texts are packed, ``position_ids`` (each BT)."""
    # In a packed batch every padding token begins a text of its own, at position 0: nothing sees it.
    batch = pad_batch(examples, tokenizer=tokenizer, extra={"labels": IGNORED, "position_ids": 0}, side="right")
    if "prompt_length" in examples[0]:
        batch["prompt_length"] = torch.tensor([example["prompt_length"] for example in examples])
    return batch


def count(batch: Batch) -> Tensor:
    """Tokens that carry loss: the first of a sequence is predicted from nothing."""
    return (batch["labels"][:, 1:] != IGNORED).sum().float()


def loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy of the next tokens."""
    return summed_loss(model, inputs(batch), next_tokens(batch["labels"]), label_smoothing=label_smoothing)


def inputs(batch: Batch) -> dict[str, Any]:
    """Packed texts are told apart by their positions, which transformers looks at only without a mask and a cache."""
    other = "position_ids" if "position_ids" in batch else "attention_mask"
    return {"input_ids": batch["input_ids"], other: batch[other], "use_cache": False}


def answer(
    model: nn.Module,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    options: DecodingOptions,
    *,
    ends: Sequence[int] = (),
) -> Tensor:
    """What the model says after each prompt (BG); ``ends`` as in ``generate``."""
    prompts = pad_left(batch["input_ids"], batch["prompt_length"], padding_id(tokenizer))
    return generate(model, prompts, tokenizer, options, ends=ends)
