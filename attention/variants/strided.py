"""A window, and every token at a multiple of the stride (Child et al., arXiv 1904.10509, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attention.engine import Sees, Visit, ranges
from attention.options import StridedOptions
from attention.pattern import Extent
from attention.tiled import Tiled
from attention.variant import Site


@dataclass(frozen=True)
class Strided:
    """Pairs less than ``stride`` apart, and those whose distance is a multiple of it."""

    stride: int
    sdpa_below: int = 1024
    is_full: ClassVar[bool] = False
    counts: bool = False

    def rule(self, length: int, device: torch.device) -> Sees:
        """Near, or in one column."""
        return lambda queries, keys: self._near(queries, keys) | ((queries - keys) % self.stride == 0)

    def visits(self, extent: Extent) -> list[Visit]:
        """Tiles along the diagonal, and one tile for each remainder: all that lie in its column."""
        near = [self._window(queries, extent) for queries in ranges(extent.queries, extent.tile)]
        columns = [
            Visit(
                slice(first, extent.queries, self.stride),
                (slice((first + extent.offset) % self.stride, extent.keys, self.stride),),
                self._far,
            )
            for first in range(min(self.stride, extent.queries))
        ]
        return near + columns

    def _window(self, queries: slice, extent: Extent) -> Visit:
        first, last = queries.start + extent.offset, queries.stop + extent.offset - 1
        keys = slice(max(0, first - self.stride + 1), min(extent.last_seen(queries), last + self.stride))
        return Visit(queries, (keys,), self._near)

    def _near(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (queries - keys).abs() < self.stride

    def _far(self, queries: Tensor, keys: Tensor) -> Tensor:
        return ~self._near(queries, keys)


def make(options: StridedOptions, site: Site) -> Tiled:
    """For self-attention."""
    return Tiled(Strided(options.stride))
