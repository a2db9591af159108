"""The columns that a task asks for, and how a user's columns are matched to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ColumnKind = Literal["text", "label", "words", "tags", "answers", "messages"]


@dataclass(frozen=True)
class Column:
    """One column that a task reads.

    Args:
        role: The name that the task knows it by; the rows that a task receives have exactly these names.
        kind: What a cell holds: ``text`` str; ``label`` str, list[str] or float; ``words`` and ``tags`` list[str];
            ``answers`` ``{"text": list[str], "answer_start": list[int]}``; ``messages`` list of
            ``{"role": str, "content": str}``.
        names: Usual names in the field, tried in this order where the user maps none.
        required: Whether rows for training and evaluation must have it. Prediction needs only the inputs.
        target: Whether it is what the model must predict, so absent in the rows of ``heedful predict``.
    """

    role: str
    kind: ColumnKind
    names: tuple[str, ...]
    required: bool = True
    target: bool = False
