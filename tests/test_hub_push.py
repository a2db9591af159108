"""Pushing and pulling with the real client and the loopback hub: what goes, what stays, and every fault on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import PIECE, Faulty, client, hub_on_loopback
from huggingface_hub import ModelCard, constants
from tiny_families import save_body
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from heedful import UserError
from hub import client as hub_client
from hub import facts
from hub.cards import card, results_file
from hub.push import pack
from hub.redaction import redact, refuse_secrets
from pipelines.config import load
from pipelines.finetune import finetune
from pipelines.push import push
from pipelines.sections import TrainSection
from sources.files import fault, sha256_of

ROOT = Path(__file__).parent.parent
CANARY = "hf_canaryCANARYcanaryCANARYcanary00"
ROWS = "text,label\n" + "".join(f"the cat {w} {'dog' * i},{'ab'[i % 2]}\n" for i, w in enumerate(["sat", "on"] * 6))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with LoRA, which leaves model/ and adapter/, and a canary in its surroundings."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HF_TOKEN", CANARY)
        patch.setattr(sys, "argv", ["heedful", "finetune", "run.yaml", f"model.name={home}/base"])
        save_body("bert", "base")
        Path("rows.csv").write_text(ROWS)
        values = {
            "task": "classification",
            "model": {"name": str(home / "base"), "max_length": 32},
            "data": {"train": str(home / "rows.csv"), "validation": "rows.csv", "test": "rows.csv"},
            "train": {"max_steps": 2, "batch_size": 4, "save_steps": 1},
            "lora": {"r": 2},
        }
        Path("run.yaml").write_text(yaml.safe_dump(values))
        finetune(load(Path("run.yaml"), []))
    return home


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a token, which the environment has, a cache of its own, and no waits."""
    with hub_on_loopback(tmp_path / "hub", ("me", "write"), ("you", "write")) as (server, *tokens):
        server.tokens = tokens
        server.api = client(monkeypatch, server, tokens[0])
        monkeypatch.setenv("HF_TOKEN", tokens[0])
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_client, "WAITS", (0.01,) * 3)
        yield server


def sent(hub):
    """The calls that carried a model's bytes, or a commit."""
    return [c for c in hub.calls if c.startswith("PUT") or "/commit/" in c]


def change_manifest(run, **values):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | values))


def visible(hub):
    """What anyone can see of the repository: commits beyond the first, empty one."""
    return hub.api.list_repo_commits("me/m")[:-1] if hub.api.repo_exists("me/m") else []


# --------------------------------------------------------------------------------------------- there and back


def test_a_push_is_shown_first_and_then_is_one_commit(run, hub, cli_run):
    code, _, log = cli_run("push", "runs/run", "me/m", "--private", "--tag", "v1")
    assert code == 0, log
    assert "nothing was sent; --yes sends it" in log
    told = {row.split()[1]: row.split()[3] for row in log.splitlines() if row.startswith("│")}
    for name, path in {"model.safetensors": "model", "adapter/adapter_model.safetensors": ""}.items():
        assert told[name] == f"{(run / path / name).stat().st_size:,}"
    total = sum(int(size.replace(",", "")) for size in told.values())
    assert f"{len(told)} of {len(told)} files to send, {total:,} bytes" in log
    assert "license: not known" in log
    assert "data, train: rows.csv, license not known: yours to look up" in log
    assert not hub.api.repo_exists("me/m")
    code, _, log = cli_run("push", "runs/run", "me/m", "--private", "--tag", "v1", "--yes")
    assert code == 0, log
    commits = hub.api.list_repo_commits("me/m")
    assert len(commits) == 2, "the hub's first one, and this"
    assert [r.target_commit for r in hub.api.list_repo_refs("me/m").tags] == [commits[0].commit_id]
    assert hub.api.model_info("me/m").private
    names = set(hub.api.list_repo_files("me/m"))
    assert {"README.md", "heedful.json", "model.safetensors", "adapter/adapter_model.safetensors"} <= names
    assert not any(word in name for name in names for word in ("optimizer", "checkpoints", "rows", "MANIFEST"))
    hub.calls.clear()
    code, _, log = cli_run("push", "runs/run/model", "me/m", "--private", "--yes")
    assert (code, "nothing to send" in log) == (0, True)
    assert sent(hub) == []
    code, out, log = cli_run("pull", "me/m", "--revision", "v1")
    assert (code, out) == (0, "m\n"), log
    assert fault(Path("m")) is None
    assert {p.name: sha256_of(p) for p in Path("m").glob("*.safetensors")} == {
        p.name: sha256_of(p) for p in (run / "model").glob("*.safetensors")
    }
    code, out, log = cli_run("predict", "m", "the cat sat")
    assert code == 0, log
    assert out == cli_run("predict", "runs/run", "the cat sat")[1]


