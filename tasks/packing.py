"""Several texts in one example, none of which sees another.

Positions begin anew with each text; without an attention mask and a cache, transformers reads from them where one text
ends and the next begins (``find_packed_sequence_indices``). Not every architecture looks, so it is tried out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tasks.batching import IGNORED
from tasks.evaluating import in_eval_mode


def pack(windows: Iterator[dict[str, Any]], max_length: int) -> Iterator[dict[str, Any]]:
    """Fill blocks with windows in their order. A text's first token is predicted from nothing, so it is not learned."""
    block: dict[str, Any] = {}
    for window in windows:
        size = window["length"]
        part = {
            "input_ids": window["input_ids"],
            "labels": [IGNORED, *window["labels"][1:]],
            "position_ids": list(range(size)),
        }
        if block and len(block["input_ids"]) + size <= max_length:
            block |= {name: block[name] + values for name, values in part.items()}
            continue
        if block:
            yield _closed(block)
        block = {**part, "row": window["row"]}
    if block:
        yield _closed(block)


def _closed(block: dict[str, Any]) -> dict[str, Any]:
    return {**block, "length": len(block["input_ids"])}


@torch.no_grad()
def keeps_apart(model: nn.Module, max_length: int) -> bool:
    """Whether a text's logits are the same alone and packed behind another one.

    Tried at full length: an attention that goes by blocks of the whole example is right on a few tokens, and wrong on
    many.
    """
    device = next(model.parameters()).device
    half = max_length // 2
    first, second = torch.split(torch.arange(max_length, device=device) % 7 + 2, [max_length - half, half])
    positions = torch.cat([torch.arange(len(text), device=device) for text in (first, second)])
    with in_eval_mode(model):
        packed = model(input_ids=torch.cat([first, second])[None], position_ids=positions[None], use_cache=False).logits
        alone = model(input_ids=second[None], use_cache=False).logits
    return torch.allclose(packed[:, len(first) :], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
