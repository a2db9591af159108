"""What goes between the server's parts: a request as the routes see it, and what they answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub.lfs import Uploads
from hub.storage import Refused, Repo, Storage
from hub.tokens import Guard, User

LARGEST_CALL = 64 << 20
"""Bytes of JSON that a call may send, or a line of a commit: a file that is not large comes in one."""
LARGEST_FILE = 1 << 40


@contextmanager
def reading() -> Iterator[None]:
    """Around whatever takes apart what a client says, and nothing else: faults of the hub's own are not the client's.

    Raises:
        Refused: It is of another shape than the call has.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Refused(400, f"no such call: {type(error).__name__}") from error


def as_text(value: Any) -> str:
    """Return a text as it is.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def as_size(value: Any) -> int:
    """Return a number of bytes as it is.

    Raises:
        TypeError: It is none.
        ValueError: No file has so many.
    """
    if not isinstance(value, int):
        raise TypeError("no number")
    if not 0 <= value <= LARGEST_FILE:
        raise ValueError("no size of a file")
    return value


class Body:
    """What a client sends, and no byte beyond it.

    Args:
        read: The connection's.
        length: As the client said.
    """

    def __init__(self, read: Callable[[int], bytes], readline: Callable[[int], bytes], length: int) -> None:
        self._read, self._readline, self.left = read, readline, length

    def read(self, size: int, /) -> bytes:
        """The next bytes; none at the end.

        Raises:
            ConnectionError: The client went away before it.
        """
        return self._counted(self._read(min(size, self.left))) if self.left else b""

    def readline(self) -> bytes:
        """The next line; nothing at the end.

        Raises:
            Refused: It is too long.
        """
        if not self.left:
            return b""
        line = self._counted(self._readline(min(LARGEST_CALL, self.left)))
        if self.left and not line.endswith(b"\n"):
            raise Refused(413, "a line that is too long: a file of this size goes by LFS")
        return line

    def _counted(self, piece: bytes) -> bytes:
        if not piece:
            raise ConnectionError("the client went away")
        self.left -= len(piece)
        return piece


@dataclass(frozen=True)
class Request:
    """A call, its caller known and admitted."""

    storage: Storage
    guard: Guard
    uploads: Uploads
    names: Mapping[str, str]
    """From the path: kind, repo, revision and the like."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Body
    base: str
    """Where the client reaches this server: http://host:port"""
    user: User | None

    @property
    def repo(self) -> Repo:
        """The repository that the path names."""
        return self.storage.open(self.names["kind"], self.names["repo"])

    def json(self, *, longest: int = LARGEST_CALL) -> Any:
        """The body of most calls.

        Raises:
            Refused: It is no JSON, or too long.
        """
        content = self.content(longest=longest)
        with reading():
            return json.loads(content or b"{}")

    def content(self, *, longest: int = LARGEST_CALL) -> bytes:
        """The body.

        Raises:
            Refused: It is too long.
        """
        if self.body.left > longest:
            raise Refused(413, "too long a call")
        content = b""
        while piece := self.body.read(self.body.left):
            content += piece
        return content


@dataclass(frozen=True)
class Answer:
    """What goes back: JSON, or a file or a part of one."""

    content: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int = 0
    """Of the file."""
