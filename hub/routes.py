"""The calls of the Hub that its client makes, each a function of a request; the table at the end names them."""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import yaml

from hub.messages import Answer, Request, as_size, as_text, reading
from hub.storage import KINDS, MAIN, Commit, File, Refused, Repo, check_path, git_oid, large, pointer

PAGE = 1000
LARGE_BYTES = 10 << 20
"""From here on a text, too, goes by LFS."""
LARGEST_CARD, LARGEST_FRONT_MATTER = 1 << 20, 1 << 16
"""Bytes that are looked at for whoever asks, since the Hub's client sends no token with a card. 64 KiB of YAML take a
second."""

# ------------------------------------------------------------------------------------------------ who and which


def whoami(request: Request) -> Answer:
    """Say whose token it is."""
    if request.user is None:
        return Answer({"type": "user", "name": "anyone", "fullname": "anyone", "orgs": [], "auth": {"type": "open"}})
    token = {"displayName": request.user.name, "role": request.user.role}
    names = {"name": request.user.name, "fullname": request.user.name}
    return Answer({"type": "user", **names, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})


def create(request: Request) -> Answer:
    """Make a repository. Of one that is there the address is told with the refusal, as clients expect."""
    kind, id_, private = _named(request)
    url = f"{request.base}/{'' if kind == 'models' else f'{kind}/'}{id_}"
    try:
        request.storage.create(kind, id_, private=private, author=_author(request))
    except Refused as error:
        if error.status != 409:
            raise
        return Answer({"error": error.message, "url": url}, 409)
    return Answer({"url": url, "name": id_})


def delete(request: Request) -> Answer:
    """Take a repository away."""
    kind, id_, _ = _named(request)
    request.storage.delete(request.storage.open(kind, id_))
    return Answer({})


def _named(request: Request) -> tuple[str, str, bool]:
    """Kind and id of what shall be made or taken away, and whether it is to be private."""
    asked = request.json()
    with reading():
        kind, (before, _, name) = f"{asked.get('type') or 'model'}s", as_text(asked["name"]).rpartition("/")
        owner = as_text(asked.get("organization") or before or _author(request))
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
    if kind not in KINDS:
        raise Refused(400, f"this hub has {' and '.join(KINDS)} alone")
    request.guard.check_write(request.user, owner)
    return kind, f"{owner}/{name}", private


def _author(request: Request) -> str:
    return request.user.name if request.user else "anyone"


def listed(request: Request) -> Answer:
    """The repositories that the caller may see."""
    author, search = request.query.get("author", ""), request.query.get("search", "")
    found = []
    for repo in request.storage.all(request.names["kind"]):
        try:
            request.guard.check_read(request.user, repo)
        except Refused:
            continue
        if repo.id.startswith(f"{author}/" if author else "") and search in repo.id:
            found.append(_about(repo, repo.find(MAIN)))
    return Answer(found)


def about(request: Request) -> Answer:
    """One repository at a revision."""
    repo = request.repo
    return Answer(_about(repo, repo.find(request.names.get("revision", MAIN)), files=True))


def _about(repo: Repo, commit: Commit, *, files: bool = False) -> dict[str, Any]:
    names = {"_id": repo.id, "id": repo.id, "modelId": repo.id, "author": repo.id.partition("/")[0]}
    state: dict[str, Any] = {"private": repo.state.private, "gated": False, "disabled": False, "tags": []}
    if files:
        state["siblings"] = [
            {"rfilename": path, "blobId": file.oid, "size": file.size} | _large(file, "sha256")
            for path, file in commit.files.items()
        ]
    return names | state | {"sha": commit.id, "lastModified": commit.date, "createdAt": commit.date}


def _large(file: File, name: str) -> dict[str, Any]:
    size = len(pointer(file.sha256, file.size))
    return {"lfs": {name: file.sha256, "size": file.size, "pointerSize": size}} if file.lfs else {}


# ------------------------------------------------------------------------------------------------------ reading


