"""A pattern: which pairs of a query and a key count, and in which tiles they lie.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size; n and m those of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attention.engine import Sees, Visit, tiled_attention
from attention.masks import LazyMask
from attention.scoring import Scoring

LARGEST_TILE, SMALLEST_TILE = 416, 128
TILE_AREA = 2**20
"""Scores of all rows and heads in one tile, within those bounds: 4 MiB in fp32, about what a core keeps near."""
TILE_STEP = 32
"""Sides are multiples of it, and not 512, whose rows push each other out of the cache: either costs a tenth or more."""


@dataclass(frozen=True)
class Extent:
    """How much there is to attend to.

    Args:
        queries: N.
        keys: M, those included that a cache of a window has dropped.
        offset: Position of the first query; 0 but for decoding with a cache.
        causal: Whether no query sees a later key.
        tile: A good side of a tile, in tokens.
    """

    queries: int
    keys: int
    offset: int
    causal: bool
    tile: int

    def last_seen(self, queries: slice) -> int:
        """The end of the keys that these queries may see."""
        return min(self.keys, queries.stop + self.offset) if self.causal else self.keys


class Pattern(Protocol):
    """Which pairs count, and in which tiles they lie."""

    @property
    def sdpa_below(self) -> int:
        """Keys up to which torch's own kernel over the whole table is taken; 0 for never taking it."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether every pair counts."""
        ...

    @property
    def counts(self) -> bool:
        """Whether it goes by positions, not by distances alone: padding before a text would move what it sees."""
        ...

    def rule(self, length: int, device: torch.device) -> Sees | None:
        """Which pairs count, of positions from the first token, below ``length``; None is all.

        FlexAttention compiles it: elementwise operations alone, and look-ups in a vector.
        """
        ...

    def visits(self, extent: Extent) -> Sequence[Visit]:
        """Tiles that hold every pair that counts exactly once; the keys of all positions from 0."""
        ...

    def __hash__(self) -> int:
        """Its settings are all there is to it."""
        ...


def tiles(query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, pattern: Pattern, scoring: Scoring) -> Tensor:
    """Attend by the engine, BHND of BHND, BKMD and BKMD."""
    (rows, heads, queries), keys = query.shape[:3], key.shape[2]
    if pattern.counts and mask.starts_B is not None:
        return _tiles_by_start(query, key, value, mask, pattern, scoring)
    extent = Extent(queries, keys + mask.kv_offset, mask.q_offset, mask.causal, tile_side(rows * heads))
    visits = [kept for visit in pattern.visits(extent) if (kept := visit.after(mask.kv_offset)).keys]
    return tiled_attention(query, key, value, mask, visits, scoring)


def _tiles_by_start(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, pattern: Pattern, scoring: Scoring
) -> Tensor:
    """Rows with as much padding before their texts together, and without it."""
    assert mask.starts_B is not None
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for start in sorted(set(mask.starts_B.tolist())):
        part, rows, first_query, first_key = mask.without_start(start)
        queries, keys = slice(first_query, query.shape[2]), slice(first_key, key.shape[2])
        q, k, v = query[rows][:, :, queries], key[rows][:, :, keys], value[rows][:, :, keys]
        output[rows, :, queries] = tiles(q, k, v, part, pattern, scoring.of(rows, queries, keys))
    return output


def tile_side(tables: int) -> int:
    """A good side of a tile, where so many of one size are computed at once."""
    side = int((TILE_AREA / tables) ** 0.5) // TILE_STEP * TILE_STEP
    return min(LARGEST_TILE, max(SMALLEST_TILE, side))


def seen_pairs(pattern: Pattern, mask: LazyMask, device: torch.device) -> Tensor | None:
    """The whole table of the pairs that count and are allowed, bool that broadcasts to [B, 1, N, M]; None for all."""
    allowed, (queries, keys) = mask.table(device), mask.shape[2:]
    q_N1 = torch.arange(queries, device=device)[:, None] + mask.q_offset
    k_1M = torch.arange(keys, device=device)[None, :] + mask.kv_offset
    if pattern.counts and mask.starts_B is not None:
        starts_B111 = mask.starts_B.to(device)[:, None, None, None]
        q_N1, k_1M = q_N1 - starts_B111, k_1M - starts_B111
    rule = pattern.rule(mask.kv_offset + keys, device)
    if rule is None:
        return allowed
    seen = rule(q_N1.clamp(min=0), k_1M.clamp(min=0))
    seen = (seen & (q_N1 >= 0)).view(-1, 1, queries, keys)  # padding before a text sees nothing
    return seen if allowed is None else allowed & seen
