"""A small network scores each pair: v^T tanh(W q + U k), softmax over the keys (Bahdanau et al., arXiv 1409.0473,
section 3.1 and appendix A.1.2).

Each head has its own W and v, and each head of the keys its own U: the model was trained to give its heads subspaces of
their own, and one network for all would have to read every one of them. No setting of them is full attention, so the
rest of the model has to learn anew what the weights mean: they begin even, v being zero as in the paper (appendix
B.1), while W and U begin as identities where the paper has noise of 0.001, from which fine-tuning's rates would not
get far.

The N x M x D values inside tanh never stand as a whole: queries go block by block, made again in the backward pass.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size; n and m those of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from attention.engine import ranges
from attention.masks import LazyMask
from attention.options import AdditiveOptions
from attention.reference import masked_softmax
from attention.scoring import Scoring
from attention.variant import Site, Work, all_pairs, read_weights, refuse_longer

LONGEST = 2048
"""Keys beyond which it is refused: it costs D times what products cost, and none of it is a matrix product."""
BLOCK = 2**21
"""Values inside tanh at a time, 8 MiB in fp32."""


class Additive(nn.Module):
    """W [H, D, D], U [K, D, D] and v [H, D]."""

    longest = LONGEST

    def __init__(self, heads: int, key_heads: int, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))
        self.U = nn.Parameter(torch.eye(width).repeat(key_heads, 1, 1))
        self.v = nn.Parameter(torch.zeros(heads, width))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``.

        Raises:
            UserError: More keys than it is for.
            ValueError: What ``attention.seam.install`` refuses of a model: a bias, a cap.
        """
        scoring.require_plain("additive")
        (rows, heads, queries, width), keys = query.shape, key.shape[2]
        refuse_longer(self, keys)
        query, key = query @ self.W.mT, key @ self.U.mT
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        out = []
        for block in _blocks(queries, keys, rows * heads * width):
            end = min(keys, block.stop + mask.q_offset - mask.kv_offset) if mask.causal else keys
            parts = query[:, :, block], key[:, :, :end], value[:, :, :end]
            out.append(
                checkpoint(
                    self._attend,
                    *parts,
                    block,
                    mask,
                    scoring.dropout,
                    use_reentrant=False,
                    preserve_rng_state=scoring.dropout > 0,
                )
            )
        return torch.cat(out, dim=2)

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM; see ``attention.variant.Variant``."""
        return read_weights(self, query, key, mask, scoring)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """By its blocks; see ``attention.variant.Variant``."""
        blocks = _blocks(length, length, self.v.numel())
        scored = sum((b.stop - b.start) * (b.stop if causal else length) for b in blocks)
        width = self.v.shape[1]
        return Work(scored, all_pairs(length, causal=causal), f"pairs, each of which costs {width} values of tanh")

    def extra_repr(self) -> str:
        """Heads and their size."""
        return "heads={}, key_heads={}, width={}".format(len(self.W), *self.U.shape[:2])

    def _attend(
        self, query_BHnD: Tensor, key_BHmD: Tensor, value_BHmD: Tensor, block: slice, mask: LazyMask, drop: float
    ) -> Tensor:
        indices = torch.arange(max(block.stop, key_BHmD.shape[2]), device=key_BHmD.device)
        allowed = mask.tile(indices[block], indices[: key_BHmD.shape[2]], below_diagonal=False)
        hidden_BHnmD = (query_BHnD[:, :, :, None] + key_BHmD[:, :, None]).tanh_()
        scores = (hidden_BHnmD @ self.v[:, None, :, None]).squeeze(-1)
        return dropout(masked_softmax(scores, allowed), drop, training=drop > 0) @ value_BHmD


def _blocks(queries: int, keys: int, values: int) -> Iterator[slice]:
    """Of queries; ``values`` are those inside tanh of one pair in all rows and heads."""
    return ranges(queries, max(1, BLOCK // (values * keys)))


def make(options: AdditiveOptions, site: Site) -> Additive:
    """For any site."""
    return Additive(site.needs.heads, site.needs.key_heads, site.needs.width)
