"""The module of all variants that are full attention over fewer pairs: a pattern, and the engine.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size; n and m those of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attention.engine import Visit, tiled_attention
from attention.masks import LazyMask
from attention.reference import attention_weights
from attention.scoring import Scoring
from attention.variant import Work

LARGEST_TILE = 512
SMALLEST_TILE = 64
TILE_AREA = 2**20
"""Scores of all rows and heads in one tile, within those bounds: 4 MiB in fp32, about what a core keeps near."""
LARGEST_COUNT = 2**22
"""Pairs that are counted at once."""


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
        """Keys up to which torch's own kernel over the whole table is taken."""
        ...

    @property
    def counts(self) -> bool:
        """Whether it goes by positions, not by distances alone: padding before a text would move what it sees."""
        ...

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Which pairs count, of positions [..., n, 1] and [..., 1, m] from the first token; None is all."""
        ...

    def visits(self, extent: Extent) -> Sequence[Visit]:
        """Tiles that hold every pair that counts exactly once; the keys of all positions from 0."""
        ...

    def __hash__(self) -> int:
        """Its settings are all there is to it."""
        ...


class Tiled(nn.Module):
    """Full attention over the pairs of a pattern."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``."""
        (rows, heads, queries), keys = query.shape[:3], key.shape[2]
        plain = not scoring.dropout and scoring.softcap is None and scoring.bias is None
        if plain and keys <= self.pattern.sdpa_below:
            return self._by_sdpa(query, key, value, mask, scoring.scaling)
        if self.pattern.counts and mask.starts_B is not None:
            return self._by_start(query, key, value, mask, scoring)
        extent = Extent(queries, keys + mask.kv_offset, mask.q_offset, mask.causal, tile_side(rows * heads))
        visits = [kept for visit in self.pattern.visits(extent) if (kept := visit.after(mask.kv_offset)).keys]
        return tiled_attention(query, key, value, mask, visits, scoring)

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM; see ``attention.variant.Variant``."""
        return attention_weights(query, key, seen_pairs(self.pattern, mask, query.device), scoring)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """By the tiles of one text; see ``attention.variant.Variant``."""
        return _work(self.pattern, Extent(length, length, 0, causal, tile_side(heads)))

    def extra_repr(self) -> str:
        """The pattern."""
        return str(self.pattern)

    def _by_start(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """Rows with as much padding before their texts together, and without it."""
        assert mask.starts_B is not None
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        for start in sorted(set(mask.starts_B.tolist())):
            part, rows, first_query, first_key = mask.without_start(start)
            queries, keys = slice(first_query, query.shape[2]), slice(first_key, key.shape[2])
            q, k, v = query[rows][:, :, queries], key[rows][:, :, keys], value[rows][:, :, keys]
            output[rows, :, queries] = self(q, k, v, part, scoring.of(rows, queries, keys))
        return output

    def _by_sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scaling: float) -> Tensor:
        allowed, attend = (
            seen_pairs(self.pattern, mask, query.device),
            partial(
                scaled_dot_product_attention,
                query,
                key,
                value,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ),
        )
        if allowed is None:
            return attend()
        # Of a row that sees nothing torch's kernels give NaN or a mean, by the kernel; the engine gives zeros.
        blind = ~allowed.any(-1, keepdim=True)
        return attend(attn_mask=allowed | blind).masked_fill(blind, 0.0)


def tile_side(tables: int) -> int:
    """A good side of a tile, where so many of one size are computed at once."""
    return min(LARGEST_TILE, max(SMALLEST_TILE, int((TILE_AREA / tables) ** 0.5)))


@lru_cache(maxsize=64)  # many layers have the same
def _work(pattern: Pattern, extent: Extent) -> Work:
    visits = pattern.visits(extent)
    return Work(sum(map(_area, visits)), sum(_seen(visit, causal=extent.causal) for visit in visits))


def _area(visit: Visit) -> int:
    return len(_indices(visit.queries)) * sum(len(_indices(piece)) for piece in visit.keys)


def _seen(visit: Visit, *, causal: bool) -> int:
    """Pairs of a tile that count, without padding."""
    rows, columns = _indices(visit.queries), torch.cat([_indices(piece) for piece in visit.keys]).sort().values
    if visit.sees is None:
        return int(torch.searchsorted(columns, rows, right=True).sum()) if causal else _area(visit)
    total = 0
    for part in torch.split(rows, max(1, LARGEST_COUNT // len(columns))):
        seen = visit.sees(part[:, None], columns[None, :])
        total += int((seen & (columns <= part[:, None]) if causal else seen).sum())
    return total


def _indices(piece: slice) -> Tensor:
    return torch.arange(piece.start, piece.stop, piece.step or 1)


def seen_pairs(pattern: Pattern, mask: LazyMask, device: torch.device) -> Tensor | None:
    """The whole table of the pairs that count and are allowed, bool that broadcasts to [B, 1, N, M]; None for all."""
    allowed, (queries, keys) = mask.table(device), mask.shape[2:]
    q_N1 = torch.arange(queries, device=device)[:, None] + mask.q_offset
    k_1M = torch.arange(keys, device=device)[None, :] + mask.kv_offset
    if pattern.counts and mask.starts_B is not None:
        starts_B111 = mask.starts_B.to(device)[:, None, None, None]
        q_N1, k_1M = q_N1 - starts_B111, k_1M - starts_B111
    seen = pattern.sees(q_N1.clamp(min=0), k_1M.clamp(min=0))
    if seen is None:
        return allowed
    seen = (seen & (q_N1 >= 0)).view(-1, 1, queries, keys)  # padding before a text sees nothing
    return seen if allowed is None else allowed & seen
