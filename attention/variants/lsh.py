"""A query sees the keys that its hash leads to (Reformer: Kitaev et al., arXiv 2001.04451, section 2).

A round draws random directions; they and their opposites are its buckets. A query's hash is Reformer's: the direction
along which it lies furthest. Queries and keys are apart, as they are in pretrained models, and buckets hold equally
many keys, as in SMYRF (Daras et al., arXiv 2010.05315): not those with the same hash, which would be most keys in some
buckets and none in others, but the ``cluster_size`` that lie furthest along the direction.

A pair that meets in several rounds counts in the first of them. Reformer divides its weight among them, which comes to
the same but for dropout: here a weight is dropped as a whole, as in full attention.

Where tokens look back only, what a query sees must not follow from later tokens either, which would push keys out of a
bucket. So the text is cut into blocks: a query sees its own block up to itself, and clusters of the keys before the
block. Texts packed into one row would share its blocks and clusters.

Decoding with a cache is dense: a new token sees the whole cache, as in full attention. Without a cache it sees
clusters, and so the two may differ.

Padding takes no token's place in a cluster and moves no block, and the directions follow from seed and layer alone: a
row is the same in every batch, and whenever it is computed again.

Shapes: B rows, H query heads, K key/value heads, G = H / K, N tokens, D head size, R rounds, E buckets, C keys in a
cluster; Q = G n queries of a block of n tokens, in T chunks of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attention.dropout import dropout_scale, keep_again
from attention.engine import dropping, ranges, wide
from attention.masks import LazyMask
from attention.options import LshOptions
from attention.scoring import Scoring
from attention.tiled import Tiled
from attention.variant import Site, Work, all_pairs, read_weights
from attention.variants.blockwise import Everything

BLOCK = 4
"""Clusters' sizes in a block where tokens look back only: so many keys its queries see elsewhere in four rounds."""
NARROWEST, WIDEST = 8, 72
"""Queries in a chunk. Narrow ones gather keys more often, wide ones stay empty more often."""
KEPT = 2**16
"""Weights of a part up to which they are kept for the backward pass: of short texts they are few."""


