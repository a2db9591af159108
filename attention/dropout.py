"""Cheap random numbers for dropout.

``bernoulli_`` is most of what dropout costs on a CPU. One 64-bit draw decides on four elements here, with 16 bits each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LEVELS = 2**16
"""The fraction that is dropped is rounded to a multiple of 1 / LEVELS."""


def draw_keep(shape: Sequence[int], dropped: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw which elements are kept.

    Args:
        dropped: Of LEVELS elements, in the mean; neither 0 nor LEVELS.
        generator: It is drawn where this is: torch's own for the CPU without one.

    Returns:
        Ones and zeros of that shape, in fp32.
    """
    elements = prod(shape)
    device = "cpu" if generator is None else generator.device
    bits = torch.empty((elements + 3) // 4, dtype=torch.int64, device=device)
    bits.random_(-(2**63), None, generator=generator)
    # Compared in place: a tensor of bools on the way to a float takes four times as long.
    return bits.view(torch.int16)[:elements].view(shape).float().ge_(dropped - LEVELS // 2)


def keep_again(seed: int, dropped: int, like: Tensor) -> Tensor | None:
    """The same ones and zeros for the same seed and device, to make weights anew; None where nothing is dropped."""
    if not dropped:
        return None
    return draw_keep(like.shape, dropped, torch.Generator(like.device).manual_seed(seed)).to(like.dtype)


def dropout_scale(dropped: int) -> float:
    """Of what is kept: 1 / (1 - p), so that dropout leaves the mean as it is."""
    return LEVELS / (LEVELS - dropped)
