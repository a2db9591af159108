"""How results are shown: tables on the console."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sources.readers import PART
from tasks import TASKS
from tasks.batching import IGNORED
from training.evaluation import Tick

Metrics = Mapping[str, Mapping[str, float | list[float]]]
PREVIEW_TOKENS = 200
SECONDS_BETWEEN_LINES = 20.0


def metrics_table(metrics: Metrics, baselines: Mapping[str, Metrics] | None = None) -> Table:
    """One row a split and metric, with its interval. Metrics of single classes stay in metrics.json.

    Args:
        baselines: For each split what else was scored on it, by name, each a column.
    """
    names = list(dict.fromkeys(name for found in (baselines or {}).values() for name in found))
    # As Text, since a name may hold a label of the user's, and Table reads markup into plain strings.
    table = Table("split", "metric", "value", "95 % interval", *(Column(Text(name)) for name in names), title="metrics")
    for split, values in metrics.items():
        beside = (baselines or {}).get(split, {})
        for metric, value in values.items():
            if isinstance(value, list) or metric.startswith("f1_"):
                continue
            interval = values.get(f"{metric}_ci95")
            shown = f"{interval[0]:.4f} - {interval[1]:.4f}" if isinstance(interval, list) else ""
            others = [f"{beside[name][metric]:.4f}" if metric in beside.get(name, {}) else "" for name in names]
            table.add_row(split, metric, f"{value:.4f}", shown, *others)
    return table


def learned_tokens(tokenizer: Any, feature: Mapping[str, Any], *, colours: bool = True) -> Text | None:
    """A training example as text, with the tokens that carry loss in green and underlined, the others dim.

    Args:
        feature: Of packed texts or of a prompt with its answer; there is nothing to show of any other.
        colours: Whether they can be seen; else what carries loss stands between » and «.
    """
    if "prompt_length" not in feature and "position_ids" not in feature:
        return None
    start = max(0, feature.get("prompt_length", 0) - PREVIEW_TOKENS // 2)
    window = slice(start, start + PREVIEW_TOKENS)
    text = Text("what is learned of the first example: " + "... " * (start > 0))
    pairs = zip(feature["input_ids"][window], feature["labels"][window], strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        part = tokenizer.decode([token for token, _ in run])
        part = f"»{part}«" if learned and not colours else part
        text.append(part, style="green underline" if learned else "dim")
    if len(feature["labels"]) > window.stop:
        text.append(" ...", style="dim")
    return text


def progress_lines(console: Console, what: str, *, now: Callable[[], float] = time.monotonic) -> Tick:
    """Say now and then how far a prediction is, and about how long it will take; nothing if it is short.

    Args:
        what: That answers are predicted for.
        now: The clock, in seconds.
    """
    started = last = now()

    def tick(done: int, total: int) -> None:
        nonlocal last
        if now() - last < SECONDS_BETWEEN_LINES or done == total:
            return
        last = now()
        left = timedelta(seconds=round((last - started) / done * (total - done)))
        console.print(f"{what}: {done / total:.0%} done, {left} left", highlight=False, markup=False)

    return tick


def show_end(
    console: Console,
    metrics: Metrics,
    baselines: Mapping[str, Metrics],
    *,
    folder: str,
    task: str,
    columns: Collection[str],
) -> None:
    """The end of a run: the figures, where everything is, and what to do next.

    Args:
        columns: That the training rows have, and so an example must have.
    """
    if metrics:
        console.print(metrics_table(metrics, baselines))
    model = shlex.quote(f"{folder}/model")
    named = "" if metrics else ' ARGS="data.test=FILE"'  # the run has no data to score on
    inputs = [c for c in TASKS[task].columns if c.role in columns and c.role != "id" and not c.target]
    example = PART.join(TASKS[task].example.split(PART)[: len(inputs)]).strip()
    console.print(
        f"\nrun     {folder}\nmodel   {folder}/model\n\nnext    make evaluate CHECKPOINT={model}{named}"
        f'\n        make predict CHECKPOINT={model} INPUT="{example}"',
        highlight=False,
        markup=False,
    )
