"""How results are shown: tables on the console."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

Metrics = Mapping[str, Mapping[str, float | list[float]]]


def metrics_table(metrics: Metrics) -> Table:
    """One row a split and metric, with its interval. Metrics of single classes stay in metrics.json."""
    table = Table("split", "metric", "value", "95 % interval", title="metrics")
    for split, values in metrics.items():
        for name, value in values.items():
            if isinstance(value, list) or name.startswith("f1_"):
                continue
            interval = values.get(f"{name}_ci95")
            shown = f"{interval[0]:.4f} - {interval[1]:.4f}" if isinstance(interval, list) else ""
            table.add_row(split, name, f"{value:.4f}", shown)
    return table


def show_end(console: Console, metrics: Metrics, *, folder: str, task: str) -> None:
    """The end of a run: the figures, where everything is, and what to do next."""
    console.print(metrics_table(metrics))
    text = "Alice flew from Paris to New York."
    example = {"qa": f"Who flew to New York? ||| {text}", "classification": "Who flew to New York?"}.get(task, text)
    model = shlex.quote(f"{folder}/model")
    console.print(
        f"\nrun     {folder}\nmodel   {folder}/model\n\nnext    make evaluate CHECKPOINT={model}"
        f'\n        make predict CHECKPOINT={model} INPUT="{example}"',
        highlight=False,
        markup=False,
    )
