"""Patterns through FlexAttention, torch's compiled kernels for GPUs (Dong et al., arXiv 2412.05496).

No kernel is taken on trust. With the first two lengths that it is asked for, it is held to the engine's tiles on what
came by: its output, and its gradients where there are some. Where they differ, or nothing can be compiled, it is said
and the tiles go on.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attention.masks import LazyMask
from attention.pattern import Pattern, tiles
from attention.scoring import Scoring

DEVICES = ("cuda",)
"""Where it is tried: on a CPU it has no backward pass."""
FEWEST = 128
"""Queries, a block of its kernels; for fewer, as in decoding, it would compile others."""
LARGEST_ERROR = {torch.float32: 5e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""As a share of the largest number there: such as TF32 and half precision may bring. A wrong border brings far more."""
KERNELS = 256
"""That one process may compile. Beyond that it is an error: torch would go on over the whole table of N x M."""

logger = logging.getLogger("heedful.attention.flex")


class Kernel(NamedTuple):
    """What kernels are compiled for, but for lengths: from the second on torch has one for all."""

    pattern: Pattern
    rule: tuple[Any, ...]
    has_padding: bool
    has_starts: bool
    is_shifted: bool
    is_square: bool
    is_alone: bool
    softcap: bool
    trains: bool
    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int

    @property
    def name(self) -> str:
        """As it is said."""
        return f"attention: FlexAttention for {self.pattern} in {str(self.dtype).removeprefix('torch.')}"


_RIGHT: dict[Kernel, set[tuple[int, int]]] = {}
"""Of each kernel N and M, in this process, with which it was tried and right: two will do."""
_WRONG: set[Kernel] = set()


def by_flex(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, pattern: Pattern, scoring: Scoring
) -> Tensor | None:
    """Attend, BHND of BHND, BKMD and BKMD, in the precision of the values.

    Returns:
        None where it does not fit, was wrong or did not compile. A query that sees nothing gets zeros.
    """
    if not _fits(query, value, scoring):
        return None
    kernel = _kernel_for(query, key, value, mask, pattern, scoring)
    tried, lengths = _RIGHT.setdefault(kernel, set()), (query.shape[2], key.shape[2])
    if kernel not in _WRONG and len(tried) < 2 and lengths not in tried:
        if _is_right(kernel, query, key, value, mask, scoring):
            tried.add(lengths)
        else:
            _WRONG.add(kernel)
    if kernel in _WRONG:
        return None
    try:
        return _flex(query, key, value, mask, pattern, scoring)
    except (TorchDynamoException, FailOnRecompileLimitHit) as reason:  # a later length may want another compilation
        _say_failed(kernel, reason)
        _WRONG.add(kernel)
        return None


def _fits(query: Tensor, value: Tensor, scoring: Scoring) -> bool:
    return (
        value.device.type in DEVICES
        and value.dtype in LARGEST_ERROR
        and query.shape[2] >= FEWEST
        and query.shape[-1] == value.shape[-1]
        and not scoring.dropout
        and scoring.bias is None
    )


