"""Full attention over a text that several processes hold together (Liu et al., arXiv 2310.01889).

Queries stay; keys and values go round the ring, and each process lets those that arrive into the softmax of its own
queries. In the backward pass they go round again, and what they are owed travels with them until it is home. Where the
text is whole (in eval mode, in one process, while decoding) it is blockwise attention.

Shapes: B rows, H query heads, K key/value heads, N tokens of the text, n of them in this process, M keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast

from torch import Tensor, nn

from attention.bias import bias_between
from attention.engine import KeyBlock, Tiles, attend_to_stream, dropping
from attention.masks import LazyMask
from attention.options import RingOptions
from attention.pattern import Extent, tile_side
from attention.ring import Shards, Stretch
from attention.scoring import Scoring
from attention.tiled import Tiled
from attention.variant import Site, Work
from attention.variants.blockwise import Everything


class RingAttention(nn.Module):
    """Exact attention, wherever the text lies.

    Args:
        ring_size: Processes that hold a text together; None is all.
    """

    def __init__(self, ring_size: int | None) -> None:
        super().__init__()
        self.ring_size = ring_size
        self.stretch: Stretch | None = None
        self.alone = Tiled(Everything())

    @property
    def text_length(self) -> int | None:
        """N, while this process holds a part of the text."""
        return self.stretch.shards.length if self.stretch is not None and self.stretch.shards is not None else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHND of BHND, BKMD and BKMD; see ``attention.variant.Variant``.

        Raises:
            ValueError: The text is shared out, and the call is of more than the text, as with a cache.
        """
        if self.stretch is None or self.stretch.shards is None:
            return cast(Tensor, self.alone(query, key, value, mask, scoring))
        return ring_attention(query, key, value, mask, scoring, self.stretch.shards)

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """BHNM, of a whole text; see ``attention.variant.Variant``."""
        return self.alone.weights(query, key, mask, scoring)

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """Of all processes together; see ``attention.variant.Variant``."""
        return self.alone.work(length, heads, causal=causal)

    def extra_repr(self) -> str:
        """The setting."""
        return f"ring_size={self.ring_size}"


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring, shards: Shards
) -> Tensor:
    """Attend; all processes of the ring together.

    Args:
        query: BHnD, of the tokens that this process holds.
        key: BKnD.
        value: BKnD.
        mask: Of the whole text.
        scoring: Its bias is of the whole text, its dropout each process's own.

    Returns:
        BHnD. A query that sees nothing gets zeros.

    Raises:
        ValueError: Mask or bias are of another text, or there are more keys than the text has.
    """
    length, tokens = shards.length, (shards.tokens, shards.tokens)
    if (query.shape[2], key.shape[2]) != tokens or mask.shape[2:] != (length, length):
        raise ValueError(
            f"{key.shape[2]} keys, {mask.shape[3]} in the mask, of {tokens[0]}/{length}: ring has no cache"
        )
    bias = scoring.bias
    if bias is not None and (bias.shape[1] + 1 != 2 * length if bias.ndim == 2 else bias.shape[2:] != (length, length)):
        raise ValueError(f"a bias of the shape {tuple(bias.shape)} in a ring, for a text of {length} tokens")
    dropped, seed = dropping(scoring)
    stream = _Ring(shards, mask, dropped, scoring.softcap, seed, tile_side(query[:, :, 0, 0].numel()))
    return attend_to_stream(query, key, value, scoring, stream)


@dataclass(frozen=True)
class _Ring:
    """Once round the ring; fields as of ``attention.engine.Tiles``, and the side of a tile."""

    shards: Shards
    mask: LazyMask
    dropped: int
    softcap: float | None
    seed: int
    tile: int

    def blocks(self, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor, Iterable[KeyBlock]]]:
        """The keys and values of each process."""
        for source, (key_then, value_then) in self.shards.ring.around(key, value):
            yield key_then, value_then, self._blocks_of(source)

    def pass_on_grads(self, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor, ...]:
        """What keys and values are owed goes with them."""
        return self.shards.ring.pass_on(dkey, dvalue)

    def _blocks_of(self, source: int) -> Iterator[KeyBlock]:
        """Which pieces see which, of the keys of one process."""
        ring, pattern = self.shards.ring, Everything()
        pairs = list(product(self.shards.pieces(ring.rank), self.shards.pieces(source)))
        for number, ((own, queries), (theirs, keys)) in enumerate(pairs):
            sizes = queries.stop - queries.start, keys.stop - keys.start
            visits = pattern.visits(Extent(*sizes, queries.start - keys.start, self.mask.causal, self.tile))
            if visits:
                # Far from the seeds of other pieces' visits; of a seed the generator takes no more than 32 bits.
                seed = self.seed + ((source * len(ring.held[0]) ** 2 + number) << 20)
                tiles = Tiles(self.mask.part(queries, keys), tuple(visits), self.dropped, self.softcap, seed)
                bias = partial(bias_between, queries=queries, keys=keys, all_queries=self.shards.length)
                yield KeyBlock(own, theirs, tiles, bias)


def make(options: RingOptions, site: Site) -> RingAttention:
    """For self-attention. ``attention.sharing.connect`` makes the ring."""
    return RingAttention(options.ring_size)
