"""Context parallelism: processes that hold one text together, and which part of it each holds (Liu et al., arXiv
2310.01889).

The text is cut into twice as many pieces as there are processes, and each holds one from the front and its mirror image
from the back: where tokens look back only, all then have equal work (Llama 3, arXiv 2407.21783, section 3.3.2; Striped
Attention, arXiv 2311.09431, deals out single tokens to the same end).

Shapes: B rows, N tokens of the text, n of them with one process, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ring:
    """Processes, each with a neighbour to whom it hands on what it had from the other.

    Args:
        held: Numbers of the pieces of a text that each process holds, of all equally many.
        rank: Which of the processes this is.
        group: None where it is alone.
    """

    held: tuple[tuple[int, ...], ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many processes."""
        return len(self.held)

    def around(self, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Each process's tensors of these shapes in turn, this one's first, with the number of the process.

        The next ones travel while these are worked on. All processes must go round together.
        """
        for hop in range(self.size):
            arrived = self._hand_on(tensors, tag=0) if hop + 1 < self.size else None
            yield (self.rank - hop) % self.size, tensors
            if arrived is not None:
                tensors = arrived()

    def pass_on(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the process before this one hands on, while these go to the one after it."""
        return self._hand_on(tensors, tag=len(tensors))() if self.size > 1 else tensors

    def _hand_on(self, tensors: tuple[Tensor, ...], *, tag: int) -> Callable[[], tuple[Tensor, ...]]:
        leaving = tuple(x.contiguous() for x in tensors)
        arriving, ends = tuple(torch.empty_like(x) for x in leaving), (self.rank + 1, self.rank - 1)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(call, x, group=self.group, tag=tag + number, group_peer=end % self.size)
                for call, end, ours in zip((dist.isend, dist.irecv), ends, (leaving, arriving), strict=True)
                for number, x in enumerate(ours)
            ]
        )

        def arrived() -> tuple[Tensor, ...]:
            for work in works:
                work.wait()
            return arriving

        return arrived


def zigzag(processes: int) -> tuple[tuple[int, int], ...]:
    """The pieces that each of so many processes holds."""
    return tuple((first, 2 * processes - 1 - first) for first in range(processes))


@dataclass(frozen=True)
class Shards:
    """Where the tokens of one text lie. The last token fills up what is short: it is seen by none, and left out again.

    Args:
        length: N.
    """

    ring: Ring
    length: int

    @property
    def tokens(self) -> int:
        """With each process, n."""
        return self._piece * len(self.ring.held[0])

    def pieces(self, rank: int) -> list[tuple[slice, slice]]:
        """What a process holds: where in its own tokens, and where in the text; without what only fills up."""
        starts = [number * self._piece for number in self.ring.held[rank]]
        sizes = [min(self._piece, self.length - start) for start in starts]
        return [
            (slice(place * self._piece, place * self._piece + size), slice(start, start + size))
            for place, (start, size) in enumerate(zip(starts, sizes, strict=True))
            if size > 0
        ]

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """Of what goes by the tokens of the text along ``dim``, that of this process's."""
        first = torch.tensor(self.ring.held[self.ring.rank], device=whole.device) * self._piece
        places = (first[:, None] + torch.arange(self._piece, device=whole.device)).flatten()
        return whole.index_select(dim, places.clamp_(max=self.length - 1))

    def whole(self, own_BnD: Tensor) -> Tensor:
        """Those of all processes as one text, BND; the gradients of all come back to each."""
        return cast(Tensor, _Gather.apply(own_BnD, self))  # type: ignore[no-untyped-call]

    @property
    def _piece(self) -> int:
        return -(-self.length // (self.ring.size * len(self.ring.held[0])))


class _Gather(torch.autograd.Function):
    """The text of the processes' tokens. Each makes its own gradient of all, and they are summed."""

    @staticmethod
    def forward(ctx: Any, own_BnD: Tensor, shards: Shards) -> Tensor:
        ctx.shards, ring = shards, shards.ring
        parts = own_BnD.contiguous()[None]
        if ring.size > 1:
            parts = parts.new_empty(ring.size, *own_BnD.shape)
            dist.all_gather(list(parts), own_BnD.contiguous(), group=ring.group)
        whole = own_BnD.new_empty(len(own_BnD), shards.length, own_BnD.shape[2])
        for rank, part in enumerate(parts):
            for own, there in shards.pieces(rank):
                whole[:, there] = part[:, own]
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shards: Shards = ctx.shards
        ring = shards.ring
        parts = grad.new_zeros(ring.size, len(grad), shards.tokens, grad.shape[2])
        for rank, part in enumerate(parts):
            for own, there in shards.pieces(rank):
                part[:, own] = grad[:, there]
        if ring.size == 1:
            return parts[0], None
        own_grad = torch.empty_like(parts[0])
        dist.reduce_scatter(own_grad, list(parts), group=ring.group)
        return own_grad, None


@dataclass
class Stretch:
    """The part of a model in which a text is shared out.

    Args:
        shards: Of the text that is in it; None while it is whole, as in eval mode.
    """

    ring: Ring
    shards: Shards | None = None
