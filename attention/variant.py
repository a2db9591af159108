"""What an attention variant is, to those who plug it in.

A variant is made for one site by ``make(options, site)``, and is a child module of the attention module there: what it
learns is saved, moved and trained with the model.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from attention.masks import LazyMask
from attention.options import Role
from attention.scoring import Scoring
from heedful import UserError


@dataclass(frozen=True)
class Needs:
    """What an attention module asks for, seen in the run that finds it.

    Args:
        heads: H.
        key_heads: K.
        width: D.
        bias: Whether something is added to its scores.
        softcap: Whether they are capped.
        rules: Whether more than padding is masked.
    """

    heads: int
    key_heads: int
    width: int
    bias: bool = False
    softcap: bool = False
    rules: bool = False


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    Args:
        path: Its name in ``named_modules``.
        role: What looks at what.
        layer: Number among the model's sites of this role, in the order in which they run.
        module: The attention module itself.
        needs: What it asks for.
    """

    path: str
    role: Role
    layer: int
    module: nn.Module
    needs: Needs

    def __str__(self) -> str:
        return f"{self.role}[{self.layer}]"

    @property
    def positions(self) -> int | None:
        """As many as the model has; None of one that does not say, as T5."""
        return getattr(getattr(self.module, "config", None), "max_position_embeddings", None)

    @property
    def stack(self) -> str:
        """Name of the list of blocks that it stands in; empty if in none."""
        return stack_of(self.path)


def stack_of(path: str) -> str:
    """Name of the outermost numbered list that a module stands in; empty if in none."""
    names = path.split(".")
    numbers = [place for place, name in enumerate(names) if name.isdecimal()]
    return ".".join(names[: numbers[0]]) if numbers else ""


@dataclass(frozen=True)
class Work:
    """Pairs of a query and a key, of one head over one text.

    Args:
        scored: Whose score is computed.
        seen: That count.
        unit: What was counted, where it is something else.
    """

    scored: int
    seen: int
    unit: str = ""


def all_pairs(length: int, *, causal: bool) -> int:
    """Those of full attention over as many queries as keys."""
    return length * (length + 1) // 2 if causal else length**2


class Variant(Protocol):
    """An ``nn.Module``. One with an end has ``longest``, the most keys that it takes."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """Attend.

        Args:
            query: BHND.
            key: BKMD; head h reads from h // (H / K).
            value: BKMD.
            mask: What the model itself allows.

        Returns:
            BHND.
        """
        ...

    def weights(self, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
        """What each query takes of each key's value in eval mode, BHNM, none below 0: times the values, the output.

        For pictures, of short texts. A variant that has no such table leaves the method out.
        """
        ...

    def work(self, length: int, heads: int, *, causal: bool) -> Work:
        """What a text of that length costs, in pairs; a variant that can not say leaves the method out."""
        ...

    def is_full(self, length: int, *, causal: bool) -> bool:
        """Whether texts of up to that length are attended to as in full attention; a variant for which they never are
        leaves the method out."""
        ...


def refuse_longer(variant: nn.Module, length: int) -> None:
    """Refuse a text beyond what a variant is made for.

    Raises:
        UserError: Naming the variant and its end.
    """
    if length > (longest := getattr(variant, "longest", length)):
        raise UserError(
            f"{length:,} tokens for {type(variant).__name__.lower()} attention",
            where="attention",
            expected=f"at most {longest:,}",
            fix="a lower model.max_length, or another attention",
        )


def read_weights(variant: nn.Module, query: Tensor, key: Tensor, mask: LazyMask, scoring: Scoring) -> Tensor:
    """BHNM: what comes out of a variant where each value stands for its own key."""
    own = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
    out: Tensor = variant(query, key, own.expand(*key.shape[:2], -1, -1), mask, scoring)
    return out