def _kernel_for(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, pattern: Pattern, scoring: Scoring
) -> Kernel:
    return Kernel(
        pattern,
        rule=_codes(mask.rule),
        has_padding=mask.padding_BM is not None,
        has_starts=mask.starts_B is not None,
        is_shifted=mask.q_offset != mask.kv_offset,
        is_square=query.shape[2] == key.shape[2],
        is_alone=len(query) == 1,
        softcap=scoring.softcap is not None,
        trains=torch.is_grad_enabled(),
        device=value.device,
        dtype=value.dtype,
        heads=query.shape[1],
        key_heads=key.shape[1],
        width=query.shape[-1],
    )


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, pattern: Pattern, scoring: Scoring) -> Tensor:
    if pattern not in mask.block_masks:  # one for all layers, and for what is computed again
        mask.block_masks[pattern] = _make_blocks(mask, pattern, query.device)
    # Both passes are compiled here, where what fails can be left to the tiles; later it could not.
    eagerly = functorch.patch(force_non_lazy_backward_lowering=True)
    with eagerly, torch.autocast(query.device.type, enabled=False):
        out: Tensor = _compiled(flex_attention, pattern)(
            query.to(value.dtype),  # rotated in fp32 under autocast, where values are not
            key.to(value.dtype),
            value,
            score_mod=_scored(scoring, value),
            block_mask=mask.block_masks[pattern],
            scale=1.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.to(query.dtype)


@cache
def _compiled(function: Callable[..., Any], pattern: Pattern) -> Callable[..., Any]:
    """For one pattern: numbers that differ between two would become symbols, and these do not compile everywhere."""
    limits: dict[str, Any] = {"recompile_limit": KERNELS, "isolate_recompiles": True}
    return torch.compile(function, fullgraph=True, **limits)


def _scored(scoring: Scoring, like: Tensor) -> Callable[..., Tensor]:
    """Scaled and capped, by tensors: numbers would be compiled in, or fail to."""
    number = partial(torch.full, (), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    scaling = number(scoring.scaling)

    def scaled(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score * scaling

    if scoring.softcap is None:
        return scaled
    cap = number(scoring.softcap)

    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score * scaling / cap)

    return capped


def _make_blocks(mask: LazyMask, pattern: Pattern, device: torch.device) -> BlockMask:
    rows, _, queries, keys = mask.shape
    own = rows if mask.is_by_row else None
    make, allows = _compiled(create_block_mask, pattern), _allows(mask, pattern, device)
    made: BlockMask = make(allows, own, None, queries, keys, device)
    return made


def _allows(mask: LazyMask, pattern: Pattern, device: torch.device) -> Callable[..., Tensor]:
    """What counts and is allowed, pair by pair: ``attention.pattern.seen_pairs`` as FlexAttention asks for it."""
    rule, padding_BM, starts_B = mask.rule, mask.padding_BM, mask.starts_B if pattern.counts else None
    counts = pattern.rule(mask.kv_offset + mask.shape[3], device)
    q_offset, kv_offset = mask.q_offset, mask.kv_offset

    def allows(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k = query + q_offset, key + kv_offset
        allowed: Tensor = rule(row, head, q, k)
        if padding_BM is not None:
            allowed = allowed & padding_BM[row, key]
        if starts_B is not None:
            q, k = q - starts_B[row], k - starts_B[row]
            allowed = allowed & (q >= 0)
        return allowed if counts is None else allowed & counts(q.clamp(min=0), k.clamp(min=0))

    return allows


def _is_right(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> bool:
    try:
        # Not the hooks of whatever asked first: activation checkpointing would take these tensors for its own.
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            error = _largest_error(kernel, query, key, value, mask, scoring)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # compilers raise what they like
        _say_failed(kernel, reason)
        return False
    if not error <= LARGEST_ERROR[kernel.dtype]:  # so is NaN
        logger.warning("%s is off by %.1g of the largest number: the engine's tiles are taken", kernel.name, error)
        return False
    logger.info("%s: off by %.1g of the largest number, taken", kernel.name, error)
    return True


def _say_failed(kernel: Kernel, reason: Exception) -> None:
    first = str(reason).strip().split("\n")[0]
    logger.warning("%s: %s: %s; the engine's tiles are taken", kernel.name, type(reason).__name__, first)


def _largest_error(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring
) -> float:
    """Of output and gradients, as a share of the largest number in each; NaN if there is one."""
    results = []
    for attend in (_flex, tiles):
        q, k, v = (x.detach().requires_grad_(kernel.trains) for x in (query, key, value))
        out = attend(q, k, v, mask, kernel.pattern, scoring)
        grads = torch.autograd.grad(out, [q, k, v], _like_noise(out)) if kernel.trains else ()
        results.append([out.detach(), *grads])
    shares = [((a - b).abs().max() / b.abs().max()).float() for a, b in zip(*results, strict=True)]
    return float(torch.stack(shares).max())


def _codes(rule: Any) -> tuple[Any, ...]:
    """What a rule is made of, and the rules within it: torch compiles for these, and for numbers in them anew."""
    held = [cell.cell_contents for cell in rule.__closure__ or ()]
    rules = [x for part in held for x in (part if isinstance(part, tuple) else (part,)) if hasattr(x, "__code__")]
    return (rule.__code__, *map(_codes, rules))


def _like_noise(x: Tensor) -> Tensor:
    """Unit normal; the same for the same shape, and not from the run's own generator."""
    return torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(0), device=x.device).to(x.dtype)
