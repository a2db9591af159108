"""What was measured of all variants, in one table and one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import typer

from attention import VARIANTS
from scripts.bench_attention.quality import FULL, TRIALS, Runs, differences_of, scores
from scripts.bench_attention.subjects import FOLDER, Write, stored
from scripts.reporting import half_interval95, table, write_page
from tasks.protocol import LOWER_IS_BETTER

TIMES = ((4096, 0.0), (16_384, 0.0), (4096, 0.1))
"""Tokens, and dropout."""
QUALITY = {"classification": "TREC", "ner": "NER", "generation": "SmolLM2"}
"""Trials whose rows bear the variants' names, as they are called here."""


def measure(write: Write = None) -> None:
    """Put together what was measured and written before; a cell is empty where nothing was."""
    folder = write or FOLDER
    text = summary(folder)
    typer.echo(text)
    facts = {"command": 'make attention ARGS="summary"', "of": "what the linked pages say, each with its own command"}
    write_page(folder / "summary.md", "Every variant", facts, f"{text}\n\n![quality by variant](quality.svg)", {})
    draw_quality(folder, folder / "quality.svg")


def summary(folder: Path) -> str:
    """A row for each variant."""
    exact = {report["variant"]: report for report in stored(folder / "exactness.json") if report["type"] == "fp32"}
    done = [report for report in stored(folder / "speed.json") if not report.get("refused")]
    timed = {(report["variant"], report["length"], report["dropout"]): report for report in done}
    trials = {trial: stored(folder / f"quality-{trial}.json") for trial in QUALITY}
    rows = []
    for name in VARIANTS:
        times = [timed.get((name, *at)) for at in TIMES]
        rows.append(
            [
                f"[{name}]({name}.md)",
                f"{exact[name]['output']:.0e}, {exact[name]['gradient']:.0e}" if name in exact else "",
                *(f"{report['ratio']:.2f}" if report else "" for report in times),
                *(f"{report['mib']:,.0f}" if report else "" for report in times[1:]),
                *(_quality(runs, name) for runs in trials.values()),
            ]
        )
    at = [f"{length:,} tokens{', dropout' * bool(dropout)}" for length, dropout in TIMES]
    header = ["variant", "fp32: output, gradient", *(f"time, {x}" for x in at), *(f"MiB, {x}" for x in at[1:])]
    header += [f"{title}: {_headline(trials[trial])}" for trial, title in QUALITY.items()]
    return (
        "Greatest differences from attention written out ([exactness](exactness.md)). Time of a training step as a "
        "share of that of torch's kernel, and memory ([speed](speed.md)). Quality: the mean difference to `full` with "
        "the same seeds and half of its 95 % interval, in the narrow settings of [TREC](quality-classification.md), "
        f"[NER](quality-ner.md) and [SmolLM2](quality-generation.md).\n\n{table(header, rows)}"
    )


def draw_quality(folder: Path, path: Path) -> None:
    """A panel for each trial: the mean difference to full attention of every row, with its interval."""
    from matplotlib.figure import Figure

    trials = {trial: runs for trial in TRIALS if (runs := stored(folder / f"quality-{trial}.json"))}
    if not trials:
        return
    figure = Figure(figsize=(9, 2.6 * len(trials)), layout="constrained")
    for axes, (trial, runs) in zip(figure.subplots(len(trials), squeeze=False)[:, 0], trials.items(), strict=True):
        rows = [row for row in runs if row != FULL]
        means, halves = [], []
        for row in rows:
            differences = differences_of(runs[row], runs[FULL])
            means.append(mean(differences))
            halves.append(half_interval95(differences) or 0.0)
        axes.errorbar(means, range(len(rows)), xerr=halves, fmt="o", capsize=3)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        headline = _headline(runs)
        if headline in LOWER_IS_BETTER:  # of hundreds and of tens of thousands
            axes.set_xscale("symlog", linthresh=10)
        axes.set_title(f"{trial}: {headline} less that of full attention", fontsize="medium")
    figure.savefig(path)


def _quality(runs: Mapping[str, Runs], name: str) -> str:
    if name not in runs:
        return ""
    own = scores(runs[name])
    if name == FULL:
        return f"{mean(own):.4f}"
    differences = differences_of(runs[name], runs[FULL])
    half = half_interval95(differences)
    shown = f"{mean(differences):+.4f}"
    return shown if half is None else f"{shown} ± {half:.4f}"


def _headline(runs: Mapping[str, Runs]) -> str:
    headline: str = runs[FULL][0]["headline"] if runs else ""
    return headline
