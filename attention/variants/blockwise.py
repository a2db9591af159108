"""Full attention one tile at a time (Rabe and Staats, arXiv 2112.05682; Liu and Abbeel, arXiv 2305.19370).

With dropout on the weights, as BERT, GPT-2, T5 and BART are trained, torch's kernel for the CPU falls back to the whole
table of N x M; this does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from attention.engine import Visit, ranges
from attention.options import BlockwiseOptions
from attention.pattern import Extent
from attention.tiled import Tiled
from attention.variant import Site


@dataclass(frozen=True)
class Everything:
    """Every pair counts."""

    sdpa_below: int = 1024
    is_full: ClassVar[bool] = True
    counts: bool = False

    def rule(self, length: int, device: torch.device) -> None:
        """All."""

    def visits(self, extent: Extent) -> list[Visit]:
        """Squares, up to the diagonal where later keys are not seen."""
        return [
            Visit(queries, (keys,))
            for queries in ranges(extent.queries, extent.tile)
            for keys in ranges(extent.last_seen(queries), extent.tile)
        ]


def make(options: BlockwiseOptions, site: Site) -> Tiled:
    """For any site."""
    return Tiled(Everything())
