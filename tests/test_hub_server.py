"""The loopback hub: the real client end to end, and everybody who should not get through."""

import hashlib
import http.client
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hub_server import PIECE, client, hub_on_loopback
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import save_body

from heedful import UserError
from hub import routes, storage
from hub.server import opened
from hub.storage import File, Refused, Repo, Storage, check_path

ROOT = Path(__file__).parent.parent
ME = ("me", "write")


@pytest.fixture
def hub(tmp_path):
    with hub_on_loopback(tmp_path / "hub", ME, ("you", "write"), ("me", "read")) as (server, *tokens):
        server.tokens = tokens
        yield server


@pytest.fixture
def api(hub, monkeypatch):
    return client(monkeypatch, hub, hub.tokens[0])


def call(hub, method, path, *, token=None, body=None, **headers):
    """A call as it is, with a path that no client would send."""
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def add(path, content=b"x"):
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def shas(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files_in(folder)}


def files_in(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


# ---------------------------------------------------------------------------------------------- the real client


def test_what_is_uploaded_comes_back(api, hub, tmp_path):
    files = {"a b ü.txt": b"hi", "empty": b"", "deep/er/m.bin": os.urandom(3 * PIECE + 1), "one.bin": b"\0" * 99}
    for name, content in files.items():
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_bytes(content)
    assert api.create_repo("me/x").endswith("/me/x")
    api.create_repo("me/x", exist_ok=True)
    first = api.upload_folder(repo_id="me/x", folder_path=tmp_path / "given").oid
    assert any("POST /lfs/upload" in c for c in hub.calls), "in pieces"
    hub.calls.clear()
    assert api.upload_folder(repo_id="me/x", folder_path=tmp_path / "given").oid == first, "nothing changed"
    assert not any(word in c for c in hub.calls for word in ("PUT", "/commit/"))
    got = Path(api.snapshot_download("me/x", cache_dir=tmp_path / "cache"))
    assert shas(got) == shas(tmp_path / "given")
    assert not api.verify_repo_checksums("me/x", cache_dir=tmp_path / "cache").mismatches
    assert [c.title for c in api.list_repo_commits("me/x")][-1] == "initial commit"
    assert [m.id for m in api.list_models(author="me")] == ["me/x"]


def test_branches_tags_and_deletion(api):
    api.create_repo("me/x", private=True)
    first = api.create_commit("me/x", [add("a/1"), add("a/2"), add("b")], commit_message="three").oid
    api.create_tag("me/x", tag="v1")
    api.create_branch("me/x", branch="more/one", revision="v1")
    api.create_commit("me/x", [CommitOperationDelete("a/")], commit_message="fewer", revision="more/one")
    assert api.list_repo_files("me/x", revision="more/one") == ["b"]
    assert api.list_repo_files("me/x", revision="v1") == api.list_repo_files("me/x") == ["a/1", "a/2", "b"]
    refs = api.list_repo_refs("me/x")
    assert [(r.name, r.target_commit) for r in refs.tags] == [("v1", first)]
    assert {r.name for r in refs.branches} == {"main", "more/one"}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("me/x", tag="v1")
    api.delete_tag("me/x", tag="v1")
    api.delete_branch("me/x", branch="more/one")
    api.delete_file("b", repo_id="me/x")
    assert {f.path for f in api.list_repo_tree("me/x")} == {"a"}
    assert [f.path for f in api.get_paths_info("me/x", ["a", "a/2", "b"])] == ["a", "a/2"]
    assert api.model_info("me/x").private
    api.delete_repo("me/x")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/x")


def test_a_branch_that_has_moved_on_is_left_alone(api):
    api.create_repo("me/x")
    start = api.model_info("me/x").sha
    mine = api.create_commit("me/x", [add("a")], commit_message="mine", parent_commit=start).oid
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/x", [add("b")], commit_message="late", parent_commit=start)
    assert api.model_info("me/x").sha == mine


def test_a_tree_comes_in_pages(api, monkeypatch):
    monkeypatch.setattr(routes, "PAGE", 3)
    names = sorted(f"d{i % 2}/f{i:02d}" for i in range(11))
    api.create_repo("me/x")
    api.create_commit("me/x", [add(n) for n in names], commit_message="many")
    assert sorted(f.path for f in api.list_repo_tree("me/x", recursive=True) if hasattr(f, "size")) == names
    assert len(list(api.list_repo_tree("me/x", "d0"))) == 6


def test_parts_of_a_file_are_served(hub, api):
    content = os.urandom(1000)
    api.create_repo("me/x")
    api.create_commit("me/x", [add("m.bin", content), add("t", b"text")], commit_message="some")
    path = "/me/x/resolve/main/m.bin"
    for asked, expected in {
        "0-9": content[:10],
        "990-": content[990:],
        "-5": content[-5:],
        "9-9999": content[9:],
    }.items():
        status, got, headers = call(hub, "GET", path, Range=f"bytes={asked}")
        assert (status, got) == (206, expected)
        assert headers["Content-Range"].endswith("/1000")
    assert call(hub, "GET", path, Range="bytes=1000-")[0] == 416
    status, got, headers = call(hub, "HEAD", path)
    assert (status, got, headers["Content-Length"]) == (200, b"", "1000")
    assert headers["ETag"] == headers["X-Linked-ETag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert "X-Linked-ETag" not in call(hub, "HEAD", "/me/x/resolve/main/t")[2]
    assert call(hub, "HEAD", "/me/x/resolve/main/none")[2]["X-Error-Code"] == "EntryNotFound"
    assert call(hub, "HEAD", "/me/x/resolve/none/t")[2]["X-Error-Code"] == "RevisionNotFound"


ECOSYSTEM = """
import sys
import datasets
from transformers import AutoModel, AutoTokenizer, pipeline
model = AutoModel.from_pretrained("me/model")
AutoTokenizer.from_pretrained("me/model")
model.push_to_hub("me/again")
assert AutoModel.from_pretrained("me/again").num_parameters() == model.num_parameters()
rows = datasets.load_dataset("me/rows", split="train")
assert next(iter(datasets.load_dataset("me/rows", split="train", streaming=True))) == rows[0] == {"text": "cat"}
rows.push_to_hub("me/more", private=True)
assert datasets.load_dataset("me/more", split="train")[:] == rows[:]
"""


@pytest.mark.slow
def test_libraries_open_by_repository_what_is_there(api, hub, tmp_path):
    save_body("bert", tmp_path / "model")
    api.create_repo("me/model")
    api.upload_folder(repo_id="me/model", folder_path=tmp_path / "model")
    api.create_repo("me/rows", repo_type="dataset")
    api.upload_file(repo_id="me/rows", repo_type="dataset", path_in_repo="train.csv", path_or_fileobj=b"text\ncat\n")
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.tokens[0], "HF_HOME": str(tmp_path / "home")}
    environment = os.environ | given | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", ECOSYSTEM], env=environment, check=True)


# ------------------------------------------------------------------------------------------ who does not get in


FORBIDDEN = (
    ("model_info", "me/secret"),
    ("create_commit", "me/open", [add("a")]),
    ("create_repo", "me/new"),
    ("delete_repo", "me/open"),
    ("create_branch", "me/open"),
)
EXTRA = {"create_commit": {"commit_message": "not mine"}, "create_branch": {"branch": "b"}}


def test_tokens_let_in_whom_they_name(api, hub, monkeypatch):
    _, yours, reading = hub.tokens
    api.create_repo("me/open")
    api.create_repo("me/secret", private=True)
    before = hub.storage.open("models", "me/open").state
    for token in (yours, None):
        other = client(monkeypatch, hub, token)
        assert other.model_info("me/open").id == "me/open"
        assert [m.id for m in other.list_models()] == ["me/open"]
        for name, *what in FORBIDDEN:
            with pytest.raises(HfHubHTTPError) as refused:
                getattr(other, name)(*what, **EXTRA.get(name, {}))
            assert refused.value.response.status_code in (401, 403, 404), name
    reader = client(monkeypatch, hub, reading)
    assert reader.model_info("me/secret").private
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("me/new")
    with pytest.raises(HfHubHTTPError, match="401"):
        client(monkeypatch, hub, "hf_of_another_hub").model_info("me/open")
    assert call(hub, "PUT", "/api/models/me/open", token=yours)[0] == 404
    assert {repo.id for repo in hub.storage.all("models")} == {"me/open", "me/secret"}
    assert hub.storage.open("models", "me/open").state == before


def test_tokens_are_kept_as_hashes(hub, tmp_path):
    kept = tmp_path / "hub/tokens.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert not any(token in kept.read_text() for token in hub.tokens)


ESCAPES = [
    "../x",
    "/etc/x",
    "a/../../x",
    "a\\..\\x",
    "a\0b",
    ".git/hooks/x",
    "a/.GIT/x",
    "",
    "a//b",
    "c:/x",
    "a/\n",
    ".",
]


@pytest.mark.fault("a path that leads out of a repository of the hub server", "refused")
@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leads_out_of_a_repository(path, hub, api, tmp_path):
    api.create_repo("me/x")
    before = shas(tmp_path)
    for key, extra in {
        "file": {"content": "eA==", "encoding": "base64"},
        "lfsFile": {"oid": "0" * 64, "size": 1},
    }.items():
        body = json.dumps({"key": key, "value": {"path": path} | extra})
        assert call(hub, "POST", "/api/models/me/x/commit/main", token=hub.tokens[0], body=body)[0] == 400
    assert shas(tmp_path) == before


@pytest.mark.parametrize("id_", ["../x", "me/..", "me/.git", "me/x.git", "a%2F..%2Fb/c", "me/a%00", "me/" + "a" * 99])
def test_no_name_of_a_repository_leads_out_of_the_hub(id_, hub):
    for path in (f"/api/models/{id_}", f"/{id_}/resolve/main/tokens.json", f"/api/models/{id_}/tree/main"):
        assert call(hub, "GET", path)[0] in (400, 404)
    body = json.dumps({"name": id_.partition("/")[2], "organization": id_.partition("/")[0]})
    assert call(hub, "POST", "/api/repos/create", token=hub.tokens[0], body=body)[0] in (400, 403)


@pytest.mark.parametrize("path", ["/tokens.json", "/models/me/x/repo.json", "/me/x/resolve/main/..%2F..%2Frepo.json"])
def test_the_hubs_own_files_are_not_served(path, hub, api):
    api.create_repo("me/x")
    assert call(hub, "GET", path)[0] == 404


def test_who_has_no_token_is_not_heard_out(hub):
    for method, path in (("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete")):
        assert call(hub, method, path, body="no JSON")[0] == 401
    assert call(hub, "POST", "/api/validate-yaml", body="x" * (routes.LARGEST_CARD + 1))[0] == 413


def test_who_is_refused_in_mid_sending_sees_why(hub):
    """More than the sockets' buffers take, so that a connection closed at once would break in the sending."""
    assert call(hub, "POST", "/api/validate-yaml", body="x" * (32 << 20))[0] == 413


def test_a_card_is_looked_at_without_a_token_as_the_client_asks(api, hub):
    ModelCard("---\nlicense: mit\n---\n# x").validate()
    for front, expected in {"a: [": 400, "a: 2026-02-30": 400, "!!bool x": 400, "[" * 2000: 400, "a: 1": 200}.items():
        body = json.dumps({"content": f"---\n{front}\n---"})
        assert call(hub, "POST", "/api/validate-yaml", body=body)[0] == expected
    body = json.dumps({"content": "---\n" + "- a: [\n" * 20_000 + "\n---"})
    status, said, _ = call(hub, "POST", "/api/validate-yaml", body=body)
    assert (status, b"not looked at" in said) == (200, True)


def test_a_hub_that_asked_for_tokens_goes_on_to(hub, api, tmp_path):
    api.create_repo("me/x")
    (tmp_path / "hub/tokens.json").unlink()
    asked = ("POST", "/api/models/me/x/tag/main")
    assert call(hub, *asked, body='{"tag": "v1"}')[0] == 401
    assert call(hub, *asked, body='{"tag": "v1"}', token=hub.tokens[0])[0] == 401
    assert api.list_repo_refs("me/x", token=False).tags == []


@given(st.text())
def test_a_path_is_taken_as_it_is_or_refused(path):
    try:
        assert check_path(path) == path
    except Refused:
        return
    below = Path("/repository")
    assert Path(os.path.normpath(below / path)).is_relative_to(below)
    path.encode()


def test_no_answer_holds_a_header_of_the_callers(hub, api):
    api.create_repo("me/x")
    status, _, headers = call(hub, "GET", "/api/models/me/x/tree/main/a%0d%0aX-Evil:%20yes")
    assert (status, headers["X-Evil"]) == (404, None)


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "3", '{"key": "file"}', '{"key": "x", "value": {}}', "{}", '"\\ud800"']
)
@pytest.mark.parametrize("path", ["commit/main", "preupload/main", "paths-info/main", "tag/main"])
def test_a_body_of_another_shape_is_a_bad_call(path, body, hub, api):
    api.create_repo("me/x")
    before = api.model_info("me/x").sha
    assert call(hub, "POST", f"/api/models/me/x/{path}", token=hub.tokens[0], body=body)[0] in (200, 400)
    assert api.model_info("me/x").sha == before


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 99)
    | st.just(10**30)
    | st.sampled_from(["", "a", "/", "\ud800", "0" * 64]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "oid", "size"]), inner),
    max_leaves=4,
)
KEYS = ("key", "value", "path", "content", "oid", "size", "files", "paths", "tag", "startingPoint", "objects", "name")
SAID = st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1)
CALLS = (
    *("commit/main", "preupload/main", "paths-info/main", "tag/main", "branch/b"),
    *("/lfs/verify/models/me/x", "/me/x.git/info/lfs/objects/batch", "/api/repos/create", "/api/validate-yaml"),
)


