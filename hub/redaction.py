"""What must not leave this machine: tokens, and where things lie on it."""

from __future__ import annotations

import re
from pathlib import Path

from heedful import UserError

_TOKENS = re.compile(r"hf_[A-Za-z0-9]{20,}|Bearer\s+[\w.-]{16,}|//[^\s/:@]+:[^\s/@]+@")
_ASSIGNED = re.compile(r"(?i:api_?key|password|secret|token)\s*[=:]\s*\S{8,}")
"""In a command; in a chat template it would be a variable."""
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|/[^\s/\"'`,;=]+)(?:/[^\s/\"'`,;=]+)*/([^\s/\"'`,;=]+)/?")
_HIDDEN = "(hidden)"


def redact(text: str) -> str:
    """Hide tokens, and of absolute paths all but the last name."""
    return _PATH.sub(r".../\1", _ASSIGNED.sub(_HIDDEN, _TOKENS.sub(_HIDDEN, text)))


def refuse_secrets(path: Path, name: str) -> None:
    """Refuse a small text file with a token in it, or with an absolute path.

    Raises:
        UserError: Naming the file, and not what was found.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    for what, found in (
        ("a token or a password", _TOKENS.search(text)),
        ("a path of this machine", _machine_path(text)),
    ):
        if found:
            line = text.count("\n", 0, found.start()) + 1
            raise UserError(f"{what} in what would be published", where=f"{name}, line {line}", fix="take it out")


def _machine_path(text: str) -> re.Match[str] | None:
    """A path that is there, or would be in somebody's home; a vocabulary has many a slash."""
    homes = ("/home/", "/Users/", "/root/", "~/")
    return next((m for m in _PATH.finditer(text) if m[0].startswith(homes) or Path(m[0]).exists()), None)
