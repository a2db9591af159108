"""Exact attention tile by tile, forward and backward: memory grows with the length, not with its square.

The softmax is kept up to date while tiles come in (Milakov and Gimelshein, arXiv 1805.02867); the backward pass makes
each tile's scores anew from the row's log-sum-exp (Dao et al., arXiv 2205.14135, algorithms 1 and 4). Which tiles are
visited is the variant's affair, so that one engine serves all variants whose weights are a softmax over seen keys.

Shapes: B rows, H query heads, K key/value heads, G = H / K, N queries, M keys, D head size; n and m those of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.dropout import LEVELS, dropout_scale, keep_again
from attention.masks import LazyMask
from attention.scoring import Scoring

Sees = Callable[[Tensor, Tensor], Tensor]
"""(positions of queries [n, 1], of keys [1, m]) -> bool, [n, m]."""


@dataclass(frozen=True)
class Visit:
    """One tile: some queries, and keys that they may see. No pair may come up in two visits of one schedule.

    Args:
        queries: Of the query indices.
        keys: Of the key indices; several pieces are taken as one tile.
        sees: The pairs that count, beside the model's mask; None is all.
    """

    queries: slice
    keys: tuple[slice, ...]
    sees: Sees | None = None

    def after(self, dropped: int) -> Visit:
        """The same, where the first keys are gone and the others numbered anew."""
        if not dropped:
            return self
        moved = (range(piece.start, piece.stop, piece.step or 1) for piece in self.keys)
        left = (r[max(0, -(-(dropped - r.start) // r.step)) :] for r in moved)
        pieces = tuple(slice(r.start - dropped, r.stop - dropped, r.step) for r in left if len(r))
        return Visit(self.queries, pieces, self.sees)


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, visits: Sequence[Visit], scoring: Scoring
) -> Tensor:
    """Attend.

    Args:
        query: BHND.
        key: BKMD; H is a multiple of K, and head h reads from h // (H / K).
        value: BKMD.
        visits: Every pair that counts is in exactly one of them.
        scoring: Its dropout is drawn per tile, and drawn again in the backward pass.

    Returns:
        BHND. A query that sees nothing gets zeros.
    """
    dropped, seed = dropping(scoring)
    tiles = Tiles(mask, tuple(visits), dropped, scoring.softcap, seed)
    return attend_to_stream(query, key, value, scoring, _Whole(KeyBlock(slice(None), slice(None), tiles), dropped))


def attend_to_stream(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, stream: KeyStream) -> Tensor:
    """Attend, as the keys come by; both passes go over the stream alike.

    Args:
        query: BHND.
        key: BKMD, as is ``value``; those with which the stream begins.

    Returns:
        BHND.
    """
    with torch.autocast(query.device.type, enabled=False):  # which would take fp32 products back to half precision
        out = _Attend.apply(query, key, value, scoring.bias, scoring.scaling, stream)  # type: ignore[no-untyped-call]
        return cast(Tensor, out)


def dropping(scoring: Scoring) -> tuple[int, int]:
    """How many of LEVELS weights are dropped, and a seed, drawn from torch's generator: recomputing repeats it."""
    dropped = round(scoring.dropout * LEVELS)
    return dropped, int(torch.randint(2**62, (), device="cpu")) if dropped else 0


