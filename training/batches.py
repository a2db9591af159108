"""Which examples make the k-th update, and how that update is shared out.

The global batch comes first: its examples are a function of the seed and the epoch alone. Only then is it split over
ranks, and within a rank into micro-batches of like lengths. So the k-th update sees the same examples on one process
or on many, whatever the micro-batches. See ADR 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from tasks.protocol import Batch

Indices = NDArray[np.int64]

LARGEST_GROUP = 50
"""``group_by_length`` sorts within at least four groups, drawn at random, of this many batches or fewer."""

LARGEST_MICRO_BATCH = 256
"""Where the user sets no limit: bounds memory, and the time to plan an epoch."""


@dataclass(frozen=True)
class Batching:
    """How features become updates.

    Args:
        batch_size: Examples per update, over all ranks.
        seed: With the epoch, decides the order.
        strategy: ``random``, ``group_by_length`` or ``sequential``.
        micro_batch_size: Most examples in one forward pass; None leaves it to the lengths.
        micro_batch_tokens: Most padded tokens in one forward pass, a single longer example aside; bounds memory.
        accumulation: Forward passes per rank and update; None leaves it to the lengths.
        overhead: What one more forward and backward pass costs, in tokens; weighs padding against passes.
        num_workers: Processes that collate ahead; 0 collates in this one.
    """

    batch_size: int
    seed: int
    strategy: str = "random"
    micro_batch_size: int | None = None
    micro_batch_tokens: int = 2**16
    accumulation: int | None = None
    overhead: float = 128.0
    num_workers: int = 0

    def steps_per_epoch(self, num_examples: int) -> int:
        """Updates in one epoch; the last one may be smaller, and is exact all the same."""
        return ceil(num_examples / self.batch_size)


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins; a checkpoint keeps it, so that a stream can be read on from there.

    Args:
        number: Blocks before this one; with the seed it decides the order, and what is drawn anew for each example.
        first_step: Updates before this block.
        row: Rows before it in this pass over the data.
        passes: Passes before this one.
    """

    number: int = 0
    first_step: int = 0
    row: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Block:
    """Features that are shuffled together: those of an epoch, or of a stretch of a stream.

    Args:
        features: Encoded rows (``datasets.Dataset`` with a column ``length``).
        epoch_share: The part of an epoch that this block is; 0 of a stream, whose end is not known.
    """

    start: BlockStart
    features: Any
    epoch_share: float = 1.0

    def epochs_done(self, share: float) -> float:
        """Epochs done when this share of the block is; of a stream, whole passes."""
        return self.start.passes + self.epoch_share * share


def epochs(features: Any, batching: Batching, *, step: int) -> Iterator[Block]:
    """The epoch that holds update ``step``, and those after it, without end."""
    per_epoch = batching.steps_per_epoch(len(features))
    return (Block(BlockStart(n, n * per_epoch, passes=n), features) for n in count(step // per_epoch))


def epoch_batches(lengths: Indices, batching: Batching, *, epoch: int) -> list[Indices]:
    """The global batches of one epoch: every example exactly once.

    ``group_by_length`` is the order of transformers' ``LengthGroupedSampler``: from long to short within each group,
    the longest example of all first, so that what memory can not hold fails at the first update.
    """
    rng = np.random.default_rng([batching.seed, epoch])
    size, num_examples = batching.batch_size, len(lengths)
    if batching.strategy == "sequential":
        return _chunks(np.arange(num_examples), size)
    order = rng.permutation(num_examples)
    if batching.strategy == "random":
        return _chunks(order, size)
    group_size = size * max(1, min(num_examples // (4 * size), LARGEST_GROUP))
    groups = [group[np.argsort(-lengths[group], kind="stable")] for group in _chunks(order, group_size)]
    longest = int(np.argmax([lengths[group[0]] for group in groups]))
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return [batch for group in groups for batch in _chunks(group, size)]


def rank_share(batch: Indices, lengths: Indices, *, rank: int, world_size: int) -> Indices:
    """This rank's examples of a global batch, longest first: dealt like cards, so that all ranks have equal work."""
    by_length = batch[np.argsort(-lengths[batch], kind="stable")]
    return by_length[rank::world_size]


def micro_batches(share: Indices, lengths: Indices, batching: Batching) -> list[Indices]:
    """Split a rank's share, sorted by length, into runs that are padded alike."""
    if batching.accumulation is not None:
        return [part for part in np.array_split(share, batching.accumulation) if len(part)]
    return _cheapest_split(
        share,
        lengths[share],
        most_examples=batching.micro_batch_size or LARGEST_MICRO_BATCH,
        most_tokens=batching.micro_batch_tokens,
        overhead=batching.overhead,
    )


def _chunks(order: Indices, size: int) -> list[Indices]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _cheapest_split(
    share: Indices, lengths: Indices, *, most_examples: int, most_tokens: int, overhead: float
) -> list[Indices]:
    """Minimize padded tokens + overhead x passes, by dynamic programming over the sorted share.

    Args:
        most_examples: In one pass.
        most_tokens: In one pass, padding included; a single example may be longer.
    """
    cost, start = [0.0], [0]
    for end in range(1, len(share) + 1):
        sizes = ((s, (end - s) * int(lengths[s])) for s in range(max(0, end - most_examples), end))
        best = min((cost[s] + size + overhead, s) for s, size in sizes if size <= most_tokens or s == end - 1)
        cost.append(best[0])
        start.append(best[1])
    parts, end = [], len(share)
    while end:
        parts.append(share[start[end] : end])
        end = start[end]
    return parts[::-1]


class EpochSteps(Dataset[list[Batch]]):
    """Item k: the micro-batches of this rank's share of update k. Empty where the batch has fewer examples than ranks.

    Args:
        features: Encoded rows; indexable by a list of indices into columns (``datasets.Dataset``).
        collate: The task's.
        plan: For each update the micro-batches' indices.
        draw: Seed and epoch, given to each example as ``draw``: what a task draws anew in each epoch follows from it.
    """

    def __init__(
        self,
        features: Any,
        collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
        plan: list[list[Indices]],
        *,
        draw: tuple[int, int],
    ) -> None:
        self._features, self._collate, self._plan, self._draw = features, collate, plan, draw

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> list[Batch]:
        drawn = {"draw": self._draw}
        return [self._collate([e | drawn for e in examples(self._features, part)]) for part in self._plan[step]]


def examples(features: Any, indices: Indices) -> list[dict[str, Any]]:
    """Features as a list of dicts, read from their columns at once."""
    columns: dict[str, list[Any]] = features[indices.tolist()]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def epoch_loader(steps: EpochSteps, *, start: int, num_workers: int = 0) -> DataLoader[list[Batch]]:
    """Updates ``start``, ``start + 1``, ... of an epoch.

    The position is the sampler's range, so resuming needs no skipping; the private generator keeps the loader from
    drawing on the global one (see ADR 3).
    """
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        num_workers=num_workers,
        generator=Generator(),
    )
