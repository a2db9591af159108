"""Time and memory beside torch's own kernel.

Time is CPU time of one thread, forward and backward, least of three; the kernel is timed in the same process, in turns
with the variant, so that what slows the machine slows both. Memory is by how much the peak of a fresh process grows. On
a GPU it is the clock's time till the GPU has done, in bf16, and the peak of its own memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention import VARIANTS
from attention.scoring import Scoring
from scripts.bench_attention.subjects import (
    HEADS,
    LONGEST,
    WIDTH,
    Write,
    draw,
    make_mask,
    make_variant,
    settings_of,
    some_of,
)
from scripts.peer import peak_mib
from scripts.reporting import processor, table, versions, write_page

KERNEL, DROPOUT, REPEATS, ONE, CPU = "sdpa", 0.1, 3, "one", "cpu"
LENGTHS = [512, 1024, 4096, 8192, LONGEST]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(
    lengths: Annotated[list[int], typer.Option()] = LENGTHS,
    variant: Annotated[list[str] | None, some_of(VARIANTS)] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for a page of its own.")] = CPU,
    write: Write = None,
) -> None:
    """Time and memory of a training step at these lengths, each in a process of its own."""
    names = [KERNEL, *(variant or VARIANTS)]
    dropped_at = min(lengths, key=lambda length: abs(length - 4096))
    reports = [_in_process(name, length, 0.0, device) for name in names for length in lengths]
    reports += [_in_process(name, dropped_at, DROPOUT, device) for name in names]
    text = tables(reports)
    typer.echo(text)
    if write is None:
        return
    options = [f" --lengths {length}" for length in ([] if lengths == LENGTHS else lengths)]
    options += [f" --variant {name}" for name in variant or ()]
    options += [] if device == CPU else [f" --device {device}"]
    command = f'make attention ARGS="speed{"".join(options)}"'
    machine = (
        {"device": processor(), "threads": "1"} if device == CPU else {"device": torch.cuda.get_device_name(device)}
    )
    facts = {"command": command, **machine, **versions(["torch"])}
    path = write / ("speed.md" if device == CPU else f"speed-{device}.md")
    page = f"{text}\n\n![time and memory by length]({path.stem}.svg)"
    write_page(path, "Time and memory", facts, page, {"reports": reports})
    draw_times(reports, path.with_suffix(".svg"))


def measure_one(name: str, length: int, dropout: float = 0.0, device: str = CPU) -> None:
    """One variant in this process; the figures go out as JSON."""
    torch.set_num_threads(1)
    typer.echo(json.dumps(figures(name, length, dropout, device)))


def figures(name: str, length: int, dropout: float, device: str) -> dict[str, Any]:
    """Time and memory of one variant, in this process, and what they are of."""
    variant, kernel = _attend_by(name, dropout, device), _attend_by(KERNEL, dropout, device)
    _step(variant, 64, device)  # what is imported and allocated once
    if device != CPU:
        _step(variant, length, device)  # and compiled, and tried
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_mib(device)
    _step(variant, length, device)
    memory, own, theirs = peak_mib(device) - before, [], []
    for _ in range(REPEATS):
        own.append(_step(variant, length, device))
        theirs.append(_step(kernel, length, device))
    measured = {"milliseconds": min(own), "ratio": min(own) / min(theirs), "mib": memory}
    return {"variant": name, "length": length, "dropout": dropout, **measured}


def tables(reports: Sequence[dict[str, Any]]) -> str:
    """Ratios of time to the kernel's, and memory, by variant and length; then both with dropout."""
    plain = [report for report in reports if not report["dropout"]]
    dropped = [report for report in reports if report["dropout"]]
    lengths = sorted({report["length"] for report in plain})
    header = ["variant", *(f"{length:,} tokens" for length in lengths)]
    of = {(report["variant"], report["length"]): report for report in plain}
    names = dict.fromkeys(report["variant"] for report in plain)

    def by_length(figure: str, form: str) -> str:
        return table(header, [[settings_of(n), *(_cell(of.get((n, m)), figure, form) for m in lengths)] for n in names])

    return "\n\n".join(
        [
            f"Time of a training step (1 text, {HEADS} heads of {WIDTH}), as a share of torch's kernel:",
            by_length("ratio", ".2f"),
            "Memory in MiB:",
            by_length("mib", ",.0f"),
            f"Both at {dropped[0]['length']:,} tokens, dropout {DROPOUT}, where torch's kernel for the CPU falls back "
            "to the whole table:",
            table(
                ["variant", "time, share of the kernel's", "memory, MiB"],
                [[settings_of(r["variant"]), _cell(r, "ratio", ".2f"), _cell(r, "mib", ",.0f")] for r in dropped],
            ),
        ]
    )


def draw_times(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and memory by length, all by powers of two, a line a variant."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    plain = [report for report in reports if not report["dropout"] and not report.get("refused")]
    colour = colormaps["tab20"]
    names, lengths = list(dict.fromkeys(r["variant"] for r in plain)), sorted({r["length"] for r in plain})
    panels = {"milliseconds": "time of a training step, ms", "mib": "memory of a training step, MiB"}
    for axes, (measured, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, name in enumerate(names):
            points = sorted((r["length"], r[measured]) for r in plain if r["variant"] == name)
            style = {"color": "black", "linewidth": 2.5} if name == KERNEL else {"color": colour(number), "marker": "."}
            axes.plot(*zip(*points, strict=True), label=settings_of(name), **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    legend = axes.get_legend_handles_labels()  # beside the lines, of which it would hide some
    figure.legend(*legend, loc="outside right upper", fontsize="small")
    figure.savefig(path)


def _attend_by(name: str, dropout: float, device: str) -> Attend:
    if name == KERNEL:
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    made: Any = make_variant(name)
    variant, scoring = made.to(device), Scoring(WIDTH**-0.5, dropout)
    return lambda q, k, v: variant(q, k, v, make_mask(q.shape[2]), scoring)


def _cell(report: dict[str, Any] | None, figure: str, form: str) -> str:
    return "" if report is None or report.get("refused") else format(report[figure], form)


def _in_process(name: str, length: int, dropout: float, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.bench_attention", ONE, name, str(length)]
    command += ["--dropout", str(dropout), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # a variant may refuse a length
        reason = " ".join(done.stderr.split()[-30:])
        typer.echo(f"{name} at {length:,} tokens: {reason}", err=True)
        return {"variant": name, "length": length, "dropout": dropout, "refused": reason}
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    typer.echo(f"{name} at {length:,} tokens: {report['ratio']:.2f} of the kernel's time", err=True)
    return report


def _step(attend: Attend, length: int, device: str) -> float:
    """Milliseconds of one forward and backward pass."""
    dtype = torch.float32 if device == CPU else torch.bfloat16
    tensors = [tensor.to(device, dtype).requires_grad_() for tensor in draw(length)]
    start = _now(device)
    torch.autograd.backward(attend(*tensors).sum())
    return 1000 * (_now(device) - start)


def _now(device: str) -> float:
    if device == CPU:
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