@dataclass(frozen=True)
class Tiles:
    """Queries and keys that meet, and how: what both passes do alike.

    Args:
        mask: Of these queries and keys.
        dropped: Of LEVELS weights.
        seed: Of dropout; each visit adds its number.
    """

    mask: LazyMask
    visits: tuple[Visit, ...]
    dropped: int
    softcap: float | None
    seed: int

    def scores(self, visit: Visit, q: Tensor, k: Tensor, bias: Tensor | None, shape: Any) -> _Scores | None:
        """Of one tile, [B, K, G, n, m]; None where all of it is masked."""
        rows, columns = _indices(visit, shape, q.device)
        allowed = self._allowed(visit, rows, columns)
        if allowed is not None and not bool(allowed.any()):
            return None
        raw = _products(q, k.mT)
        cap_grad = None
        if self.softcap is not None:
            raw = raw.div_(self.softcap).tanh_()
            cap_grad = 1 - raw * raw
            raw.mul_(self.softcap)
        places = None
        if bias is not None:
            places = _places(bias, rows, columns, shape)
            raw += grouped(bias[places], q.shape[1])
        if allowed is not None:
            # Added, since filling goes through all heads at a tenth of the speed.
            raw += raw.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)[:, :, None]
        return _Scores(raw, cap_grad, places)

    def keep(self, number: int, like: Tensor) -> Tensor | None:
        """The dropout mask of this visit; None without dropout."""
        return keep_again(self.seed + number, self.dropped, like)

    def _allowed(self, visit: Visit, rows: Tensor, columns: Tensor) -> Tensor | None:
        last_key = max(piece.stop for piece in visit.keys) - 1
        below = last_key + self.mask.kv_offset <= visit.queries.start + self.mask.q_offset
        allowed = self.mask.tile(rows, columns, below_diagonal=below)
        if visit.sees is None:
            return allowed
        seen = visit.sees(rows[:, None] + self.mask.q_offset, columns[None, :] + self.mask.kv_offset)[None, None]
        return seen if allowed is None else allowed & seen


@dataclass(frozen=True)
class _Scores:
    """Of one tile.

    Args:
        value: Masked, [B, K, G, n, m].
        cap_grad: Derivative of the soft cap; None without one.
        places: Where the bias of the tile lies in the whole.
    """

    value: Tensor
    cap_grad: Tensor | None
    places: Any


class KeyBlock(NamedTuple):
    """Some of the keys that came by, and the queries that they meet.

    Args:
        tiles: Numbered from the first of these queries and keys.
        bias: Of these, a view of the whole; None is the whole.
    """

    queries: slice
    keys: slice
    tiles: Tiles
    bias: Callable[[Tensor], Tensor] | None = None

    def own_bias(self, whole: Tensor | None) -> Tensor | None:
        """Of these queries and keys."""
        return whole if whole is None or self.bias is None else self.bias(whole)


class KeyStream(Protocol):
    """How keys and values come by the queries. No pair may meet twice."""

    @property
    def dropped(self) -> int:
        """Of LEVELS weights, in every block."""
        ...

    def blocks(self, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, Iterable[KeyBlock]]]:
        """Keys and values, BKMD as those given, which come first; and the blocks of them."""
        ...

    def pass_on_grads(self, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor, ...]:
        """After each, in the backward pass: the gradients, BKMD, of those that come next; home after the last."""
        ...


@dataclass(frozen=True)
class _Whole:
    """All keys at once."""

    block: KeyBlock
    dropped: int

    def blocks(self, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, Iterable[KeyBlock]]]:
        yield key, value, [self.block]

    def pass_on_grads(self, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor, ...]:
        return dkey, dvalue


class Sums(NamedTuple):
    """The softmax of some queries, kept up to date while keys come in.

    Args:
        out: Sum of the values by weight, BKGND.
        top: The highest score, BKGN1; -inf before the first.
        total: Sum of the weights, BKGN1.
    """

    out: Tensor
    top: Tensor
    total: Tensor

    @classmethod
    def none(cls, q_BKGND: Tensor, width: int) -> Sums:
        """Before the first key; ``width`` is that of the values."""
        shape = q_BKGND.shape[:4]
        return cls(
            q_BKGND.new_zeros(*shape, width), q_BKGND.new_full((*shape, 1), -torch.inf), q_BKGND.new_zeros(*shape, 1)
        )

    def of(self, queries: slice) -> Sums:
        """Those of some queries, as views."""
        return Sums(*(x[..., queries, :] for x in self))

    def settled(self) -> tuple[Tensor, Tensor]:
        """The output BKGND, zeros for a query that saw nothing, and the logarithm of the sum of exp(score), BKGN1."""
        out = self.out.div_(self.total.masked_fill(self.total == 0, 1.0))
        # exp(s - inf) is 0: a row that saw nothing has no gradient either.
        return out, torch.where(self.total == 0, torch.inf, self.top + self.total.log())


