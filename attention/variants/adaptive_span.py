"""Each head learns how far it looks (Sukhbaatar et al., arXiv 1905.07799, section 2.1).

A pair at distance x has the weight m(x) exp(s) over their sum, with m(x) = clamp((ramp + z max_span - x) / ramp, 0, 1)
and its head's z. So log m is added to the scores s, a bias by distance, and what no head reaches is not visited.

The parameter is z unfolded: past 1, and past 0, z comes back again. Were it cut off there, it would have no gradient
and stay for good; to push it back after each update takes a place in the loop; and to pass on only gradients that lead
inwards makes an update depend on how its batch was split. At first z is 1, and a text no longer than ``max_span`` is
seen as in full attention. Only pairs on the ramp say anything of z: such texts leave it where it is.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor, nn

from attention.bias import dense_bias
from attention.masks import LazyMask
from attention.options import AdaptiveSpanOptions
from attention.reference import attention_weights
from attention.scoring import Scoring
from attention.tiled import Tiled
from attention.variant import Site, Work
from attention.variants.sliding_window import Window


class AdaptiveSpan(nn.Module):
    """Full attention in a window as wide as the widest head's."""

    def __init__(self, heads: int, max_span: int, ramp: int) -> None:
        super().__init__()
        self.max_span, self.ramp = max_span, ramp
        self.span = nn.Parameter(torch.ones(heads))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``."""
        out: Tensor = self._window()(query, key, value, mask, self._faded(query, key, mask, scoring))
        return out

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM; see ``attention.variant.Variant``."""
        faded, allowed = self._faded(query, key, mask, scoring), mask.table(query.device)
        assert faded.bias is not None
        reached = dense_bias(faded.bias, query.shape[2], key.shape[2]) > -torch.inf
        return attention_weights(query, key, reached if allowed is None else allowed & reached, faded)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """By the present spans; see ``attention.variant.Variant``."""
        return self._window().work(length, heads, causal=causal)

    def is_full(self, length: int, *, causal: bool) -> bool:
        """By the narrowest of the present spans; see ``attention.variant.Variant``."""
        return length - 1 < float(self.spans().detach().min()) * self.max_span  # at just as far the span is moved

    def spans(self) -> Tensor:
        """z of each head, in fp32 at least."""
        folded = self.span.to(torch.promote_types(self.span.dtype, torch.float32)).remainder(2.0)
        return torch.where(folded > 1, 2 - folded, folded)

    def _window(self) -> Tiled:
        """As far as m is above 0 in any head."""
        return Tiled(Window(ceil(self.ramp + float(self.spans().detach().max()) * self.max_span) - 1))

    def _faded(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Scoring:
        """With log m in its bias."""
        queries, keys = query.shape[2], key.shape[2]
        steps = torch.arange(1 - queries, keys, device=query.device) + mask.kv_offset - mask.q_offset
        soft = ((self.ramp + self.spans()[:, None] * self.max_span - steps.abs()) / self.ramp).clamp(0, 1)
        hidden = soft == 0
        # Of 0 no logarithm is taken: its slope has no end, and times a gradient of 0 it would be NaN.
        bias = soft.masked_fill(hidden, 1.0).log().masked_fill(hidden, -torch.inf)
        if scoring.bias is not None:
            bias = scoring.bias + (bias if scoring.bias.ndim == 2 else dense_bias(bias, queries, keys))
        return replace(scoring, bias=bias)

    def extra_repr(self) -> str:
        """The settings."""
        return f"max_span={self.max_span}, ramp={self.ramp}"


def make(options: AdaptiveSpanOptions, site: Site) -> AdaptiveSpan:
    """For self-attention."""
    return AdaptiveSpan(site.needs.heads, options.max_span, options.ramp)
