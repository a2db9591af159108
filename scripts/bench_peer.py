"""Measure heedful against transformers' Trainer: both sides in one run, on one machine, as ratios.

    make bench-peer                                              # NER: speed, the update's invariance, one whole run
    make bench-peer ARGS="quality --task classification --seeds 5"
    make bench-peer ARGS="decoding --task summarization"         # against a plain loop around generate

Each side trains in a process of its own (``scripts/peer.py``), so that memory and imports are its own. The sides take
turns, and so does which goes first: a machine that drifts changes both.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import typer

from pipelines.config import load
from scripts.reporting import interval95, preface, processor, replace_section, table, versions
from tasks import TASKS

Report = dict[str, Any]

SIDES = {"heedful": "heedful", "trainer": "Trainer at its best", "trainer-defaults": "Trainer's defaults"}
SPEED_TARGETS = {("ner", "trainer"): "1.2", ("ner", "trainer-defaults"): "6"}
QUALITY_TARGETS = {"ner": 0.866}
SIDE_ENV = {"TOKENIZERS_PARALLELISM": "true", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""As ``heedful`` itself sets them before it imports anything; the Trainer gets the same."""

ONE_UPDATE = (
    "train.optim=sgd",
    "train.learning_rate=1000",  # the update must dwarf the rounding of the parameters it is added to
    "train.lr_scheduler_type=constant",
    "train.max_grad_norm=0",
    "train.max_steps=1",
    "train.batch_size=8",
    "train.bf16=false",
    "lora.r=null",
    "data.max_train_samples=500",
)
"""A step that shows the gradient itself: AdamW's hides its scale, clipping too."""


@dataclass(frozen=True)
class Layout:
    """One way to share out the same eight examples."""

    name: str
    micro: int
    accumulation: int
    processes: int


LAYOUTS = (
    Layout("batch of 8", 8, 1, 1),
    Layout("1, accumulated 8 times", 1, 8, 1),
    Layout("2 processes of 4", 4, 1, 2),
)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    pairs: int
    steps: int
    warmup: int
    seeds: int
    overrides: tuple[str, ...]
    keep: Path | None = None


@dataclass(frozen=True)
class Section:
    """What one measurement found: raw reports, and tables for people."""

    name: str
    title: str
    command: str
    reports: list[Report]
    tables: str