def add_keys(sums: Sums, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tiles: Tiles) -> None:
    """Let keys into the sums of queries, in place.

    Args:
        q: BKGND, scaled.
        k: BKMD.
        v: BKMD, scaled for dropout.
        bias: Of these queries and keys; see ``Scoring``.
    """
    for number, visit in enumerate(tiles.visits):
        own = sums.of(visit.queries)
        scores = tiles.scores(visit, q[..., visit.queries, :], _gather(k, visit), bias, (q.shape[3], k.shape[2]))
        if scores is None:
            continue
        higher = torch.maximum(own.top, scores.value.amax(-1, keepdim=True))
        level = higher.masked_fill(higher == -torch.inf, 0.0)  # of a row that has seen nothing yet
        weights = scores.value.sub_(level).exp_()
        fade = (own.top - level).exp_()
        own.total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        own.top.copy_(higher)
        if (keep := tiles.keep(number, weights)) is not None:
            weights.mul_(keep)
        own.out.mul_(fade).add_(_products(weights, _gather(v, visit)))


class Settled(NamedTuple):
    """Queries in the backward pass.

    Args:
        q: BKGND, scaled.
        grad: Of the output, BKGND.
        inner: Of output and gradient, BKGN1.
        logsumexp: BKGN1.
    """

    q: Tensor
    grad: Tensor
    inner: Tensor
    logsumexp: Tensor

    @classmethod
    def from_result(cls, q: Tensor, result: Tensor, grad: Tensor, logsumexp: Tensor) -> Settled:
        """Of output and gradient as they left and come back, BHND."""
        out, grad = (grouped(wide(x), q.shape[1]) for x in (result, grad))
        return cls(q, grad, (out * grad).sum(-1, keepdim=True), logsumexp)

    def of(self, queries: slice) -> Settled:
        """Some of the queries, as views."""
        return Settled(*(x[..., queries, :] for x in self))