def test_transformers_opens_it_by_name(run, hub):
    push("runs/run", "me/m", yes=True)
    assert pipeline("text-classification", "me/m")("the cat sat")[0]["label"] in "ab"


def test_transformers_opens_a_tagger_by_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_body("bert", "base")
    rows = [{"tokens": ["Anna", "sat"] * (i + 1), "tags": ["B-PER", "O"] * (i + 1)} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "task": "ner",
        "model": {"name": "./base", "max_length": 32},
        "data": {"train": "rows.jsonl", "stride": 8},
    }
    Path("run.yaml").write_text(yaml.safe_dump(values | {"train": {"max_steps": 1, "batch_size": 4}}))
    finetune(load(Path("run.yaml"), []))
    push("runs/run", "me/tags", yes=True)
    there, here = (AutoModelForTokenClassification.from_pretrained(n) for n in ("me/tags", "runs/run/model"))
    assert there.config.id2label == {0: "O", 1: "B-PER", 2: "I-PER"}
    state = here.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in there.state_dict().items())
    assert len(pipeline("token-classification", "me/tags")("Anna sat")) <= 2


def test_what_the_model_has_no_more_is_taken_away_and_nothing_else(run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    hub.api.upload_file(repo_id="me/m", path_in_repo="picture.png", path_or_fileobj=b"\0")
    shutil.rmtree(run / "adapter")
    code, _, log = cli_run("push", "runs/run", "me/m", "--yes")
    assert code == 0, log
    assert "gone" in log
    names = hub.api.list_repo_files("me/m")
    assert "picture.png" in names
    assert not any(name.startswith("adapter/") for name in names)


def test_a_folder_does_as_well(run, tmp_path, cli_run):
    where = (tmp_path / "shelf").as_uri()
    code, _, log = cli_run("push", "runs/run", where)
    assert (code, "nothing was sent" in log, (tmp_path / "shelf").exists()) == (0, True, False), log
    assert cli_run("push", "runs/run", where, "--tag", "v1", "--yes")[0] == 0
    assert "nothing to send" in cli_run("push", "runs/run", where, "--yes")[2]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "shelf/v1")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "shelf/main")) > 5
    assert cli_run("pull", where, "again", "--revision", "v1")[0] == 0
    assert cli_run("predict", "again", "the cat sat")[0] == 0
    assert cli_run("push", "runs/run", where, "--private")[0] == 2


def test_a_pull_of_nothing_is_refused(run, cli_run):
    code, _, log = cli_run("pull", "")
    assert (code, "no repository: ''" in log) == (2, True)


