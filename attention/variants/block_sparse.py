"""Blocks of tokens that see some blocks: neighbours, the first ones, and a few at random (Zaheer et al., arXiv
2007.14062, section 2 and appendix D: BigBird-ITC).

Which blocks a block sees at random follows from its number, not from the length of the text: so a row is the same
whatever it is padded to, and a token decoded with a cache sees what it would see without. Of ``horizon`` blocks some
are drawn, and those beyond the end of a text, or ahead of a causal query, fall away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attention.engine import Sees, Visit, ranges
from attention.options import BlockSparseOptions
from attention.pattern import Extent
from attention.pieces import merged
from attention.tiled import Tiled
from attention.variant import Site

LONGEST = 4096
"""Tokens among whose blocks is drawn, or fewer where a model can not read as many."""


@dataclass(frozen=True)
class Blocks:
    """Pairs of tokens whose blocks see each other.

    Args:
        size: Tokens in a block.
        around: Blocks seen to each side.
        first: Blocks at the start that see all and are seen by all.
        random: Blocks drawn for each block.
        horizon: Blocks among which is drawn.
        seed: With the block's number, decides.
    """

    size: int
    around: int
    first: int
    random: int
    horizon: int
    seed: tuple[int, ...]
    sdpa_below: int = 1024
    is_full: ClassVar[bool] = False
    counts: bool = True

    def rule(self, length: int, device: torch.device) -> Sees:
        """By the blocks of the two, and what is drawn for each."""
        blocks = range(-(-length // self.size))
        drawn_by_block = [n for block in blocks for n in drawn(self.seed, block, self.horizon, self.random)]
        table = torch.tensor(drawn_by_block, dtype=torch.int64, device=device)

        def sees(queries: Tensor, keys: Tensor) -> Tensor:
            q, k = queries // self.size, keys // self.size
            seen = ((q - k).abs() <= self.around) | (q < self.first) | (k < self.first)
            for number in range(self.random):
                seen = seen | (k == table[q * self.random + number])
            return seen

        return sees

    def visits(self, extent: Extent) -> list[Visit]:
        """A block of queries with all blocks that it sees."""
        first, last = extent.offset // self.size, (extent.offset + extent.queries - 1) // self.size
        return [visit for block in range(first, last + 1) for visit in self._of(block, extent)]

    def _of(self, block: int, extent: Extent) -> Iterator[Visit]:
        start = max(0, block * self.size - extent.offset)
        queries = slice(start, min(extent.queries, (block + 1) * self.size - extent.offset))
        end = extent.last_seen(queries)
        if block < self.first:
            yield from (Visit(queries, (keys,)) for keys in ranges(end, extent.tile))
            return
        near = range(max(0, block - self.around), min(block + self.around, (end - 1) // self.size) + 1)
        blocks = {*near, *range(self.first), *drawn(self.seed, block, self.horizon, self.random)}
        yield Visit(queries, merged(slice(b * self.size, min(end, (b + 1) * self.size)) for b in blocks))


@cache
def drawn(seed: tuple[int, ...], block: int, horizon: int, count: int) -> tuple[int, ...]:
    """The blocks that this one sees at random, ``count`` of ``horizon``."""
    return tuple(np.random.default_rng([*seed, block]).choice(horizon, size=count, replace=False).tolist())


def make(options: BlockSparseOptions, site: Site) -> Tiled:
    """For self-attention; each layer draws blocks of its own."""
    longest = site.positions or LONGEST
    blocks = Blocks(
        size=options.block_size,
        around=options.window_blocks // 2,
        first=options.global_blocks,
        random=options.random_blocks,
        horizon=max(options.random_blocks, -(-min(longest, LONGEST) // options.block_size)),
        seed=(options.seed, site.layer),
    )
    return Tiled(blocks)
