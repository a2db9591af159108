"""The Hub's own client as we need it: plain LFS where there is no Xet, calls made again, faults as sentences."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from heedful import UserError, __version__
from hub.storage import git_oid
from sources.files import sha256_of

TRANSIENT = (429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts."""
_BEFORE_DOWNLOAD = (LocalEntryNotFoundError, ValueError)
"""What the client makes of a hub that fails when asked what a file is. The first is an OSError, as those of disks."""
ANSWER_SECONDS = 10
TELLING = ("config.json", "tokenizer_config.json")
"""One of them is in the cache if anything of a model or of a tokenizer alone is."""
Given = TypeVar("Given")
logger = logging.getLogger("heedful.hub.client")


def connect() -> HfApi:
    """The client for HF_ENDPOINT, with the token of HF_TOKEN or `hf auth login`.

    With Xet installed the client asks every hub for it and never falls back. ``HF_HUB_DISABLE_XET`` is read once, when
    the library is imported, which may be long ago: so the value is set that it was read into.
    """
    if constants.ENDPOINT != "https://huggingface.co":
        constants.HF_HUB_DISABLE_XET = True
    return HfApi(library_name="heedful", library_version=__version__)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may go through in a moment. Large files are none of these: the client was patient."""
    if isinstance(error, _BEFORE_DOWNLOAD) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, httpx2.TransportError)


def _cause(error: BaseException) -> BaseException:
    """The client packs what goes wrong with a large file, or before a download, into other errors."""
    packed = isinstance(error, (RuntimeError, *_BEFORE_DOWNLOAD)) and isinstance(error.__cause__, httpx2.HTTPError)
    return error.__cause__ if packed and error.__cause__ is not None else error


def _reason(error: BaseException) -> str:
    """A status, or a name, of what is transient."""
    error = _cause(error)
    return str(error.response.status_code) if isinstance(error, HfHubHTTPError) else type(error).__name__


def retried(call: Callable[[], Given], *, between: Callable[[], Given | None] = lambda: None) -> Given:
    """Call again while the fault is a passing one, with longer and longer waits.

    Args:
        call: Safe to repeat.
        between: Looks before each repetition whether the call went through and only its answer was lost; what it
            gives, if anything, is taken for that answer.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("%s can not serve this (%s): asked again in %g s", constants.ENDPOINT, _reason(error), wait)
        time.sleep(wait)
        if (done := between()) is not None:
            return done
    return call()


def is_same(file: RepoFile, path: Path) -> bool:
    """Whether a file here is what the hub says it holds: by sha256 where it is large, else by git's hash."""
    if file.lfs is not None:
        return file.lfs.sha256 == sha256_of(path)
    return file.blob_id == git_oid(path.read_bytes())


def listing(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    """Every file of a revision, by its path."""
    entries = retried(lambda: list(api.list_repo_tree(repo, recursive=True, revision=revision)))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def cached_instead(name: str, revision: str | None) -> str | None:
    """Say so where a hub does not answer and the client would take from its cache, without a word, what it can.

    Args:
        name: Of a model on the hub.

    Returns:
        None where the hub answers, be it with a refusal, or nothing of the model is in the cache.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    api = connect()
    try:
        found = next(
            filter(_is_path, (try_to_load_from_cache(name, file, revision=revision) for file in TELLING)), None
        )
    except HFValidationError:  # no name that a hub could have: loading says so
        return None
    if found is None:
        return None
    try:
        api.model_info(name, revision=revision, timeout=ANSWER_SECONDS)
    except (HfHubHTTPError, httpx2.TransportError) as error:
        if not is_transient(error):
            return None
        return (
            f"! {api.endpoint} does not answer ({_reason(error)}): {name} is taken from the cache, as it was at "
            f"{Path(str(found)).parent.name}; HF_HUB_OFFLINE=1 does not ask"
        )
    return None


def _is_path(found: object) -> bool:
    """The client's cache also remembers, by an object, that there was no such file."""
    return isinstance(found, str)


def go_offline() -> None:
    """Ask no hub for anything more in this process: from a hub that comes and goes a model would be half another."""
    constants.HF_HUB_OFFLINE = True


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what a hub or the way to it may refuse into one message.

    Raises:
        UserError: For all of those.
    """
    try:
        yield
    except (httpx2.HTTPError, OfflineModeIsEnabled, RuntimeError, *_BEFORE_DOWNLOAD) as error:
        if (told := _told(_cause(error))) is None:
            raise
        raise UserError(told[0], where=where, fix=told[1]) from error


def _told(error: BaseException) -> tuple[str, str] | None:
    """What is wrong, and what to do about it."""
    for kind, told in KINDS.items():
        if isinstance(error, kind):
            return told
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return STATUSES.get(status, (f"the hub answers {status}: {error.server_message or ''}", "try again later"))
    if isinstance(error, httpx2.HTTPError):
        return f"no way to the hub {constants.ENDPOINT}: {error}", "see HF_ENDPOINT and the network"
    return None


KINDS: dict[type[Exception], tuple[str, str]] = {
    OfflineModeIsEnabled: ("HF_HUB_OFFLINE is set", "unset it, or take a folder: file:///..."),
    HFValidationError: ("no name of a repository", "give owner/name, or file:///folder"),
    RevisionNotFoundError: ("no such revision", "give a branch, a tag or a commit: --revision main"),
    RepositoryNotFoundError: (
        "no such repository, or a private one of somebody else",
        "set HF_TOKEN, or `hf auth login`",
    ),
    LocalEntryNotFoundError: ("an answer that says nothing of the file", "see HF_ENDPOINT: is it a hub?"),
}
STATUSES = {
    401: ("the hub does not take this token, or wants one", "set HF_TOKEN, or `hf auth login`"),
    403: ("the token may not do that", "take one with the role `write`, of the owner of the repository"),
    412: ("somebody else has pushed meanwhile; nothing of this push is visible", "look at theirs, and push again"),
}
