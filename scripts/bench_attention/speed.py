"""Measure every attention variant against torch's own kernel: exactness, time and memory, as tables and figures.

    make attention                                               # all of it, into docs/attention/
    make attention ARGS="--lengths 1024 --lengths 4096 --variant sliding_window"

Time is CPU time of one thread, forward and backward, least of three; the kernel is timed in the same process, in turns
with the variant, so that what slows the machine slows both. Memory is by how much the peak of a fresh process grows.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention import VARIANTS
from attention.masks import LazyMask
from attention.options import Plan
from attention.scoring import Scoring
from attention.variant import Needs, Site
from scripts.bench_peer import PACKAGES, _cpu, _table

HEADS, WIDTH, DROPOUT, LONGEST = 4, 64, 0.1, 2**14
SETTINGS: dict[str, dict[str, Any]] = {
    "sliding_window": {"reach": 256},
    "local_global": {"reach": 256},
    "adaptive_span": {"max_span": 224},
    "grouped_query": {"kv_heads": 2},
}
"""What is measured where it is not the default."""
KERNEL = "sdpa"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def attend_by(name: str, dropout: float) -> Attend:
    """A variant, or torch's kernel."""
    if name == KERNEL:
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    options = Plan.model_validate({"variant": name, **SETTINGS.get(name, {})}).at("encoder.self", 0)
    module: Any = torch.nn.Identity()
    module.config = SimpleNamespace(max_position_embeddings=LONGEST)
    variant = VARIANTS[name].load()(options, Site("", "encoder.self", 0, module, Needs(HEADS, HEADS, WIDTH)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        mask = LazyMask(batch_size=1, q_length=length, kv_length=length, allow_is_bidirectional_skip=True)
        return variant(q, k, v, mask, Scoring(WIDTH**-0.5, dropout))

    return attend


@app.command()
def one(name: str, length: int, dropout: float = 0.0, repeats: int = 3) -> None:
    """Measure one variant in this process, and print the figures as JSON."""
    torch.set_num_threads(1)
    variant, kernel = attend_by(name, dropout), attend_by(KERNEL, dropout)
    _step(variant, 64)  # what is imported and allocated once
    before = _peak_mib()
    _step(variant, length)
    memory, own, theirs = _peak_mib() - before, [], []
    for _ in range(repeats):
        own.append(_step(variant, length))
        theirs.append(_step(kernel, length))
    figures = {"milliseconds": min(own), "ratio": min(own) / min(theirs), "mib": memory}
    typer.echo(json.dumps({"variant": name, "length": length, "dropout": dropout, **figures}))


@app.command(name="all")
def measure_all(
    lengths: Annotated[list[int], typer.Option()] = [512, 1024, 4096, 8192, 16384],  # noqa: B006 - typer reads it
    variant: Annotated[list[str] | None, typer.Option(help="Some of them; all without.")] = None,
    write: Annotated[Path, typer.Option(help="The folder of the tables.")] = Path("docs/attention"),
) -> None:
    """Measure all variants at these lengths, each in a process of its own."""
    names = variant or list(VARIANTS)
    cases = [(name, length, 0.0) for name in [KERNEL, *names] for length in lengths]
    cases += [(name, min(lengths, key=lambda n: abs(n - 4096)), DROPOUT) for name in [KERNEL, *names]]
    reports = [_in_process(*case) for case in cases]
    facts = {"device": _cpu(), "threads": "1", **{name: version(name) for name in PACKAGES[:2]}}
    write.mkdir(parents=True, exist_ok=True)
    (write / "speed.json").write_text(json.dumps({**facts, "reports": reports}, indent=1) + "\n", encoding="utf-8")
    preface = f"`make attention`. {', '.join(f'{k}: {v}' for k, v in facts.items())}"
    (write / "speed.md").write_text(f"# Time and memory\n\n{preface}\n\n{tables(reports)}\n", encoding="utf-8")
    typer.echo(tables(reports))


def tables(reports: Sequence[dict[str, Any]]) -> str:
    """Ratios of time to the kernel's, and memory, by variant and length; then both with dropout."""
    plain = [report for report in reports if not report["dropout"]]
    dropped = [report for report in reports if report["dropout"]]
    lengths = sorted({report["length"] for report in plain})
    names = list(dict.fromkeys(report["variant"] for report in plain))
    of = {(report["variant"], report["length"]): report for report in plain}
    header = ["variant", *(f"{length:,} tokens" for length in lengths)]
    time_rows = [[name, *(_cell(of.get((name, n)), "ratio", ".2f") for n in lengths)] for name in names]
    memory_rows = [[name, *(_cell(of.get((name, n)), "mib", ",.0f") for n in lengths)] for name in names]
    dropout_rows = [[r["variant"], _cell(r, "ratio", ".2f"), _cell(r, "mib", ",.0f")] for r in dropped]
    at = f"{dropped[0]['length']:,} tokens, dropout {DROPOUT}" if dropped else ""
    parts = [
        f"Time of a training step (1 text, {HEADS} heads of {WIDTH}), as a share of torch's kernel:",
        _table(header, time_rows),
        "Memory in MiB:",
        _table(header, memory_rows),
        f"Both at {at}, where the kernel for the CPU falls back to the whole table:",
        _table(["variant", "time, share of the kernel's", "memory, MiB"], dropout_rows),
    ]
    return "\n\n".join(parts)


def _cell(report: dict[str, Any] | None, figure: str, form: str) -> str:
    return "" if report is None or report.get("refused") else format(report[figure], form)


def _in_process(name: str, length: int, dropout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.bench_attention", "one", name, str(length), "--dropout", str(dropout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # a variant may refuse a length
        reason = done.stderr.strip().splitlines()[-1]
        typer.echo(f"{name} at {length:,} tokens: {reason}", err=True)
        return {"variant": name, "length": length, "dropout": dropout, "refused": reason}
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    typer.echo(f"{name} at {length:,} tokens: {report['ratio']:.2f} of the kernel's time", err=True)
    return report


def _step(attend: Attend, length: int) -> float:
    """Milliseconds of CPU time of one forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, HEADS, length, WIDTH, generator=generator).requires_grad_() for _ in range(3)]
    start = time.process_time()
    torch.autograd.backward(attend(*tensors).sum())
    return 1000 * (time.process_time() - start)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


if __name__ == "__main__":
    app()
