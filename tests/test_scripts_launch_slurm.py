"""Several nodes: the script for SLURM, and what it starts, as two agents of torchrun on loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_pipelines_resume import facts
from tiny_families import make_rows, save_body

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/launch_slurm.sh"


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def job(bin_, *arguments, **slurm):
    """The script as SLURM runs it, with programs of ``bin_`` for SLURM's own."""
    slurm = {"JOB_NODELIST": "n[1-2]", "JOB_ID": "7", "NNODES": "2", "GPUS_ON_NODE": "4"} | slurm
    environment = {f"SLURM_{name}": value for name, value in slurm.items()} | {"PATH": f"{bin_}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)


def write_programs(folder, **programs):
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{text}\n")
        (folder / name).chmod(0o755)


def test_the_script_starts_one_agent_a_node(tmp_path):
    write_programs(tmp_path, srun='echo "$@"', scontrol="echo first; sleep 0.2; echo second")
    words = {}
    for restarts in ({}, {"RESTART_COUNT": "1"}):
        said, _ = job(tmp_path, "run.yaml", "seed=1", SUBMIT_DIR=str(tmp_path), **restarts).communicate(timeout=60)
        words[len(restarts)] = said.split()
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=first:20007"} <= set(words[0])
    assert words[0][-4:] == ["pipelines.cli", "finetune", "run.yaml", "seed=1"]
    assert words[1] == [*words[0], "resume=auto"]


def test_slurm_leaves_the_ranks_the_time_that_torchrun_leaves_them():
    text = SCRIPT.read_text()
    assert {"--requeue", "--open-mode=append"} <= set(re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE))
    (told,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    (grace,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)
    assert 30 < int(grace) < int(told)


STEP = "trap 'sleep 0.5; exit {code}' TERM; echo $$ > step; while :; do sleep 0.1; done"


@pytest.mark.fault(
    "a SLURM job reaches its time limit", "it is told before, saves and is requeued; cancelled or failed, it is not"
)
@pytest.mark.parametrize(
    ("srun", "sent", "code", "requeued"),
    [
        (STEP.format(code=1), signal.SIGUSR1, 1, True),
        (STEP.format(code=0), signal.SIGUSR1, 0, False),
        (STEP.format(code=1), signal.SIGTERM, -signal.SIGTERM, False),
        ("echo $$ > step; sleep 1; exit 1", None, 1, False),
        ("echo $$ > step; sleep 1; exit 0", None, 0, False),
    ],
    ids=["its time is up", "it ended meanwhile", "cancelled", "it failed", "it ended"],
)
def test_a_job_whose_time_is_up_is_requeued(srun, sent, code, requeued, tmp_path):
    write_programs(
        tmp_path, srun=srun, scontrol='echo "$@" >> calls', scancel='echo "scancel $@" >> calls; kill -TERM $(cat step)'
    )
    child = job(tmp_path, "run.yaml", SUBMIT_DIR=str(tmp_path))
    while not ((tmp_path / "step").exists() and (tmp_path / "step").read_text()):
        assert child.poll() is None
        time.sleep(0.02)
    if sent is not None:
        child.send_signal(sent)
    try:
        assert child.wait(timeout=30) == code
    finally:
        if sent == signal.SIGTERM:  # SLURM would end the step too
            os.kill(int((tmp_path / "step").read_text()), signal.SIGKILL)
    _, *calls = (tmp_path / "calls").read_text().splitlines()
    told = ["scancel --signal=TERM 7"] if sent == signal.SIGUSR1 else []
    assert calls == told + (["requeue 7"] if requeued else [])


AGENTS = """
cd - > /dev/null
shift
"$@" & one=$!
"$@" & two=$!
echo $one $two > {folder}/step
wait $one && code=0 || code=$?
wait $two || code=$?
exit $code
"""


def write_run(folder, **train):
    save_body("bert", folder / "model")
    make_rows("classification", 24).remove_columns("row").to_json(folder / "train.jsonl")
    values = {
        "task": "classification",
        "model": {"name": str(folder / "model"), "max_length": 32},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "train.jsonl")},
        "train": {"batch_size": 4, **train},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.fault("the same, on two nodes", "the requeued job goes on to the bit")
@pytest.mark.slow
def test_a_requeued_job_goes_on_to_the_bit(tmp_path):
    """Two agents of torchrun on loopback stand for two nodes; the second job ends what the first began."""
    write_run(tmp_path, max_steps=300, save_steps=300, eval_steps=300, logging_steps=1)
    write_programs(
        tmp_path,
        srun=AGENTS.format(folder=tmp_path),
        scontrol='case $1 in show) echo 127.0.0.1;; *) echo "$@" >> calls;; esac',
        scancel="kill -TERM $(cat step)",
    )
    slurm = {"SUBMIT_DIR": str(ROOT), "JOB_ID": str(free_port() - 20000), "GPUS_ON_NODE": "1"}
    history = tmp_path / "cut/history.jsonl"
    given = [str(tmp_path / "run.yaml"), f"output_dir={tmp_path / 'cut'}"]
    first = job(tmp_path, *given, **slurm)
    while not (history.exists() and history.read_text().count("\n") > 7):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(timeout=120) == 1
    assert (tmp_path / "calls").read_text() == f"requeue {slurm['JOB_ID']}\n"
    (saved,) = (tmp_path / "cut/checkpoints").iterdir()
    assert saved.name != "step-300"
    assert job(tmp_path, *given, **slurm, RESTART_COUNT="1").wait(timeout=120) == 0
    assert job(tmp_path, given[0], f"output_dir={tmp_path / 'whole'}", **slurm).wait(timeout=120) == 0
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")


def free_port():
    """Of the ports that the script makes of a job's number."""
    for port in range(20000, 40000):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_two_nodes_do_as_two_processes_do(tmp_path):
    write_run(tmp_path, max_steps=3)
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