def tree(request: Request) -> Answer:
    """Files and folders below a path, page by page."""
    commit, below = request.repo.find(request.names["revision"]), request.names.get("path", "").rstrip("/")
    entries = _entries(commit, below, deep=request.query.get("recursive", "").lower() in ("1", "true"))
    if below and not entries:
        raise Refused(404, f"no such folder: {below}", code="EntryNotFound")
    with reading():
        page, start = min(int(request.query.get("limit", PAGE)), PAGE), int(request.query.get("cursor", 0))
    headers = {}
    if start + page < len(entries):
        more = urlencode({**request.query, "cursor": start + page})
        names = [request.names["kind"], request.names["repo"], "tree", quote(request.names["revision"], safe="")]
        path = "/".join([*names, quote(below)]).rstrip("/")
        headers["Link"] = f'<{request.base}/api/{path}?{more}>; rel="next"'
    return Answer(entries[start : start + page], headers=headers)


def _entries(commit: Commit, below: str, *, deep: bool) -> list[dict[str, Any]]:
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        parts = path.removeprefix(prefix).split("/")
        if not path.startswith(prefix):
            continue
        for end in range(1, len(parts) if deep else min(2, len(parts))):
            folder = prefix + "/".join(parts[:end])
            entries[folder] = {"type": "directory", "oid": git_oid(folder.encode()), "size": 0, "path": folder}
        if deep or len(parts) == 1:
            entries[path] = _entry(path, file)
    return [entries[path] for path in sorted(entries)]


def _entry(path: str, file: File) -> dict[str, Any]:
    return {"type": "file", "oid": file.oid, "size": file.size, "path": path} | _large(file, "oid")


