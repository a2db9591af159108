"""WHAT is learned: rows -> tensors -> summed loss -> predictions -> score; one file a task.

This file imports no torch, so that the configuration can be checked in no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from sources.columns import Column
from tasks.options import (
    ClassificationOptions,
    GenerationOptions,
    MlmOptions,
    NerOptions,
    Options,
    QaOptions,
    SummarizationOptions,
    TranslationOptions,
)

if TYPE_CHECKING:
    from tasks.protocol import Task

Kind = Literal["encoder", "decoder", "encoder-decoder"]
"""Of model: looks both ways, looks back only, or reads with the one and writes with the other."""
EVERY_KIND: tuple[Kind, ...] = ("encoder", "decoder", "encoder-decoder")
WRITERS: tuple[Kind, ...] = ("decoder", "encoder-decoder")


@dataclass(frozen=True)
class TaskEntry:
    """One line of the table.

    Args:
        path: Where the task lives.
        options: Its settings.
        columns: What it reads.
        example: A text to try it on; of several inputs, a part for each.
        kinds: Of model that it is for, where transformers has such a head.
    """

    path: str
    options: type[Options]
    columns: tuple[Column, ...]
    example: str
    kinds: tuple[Kind, ...] = EVERY_KIND

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
        "Who flew to New York? ||| Alice flew from Paris to New York.",
    ),
    "ner": TaskEntry(
        "tasks.ner:Ner",
        NerOptions,
        (
            Column("tokens", "words", ("tokens", "words")),
            Column("tags", "tags", ("tags", "ner_tags", "labels", "ner"), target=True),
        ),
        "Alice flew from Paris to New York.",
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
        "Who flew to New York? ||| Alice flew from Paris to New York.",
    ),
    "summarization": TaskEntry(
        "tasks.text_to_text:TextToText",
        SummarizationOptions,
        (
            Column("source", "text", ("document", "text", "article", "dialogue", "source")),
            Column("target", "text", ("summary", "highlights", "target"), target=True),
        ),
        "Alice flew from Paris to New York, where she met Bob, who had come from London by ship.",
        WRITERS,
    ),
    "translation": TaskEntry(
        "tasks.text_to_text:TextToText",
        TranslationOptions,
        (
            Column("source", "text", ("source", "src", "text")),
            Column("target", "text", ("target", "tgt", "translation"), target=True),
        ),
        "Alice flew from Paris to New York.",
        WRITERS,
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
        "The capital of Germany is",
        ("decoder",),  # of an encoder-decoder, the causal class of transformers drops the encoder
    ),
    "mlm": TaskEntry(
        "tasks.mlm:Mlm",
        MlmOptions,
        (Column("text", "text", ("text", "content", "document")),),
        "Alice flew from Paris to New [MASK].",
        ("encoder", "encoder-decoder"),
    ),
}
