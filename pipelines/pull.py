"""``heedful pull``: a model out of a hub, every file of it verified."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from heedful import UserError
from hub import pull as hub
from pipelines.preparation import open_console, tell


def pull(source: str, folder: Path | None, *, revision: str, console: Console | None = None) -> Path:
    """Copy a model into a folder.

    Args:
        source: owner/name, or file:///folder.
        folder: None is one of its name, here.
        revision: A branch, a tag or a commit.

    Returns:
        The folder.

    Raises:
        UserError: See ``hub.pull.pull``.
    """
    if not source.strip("/"):
        raise UserError(f"no repository: {source!r}", where="REPO", expected="owner/name, or file:///folder")
    target = folder or Path(source.rstrip("/").rpartition("/")[2])
    console = open_console(console)
    hub.pull(source, revision, target)
    tell(console, f"{source} is in {target}, and every file is what was pushed")
    return target
