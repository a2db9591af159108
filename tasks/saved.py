"""A task beside its model: ``heedful.json`` holds all that scoring and predicting need beyond the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from heedful import UserError, __version__
from tasks import TASKS
from tasks.options import Options
from tasks.protocol import Task

FILE = "heedful.json"


def save_task(task: Task, folder: Path) -> None:
    """Write the task's name and settings into a model folder."""
    content = {"heedful": __version__, "task": task.name, "settings": settings(task)}
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def settings(task: Task) -> dict[str, Any]:
    """The task's fields but the tokenizer, which is saved with the model."""
    fields = dataclasses.fields(cast(Any, task))  # every task is a dataclass
    values = {field.name: getattr(task, field.name) for field in fields if field.name != "tokenizer"}
    return {name: value.model_dump() if isinstance(value, Options) else value for name, value in values.items()}


def load_task(folder: Path, tokenizer: Any) -> Task:
    """Read back what ``save_task`` wrote.

    Raises:
        UserError: The folder holds a model, but does not say for which task.
    """
    content = read(folder)
    entry = TASKS[content["task"]]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in content["settings"].items()}
    if "options" in values:
        values["options"] = entry.options.model_validate(values["options"])
    return entry.load()(tokenizer=tokenizer, **values)  # type: ignore[call-arg]


def model_of_run(folder: Path) -> str:
    """What to give instead of a run, its adapter or a checkpoint of it; empty where there is no such model."""
    if (folder / FILE).is_file():  # it is one
        return ""
    beside = [parent / "model" for parent in (folder, *folder.parents[:2])]
    models = [model for model in (*beside, folder.parent) if (model / FILE).is_file()]  # the last where it was pulled
    return f"give the model of that run: {models[0]}" if models and folder.is_dir() else ""


def read(folder: Path) -> dict[str, Any]:
    """The content of a model folder's ``heedful.json``; see ``load_task``."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(
            f"no {FILE}",
            where=str(folder),
            expected="a model folder written by heedful, such as runs/ner/model",
            fix=model_of_run(folder) or "fine-tune it first: `heedful finetune CONFIG model.name=FOLDER`",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"broken JSON: {error}", where=str(path), fix="fetch or train the model again") from None
    known = isinstance(content, dict) and content.get("task") in TASKS and isinstance(content.get("settings"), dict)
    if not known:
        raise UserError(
            f"no task of heedful's: {str(content)[:60]}",
            where=str(path),
            expected=f'{{"task": ..., "settings": {{...}}}} with one of the tasks {", ".join(TASKS)}',
            fix="fetch or train the model again",
        )
    return content  # type: ignore[no-any-return]
