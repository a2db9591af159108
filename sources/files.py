"""Files on a disk: their hashes, the certainty that they are there, and folders that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from heedful import UserError

MANIFEST = "MANIFEST.json"


def sha256_of(path: Path) -> str:
    """Return the hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_mode(folder: Path) -> None:
    """Let who may read the folder read its files: safetensors writes them for the owner alone, whatever the umask.

    A file system without modes (vfat, some network shares) has nothing to share, and loses nothing.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):
                path.chmod(mode)


def sync(*paths: Path) -> None:
    """Wait until these files and folders are on the disk: a rename must not outlive what it names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all: another process may read the file meanwhile, or this one be killed.

    NaN is refused, since no other language could read it.
    """
    text, aside = json.dumps(value, indent=2, allow_nan=False) + "\n", path.with_name(f".tmp-{path.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make ``folder`` appear at once, with its manifest, or not at all.

    Args:
        folder: Where it shall be; an older one of this name is replaced.
        fill: Writes the files into the folder that it is given.
    """
    aside, former = (folder.parent / f".{kind}-{folder.name}" for kind in ("tmp", "former"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        fill(aside)
        share_mode(aside)
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        write_json(aside / MANIFEST, {str(p.relative_to(aside)): sha256_of(p) for p in files})
        sync(*aside.rglob("*"), aside)
        if folder.exists():  # kept until the new one stands: a kill in between loses neither
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
        aside.rename(folder)
        sync(folder.parent)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:  # a full disk is a RuntimeError from torch, an OSError from json, another from safetensors
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses into one message.

    Raises:
        UserError: For every OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"can not be written: {error.strerror or error}", where=str(folder)) from error


def leads_out(name: str) -> bool:
    """Whether a path that a file names, and which should lie beside it, lies elsewhere."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts


def fault(folder: Path) -> str | None:
    """What is wrong with a folder written by ``write_whole``, or None."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        hashes = None
    if not (isinstance(hashes, dict) and hashes):
        return f"{MANIFEST} is missing or broken"
    for name, expected in hashes.items():
        if leads_out(name):
            return f"{MANIFEST} names {name}, which is elsewhere"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != expected:
            return f"{name} does not match its hash"
    return None


def strays(folder: Path) -> list[str]:
    """Name what lies in a folder written by ``write_whole`` and came there later."""
    known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in paths} - {*known, MANIFEST})
