"""From a hub to a folder: every file compared with what the hub says it holds, whole or not at all."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from heedful import UserError
from hub import folder as shelf
from hub.client import connect, explained, is_same, listing, retried
from hub.storage import Refused, check_path
from sources.files import MANIFEST, fault, strays, write_whole, writing

OF_A_RUN = ("config.yaml", "manifest.json")
"""Beside model/, adapter/ and checkpoints/."""


def pull(source: str, revision: str, target: Path) -> None:
    """Copy a model out of a hub.

    Args:
        source: owner/name, or file:///folder.
        revision: A branch, a tag or a commit.
        target: A new folder, or one that was pulled and not changed since.

    Raises:
        UserError: There is none, it is not what the hub says it holds, something else is in the way, or the folder can
            not be written.
    """
    if target.exists() and (reason := _not_as_pulled(target)):
        raise UserError(
            f"something else is there: {reason}", where=str(target), expected="a new folder", fix="name another one"
        )
    with writing(target):
        if source.startswith("file:"):
            shelf.get(shelf.folder_of(source), revision, target)
        else:
            _pull(source, revision, target)


def _not_as_pulled(target: Path) -> str | None:
    """What tells a folder from one that was pulled and not changed since; None where nothing does."""
    if reason := fault(target):
        return reason
    if added := strays(target):
        return f"{', '.join(added)} came there later"
    runs = [up for up in target.resolve().parents[:2] if all((up / name).is_file() for name in OF_A_RUN)]
    return f"the run {runs[0]} made it" if runs else None


def _pull(source: str, revision: str, target: Path) -> None:
    api = connect()
    with explained(f"{source}@{revision} on {api.endpoint}"):
        commit = retried(lambda: api.model_info(source, revision=revision)).sha or revision
        files = {_checked(path): file for path, file in listing(api, source, commit).items() if path != MANIFEST}

        def fill(aside: Path) -> None:
            for path, file in files.items():
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(_fetch(api, source, commit, file), aside / path)

        write_whole(target, fill)


def _checked(path: str) -> str:
    try:
        return check_path(path)
    except Refused as error:
        raise UserError(f"the hub names {error.message}", where="pull", fix="do not trust this hub") from None


def _fetch(api: HfApi, source: str, commit: str, file: RepoFile) -> Path:
    """By way of the client's cache, which goes on with what was cut off. What is wrong in it is fetched anew, once."""
    get = partial(api.hf_hub_download, source, file.path, revision=commit)
    path = Path(retried(get))
    if not is_same(file, path):
        path = Path(retried(partial(get, force_download=True)))
    if is_same(file, path):
        return path
    path.resolve().unlink()  # or from_pretrained would take it without a look
    path.unlink(missing_ok=True)
    raise UserError(
        f"{file.path} is not what the hub says it holds",
        where=source,
        fix="it decayed there, or on the way: push it again",
    )
