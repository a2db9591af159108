"""A base model by its name on a hub that does not answer: from the cache, and said, or refused; never half of each."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hub_server import client, hub_on_loopback
from huggingface_hub import close_session, constants
from tiny_families import save_body

ROWS = "text,label\n" + "".join(f"the cat {w} {'dog' * i},{'ab'[i % 2]}\n" for i, w in enumerate(["sat", "on"] * 6))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with me/base, a run of one update on it, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    with hub_on_loopback(tmp_path / "hub", ("me", "write")) as (server, token):
        server.api = client(monkeypatch, server, token)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        save_body("bert", "base")
        server.api.create_repo("me/base")
        server.api.upload_folder(repo_id="me/base", folder_path="base")
        Path("rows.csv").write_text(ROWS)
        values = {
            "task": "classification",
            "model": {"name": "me/base", "max_length": 32},
            "data": {"train": "rows.csv", "validation": "rows.csv"},
            "train": {"max_steps": 1, "batch_size": 4},
        }
        Path("run.yaml").write_text(yaml.safe_dump(values))
        yield server


def base_of(run):
    return json.loads(Path(run, "manifest.json").read_text())["base"]


def end(hub, how):
    """Nobody listens any more, or whoever does hangs up, or answers that."""
    if how == "closed":
        hub.shutdown()
        hub.server_close()
        close_session()  # or the client goes on with the connection that it has
    else:
        hub.faults += [("", how)] * 10_000


DOWN = {"closed": "ConnectError", "cut": "RemoteProtocolError", 429: "429", 503: "503"}


@pytest.mark.fault("the hub: that of the base model is down, and the cache has it", "said, with its commit, and used")
@pytest.mark.parametrize("how", DOWN)
def test_a_cached_model_stands_in_for_a_hub_that_is_down_and_it_is_said(how, hub, cli_run):
    code, _, log = cli_run("finetune", "run.yaml", "output_dir=runs/up")
    assert (code, "does not answer" in log) == (0, False), log
    commit = hub.api.model_info("me/base").sha
    end(hub, how)
    hub.calls.clear()
    code, _, log = cli_run("finetune", "run.yaml", "output_dir=runs/down")
    assert code == 0, log
    said = f"! {hub.url} does not answer ({DOWN[how]}): me/base is taken from the cache, as it was at {commit};"
    assert log.count(said) == 1, log
    assert len(hub.calls) <= 1, "it is asked once"
    assert base_of("runs/down") == base_of("runs/up")


@pytest.mark.fault("the hub of the base model is down, and the cache has it not", "one message")
@pytest.mark.parametrize("how", DOWN)
def test_without_a_cache_a_hub_that_is_down_is_one_message(how, hub, cli_run):
    end(hub, how)
    code, _, log = cli_run("finetune", "run.yaml")
    assert (code, log.count("error\n"), "Traceback" in log, Path("runs").exists()) == (2, 1, False, False), log
    assert "me/base" in log.partition("error\n")[2]


def test_no_model_is_made_of_the_cache_and_of_a_hub_that_comes_back(hub, cli_run):
    assert cli_run("finetune", "run.yaml", "output_dir=runs/first")[0] == 0
    shutil.rmtree("base")
    save_body("bert", "base", hidden_size=32, seed=5)
    hub.api.upload_folder(repo_id="me/base", folder_path="base")
    hub.faults += [("GET /api/models/me/base", 503)]
    code, _, log = cli_run("finetune", "run.yaml", "output_dir=runs/second")
    assert (code, "does not answer (503)" in log) == (0, True), log
    assert base_of("runs/second") == base_of("runs/first")
