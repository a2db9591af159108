"""``heedful evaluate``: score a model folder on data, with intervals."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from heedful import UserError
from pipelines.inference import EFFECTIVE, model_folder, open_model, refuse_idle
from pipelines.preparation import dialect, encode, fetch_assets, split_sources, tell
from pipelines.report import metrics_table, progress_lines
from pipelines.scoring import check_answers, evaluate_split, scored_by
from sources.readers import read_rows
from tasks import TASKS
from tasks.baselines import Split
from tasks.saved import read


def evaluate(checkpoint: str, overrides: list[str], *, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """Score the model on its run's validation and test data, or on those that the overrides name.

    Args:
        checkpoint: See ``pipelines.inference.open_model``.
        overrides: E.g. ``data.test=my.csv``; then only the splits named here are scored.

    Returns:
        ``{"<split>": {"<metric>": x, "<metric>_ci95": [low, high]}}``

    Raises:
        UserError: No data to score on, or data that this model can not be scored on.
    """
    if read(model_folder(checkpoint))["settings"].get("form") == "text":
        refuse_idle(overrides, effective=EFFECTIVE)  # plain text is scored, and nothing generated
    opened = open_model(checkpoint, overrides, console)
    data, task = opened.config.data, opened.task
    named = {override.partition("=")[0].removeprefix("data.") for override in overrides} & {"validation", "test"}
    sources = split_sources(data)
    splits = {
        name: sources[name] for name in ("validation", "test") if name in sources and (name in named or not named)
    }
    if not splits:
        raise UserError("no data to score on", where=checkpoint, fix="name it: data.test=FILE")
    fetch_assets(list(splits.values()), opened.accelerator, opened.console)
    metrics: dict[str, dict[str, Any]] = {}
    for name, source in splits.items():
        rows = read_rows(
            source,
            columns=TASKS[task.name].columns,
            mapping=data.columns,
            dialect=dialect(data),
            max_rows=data.max_eval_samples,
            seed=opened.config.seed,
        )
        task.check(rows, where=source)
        check_answers(task, rows, where=source)
        metrics[name] = evaluate_split(
            task,
            opened.model,
            Split(rows, encode(task, rows, training=False, where=source)),
            accelerator=opened.accelerator,
            batch_size=opened.config.train.per_device_eval_batch_size,
            tick=progress_lines(opened.console, name),
            intervals=True,
        )
    opened.console.print(metrics_table(metrics))
    if signature := scored_by(task):
        tell(opened.console, f"scored by {signature}")
    return metrics
