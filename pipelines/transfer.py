"""``attention.transfer`` of a run: what it learns from, what its agreement is measured on, how that is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from attention import is_exact
from attention.options import Plan
from attention.seam import PLAN
from heedful import UserError
from pipelines import building
from pipelines.preparation import Prepared, encode, tell
from pipelines.report import progress_lines
from pipelines.sections import RunConfig
from sources.texts import counted
from training.batches import Batching
from training.transfer import Agreement, Course, Stage, transfer

STAGES: dict[str, tuple[Stage, ...]] = {
    "both": ("layers", "outputs"),
    "layers": ("layers",),
    "outputs": ("outputs",),
}
MOST_HELD_OUT = 256
"""Rows that the agreement is measured on."""
KEPT_BACK = 0.1
"""The share of the training rows that is kept back for it where there is no validation."""


def recover(
    config: RunConfig,
    data: Prepared,
    batching: Batching,
    *,
    resumed: bool,
    accelerator: Accelerator,
    console: Console,
) -> dict[str, Any] | None:
    """Make the attention transfer that the configuration asks for, and show the agreement before and after.

    Args:
        data: Its model as it will be trained, with LoRA's layers or not.
        batching: Of the training.
        resumed: Whether the run goes on from a checkpoint, which holds what was transferred.

    Returns:
        The agreement, for the run's folder; None where nothing was done.

    Raises:
        UserError: The checkpoint was trained with other attention, or as ``training.transfer.transfer``.
    """
    settings = config.transfer
    if settings.steps is None:
        return None
    if resumed:
        tell(console, "attention.transfer: made before the first update, and in the checkpoint")
        return None
    _refuse_trained(config)
    features, held_out, split = _held_out(config, data)
    each = f"{counted(settings.steps, 'updates')} in each stage"
    measured = f"agreement on {counted(len(held_out), 'examples')} {split}"
    tell(console, f"attention.transfer: {each}, {measured}; a run killed before its first checkpoint makes it again")
    if data.loaded.growth is not None:
        tell(console, "attention.transfer: the teacher reads at its new positions, for which it was not trained")
    if config.train.activation_checkpointing:
        tell(console, "attention.transfer: in eval mode, so train.activation_checkpointing saves no memory in it")
    found = transfer(
        data.loaded.model,
        data.task,
        features,
        held_out,
        accelerator=accelerator,
        course=Course(
            STAGES[settings.stages],
            settings.steps,
            settings.learning_rate,
            config.train.learning_rate,
            replace(batching, batch_size=settings.batch_size, accumulation=None),
        ),
        tick=lambda stage: progress_lines(console, f"attention.transfer, {stage}"),
    )
    console.print(_table(found))
    return {"measured_on": measured} | {when: asdict(agreement) for when, agreement in found.items()}


def _refuse_trained(config: RunConfig) -> None:
    """Weights that were trained with other attention have no full attention to teach."""
    stored = getattr(building.load_own_config(config), PLAN, None)
    if stored is not None and not is_exact(Plan.model_validate(stored)):
        raise UserError(
            "a model that was trained with other attention than full: what full attention gives in it is no teacher",
            where=f"attention.transfer, model.name={config.model.name}",
            expected="the pretrained model",
            fix="leave attention.transfer out, or begin with the pretrained model",
        )


def _held_out(config: RunConfig, data: Prepared) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Examples to learn from, examples to measure on, and what these are."""
    features, rng = data.features["train"], np.random.default_rng(config.seed)
    if "validation" in data.rows:
        rows = data.rows["validation"]
        drawn = np.sort(rng.permutation(len(rows))[:MOST_HELD_OUT])
        held_out = encode(data.task, rows.select(drawn), training=True, where=data.sources["validation"])
        return features, held_out, "of validation"
    row_F = np.asarray(features["row"])  # windows of one text go together
    rows_R = rng.permutation(np.unique(row_F))
    held_F = np.isin(row_F, rows_R[: min(MOST_HELD_OUT, int(np.ceil(KEPT_BACK * len(rows_R))))])
    if held_F.all():
        raise UserError(
            "one training row and no validation: nothing to measure the agreement on",
            where="attention.transfer",
            expected="data.validation, or more training rows",
        )
    learned, held = np.flatnonzero(~held_F), np.flatnonzero(held_F)
    return features.select(learned), features.select(held), "of train, kept back"


def _table(found: Mapping[str, Agreement]) -> Table:
    """A row for each place, a column for each time."""
    table = Table("agreement with full attention", *(_heading(when) for when in found), title="attention.transfer")
    first = next(iter(found.values()))
    for half in first.cosine:
        table.add_row(f"{half}, last hidden states: cosine", *(f"{a.cosine[half]:.4f}" for a in found.values()))
    for place in first.error:
        table.add_row(f"{place}: relative error", *(f"{a.error[place]:.4f}" for a in found.values()))
    return table


def _heading(when: str) -> str:
    return when if when == "before" else f"after {when}"
