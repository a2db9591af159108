"""``heedful assets``: fetch what the default runs need, and check every byte of it."""

from __future__ import annotations

from pathlib import Path

import typer

from heedful import UserError
from sources.assets import ensure, load_table


def fetch_named(names: list[str]) -> None:
    """Fetch assets by their own name, or all those of a task; ``all`` fetches everything.

    Raises:
        UserError: No asset or task has that name, or a file is not what was pinned.
    """
    table = load_table(Path("assets.yaml"))
    wanted = [asset.name for name in names for asset in table.values() if name in ("all", asset.name, *asset.tasks)]
    unknown = [name for name in names if name != "all" and not any(name in (a.name, *a.tasks) for a in table.values())]
    if unknown:
        raise UserError(f"no asset or task named {unknown[0]!r}", expected=f"all, or one of: {', '.join(table)}")
    ensure([f"assets/{name}" for name in wanted], root=Path.cwd(), say=typer.echo, verify=True)
