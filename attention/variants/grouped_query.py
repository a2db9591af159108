"""Fewer key/value heads, each the mean of some (Ainslie et al., arXiv 2305.13245, section 2.1).

The paper pools the projections. What comes out of them is pooled here, which is the same: projecting is linear, and so
is turning by position, alike in all heads. Keys that are normed in between, as in Qwen 3, are pooled after it. The
cache keeps all heads: what falls is their number in the attention.
"""

from __future__ import annotations

from torch import Tensor, nn

from attention.masks import LazyMask
from attention.options import GroupedQueryOptions
from attention.scoring import Scoring
from attention.variant import Site, Work
from attention.variants.full import Full
from heedful import UserError


class GroupedQuery(nn.Module):
    """Full attention, of heads that are pooled first."""

    def __init__(self, kv_heads: int, key_heads: int, full: Full) -> None:
        super().__init__()
        self.kv_heads, self.key_heads, self.full = kv_heads, key_heads, full

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``."""
        out: Tensor = self.full(query, self._pooled(key), self._pooled(value), mask, scoring)
        return out

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM, of the means of the values; see ``attention.variant.Variant``."""
        return self.full.weights(query, self._pooled(key), mask, scoring)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """Every pair; see ``attention.variant.Variant``."""
        return self.full.work(length, heads, causal=causal)

    def is_full(self, length: int, *, causal: bool) -> bool:
        """Where no heads are pooled; see ``attention.variant.Variant``."""
        return self.kv_heads == self.key_heads

    def _pooled(self, x_BKMD: Tensor) -> Tensor:
        return x_BKMD.view(len(x_BKMD), self.kv_heads, -1, *x_BKMD.shape[2:]).mean(2)


def make(options: GroupedQueryOptions, site: Site) -> GroupedQuery:
    """For any site.

    Raises:
        UserError: The model's heads do not make groups of one size.
    """
    if site.needs.key_heads % options.kv_heads:
        divisors = [n for n in range(1, site.needs.key_heads + 1) if site.needs.key_heads % n == 0]
        raise UserError(
            f"kv_heads={options.kv_heads} at {site}, which has {site.needs.key_heads}",
            where="attention",
            expected=f"a divisor: {', '.join(map(str, divisors))}",
        )
    causal = getattr(site.module, "is_causal", False)
    return GroupedQuery(
        options.kv_heads, site.needs.key_heads, Full(site.needs.heads // options.kv_heads, causal=causal)
    )
