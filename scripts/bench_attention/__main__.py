"""The measurements by name; ``all`` runs each as it is by default."""

from __future__ import annotations

from collections.abc import Callable

import typer

from scripts.bench_attention import duplicate, exactness, pages, quality, speed, summary
from scripts.bench_attention.subjects import FOLDER

MEASUREMENTS: dict[str, Callable[..., None]] = {
    "exactness": exactness.measure,
    "speed": speed.measure,
    "duplicate": duplicate.measure,
    "quality": quality.measure,
    "pages": pages.measure,
    "summary": summary.measure,
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Measure the attention variants.")
app.command(speed.ONE, hidden=True)(speed.measure_one)
for name, measure in MEASUREMENTS.items():
    app.command(name)(measure)


@app.command(name="all")
def measure_all() -> None:
    """Every measurement, written to docs/attention/."""
    for measure in MEASUREMENTS.values():
        measure(write=FOLDER)


if __name__ == "__main__":
    app()
