"""WITH WHICH attention: the variants, the engine under most of them, and the one file that plugs them in.

This file imports no torch, so that the configuration can be checked in no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from attention.options import ROLES, Plan, Role

if TYPE_CHECKING:
    from attention.variant import Variant

AROUND: tuple[Role, ...] = ("encoder.self", "decoder.self")
"""For variants that look around a token: in cross-attention no key stands beside it."""


@dataclass(frozen=True)
class VariantEntry:
    """One line of the table. What a variant can do is data, looked at before it goes in.

    Args:
        path: The function that makes it, ``(options, site) -> Variant``.
        roles: Sites that it is for.
        exact: Whether it gives what full attention gives.
        bias: Whether it honours what a model adds to its scores, as T5 does.
        softcap: Whether it honours a cap on the scores, as Gemma 2 has one.
        rules: Whether it honours a mask of more than padding.
        positional: Whether what it learns is made for the model's positions, and goes with no other number of them.
        context_parallel: Whether processes hold a text together, so that it must be at all self-attention of a stack.
    """

    path: str
    roles: tuple[Role, ...] = ROLES
    exact: bool = False
    bias: bool = True
    softcap: bool = True
    rules: bool = True
    positional: bool = False
    context_parallel: bool = False

    def load(self) -> Callable[..., Variant]:
        """Import what makes the variant (and with it torch)."""
        module, function = self.path.split(":")
        return getattr(import_module(module), function)  # type: ignore[no-any-return]


VARIANTS: dict[str, VariantEntry] = {
    "full": VariantEntry("attention.variants.full:make", exact=True),
    "blockwise": VariantEntry("attention.variants.blockwise:make", exact=True),
    "sliding_window": VariantEntry("attention.variants.sliding_window:make", AROUND),
    "local_global": VariantEntry("attention.variants.local_global:make", AROUND),
    "block_sparse": VariantEntry("attention.variants.block_sparse:make", AROUND),
    "strided": VariantEntry("attention.variants.strided:make", AROUND),
    "linformer": VariantEntry(
        "attention.variants.linformer:make", ("encoder.self",), bias=False, softcap=False, rules=False, positional=True
    ),
    "additive": VariantEntry("attention.variants.additive:make", bias=False, softcap=False),
    "adaptive_span": VariantEntry("attention.variants.adaptive_span:make", AROUND),
    "lsh": VariantEntry("attention.variants.lsh:make", AROUND, bias=False, softcap=False),
    "grouped_query": VariantEntry("attention.variants.grouped_query:make"),
    "ring": VariantEntry("attention.variants.ring:make", AROUND, exact=True, context_parallel=True),
}
"""Settings of each are in ``attention.options``."""


def is_exact(plan: Plan) -> bool:
    """Whether a model with this plan gives what it gives with full attention."""
    return all(VARIANTS[options.variant].exact for options in plan.root.values())
