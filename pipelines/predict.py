"""``heedful predict``: a model's answers for a file or a text, one JSON object a row."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from heedful import UserError
from pipelines.inference import open_model
from pipelines.preparation import dialect, encode, tell
from pipelines.report import progress_lines
from sources.audit import loss_lines
from sources.readers import SUFFIXES, read_rows, rows_from_text
from tasks import TASKS
from tasks.protocol import Output
from training.evaluation import predict as predict_features


def predict(checkpoint: str, given: str, overrides: list[str], *, console: Console | None = None) -> list[Output]:
    """Predict every row of a file, or one text.

    Args:
        checkpoint: See ``pipelines.inference.open_model``.
        given: A file, or the text itself; what looks like a file but is none is refused.
        overrides: E.g. ``data.columns.text=review``.

    Returns:
        One answer a row, in order, with the row's number from 0, ready for JSON; on other ranks than the main one too.
    """
    opened = open_model(checkpoint, overrides, console)
    columns, data, task = TASKS[opened.task.name].columns, opened.config.data, opened.task
    if not given.strip():
        raise UserError("INPUT is empty", expected="a file, or a text")
    if os.path.exists(given):  # unlike Path.exists, no error where a text is too long for a file name
        rows = read_rows(given, columns=columns, mapping=data.columns, need_targets=False, dialect=dialect(data))
    elif looks_like_a_file(given):
        raise UserError("no such file", where=given, expected="a file, or a text")
    else:
        rows = rows_from_text(given, columns)
    task.check(rows, where=given[:60])
    features = encode(task, rows, training=False, where=given[:60])
    tell(opened.console, *loss_lines("INPUT", task.account(features, rows)))
    predictions = predict_features(
        task,
        opened.model,
        features,
        accelerator=opened.accelerator,
        batch_size=opened.config.train.per_device_eval_batch_size,
        tick=progress_lines(opened.console, "INPUT"),
    )
    return [{"row": row, **output} for row, output in enumerate(task.decode(predictions, rows))]


def looks_like_a_file(text: str) -> bool:
    """One word that ends in a file's suffix: more likely a mistyped path than a text to predict."""
    return " " not in text.strip() and Path(text).suffix in SUFFIXES