class Grads(NamedTuple):
    """Gradients, added up in place: of q, scaled BKGND, of k and of scaled v, BKMD, and of the bias if it wants one."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None


def add_grads(grads: Grads, own: Settled, k: Tensor, v: Tensor, bias: Tensor | None, tiles: Tiles) -> None:
    """Add what keys and queries owe each other; arguments as of ``add_keys``."""
    for number, visit in enumerate(tiles.visits):
        k_m, now = _gather(k, visit), own.of(visit.queries)
        scores = tiles.scores(visit, now.q, k_m, bias, (own.q.shape[3], k.shape[2]))
        if scores is None:
            continue
        weights = scores.value.sub_(now.logsumexp).exp_()
        keep = tiles.keep(number, weights)
        _scatter(grads.v, visit, _collect(weights if keep is None else weights * keep, now.grad))
        dweights = _products(now.grad, _gather(v, visit).mT)  # after that of v: a tile less at once
        if keep is not None:
            dweights.mul_(keep)
        dscores = dweights.sub_(now.inner).mul_(weights)
        if grads.bias is not None:
            _add_to_bias(grads.bias, scores.places, dscores.flatten(1, 2))
        if scores.cap_grad is not None:
            dscores.mul_(scores.cap_grad)
        grads.q[..., visit.queries, :] += _products(dscores, k_m)
        _scatter(grads.k, visit, _collect(dscores, now.q))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scaling: float,
        stream: KeyStream,
    ) -> Tensor:
        q, factor = grouped(wide(query), key.shape[1]) * scaling, dropout_scale(stream.dropped)
        sums = Sums.none(q, value.shape[-1])
        for key_then, value_then, blocks in stream.blocks(key, value):
            k, v = wide(key_then), wide(value_then) * factor
            for block in blocks:
                of_q, of_k = (..., block.queries, slice(None)), (..., block.keys, slice(None))
                add_keys(sums.of(block.queries), q[of_q], k[of_k], v[of_k], block.own_bias(bias), block.tiles)
        out, logsumexp = sums.settled()
        result = out.flatten(1, 2).to(query.dtype)
        ctx.save_for_backward(query, key, value, bias, result, logsumexp)
        ctx.scaling, ctx.factor, ctx.stream = scaling, factor, stream
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, result, logsumexp = ctx.saved_tensors
        stream: KeyStream = ctx.stream
        q = grouped(wide(query), key.shape[1]) * ctx.scaling
        queries = Settled.from_result(q, result, grad, logsumexp)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(wide(key)), torch.zeros_like(wide(value))
        dbias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        for key_then, value_then, blocks in stream.blocks(key, value):
            k, v = wide(key_then), wide(value_then) * ctx.factor
            for block in blocks:
                of_q, of_k = (..., block.queries, slice(None)), (..., block.keys, slice(None))
                grads = Grads(dq[of_q], dk[of_k], dv[of_k], block.own_bias(dbias))
                add_grads(grads, queries.of(block.queries), k[of_k], v[of_k], block.own_bias(bias), block.tiles)
            dk, dv = stream.pass_on_grads(dk, dv)
        dq, dv = dq.mul_(ctx.scaling).flatten(1, 2), dv.mul_(ctx.factor)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dbias, None, None


def wide(x: Tensor) -> Tensor:
    """In fp32 at least: scores of half precision would lose what the softmax needs."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def grouped(x: Tensor, heads: int) -> Tensor:
    """BH... as BKG..."""
    return x.view(x.shape[0], heads, -1, *x.shape[2:])


def _gather(x_BKMD: Tensor, visit: Visit) -> Tensor:
    pieces = [x_BKMD[:, :, piece] for piece in visit.keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _scatter(total_BKMD: Tensor, visit: Visit, part_BKmD: Tensor) -> None:
    """Add the tile's keys to where they came from."""
    sizes = [len(range(piece.start, piece.stop, piece.step or 1)) for piece in visit.keys]
    for piece, part in zip(visit.keys, torch.split(part_BKmD, sizes, dim=2), strict=True):
        total_BKMD[:, :, piece] += part


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Of [B, K, G, n, i] with [B, K, i, j]: [B, K, G, n, j]."""
    return torch.matmul(x.flatten(2, 3), y).view(*x.shape[:4], y.shape[-1])


def _collect(weights_BKGnm: Tensor, x_BKGnD: Tensor) -> Tensor:
    """Sum over the queries of all heads that share the key, BKmD."""
    return torch.matmul(weights_BKGnm.flatten(2, 3).mT, x_BKGnD.flatten(2, 3))


def _indices(visit: Visit, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    pieces = [torch.arange(p.start, p.stop, p.step or 1, device=device) for p in visit.keys]
    own = visit.queries
    return torch.arange(own.start, own.stop, own.step or 1, device=device), torch.cat(pieces)


def _places(bias: Tensor, rows_n: Tensor, columns_m: Tensor, shape: tuple[int, int]) -> Any:
    if bias.ndim == 2:
        return (None, slice(None), columns_m[None, :] - rows_n[:, None] + shape[0] - 1)
    return (slice(None), slice(None), rows_n[:, None], columns_m[None, :])


def _add_to_bias(total: Tensor, places: Any, part_BHnm: Tensor) -> None:
    if total.ndim == 2:
        total.index_add_(1, places[2].flatten(), part_BHnm.sum(0).flatten(1).to(total.dtype))
    else:
        total[places] += part_BHnm.sum_to_size(total.shape[0], *part_BHnm.shape[1:]).to(total.dtype)


def ranges(length: int, size: int) -> Iterator[slice]:
    """Cut ``range(length)`` into pieces of ``size``."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
