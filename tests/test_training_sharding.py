"""Sharded training does as one process does, whatever the model; its checkpoints serve any number of processes.

Run as a script by torchrun, this file does what each of several processes must. More in test_training_loop.py.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from test_training_loop import flat, launch, make_trainee
from tiny_families import DECODERS, FAMILIES, SEQ2SEQ, make_model, make_task
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from heedful import UserError
from pipelines.cli import leave
from training import checkpoints
from training.batches import Batching, epochs
from training.checkpoints import Position
from training.evaluation import predict
from training.loop import _save, run_update, updates
from training.lora import add_lora
from training.sharding import blocks, local

TASK_OF = dict.fromkeys(FAMILIES, "ner") | dict.fromkeys(DECODERS, "generation") | dict.fromkeys(SEQ2SEQ, "translation")


def with_lora(model, **kwargs):
    return add_lora(model, [name for name, _ in model.named_parameters() if "classifier" in name], r=2, **kwargs)


def with_recomputing(model):
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


CASES = {family: (family, lambda model: model) for family in TASK_OF} | {
    "lora": ("bert", with_lora),
    "dora": ("bert", lambda model: with_lora(model, use_dora=True)),
    "lora, tied": ("gpt2", with_lora),
    "dora, tied": ("gpt2", lambda model: with_lora(model, use_dora=True)),
    "recomputed": ("bert", with_recomputing),
    "recomputed, tied": ("llama", with_recomputing),
    "called twice": ("albert", lambda model: model),
}
SIZES = {"called twice": {"num_hidden_groups": 1}}
FEW = ("t5", "bart", "lora, tied", "recomputed, tied", "called twice")


def make_case(case, *, sharded):
    family, alter = CASES[case]
    task, rows, features = make_task(TASK_OF[family], family)
    sizes = {"init_std": 0.5} | SIZES.get(case, {})  # large, so that a text is generated
    model = alter(make_model(family, task.auto_class, dropout=False, **sizes, **task.model_kwargs()))
    trainee = make_trainee(task, model, optim="adamw_torch_fused", learning_rate=0.1, epsilon=1e-2, sharded=sharded)
    return trainee, rows, features


def micro_batches_of(trainee, features, *, step, **batching):
    batching = Batching(3, seed=1, **batching)
    ((*_, micro),) = updates(trainee, epochs(features, batching, step=step), batching, start=step, stop=step + 1)
    return micro


def change(case, *, sharded):
    """One update by three examples, each alone: one of two ranks has a pass more to make."""
    trainee, _, features = make_case(case, sharded=sharded)
    features = features.select(range(3))
    before = flat(trainee.bare_model)
    micro = micro_batches_of(trainee, features, step=0, micro_batch_size=1)
    run_update(trainee, micro, features, step=0)
    return flat(trainee.bare_model) - before


def parts(trainee):
    return {
        "model": trainee.bare_model,
        "optimizer": trainee.optimizer.optimizer,
        "scheduler": trainee.scheduler,
    }


def states(trainee):
    """Weights and optimizer state, whole."""
    found = [p.detach() for p in trainee.bare_model.parameters()]
    found += [v for state in trainee.optimizer.state.values() for _, v in sorted(state.items())]
    return [t.full_tensor() if isinstance(t, DTensor) else t.clone() for t in found]


def answers(trainee, rows, features):
    """Three texts on two ranks, one at a time: the ranks generate another number of times, and of tokens."""
    found = predict(trainee.task, trainee.model, features, accelerator=trainee.accelerator, batch_size=1)
    return trainee.task.decode(found, rows)


def one_batch(case):
    """Evaluation that has a batch for one rank alone, and an update: what is found out once a process must be on both.

    Or they wait for each other for ever.
    """
    trainee, _, features = make_case(case, sharded=True)
    predict(trainee.task, trainee.model, features, accelerator=trainee.accelerator, batch_size=len(features))
    run_update(trainee, micro_batches_of(trainee, features, step=0, micro_batch_size=1), features, step=0)


def make_texts(*, sharded):
    trainee, rows, features = make_case("bart", sharded=sharded)
    return trainee, rows.select(range(3)), features.select(range(3))


def main(folder, cases):
    """What each process does."""
    one_batch("recomputed, tied")
    trainee, rows, features = make_texts(sharded=True)
    accelerator, main_process = trainee.accelerator, trainee.accelerator.is_main_process
    before = answers(trainee, rows, features)
    total, own = (sum(f(p).numel() for p in trainee.model.parameters()) for f in (lambda p: p, local))

    # A plain checkpoint, as one process writes it, is read into parts.
    checkpoints.load(folder / "plain/step-1", **parts(trainee))
    read = states(trainee)
    micro = micro_batches_of(trainee, features, step=1)
    run_update(trainee, micro, features, step=1)
    stale = folder / "sharded/.tmp-step-2-shards"
    if main_process:  # left by a save of more processes that was killed
        stale.mkdir(parents=True)
        (stale / "shard-00003-model-00001-of-00001.safetensors").write_bytes(b"stale")
    _save(trainee, folder / "sharded", Position(step=2), keep=1)
    written = states(trainee)

    def refuse(*args):
        raise OSError("no room left")

    if not main_process:
        HuggingFaceStorageWriter.write_data = refuse
    try:
        _save(trainee, folder / "sharded", Position(step=3), keep=1)
        failure = ""
    except UserError as error:
        failure = str(error)
    results = {
        "changes": {case: change(case, sharded=True) for case in cases},
        "answers": before,
        "held": gather_object([(own, total, type(trainee.model).__name__)]),
        "read": read,
        "written": written,
        "failures": gather_object([failure]),
    }
    if main_process:
        torch.save(results, folder / "results.pt")
    accelerator.wait_for_everyone()


@pytest.mark.fault(
    "the disk of one of two processes is full, of a sharded run", "both learn of it and end with a message"
)
@pytest.mark.parametrize("cases", [FEW, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["few", "all"])
def test_two_processes_with_half_a_model_each_do_as_one_does(cases, tmp_path):
    """One launch for all checks, since most of its time is the start of the processes."""
    trainee, rows, features = make_texts(sharded=False)
    untrained = answers(trainee, rows, features)
    assert any(answer["generated"] for answer in untrained)
    micro = micro_batches_of(trainee, features, step=0)
    run_update(trainee, micro, features, step=0)
    checkpoints.save(tmp_path / "plain", **parts(trainee), position=Position(step=1))

    results = launch(__file__, 2, tmp_path, *cases)
    wrong = {}
    for case in cases:
        ours, expected = results["changes"][case], change(case, sharded=False)
        assert expected.norm() > 1e-3, case
        if (difference := float((ours - expected).norm() / expected.norm())) > 1e-5:
            wrong[case] = difference
    assert wrong == {}
    assert results["answers"] == untrained
    for own, total, name in results["held"]:
        assert own == pytest.approx(total / 2, rel=0.01)
        assert name == "FSDPBartForConditionalGeneration"  # and no DistributedDataParallel
    assert all(map(torch.equal, results["read"], states(trainee)))
    assert len(results["failures"]) == 2
    assert all("no room left (process 1)" in failure or "see the main" in failure for failure in results["failures"])

    # What two processes wrote, one reads into a plain model.
    assert [path.name for path in checkpoints.steps(tmp_path / "sharded")] == ["step-2"]
    path = tmp_path / "sharded/step-2"
    assert sorted(file.name for file in path.iterdir()) == [
        "MANIFEST.json",
        "optimizer.json",
        "position.json",
        "scheduler.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    ]
    assert checkpoints.load(path, **parts(trainee)).step == 2
    assert all(map(torch.equal, results["written"], states(trainee)))
    run_update(trainee, micro, features, step=2)  # and goes on


@pytest.mark.parametrize("family", TASK_OF)
def test_the_blocks_hold_most_parameters_and_share_none(family):
    model = make_model(family, AutoModel)
    inside = [p for block in blocks(model) for p in block.parameters()]
    assert len(set(inside)) == len(inside)
    layers = [p for name, p in model.named_parameters() if any(part.isdecimal() for part in name.split("."))]
    assert {id(p) for p in inside} == {id(p) for p in layers}


def test_a_block_that_shares_a_parameter_is_no_block():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), "head": nn.Linear(2, 2)})
    model["head"].weight = model["layers"][1].weight
    assert blocks(model) == [model["layers"][0], model["layers"][2]]


def test_a_checkpoint_of_which_a_part_lies_on_another_machine_is_none(tmp_path):
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    checkpoints._check_complete(tmp_path, {"weight": torch.zeros(2, 3)})
    with pytest.raises(OSError, match="one for all machines"):
        checkpoints._check_complete(tmp_path, {"weight": torch.zeros(4, 3)})


def test_one_process_is_told_that_it_shares_with_none():
    from pipelines import building
    from pipelines.config import override

    model = nn.Linear(2, 2)
    values = {"task": "ner", "output_dir": "none", "model": {"name": "none"}, "distributed": "fsdp2"}
    config = override(values, [], where="here")
    said = building.distribute(config, model, SimpleNamespace(num_processes=1))
    assert said == ["distributed=fsdp2: one process shares with none, and trains as ever"]
    assert type(model) is nn.Linear


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
