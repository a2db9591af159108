"""``heedful serve-hub``: a hub of one's own, from a folder."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from heedful import UserError
from hub.server import opened
from hub.tokens import Guard, User


def serve(folder: Path, *, host: str, port: int, console: Console | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: See ``hub.server.opened``.
    """
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, _end)
    with opened(folder, host=host, port=port) as hub:
        guarded = "everybody on this machine may read and write" if hub.guard.is_open else "for those with a token"
        console.print(f"{folder} is a hub now, {guarded}\n\n    export HF_ENDPOINT={hub.url}\n", highlight=False)
        hub.serve_forever()


def _end(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def new_token(folder: Path, name: str, *, role: str) -> str:
    """Make a token for the folder's hub; it is told here alone.

    Raises:
        UserError: Nobody can be called that.
    """
    if not name.isidentifier() and not name.replace("-", "_").isidentifier():
        raise UserError(f"no name for a user: {name!r}", where="--new-token", expected="letters, digits, - and _")
    folder.mkdir(parents=True, exist_ok=True)
    return Guard(folder).new_token(User(name, role))