@given(path=st.sampled_from(CALLS), key=st.sampled_from((*routes._CHANGES, "header")), said=SAID)
def test_no_body_is_taken_for_a_fault_of_the_hub(path, key, said, hub):
    if not hub.storage.all("models"):
        hub.storage.create("models", "me/x", private=False, author="me")
    body = json.dumps({"operation": "upload", "key": key, "value": said} | said)
    path = path if path.startswith("/") else f"/api/models/me/x/{path}"
    assert call(hub, "POST", path, token=hub.tokens[0], body=body)[0] < 500


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/api/models/me/x/tree/main?limit=x", {}),
        ("//[", {}),
        ("/me/x/resolve/main/a", {"Range": f"bytes={'9' * 5000}-"}),
        (f"/lfs/upload/models/me/x/{'0' * 64}?size=x&sign=%C3%BC", {}),
    ],
)
def test_no_address_is_taken_for_a_fault_of_the_hub(path, headers, hub, api):
    api.create_repo("me/x")
    api.create_commit("me/x", [add("a")], commit_message="one")
    for method in ("GET", "POST"):
        assert call(hub, method, path, **headers)[0] in (400, 403, 404)


def test_a_fault_of_the_hub_is_called_one_and_logged(hub, api, caplog):
    api.create_repo("me/x")
    (hub.storage.open("models", "me/x").folder / "repo.json").write_text("{")
    assert call(hub, "GET", "/api/models/me/x?sign=canary")[0] == 500
    [logged] = [record for record in caplog.records if record.exc_info]
    assert (logged.getMessage(), logged.exc_info[0]) == ("GET /api/models/me/x", json.JSONDecodeError)