class Lsh(nn.Module):
    """Attention over the keys of the same buckets.

    Args:
        seed: Decides on the directions.
        causal: Whether tokens look back only.
    """

    def __init__(self, options: LshOptions, seed: tuple[int, ...], *, causal: bool) -> None:
        super().__init__()
        self.options, self.seed, self.causal = options, seed, causal
        self.dense = Tiled(Everything())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``.

        Raises:
            ValueError: With a bias or a soft cap, of which a hash knows nothing; a model with them is refused before.
        """
        scoring.require_plain("lsh")
        tokens, keys = query.shape[2], key.shape[2]
        begins = mask.q_offset == mask.kv_offset == 0 and (tokens == keys or self.causal)
        if not begins or tokens <= self._longest_dense:
            dense: Tensor = self.dense(query, key, value, mask, scoring)
            return dense
        with torch.autocast(query.device.type, enabled=False):
            # More keys than tokens are a static cache's, which has places for tokens to come.
            out = self._attend(query, key[:, :, :tokens], value[:, :, :tokens], mask, scoring)
        return out.to(query.dtype)

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM; see ``attention.variant.Variant``."""
        return read_weights(self, query, key, mask, scoring)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """Of its rounds, whatever the tokens are; see ``attention.variant.Variant``."""
        size = self._longest_dense
        if self.is_full(length, causal=causal):
            return self.dense.work(length, heads, causal=causal)
        rounds, cluster = self.options.rounds, self.options.cluster_size
        unit = "pairs of every round; seen: at most, where no pair meets in two rounds"
        if not self.causal:
            return Work(length * rounds * cluster, length * min(length, rounds * cluster), unit)
        scored = seen = 0
        for block in ranges(length, size):  # its own pairs, and clusters of what comes before it
            tokens = block.stop - block.start
            scored += tokens**2 + tokens * rounds * min(cluster, block.start)
            seen += all_pairs(tokens, causal=True) + tokens * min(block.start, rounds * cluster)
        return Work(scored, seen, unit)

    def is_full(self, length: int, *, causal: bool) -> bool:
        """Whether it is one cluster, or one block; see ``attention.variant.Variant``."""
        return length <= self._longest_dense

    @property
    def _longest_dense(self) -> int:
        return self.options.cluster_size * (BLOCK if self.causal else 1)

    def extra_repr(self) -> str:
        """The settings."""
        return str(self.options)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
        order_BN = _real_first(mask, tokens) if self.causal else None
        dropped, seed = dropping(scoring)
        values = wide(value) * dropout_scale(dropped)
        q, k, v = (_placed(x, order_BN) for x in (wide(query) * scoring.scaling, wide(key), values))
        text = Text(k, v, mask, order_BN, dropped, seed)
        with torch.no_grad():
            hashes_BHNR = self._along(q).argmax(-1)
            heights_BKREN = text.without_padding(self._along(k).movedim(2, -1))
        q_BKGND, hashes_BKGNR = (x.view(len(x), -1, groups, *x.shape[2:]) for x in (q, hashes_BHNR))
        clusters = None if self.causal else self._furthest(None, heights_BKREN, slice(0, tokens))
        out: list[Tensor] = []
        for number, block in enumerate(ranges(tokens, BLOCK * self.options.cluster_size if self.causal else tokens)):
            parts: list[Part] = []
            own = Block(text, q_BKGND[:, :, :, block].flatten(2, 3), block, number * (self.options.rounds + 1))
            if clusters is not None:
                parts += self._rounds(own, hashes_BKGNR[:, :, :, block].flatten(2, 3).movedim(-1, 2), clusters.keys)
            if self.causal:
                parts.append(own.itself())
                if block.stop < tokens:
                    clusters = self._furthest(clusters, heights_BKREN, block)
            out.append(_together(parts).view(*q_BKGND.shape[:3], -1, v.shape[-1]))
        result = torch.cat(out, dim=3).flatten(1, 2)
        return result if order_BN is None else _placed(result, order_BN.argsort(dim=1))

    def _along(self, x_BHND: Tensor) -> Tensor:
        """How far along each bucket's direction, BHNRE."""
        half_RDe = directions(self.seed, self.options.rounds, x_BHND.shape[-1], self.options.buckets // 2).to(x_BHND)
        along_BHNRe = torch.einsum("bhnd,rde->bhnre", x_BHND, half_RDe)
        return torch.cat([along_BHNRe, -along_BHNRe], dim=-1)

    def _furthest(self, clusters: Clusters | None, heights_BKREN: Tensor, block: slice) -> Clusters:
        """The clusters of these keys and of those before."""
        heights = heights_BKREN[..., block]
        keys = torch.arange(block.start, block.stop, device=heights.device).expand_as(heights)
        if clusters is not None:
            heights, keys = torch.cat([clusters.heights, heights], -1), torch.cat([clusters.keys, keys], -1)
        top = heights.topk(min(self.options.cluster_size, heights.shape[-1]), dim=-1)
        return Clusters(top.values, keys.gather(-1, top.indices))

    def _rounds(self, own: Block, hashes_BKRQ: Tensor, keys_BKREC: Tensor) -> Iterator[Part]:
        for number in range(self.options.rounds):
            chunks = _chunks(hashes_BKRQ[:, :, number], self.options.buckets)
            met = partial(_met_before, number, chunks, hashes_BKRQ, keys_BKREC, own.text.key.shape[2])
            yield own.part(chunks, _rows(keys_BKREC[:, :, number], chunks.buckets), 1 + number, met)


class Part(NamedTuple):
    """What some of the keys add to the queries of a block, before the sum of the weights divides it.

    Args:
        values: Sum of the values by weight, BKQD.
        total: Sum of the weights, BKQ1.
        level: Logarithm of what both were divided by, BKQ1; -inf where nothing was seen.
    """

    values: Tensor
    total: Tensor
    level: Tensor


class Clusters(NamedTuple):
    """The keys of every bucket.

    Args:
        heights: How far they lie along its direction, BKREC.
        keys: Which ones, BKREC.
    """

    heights: Tensor
    keys: Tensor


class Chunks(NamedTuple):
    """Queries side by side with others of their bucket.

    Args:
        queries: Which ones, BKTW; what the last chunk of a bucket has left over holds any.
        buckets: BKT.
        places: Of each query among T W, BKQ.
    """

    queries: Tensor
    buckets: Tensor
    places: Tensor


@dataclass(frozen=True)
class Text:
    """What is the same for all parts.

    Args:
        key: BKND.
        value: BKND, scaled for what dropout takes.
        mask: Of the tokens where they stood.
        order: Where each of them stood, BN; None where they stand.
        dropped: Of LEVELS weights.
        seed: Of dropout.
    """

    key: Tensor
    value: Tensor
    mask: LazyMask
    order: Tensor | None
    dropped: int
    seed: int

    def allowed(self, queries: Tensor, keys: Tensor, *, before: bool) -> Tensor | None:
        """What the mask says of tokens [B, ..., n] and [B, ..., m].

        Args:
            before: Whether all keys come before all queries; of padding the mask must be asked.
        """
        if self.order is None:
            return self.mask.pairs(queries, keys, below_diagonal=before)
        stood = (self.order.gather(1, tokens.flatten(1)).view_as(tokens) for tokens in (queries, keys))
        return self.mask.pairs(*stood, below_diagonal=False)

    def without_padding(self, heights_BKREN: Tensor) -> Tensor:
        """With padding below all: in a cluster where tokens do not fill it, and masked there."""
        if self.mask.padding_BM is None:
            return heights_BKREN
        real_BN = self.mask.padding_BM[:, : heights_BKREN.shape[-1]]
        real_BN = real_BN if self.order is None else real_BN.gather(1, self.order)
        return heights_BKREN.masked_fill(~real_BN[:, None, None, None], -torch.inf)

    def keep(self, number: int, like: Tensor) -> Tensor | None:
        """What dropout leaves of the weights of one part."""
        return keep_again(self.seed + number, self.dropped, like)


@dataclass(frozen=True)
class Block:
    """Queries that see the same clusters.

    Args:
        query: BKQD.
        tokens: Which ones, of the text's.
        first_part: Number of its first part; of each part dropout is drawn anew.
    """

    text: Text
    query: Tensor
    tokens: slice
    first_part: int

    def itself(self) -> Part:
        """What the block's own keys add."""
        (rows, heads, queries), device = self.query.shape[:3], self.query.device
        every = torch.arange(queries, device=device).expand(rows, heads, -1)
        keys = torch.arange(self.tokens.start, self.tokens.stop, device=device).expand(rows, heads, 1, -1)
        return self.part(Chunks(every[:, :, None], every[:, :, :1], every), keys, 0)

    def part(
        self, chunks: Chunks, keys_BKTC: Tensor, number: int, met: Callable[[], Tensor | None] | None = None
    ) -> Part:
        """What keys add, of which each chunk has its own.

        Args:
            number: Of the part, in this block; 0 is the block itself.
            met: Pairs that count in another part, BKTWC.
        """
        tokens_BKTW = self.tokens.start + chunks.queries % (self.tokens.stop - self.tokens.start)
        keys_before = number > 0 and self.tokens.start > 0

        def hide(scores: Tensor) -> None:
            if (allowed := self.text.allowed(tokens_BKTW, keys_BKTC, before=keys_before)) is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            if met is not None and (elsewhere := met()) is not None:
                scores.masked_fill_(elsewhere, -torch.inf)

        table = Table(chunks, keys_BKTC, hide, partial(self.text.keep, self.first_part + number))
        return Part(*_Attend.apply(self.query, self.text.key, self.text.value, table))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Table:
    """The weights of a part: both passes make it alike.

    Args:
        keys: Which ones, BKTC.
        hide: Masks scores BKTWC in place.
        keep: What dropout leaves of weights BKTWC; None without dropout.
    """

    chunks: Chunks
    keys: Tensor
    hide: Callable[[Tensor], None]
    keep: Callable[[Tensor], Tensor | None]

    def gather(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """BKTWD, BKTCD and BKTCD."""
        return _rows(query, self.chunks.queries), _rows(key, self.keys), _rows(value, self.keys)

    def weights(self, q_BKTWD: Tensor, k_BKTCD: Tensor, level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Not yet divided by their sum, and the highest scores, BKTW1, unless they are known."""
        scores = q_BKTWD @ k_BKTCD.mT
        self.hide(scores)
        level = scores.amax(-1, keepdim=True) if level is None else level
        return scores.sub_(level.masked_fill(level == -torch.inf, 0.0)).exp_(), level

    def place(self, x_BKTWD: Tensor) -> Tensor:
        """BKQD: each query back from its chunk."""
        return _rows(x_BKTWD.flatten(2, 3), self.chunks.places)

    def chunk(self, x_BKQD: Tensor) -> Tensor:
        """BKTWD: each query in its chunk, and zeros in what is left over."""
        held = *self.chunks.queries.shape, x_BKQD.shape[-1]
        return _sum_rows(x_BKQD, self.chunks.places, held[2] * held[3]).view(held)


class _Attend(torch.autograd.Function):
    """A part. A large table is made again in the backward pass, or those of all parts would be kept till then."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, table: Table) -> tuple[Tensor, ...]:
        q, k, v = table.gather(query, key, value)
        weights, level = table.weights(q, k)
        total = weights.sum(-1, keepdim=True)
        keep = table.keep(weights)
        values = (weights if keep is None else weights * keep) @ v
        part = tuple(table.place(x) for x in (values, total, level))
        ctx.save_for_backward(query, key, value, level, weights if weights.numel() <= KEPT else None)
        ctx.table = table
        ctx.mark_non_differentiable(part[2])
        return part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, level, kept = ctx.saved_tensors
        table: Table = ctx.table
        q, k, v = table.gather(query, key, value)
        weights = table.weights(q, k, level)[0] if kept is None else kept
        keep = table.keep(weights)
        dvalues, dtotal = table.chunk(dvalues), table.chunk(dtotal)
        dv = _sum_rows((weights if keep is None else weights * keep).mT @ dvalues, table.keys, value.shape[2])
        dweights = dvalues @ v.mT
        if keep is not None:
            dweights.mul_(keep)
        dscores = dweights.add_(dtotal).mul_(weights)
        dk = _sum_rows(dscores.mT @ q, table.keys, key.shape[2])
        return _sum_rows(dscores @ k, table.chunks.queries, query.shape[2]), dk, dv, None


def _together(parts: Sequence[Part]) -> Tensor:
    """Attention over the keys of all parts, BKQD; zeros where nothing was seen."""
    level = torch.stack([part.level for part in parts]).amax(0)
    level = level.masked_fill(level == -torch.inf, 0.0)
    factors = [(part.level - level).exp() for part in parts]
    total = sum((factor * part.total for factor, part in zip(factors, parts, strict=True)), torch.zeros_like(level))
    values = sum((f * part.values for f, part in zip(factors, parts, strict=True)), torch.zeros_like(parts[0].values))
    return values / total.masked_fill(total == 0, 1.0)


def _chunks(hashes_BKQ: Tensor, buckets: int) -> Chunks:
    (rows, heads, queries), device = hashes_BKQ.shape, hashes_BKQ.device
    width = min(WIDEST, max(NARROWEST, queries // buckets))
    sorted_BKQ, order_BKQ = hashes_BKQ.sort(dim=-1, stable=True)
    bounds = torch.arange(buckets + 1, device=device).expand(rows, heads, -1).contiguous()
    starts_BKE1 = torch.searchsorted(sorted_BKQ, bounds)
    needed_BKE = (starts_BKE1.diff(dim=-1) + width - 1) // width
    ends_BKE = needed_BKE.cumsum(-1)
    chunks = int(ends_BKE[..., -1].max())
    within_BKQ = torch.arange(queries, device=device) - starts_BKE1.gather(2, sorted_BKQ)
    places_BKQ = (ends_BKE - needed_BKE).gather(2, sorted_BKQ) * width + within_BKQ
    held = hashes_BKQ.new_zeros(rows, heads, chunks * width).scatter_(2, places_BKQ, order_BKQ)
    numbers = torch.arange(chunks, device=device).expand(rows, heads, -1).contiguous()
    return Chunks(
        held.view(rows, heads, chunks, width),
        torch.searchsorted(ends_BKE, numbers, right=True).clamp(max=buckets - 1),  # of rows with fewer chunks
        torch.empty_like(order_BKQ).scatter_(2, order_BKQ, places_BKQ),
    )


def _met_before(number: int, chunks: Chunks, hashes_BKRQ: Tensor, keys_BKREC: Tensor, tokens: int) -> Tensor | None:
    """Whether the queries of the chunks and the keys of their bucket met in an earlier round, BKTWC."""
    (rows, heads, _, buckets, _), met = keys_BKREC.shape, None
    own_BKEC = keys_BKREC[:, :, number]
    for earlier in range(number):
        held_BKEN = own_BKEC.new_zeros(rows, heads, buckets, tokens, dtype=torch.bool)
        held_BKEN.scatter_(3, keys_BKREC[:, :, earlier], True)
        # Which keys of a bucket lie in one of the earlier round: by both of their numbers.
        in_both = held_BKEN.gather(3, own_BKEC.flatten(2)[:, :, None].expand(-1, -1, buckets, -1))
        in_both = in_both.view(rows, heads, buckets * buckets, -1)
        hashes_BKTW = hashes_BKRQ[:, :, earlier].gather(2, chunks.queries.flatten(2)).view_as(chunks.queries)
        found = _rows(in_both, hashes_BKTW * buckets + chunks.buckets[..., None])
        met = found if met is None else met | found
    return met


def _rows(x_BKMD: Tensor, index: Tensor) -> Tensor:
    """[B, K, ..., D] by index [B, K, ...] of M."""
    return x_BKMD.flatten(0, 2).index_select(0, _flat(index, x_BKMD.shape[2])).view(*index.shape, -1)


def _sum_rows(x: Tensor, index: Tensor, length: int) -> Tensor:
    """BKMD, M of length: the sums of what [B, K, ..., D] has for each index [B, K, ...] of M."""
    (rows, heads), width = index.shape[:2], x.shape[-1]
    total = x.new_zeros(rows * heads * length, width)
    total.scatter_add_(0, _flat(index, length)[:, None].expand(-1, width), x.reshape(-1, width))
    return total.view(rows, heads, length, width)


def _flat(index: Tensor, length: int) -> Tensor:
    """Of all rows and heads in a row, B K length."""
    rows, heads = index.shape[:2]
    first = torch.arange(rows * heads, device=index.device) * length
    return (index.flatten(2) + first.view(rows, heads, 1)).flatten()


def _real_first(mask: LazyMask, tokens: int) -> Tensor | None:
    """The tokens in their order, padding last, BN; None where they stand so."""
    if mask.padding_BM is None:
        return None
    order_BN = (~mask.padding_BM[:, :tokens]).long().argsort(dim=1, stable=True)
    stands = torch.arange(tokens, device=order_BN.device)
    return None if bool((order_BN == stands).all()) else order_BN


def _placed(x_BHND: Tensor, order_BN: Tensor | None) -> Tensor:
    return x_BHND if order_BN is None else x_BHND.gather(2, order_BN[:, None, :, None].expand_as(x_BHND))


def directions(seed: tuple[int, ...], rounds: int, width: int, count: int) -> Tensor:
    """Of length 1, [rounds, width, count], in fp64: the same in every process and every run."""
    return torch.from_numpy(_drawn(seed, rounds, width, count))


@cache
def _drawn(seed: tuple[int, ...], rounds: int, width: int, count: int) -> np.ndarray[Any, Any]:
    drawn: np.ndarray[Any, Any] = np.random.default_rng(seed).standard_normal((rounds, width, count))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def make(options: LshOptions, site: Site) -> Lsh:
    """For self-attention; each layer has directions of its own."""
    return Lsh(options, (options.seed, site.layer), causal=site.role == "decoder.self")
