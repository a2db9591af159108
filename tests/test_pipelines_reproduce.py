"""A run made again from what it says of itself: the same to the bit, or said where it is not, or refused."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_families import make_rows, save_body


@pytest.fixture
def run(tmp_path, monkeypatch, cli_run):
    """A finished run with dropout and an evaluation in mid-epoch."""
    monkeypatch.chdir(tmp_path)
    save_body("bert", "model")
    for split, seed in {"train": 0, "dev": 1}.items():
        make_rows("classification", 12, seed=seed).remove_columns("row").to_json(f"{split}.jsonl")
    values = {
        "task": "classification",
        "model": {"name": "./model", "max_length": 32},
        "data": {"train": "train.jsonl", "validation": "dev.jsonl"},
        "train": {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "eval_steps": 2},
        "lora": {"r": 2},
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))
    code, _, log = cli_run("finetune", "run.yaml", "output_dir=runs/one")
    assert code == 0, log
    return Path("runs/one")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.fault(
    "a run does not come out as before",
    "`heedful reproduce` names the first difference of losses, metrics and weights; exit code 1",
)
def test_it_is_the_same_to_the_bit_or_said_where_not(run, cli_run):
    code, _, log = cli_run("reproduce", run)
    assert code == 0, log
    assert "runs/one is reproduced, bit for bit" in log
    assert (run.parent / "one.reproduced/model").is_dir()
    history = run / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    lines[1]["loss"] += 1e-15
    history.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    change(run / "model/MANIFEST.json", **{"model.safetensors": "f00d"})
    former = json.loads((run / "manifest.json").read_text())
    change(run / "manifest.json", versions=former["versions"] | {"torch": "1.0"}, git_commit="c0ffee")
    code, _, log = cli_run("reproduce", run, "--out", "again")
    assert code == 1, log
    assert "losses: 1 of" in log
    assert "step 2, loss was" in log
    assert "weights: 1 of 1 differ" in log
    assert "metrics:" not in log
    assert "! versions, torch: 1.0 then" in log
    assert "! git_commit: c0ffee then" in log


def spoil_base():
    path = Path("model/model.safetensors")
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.bias"][0] += 1e-3
    save_file(tensors, path, {"format": "pt"})


SPOILED = {
    "data": (
        lambda run: Path("dev.jsonl").write_text(Path("dev.jsonl").read_text() * 2),
        "changed since that run: validation",
    ),
    "no data": (lambda run: Path("train.jsonl").unlink(), "no such file"),
    "base": (lambda run: spoil_base(), "changed since that run: the base model"),
    "processes": (lambda run: change(run / "manifest.json", machine={"world_size": 2}), "say --nproc 2"),
    "broken": (lambda run: (run / "manifest.json").write_text("{"), "broken JSON"),
    "unfinished": (lambda run: (run / "metrics.json").unlink(), "no finished run"),
}


@pytest.mark.fault(
    "its data, base, processes or files are others or gone", "refused before the first update; exit code 2"
)
def test_what_can_not_be_tried_is_refused(run, cli_run, monkeypatch):
    monkeypatch.setattr("training.loop.run_update", lambda *_, **__: pytest.fail("an update was made"))
    kept = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for spoil, said in SPOILED.values():
        spoil(run)
        code, _, log = cli_run("reproduce", run)
        assert (code, said in log) == (2, True), log
        assert not Path("runs/one.reproduced").exists()
        for path, content in kept.items():
            path.write_bytes(content)