def offered(hub, content, size=None):
    """The addresses that the hub offers for a large file."""
    asked = {"oid": hashlib.sha256(content).hexdigest(), "size": size or len(content)}
    body = json.dumps({"operation": "upload", "objects": [asked]})
    told = json.loads(call(hub, "POST", "/me/x.git/info/lfs/objects/batch", token=hub.tokens[0], body=body)[1])
    upload = told["objects"][0]["actions"]["upload"]
    return urlsplit(upload["href"])._replace(scheme="", netloc="").geturl(), upload.get("header", {})


def test_other_bytes_than_were_said_are_not_kept(hub, api):
    api.create_repo("me/x")
    address, _ = offered(hub, b"right")
    assert call(hub, "PUT", address, body=b"wrong")[0] == 422
    assert call(hub, "PUT", address, body=b"right and more")[0] == 422
    assert call(hub, "PUT", address.replace("size=5", "size=9"), body=b"right and")[0] == 403
    assert call(hub, "PUT", address.replace("/me/x/", "/me/y/"), body=b"right")[0] in (403, 404)
    repo = hub.storage.open("models", "me/x")
    assert files_in(repo.folder / "objects") == files_in(repo.folder / "incoming") == []
    commit = json.dumps(
        {"key": "lfsFile", "value": {"path": "a", "oid": hashlib.sha256(b"right").hexdigest(), "size": 5}}
    )
    assert call(hub, "POST", "/api/models/me/x/commit/main", token=hub.tokens[0], body=commit)[0] == 422
    assert call(hub, "PUT", address, body=b"right")[0] == 200
    assert call(hub, "POST", "/api/models/me/x/commit/main", token=hub.tokens[0], body=commit)[0] == 200


