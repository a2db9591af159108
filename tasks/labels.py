"""Labels of classification: what kind they are, which there are, what each weighs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from heedful import UserError

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Label = str | list[str] | float
PROBLEM_TYPES: dict[type, ProblemType] = {
    str: "single_label_classification",
    list: "multi_label_classification",
    float: "regression",
}
KINDS: dict[ProblemType, str] = {
    "single_label_classification": "one label, a text or an integer",
    "multi_label_classification": "a list of labels (csv: set data.label_separator)",
    "regression": "a finite number",
}

DECIMAL = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)


def find_problem_type(cells: Sequence[Any]) -> ProblemType:
    """Tell the problem type from the labels: text, lists of texts, or numbers.

    Raises:
        UserError: Numbers with decimals, read from a text file: classes or amounts, only the user knows.
    """
    found = PROBLEM_TYPES[type(cells[0])]
    texts = cells if found == "single_label_classification" else []
    fraction = next((cell for cell in texts if "." in cell), None)
    if fraction is not None and all(DECIMAL.fullmatch(cell) for cell in texts):
        raise UserError(
            f"labels that are all numbers, such as {fraction}",
            where="data.train",
            expected="to be told whether they are amounts or the names of classes",
            fix="classification.problem_type=regression, or =single_label_classification",
        )
    return found


def read_label(cell: Any, problem_type: ProblemType, *, where: str) -> Label:
    """Read a cell as a label of this problem type; for regression, text that is a number will do.

    Raises:
        UserError: It is not one.
    """
    if problem_type == "regression":
        return _read_number(cell, where=where)
    if PROBLEM_TYPES.get(type(cell)) == problem_type:
        return cell  # type: ignore[no-any-return]
    raise _misfit(cell, problem_type, where=where)


def find_labels(parsed: Sequence[Any], problem_type: ProblemType) -> tuple[str, ...]:
    """Collect the names of the classes, sorted, as numbers if all are integers; none for regression.

    Raises:
        UserError: There is nothing to tell apart.
    """
    names = {name for label in parsed for name in (label if isinstance(label, list) else [label])}
    if len(names) < 2:
        raise UserError(
            f"every label is {next(iter(names))!r}" if names else "no row has a label",
            where="data.train",
            expected="at least two classes" if problem_type != "regression" else "numbers that differ",
            fix="check the label column, or train on more rows",
        )
    if problem_type == "regression":
        return ()
    as_numbers = all(name.lstrip("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if as_numbers else (0, name)))


def weigh_classes(
    option: str | dict[str, float] | None, parsed: Sequence[Any], *, labels: Sequence[str], problem_type: ProblemType
) -> tuple[float, ...] | None:
    """Weights of the classes in the order of ``labels``; ``balanced`` as in scikit-learn.

    Raises:
        UserError: Weights for other classes than there are, not positive, or for another problem type.
    """
    if option is None:
        return None
    where = "classification.class_weights"
    if problem_type != "single_label_classification":
        raise UserError(f"class weights for {problem_type}", where=where, expected="null", fix="leave them out")
    if option == "balanced":
        counts = Counter(parsed)
        return tuple(len(parsed) / (len(labels) * counts[label]) for label in labels)
    assert isinstance(option, dict)
    strange, missing = sorted(set(option) - set(labels)), sorted(set(labels) - set(option))
    if strange or missing:
        found = [f"unknown: {', '.join(strange)}"] * bool(strange) + [f"missing: {', '.join(missing)}"] * bool(missing)
        raise UserError("; ".join(found), where=where, expected=f"weights of {', '.join(labels)}", fix="name each once")
    bad = {name: weight for name, weight in option.items() if not 0 < weight < math.inf}
    if bad:
        raise UserError(
            f"weights {bad}", where=where, expected="finite numbers above 0", fix="leave out the rows instead"
        )
    return tuple(option[label] for label in labels)


def _read_number(cell: Any, *, where: str) -> float:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        raise _misfit(cell, "regression", where=where) from None
    if not math.isfinite(number):
        raise _misfit(cell, "regression", where=where)
    return number


def _misfit(cell: Any, problem_type: ProblemType, *, where: str) -> UserError:
    fix = "correct the row, or classification.problem_type"
    return UserError(f"label {cell!r} for {problem_type}", where=where, expected=KINDS[problem_type], fix=fix)
