"""Files on a disk: their hashes, and the certainty that they are there."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path


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
