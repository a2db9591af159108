"""Whatever is handed in by mistake ends in one message and exit code 2, before an update, with nothing written."""

import io
import runpy
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import fault_table
import pytest
import torch
import yaml
from bad_inputs import CODE, GOOD, KINDS, TAG, bring_code, bring_tokenizer_code, evil, write
from tiny_families import SHORT, save_body
from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

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


def test_the_page_of_faults_is_what_the_tests_say():
    """If not: make reliability."""
    page = Path(__file__).parent.parent / "docs/reliability.md"
    assert page.read_text(encoding="utf-8") == fault_table.document()


class Terminal(io.StringIO):
    """Where somebody sits who would be asked."""

    def isatty(self):
        return True

    def readline(self, *_):
        return "y\n"


@pytest.mark.parametrize("terminal", [False, True], ids=["", "at a terminal"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attacks: ")])
def test_an_attack_runs_nothing(name, terminal, project, cli_run, monkeypatch):
    """Each would make the file `ran`, here or above."""
    if terminal:
        monkeypatch.setattr("sys.stdin", Terminal())
    bad = CASES[name]
    Path("run.yaml").write_text(yaml.safe_dump(config(bad.task)))
    code, _, log = cli_run(*bad.prepare())
    assert code == bad.ends, log
    if bad.ends == 0:
        assert [line for line in log.splitlines() if all(part in line for part in bad.said)], log
    assert not [path for path in project.parent.rglob("*") if path.name in ("ran", "ran.jinja")]


def unpickle():
    evil("evil.bin")
    torch.load("evil.bin", weights_only=False)


def trust(spoil, open_):
    spoil()
    with suppress(AttributeError):  # once it has run, it has no class of that name
        open_("./model", trust_remote_code=True)


def script():
    write(Path("set/set.py"), CODE)
    runpy.run_path("set/set.py")


PAYLOADS = {
    "a pickle": unpickle,
    "code that a model brings": lambda: trust(bring_code, AutoConfig.from_pretrained),
    "code that a tokenizer brings": lambda: trust(bring_tokenizer_code, AutoTokenizer.from_pretrained),
    "a tag of Python's": lambda: yaml.unsafe_load(f"seed: {TAG}"),
    "a loading script": script,
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payload_of_the_attacks_does_run(name, project, monkeypatch):
    """Where somebody trusts it: or else that it does not run would prove nothing."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(project / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])  # the cache is added to it
    PAYLOADS[name]()
    assert Path("ran").exists()


@pytest.mark.parametrize("name", [name for name, bad in CASES.items() if bad.ends == 2])
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
