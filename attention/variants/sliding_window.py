"""A window around each token, and tokens that see all and are seen by all (Beltagy et al., arXiv 2004.05150).

Longformer gives its global tokens projections of their own; here they share those of all tokens, since the pretrained
model has no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import ClassVar

import torch
from torch import Tensor

from attention.engine import Sees, Visit, ranges
from attention.options import SlidingWindowOptions
from attention.pattern import TILE_STEP, Extent
from attention.pieces import merged, without
from attention.tiled import Tiled
from attention.variant import Site
from heedful import UserError


@dataclass(frozen=True)
class Window:
    """Pairs no further apart than ``reach``, and all pairs with a global token.

    Args:
        reach: How far to each side.
        global_tokens: Positions, counted from the first token.
    """

    reach: int
    global_tokens: tuple[int, ...] = ()
    sdpa_below: int = 1024
    is_full: ClassVar[bool] = False

    @property
    def counts(self) -> bool:
        """Global tokens do."""
        return bool(self.global_tokens)

    def rule(self, length: int, device: torch.device) -> Sees:
        """Near, or one of the two global."""
        return self._sees

    def visits(self, extent: Extent) -> list[Visit]:
        """A tile of queries with its window and the global keys; what is left for global queries, tile by tile."""
        side = min(extent.tile, max(64, self.reach // 2 // TILE_STEP * TILE_STEP))
        return [visit for queries in ranges(extent.queries, side) for visit in self._of(queries, extent)]

    def _of(self, queries: slice, extent: Extent) -> Iterator[Visit]:
        end = extent.last_seen(queries)
        first, last = queries.start + extent.offset, queries.stop + extent.offset - 1
        window = slice(max(0, first - self.reach), min(end, last + self.reach + 1))
        pieces = merged([window, *(slice(g, g + 1) for g in self.global_tokens if g < end)])
        furthest = max(last - window.start, window.stop - 1 - first)
        yield Visit(queries, pieces, None if furthest <= self.reach else self._sees)
        for token in self.global_tokens:
            if first <= token <= last:
                own = slice(token - extent.offset, token - extent.offset + 1)
                for rest in without(slice(0, end), pieces):
                    yield from (Visit(own, (piece,)) for piece in _shifted(rest, 4 * extent.tile))

    def _sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        near = (queries - keys).abs() <= self.reach
        return near | self._is_global(queries) | self._is_global(keys) if self.global_tokens else near

    def _is_global(self, indices: Tensor) -> Tensor:
        return reduce(or_, (indices == token for token in self.global_tokens))


def _shifted(piece: slice, size: int) -> Iterator[slice]:
    return (slice(piece.start + s.start, piece.start + s.stop) for s in ranges(piece.stop - piece.start, size))


def make(options: SlidingWindowOptions, site: Site) -> Tiled:
    """For self-attention.

    Raises:
        UserError: A global token that no text of the model has.
    """
    last = max(options.global_tokens, default=0)
    if site.positions is not None and last >= site.positions:
        raise UserError(
            f"global token {last} at {site} of a model with {site.positions:,} positions",
            where="attention.global_tokens",
            expected=f"at most {site.positions - 1}: they are counted from 0, the first token of a text",
        )
    return Tiled(Window(options.reach, tuple(sorted(set(options.global_tokens)))))
