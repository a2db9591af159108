"""What the tasks on decoder-only models share: a prompt and its answer in one sequence, loss on the answer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heedful import UserError
from tasks.batching import IGNORED, pad_batch
from tasks.decoding import generate, pad_left, padding_id
from tasks.evaluating import in_eval_mode
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


def answer(model: nn.Module, batch: Batch, tokenizer: PreTrainedTokenizerBase, options: DecodingOptions) -> Tensor:
    """What the model says after each prompt (BG)."""
    prompts = pad_left(batch["input_ids"], batch["prompt_length"], padding_id(tokenizer))
    return generate(model, prompts, tokenizer, options)


def check_causal(model: nn.Module) -> None:
    """Try out whether the model sees no token after the one it continues.

    Raises:
        UserError: It does, as BERT's causal head without ``is_decoder``: it would learn to copy, with a loss near zero.
    """
    if _looks_ahead(model):
        raise UserError(
            f"{type(model).__name__} sees the tokens that it is to predict",
            where="model.name",
            expected="a decoder, such as gpt2 or llama",
            fix="take one, or the task mlm",
        )


@torch.no_grad()
def _looks_ahead(model: nn.Module) -> bool:
    """Whether logits change with a later token."""
    ids_BT = torch.arange(2, 8, device=next(model.parameters()).device).repeat(2, 1)
    ids_BT[1, -1] = 1
    with in_eval_mode(model):
        one, other = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return not torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
