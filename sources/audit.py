"""What the rows hold, before training: balance, duplicates, leaks between splits, conflicting labels, lost targets.

Pure functions over canonical rows, in linear time. Two inputs are *exactly* the same if all columns but ``id`` and the
target are equal; *about* the same if they are equal in lower case, after NFKC, without punctuation and with blanks
collapsed. Benchmarks leak more often than one thinks: Lewis et al. 2021, https://aclanthology.org/2021.eacl-main.86.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from datasets import Dataset
from seqeval.metrics.sequence_labeling import get_entities

from heedful import UserError
from sources.columns import Column
from sources.texts import counted, normalize

EXAMPLES = 3
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
TAG = re.compile("O|[BIESLUMW]-.+")
LOST = "_lost"
MANY_VALUES = 50


@dataclass(frozen=True)
class Audit:
    """Ready for JSON by ``dataclasses.asdict``; every dict but ``leaks`` is keyed by split, ``leaks`` by "a->b"."""

    rows: dict[str, int]
    balance: dict[str, dict[str, Any]]
    """``{"kind": "labels" | "label sets" | "entities" | "tags" | "answers", "counts": {...}}``, or ``numbers``."""
    unseen: dict[str, list[str]]
    """Labels or entity types that the first split (train) has not."""
    empty: dict[str, int]
    """Rows with a blank input."""
    duplicates: dict[str, dict[str, Any]]
    """Rows whose input stands in an earlier row of the split: ``exact``, ``normalized``, ``fraction``, ``examples``."""
    leaks: dict[str, dict[str, Any]]
    """Rows of b whose input stands in a: as above; examples are pairs of (row of a, row of b)."""
    conflicts: dict[str, dict[str, Any]]
    """Rows whose (about) same input has another target too, in the split or, for "a->b", in the two."""
    lengths: dict[str, dict[str, float]]
    """Tokens in a feature."""
    losses: dict[str, dict[str, float]]
    """What is cut off or has no tokens, as the task counted it, and as fractions."""


@dataclass(frozen=True)
class Limits:
    """Fractions of rows (for ``max_lost_fraction``, of targets or tokens) beyond which training is refused."""

    max_leak_fraction: float | None = None
    max_duplicate_fraction: float | None = None
    max_conflict_fraction: float | None = None
    max_lost_fraction: float | None = None


@dataclass(frozen=True)
class _Keys:
    """One split, hashed: per row the input exactly, the input normalized, and the target."""

    exact: list[tuple[str, ...]]
    normalized: list[tuple[str, ...]]
    targets: list[Hashable]


def audit(
    splits: Mapping[str, Dataset],
    *,
    columns: Sequence[Column],
    lengths: Mapping[str, Sequence[int]],
    losses: Mapping[str, Mapping[str, int]],
) -> Audit:
    """Count what is in the splits.

    Args:
        splits: Canonical rows by split, train first; a leak is looked for from each split to those after it.
        columns: What the task reads.
        lengths: Tokens in each feature, by split.
        losses: What ``Task.account`` counted, by split; of ``x`` and ``x_lost`` the fraction is taken.
    """
    keys = {split: _keys(rows, columns) for split, rows in splits.items()}
    pairs = {f"{a}->{b}": (keys[a], keys[b]) for a, b in combinations(keys, 2)}
    target = next((column for column in columns if column.target), None)
    balance = {split: _balance(rows, target) for split, rows in splits.items()}
    return Audit(
        rows={split: len(rows) for split, rows in splits.items()},
        balance=balance,
        unseen=_unseen(balance),
        empty={split: sum(not all(key) for key in part.exact) for split, part in keys.items()},
        duplicates={split: _duplicates(part) for split, part in keys.items()},
        leaks={name: _leaks(a, b) for name, (a, b) in pairs.items()},
        conflicts={
            **{split: _conflicts_within(part) for split, part in keys.items()},
            **{name: _conflicts_across(a, b) for name, (a, b) in pairs.items()},
        },
        lengths={split: _quantiles(values) for split, values in lengths.items() if len(values)},
        losses={split: _with_fractions(counts) for split, counts in losses.items()},
    )


def check(result: Audit, limits: Limits) -> None:
    """Hold an audit against the user's limits.

    Raises:
        UserError: With everything that exceeds its limit.
    """
    lost = {f"{name} of {split}": x for split, part in result.losses.items() for name, x in _fractions(part).items()}
    measured = {
        "max_leak_fraction": {name: leak["fraction"] for name, leak in result.leaks.items()},
        "max_duplicate_fraction": {name: part["fraction"] for name, part in result.duplicates.items()},
        "max_conflict_fraction": {name: part["fraction"] for name, part in result.conflicts.items()},
        "max_lost_fraction": lost,
    }
    over = [
        f"{name}: {value:.4f} > {limit} ({setting})"
        for setting, values in measured.items()
        if (limit := getattr(limits, setting)) is not None
        for name, value in values.items()
        if value > limit
    ]
    if over:
        raise UserError(
            "; ".join(over),
            where="the audit of the data",
            expected="fractions within the limits that the configuration sets",
            fix="clean the data (the audit's examples name rows), or raise the limits",
        )


def summary(result: Audit) -> list[str]:
    """The audit in a few lines; those that deserve a look begin with ``!``."""
    lines = [f"{split}: {counted(n, 'rows')}{_balance_line(result.balance[split])}" for split, n in result.rows.items()]
    lines += [
        f"! {split}: labels that differ in case or blanks alone: {', '.join(map(repr, twins))}"
        for split, balance in result.balance.items()
        if (twins := _alike(balance))
    ]
    lines += [f"! {split}: {', '.join(names[:8])} not in train" for split, names in result.unseen.items() if names]
    lines += [f"! {split}: {counted(n, 'rows')} with an empty input" for split, n in result.empty.items() if n]
    lines += _found_lines("duplicates within", result.duplicates)
    lines += _found_lines("inputs leak", result.leaks)
    lines += _found_lines("conflicting targets in", result.conflicts)
    for split, part in result.lengths.items():
        lines.append(f"{split}: tokens " + ", ".join(f"{name} {value:g}" for name, value in part.items()))
    for split, part in result.losses.items():
        lines += loss_lines(split, part)
    return lines


def _alike(balance: Mapping[str, Any]) -> list[str]:
    """Names of labels, entities or tags that are more likely one than several."""
    names = [] if balance["kind"] in ("answers", "texts") else list(balance.get("counts", {}))
    plain = {name: " ".join(name.casefold().split()) for name in names}
    times = Counter(plain.values())
    return sorted(name for name in names if times[plain[name]] > 1)


def _keys(rows: Dataset, columns: Sequence[Column]) -> _Keys:
    inputs = [c for c in columns if not c.target and c.role != "id" and c.role in rows.column_names]
    exact = [[_joined(cell) for cell in rows[column.role][:]] for column in inputs]
    known: dict[str, str] = {}  # one context serves many questions
    for text in (text for column in exact for text in column):
        if text not in known:
            known[text] = normalize(text)
    target = next((c for c in columns if c.target and c.role in rows.column_names), None)
    targets: list[Hashable] = [None] * len(rows)
    if target:
        targets = [_target(cell, target) for cell in rows[target.role][:]]
    return _Keys(
        exact=list(zip(*exact, strict=True)),
        normalized=list(zip(*([known[text] for text in column] for column in exact), strict=True)),
        targets=targets,
    )


def _joined(cell: str | Sequence[str | Mapping[str, str]]) -> str:
    if isinstance(cell, str):
        return cell
    return " ".join(part if isinstance(part, str) else part["content"] for part in cell)


def _target(cell: Any, column: Column) -> Hashable:
    """A target as a value that compares: tags without O, as normalized-equal sentences may differ in punctuation."""
    if column.kind == "tags":
        return tuple(tag for tag in cell if tag != "O")
    if column.kind == "answers":
        return frozenset(map(normalize, cell["text"]))
    return frozenset(cell) if isinstance(cell, list) else cell


def _balance(rows: Dataset, target: Column | None) -> dict[str, Any]:
    if target is None or target.role not in rows.column_names:
        return {"kind": "no targets"}
    cells = rows[target.role][:]
    if target.kind == "text":
        return {"kind": "texts", "counts": {"different": len(set(cells))}}
    if target.kind == "tags":
        return _tag_balance(cells)
    if target.kind == "answers":
        answered = sum(bool(cell["text"]) for cell in cells)
        return {"kind": "answers", "counts": {"answer": answered, "no answer": len(cells) - answered}}
    if cells and isinstance(cells[0], list):
        counts = _sorted(Counter(label for cell in cells for label in cell))
        return {"kind": "label sets", "counts": counts, "without": sum(not cell for cell in cells)}
    numbers = _numbers(cells)
    return numbers or {"kind": "labels", "counts": _sorted(Counter(cells))}


def _numbers(cells: Sequence[str | float]) -> dict[str, Any] | None:
    """Statistics of numbers; numerals in a csv file are numbers if one has a fraction or if they are many."""
    try:
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        return None
    named = any(isinstance(cell, str) for cell in cells)
    if not len(values) or not np.isfinite(values).all() or (named and _are_classes(values)):
        return None
    return {"kind": "numbers", "min": values.min().item(), "mean": values.mean().item(), "max": values.max().item()}


def _are_classes(values: Any) -> bool:
    return bool((values == values.round()).all()) and len(np.unique(values)) <= MANY_VALUES


def _tag_balance(cells: Sequence[Sequence[str]]) -> dict[str, Any]:
    tags = Counter(tag for cell in cells for tag in cell)
    if not all(TAG.fullmatch(tag) for tag in tags):
        return {"kind": "tags", "counts": _sorted(tags)}
    found = [cell for cell in cells if any(tag != "O" for tag in cell)]
    counts = Counter(kind for cell in found for kind, _, _ in get_entities([_as_bioes(tag) for tag in cell]))
    return {"kind": "entities", "counts": _sorted(counts), "without": len(cells) - len(found)}


def _as_bioes(tag: str) -> str:
    """The tag of BILOU or BMEWS as seqeval knows it, which takes the others for words and warns."""
    return {"L": "E", "U": "S", "W": "S", "M": "I"}.get(tag[0], tag[0]) + tag[1:]


def _sorted(counts: Counter[Any]) -> dict[str, int]:
    return {str(name): count for name, count in counts.most_common()}


def _unseen(balance: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    (_, first), *others = balance.items()
    return {split: sorted(set(part.get("counts", ())) - set(first.get("counts", ()))) for split, part in others}


def _duplicates(part: _Keys) -> dict[str, Any]:
    first: dict[Hashable, int] = {}
    twins = [(first[key], i) for i, key in enumerate(part.normalized) if first.setdefault(key, i) != i]
    exact = len(part.exact) - len(set(part.exact))
    return _finding(len(part.exact), exact=exact, normalized=len(twins), examples=twins)


def _leaks(a: _Keys, b: _Keys) -> dict[str, Any]:
    first: dict[Hashable, int] = {}
    for i, key in enumerate(a.normalized):
        first.setdefault(key, i)
    twins = [(first[key], i) for i, key in enumerate(b.normalized) if key in first]
    exact = set(a.exact)
    return _finding(len(b.exact), exact=sum(key in exact for key in b.exact), normalized=len(twins), examples=twins)


def _conflicts_within(part: _Keys) -> dict[str, Any]:
    targets, firsts = _targets_by_input(part)
    rows = [i for i, key in enumerate(part.normalized) if len(targets[key]) > 1]
    pairs = [
        (firsts[part.normalized[i]], i) for i in rows if part.targets[i] != part.targets[firsts[part.normalized[i]]]
    ]
    return _finding(len(part.exact), normalized=len(rows), examples=pairs)


def _conflicts_across(a: _Keys, b: _Keys) -> dict[str, Any]:
    targets, firsts = _targets_by_input(a)
    pairs = [
        (firsts[key], i)
        for i, (key, target) in enumerate(zip(b.normalized, b.targets, strict=True))
        if key in targets and target not in targets[key]
    ]
    return _finding(len(b.exact), normalized=len(pairs), examples=pairs)


def _targets_by_input(part: _Keys) -> tuple[Mapping[Hashable, set[Hashable]], Mapping[Hashable, int]]:
    """Input -> its targets, and the first row with it."""
    targets: dict[Hashable, set[Hashable]] = defaultdict(set)
    firsts: dict[Hashable, int] = {}
    for i, (key, target) in enumerate(zip(part.normalized, part.targets, strict=True)):
        targets[key].add(target)
        firsts.setdefault(key, i)
    return dict(targets), firsts


def _finding(rows: int, *, examples: Sequence[tuple[int, int]], **counts: int) -> dict[str, Any]:
    fraction = counts["normalized"] / rows if rows else 0.0
    return {**counts, "fraction": fraction, "examples": [list(pair) for pair in examples[:EXAMPLES]]}


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    array = np.asarray(values)
    return {name: np.quantile(array, q, method="inverted_cdf").item() for name, q in QUANTILES.items()}


def _with_fractions(counts: Mapping[str, int]) -> dict[str, float]:
    shares = {
        f"{name}_fraction": lost / counts[name.removesuffix(LOST)] if counts[name.removesuffix(LOST)] else 0.0
        for name, lost in counts.items()
        if name.endswith(LOST) and name.removesuffix(LOST) in counts
    }
    return {**counts, **shares}


def _fractions(part: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in part.items() if name.endswith(f"{LOST}_fraction")}


def _balance_line(balance: Mapping[str, Any]) -> str:
    if balance["kind"] == "no targets":
        return ""
    if balance["kind"] == "numbers":
        return "; targets from {min:g} to {max:g}, mean {mean:g}".format(**balance)
    counts = balance.get("counts", {})
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:8])
    more = f", ... ({len(counts)} in all)" if len(counts) > 8 else ""
    return f"; {balance['kind']} {shown}{more}".rstrip()


def _found_lines(what: str, found: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for name, part in found.items():
        if part["normalized"]:
            exact = f", {part['exact']} exactly" if "exact" in part else ""
            examples = ", ".join(f"{a}/{b}" for a, b in part["examples"])
            rows = counted(part["normalized"], "rows")
            yield f"! {what} {name}: {rows} ({part['fraction']:.2%}){exact}; e.g. rows {examples}"


def loss_lines(split: str, part: Mapping[str, float]) -> Iterable[str]:
    """A line for each thing that was cut off, with its fraction where ``part`` has it too."""
    for name, value in part.items():
        if not value or name.endswith("_fraction"):
            continue
        if name.endswith(LOST):
            share = part.get(f"{name}_fraction", math.nan)
            yield f"! {split}: {counted(f'{value:.0f}', name.removesuffix(LOST))} cut off" + (
                f" ({share:.2%})" if share == share else ""
            )
        elif "without" in name:
            noun, *rest = name.split("_")
            yield " ".join([f"! {split}:", counted(f"{value:.0f}", noun), *rest])
