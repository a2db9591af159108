"""A hub's repositories in a folder. No name of a user's becomes a path: files lie by hash, names lie in JSON.

    <root>/<models|datasets>/<owner>/<name>/
        repo.json            private or not, and which commit each branch and tag is at
        commits/<id>.json    a whole tree: path -> hash, size; with parent, author, message
        objects/<sha256>     what the paths stand for, kept for this repository alone
        incoming/            what is arriving

A commit counts once ``repo.json`` names it, and that file is replaced in one rename. See ADR 18.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from sources.files import sync

KINDS = ("models", "datasets")
MAIN = "main"
_NAME = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?", re.ASCII)
_LONGEST_ID = 96
_REF = re.compile(r"(?!.*(\.\.|//|@\{|\.lock(/|$)))[^\s~^:?*\[\\\x00-\x20\x7f./-][^\s~^:?*\[\\\x00-\x20\x7f]*(?<![./])")
_NO_PATH = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PIECE = 1 << 20


class Refused(Exception):
    """What a hub will not do.

    Args:
        status: As HTTP has it.
        message: A sentence.
        code: The Hub's word, which clients go by: RepoNotFound, RevisionNotFound, EntryNotFound.
    """

    def __init__(self, status: int, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Source(Protocol):
    """Bytes to be read piece by piece; none is the end."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most so many."""
        ...


@dataclass(frozen=True)
class File:
    """What a path stands for in a commit."""

    sha256: str
    size: int
    oid: str
    """git's name: of the bytes, or of the pointer where it is large."""
    lfs: bool

    @property
    def etag(self) -> str:
        """As the Hub has it, and clients keep it."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A whole tree, and where it came from."""

    id: str
    """40 hex digits: the hash of all the rest, as it lies on the disk."""
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass(frozen=True)
class State:
    """All of a repository that may change."""

    private: bool
    branches: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)


