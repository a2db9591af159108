"""Patterns through FlexAttention, torch's compiled kernels for GPUs (Dong et al., arXiv 2412.05496).

No kernel is taken on trust. The first time that a pattern comes by with a type and a form of heads, both passes of the
kernel are held to the engine's tiles on a short text. Where they differ, or nothing can be compiled, it is said and the
tiles go on.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from attention.masks import LazyMask
from attention.pattern import Pattern, tiles
from attention.scoring import Scoring

DEVICES = ("cuda",)
"""Where it is tried: on a CPU it has no backward pass."""
FEWEST = 128
"""Queries, a block of its kernels; for fewer, as in decoding, it would compile others."""
SAMPLE = 300
"""Tokens of the text on which it is tried: blocks that are seen whole, in part and not at all, the last one cut."""
LARGEST_ERROR = {torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""As a share of the largest number there. Such as TF32 may bring; a pair too many or too few brings far more."""
KERNELS = 256
"""Patterns, types and forms that one process may compile for. Beyond that it is an error: torch would go on without
compiling, over the whole table of N x M."""

logger = logging.getLogger("heedful.attention.flex")


@dataclass(frozen=True)
class Case:
    """What kernels are compiled for, and tried on."""

    pattern: Pattern
    causal: bool
    softcap: float | None
    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int


def serves(query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, pattern: Pattern, scoring: Scoring) -> bool:
    """Whether ``flex`` is to be taken, for BHND, BKMD and BKMD: it fits, and was right where it was tried."""
    if (
        query.device.type not in DEVICES
        or query.dtype not in LARGEST_ERROR
        or query.shape[2] < FEWEST
        or query.shape[-1] != value.shape[-1]
        or scoring.dropout
        or scoring.bias is not None
    ):
        return False
    heads = query.shape[1], key.shape[1], query.shape[-1]
    return _is_right(Case(pattern, mask.causal, scoring.softcap, query.device, query.dtype, *heads))


def flex(query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, pattern: Pattern, scoring: Scoring) -> Tensor:
    """Attend, without dropout or bias.

    Args:
        query: BHND.
        key: BKMD.
        value: BKMD.

    Returns:
        BHND. A query that sees nothing gets zeros.
    """
    if pattern not in mask.block_masks:  # one for all layers, and for what is computed again
        mask.block_masks[pattern] = _make_blocks(mask, pattern, query.device)
    cap = scoring.softcap

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cast(float, cap) * torch.tanh(score / cast(float, cap))

    with torch.autocast(query.device.type, enabled=False):
        return cast(
            Tensor,
            _compiled(flex_attention)(
                query,
                key,
                value,
                score_mod=None if cap is None else capped,
                block_mask=mask.block_masks[pattern],
                scale=scoring.scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ),
        )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    limits: dict[str, Any] = {"recompile_limit": KERNELS, "isolate_recompiles": True}
    return torch.compile(function, fullgraph=True, **limits)


def _make_blocks(mask: LazyMask, pattern: Pattern, device: torch.device) -> BlockMask:
    rows, _, queries, keys = mask.shape
    own = rows if mask.is_by_row else None
    made: BlockMask = _compiled(create_block_mask)(_allows(mask, pattern, device), own, None, queries, keys, device)
    return made


def _allows(mask: LazyMask, pattern: Pattern, device: torch.device) -> Callable[..., Tensor]:
    """What counts and is allowed, pair by pair: ``attention.pattern.seen_pairs`` as FlexAttention asks for it."""
    rule, padding_BM, starts_B = mask.rule, mask.padding_BM, mask.starts_B if pattern.counts else None
    sees = pattern.within(mask.kv_offset + mask.shape[3], device)
    q_offset, kv_offset = mask.q_offset, mask.kv_offset

    def allows(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k = query + q_offset, key + kv_offset
        allowed: Tensor = rule(row, head, q, k)
        if padding_BM is not None:
            allowed = allowed & padding_BM[row, key]
        if starts_B is not None:
            q, k = q - starts_B[row], k - starts_B[row]
            allowed = allowed & (q >= 0)
        return allowed if sees is None else allowed & sees(q.clamp(min=0), k.clamp(min=0))

    return allows


@cache
def _is_right(case: Case) -> bool:
    name = f"attention: FlexAttention for {case.pattern} in {str(case.dtype).removeprefix('torch.')}"
    try:
        error = _largest_error(case)
    except Exception as reason:
        logger.warning("%s: %s; the engine's tiles are taken", name, str(reason).strip().split("\n")[0])
        return False
    if not error <= LARGEST_ERROR[case.dtype]:  # so is NaN
        logger.warning("%s is off by %.1g of the largest number: the engine's tiles are taken", name, error)
        return False
    logger.info("%s: off by %.1g of the largest number, taken", name, error)
    return True


@torch.inference_mode(mode=False)  # whatever asks first
@torch.enable_grad()
def _largest_error(case: Case) -> float:
    """Of output and gradients, as shares of the largest number in each."""
    generator, heads = torch.Generator().manual_seed(0), (case.heads, case.key_heads, case.key_heads, case.heads)
    drawn = [torch.randn(2, count, SAMPLE, case.width, generator=generator) for count in heads]
    *tensors, grad = (x.to(case.device, case.dtype) for x in drawn)
    real = torch.ones(2, SAMPLE, dtype=torch.bool, device=case.device)
    real[0, -SAMPLE // 5 :], real[1, : SAMPLE // 6] = False, False
    scoring = Scoring(case.width**-0.5, softcap=case.softcap)
    results = []
    for attend in (flex, tiles):
        rule = causal_mask_function if case.causal else bidirectional_mask_function
        mask = LazyMask(batch_size=2, q_length=SAMPLE, kv_length=SAMPLE, mask_function=rule, attention_mask=real)
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        out = attend(q, k, v, mask, case.pattern, scoring)
        results.append([out.detach(), *torch.autograd.grad(out, [q, k, v], grad)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
