"""Exact attention tile by tile, forward and backward: memory grows with the length, not with its square.

The softmax is kept up to date while tiles come in (Milakov and Gimelshein, arXiv 1805.02867); the backward pass makes
each tile's scores anew from the row's log-sum-exp (Dao et al., arXiv 2205.14135, algorithms 1 and 4). Which tiles are
visited is the variant's affair, so that one engine serves all variants whose weights are a softmax over seen keys.

Shapes: B rows, H query heads, K key/value heads, G = H / K, N queries, M keys, D head size; n and m those of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.dropout import LEVELS, draw_keep
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
    dropped = round(scoring.dropout * LEVELS)
    seed = int(torch.randint(2**62, ())) if dropped else 0  # from torch's generator, so that recomputing repeats it
    tiles = _Tiles(mask, tuple(visits), scoring.scaling, dropped, scoring.softcap, seed)
    with torch.autocast(query.device.type, enabled=False):  # which would take fp32 products back to half precision
        return cast(Tensor, _Attend.apply(query, key, value, scoring.bias, tiles))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Tiles:
    """What both passes do alike."""

    mask: LazyMask
    visits: tuple[Visit, ...]
    scaling: float
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
        slope = None
        if self.softcap is not None:
            raw = raw.div_(self.softcap).tanh_()
            slope = 1 - raw * raw
            raw.mul_(self.softcap)
        places = None
        if bias is not None:
            places = _places(bias, rows, columns, shape)
            raw += _grouped(bias[places], q.shape[1])
        if allowed is not None:
            # Added, since filling goes through all heads at a tenth of the speed.
            raw += raw.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)[:, :, None]
        return _Scores(raw, slope, places)

    @property
    def raised(self) -> float:
        """By how much the values are raised for what dropout takes from the weights."""
        return LEVELS / (LEVELS - self.dropped)

    def keep(self, number: int, like: Tensor) -> Tensor | None:
        """The dropout mask of this visit; None without dropout."""
        if not self.dropped:
            return None
        generator = torch.Generator().manual_seed(self.seed + number)
        return draw_keep(like.shape, self.dropped, generator).to(like.device, like.dtype)

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
        slope: Derivative of the soft cap; None without one.
        places: Where the bias of the tile lies in the whole.
    """

    value: Tensor
    slope: Tensor | None
    places: Any


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, tiles: _Tiles) -> Tensor:
        q, k, v = _grouped(_wide(query), key.shape[1]) * tiles.scaling, _wide(key), _wide(value) * tiles.raised
        out = q.new_zeros(*q.shape[:4], v.shape[-1])
        top, total = q.new_full((*q.shape[:4], 1), -torch.inf), q.new_zeros(*q.shape[:4], 1)
        for number, visit in enumerate(tiles.visits):
            rows = (..., visit.queries, slice(None))
            scores = tiles.scores(visit, q[rows], _gather(k, visit), bias, (q.shape[3], k.shape[2]))
            if scores is None:
                continue
            higher = torch.maximum(top[rows], scores.value.amax(-1, keepdim=True))
            level = higher.masked_fill(higher == -torch.inf, 0.0)  # of a row that has seen nothing yet
            weights = scores.value.sub_(level).exp_()
            fade = (top[rows] - level).exp_()
            total[rows] = total[rows] * fade + weights.sum(-1, keepdim=True)
            top[rows] = higher
            if (keep := tiles.keep(number, weights)) is not None:
                weights.mul_(keep)
            out[rows] = out[rows] * fade + _products(weights, _gather(v, visit))
        out.div_(total.masked_fill(total == 0, 1.0))
        # exp(s - inf) is 0: a row that saw nothing has no gradient either.
        log_sum = torch.where(total == 0, torch.inf, top + total.log())
        result = out.flatten(1, 2).to(query.dtype)
        ctx.save_for_backward(query, key, value, bias, result, log_sum)
        ctx.tiles = tiles
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, result, log_sum = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        heads = key.shape[1]
        q, k, v = _grouped(_wide(query), heads) * tiles.scaling, _wide(key), _wide(value) * tiles.raised
        out, grad = _grouped(_wide(result), heads), _grouped(_wide(grad), heads)
        inner = (out * grad).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dbias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        for number, visit in enumerate(tiles.visits):
            rows = (..., visit.queries, slice(None))
            q_n, k_m, grad_n = q[rows], _gather(k, visit), grad[rows]
            scores = tiles.scores(visit, q_n, k_m, bias, (q.shape[3], k.shape[2]))
            if scores is None:
                continue
            weights = scores.value.sub_(log_sum[rows]).exp_()
            dweights = _products(grad_n, _gather(v, visit).mT)
            keep = tiles.keep(number, weights)
            _scatter(dv, visit, _collect(weights if keep is None else weights * keep, grad_n))
            if keep is not None:
                dweights.mul_(keep)
            dscores = dweights.sub_(inner[rows]).mul_(weights)
            if dbias is not None:
                _add_to_bias(dbias, scores.places, dscores.flatten(1, 2))
            if scores.slope is not None:
                dscores.mul_(scores.slope)
            dq[rows] += _products(dscores, k_m)
            _scatter(dk, visit, _collect(dscores, q_n))
        dq, dv = dq.mul_(tiles.scaling).flatten(1, 2), dv.mul_(tiles.raised)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dbias, None


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: scores of half precision would lose what the softmax needs."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _grouped(x: Tensor, heads: int) -> Tensor:
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