def paths_info(request: Request) -> Answer:
    """What stands at some paths; those where nothing does are left out."""
    commit, found = request.repo.find(request.names["revision"]), []
    is_form = "form" in request.headers.get("Content-Type", "")  # as the client sends it
    content = request.content()
    with reading():
        asked = parse_qs(content.decode()) if is_form else json.loads(content or b"{}")
        paths = [as_text(path) for path in asked.get("paths", [])]
    for path in paths:
        if file := commit.files.get(path):
            found.append(_entry(path, file))
        elif any(name.startswith(f"{path}/") for name in commit.files):
            found.append({"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path})
    return Answer(found)


def refs(request: Request) -> Answer:
    """Branches and tags."""
    state = request.repo.state

    def shown(names: Mapping[str, str], where: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": id_} for name, id_ in names.items()]

    return Answer({"branches": shown(state.branches, "heads"), "tags": shown(state.tags, "tags"), "converts": []})


def commits(request: Request) -> Answer:
    """What led to a revision, newest first."""
    history = request.repo.history(request.names["revision"])
    return Answer(
        [
            {"id": c.id, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in history
        ]
    )


def resolve(request: Request) -> Answer:
    """A file, or the part of it that a Range header names."""
    repo = request.repo
    commit = repo.find(request.names["revision"])
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    file = commit.files.get(request.names["path"])
    if file is None:
        error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Answer({"error": "Entry not found"}, 404, headers | error)
    headers |= {"ETag": f'"{file.etag}"', "Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    if file.lfs:
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    path = repo.path_of(file.sha256)
    if repo.size_of(file.sha256) != file.size:
        raise Refused(500, f"{request.names['path']} was changed on the hub's disk")
    if (asked := _range(request.headers.get("Range", ""), file.size)) is None:
        return Answer(headers=headers, file=path, length=file.size)
    start, end = asked
    if start >= end:
        return Answer({"error": "no such range"}, 416, headers | {"Content-Range": f"bytes */{file.size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    return Answer(status=206, headers=headers, file=path, start=start, length=end - start)


def _range(header: str, size: int) -> tuple[int, int] | None:
    """Start and end of the one range that is asked for; None for the whole file, as for several."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    with reading():  # of a number with thousands of digits Python makes none
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(int(last) + 1, size) if last else size


# ------------------------------------------------------------------------------------------------------ writing


def validate_card(request: Request) -> Answer:
    """Say whether a card's front matter is YAML, unless it is too long to be looked at for anybody."""
    asked = request.json(longest=LARGEST_CARD)
    with reading():
        found = re.match(r"---\r?\n(.*?)\r?\n---", as_text(asked.get("content", "")), re.DOTALL)
    front = found[1] if found else ""
    if len(front) > LARGEST_FRONT_MATTER:
        return Answer({"errors": [], "warnings": [{"message": "a long front matter, which was not looked at"}]})
    try:
        with reading():  # of a date such as 2026-02-30 comes a ValueError, of !!bool x a KeyError
            yaml.safe_load(front)
    except yaml.YAMLError as error:
        return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Answer({"errors": [], "warnings": []})


def preupload(request: Request) -> Answer:
    """Say of each file how it shall come, and what is there in its place."""
    commit, told, asked = request.repo.find(request.names["revision"]), [], request.json()
    with reading():
        files = [
            (check_path(as_text(file["path"])), as_size(file["size"]), base64.b64decode(file.get("sample") or ""))
            for file in asked["files"]
        ]
    for path, size, sample in files:
        mode, there = "lfs" if _is_large(size, sample) else "regular", commit.files.get(path)
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag})
    return Answer({"files": told})


def _is_large(size: int, sample: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(sample)  # a character may be cut off at the end
    except UnicodeDecodeError:
        return True
    return size > LARGE_BYTES or "\0" in text


def commit(request: Request) -> Answer:
    """Change a branch, wholly or not at all; the files' bytes are kept before it moves."""
    if "create_pr" in request.query:
        raise Refused(501, "this hub has no pull requests")
    repo, parent, words, changes = request.repo, None, {"title": "", "message": ""}, list[Change]()
    for key, value in _lines(request):
        if key != "header":
            changes.append(_CHANGES[key](repo, value))
            continue
        with reading():
            parent = value.get("parentCommit") and as_text(value["parentCommit"])
            words = {name: as_text(value.get(said, "")) for name, said in _WORDS.items()}

    def change(files: dict[str, File]) -> None:
        for apply in changes:
            apply(files)

    made = repo.commit(request.names["revision"], change, parent=parent, author=_author(request), **words)
    url = f"{request.base}/{'' if repo.kind == 'models' else f'{repo.kind}/'}{repo.id}/commit/{made.id}"
    return Answer({"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""})


def _lines(request: Request) -> Iterator[tuple[str, Any]]:
    while line := request.body.readline():
        if line.strip():
            with reading():
                entry = json.loads(line)
                key, value = as_text(entry["key"]), entry["value"]
            if key != "header" and key not in _CHANGES:
                raise Refused(400, f"unknown in a commit: {key!r}")
            yield key, value


Change = Callable[[dict[str, File]], None]


def _put(path: str, file: File) -> Change:
    return lambda files: files.update({path: file})


def _put_small(repo: Repo, value: Any) -> Change:
    with reading():
        path, text = check_path(as_text(value["path"])), as_text(value["content"])
        content = base64.b64decode(text, validate=True) if value.get("encoding") == "base64" else text.encode()
    sha256, size = repo.keep(BytesIO(content))
    return _put(path, File(sha256, size, git_oid(content), lfs=False))


def _put_large(repo: Repo, value: Any) -> Change:
    with reading():
        path, sha256, said = check_path(as_text(value["path"])), as_text(value["oid"]), value.get("size")
    size = repo.size_of(sha256)
    if size is None or said not in (None, size):
        raise Refused(422, f"the bytes of {path} have not arrived")
    return _put(path, large(sha256, size))


def _take_file(_: Repo, value: Any) -> Change:
    with reading():
        path = as_text(value["path"])

    def change(files: dict[str, File]) -> None:
        if files.pop(path, None) is None:
            raise Refused(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")

    return change


def _take_folder(_: Repo, value: Any) -> Change:
    with reading():
        folder = as_text(value["path"]).rstrip("/") + "/"

    def change(files: dict[str, File]) -> None:
        for path in [path for path in files if path.startswith(folder)]:
            del files[path]

    return change


_WORDS = {"title": "summary", "message": "description"}
"""Of a commit: as it keeps them, and as the client says them."""
_CHANGES: dict[str, Callable[[Repo, Any], Change]] = {
    "file": _put_small,
    "lfsFile": _put_large,
    "deletedFile": _take_file,
    "deletedFolder": _take_folder,
}


def set_branch(request: Request) -> Answer:
    """Make a branch."""
    asked = request.json()
    with reading():
        start = as_text(asked.get("startingPoint") or MAIN)
    request.repo.set_ref("branches", request.names["name"], start)
    return Answer({})


def set_tag(request: Request) -> Answer:
    """Make a tag."""
    asked = request.json()
    with reading():
        tag = as_text(asked["tag"])
    request.repo.set_ref("tags", tag, request.names["revision"])
    return Answer({})


def drop_branch(request: Request) -> Answer:
    """Take a branch away; its commits stay."""
    request.repo.set_ref("branches", request.names["name"], None)
    return Answer({})


def drop_tag(request: Request) -> Answer:
    """Take a tag away."""
    request.repo.set_ref("tags", request.names["name"], None)
    return Answer({})


# -------------------------------------------------------------------------------------------------- large files


def lfs_batch(request: Request) -> Answer:
    """Say where large files are to be sent."""
    asked = request.json()
    with reading():
        operation = asked.get("operation")
        objects = [(as_text(o["oid"]), as_size(o["size"])) for o in asked.get("objects", [])]
    if operation != "upload":
        raise Refused(501, "large files are read by /resolve/")
    return Answer(request.uploads.offer(request.repo, objects, request.base))


def lfs_upload(request: Request) -> Answer:
    """Take a large file, or a part of one. The address is the permission."""
    sha256 = request.uploads.take(request.repo, request.names["oid"], dict(request.query), request.body)
    return Answer({}, headers={"ETag": f'"{sha256}"'})


def lfs_join(request: Request) -> Answer:
    """Make a large file of its parts. The address is the permission."""
    request.uploads.join(request.repo, request.names["oid"], dict(request.query))
    return Answer({})


def lfs_verify(request: Request) -> Answer:
    """Say whether a large file has arrived."""
    asked = request.json()
    with reading():
        sha256, size = as_text(asked["oid"]), as_size(asked["size"])
    if request.repo.size_of(sha256) != size:
        raise Refused(404, "it has not arrived")
    return Answer({})


# ----------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Route:
    """A call: its methods, the shape of its path, what the caller must be allowed, and what answers it."""

    methods: tuple[str, ...]
    path: re.Pattern[str]
    needs: str
    answer: Callable[[Request], Answer]


_PARTS = {"repo": "[^/]+/[^/]+?", "kind": "models|datasets", "path": ".+"}


def _route(methods: str, path: str, needs: str, answer: Callable[[Request], Answer]) -> Route:
    pattern = re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{_PARTS.get(found[1], '[^/]+')})", path)
    return Route(tuple(methods.split()), re.compile(pattern), needs, answer)


ROUTES: Iterable[Route] = (
    _route("GET", "/api/whoami-v2", "token", whoami),
    _route("POST", "/api/repos/create", "token", create),  # they look for themselves: the body says which repository
    _route("DELETE", "/api/repos/delete", "token", delete),
    _route("POST", "/api/validate-yaml", "nothing", validate_card),
    _route("GET", "/api/{kind}", "nothing", listed),
    _route("GET", "/api/{kind}/{repo}", "read", about),
    _route("GET", "/api/{kind}/{repo}/revision/{revision}", "read", about),
    _route("GET", "/api/{kind}/{repo}/tree/{revision}", "read", tree),
    _route("GET", "/api/{kind}/{repo}/tree/{revision}/{path}", "read", tree),
    _route("POST", "/api/{kind}/{repo}/paths-info/{revision}", "read", paths_info),
    _route("GET", "/api/{kind}/{repo}/refs", "read", refs),
    _route("GET", "/api/{kind}/{repo}/commits/{revision}", "read", commits),
    _route("POST", "/api/{kind}/{repo}/preupload/{revision}", "write", preupload),
    _route("POST", "/api/{kind}/{repo}/commit/{revision}", "write", commit),
    _route("POST", "/api/{kind}/{repo}/branch/{name}", "write", set_branch),
    _route("DELETE", "/api/{kind}/{repo}/branch/{name}", "write", drop_branch),
    _route("POST", "/api/{kind}/{repo}/tag/{revision}", "write", set_tag),
    _route("DELETE", "/api/{kind}/{repo}/tag/{name}", "write", drop_tag),
    _route("PUT", "/lfs/upload/{kind}/{repo}/{oid}", "address", lfs_upload),
    _route("POST", "/lfs/upload/{kind}/{repo}/{oid}", "address", lfs_join),
    _route("POST", "/lfs/verify/{kind}/{repo}", "write", lfs_verify),
    _route("POST", "/(?:(?P<kind>datasets)/)?{repo}.git/info/lfs/objects/batch", "write", lfs_batch),
    _route("GET HEAD", "/(?:(?P<kind>datasets)/)?{repo}/resolve/{revision}/{path}", "read", resolve),
)
"""needs: nothing | token | read | write | address, which is signed and stands for itself."""
