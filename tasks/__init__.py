"""WHAT is learned: rows -> tensors -> summed loss -> predictions -> score; one file a task.

This file imports no torch, so that the configuration can be checked in no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from sources.columns import Column
from tasks.options import ClassificationOptions, GenerationOptions, MlmOptions, NerOptions, Options, QaOptions

if TYPE_CHECKING:
    from tasks.protocol import Task


@dataclass(frozen=True)
class TaskEntry:
    """One line of the table: where the task lives, its settings, the columns it reads."""

    path: str
    options: type[Options]
    columns: tuple[Column, ...]

    def load(self) -> type[Task]:
        """Import the task's class (and with it torch and transformers)."""
        module, name = self.path.split(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


TASKS: dict[str, TaskEntry] = {
    "classification": TaskEntry(
        "tasks.classification:Classification",
        ClassificationOptions,
        (
            Column("text", "text", ("text", "sentence", "sentence1", "premise", "question", "question1", "content")),
            Column("text_pair", "text", ("text_pair", "sentence2", "hypothesis", "question2"), required=False),
            Column("label", "label", ("label", "labels", "class", "target", "category", "score"), target=True),
        ),
    ),
    "ner": TaskEntry(
        "tasks.ner:Ner",
        NerOptions,
        (
            Column("tokens", "words", ("tokens", "words")),
            Column("tags", "tags", ("tags", "ner_tags", "labels", "ner"), target=True),
        ),
    ),
    "qa": TaskEntry(
        "tasks.qa:Qa",
        QaOptions,
        (
            Column("id", "text", ("id", "qid"), required=False),
            Column("question", "text", ("question", "query")),
            Column("context", "text", ("context", "passage", "paragraph")),
            Column("answers", "answers", ("answers", "answer"), target=True),
        ),
    ),
    "generation": TaskEntry(
        "tasks.generation:Generation",
        GenerationOptions,
        (
            Column("prompt", "text", ("prompt", "instruction", "question"), required=False),
            Column("text", "text", ("text", "content", "document"), required=False),
            Column("messages", "messages", ("messages", "conversation"), required=False),
            Column("completion", "text", ("completion", "response", "answer"), required=False, target=True),
        ),
    ),
    "mlm": TaskEntry("tasks.mlm:Mlm", MlmOptions, (Column("text", "text", ("text", "content", "document")),)),
}
