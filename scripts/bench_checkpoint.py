"""What it costs that a checkpoint is hashed and on the disk before it counts: saving with and without, in turns.

    .venv/bin/python -m scripts.bench_checkpoint --write docs/benchmarks.md

MiniLM with AdamW's state, trained whole. Between saves the guard does nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR
from transformers import AutoModel

from scripts.reporting import preface, processor, replace_section, table, versions
from sources import files
from training.checkpoints import Position, save

MODEL = "assets/all-MiniLM-L6-v2"


def trained(model: nn.Module) -> Optimizer:
    """An optimizer that has all of its state."""
    optimizer = AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def seconds(write: Callable[[], object]) -> float:
    """Wall time, since waiting for the disk is no time of the processor."""
    start = time.perf_counter()
    write()
    return time.perf_counter() - start


def main(
    times: Annotated[int, typer.Option(min=1, help="Saves of each kind.")] = 9,
    write: Annotated[Path | None, typer.Option(help="A Markdown file for the table.")] = None,
) -> None:
    """Measure the guard of a checkpoint."""
    model = AutoModel.from_pretrained(MODEL)
    optimizer = trained(model)
    parts = {"model": model, "optimizer": optimizer, "scheduler": ConstantLR(optimizer)}
    guarded, plain = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that runs are on
        for step in range(times):
            position = Position(step)
            guarded.append(seconds(partial(save, Path(folder, "guarded"), position=position, **parts)))
            with patch.object(files, "sha256_of", return_value=""), patch.object(files, "sync"):
                plain.append(seconds(partial(save, Path(folder, "plain"), position=position, **parts)))
        size = sum(path.stat().st_size for path in Path(folder, "guarded", "step-0").iterdir())
    more = [one - other for one, other in zip(guarded, plain, strict=True)]
    sides = {"hashed and synced, as it is": guarded, "without either": plain, "difference": more}
    rows = [[name, *(f"{f(values):.2f} s" for f in (median, min, max))] for name, values in sides.items()]
    facts = {
        "command": ".venv/bin/python -m scripts.bench_checkpoint",
        "device": processor(),
        **versions(["torch", "safetensors"]),
    }
    title = f"### Saving MiniLM and its optimizer's state, {size / 2**20:,.0f} MiB, {times} times each"
    shown = table(["save", "median", "least", "greatest"], rows)
    aim = "Aim: a difference of 0.5 s at most. Between saves there is no guard."
    text = f"{title}\n\n{preface(facts)}\n\n{shown}\n\n{aim}"
    typer.echo(text)
    if write is not None:
        replace_section(write, "checkpoint", text)


if __name__ == "__main__":
    typer.run(main)