def run_side(
    side: str,
    task: str,
    overrides: Sequence[str],
    *options: str,
    script: str = "scripts.peer",
    processes: int = 1,
    cpu: bool = False,
) -> Report:
    """Run one side in a process of its own (or several, through torchrun) and return its report.

    Args:
        task: The task whose ``configs/<task>.yaml`` is run, or the path of another configuration.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [sys.executable, *launcher, "-m", script, side, _config(task), *overrides]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
        done = subprocess.run(
            [*command, "--out", str(out), *options],
            env={**os.environ, **SIDE_ENV, **hidden},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        report: Report = json.loads(out.read_text(encoding="utf-8"))
    name, speed, metrics = f"{report['task']} {side}", report["tokens_per_second"], report.get("metrics")
    shown = f"  {report['headline']} {metrics[report['headline']]:.4f}" if metrics else ""
    typer.echo(f"{name} seed {report['seed']}: {speed:.1f} tokens/s{shown}", err=True)
    return report


def measure_speed(task: str, settings: Settings) -> Section:
    """Training speed over the same number of updates, after a warm-up; the data are encoded beforehand."""
    reports = []
    for pair, sides in enumerate(_turns(list(SIDES), settings.pairs)):
        overrides = (*settings.overrides, f"seed={pair}", f"train.max_steps={settings.warmup + settings.steps}")
        reports += [run_side(side, task, overrides, f"--warmup={settings.warmup}") for side in sides]
    title = f"Training speed, {_stem(task)}: {settings.steps} updates after {settings.warmup}, {settings.pairs} runs"
    command = f"speed --task {task} --pairs {settings.pairs} --steps {settings.steps}"
    return Section(f"speed-{_stem(task)}", title, command, reports, speed_tables(reports))


def measure_quality(task: str, settings: Settings) -> Section:
    """Whole runs: the test metric of the last model, and peak memory."""
    reports = []
    for seed, sides in enumerate(_turns(["heedful", "trainer"], settings.seeds)):
        overrides = (*settings.overrides, f"seed={seed}")
        reports += [whole_run(side, task, overrides, keep=settings.keep) for side in sides]
    title = f"Whole runs, {_stem(task)}: seeds 0 to {settings.seeds - 1}"
    command = f"quality --task {task} --seeds {settings.seeds}"
    return Section(f"quality-{_stem(task)}", title, command, reports, quality_tables(reports))


def measure_decoding(task: str, settings: Settings) -> Section:
    """Answers to the test split by the model as it is, in tokens a second."""
    reports = []
    for pair, sides in enumerate(_turns(["heedful", "trainer"], settings.pairs)):
        overrides = (*settings.overrides, f"seed={pair}")
        reports += [run_side(side, task, overrides, script="scripts.peer_decoding") for side in sides]
    title = f"Decoding, {_stem(task)}: {settings.pairs} runs"
    return Section(
        f"decoding-{_stem(task)}",
        title,
        f"decoding --task {task} --pairs {settings.pairs}",
        reports,
        decoding_table(reports),
    )


def measure_invariance(task: str, settings: Settings) -> Section:
    """How far one update depends on how its eight examples are shared out; fp32 on the CPU, without dropout."""
    reports = []
    for side in ("heedful", "trainer"):
        with tempfile.TemporaryDirectory() as folder:
            moves = [_one_update(side, task, layout, settings, folder=Path(folder)) for layout in LAYOUTS]
        reports += [
            {"side": side, "layout": layout.name, "device": "cpu", "native_bf16": False, **_compare(move, moves[0])}
            for layout, move in zip(LAYOUTS, moves, strict=True)
        ]
    title = f"One update of 8 examples, {_stem(task)}"
    return Section(f"invariance-{_stem(task)}", title, f"invariance --task {task}", reports, invariance_table(reports))


def speed_tables(reports: Sequence[Report]) -> str:
    """Medians of each side, and heedful's speed over each other side's, run by run."""
    task, medians, ratios = reports[0]["task"], [], []
    for side, name in SIDES.items():
        examples, tokens = (median(_values(reports, side, f"{unit}_per_second")) for unit in ("examples", "tokens"))
        medians.append([name, f"{examples:.1f}", f"{tokens:,.0f}"])
        if side != "heedful":
            ratio = _ratio_row(f"examples/s, heedful / {name}", reports, side, "examples_per_second")
            ratios.append([*ratio, SPEED_TARGETS.get((task, side), "")])
            ratios.append([*_ratio_row(f"peak memory, heedful / {name}", reports, side, "peak_mib"), ""])
    return "\n\n".join(
        [
            table(["side", "examples/s (median)", "tokens/s (median)"], medians),
            table(["ratio", "median", "least", "greatest", "target"], ratios),
        ]
    )


def quality_tables(reports: Sequence[Report]) -> str:
    """The test metric with its paired difference, and the ratio of memory; speed has a measurement of its own."""
    headline, task = reports[0]["headline"], reports[0]["task"]
    ours, theirs = ([report["metrics"][headline] for report in _of(reports, side)] for side in ("heedful", "trainer"))
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    between = f" ({interval95(differences)})" if len(differences) > 1 else ""
    scores = [
        _score_row(f"heedful, test {headline}", ours, ".4f"),
        _score_row(f"Trainer at its best, test {headline}", theirs, ".4f"),
        _score_row(f"difference, seed by seed{between}", differences, "+.4f"),
    ]
    memory = _ratio_row("peak memory, heedful / Trainer at its best", reports, "trainer", "peak_mib")
    aim = f"\n\nAim: at least {QUALITY_TARGETS[task]}." if task in QUALITY_TARGETS else ""
    return (
        table(["", "mean", "least", "greatest"], scores)
        + "\n\n"
        + table(["ratio", "median", "least", "greatest"], [memory])
        + aim
    )


def decoding_table(reports: Sequence[Report]) -> str:
    """Ratios over the plain loop of transformers' examples, run by run."""
    figures = {"tokens/s": "tokens_per_second", "peak memory": "peak_mib"}
    rows = [_ratio_row(f"{name}, heedful / plain generate", reports, "trainer", key) for name, key in figures.items()]
    return table(["ratio", "median", "least", "greatest"], rows)


def invariance_table(reports: Sequence[Report]) -> str:
    """Each layout's update against that of the batch of 8."""
    rows = [
        [SIDES[report["side"]], report["layout"], f"{report['difference']:.1e}", f"{report['ratio']:.4f}"]
        for report in reports
    ]
    return table(["side", "layout", "relative difference of the update", "ratio of its norm"], rows)


def circumstances(section: Section, settings: Settings) -> dict[str, str]:
    """The command, the machine and the versions."""
    report = section.reports[0]
    changes = "".join(f" --set {override}" for override in settings.overrides)
    return {
        "command": f'make bench-peer ARGS="{section.command}{changes}"',
        "device": processor() if report["device"] == "cpu" else report["device"],
        "bf16": "native" if report["native_bf16"] else "not native, so fp32 on both sides",
        **({"threads": str(report["threads"])} if "threads" in report else {}),
        "python": platform.python_version(),
        **versions(),
    }


class Mode(StrEnum):
    """What to measure."""

    SPEED = "speed"
    INVARIANCE = "invariance"
    QUALITY = "quality"
    DECODING = "decoding"


