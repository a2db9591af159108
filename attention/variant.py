"""What an attention variant is, to those who plug it in.

A variant is made for one site by ``make(options, site)``, and is a child module of the attention module there: what it
learns is saved, moved and trained with the model.

Shapes: B rows, H query heads, K key/value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from attention.masks import LazyMask
from attention.options import Role
from attention.scoring import Scoring


@dataclass(frozen=True)
class Call:
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
        call: What it asks for.
    """

    path: str
    role: Role
    layer: int
    module: nn.Module
    call: Call

    def __str__(self) -> str:
        return f"{self.role}[{self.layer}]"


class Variant(Protocol):
    """An ``nn.Module``."""

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
