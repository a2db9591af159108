"""Whatever is handed in by mistake ends in one message and exit code 2, before an update, with nothing written."""

import shutil
from pathlib import Path

import pytest
import yaml
from bad_inputs import GOOD, KINDS
from tiny_families import SHORT, save_body

from sources.files import sha256_of

CASES = {f"{kind}: {name}": bad for kind, table in KINDS.items() for name, bad in table.items()}


def config(task):
    values = {
        "task": task,
        "model": {"name": "./model", "max_length": 32},
        "data": {"train": "train.csv", "stride": 8},
        "train": {"batch_size": 4, "max_steps": 3, "logging_steps": 1},
        task: SHORT.get(task, {}),
    }
    return values | ({"data": values["data"] | {"validation": "dev.csv"}} if task == "classification" else {})


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder in which nothing is wrong, with a finished run of the whole model and one of LoRA."""
    from pipelines.config import validate
    from pipelines.finetune import finetune

    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for family, name in {"bert": "model", "llama": "llama"}.items():
            save_body(family, name)
        for name in ("train.csv", "dev.csv"):
            Path(name).write_text(GOOD)
        for name, lora in {"whole": {}, "lora": {"lora": {"r": 2}}}.items():
            finetune(validate(config("classification") | lora | {"output_dir": f"runs/{name}"}, where=name))
    return folder


@pytest.fixture
def project(good, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    return folder


def content(folder):
    return {str(path): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_one_message_and_nothing_is_written(name, project, cli_run, monkeypatch):
    bad = CASES[name]
    Path("run.yaml").write_text(yaml.safe_dump(config(bad.task)))
    arguments = bad.prepare()
    before = content(project)
    monkeypatch.setattr("training.loop.run_update", lambda *_, **__: pytest.fail("an update was made"))
    code, out, log = cli_run(*arguments)
    assert code == 2, log
    assert out == ""
    assert "Traceback" not in log
    assert log.count("error\n") == 1, log
    message = log.partition("error\n")[2]
    assert [part for part in bad.said if part not in message] == [], message
    assert content(project) == before
