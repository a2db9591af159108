"""Who may do what on a hub: tokens by their hashes, in a file that only the hub's owner can read."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from hub.storage import Refused, Repo, write_aside

FILE = "tokens.json"


@dataclass(frozen=True)
class User:
    """Who asks.

    Args:
        name: Also the owner of the repositories that may be written.
        role: ``read`` or ``write``.
    """

    name: str
    role: str

    def may_write(self, owner: str) -> bool:
        """Whether repositories of this owner may be made, changed and deleted."""
        return self.role == "write" and self.name == owner


class Guard:
    """Lets in who has a token; where no token was ever made, everybody who reaches the hub.

    Args:
        folder: Of the hub.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._closed = self._path.is_file()

    @property
    def is_open(self) -> bool:
        """Whether no token is needed. Once one was it stays so: a file that is gone must not let everybody in."""
        self._closed = self._closed or self._path.is_file()
        return not self._closed

    def new_token(self, user: User) -> str:
        """Make a token. It is told once: the file holds its hash."""
        token = f"hf_{secrets.token_hex(20)}"
        known = self._known()
        aside = self._path.with_name(f".{FILE}")
        os.close(os.open(aside, os.O_CREAT | os.O_WRONLY, 0o600))
        write_aside(self._path, json.dumps(known | {_hash(token): asdict(user)}, indent=2).encode(), aside=aside)
        return token

    def user(self, authorization: str | None) -> User | None:
        """Who an ``Authorization`` header stands for; None for nobody in particular.

        Raises:
            Refused: The token is none of this hub's.
        """
        if authorization is None or self.is_open:
            return None
        given = _hash(authorization.removeprefix("Bearer "))
        found = [user for known, user in self._known().items() if hmac.compare_digest(known, given)]
        if not found:
            raise Refused(401, "Invalid credentials in Authorization header")
        return User(**found[0])

    def _known(self) -> dict[str, dict[str, str]]:
        return json.loads(self._path.read_bytes()) if self._path.is_file() else {}

    def check_known(self, user: User | None) -> None:
        """Refuse who has no token, where one is needed."""
        if user is None and not self.is_open:
            raise Refused(401, "a token is needed: set HF_TOKEN, or `hf auth login`")

    def check_read(self, user: User | None, repo: Repo) -> None:
        """Refuse somebody else's private repository, in the words for one that is not there."""
        if repo.state.private and not self.is_open and (user is None or user.name != repo.id.partition("/")[0]):
            raise Refused(404 if user else 401, f"no such repository: {repo.id}", code="RepoNotFound")

    def check_write(self, user: User | None, owner: str) -> None:
        """Refuse who may not write what this owner has."""
        self.check_known(user)
        if user is not None and not user.may_write(owner):
            raise Refused(403, f"{user.name}, with a token to {user.role}, may not write what {owner} has")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
