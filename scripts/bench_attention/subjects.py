"""Variants by themselves, outside of any model, as the measurements of time and exactness take them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from attention import VARIANTS
from attention.masks import LazyMask
from attention.options import Plan
from attention.variant import Needs, Site, Variant

FOLDER = Path("docs/attention")
Write = Annotated[Path | None, typer.Option(help="A folder for the tables, such as docs/attention.")]
HEADS, WIDTH, LONGEST = 4, 64, 2**14
SETTINGS: dict[str, dict[str, Any]] = {
    "sliding_window": {"reach": 256},
    "local_global": {"reach": 256},
    "linformer": {"k": 256},
    "adaptive_span": {"max_span": 224},
    "grouped_query": {"kv_heads": 2},
}
"""What is measured where it is not the default."""


def some_of(names: Iterable[str]) -> Any:
    """An option that takes some of these, or all when it is left out."""
    known = list(names)

    def check(given: list[str] | None) -> list[str] | None:
        if unknown := [name for name in given or () if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r}, which is none of: {'; '.join(known)}")
        return given

    return typer.Option(help="Some of them; all without.", callback=check)


def settings_of(name: str) -> str:
    """As a table shows them."""
    return " ".join([name, *(f"{key}={value}" for key, value in SETTINGS.get(name, {}).items())])


def stored(path: Path) -> Any:
    """The reports of a measurement; none of one that was not made."""
    return json.loads(path.read_text(encoding="utf-8"))["reports"] if path.is_file() else {}


def make_variant(name: str) -> Variant:
    """For an encoder's self-attention."""
    options = Plan.model_validate({"variant": name, **SETTINGS.get(name, {})}).at("encoder.self", 0)
    module: Any = torch.nn.Identity()
    module.config = SimpleNamespace(max_position_embeddings=LONGEST)
    return VARIANTS[name].load()(options, Site("", "encoder.self", 0, module, Needs(HEADS, HEADS, WIDTH)))


def make_mask(length: int, *, rows: int = 1, real: Tensor | None = None) -> LazyMask:
    """Every token sees every other; ``real`` is False on padding, [rows, length]."""
    return LazyMask(
        batch_size=rows,
        q_length=length,
        kv_length=length,
        attention_mask=real,
        allow_is_bidirectional_skip=True,
    )


def draw(length: int, *, rows: int = 1) -> list[Tensor]:
    """Query, key and value, unit normal, fp32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, HEADS, length, WIDTH, generator=generator) for _ in range(3)]