def test_parts_that_are_wrong_together_are_not_kept(hub, api):
    api.create_repo("me/x")
    content = os.urandom(PIECE + 9)
    address, parts = offered(hub, content)
    assert parts["chunk_size"] == str(PIECE)
    first, second = (urlsplit(parts[n])._replace(scheme="", netloc="").geturl() for n in "12")
    assert call(hub, "POST", address)[0] == 400, "before the parts"
    assert call(hub, "PUT", first, body=content[:PIECE])[0] == 200
    assert call(hub, "PUT", second, body=b"123456789")[0] == 200
    assert call(hub, "POST", address)[0] == 422
    repo = hub.storage.open("models", "me/x")
    assert files_in(repo.folder / "objects") == files_in(repo.folder / "incoming") == []


@pytest.fixture
def in_two_parts(hub, api):
    """A large file whose parts have arrived: the address to join them at, and its content."""
    api.create_repo("me/x")
    content = os.urandom(PIECE + 9)
    address, parts = offered(hub, content)
    for number, piece in {"1": content[:PIECE], "2": content[PIECE:]}.items():
        put = urlsplit(parts[number])._replace(scheme="", netloc="").geturl()
        assert call(hub, "PUT", put, body=piece)[0] == 200
    return address, content


def test_a_file_may_be_joined_twice_at_once(hub, in_two_parts, monkeypatch):
    address, content = in_two_parts
    plain, started = Repo.keep, threading.Event()

    def slow(*what, **words):
        started.set()
        time.sleep(0.1)
        return plain(*what, **words)

    monkeypatch.setattr(Repo, "keep", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, hub, "POST", address)
        started.wait(10)
        second = pool.submit(call, hub, "POST", address)
        assert [first.result()[0], second.result()[0]] == [200, 200]
    assert hub.storage.open("models", "me/x").size_of(hashlib.sha256(content).hexdigest()) == len(content)


