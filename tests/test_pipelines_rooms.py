"""The walls of the house: imports run one way, and the wheel holds every room."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("heedful", "sources", "tasks", "attention", "training", "hub", "pipelines")
"""From the ground floor up; a room may import those below it."""


def files(room):
    return [ROOT / f"{room}.py"] if room == "heedful" else sorted((ROOT / room).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests", "scripts"}
    found = files(room)
    assert found
    assert {(str(path), name) for path in found for name in imported(path) if name in above} == set()


def test_attention_knows_nothing_of_tasks_and_data():
    assert {name for path in files("attention") for name in imported(path)} & {"tasks", "sources"} == set()


def test_the_hub_knows_nothing_of_training():
    assert "training" not in {name for path in files("hub") for name in imported(path)}


def test_the_server_imports_no_torch():
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub'}"
    code = f"import sys, hub.server; raise SystemExit(', '.join({heavy} & sys.modules.keys()) or None)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_package_is_listed_for_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for room in ROOMS[1:] for path in files(room)}
    assert {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders} == set(listed)
