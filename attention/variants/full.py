"""Full attention, as transformers itself has it (Vaswani et al., arXiv 1706.03762, section 3.2): the oracle."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attention.bias import dense_bias
from attention.masks import LazyMask
from attention.options import FullOptions
from attention.reference import attention_weights, dense_attention
from attention.scoring import Scoring
from attention.variant import Site, Work, all_pairs


class Full(nn.Module):
    """torch's own kernel, called as transformers calls it."""

    def __init__(self, groups: int, *, causal: bool) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``."""
        if scoring.softcap is not None:  # which torch's kernel does not know
            return dense_attention(query, key, value, mask.table(query.device), scoring)
        bias = scoring.bias
        out, _ = sdpa_attention_forward(
            self,
            query,
            key,
            value,
            mask.dense(),
            dropout=scoring.dropout,
            scaling=scoring.scaling,
            position_bias=None if bias is None else dense_bias(bias, query.shape[2], key.shape[2]),
        )
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM; see ``attention.variant.Variant``."""
        return attention_weights(query, key, mask.table(query.device), scoring)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """Every pair; see ``attention.variant.Variant``."""
        pairs = all_pairs(length, causal=causal)
        return Work(pairs, pairs)


def make(options: FullOptions, site: Site) -> Full:
    """For any site."""
    return Full(getattr(site.module, "num_key_value_groups", 1), causal=getattr(site.module, "is_causal", False))