def test_a_hub_without_tokens_is_for_this_machine_alone(tmp_path):
    with pytest.raises(UserError, match="other machines could read"), opened(tmp_path / "hub", host="0.0.0.0"):
        pass
    with hub_on_loopback(tmp_path / "hub") as (server,):
        assert call(server, "GET", "/api/models")[0] == 200
        assert call(server, "GET", "/api/models", Origin="https://evil.example")[0] == 403
        assert call(server, "GET", "/api/models", Host="evil.example")[0] == 403
        with pytest.raises(UserError, match="another server"), opened(tmp_path / "hub"):
            pass


# ------------------------------------------------------------------------------------------------ kill and decay


def commit_and_die(repo, point):
    """Commit in a process of its own that kills itself before the so-manieth call that changes the disk."""
    if (child := os.fork()) == 0:
        calls = 0

        def armed(plain):
            def counted(*what):
                nonlocal calls
                calls += 1
                return os.kill(os.getpid(), signal.SIGKILL) if calls == point else plain(*what)

            return counted

        storage.sync, os.replace = armed(storage.sync), armed(os.replace)
        sha256, size = repo.keep(io.BytesIO(b"new"))
        files = {"a": File(sha256, size, "0" * 40, lfs=False)}
        repo.commit("main", lambda there: there.update(files), parent=None, title="t", message="", author="me")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.fault("`kill -9` of the hub server in a commit, anywhere", "the commit is whole or not there")
def test_a_commit_is_whole_or_not_there_wherever_it_is_killed(tmp_path):
    killed = 0
    while True:
        root = Storage(tmp_path / str(killed))
        repo = root.create("models", "me/x", private=False, author="me")
        before = repo.find("main")
        code = commit_and_die(repo, killed + 1)
        root.clear()
        now = repo.find("main")
        assert files_in(repo.folder / "incoming") == []
        assert now == before or (now.parent == before.id and repo.size_of(now.files["a"].sha256) == 3)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed == 9, "of the object, the commit and the name: synced, renamed, the folder synced"
    assert now != before