def test_a_pull_leaves_what_is_somebody_elses(run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    Path("m").mkdir()
    Path("m/mine").write_text("x")
    code, _, log = cli_run("pull", "me/m")
    assert (code, "something else is there" in log) == (2, True)
    assert [p.name for p in Path("m").iterdir()] == ["mine"]
    assert cli_run("pull", "me/m", "n")[0] == 0
    assert cli_run("pull", "me/m", "n")[0] == 0, "as it was pulled: it may be replaced"
    Path("n/answers.jsonl").write_text("mine")
    code, _, log = cli_run("pull", "me/m", "n")
    assert (code, "answers.jsonl came there later" in log) == (2, True), log
    assert Path("n/answers.jsonl").read_text() == "mine"


@pytest.mark.parametrize("made", ["model", "adapter", "checkpoints/step-2"])
def test_a_pull_leaves_what_a_run_made(made, run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    assert fault(run / made) is None
    before = sha256_of(run / made / "MANIFEST.json")
    code, _, log = cli_run("pull", "me/m", run / made)
    assert (code, "something else is there: the run" in log) == (2, True), log
    assert sha256_of(run / made / "MANIFEST.json") == before


def test_a_pull_into_what_can_not_be_written_is_one_message(run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    push("runs/run", (where := Path("shelf").absolute().as_uri()), yes=True)
    Path("file").touch()
    for source in ("me/m", where):
        code, _, log = cli_run("pull", source, "file/m")
        assert (code, "can not be written" in log) == (2, True), log


# ----------------------------------------------------------------------------------------- what must not go out


def test_terms_stand_against_it_until_they_are_accepted(run, hub, cli_run):
    asset = {"name": "conll2003", "license": "other", "terms": "research alone", "restricted": True, "language": ["en"]}
    change_manifest(run, assets=[asset])
    code, _, log = cli_run("push", "runs/run", "me/m", "--yes")
    assert code == 2
    assert "conll2003: research alone" in log
    assert hub.calls == []
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = "assets/conll2003/train.parquet"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, log = cli_run("push", "runs/run", "me/m", "--yes", "--accept-terms")
    assert code == 0, log
    assert "license: other" in log
    text = hub.api.hf_hub_download("me/m", "README.md")
    assert "research alone" in Path(text).read_text()
    assert ModelCard.load(text).data.license == "other"


def test_terms_go_from_run_to_run(run, hub, cli_run):
    asset = {"name": "conll2003", "license": "other", "terms": "research alone", "restricted": True, "language": ["en"]}
    change_manifest(run, assets=[asset])
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"output_dir": "runs/next", "lora": {}}
    config["model"]["name"] = "runs/run/model"
    Path("rows.csv").write_text(ROWS)
    Path("next.yaml").write_text(yaml.safe_dump(config))
    finetune(load(Path("next.yaml"), []))
    code, _, log = cli_run("push", "runs/next", "me/m", "--yes")
    assert (code, "conll2003: research alone" in log) == (2, True), log
    assert hub.calls == []
    text = card(facts.read("runs/next"), "m", hub_id="me/m")
    assert "- base: `run`" in text
    assert "- made from: `conll2003`, license other. research alone" in text
    assert ModelCard(text).data.license == "other"


def test_a_model_without_its_run_is_asked_about(run, hub, tmp_path, cli_run):
    shutil.move(run / "model", tmp_path / "stray")
    code, _, log = cli_run("push", "stray", "me/m", "--yes")
    assert (code, "nobody can tell what it was trained on" in log) == (2, True)
    assert cli_run("push", "stray", "me/m", "--yes", "--accept-terms")[0] == 0


def test_nothing_of_this_machine_goes_out(run, hub, trained, cli_run):
    (run / "model/notes.txt").write_text("mine")
    (run / "model/optimizer.safetensors").write_text("mine")
    (run / "model/MANIFEST.json").unlink()
    change_manifest(
        run, command=f"heedful finetune {trained}/run.yaml tracking.token={CANARY} model.name={trained}/base"
    )
    code, out, log = cli_run("push", "runs/run", "me/m", "--yes")
    assert code == 0, log
    assert "left out: notes.txt, optimizer.safetensors" in log
    cli_run("pull", "me/m")
    told = out + log + "".join(p.read_bytes().decode("latin-1") for p in Path("m").rglob("*") if p.is_file())
    for secret in (CANARY, hub.tokens[0], str(trained), "the cat sat on"):
        assert secret not in told
    assert json.loads(Path("m/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


@pytest.mark.fault("a token, a password or a path of this machine in what would be pushed", "refused")
@pytest.mark.parametrize("found", [CANARY, "/root/secret/model", "https://me:passw0rd@host/x"])
def test_a_file_with_a_secret_is_refused(found, run, hub, cli_run):
    path = run / "model/generation_config.json"
    path.write_text(json.dumps({"a": 1, "note": found}, indent=1))
    (run / "model/MANIFEST.json").unlink()
    code, _, log = cli_run("push", "runs/run", "me/m", "--yes")
    assert (code, "generation_config.json, line 3" in log, found in log) == (2, True, False), log
    assert not hub.api.repo_exists("me/m")


def test_a_license_in_another_encoding_is_looked_at_all_the_same(tmp_path):
    path = tmp_path / "LICENSE"
    path.write_bytes("© Universität".encode("latin-1"))
    refuse_secrets(path, path.name)
    path.write_bytes(f"© Universität {CANARY}".encode("latin-1"))
    with pytest.raises(UserError, match="a token"):
        refuse_secrets(path, path.name)


def test_a_chat_template_is_no_secret(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_text("{%- set bos_token = message['content'] %}</tool_call> a/b <|im_end|> hf_device_map")
    refuse_secrets(path, path.name)


def test_a_broken_model_is_not_pushed(run, hub, cli_run):
    with (run / "model/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    code, _, log = cli_run("push", "runs/run", "me/m", "--yes")
    assert (code, "model.safetensors does not match" in log) == (2, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see /home/me/x/model.bin, please", "see .../model.bin, please"),
        ("model.name=/a/b/ output=~/runs/x", "model.name=.../b output=.../x"),
        ("https://huggingface.co/a/b and runs/ner and 3/4", "https://huggingface.co/a/b and runs/ner and 3/4"),
        (f"token {CANARY}.", "token (hidden)."),
        ("api_key=abcdefgh1 x", "(hidden) x"),
    ],
)
def test_redaction(text, expected):
    assert redact(text) == expected


# -------------------------------------------------------------------------------------------------- the faults


FAULTS = {
    "part-500-twice": [("PUT /lfs", 500)] * 2,
    "put-cut": [("PUT /lfs", "cut")],
    "preupload-429": [("POST /api/models/me/m/preupload", 429)],
    "commit-503": [("POST /api/models/me/m/commit", 503)],
    "commit-cut": [("POST /api/models/me/m/commit", "cut")],
    "commit-answer-lost": [("POST /api/models/me/m/commit", "after")],
    "create-500": [("POST /api/repos/create", 500)],
    "create-answer-lost": [("POST /api/repos/create", "after")],
    "look-503": [("GET /api/models/me/m", 503)],
    "tag-answer-lost": [("POST /api/models/me/m/tag", "after")],
    "all-at-once": [("POST /api/repos/create", 500), ("PUT /lfs", "cut"), ("POST /api/models/me/m/commit", 502)],
}


@pytest.mark.fault("the hub: 500, twice, for a part of a large file", "tried again; one whole commit")
@pytest.mark.fault("the hub: the connection is cut while a large file is sent", "tried again; one whole commit")
@pytest.mark.fault("the hub: 429 before a file is sent", "tried again; one whole commit")
@pytest.mark.fault("the hub: 503 for the commit, or its answer is lost", "tried again; one whole commit")
@pytest.mark.fault("the hub: 500 when the repository is made, or its answer is lost", "tried again; one whole commit")
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_passing_fault_leaves_one_whole_commit(faults, run, hub):
    hub.faults += faults
    commit = push("runs/run", "me/m", tag="v1", yes=True)
    assert hub.faults == []
    assert [c.commit_id for c in visible(hub)] == [commit]
    assert hub.api.model_info("me/m", revision="v1").sha == commit


@pytest.mark.fault("the hub fails for good", "one message, and nothing is visible there")
@pytest.mark.parametrize(
    ("kind", "call"), [(500, "POST /api/repos/create"), ("cut", "PUT /lfs"), (507, "POST /api/models/me/m/commit")]
)
def test_a_lasting_fault_is_one_message_and_nothing_is_visible(kind, call, run, hub, cli_run):
    hub.faults += [(call, kind)] * 40
    code, _, log = cli_run("push", "runs/run", "me/m", "--yes")
    assert code == 2, log
    assert "Traceback" not in log
    hub.faults.clear()
    assert visible(hub) == []
    assert cli_run("push", "runs/run", "me/m", "--yes")[0] == 0, "and again"


@pytest.mark.fault("somebody else pushed meanwhile", "refused")
def test_who_pushed_meanwhile_is_not_overwritten(run, hub, cli_run, monkeypatch):
    push("runs/run", "me/m", yes=True)
    (run / "model/heedful.json").write_text((run / "model/heedful.json").read_text() + "\n")
    (run / "model/MANIFEST.json").unlink()

    def meanwhile():
        hub.api.upload_file(repo_id="me/m", path_in_repo="theirs", path_or_fileobj=b"x")
        return True

    with pytest.raises(UserError, match="somebody else has pushed meanwhile"):
        push("runs/run", "me/m", ask=meanwhile)
    assert "theirs" in hub.api.list_repo_files("me/m")
    assert len(visible(hub)) == 2


def test_who_made_the_repository_meanwhile_is_not_overwritten(run, hub):
    def meanwhile():
        hub.api.create_repo("me/m")
        hub.api.upload_file(repo_id="me/m", path_in_repo="config.json", path_or_fileobj=b"{}")
        return True

    with pytest.raises(UserError, match="somebody else has pushed meanwhile"):
        push("runs/run", "me/m", ask=meanwhile)
    assert hub.api.list_repo_files("me/m") == ["config.json"]
    assert len(visible(hub)) == 1


def test_an_answer_that_was_lost_is_not_taken_for_somebody_elses_push(run, hub):
    push("runs/run", "me/m", yes=True)
    shutil.rmtree(run / "adapter")
    hub.faults += FAULTS["commit-answer-lost"]
    commit = push("runs/run", "me/m", yes=True)
    assert visible(hub)[0].commit_id == commit
    assert len(visible(hub)) == 2


@pytest.mark.fault("the hub: a download is cut half way", "it goes on")
def test_a_download_cut_half_way_goes_on(run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    hub.faults += [("GET /me/m/resolve/.*model.safetensors", "half")] * 2
    hub.calls.clear()
    assert cli_run("pull", "me/m")[0] == 0
    assert hub.faults == []
    assert sha256_of(Path("m/model.safetensors")) == sha256_of(run / "model/model.safetensors")


READING = ("GET /api/models/me/m/revision", "GET /api/models/me/m/tree", "HEAD /me/m/resolve", "GET /me/m/resolve")


@pytest.mark.fault("the hub answers 429 or 503 to a pull, or hangs up, for a while", "tried again")
@pytest.mark.parametrize("kind", [429, 503, "cut"])
def test_a_pull_outlasts_a_passing_fault(kind, run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    hub.faults += [(call, kind) for call in READING]
    code, _, log = cli_run("pull", "me/m")
    assert (code, hub.faults) == (0, []), log
    assert f"{constants.ENDPOINT} can not serve this (" in log
    assert sha256_of(Path("m/model.safetensors")) == sha256_of(run / "model/model.safetensors")


@pytest.mark.fault("the hub answers 429 or 503 to a pull, or hangs up, for good", "one message; no folder appears")
@pytest.mark.parametrize("kind", [429, 503, "cut"])
@pytest.mark.parametrize("call", READING)
def test_a_pull_that_can_not_go_on_is_one_message(call, kind, run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    hub.faults += [(call, kind)] * 100
    code, _, log = cli_run("pull", "me/m")
    message = log.partition("error\n")[2]
    assert (code, "Traceback" in log, [*Path().glob("*m")]) == (2, False, []), log
    assert ("no way to the hub" if kind == "cut" else f"the hub answers {kind}") in message, message


@pytest.mark.fault("the hub: it is down, and the cache has the model", "a pull is refused: nothing to compare with")
@pytest.mark.parametrize("down", ["closed", "cut"])
def test_a_cache_is_no_hub_to_pull_from(down, run, hub, cli_run, monkeypatch):
    push("runs/run", "me/m", yes=True)
    assert cli_run("pull", "me/m", "first")[0] == 0
    hub.faults += [("", "cut")] * 100
    if down == "closed":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, log = cli_run("pull", "me/m")
    assert (code, f"no way to the hub {constants.ENDPOINT}" in log, Path("m").exists()) == (2, True, False), log


def test_what_is_wrong_in_the_cache_while_the_hub_is_down_is_one_message(run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    assert cli_run("pull", "me/m", "first")[0] == 0
    cached = next(Path("cache").glob("*/snapshots/*/model.safetensors")).resolve()
    cached.write_bytes(bytes(cached.stat().st_size))
    hub.faults += [("HEAD /me/m/resolve/.*model.safetensors", 503)] * 100
    code, _, log = cli_run("pull", "me/m")
    assert (code, "the hub answers 503" in log, Path("m").exists()) == (2, True, False), log


def tell_otherwise(monkeypatch, hub, change):
    """Let the hub's next listing of files after a commit say something else; ``change`` is given its entries."""
    plain, left = Faulty.answered, [change]

    def answered(handler):
        answer = plain(handler)
        if left and "/tree/" in handler.path and any("/commit/" in call for call in hub.calls):
            left.pop()(answer.content)
        return answer

    monkeypatch.setattr(Faulty, "answered", answered)
    return left


@pytest.mark.fault(
    "other bytes lie on the hub than were pushed", "refused after the push, by their hash; no tag is set"
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_push_is_compared_with_what_lies_there_then(name, run, hub, cli_run, monkeypatch):
    def change(entries):
        (entry,) = (entry for entry in entries if entry["path"] == name)
        held = entry.get("lfs", entry)
        held["oid"] = held["oid"][::-1]

    left = tell_otherwise(monkeypatch, hub, change)
    code, _, log = cli_run("push", "runs/run", "me/m", "--tag", "v1", "--yes")
    assert (code, left, "sent, and compared" in log) == (2, [], False), log
    assert f"other bytes on the hub: {name}" in log
    assert "push again" in log
    assert hub.api.list_repo_refs("me/m").tags == []
    assert cli_run("push", "runs/run", "me/m", "--tag", "v1", "--yes")[0] == 0, "it was the once"


@pytest.mark.fault("a hub names a path that leads out of a pull's folder", "refused; nothing is written")
@pytest.mark.parametrize("name", ["../ran", "a/../../ran", "{here}/ran", "a\\..\\..\\ran", ".git/hooks/post-checkout"])
def test_a_hub_leads_no_pull_out_of_its_folder(name, run, hub, cli_run, monkeypatch, tmp_path):
    push("runs/run", "me/m", yes=True)
    name = name.format(here=tmp_path)
    tell_otherwise(monkeypatch, hub, lambda entries: entries[0].update(path=name))
    code, _, log = cli_run("pull", "me/m", "in/m")
    message = log.partition("error\n")[2]
    assert (code, repr(name) in message, "do not trust this hub" in message) == (2, True, True), log
    assert not [path for path in tmp_path.rglob("*") if path.name in ("ran", "in", "post-checkout")]


@pytest.mark.fault("the hub: bytes decayed on the hub", "refused by their hash")
def test_bytes_that_decayed_on_the_hub_are_found(run, hub, cli_run):
    push("runs/run", "me/m", yes=True)
    object_ = hub.storage.open("models", "me/m").path_of(sha256_of(run / "model/model.safetensors"))
    good = object_.read_bytes()
    object_.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, _, log = cli_run("pull", "me/m")
    assert (code, "model.safetensors is not what the hub says" in log, Path("m").exists()) == (2, True, False), log
    object_.write_bytes(good)
    assert cli_run("pull", "me/m")[0] == 0, "the cache keeps nothing of it"


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        ("hf_wrong", "me/m", "does not take this token"),
        (1, "me/m", "may not do that"),
        (0, "nobody", "no repository"),
        (0, "a/b/c", "no repository"),
        (0, "me/..", "no name of a repository"),
    ],
)
def test_what_a_hub_refuses_is_said(token, repo, expected, run, hub, cli_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token if isinstance(token, str) else hub.tokens[token])
    code, _, log = cli_run("push", "runs/run", repo, "--yes")
    assert (code, expected in log) == (2, True), log


def test_a_hub_that_has_no_xet_is_not_asked_for_it(run, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)  # as it was read when the library was imported
    push("runs/run", "me/m", yes=True)
    assert not any("xet" in call for call in hub.calls)


def test_a_public_repository_is_not_taken_for_a_private_one(run, hub, cli_run):
    hub.api.create_repo("me/m")
    code, _, log = cli_run("push", "runs/run", "me/m", "--private", "--yes")
    assert (code, "it is there, and public" in log) == (2, True)


def test_a_tag_stays_where_it_is(run, hub, cli_run):
    hub.api.create_repo("me/m")
    hub.api.create_tag("me/m", tag="v1")
    code, _, log = cli_run("push", "runs/run", "me/m", "--tag", "v1", "--yes")
    assert (code, "the tag v1 is elsewhere" in log) == (2, True), log
    assert visible(hub) == []
    commit = push("runs/run", "me/m", tag="v2", yes=True)
    assert push("runs/run", "me/m", tag="v2", yes=True) == commit, "it is there already"
    with pytest.raises(UserError, match="the tag v1 is elsewhere"):
        push("runs/run", "me/m", tag="v1", yes=True)


def test_a_tag_that_can_not_be_is_refused_before_anything_is_sent(run, hub, cli_run):
    code, _, log = cli_run("push", "runs/run", "me/m", "--tag", "a..b", "--yes")
    assert (code, "no name for a tag" in log, hub.api.repo_exists("me/m")) == (2, True, False), log


@pytest.mark.fault("there is no hub", "one message")
def test_without_a_hub_there_is_one_message(run, hub, cli_run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for verb in (("push", "runs/run", "me/m", "--yes"), ("pull", "me/m")):
        code, _, log = cli_run(*verb)
        assert (code, "no way to the hub http://127.0.0.1:9" in log) == (2, True), log
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in cli_run("pull", "me/m")[2]


PUSHING = """
import os, signal
from huggingface_hub import HfApi
plain = HfApi.create_commit
def create_commit(self, *given, **words):
    plain(self, *given, **words)
    os.kill(os.getpid(), signal.SIGKILL)
if {after}: HfApi.create_commit = create_commit
from pipelines.push import push
push("runs/run", "me/m", yes=True)
"""


@contextmanager
def pushing(hub, *, after=False):
    """A push by another process; with ``after`` it kills itself once the commit is made."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", PUSHING.format(after=after)], env=environment) as child:
        yield child
        assert child.wait() == -signal.SIGKILL


def require_all_there(run, hub):
    """Push again; then what the hub holds is what lies here, by sha256."""
    push("runs/run", "me/m", yes=True)
    assert len(visible(hub)) == 1
    held = {path: file.sha256 for path, file in hub.storage.open("models", "me/m").find("main").files.items()}
    here = {path.relative_to(run / "model").as_posix(): path for path in (run / "model").iterdir()}
    assert {path: held.get(path) for path in here if path != "MANIFEST.json"} == {
        path: sha256_of(file) for path, file in here.items() if path != "MANIFEST.json"
    }
    assert held["adapter/adapter_model.safetensors"] == sha256_of(run / "adapter/adapter_model.safetensors")


@pytest.mark.fault("the hub: `kill -9` in the middle of a transfer", "no byte of it is visible; the next push is whole")
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_push_that_is_killed_in_mid_transfer_can_be_made_again(number, run, hub):
    """By the hub, when some of the bytes of so many a PUT have come; the model's weights take several."""
    assert (run / "model/model.safetensors").stat().st_size > 2 * PIECE
    killed = threading.Event()
    with pushing(hub) as child:
        hub.faults += [("PUT /lfs", "pass")] * (number - 1) + [("PUT /lfs", lambda: (child.kill(), killed.set()))]
        assert killed.wait(60)
    sent_before = [call for call in hub.calls if call.startswith("PUT")]
    assert len(sent_before) >= number
    assert not any("/commit/" in call for call in hub.calls)
    assert hub.api.list_repo_files("me/m") == []
    assert visible(hub) == []
    require_all_there(run, hub)


@pytest.mark.fault(
    "`kill -9` of a push once its commit is made", "it is whole there; the next push has nothing to send"
)
@pytest.mark.slow
def test_a_push_that_is_killed_after_its_commit_is_whole(run, hub):
    with pushing(hub, after=True):
        pass
    assert len(visible(hub)) == 1
    hub.calls.clear()
    require_all_there(run, hub)
    assert sent(hub) == []


# ----------------------------------------------------------------------------------------------------- the card


def test_the_card_says_what_the_run_knows(run):
    known = facts.read("runs/run")
    text = card(known, "m", hub_id="me/m")
    assert text == card(facts.read("runs/run/model"), "m", hub_id="me/m")
    front = ModelCard(text).data
    assert (front.pipeline_tag, front.library_name, front.model_name) == ("text-classification", "transformers", "m")
    metrics = json.loads((run / "metrics.json").read_text())
    told = {(r.dataset_split, r.metric_type): r.metric_value for r in front.eval_results}
    assert told == {(s, m): v for s in metrics for m, v in metrics[s].items() if m in ("accuracy", "macro_f1", "mcc")}
    low, high = metrics["test"]["accuracy_ci95"]
    assert f"| test | accuracy | {metrics['test']['accuracy']:.4f} | {low:.4f} - {high:.4f} |" in text
    assert "always a" in text
    assert "\n    heedful finetune run.yaml model.name=.../base\n" in text, "what makes it again"
    assert "12 of the rows (100.00%) stand in both of train and test" in text, "the audit"
    assert "lora.r: 2" in text
    assert known.manifest["versions"]["torch"] in text
    assert known.manifest["data"]["train"] in text
    assert results_file(known) is None, "a file of one's own is no data set of the Hub"


def test_figures_on_data_of_the_hub_are_named_for_it(run, hub):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"train": "nyu-mll/glue@abc[sst2]:train", "test": "nyu-mll/glue@abc[sst2]:validation"}
    config["model"] |= {"name": "google-bert/bert-base-cased", "revision": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    known = facts.read("runs/run")
    front = ModelCard(card(known, "m", hub_id="me/m")).data
    assert (front.base_model, front.datasets) == ("google-bert/bert-base-cased", ["nyu-mll/glue"])
    push("runs/run", "me/m", yes=True)
    assert ".eval_results/heedful.yaml" in hub.api.list_repo_files("me/m")
    sent_text = Path(hub.api.hf_hub_download("me/m", ".eval_results/heedful.yaml")).read_text()
    assert sent_text == results_file(known)
    entries = yaml.safe_load(sent_text)
    expected = {"id": "nyu-mll/glue", "task_id": "sst2", "revision": "abc"}
    assert entries[0]["dataset"] == expected
    assert entries[0]["value"] == known.metrics["test"]["accuracy"]
    assert "on validation, 95 % interval" in entries[0]["notes"], "the split of the data set, not of the run"


@pytest.mark.parametrize(
    ("given", "local", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", [], "Qwen/Qwen2.5-0.5B"),
        ("gpt2", [], "gpt2"),
        ("my/gone-base", ["my/gone-base"], None),
        ("runs/mlm/model", ["runs/mlm/model"], None),
        ("mistralai/Mistral-7B-v0.1", None, "mistralai/Mistral-7B-v0.1"),
        ("runs/mlm", None, None),
        ("a/gone/base", None, None),
        ("/gone", None, None),
    ],
)
def test_a_base_is_of_the_hub_where_the_run_found_it_there(given, local, expected, run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"name": given, "revision": "abc"}
    config["data"]["train"] = "me/data-v1.0:train"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    change_manifest(run, local=local)
    known = facts.read("runs/run")
    assert known.base.hub_id == expected
    assert ModelCard(card(known, "m", hub_id="me/m")).data.base_model == expected
    assert known.data["train"].hub_id == "me/data-v1.0"
    packed = pack(known, "m", hub_id="me/m", staging=tmp_path / "staging").files["adapter/adapter_config.json"]
    assert json.loads(packed.read_text())["base_model_name_or_path"] == (expected or known.base.name)


def test_a_run_says_what_it_found_here(run, trained):
    local = json.loads((run / "manifest.json").read_text())["local"]
    assert local == [f"{trained}/base", f"{trained}/rows.csv", "rows.csv", "rows.csv"]


def test_the_card_says_by_what_it_was_scored(run):
    assert "Scored by" not in card(facts.read("runs/run"), "m", hub_id=None)
    change_manifest(run, scored_by="sacrebleu: BLEU|tok:13a")
    assert "Scored by `sacrebleu: BLEU|tok:13a`." in card(facts.read("runs/run"), "m", hub_id=None)


def test_the_card_names_every_setting_of_the_training(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    train = TrainSection.model_fields
    config["train"] = {name: f"changed-{name}" for name in train}
    config["model"] |= {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    config["lora"] |= {"use_dora": True, "target_modules": ["query"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = card(facts.read("runs/run"), "m", hub_id="me/m")
    assert [name for name in train if f"changed-{name}" not in text] == []
    assert "- model.load_in_4bit: True\n- model.bnb_4bit_quant_type: fp4" in text
    assert "- lora.use_dora: True" in text
    assert "- lora.target_modules: ['query']" in text


@pytest.mark.parametrize("place", [None, "decoder.self"])
def test_a_conversion_is_named(place, run):
    assert "## Attention" not in card(facts.read("runs/run"), "m", hub_id="me/m")
    path, plan = run / "config.yaml", {"variant": "grouped_query", "kv_heads": 1}
    config = yaml.safe_load(path.read_text()) | {"attention": {place: plan} if place else plan}
    path.write_text(yaml.safe_dump(config))
    assert "converted to a plain model with fewer key/value heads" in card(facts.read("runs/run"), "m", hub_id="me/m")


def test_another_attention_is_named_with_what_opens_it(run):
    path = run / "model/config.json"
    plan = {"variant": "sliding_window", "reach": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_plan": plan}))
    text = card(facts.read("runs/run"), "m", hub_id="me/m")
    assert "transformers alone refuses to open it" in text
    assert '{"reach": 2, "variant": "sliding_window"}' in text
    assert "from transformers import" not in text
    assert "attention-sliding_window" in ModelCard(text).data.tags
