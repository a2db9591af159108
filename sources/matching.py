"""Which of the user's columns plays which role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from heedful import UserError
from sources.columns import Column
from sources.tables import Table


def match_columns(
    table: Table, columns: Sequence[Column], mapping: Mapping[str, str], *, need_targets: bool
) -> dict[str, str]:
    """Find the column for each role: as mapped by the user, else by the usual names.

    Args:
        table: What there is.
        columns: What the task asks for.
        mapping: Role -> column name, the section ``data.columns`` of the configuration.
        need_targets: Whether targets are wanted; if not, they are not looked for.

    Returns:
        Role -> column name, without the optional columns that are not there.

    Raises:
        UserError: A required column is missing, a mapped one does not exist, or two usual names are there at once.
    """
    _check_mapping(columns, mapping)
    wanted = [column for column in columns if need_targets or not column.target]
    taken = {mapping[column.role] for column in wanted if column.role in mapping}
    found = {}
    for column in wanted:
        if column.role in mapping:
            found[column.role] = _mapped(table, column, mapping[column.role])
            continue
        usual = [name for name in column.names if name in table.names and name not in taken]
        if len(usual) > 1:
            raise _ambiguous(table, column, usual)
        if not usual and column.required:
            raise _missing(table, column, free=[name for name in table.names if name not in {*taken, *found.values()}])
        if usual:
            found[column.role] = usual[0]
    return found


def _check_mapping(columns: Sequence[Column], mapping: Mapping[str, str]) -> None:
    roles = [column.role for column in columns]
    for role in mapping:
        if role not in roles:
            raise UserError(f"no such role: {role!r}", where=f"data.columns.{role}", expected=f"one of {roles}")
    for name in mapping.values():
        twins = [role for role, mapped in mapping.items() if mapped == name]
        if len(twins) > 1:
            raise UserError(f"{twins} all read the column {name!r}", where="data.columns", expected="a column for each")


def _mapped(table: Table, column: Column, name: str) -> str:
    if name in table.names:
        return name
    near = get_close_matches(name, table.names, n=1)
    raise UserError(
        f"no column {name!r} in {table.source}",
        where=f"data.columns.{column.role}",
        expected=f"one of the columns there: {_listed(table.names)}",
        fix=table.hint or (f"did you mean data.columns.{column.role}={near[0]}?" if near else ""),
    )


def _ambiguous(table: Table, column: Column, usual: Sequence[str]) -> UserError:
    return UserError(
        f"{_listed(usual)} could each be the column {column.role!r}",
        where=table.source,
        expected=f"one column for {column.role!r}",
        fix="say which: " + " or ".join(f"data.columns.{column.role}={name}" for name in usual),
    )


def _missing(table: Table, column: Column, *, free: Sequence[str]) -> UserError:
    only = free[0] if len(free) == 1 else "NAME"
    guess = next((name for name in free if name.lower().strip() in column.names), only)
    which = f"say which column it is: data.columns.{column.role}={guess}" if free else "add it"
    words = "; a file with a word and its tag on each line ends in .conll" if column.kind == "words" else ""
    return UserError(
        f"no column for {column.role!r} among {_listed(table.names)}",
        where=table.source,
        expected=f"a column named {_listed(column.names)}{words}",
        fix=table.hint or f"{which}; a csv file needs a header line",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "no columns"
