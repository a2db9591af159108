"""Several nodes: the script for SLURM, and what it starts, as two agents of torchrun on loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_families import make_rows, save_body

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/launch_slurm.sh"


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_script_starts_one_agent_a_node(tmp_path):
    for name, text in {"srun": 'echo "$@"', "scontrol": "echo first; sleep 0.2; echo second"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "n[1-2]", "JOB_ID": "7", "NNODES": "2", "GPUS_ON_NODE": "4"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()} | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}"
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), "run.yaml", "seed=1"], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.split()
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=first:20007"} <= set(words)
    assert words[-4:] == ["pipelines.cli", "finetune", "run.yaml", "seed=1"]


@pytest.mark.slow
def test_two_nodes_do_as_two_processes_do(tmp_path):
    save_body("bert", tmp_path / "model")
    make_rows("classification", 24).remove_columns("row").to_json(tmp_path / "train.jsonl")
    values = {
        "task": "classification",
        "model": {"name": str(tmp_path / "model"), "max_length": 32},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "train.jsonl")},
        "train": {"max_steps": 3, "batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d"]
    verb = ["-m", "pipelines.cli", "finetune", str(tmp_path / "run.yaml")]
    node = [*launch, "--nnodes=2", "--nproc_per_node=1", f"--rdzv_endpoint=127.0.0.1:{port}", *verb]
    agents = [subprocess.Popen([*node, f"output_dir={tmp_path / 'nodes'}"], cwd=ROOT) for _ in range(2)]
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0]
    alone = [*launch, "--nproc_per_node=2", "--rdzv_endpoint=localhost:0", *verb, f"output_dir={tmp_path / 'alone'}"]
    subprocess.run(alone, cwd=ROOT, check=True)
    metrics, weights = (
        [(tmp_path / run / name).read_bytes() for run in ("nodes", "alone")]
        for name in ("metrics.json", "model/model.safetensors")
    )
    assert metrics[0] == metrics[1]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "nodes/manifest.json").read_text())["machine"]["world_size"] == 2
