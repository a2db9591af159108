"""Keys and values projected along the text to a few slots: softmax(Q (E K)^T) F V (Wang et al., arXiv 2006.04768,
equation 7).

The paper's simple form: one E and one F for each site, shared by its heads. Both have a column for each position that
the model has; a shorter row uses the first ones.

The paper trains from scratch on rows of one length. So that a pretrained model keeps what it can, and a row is the same
whatever it is padded to, every position has a home among the slots (``homes``), and a slot begins as the
mean of the keys that a row has at home there. It counts for as many as they are: log(count) is added to its scores,
which masks the slots that a row does not reach. So rows of up to k tokens begin as full attention, and so do keys that
are alike wherever they share a slot.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size; L positions, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, scaled_dot_product_attention

from attention.masks import LazyMask
from attention.options import LinformerOptions
from attention.scoring import Scoring
from attention.variant import Site, Work, refuse_longer
from heedful import UserError


class Linformer(nn.Module):
    """Two matrices [S, L] along the text."""

    home_L: Tensor

    def __init__(self, slots: int, positions: int) -> None:
        super().__init__()
        home_L = homes(slots, positions)
        start_SL = one_hot(home_L, slots).T.to(torch.get_default_dtype())
        self.E, self.F = (nn.Parameter(start_SL.contiguous().clone()) for _ in range(2))
        self.register_buffer("home_L", home_L, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``.

        Raises:
            UserError: A text longer than the model's positions.
            ValueError: What ``attention.seam.install`` refuses of a model: a mask of more than padding, a bias, a cap.
        """
        scoring.require_plain("linformer")
        if not mask.only_padding:
            raise ValueError("linformer with a mask of more than padding, which it does not honour")
        refuse_longer(self, key.shape[2])
        real_BM = mask.padding_BM
        if real_BM is not None:
            if mask.starts_B is not None:  # a text's first token is at home in the first slot, wherever it stands
                order_BM = _behind(mask.starts_B.to(key.device), key.shape[2])
                real_BM = real_BM.gather(1, order_BM)
                key, value = (x.gather(2, order_BM[:, None, :, None].expand_as(x)) for x in (key, value))
            key, value = (x * real_BM[:, None, :, None] for x in (key, value))
        count_BS = self._counts(real_BM, key)
        return scaled_dot_product_attention(
            query,
            _projected(self.E, key, count_BS),
            _projected(self.F, value, count_BS),
            attn_mask=count_BS.log().to(query.dtype)[:, None, None],
            dropout_p=scoring.dropout,
            scale=scoring.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    @property
    def longest(self) -> int:
        """The model's positions, for which it is made."""
        return len(self.home_L)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """By its slots; see ``attention.variant.Variant``."""
        pairs = length * min(length, len(self.E))
        return Work(pairs, pairs, "pairs of a query and a slot; to fill the slots costs as much again")

    def extra_repr(self) -> str:
        """Slots and positions."""
        return f"k={len(self.E)}, positions={len(self.home_L)}"

    def _counts(self, real_BM: Tensor | None, key: Tensor) -> Tensor:
        """How many keys of each row are at home in each slot that the longest row reaches; B is 1 without padding.

        In fp32 at least: bf16 does not count beyond 256.
        """
        keys, dtype = key.shape[2], torch.promote_types(key.dtype, torch.float32)
        real_BM = key.new_ones(1, keys, dtype=dtype) if real_BM is None else real_BM.to(dtype)
        count_BS = real_BM.new_zeros(len(real_BM), min(len(self.E), keys)).index_add(1, self.home_L[:keys], real_BM)
        # A row of padding alone has values of zero: any weights will do but NaN, which some kernels give.
        return torch.where(count_BS.any(-1, keepdim=True), count_BS, 1.0)


def homes(slots: int, positions: int) -> Tensor:
    """The slot of each position, [L]: the first S have one each, and those after them join these in runs of neighbours.

    In runs of neighbours from the first position on, a short row would fill few slots and mix all its tokens for
    nothing; for long rows the two are about as good.
    """
    position_L = torch.arange(positions)
    beyond = max(1, positions - slots)
    return torch.where(position_L < slots, position_L, (position_L - slots) * slots // beyond)


def _behind(starts_B: Tensor, length: int) -> Tensor:
    """The places of each row from its first token on, and then those before it, BM."""
    return (torch.arange(length, device=starts_B.device) + starts_B[:, None]) % length


def _projected(along_SL: Tensor, x_BKMD: Tensor, count_BS: Tensor) -> Tensor:
    """The means of the slots, BKSD; by one product, whose gradient by E is no table of each row."""
    sums = torch.einsum("sm,bkmd->bksd", along_SL[: count_BS.shape[1], : x_BKMD.shape[2]], x_BKMD)
    return sums / count_BS.clamp(min=1).to(x_BKMD.dtype)[:, None, :, None]


def make(options: LinformerOptions, site: Site) -> Linformer:
    """For an encoder's self-attention.

    Raises:
        UserError: The model does not say how many positions it has, or has fewer than there are to be slots.
    """
    positions = site.positions
    if positions is None:
        raise UserError(
            f"linformer at {site} of a model that does not say how many positions it has",
            where="attention",
            expected="max_position_embeddings in the model's config.json",
            fix="another attention, such as sliding_window",
        )
    if options.k > positions:
        raise UserError(
            f"k={options.k} at {site} of a model with {positions:,} positions",
            where="attention.k",
            expected=f"at most {positions}: a slot for each position",
        )
    return Linformer(options.k, positions)
