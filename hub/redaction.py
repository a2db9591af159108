"""What must not leave this machine: tokens, and where things lie on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heedful import UserError

_TOKENS = (
    r"hf_[A-Za-z0-9]{20,}|wandb_v1_\w{20,}|Bearer\s+[\w.-]{16,}|//[^\s/:@]+:[^\s/@]+@"
    r"|(?i:[?&][\w-]*(?:key|password|secret|sig|signature|token)=[^\s&]{8,})"
)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Whose values are tokens, whatever they look like: a key of wandb's looked like a commit."""
_ASSIGNED = re.compile(r"(?i:api_?key|password|secret|token)\s*[=:]\s*\S{8,}")
"""In a command; in a chat template it would be a variable."""
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|/[^\s/\"'`,;=]+)(?:/[^\s/\"'`,;=]+)*/([^\s/\"'`,;=]+)/?")
_HIDDEN = "(hidden)"


def hide(text: str) -> str:
    """Hide tokens."""
    return _secrets().sub(_HIDDEN, text)


def redact(text: str) -> str:
    """Hide tokens, and of absolute paths all but the last name."""
    return _PATH.sub(r".../\1", _ASSIGNED.sub(_HIDDEN, hide(text)))


def redacted(values: Any) -> Any:
    """The same mappings and lists, with every text and key redacted."""
    if isinstance(values, dict):
        return {redact(key): redacted(value) for key, value in values.items()}
    if isinstance(values, list):
        return [redacted(value) for value in values]
    return redact(values) if isinstance(values, str) else values


def secret_keys(values: Any, key: str = "", *, within: tuple[int, ...] = ()) -> Iterator[str]:
    """The dotted keys of values that hold a token, or are one.

    Args:
        within: Identities of what holds these values: in YAML a list can hold itself.
    """
    if id(values) in within:
        return
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from secret_keys(value, f"{key}.{name}" if key else str(name), within=(*within, id(values)))
    elif _secrets().search(f"{key}={values}"):
        yield hide(key)


def _secrets() -> re.Pattern[str]:
    known = [re.escape(value) for name in _VARIABLES if len(value := os.environ.get(name, "")) >= 8]
    return re.compile("|".join([*known, _TOKENS]))


def refuse_secrets(path: Path, name: str) -> None:
    """Refuse a small text file with a token in it, or with an absolute path.

    Raises:
        UserError: Naming the file, and not what was found.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    for what, found in (
        ("a token or a password", _secrets().search(text)),
        ("a path of this machine", _machine_path(text)),
    ):
        if found:
            line = text.count("\n", 0, found.start()) + 1
            raise UserError(f"{what} in what would be published", where=f"{name}, line {line}", fix="take it out")


def _machine_path(text: str) -> re.Match[str] | None:
    """A path that is there, or would be in somebody's home; a vocabulary has many a slash."""
    homes = ("/home/", "/Users/", "/root/", "~/")
    return next((m for m in _PATH.finditer(text) if m[0].startswith(homes) or Path(m[0]).exists()), None)
