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
from tasks.protocol import LOWER_IS_BETTER

FULL = "full"
Runs = Sequence[Mapping[str, Any]]
"""The reports of one row, by seed."""


@dataclass(frozen=True)
class Trial:
    """A fine-tuning to compare variants by; its name is that of its configuration.

    Args:
        settings: What differs from the configuration, so that the run is short.
        plans: Further settings of each row, by a name that begins with its variant; the first row is full attention.
        about: What the figures are of, where the names do not say it.
    """

    settings: tuple[str, ...]
    plans: Mapping[str, tuple[str, ...]]
    about: str = ""


def _plans(reach: int, block: int, slots: int | None, kv_heads: int) -> dict[str, tuple[str, ...]]:
    """Of every variant that is not full attention; narrow ones, since the texts are short.

    Args:
        slots: Of Linformer; None for decoders, which have none. There a global token is a sink: seen by all behind it.
    """
    plans: dict[str, tuple[str, ...] | None] = {
        FULL: (),
        "sliding_window": (f"attention.reach={reach}",),
        f"sliding_window and {'[CLS]' if slots else 'a sink'}": (
            f"attention.reach={reach}",
            "attention.global_tokens=[0]",
        ),
        "local_global": (f"attention.reach={reach}",),
        "block_sparse": (f"attention.block_size={block}", "attention.global_blocks=1", "attention.random_blocks=1"),
        "strided": (f"attention.stride={block}",),
        "linformer": (f"attention.k={slots}",) if slots else None,
        "additive": (),
        "adaptive_span": (f"attention.max_span={reach}", f"attention.ramp={max(2, reach // 2)}"),
        "lsh": (f"attention.cluster_size={block}", "attention.rounds=2", "attention.buckets=4"),
        "grouped_query": (f"attention.kv_heads={kv_heads}",),
    }
    return {name: settings for name, settings in plans.items() if settings is not None}


WHOLE = "model.max_length=2048"
TRIALS = {
    "classification": Trial(("train.num_train_epochs=2",), _plans(reach=4, block=4, slots=8, kv_heads=6)),
    "ner": Trial(
        ("data.max_train_samples=4000", "train.num_train_epochs=2"), _plans(reach=4, block=4, slots=16, kv_heads=6)
    ),
    "generation": Trial(
        # A pack would hold several texts in a row, whose clusters lsh would share.
        ("data.max_train_samples=4", "data.max_eval_samples=2", "generation.packing=false"),
        _plans(reach=16, block=16, slots=None, kv_heads=1),
        "SmolLM2-135M-Instruct with LoRA on windows of 512 tokens of four articles, and the perplexity of two others; "
        "each seed draws its own. ",
    ),
    "classification-long": Trial(
        ("train.batch_size=8", "train.num_train_epochs=1"),
        {
            FULL: ("model.max_length=512",),
            "sliding_window and [CLS]": ("attention.reach=128", "attention.global_tokens=[0]", WHOLE),
            "blockwise": (WHOLE,),
        },
        "Texts of 513 tokens or more, and no others: `full` reads the first 512 tokens of each, the other rows the "
        "first 2,048; `blockwise` is full attention over those. ",
    ),
}
ROWS = list(dict.fromkeys(row for trial in TRIALS.values() for row in trial.plans))


def measure(
    task: Annotated[list[str] | None, some_of(TRIALS)] = None,
    variant: Annotated[list[str] | None, some_of(ROWS)] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    keep: Annotated[Path | None, typer.Option(help="Store runs here as they end, and use those there.")] = None,
    write: Write = None,
) -> None:
    """Test scores of whole runs, seed by seed, against full attention."""
    for name in task or TRIALS:
        trial = TRIALS[name]
        rows = [row for row in trial.plans if row == FULL or row in (variant or trial.plans)]
        reports = {row: [_run(name, trial, row, seed, keep) for seed in range(seeds)] for row in rows}
        text = quality_table(reports, trial.plans, trial.about)
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


def quality_table(reports: Mapping[str, Runs], plans: Mapping[str, Sequence[str]], about: str = "") -> str:
    """The mean of the test metric, and what each seed differs by from full attention with the same seed."""
    headline, rows = reports[FULL][0]["headline"], []
    for name, runs in reports.items():
        own, differences = scores(runs), differences_of(runs, reports[FULL])
        shown = "" if name == FULL else f"{mean(differences):+.4f} ({interval95(differences)})"
        settings = " ".join(setting.removeprefix("attention.") for setting in plans[name])
        rows.append([name, settings, f"{mean(own):.4f}", f"{min(own):.4f}", f"{max(own):.4f}", shown])
    header = ["variant", "settings", f"test {headline}", "least", "greatest", "difference to full"]
    better, worse = ("below", "above") if headline in LOWER_IS_BETTER else ("above", "below")
    sign = f"A difference {better} 0 is better than full attention with the same seed, {worse} 0 worse."
    return f"{about}{sign}\n\n{table(header, rows)}"


def scores(runs: Runs) -> list[float]:
    """The test metric of each seed."""
    return [run["metrics"][run["headline"]] for run in runs]


def differences_of(runs: Runs, full: Runs) -> list[float]:
    """What each seed differs by from full attention with the same seed."""
    return [one - other for one, other in zip(scores(runs), scores(full), strict=True)]


def _run(name: str, trial: Trial, row: str, seed: int, keep: Path | None) -> dict[str, Any]:
    plan = () if row == FULL else (f"attention={row.partition(' ')[0]}",)
    return whole_run("heedful", name, (*trial.settings, *plan, *trial.plans[row], f"seed={seed}"), keep=keep)
