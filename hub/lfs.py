"""Large files on their way in: git-lfs's batch call, in one piece or in many, to addresses that are signed."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, urlencode

from hub.storage import Refused, Repo, Source

JSON = "application/vnd.git-lfs+json"
_VALID_SECONDS = 6 * 3600


@dataclass(frozen=True)
class Uploads:
    """How large files arrive.

    Args:
        piece: Bytes from which on a file is sent in pieces of so many.
        key: Signs the addresses; drawn anew by each server.
    """

    piece: int = 64 << 20
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    joining: Lock = field(default_factory=Lock, repr=False)

    def offer(self, repo: Repo, objects: Sequence[tuple[str, int]], base: str) -> dict[str, Any]:
        """Answer git-lfs's batch call, of hashes and sizes: where to send what is not there yet."""
        return {"transfer": "basic", "objects": [self._offer_one(repo, *object_, base) for object_ in objects]}

    def _offer_one(self, repo: Repo, oid: str, size: int, base: str) -> dict[str, Any]:
        found = {"oid": oid, "size": size}
        if repo.size_of(oid) == size:
            return found
        upload: dict[str, Any] = {"href": self._address(repo, oid, size, base)}
        if size > self.piece:
            parts = range(1, ceil(size / self.piece) + 1)
            upload["header"] = {"chunk_size": str(self.piece)} | {
                str(part): self._address(repo, oid, size, base, part) for part in parts
            }
        verify = {"href": f"{base}/lfs/verify/{repo.kind}/{repo.id}"}
        return found | {"actions": {"upload": upload, "verify": verify}}

    def _address(self, repo: Repo, oid: str, size: int, base: str, part: int = 0) -> str:
        until = int(time.time()) + _VALID_SECONDS
        query = {"size": size, "part": part, "until": until, "sign": self._sign(repo, oid, size, part, until)}
        return f"{base}/lfs/upload/{repo.kind}/{quote(repo.id)}/{oid}?{urlencode(query)}"

    def _sign(self, repo: Repo, *what: object) -> str:
        return hmac.new(self.key, json.dumps([repo.kind, repo.id, *what]).encode(), hashlib.sha256).hexdigest()

    def check(self, repo: Repo, oid: str, query: dict[str, str]) -> tuple[int, int]:
        """What an address was made for: the file's size, and which part of it, 0 for the whole.

        Raises:
            Refused: It was not made here, or too long ago.
        """
        try:
            size, part, until = (int(query.get(name, -1)) for name in ("size", "part", "until"))
        except ValueError:
            size = part = until = -1
        sign = self._sign(repo, oid, size, part, until)
        if not hmac.compare_digest(sign.encode(), query.get("sign", "").encode()) or until < time.time():
            raise Refused(403, "no address of this hub, or one that is too old")
        return size, part

    def take(self, repo: Repo, oid: str, query: dict[str, str], body: Source) -> str:
        """Store a file, or a part of one; return the hash of what came.

        Raises:
            Refused: It is not what was said.
        """
        size, part = self.check(repo, oid, query)
        if part == 0:
            return repo.keep(body, size=size, sha256=oid)[0]
        folder = repo.incoming(oid)
        folder.mkdir(exist_ok=True)
        length = min(self.piece, size - (part - 1) * self.piece)
        return repo.keep(body, size=length, target=folder / str(part))[0]

    def join(self, repo: Repo, oid: str, query: dict[str, str]) -> None:
        """Make the file of its parts.

        Raises:
            Refused: One of them is not there, or together they are another file.
        """
        size, _ = self.check(repo, oid, query)
        with self.joining:  # a client that is tired of waiting asks again
            if repo.size_of(oid) == size:
                return
            folder = repo.incoming(oid)
            parts = [folder / str(number) for number in range(1, ceil(size / self.piece) + 1)]
            if missing := [part.name for part in parts if not part.is_file()]:
                raise Refused(400, f"parts that did not arrive: {', '.join(missing)}")
            try:
                repo.keep(_Joined(parts), size=size, sha256=oid)
            finally:  # of parts that are wrong together, who knows which one is
                shutil.rmtree(folder, ignore_errors=True)


class _Joined:
    """Files read one after the other."""

    def __init__(self, paths: list[Path]) -> None:
        self._pieces = _pieces(paths)

    def read(self, _: int, /) -> bytes:
        return next(self._pieces, b"")


def _pieces(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece
