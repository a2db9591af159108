"""``heedful serve-hub``: a hub of one's own, from a folder."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from heedful import UserError
from hub.server import opened, prepare
from hub.storage import Refused, check_owner
from hub.tokens import Guard, User
from sources.files import writing


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
        UserError: Nobody can be called that, or the folder is no hub's.
    """
    try:
        user = User(check_owner(name), role)
    except Refused:
        expected = "letters, digits, -, _ and ., and a repository of theirs could be NAME/model"
        raise UserError(f"no name for a user: {name!r}", where="--new-token", expected=expected) from None
    prepare(folder)
    with writing(folder):
        return Guard(folder).new_token(user)
