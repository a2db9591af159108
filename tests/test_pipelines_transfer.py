"""``attention.transfer`` as a user meets it: the table, the run's folder, what resumes and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_families import SHORT, make_rows, save_body

from heedful import UserError
from pipelines import transfer as glue
from training import transfer as module

SLOTS = ("attention=linformer", "attention.k=4")
TRANSFER = (*SLOTS, "attention.transfer.steps=2", "attention.transfer.batch_size=8")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a tiny model, two splits and a configuration for a run of two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)
    save_body("bert", "model", initializer_range=0.3)
    write("classification")
    return tmp_path


def write(task):
    for split, seed in {"train": 0, "dev": 1}.items():
        make_rows(task, 18, seed=seed).remove_columns("row").to_json(f"{split}.jsonl")
    values = {
        "task": task,
        "model": {"name": "./model", "max_length": 32},
        "data": {"train": "train.jsonl", "validation": "dev.jsonl", "stride": 8},
        "train": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3, "save_steps": 1},
        task: SHORT.get(task, {}),
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))


def weights(folder):
    return load_file(Path(folder) / "model/model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("lora", [(), ("lora.r=2",)], ids=["whole", "lora"])
def test_a_run_begins_with_the_transfer_and_leaves_the_agreement(project, cli_run, lora):
    code, _, log = cli_run("finetune", "run.yaml", *TRANSFER, *lora)
    assert code == 0, log
    assert "attention.transfer: 2 updates in each stage, agreement on 18 examples of validation" in log
    assert "encoder.self[1]: relative error" in log
    run = project / "runs/run"
    found = json.loads((run / "transfer.json").read_text())
    assert list(found) == ["measured_on", "before", "layers", "outputs"]
    for when in ("before", "layers", "outputs"):
        assert found[when].keys() == {"cosine", "error"}
        assert list(found[when]["error"]) == ["encoder.self[0]", "encoder.self[1]"]
    assert found["before"] != found["layers"] != found["outputs"]
    assert yaml.safe_load((run / "config.yaml").read_text())["attention"]["transfer"]["steps"] == 2
    plan = json.loads((run / "model/config.json").read_text())["attention_plan"]
    assert plan == {"variant": "linformer", "k": 4}
    if lora:
        return
    code, _, log = cli_run("finetune", "run.yaml", *SLOTS, "output_dir=runs/without")
    assert code == 0, log
    assert not same(weights("runs/run"), weights("runs/without"))
    assert not Path("runs/without/transfer.json").exists()


def test_a_run_that_goes_on_keeps_what_was_transferred(project, cli_run, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    assert cli_run("finetune", "run.yaml", *TRANSFER)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_update", killed)
        assert cli_run("finetune", "run.yaml", *TRANSFER, "output_dir=runs/on", "resume=auto")[0] == 130
    assert not Path("runs/on").exists(), "nothing of it is kept"
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.finetune.plain_model", killed)
        code, _, log = cli_run("finetune", "run.yaml", *TRANSFER, "output_dir=runs/on", "resume=auto")
    assert code == 130
    assert "starting anew" in log
    assert "a run killed before its first checkpoint makes it again" in log
    before = Path("runs/on/transfer.json").read_text()
    (newest,) = Path("runs/on/checkpoints").glob("step-2")
    newest.rename("gone")
    other = "attention.transfer.steps=3"
    code, _, log = cli_run("finetune", "run.yaml", *TRANSFER, other, "output_dir=runs/on", "resume=auto")
    assert code == 2
    assert "attention.transfer.steps=3 (was 2)" in log
    code, _, log = cli_run("finetune", "run.yaml", *TRANSFER, "output_dir=runs/on", "resume=auto")
    assert code == 0, log
    assert "resuming after step 1" in log
    assert "made before the first update, and in the checkpoint" in log
    assert "updates in each stage" not in log
    assert Path("runs/on/transfer.json").read_text() == before
    assert same(weights("runs/run"), weights("runs/on"))


def test_without_validation_training_rows_are_kept_back(project, cli_run, monkeypatch):
    monkeypatch.setattr(glue, "KEPT_BACK", 0.2)
    seen = []
    monkeypatch.setattr(glue, "transfer", lambda model, task, features, held, **_: seen.extend([features, held]) or {})
    monkeypatch.setattr(glue, "_table", lambda found: "")
    code, _, log = cli_run("finetune", "run.yaml", *TRANSFER, "data.validation=null")
    assert code == 0, log
    assert "agreement on 4 examples of train, kept back" in log
    learned, held = (set(features["row"]) for features in seen)
    assert (len(learned), len(held)) == (14, 4)
    assert not learned & held


def test_of_one_row_none_can_be_kept_back():
    """Whose two windows are one text."""
    features = datasets.Dataset.from_dict({"row": [3, 3], "length": [5, 4]})
    data = SimpleNamespace(features={"train": features}, rows={})
    with pytest.raises(UserError, match="one training row and no validation"):
        glue._held_out(SimpleNamespace(seed=1), data)


@pytest.mark.parametrize(("task", "family"), [("translation", "t5"), ("generation", "llama")])
def test_it_goes_with_other_tasks(project, cli_run, task, family):
    """Whose validation rows have to be encoded with what they are to say, and perhaps packed."""
    save_body(family, "model", initializer_range=0.3, initializer_factor=2.0)
    write(task)
    window = ("attention=sliding_window", "attention.reach=2", "attention.transfer.steps=1", "train.eval_strategy=no")
    code, _, log = cli_run("finetune", "run.yaml", *window)
    assert code == 0, log
    assert "stage layers is left out" in log
    assert "last hidden states: cosine" in log


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_two_processes_share_it_before_they_share_the_model(project, distributed):
    found = {}
    for processes in ("1", "2"):
        where = [f"output_dir=runs/{processes}", f"distributed={distributed}", "--nproc", processes]
        command = [sys.executable, "-m", "pipelines.cli", "finetune", "run.yaml", *TRANSFER, *where]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        found[processes] = json.loads(Path(f"runs/{processes}/transfer.json").read_text())
    for when in ("before", "layers", "outputs"):
        for measure in ("cosine", "error"):
            assert found["2"][when][measure] == pytest.approx(found["1"][when][measure], rel=1e-3)


def test_a_model_that_was_trained_with_other_attention_is_no_teacher(project, cli_run):
    assert cli_run("finetune", "run.yaml", *SLOTS, "train.max_steps=1")[0] == 0
    code, _, log = cli_run("finetune", "run.yaml", *TRANSFER, "model.name=runs/run/model", "output_dir=runs/on")
    assert code == 2
    assert "a model that was trained with other attention than full" in log
    assert not Path("runs/on").exists()
    code, _, log = cli_run("finetune", "run.yaml", *TRANSFER, "model.name=runs/run/model", "model.init=new_head")
    assert (code, "a model that was trained with other attention than full" in log) == (2, True)


def test_other_verbs_say_what_becomes_of_it(project, cli_run):
    code, out, log = cli_run("plan", "run.yaml", *TRANSFER)
    assert code == 0
    assert "attention.transfer comes on top: 2 updates in each stage" in out + log
    code, _, log = cli_run("attention", "check", "model", *TRANSFER)
    assert code == 2
    assert "'attention.transfer.steps' has no effect here" in log
