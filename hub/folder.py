"""A hub that is a folder: on a shared disk, on a stick. No server, and nothing to install to read it.

<folder>/versions/<n>/    a whole push, with its MANIFEST.json
<folder>/main             a link to the newest one: ``from_pretrained("<folder>/main")``
<folder>/<tag>            a link to the one that was tagged; it never moves
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from heedful import UserError
from hub.storage import MAIN
from sources.files import MANIFEST, fault, sha256_of, sync, write_whole, writing

SCHEME = "file://"
_TAG = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


def folder_of(target: str) -> Path:
    """The folder of a ``file://`` address.

    Raises:
        UserError: It names another machine, or no absolute path.
    """
    split = urlsplit(target)
    if split.netloc not in ("", "localhost") or not split.path.startswith("/"):
        raise UserError("no folder of this machine", where=target, expected="file:///srv/models/my-ner")
    return Path(unquote(split.path))


def hashes(folder: Path) -> dict[str, str] | None:
    """What main holds: path -> sha256; None where nothing was pushed yet."""
    version = folder / MAIN
    if not version.is_dir():
        return None
    files = [path for path in sorted(version.rglob("*")) if path.is_file() and path != version / MANIFEST]
    return {path.relative_to(version).as_posix(): sha256_of(path) for path in files}


def put(folder: Path, files: Mapping[str, Path], *, tag: str | None = None) -> str:
    """Add a version, whole or not at all; none is added where main holds the same files.

    Args:
        files: By their paths in the version.
        tag: A name for it that stays.

    Returns:
        Where main is, then: ``versions/<n>``.

    Raises:
        UserError: The tag is at another version, or is no name; the folder holds other things, or can not be written.
    """
    if tag is not None and (not _TAG.fullmatch(tag) or tag in (MAIN, "versions")):
        raise UserError(f"no name for a tag: {tag!r}", where="--tag", expected="such as v1")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if {path.name for path in folder.iterdir()} - {".lock"} and not (folder / "versions").is_dir():
            raise UserError("a folder of other things", where=str(folder), expected="a new one, or one of pushes")
        with FileLock(folder / ".lock"):
            return _put(folder, files, tag)


def _put(folder: Path, files: Mapping[str, Path], tag: str | None) -> str:
    for left in folder.glob("versions/.tmp-*"):  # of a push that was killed, as those below
        shutil.rmtree(left)
    for left in folder.glob(".link-*"):
        left.unlink()
    if hashes(folder) == {name: sha256_of(path) for name, path in files.items()}:
        version = os.readlink(folder / MAIN)
    else:
        taken = [int(path.name) for path in folder.glob("versions/*") if path.name.isdecimal()]
        version = f"versions/{max(taken, default=0) + 1}"
    if tag is not None and os.path.lexists(folder / tag) and os.readlink(folder / tag) != version:
        raise UserError(f"the tag {tag} is at {os.readlink(folder / tag)}", where=str(folder), fix="take another name")
    if not (folder / version).exists():
        write_whole(folder / version, lambda aside: _copy(files, aside))
    for name in (MAIN, tag):
        if name is not None:
            _point(folder / name, version)
    return version


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def _point(link: Path, target: str) -> None:
    aside = link.with_name(f".link-{secrets.token_hex(4)}")
    aside.symlink_to(target)
    os.replace(aside, link)
    sync(link.parent)


def get(folder: Path, revision: str, target: Path) -> None:
    """Copy a version out, whole or not at all.

    Raises:
        UserError: There is none of this name, or it is not as it was pushed.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder), expected="one that models were pushed to")
    version = (folder / revision).resolve()  # what was looked at is what is copied, wherever main is by then
    if not (version / MANIFEST).is_file():
        there = sorted(path.name for path in folder.glob("*") if path.is_symlink())
        raise UserError(f"no version {revision!r}", where=str(folder), expected=f"one of: {', '.join(there) or 'none'}")
    if reason := fault(version):
        raise UserError(f"changed since it was pushed: {reason}", where=str(version), fix="take another version")
    files = [path for path in version.rglob("*") if path.is_file() and path != version / MANIFEST]
    write_whole(target, lambda aside: _copy({p.relative_to(version).as_posix(): p for p in files}, aside))
