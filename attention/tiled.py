"""The module of all variants that are full attention over fewer pairs: a pattern, and what computes it.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size; n and m those of a tile.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attention.engine import Visit
from attention.flex import by_flex
from attention.masks import LazyMask
from attention.pattern import Extent, Pattern, seen_pairs, tile_side, tiles
from attention.reference import attention_weights
from attention.scoring import Scoring
from attention.variant import Work, all_pairs

LARGEST_COUNT = 2**22
"""Pairs that are counted at once."""


class Tiled(nn.Module):
    """Full attention over the pairs of a pattern."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``."""
        plain = not scoring.dropout and scoring.softcap is None and scoring.bias is None
        no_table = self.pattern.is_full and not mask.needs_table
        if plain and (key.shape[2] <= self.pattern.sdpa_below or (no_table and self.pattern.sdpa_below)):
            return self._by_sdpa(query, key, value, mask, scoring.scaling, no_table=no_table)
        out = by_flex(query, key, value, mask, self.pattern, scoring)
        return tiles(query, key, value, mask, self.pattern, scoring) if out is None else out

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM; see ``attention.variant.Variant``."""
        return attention_weights(query, key, seen_pairs(self.pattern, mask, query.device), scoring)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """By the tiles of one text; see ``attention.variant.Variant``."""
        return _work(self.pattern, Extent(length, length, 0, causal, tile_side(heads)))

    def is_full(self, length: int, *, causal: bool) -> bool:
        """Whether all its pairs count; see ``attention.variant.Variant``."""
        if (rule := self.pattern.rule(length, torch.device("cpu"))) is None:
            return True
        # To count all pairs of a long text takes long: the tokens at its ends are asked first.
        ends = torch.tensor([length - 1] if causal else [0, length - 1])
        if not bool(rule(ends[:, None], torch.arange(length)[None, :]).all()):
            return False
        return self.work(length, 1, causal=causal).seen == all_pairs(length, causal=causal)

    def extra_repr(self) -> str:
        """The pattern."""
        return str(self.pattern)

    def _by_sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scaling: float, *, no_table: bool
    ) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        attend = partial(scaled_dot_product_attention, query, key, value, scale=scaling, enable_gqa=grouped)
        if no_table:
            return attend(is_causal=mask.causal)
        allowed = seen_pairs(self.pattern, mask, query.device)
        assert allowed is not None
        # Of a row that sees nothing torch's kernels give NaN or a mean, by the kernel; the engine gives zeros.
        blind = ~allowed.any(-1, keepdim=True)
        return attend(attn_mask=allowed | blind).masked_fill(blind, 0.0)


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
