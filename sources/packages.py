"""Files out of packages of a public registry, by the registry's ordinary client (pip), each pinned by its sha256.

No code of a package runs. Wheels are only saved. For a source distribution pip asks the package's build backend for
its metadata, which would run its setup.py; a backend that copies PKG-INFO answers in its place (PEP 517 lets the
caller of pip without build isolation provide it), and pip has compared the hash before it asks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from heedful import UserError
from sources.files import sha256_of

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Package(BaseModel):
    """One file of a registry and the members taken from it.

    Args:
        registry: Where it comes from.
        package: Its name there.
        version: Its version there.
        file: The file's name; a wheel or a source distribution (``.tar.gz``).
        sha256: The file's hash.
        size: The file's size in bytes.
        unpacked: Bytes that pip unpacks a source distribution to, or that a conversion writes; 0 for a wheel whose
            files become no larger.
        folder: Folder in the file that the names of the members start from.
        members: Hash of each member that is taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    registry: Literal["pypi"]
    package: str
    version: str
    file: Annotated[str, StringConstraints(pattern=r"^[^/]+(\.whl|\.tar\.gz)$")]
    sha256: Sha256
    size: int = Field(gt=0)
    unpacked: int = Field(default=0, ge=0)
    folder: str
    members: dict[str, Sha256] = Field(min_length=1)

    @property
    def is_sdist(self) -> bool:
        """Whether pip would build metadata for it."""
        return self.file.endswith(".tar.gz")

    @property
    def pin(self) -> str:
        """What pip calls it."""
        return f"{self.package}=={self.version}"


_BACKEND = """
import pathlib

class __legacy__:
    def get_requires_for_build_wheel(config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, "DIST_INFO")
        folder.mkdir()
        folder.joinpath("METADATA").write_bytes(pathlib.Path("PKG-INFO").read_bytes())
        return folder.name
"""
"""The two hooks of PEP 517 that `pip download` calls, in place of setuptools.build_meta:__legacy__."""

_MIRROR = "or get {file} elsewhere, put it in a folder and set PIP_FIND_LINKS to that folder"
_FAULTS = (
    (
        ("DO NOT MATCH THE HASHES",),
        "The registry's file is not the one that assets.yaml pins",
        f"do not use it: it was replaced or damaged on the way. Try again, {_MIRROR}",
    ),
    (
        ("No space left", "Errno 28"),
        "The disk is full",
        "free {room:,.0f} MB and run again; nothing half-written is left",
    ),
    (
        ("Retrying (", "Max retries", "ReadTimeout", "IncompleteRead", "connection error"),
        "The registry cannot be reached",
        f"check the network and pip's settings (`pip config list`), {_MIRROR}",
    ),
    (
        ("No matching distribution", "Could not find a version"),
        "The registry does not have the package any more, or cannot be reached",
        f"look for it there, {_MIRROR}",
    ),
    (("No module named pip",), "This Python has no pip", "run `python -m ensurepip` with it"),
)
"""What pip says, what it means, what to do; the first that fits counts."""


def room(package: Package) -> int:
    """Return the bytes that a fetch needs at most, its temporary files included."""
    return 5 * package.size + package.unpacked


def _fault(package: Package, output: str) -> UserError:
    last = [line for line in output.splitlines() if line.strip()][-3:]
    fix = "run pip yourself to see more: pip download --no-deps " + package.pin
    found = "pip could not download the package"
    for needles, meaning, remedy in _FAULTS:
        if any(needle in output for needle in needles):
            found, fix = meaning, remedy.format(file=package.file, room=room(package) / 1e6)
            break
    return UserError(
        f"{found}. pip said: {' / '.join(last)}", where=package.pin, expected=f"sha256 {package.sha256}", fix=fix
    )


def _build_options(package: Package, work: Path) -> list[str]:
    """Allow no build at all for a wheel, and only the backend above for a source distribution."""
    if not package.is_sdist:
        return ["--only-binary", ":all:"]
    backend = work / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    dist_info = f"{package.package.replace('-', '_')}-{package.version}.dist-info"
    (backend / "build_meta.py").write_text(_BACKEND.replace("DIST_INFO", dist_info))
    return ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]


def download(package: Package, work: Path, *, find_links: Sequence[str | Path] = ()) -> Path:
    """Download a package with pip into the folder ``work``, where its temporary files stay too.

    Raises:
        UserError: The package is gone or differs, the registry is out of reach, or the disk is full.
    """
    work = work.resolve()  # pip runs the backend in another folder, where a relative PYTHONPATH would find nothing
    temporary, saved, pins = work / "tmp", work / "package", work / "pins.txt"
    temporary.mkdir()
    pins.write_text(f"{package.pin} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(saved), "--requirement", str(pins)]
    command += _build_options(package, work)
    command += [option for link in find_links for option in ("--find-links", str(link))]
    terminal = sys.stderr.isatty()
    done = subprocess.run(
        command if terminal else [*command, "--quiet"],
        # Older versions of pip ignore PIP_RESUME_RETRIES, where they would refuse the option.
        env={"PIP_RESUME_RETRIES": "5"} | os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(work / "backend")},
        stdout=sys.stderr if terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    shutil.rmtree(temporary)
    if done.returncode or not (saved / package.file).is_file():
        raise _fault(package, done.stderr)
    return saved / package.file


def _open_members(package: Package, file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the wanted members as they come; of a tar, read no further than the last of them."""
    names = {f"{package.folder}/{name}": name for name in package.members}
    if not package.is_sdist:
        with zipfile.ZipFile(file) as wheel:
            for path in names.keys() & set(wheel.namelist()):
                with wheel.open(path) as stream:
                    yield names[path], stream
        return
    with tarfile.open(file, "r:gz") as sdist:
        for entry in sdist:
            stream_or_none = sdist.extractfile(entry) if entry.name in names else None
            if stream_or_none is not None:
                yield names.pop(entry.name), stream_or_none
            if not names:
                return


def unpack(package: Package, file: Path, target: Path) -> None:
    """Copy the named members, and nothing else, from the package's file to ``target``.

    Raises:
        UserError: A member is missing or is not the one that the table pins.
    """
    where = f"{package.file}, folder {package.folder}"
    missing = set(package.members)
    for name, stream in _open_members(package, file):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            shutil.copyfileobj(stream, out)
        if (found := sha256_of(path)) != package.members[name]:
            raise UserError(
                f"member {name} has sha256 {found}",
                where=where,
                expected=package.members[name],
                fix="correct the member's hash in assets.yaml, after you have looked at the file",
            )
        missing.remove(name)
    if missing:
        raise UserError(
            f"no member {', '.join(sorted(missing))}",
            where=where,
            expected="every member that assets.yaml names",
            fix="correct `folder` or `members` in assets.yaml",
        )