def git_oid(content: bytes) -> str:
    """What git calls these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def large(sha256: str, size: int) -> File:
    """A file as git-lfs has it."""
    return File(sha256, size, git_oid(pointer(sha256, size)), lfs=True)


def check_owner(name: str) -> str:
    """Return the name of who has repositories as it is.

    Raises:
        Refused: No client would take it.
    """
    if not _NAME.fullmatch(name):
        raise Refused(400, f"no name of an owner: {name!r}")
    return name


def is_ref(name: str) -> bool:
    """Whether a branch or tag may be called that."""
    return bool(_REF.fullmatch(name)) and not _COMMIT.fullmatch(name)


def check_path(path: str) -> str:
    """Return a path inside a repository as it is.

    Raises:
        Refused: It would lead out of the folder that it is unpacked into, or into ``.git``.
    """
    parts = path.split("/")
    bad = any(part in ("", ".", "..") or part.lower() == ".git" for part in parts)
    if bad or ":" in parts[0] or _NO_PATH.search(path) or len(path) > 1000:
        raise Refused(400, f"no path inside a repository: {path!r}")
    return path


class Repo:
    """One repository in its folder."""

    def __init__(self, kind: str, id_: str, folder: Path, lock: Lock) -> None:
        self.kind, self.id, self.folder = kind, id_, folder
        self._lock = lock

    @property
    def state(self) -> State:
        """As it is now."""
        return State(**json.loads((self.folder / "repo.json").read_bytes()))

    def find(self, revision: str) -> Commit:
        """The commit of a branch, of a tag, or of this id.

        Raises:
            Refused: There is none.
        """
        state = self.state
        id_ = state.branches.get(revision) or state.tags.get(revision) or revision
        path = self.folder / "commits" / f"{id_}.json"
        if not _COMMIT.fullmatch(id_) or not path.is_file():
            raise Refused(404, f"no such revision: {revision}", code="RevisionNotFound")
        commit = path.read_bytes()
        if _commit_id(commit) != id_:
            raise Refused(500, f"the commit {id_} was changed on the hub's disk")
        return _parsed(commit)

    def history(self, revision: str) -> Iterator[Commit]:
        """From this commit back to the first."""
        commit: Commit | None = self.find(revision)
        while commit is not None:
            yield commit
            commit = self.find(commit.parent) if commit.parent else None

    def path_of(self, sha256: str) -> Path:
        """Where bytes with this hash lie, or would."""
        if not _SHA256.fullmatch(sha256):
            raise Refused(400, "no sha256")
        return self.folder / "objects" / sha256

    def size_of(self, sha256: str) -> int | None:
        """How many bytes have arrived with this hash; None if they have not."""
        path = self.path_of(sha256)
        return path.stat().st_size if path.is_file() else None

    def keep(
        self, source: Source, *, size: int | None = None, sha256: str | None = None, target: Path | None = None
    ) -> tuple[str, int]:
        """Store bytes whole or not at all.

        Args:
            source: Read to its end.
            size: That must arrive; None takes any.
            sha256: That they must have.
            target: Where; None is with the other objects, under their hash.

        Returns:
            Their hash and how many they are.

        Raises:
            Refused: They are others than was said.
        """
        aside, digest, count = self.incoming(secrets.token_hex(8)), hashlib.sha256(), 0
        try:
            with aside.open("xb") as file:
                while piece := source.read(_PIECE):
                    digest.update(piece)
                    count += len(piece)
                    file.write(piece)
            if size not in (None, count) or sha256 not in (None, digest.hexdigest()):
                raise Refused(
                    422, f"{count} bytes with sha256 {digest.hexdigest()} arrived, {size} of {sha256} were said"
                )
            target = target or self.path_of(digest.hexdigest())
            sync(aside)
            aside.replace(target)
            sync(target.parent)
        finally:
            aside.unlink(missing_ok=True)
        return digest.hexdigest(), count

    def incoming(self, name: str) -> Path:
        """Where something of this name may arrive."""
        folder = self.folder / "incoming"
        folder.mkdir(exist_ok=True)
        return folder / name

    def commit(
        self, branch: str, change: Callable[[dict[str, File]], None], *, parent: str | None, **words: str
    ) -> Commit:
        """Put a changed tree on a branch.

        Args:
            change: Makes the new files of a copy of the present ones.
            parent: That the branch must be at; None takes any.
            words: title, message and author.

        Returns:
            The new commit; the present one where nothing changes.

        Raises:
            Refused: No such branch, or it has moved on.
        """
        with self._lock:
            state = self.state
            if branch not in state.branches:
                raise Refused(404, f"no such branch: {branch}", code="RevisionNotFound")
            head = self.find(branch)
            if parent not in (None, head.id):
                raise Refused(412, f"the branch {branch} is at {head.id}, and no longer at {parent}")
            files = dict(head.files)
            change(files)
            _refuse_files_in_files(files)
            if files == head.files:
                return head
            made = self._add(head.id, files, **words)
            self._write(replace(state, branches=state.branches | {branch: made.id}))
            return made

    def set_ref(self, kind: str, name: str, revision: str | None) -> None:
        """Make a branch or tag at a revision, or take it away.

        Args:
            kind: ``branches`` or ``tags``.
            revision: None takes it away.

        Raises:
            Refused: It is there already, or is not, or is no name.
        """
        with self._lock:
            state = self.state
            refs = dict(getattr(state, kind))
            if revision is None:
                if name not in refs or (kind, name) == ("branches", MAIN):
                    raise Refused(
                        404, f"none of the {kind} that can be deleted is called {name}", code="RevisionNotFound"
                    )
                del refs[name]
            elif name in refs:
                raise Refused(409, f"one of the {kind} is called {name} already")
            elif not is_ref(name):
                raise Refused(400, f"no name for one of the {kind}: {name!r}")
            else:
                refs[name] = self.find(revision).id
            changed: dict[str, Any] = {kind: refs}
            self._write(replace(state, **changed))

    def begin(self, *, private: bool, author: str) -> None:
        """Make the folder's content, with an empty first commit."""
        for name in ("commits", "objects", "incoming"):
            (self.folder / name).mkdir(parents=True)
        first = self._add(None, {}, title="initial commit", message="", author=author)
        self._write(State(private, {MAIN: first.id}))

    def _add(self, parent: str | None, files: Mapping[str, File], **words: str) -> Commit:
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        tree = {path: vars(file) for path, file in files.items()}
        content = _json({"parent": parent, "date": date, "files": tree, **words})
        self._replace(self.folder / "commits" / f"{_commit_id(content)}.json", content)
        return _parsed(content)

    def _write(self, state: State) -> None:
        self._replace(self.folder / "repo.json", _json(asdict(state)))

    def _replace(self, path: Path, content: bytes) -> None:
        write_aside(path, content, aside=self.incoming(secrets.token_hex(8)))


