"""``heedful plan``: what a run will need, before it is made: parameters, memory, steps, time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines import building
from pipelines.finetune import be_deterministic
from pipelines.preparation import build_accelerator, build_console, prepare, tell
from pipelines.sections import RunConfig
from sources.texts import counted
from training.batches import epoch_batches, examples, micro_batches, rank_share
from training.footprint import Footprint, free_memory, measure

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What was found; sizes in bytes, times in seconds."""

    model: str
    footprint: Footprint
    memory: int
    """That the device has."""
    most_examples: int
    """Largest micro-batch of the longest examples that fits."""
    batch_size: int
    steps: int
    longest: int
    """Tokens of the longest example."""

    @property
    def seconds(self) -> float:
        """Of all updates; evaluation comes on top."""
        return self.steps * self.footprint.seconds


def plan(config: RunConfig, *, console: Console | None = None) -> Plan:
    """Prepare a run as ``finetune`` does, make two updates, and show what the whole will need. Nothing is written.

    Raises:
        UserError: As ``finetune``, before training begins.
    """
    accelerator = build_accelerator(bf16=config.train.bf16)
    memory = free_memory(accelerator.device)  # before any of it is taken
    console = build_console(accelerator, console)
    be_deterministic(config.seed)
    batching = building.build_batching(config, accelerator)
    data = prepare(config, accelerator, console)
    features, task, loaded = data.features["train"], data.task, data.loaded
    model = building.adapt(config, task, loaded, features)
    description = "\n".join(
        [
            building.describe_model(config, task, loaded, model, features),
            *building.distribute(config, model, accelerator),
        ]
    )
    lengths = np.asarray(features["length"])
    schedule = building.build_schedule(config, task, batching.steps_per_epoch(len(lengths)), validated=False)
    trainee = building.build_trainee(config, task, model, accelerator, total_steps=schedule.total_steps)
    first = epoch_batches(lengths, batching, epoch=0)[0]
    share = rank_share(first, lengths, rank=trainee.share[0], world_size=trainee.share[1])
    micro = [task.collate(examples(features, part)) for part in micro_batches(share, lengths, batching)]
    at_once = max((len(batch["row"]) for batch in micro), default=1)
    longest = task.collate(examples(features, np.argsort(-lengths, kind="stable")[:at_once]))
    footprint = measure(trainee, longest, micro, features)
    found = Plan(
        model=description,
        footprint=footprint,
        memory=memory,
        most_examples=footprint.most_examples(memory),
        batch_size=min(config.train.batch_size, len(lengths)),
        steps=schedule.total_steps,
        longest=int(lengths.max()),
    )
    console.print(found.model, highlight=False, markup=False)
    console.print(_table(found))
    if config.transfer.steps is not None:
        tell(console, f"attention.transfer comes on top: {counted(config.transfer.steps, 'updates')} in each stage")
    return found


def _table(found: Plan) -> Table:
    footprint = found.footprint
    sizes = ("weights", "gradients", "optimizer", "activations", "total")
    rows = [(name, f"{getattr(footprint, name) / MIB:,.0f} MiB") for name in sizes]
    batch = f"{counted(footprint.examples, 'examples')} of up to {counted(found.longest, 'tokens')}"
    rows[3] = (f"activations of {batch}", rows[3][1])
    rows += [
        ("free memory of the device", f"{found.memory / MIB:,.0f} MiB"),
        ("largest micro-batch that fits", f"{found.most_examples:,} of the longest examples"),
        ("updates", f"{found.steps:,} of {counted(found.batch_size, 'examples')}"),
        ("one update", f"{footprint.seconds:.2f} s"),
        ("training, without evaluation", f"{found.seconds / 60:,.1f} min"),
    ]
    table = Table("what", "needs", title="plan")
    for row in rows:
        table.add_row(*row)
    return table