def test_a_repository_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    root = Storage(tmp_path)
    monkeypatch.setattr(Repo, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        root.create("models", "me/x", private=False, author="me")
    assert files_in(tmp_path) == []
    assert root.all("models") == []


def test_what_changed_on_the_hubs_disk_is_not_passed_on_for_a_commit(hub, api):
    api.create_repo("me/x")
    api.create_commit("me/x", [add("m.bin", b"\0" * 50)], commit_message="one")
    repo = hub.storage.open("models", "me/x")
    commit = repo.folder / "commits" / f"{repo.find('main').id}.json"
    object_ = repo.path_of(repo.find("main").files["m.bin"].sha256)
    object_.write_bytes(b"\0" * 49)
    assert call(hub, "GET", "/me/x/resolve/main/m.bin")[0] == 500
    object_.write_bytes(b"\0" * 50)
    assert call(hub, "GET", "/me/x/resolve/main/m.bin")[0] == 200
    commit.write_text(commit.read_text().replace("m.bin", "n.bin"))
    assert call(hub, "GET", "/me/x/resolve/main/n.bin")[0] == 500


def test_a_file_can_not_hold_files(tmp_path):
    repo = Storage(tmp_path).create("models", "me/x", private=False, author="me")
    file = File("0" * 64, 1, "0" * 40, lfs=False)
    with pytest.raises(Refused, match="is a file"):
        repo.commit(
            "main", lambda there: there.update({"a": file, "a/b": file}), parent=None, title="", message="", author="me"
        )


@pytest.mark.fault("the disk of the hub server is full", "the client is told")
def test_a_full_disk_is_said_to_the_client(hub, api, monkeypatch):
    api.create_repo("me/x")
    monkeypatch.setattr(Repo, "keep", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    body = json.dumps({"key": "file", "value": {"path": "a", "content": "eA==", "encoding": "base64"}})
    status, said, _ = call(hub, "POST", "/api/models/me/x/commit/main", token=hub.tokens[0], body=body)
    assert (status, "No space left" in said.decode()) == (507, True)


def test_what_is_no_hub_is_left_alone(tmp_path, cli_run):
    kept = tmp_path / "work/a/b/c/incoming/mine"
    kept.parent.mkdir(parents=True)
    kept.write_text("x")
    code, _, log = cli_run("serve-hub", tmp_path / "work", "--new-token", "me")
    assert (code, "a folder of other things" in log) == (2, True), log
    with pytest.raises(UserError, match="a folder of other things"), opened(tmp_path / "work"):
        pass
    for kind in storage.KINDS:  # as somebody may well call folders of theirs
        (tmp_path / "work" / kind).mkdir()
    with opened(tmp_path / "work"):
        assert [p for p in files_in(tmp_path / "work") if p.name != ".lock"] == [kept]


def test_a_folder_that_can_not_be_written_is_one_message(tmp_path, cli_run):
    (tmp_path / "file").touch()
    for options in ((), ("--new-token", "me")):
        code, _, log = cli_run("serve-hub", tmp_path / "file/hub", *options)
        assert (code, "can not be written: Not a directory" in log) == (2, True), log


# ------------------------------------------------------------------------------------------------------ the verb


def test_the_verb_serves_until_it_is_told_to_end(tmp_path, cli_run):
    code, token, log = cli_run("serve-hub", tmp_path / "hub", "--new-token", "me")
    assert (code, token[:3]) == (0, "hf_"), log
    given = [sys.executable, "-m", "pipelines.cli", "serve-hub", str(tmp_path / "hub"), "--port", "0"]
    serving = subprocess.Popen(given, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        said = [serving.stderr.readline() for _ in range(3)]
        assert "for those with a token" in said[0]
        connection = http.client.HTTPConnection(urlsplit(said[2].split("=")[1].strip()).netloc, timeout=10)
        connection.request("GET", "/api/whoami-v2", headers={"Authorization": f"Bearer {token.strip()}"})
        assert json.loads(connection.getresponse().read())["name"] == "me"
        serving.terminate()
        assert serving.wait(10) == 130
        assert token.strip() not in serving.stderr.read()
    finally:
        serving.kill()
    for name in ("../me", "café", "a--b", "a..b", "me-", ".me", "a/b", ""):
        assert cli_run("serve-hub", tmp_path / "hub", "--new-token", name)[0] == 2, name
    assert cli_run("serve-hub", tmp_path / "hub", "--new-token", "3com")[0] == 0
    assert cli_run("serve-hub", tmp_path / "open", "--host", "0.0.0.0")[0] == 2


def test_a_file_that_is_not_there_is_told_as_the_client_expects(api):
    api.create_repo("me/x")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("me/x", "none.json")