class Storage:
    """All repositories below a folder.

    Args:
        root: Made where it is not there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = Lock()
        for kind in KINDS:
            (root / kind).mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Delete what a kill left half-arrived or half-deleted. Nobody else may be at work here."""
        incoming = [repo.folder / "incoming" for kind in KINDS for repo in self.all(kind)]
        for left in (*incoming, *self.root.glob(".aside-*")):
            shutil.rmtree(left, ignore_errors=True)

    def create(self, kind: str, id_: str, *, private: bool, author: str) -> Repo:
        """Make a repository, whole or not at all.

        Raises:
            Refused: It is there, or that is no name.
        """
        target = self._folder(kind, id_)
        with self._aside() as aside:
            Repo(kind, id_, aside, self._lock).begin(private=private, author=author)
            with self._lock:
                if target.exists():
                    raise Refused(409, f"{id_} is there already")
                target.parent.mkdir(exist_ok=True)
                aside.rename(target)
            sync(target.parent)
        return self.open(kind, id_)

    def open(self, kind: str, id_: str) -> Repo:
        """Find a repository.

        Raises:
            Refused: There is none.
        """
        folder = self._folder(kind, id_)
        if not (folder / "repo.json").is_file():
            raise Refused(404, f"no such repository: {id_}", code="RepoNotFound")
        return Repo(kind, id_, folder, self._lock)

    def delete(self, repo: Repo) -> None:
        """Take a repository away, at once as seen from outside."""
        with self._aside() as aside, self._lock:
            repo.folder.rename(aside)

    def all(self, kind: str) -> list[Repo]:
        """Every repository of a kind, by name."""
        folders = sorted(path.parent for path in (self.root / kind).glob("*/*/repo.json"))
        return [Repo(kind, folder.relative_to(self.root / kind).as_posix(), folder, self._lock) for folder in folders]

    def _folder(self, kind: str, id_: str) -> Path:
        owner, _, name = id_.partition("/")
        if not _NAME.fullmatch(name) or name.endswith(".git") or len(id_) > _LONGEST_ID:
            raise Refused(400, f"no name of a repository: {id_!r}; such as owner/name")
        return self.root / kind / check_owner(owner) / name

    @contextmanager
    def _aside(self) -> Iterator[Path]:
        aside = self.root / f".aside-{secrets.token_hex(8)}"
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def write_aside(path: Path, content: bytes, *, aside: Path) -> None:
    """Write a small file whole or not at all, by way of another, and wait until it is on the disk."""
    aside.write_bytes(content)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def _commit_id(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _parsed(commit: bytes) -> Commit:
    content = json.loads(commit)
    files = {path: File(**file) for path, file in content["files"].items()}
    return Commit(**content | {"id": _commit_id(commit), "files": files})


def _refuse_files_in_files(files: Mapping[str, File]) -> None:
    for path in files:
        parts = path.split("/")
        for end in range(1, len(parts)):
            if (above := "/".join(parts[:end])) in files:
                raise Refused(400, f"{above!r} is a file, so that {path!r} can not be in it")


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
