"""What a model's own mask allows, asked for one tile at a time: transformers' rule, without its table of N x M.

Shapes: B rows, N queries, M keys; n and m those of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)


class Cut(NamedTuple):
    """Some rows of a batch, without the padding before their texts.

    Args:
        mask: Theirs, with positions counted from the first token.
        rows: Which ones.
        first_query: The first of their queries that is no such padding.
        first_key: The first of their keys.
    """

    mask: LazyMask
    rows: Tensor
    first_query: int
    first_key: int


class LazyMask(BlockMask):
    """The arguments with which transformers asks for a mask, kept.

    A BlockMask by name alone: ``generate`` with a static cache makes its masks early and hands them in again, and takes
    only a tensor of four dimensions or a BlockMask for a mask that is made already.

    Args:
        batch_size: B.
        q_length: N.
        kv_length: M.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: ``(row, head, query position, key position) -> bool``, of tensors that broadcast.
        attention_mask: False on padding, by row and key position.
        others: Further arguments of ``sdpa_mask``.

    Attributes:
        padding_BM: False on padding, by key; None without any.
        starts_B: Position of the first token of each row; None where all rows begin at once.
        rule: As ``mask_function``.
        block_masks: What FlexAttention has made of it, by pattern.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Any = bidirectional_mask_function,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> None:
        self._size = (batch_size, 1, q_length, kv_length)
        self.rule, self._others = mask_function, others
        self.q_offset, self.kv_offset = int(q_offset), int(kv_offset)
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        self.padding_BM = None if padding is None else padding[:, kv_offset : kv_offset + kv_length].bool()
        if self.padding_BM is not None and bool(self.padding_BM.all()):
            self.padding_BM = None
        self._never_padding_M = None if self.padding_BM is None else self.padding_BM.all(dim=0)
        self.starts_B = _starts(attention_mask)  # a window's cache may have dropped the padding
        self._attention_mask = attention_mask
        self._dense: Tensor | None = None
        self._is_made = False
        self.block_masks: dict[Any, BlockMask] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, 1, N, M."""
        return self._size

    @property
    def ndim(self) -> int:
        """As many dimensions; GPT-2 asks for them of a mask that it is handed."""
        return len(self._size)

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key, as far as that is known without asking for each pair."""
        return self.rule is causal_mask_function

    @property
    def only_padding(self) -> bool:
        """Whether every query sees the same keys: all but padding."""
        return self.rule is bidirectional_mask_function

    @property
    def needs_table(self) -> bool:
        """Whether torch's kernel needs a table to know what is seen: all keys, or all up to the query, need none."""
        _, _, queries, keys = self._size
        has_corner = self.q_offset == self.kv_offset and queries == keys
        return self.padding_BM is not None or not (self.only_padding or (self.causal and has_corner))

    @property
    def is_by_row(self) -> bool:
        """Whether rows may differ in what they see, as far as that is known without asking for each pair."""
        has_padding = self.padding_BM is not None or self.starts_B is not None
        return has_padding or not (self.causal or self.only_padding)

    def __repr__(self) -> str:
        return f"LazyMask(shape={self._size}, q_offset={self.q_offset}, kv_offset={self.kv_offset})"

    __str__ = __repr__  # BlockMask's own draws its blocks

    def contiguous(self) -> LazyMask:
        """Itself; ``generate`` asks it of every mask."""
        return self

    def without_start(self, start: int) -> Cut:
        """This mask for the rows whose text begins at position ``start``, counted from there."""
        assert self.starts_B is not None
        rows = (self.starts_B == start).nonzero()[:, 0]
        first_query, first_key = max(0, start - self.q_offset), max(0, start - self.kv_offset)
        rule = self.rule
        if not (self.causal or self.only_padding):  # those ask for no more than the distance

            def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return self.rule(rows.to(row.device)[row], head, query + start, key + start)  # type: ignore[no-any-return]

        kv_offset, keys = self.kv_offset + first_key - start, self._size[3] - first_key
        real_BM = rows.new_ones(len(rows), keys).bool()
        if self.padding_BM is not None:
            real_BM = self.padding_BM[rows, first_key:]
        mask = LazyMask(
            batch_size=len(rows),
            q_length=self._size[2] - first_query,
            kv_length=keys,
            q_offset=self.q_offset + first_query - start,
            kv_offset=kv_offset,
            mask_function=rule,
            attention_mask=torch.cat([real_BM.new_ones(len(rows), kv_offset), real_BM], dim=1),
        )
        return Cut(mask, rows, first_query, first_key)

    def dense(self) -> Tensor | None:
        """The whole table as transformers' own SDPA takes it, bool [B, 1, N, M]; None where SDPA needs none."""
        if not self._is_made:
            rows, _, queries, keys = self._size
            self._dense = sdpa_mask(
                rows,
                queries,
                keys,
                self.q_offset,
                self.kv_offset,
                mask_function=self.rule,
                attention_mask=self._attention_mask,
                **self._others,
            )
            self._is_made = True
        return self._dense

    def table(self, device: torch.device) -> Tensor | None:
        """Which pairs are allowed, bool that broadcasts to [B, 1, N, M]; None for all."""
        _, _, queries, keys = self._size
        rows, columns = torch.arange(queries, device=device), torch.arange(keys, device=device)
        return self.tile(rows, columns, below_diagonal=False)

    def part(self, queries: slice, keys: slice) -> LazyMask:
        """That of some queries and keys, in a row each."""
        return LazyMask(
            batch_size=self._size[0],
            q_length=queries.stop - queries.start,
            kv_length=keys.stop - keys.start,
            q_offset=self.q_offset + queries.start,
            kv_offset=self.kv_offset + keys.start,
            mask_function=self.rule,
            attention_mask=self._attention_mask,
            **self._others,
        )

    def tile(self, queries_n: Tensor, keys_m: Tensor, *, below_diagonal: bool) -> Tensor | None:
        """Which pairs of these indices are allowed.

        Args:
            below_diagonal: Whether no key of the tile stands after any query of it.

        Returns:
            Bool that broadcasts to [B, 1, n, m]; None for all.
        """
        allowed = None
        q_n1, k_1m = queries_n[:, None] + self.q_offset, keys_m[None, :] + self.kv_offset
        if self.causal and not below_diagonal:
            allowed = (k_1m <= q_n1)[None, None]
        elif not self.causal and not self.only_padding:
            rows_B11 = torch.arange(self._size[0], device=keys_m.device)[:, None, None]
            answer = self.rule(rows_B11, torch.zeros_like(rows_B11), q_n1, k_1m)
            allowed = answer.expand(answer.shape[0] if answer.ndim == 3 else 1, len(queries_n), len(keys_m))[:, None]
        if self._never_padding_M is not None and not bool(self._never_padding_M[keys_m].all()):
            assert self.padding_BM is not None
            real_B11m = self.padding_BM[:, None, None, keys_m]
            allowed = real_B11m if allowed is None else allowed & real_B11m
        return allowed

    def pairs(self, queries: Tensor, keys: Tensor, *, below_diagonal: bool) -> Tensor | None:
        """Which pairs are allowed, of indices that are others in each row.

        Args:
            queries: [B, ..., n].
            keys: [B, ..., m].
            below_diagonal: Whether none of these keys stands after any query that it is paired with.

        Returns:
            Bool that broadcasts to [B, ..., n, m]; None for all.
        """
        allowed = None
        rows = torch.arange(self._size[0], device=keys.device).view(-1, *[1] * keys.ndim)
        q_n1, k_1m = queries[..., :, None] + self.q_offset, keys[..., None, :] + self.kv_offset
        if self.causal and not below_diagonal:
            allowed = k_1m <= q_n1
        elif not self.causal and not self.only_padding:
            allowed = self.rule(rows, torch.zeros_like(rows), q_n1, k_1m)
        if self.padding_BM is not None:
            real_1m = self.padding_BM[rows, keys[..., None, :]]
            allowed = real_1m if allowed is None else allowed & real_1m
        return allowed


def _starts(real_BP: Tensor | None) -> Tensor | None:
    """By row and position; of a row of padding alone, 0."""
    starts_B = None if real_BP is None else real_BP.long().argmax(dim=1)
    return starts_B if starts_B is not None and bool(starts_B.any()) else None
