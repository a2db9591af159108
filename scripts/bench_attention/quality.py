"""Quality on real data: the same fine-tuning with every variant, by seeds, beside full attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from scripts.bench_attention.subjects import Write, some_of
from scripts.bench_peer import whole_run
from scripts.reporting import interval95, processor, table, versions, write_page

FULL = "full"


@dataclass(frozen=True)
class Trial:
    """A fine-tuning to compare variants by.

    Args:
        settings: What differs from the task's own configuration, and why the run is shorter than it.
        plans: Settings of ``attention`` by name; narrow ones, since these texts are short.
    """

    settings: tuple[str, ...]
    plans: Mapping[str, tuple[str, ...]]


def _plans(reach: int, block: int, slots: int) -> dict[str, tuple[str, ...]]:
    """Of every variant for encoders that is not full attention."""
    return {
        FULL: (),
        "sliding_window": (f"attention.reach={reach}",),
        "sliding_window and [CLS]": (f"attention.reach={reach}", "attention.global_tokens=[0]"),
        "local_global": (f"attention.reach={reach}",),
        "block_sparse": (f"attention.block_size={block}", "attention.global_blocks=1", "attention.random_blocks=1"),
        "strided": (f"attention.stride={block}",),
        "linformer": (f"attention.k={slots}",),
        "additive": (),
        "adaptive_span": (f"attention.max_span={reach}", f"attention.ramp={max(2, reach // 2)}"),
        "lsh": (f"attention.cluster_size={block}", "attention.rounds=2", "attention.buckets=4"),
        "grouped_query": ("attention.kv_heads=6",),
    }


TRIALS = {
    "classification": Trial(("train.num_train_epochs=2",), _plans(reach=4, block=4, slots=8)),
    "ner": Trial(("data.max_train_samples=4000", "train.num_train_epochs=2"), _plans(reach=4, block=4, slots=16)),
}


def measure(
    task: Annotated[list[str] | None, some_of(TRIALS)] = None,
    variant: Annotated[list[str] | None, some_of(next(iter(TRIALS.values())).plans)] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    keep: Annotated[Path | None, typer.Option(help="Store runs here as they end, and use those there.")] = None,
    write: Write = None,
) -> None:
    """Test scores of whole runs, seed by seed, against full attention."""
    for name in task or TRIALS:
        trial = TRIALS[name]
        rows = [FULL, *(row for row in variant or trial.plans if row != FULL)]
        reports = {row: [_run(name, trial, row, seed, keep) for seed in range(seeds)] for row in rows}
        text = quality_table(reports, trial.plans)
        typer.echo(text)
        if write is not None:
            some = "".join(f" --variant '{row}'" for row in variant or ())
            facts = {
                "command": f'make attention ARGS="quality --task {name} --seeds {seeds}{some}"',
                "device": processor(),
                "settings": " ".join(trial.settings),
                **versions(["torch", "transformers"]),
            }
            write_page(write / f"quality-{name}.md", f"Quality, {name}", facts, text, {"reports": reports})


def quality_table(reports: Mapping[str, Sequence[Mapping[str, Any]]], plans: Mapping[str, Sequence[str]]) -> str:
    """The mean of the test metric, and what each seed differs by from full attention with the same seed."""
    headline = reports[FULL][0]["headline"]
    scores = {name: [report["metrics"][headline] for report in runs] for name, runs in reports.items()}
    rows = []
    for name, own in scores.items():
        differences = [one - full for one, full in zip(own, scores[FULL], strict=True)]
        shown = "" if name == FULL else f"{mean(differences):+.4f} ({interval95(differences)})"
        settings = " ".join(setting.removeprefix("attention.") for setting in plans[name])
        rows.append([name, settings, f"{mean(own):.4f}", f"{min(own):.4f}", f"{max(own):.4f}", shown])
    return table(["variant", "settings", f"test {headline}", "least", "greatest", "difference to full"], rows)


def _run(task: str, trial: Trial, row: str, seed: int, keep: Path | None) -> dict[str, Any]:
    plan = () if row == FULL else (f"attention={row.partition(' ')[0]}", *trial.plans[row])
    return whole_run("heedful", task, (*trial.settings, *plan, f"seed={seed}"), keep=keep)