MEASURES: dict[Mode, Callable[[str, Settings], Section]] = {
    Mode.SPEED: measure_speed,
    Mode.INVARIANCE: measure_invariance,
    Mode.QUALITY: measure_quality,
    Mode.DECODING: measure_decoding,
}


def main(
    modes: Annotated[list[Mode] | None, typer.Argument(help="The first three, if none is named.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="ner (if none is named), ..., or a YAML file.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Times that each side's speed is measured.")] = 3,
    # The Trainer's sampler sorts within groups of 50 batches: any 50 in a row hold each length in its share.
    steps: Annotated[int, typer.Option(min=1, help="Updates timed; best a multiple of 50.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Whole runs of each side.")] = 1,
    override: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, for both sides.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="A Markdown file for the tables; the raw figures go to a folder of its name.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Store whole runs here as they end, and use those that are there.")
    ] = None,
) -> None:
    """Measure heedful against transformers' Trainer."""
    settings = Settings(pairs, steps, max(1, steps // 5), seeds, tuple(override or ()), keep)
    for mode in modes or [Mode.SPEED, Mode.INVARIANCE, Mode.QUALITY]:
        for name in task or ["ner"]:
            if mode is Mode.DECODING and "decoding" not in TASKS[load(_config(name)).task].options.model_fields:
                raise typer.BadParameter(f"{name} writes no text: --task summarization", param_hint="decoding")
            section = MEASURES[mode](name, settings)
            facts = circumstances(section, settings)
            typer.echo(f"\n### {section.title}\n\n{preface(facts)}\n\n{section.tables}\n")
            if write is not None:
                replace_section(write, section.name, f"### {section.title}\n\n{preface(facts)}\n\n{section.tables}")
                raw = write.with_suffix("") / f"{section.name}.json"
                raw.parent.mkdir(parents=True, exist_ok=True)
                raw.write_text(json.dumps({**facts, "reports": section.reports}, indent=1) + "\n", encoding="utf-8")


def whole_run(side: str, task: str, overrides: Sequence[str], *, keep: Path | None) -> Report:
    """One side's scored run, or the report of the same run that an earlier call kept: hours need not be lost."""
    if keep is None:
        return run_side(side, task, overrides, "--scored")
    run = "\n".join([Path(_config(task)).read_text(encoding="utf-8"), *overrides])
    path = keep / f"{_stem(task)}-{side}-{sha256(run.encode()).hexdigest()[:12]}.json"
    if path.is_file():
        report: Report = json.loads(path.read_text(encoding="utf-8"))
        typer.echo(f"{path}: kept from commit {report['commit']}", err=True)
        return report
    report = run_side(side, task, overrides, "--scored")
    keep.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(report), encoding="utf-8")
    aside.replace(path)
    return report


def _config(task: str) -> str:
    return task if task.endswith((".yaml", ".yml")) else f"configs/{task}.yaml"


def _stem(task: str) -> str:
    return Path(_config(task)).stem


def _turns(sides: list[str], times: int) -> Iterator[list[str]]:
    """The sides in order, then in reverse, and so on."""
    for i in range(times):
        yield sides if i % 2 == 0 else sides[::-1]


def _one_update(side: str, task: str, layout: Layout, settings: Settings, *, folder: Path) -> Any:
    path = folder / f"{layout.processes}-{layout.micro}.npy"
    overrides = (
        *settings.overrides,
        *ONE_UPDATE,
        f"train.per_device_train_batch_size={layout.micro}",
        f"train.gradient_accumulation_steps={layout.accumulation}",
    )
    options = (f"--update={path}", "--max-features=8", "--warmup=0")
    run_side(side, task, overrides, *options, processes=layout.processes, cpu=True)
    return np.load(path).astype(np.float64)


def _compare(move: Any, reference: Any) -> dict[str, float]:
    norm = float(np.linalg.norm(reference))
    return {
        "difference": float(np.linalg.norm(move - reference)) / norm,
        "ratio": float(np.linalg.norm(move)) / norm,
    }


def _of(reports: Sequence[Report], side: str) -> list[Report]:
    """One side's reports, by seed, so that those of two sides are pairs."""
    return sorted((report for report in reports if report["side"] == side), key=lambda report: report["seed"])


def _values(reports: Sequence[Report], side: str, figure: str) -> list[float]:
    return [float(report[figure]) for report in _of(reports, side)]


def _ratio_row(name: str, reports: Sequence[Report], side: str, figure: str) -> list[str]:
    pairs = zip(_values(reports, "heedful", figure), _values(reports, side, figure), strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    return [name, f"{median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"]


def _score_row(name: str, scores: Sequence[float], form: str) -> list[str]:
    return [name, *(format(figure, form) for figure in (mean(scores), min(scores), max(scores)))]


if __name__ == "__main__":
    typer.run(main)
