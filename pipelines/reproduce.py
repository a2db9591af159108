"""``heedful reproduce``: make a run again from what it says of itself, and say whether it came out the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heedful import UserError
from pipelines.config import read_yaml, validate
from pipelines.finetune import finetune
from pipelines.preparation import build_accelerator, build_console, tell
from pipelines.runs import Run
from pipelines.sections import TrackingSection
from sources.files import MANIFEST
from sources.texts import counted

UNLIKE = ("tokens_per_second",)
"""What of a logged step is no outcome of the run."""
WEIGHTS = ".safetensors"


def reproduce(folder: Path, out: Path | None = None, *, console: Console | None = None) -> bool:
    """Train as a run was trained, into a folder of its own, and compare losses, metrics and weights.

    Args:
        folder: A finished run.
        out: None is ``<folder>.reproduced``; what is there is moved aside, as by every run.

    Returns:
        Whether all is the same to the bit.

    Raises:
        UserError: It is no finished run; or what it was made of is not here: its data, its base model, so many
            processes. Nothing is trained then.
    """
    run, again = Run(folder), Run(out or Path(f"{folder}.reproduced"))
    former = _read(run.manifest)
    outcome = _outcome(run)
    config = validate(read_yaml(run.config), where=str(run.config))
    accelerator = build_accelerator(bf16=config.train.bf16)
    console = build_console(accelerator, console)
    if (processes := former["machine"]["world_size"]) != accelerator.num_processes:
        raise UserError(
            f"a run of {counted(processes, 'processes')}", where=str(run.manifest), fix=f"say --nproc {processes}"
        )
    changes = {"output_dir": str(again.folder), "resume": "none", "tracking": TrackingSection()}
    finetune(config.model_copy(update=changes), former=former, console=console)
    differences = list(_differences(outcome, _outcome(again)))
    tell(console, "", *differences)
    same = f"{folder} is reproduced, bit for bit: every loss, every metric, every weight"
    tell(console, f"{folder} is not reproduced: see {again.folder}" if differences else same)
    return not differences


def _outcome(run: Run) -> dict[str, dict[str, Any]]:
    """What must come out again: for each part its figures, by name."""
    lines = _values(run.history, _text(run.history).splitlines())
    steps = {f"step {line['step']}, {name}": value for line in lines for name, value in line.items()}
    hashes = _read(run.folder / "model" / MANIFEST)
    return {
        "losses": {name: value for name, value in steps.items() if not name.endswith(UNLIKE)},
        "metrics": {f"{split} {name}": v for split, found in _read(run.metrics).items() for name, v in found.items()},
        "weights": {name: sha256 for name, sha256 in hashes.items() if name.endswith(WEIGHTS)},
    }


def _differences(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each part that is not the same, with its first difference."""
    for part, figures in one.items():
        names = [name for name in {**figures, **other[part]} if figures.get(name) != other[part].get(name)]
        if names:
            first = f"{names[0]} was {figures.get(names[0])} and is {other[part].get(names[0])}"
            yield f"{part}: {len(names):,} of {len(figures):,} differ, the first: {first}"


def _read(path: Path) -> dict[str, Any]:
    return next(_values(path, [_text(path)]))


def _values(path: Path, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        yield from map(json.loads, texts)
    except ValueError as error:
        raise UserError(f"broken JSON: {error}", where=str(path), expected="a run as it was written") from None


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            "no finished run", where=str(path), expected="a folder such as runs/ner, with all that a run leaves"
        )
    return path.read_text(encoding="utf-8")
