"""More positions than a pretrained model has, so that it reads longer texts.

A table that was learned is repeated, as Longformer's was (Beltagy et al. 2020, arXiv 2004.05150, section 5), or
stretched. Rotary positions are slowed down: by YaRN (Peng et al. 2023, arXiv 2309.00071), or all alike (Chen et al.
2023, arXiv 2306.15595). A table that the model computes gets more rows of the same formula; relative positions have no
end.

The model is loaded once more under a configuration of the new size, so that all that transformers derives from it
(buffers, frequencies, computed tables) is what it will be when the trained model is opened. Learned tables alone are
left to be filled.

Shapes: P positions, N of them wanted, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedConfig, PreTrainedModel

from heedful import UserError
from tasks.positions import max_positions

TABLES = ("position_embeddings", "positions_embed", "embed_positions", "wpe")
"""What transformers calls a model's table of positions."""
LEARNED, ROTARY = ("tile", "interpolate"), ("yarn", "linear")
"""Ways to more positions; the first of each is the default."""
COMPUTED = "computed"


@dataclass(frozen=True)
class Wanted:
    """How many positions a run asks for.

    Args:
        length: Of ``model.max_length``: a model that has as many stays as it is.
        longest: Of the longest sequence, a prompt with its answer: as many does it get if it has too few.
        how: One of ``LEARNED`` and ``ROTARY``; auto takes the first that is for the model.
    """

    length: int
    longest: int
    how: str = "auto"


@dataclass(frozen=True)
class Growth:
    """More positions for one model.

    Args:
        config: What its configuration says otherwise, as ``from_pretrained`` takes it.
        tables: Each learned table as it was, by the name of its parameter.
        computed: Each table that the model computes, as it was.
    """

    old: int
    new: int
    how: str
    config: dict[str, Any]
    tables: Mapping[str, Tensor]
    computed: Mapping[str, Tensor]

    def fill(self, model: nn.Module) -> None:
        """Make the rows of the learned tables, in a model of the new size; computed ones keep those they had."""
        for name, table_PD in self.computed.items():
            model.get_parameter(name).data[: len(table_PD)] = table_PD
        for name, table_PD in self.tables.items():
            grown_ND = model.get_parameter(name).data
            reserved = len(table_PD) - self.old  # RoBERTa's and BART's first rows stand for no position
            grown_ND[:reserved] = table_PD[:reserved]
            grown_ND[reserved:] = _FILLS[self.how](table_PD[reserved:], self.new)

    def describe(self) -> str:
        """For the run's output: how many, and what they do to the model."""
        return f"positions: {self.old:,} -> {self.new:,} {_EFFECTS[self.how].format(self.old, self.new / self.old)}"


def growth(model: PreTrainedModel, wanted: Wanted) -> Growth | None:
    """How the model gets the positions that are wanted; None where it has them, or none that end.

    Raises:
        UserError: There is no such way for this model, or none at all.
    """
    old = max_positions(model)
    if old is None or wanted.length <= old:
        return None
    found = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding)
    }
    computed = {name: module.weight.detach() for name, module in found.items() if hasattr(module, "create_weight")}
    tables = {name: module.weight.detach() for name, module in found.items() if name not in computed}
    ways = LEARNED if tables else (COMPUTED,) if computed else ROTARY
    if reason := _hindrance(model.config, list(found.values())):
        raise UserError(f"model.max_length={wanted.length}", expected=reason.format(old), fix=f"model.max_length={old}")
    how = ways[0] if wanted.how == "auto" else wanted.how
    if how not in ways:
        raise UserError(
            f"model.positions={how} for the {'table' if found else 'rotary positions'} of {type(model).__name__}",
            expected=f"one of: {', '.join(('auto', *(way for way in ways if way != COMPUTED)))}",
        )
    config = _resized(model.config, old, wanted.longest, how)
    return Growth(old, wanted.longest, how, config, tables, computed)


def _hindrance(config: PreTrainedConfig, tables: list[nn.Embedding]) -> str:
    """Why a model can have no more positions; empty where it can."""
    parts = list(_parts(config).values())
    if not parts or len({len(table.weight) for table in tables}) > 1:
        return "at most {}: the parts of this model have positions of their own"
    if tables:
        return ""
    ropes = [getattr(part, "rope_parameters", None) or {} for part in parts]
    if any("rope_theta" not in rope for rope in ropes):
        nested = any(isinstance(value, dict) for rope in ropes for value in rope.values())
        return f"at most {{}}: this model's {'rotary positions differ by layer' if nested else 'positions have an end'}"
    scaled = sorted({rope["rope_type"] for rope in ropes} - {"default"})
    return f"at most {{}}: this model's rotary positions are scaled already ({scaled[0]})" if scaled else ""


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configurations that say how many positions there are: its own under no name, or both halves'."""
    if hasattr(config, "max_position_embeddings"):
        return {"": config}
    halves = {name: getattr(config, name, None) for name in ("encoder", "decoder")}
    return {name: half for name, half in halves.items() if hasattr(half, "max_position_embeddings")}


def _resized(config: PreTrainedConfig, old: int, new: int, how: str) -> dict[str, Any]:
    """What the configurations say otherwise; RoBERTa's and others' count reserved rows too, and go on to do so."""
    changed: dict[str, Any] = {}
    for name, part in _parts(config).items():
        values: dict[str, Any] = {"max_position_embeddings": part.max_position_embeddings + new - old}
        if how in ROTARY:
            rope = {**part.rope_parameters, "rope_type": how, "factor": new / old}
            if getattr(part, "head_dim", 0) is None:  # transformers multiplies it where positions are scaled
                values["head_dim"] = part.hidden_size // part.num_attention_heads
            values["rope_parameters"] = rope | ({"original_max_position_embeddings": old} if how == "yarn" else {})
        changed |= {name: values} if name else values
    return changed


def _tile(table_PD: Tensor, new: int) -> Tensor:
    return table_PD[torch.arange(new, device=table_PD.device) % len(table_PD)]


def _stretch(table_PD: Tensor, new: int) -> Tensor:
    return interpolate(table_PD.T[None], size=new, mode="linear", align_corners=True)[0].T


_FILLS = {"tile": _tile, "interpolate": _stretch}
_EFFECTS = {
    "tile": "by tile: the table is repeated, so tokens {0:,} apart have the same one",
    "interpolate": "by interpolate: the table is stretched, so texts of all lengths read otherwise until it is trained",
    "yarn": "by yarn, factor {1:g}: texts of all lengths read otherwise until it is trained",
    "linear": "by linear, factor {1:g}: texts of all lengths read otherwise until it is trained",
    COMPUTED: "as the model computes them",
}
