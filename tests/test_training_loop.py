"""The loop: one update, whatever the micro-batches and the processes; exact resuming; stopping in time.

Run as a script by torchrun, this file makes the same updates on several processes.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from attention_samples import NARROW, swap
from rich.console import Console
from tiny_families import FAMILY_OF, SHORT, make_model, make_task
from torch.distributed.tensor import DTensor

from attention.sharing import connect
from heedful import NonFiniteLossError, UserError
from pipelines.cli import leave
from pipelines.scoring import evaluate_split
from tasks import TASKS
from tasks.baselines import Split
from training import checkpoints
from training.batches import Batching, epochs, examples, rank_share
from training.checkpoints import Position
from training.evaluation import predict
from training.loop import Schedule, Stopped, Trainee, _save, note_score, run_update, seed_step, train, updates
from training.optimizer import build_optimizer, build_scheduler, parameter_groups
from training.sharding import is_sharded, shard
from training.tracking import Tracker

TASK_NAMES = tuple(TASKS)
SETUPS = {
    "sgd": {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0},
    "sgd, clipped": {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05},
    # A large epsilon: with 1e-8 Adam blows up the rounding of gradients that are zero in exact arithmetic.
    "adamw, clipped": {"optim": "adamw_torch_fused", "learning_rate": 0.1, "max_grad_norm": 0.05, "epsilon": 1e-2},
}
ACROSS_RANKS = {
    "classification": "adamw, clipped",
    "ner": "sgd",
    "qa": "sgd, clipped",
    "summarization": "adamw, clipped",
    "translation": "sgd",
    "generation": "sgd, clipped",
    "mlm": "sgd",
}


def make_trainee(
    task,
    model=None,
    *,
    optim="sgd",
    learning_rate=0.1,
    max_grad_norm=1.0,
    epsilon=1e-8,
    dropout=False,
    total_steps=8,
    warmup=0,
    sharded=False,
    attention=None,
):
    accelerator = Accelerator(cpu=True)
    family, kwargs = FAMILY_OF.get(task.name, "bert"), task.model_kwargs()
    model = model or make_model(family, task.auto_class, dropout=dropout, initializer_range=0.2, **kwargs)
    if attention is not None:
        swap(model, attention)
    connect(model)
    if sharded:
        shard(model, accelerator)
    optimizer = build_optimizer(
        optim,
        parameter_groups(model.named_parameters(), weight_decay=0.0),
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        epsilon=epsilon,
    )
    scheduler = build_scheduler("linear", optimizer, warmup_steps=warmup, num_training_steps=total_steps)
    model = accelerator.prepare_model(model, evaluation_mode=is_sharded(model))
    prepared = accelerator.prepare_optimizer(optimizer)
    return Trainee(accelerator, task, model, prepared, scheduler, max_grad_norm=max_grad_norm, seed=0)


def flat(model):
    parameters = [parameter.detach() for parameter in model.parameters()]
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).double().flatten() for p in parameters])


def make_updates(task_name, setup, *, steps=2, sharded=False, attention=None, **batching):
    """Nine examples, so that the second update has one, fewer than there are processes."""
    task, _, features = make_task(task_name, count=16 if task_name != "generation" else 48)  # of which many are packed
    trainee = make_trainee(task, **SETUPS[setup], sharded=sharded, attention=attention)
    features = features.select(range(9))
    before = flat(trainee.bare_model)
    batching = Batching(8, seed=1, **batching)
    plan = updates(trainee, epochs(features, batching, step=0), batching, start=0, stop=steps)
    made = [run_update(trainee, micro, features, step=step) for step, (*_, micro) in enumerate(plan)]
    return {
        "change": flat(trainee.bare_model) - before,
        "loss": [update.loss for update in made],
        "grad_norm": [update.grad_norm for update in made],
        "tokens": [update.tokens for update in made],
    }


def assert_same(ours, theirs):
    difference = (ours["change"] - theirs["change"]).norm() / theirs["change"].norm()
    assert difference < 1e-5, difference
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert ours["tokens"] == theirs["tokens"]


WHOLE = {"overhead": 1e9}
ONE_EACH = {"micro_batch_size": 1}
TWO_EACH = {"micro_batch_size": 2}
SPLITS = {
    "8 x 1": ONE_EACH,
    "4 x 2": TWO_EACH,
    "2 parts": {"accumulation": 2},
    "by length": {"overhead": 4.0},
}
ATTENTION = {name: {"variant": name, **settings} for name, settings in NARROW.items()}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("task_name", TASK_NAMES)
def test_the_update_does_not_depend_on_the_micro_batches(task_name, setup):
    whole = make_updates(task_name, setup, **WHOLE)
    assert whole["change"].norm() > 1e-3
    for split in SPLITS.values():
        assert_same(make_updates(task_name, setup, **split), whole)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("task_name", ["ner", "generation", "translation"])
def test_the_update_does_not_depend_on_the_micro_batches_with_another_attention(task_name, attention):
    """Padding and packed texts differ from split to split: a pattern must go by the row, not by the batch."""
    whole = make_updates(task_name, "sgd", attention=ATTENTION[attention], **WHOLE)
    full = make_updates(task_name, "sgd", **WHOLE)
    assert whole["grad_norm"] != pytest.approx(full["grad_norm"], rel=1e-4), "it is another attention"
    for split in SPLITS.values():
        assert_same(make_updates(task_name, "sgd", attention=ATTENTION[attention], **split), whole)


@pytest.mark.fault(
    "the loss of a row is NaN that one of several processes alone sees",
    "all stop before the weights change, and name that row; the checkpoint before is whole",
)
@pytest.mark.parametrize(
    ("world_size", "distributed"),
    [(2, "ddp"), (3, "ddp"), (2, "fsdp2"), pytest.param(3, "fsdp2", marks=pytest.mark.slow)],
)
def test_several_processes_do_as_one_does(world_size, distributed, tmp_path):
    """One launch for all checks, since most of its time is the start of the processes."""
    results = launch(__file__, world_size, tmp_path, distributed)
    for task_name, setup in ACROSS_RANKS.items():
        whole = make_updates(task_name, setup, **WHOLE)
        for made in results["updates"][task_name].values():
            assert_same(made, whole)
    assert results["masks"] == world_size  # each rank has dropout masks of its own
    assert results["stop"] == [True] * world_size  # one rank was asked
    assert results["nan"] == [True] * world_size  # one rank had it
    task, rows, features = make_task("ner")
    said = f"step 3, training rows [{ill_row(features, world_size)}]"  # of another rank than the main one
    assert results["ill row"] == [(said, "step-2", True)] * world_size
    assert results["disk"] == [True] * world_size  # the main process could not write
    alone = make_trainee(task)
    for count, (predictions, whole) in results["predictions"].items():
        part, few = features.select(range(count)), rows.select(range(count))
        expected = predict(task, alone.model, part, accelerator=alone.accelerator, batch_size=3)
        assert whole == [True] * world_size
        assert task.decode(predictions, few) == task.decode(expected, few)
    for task_name, found in results["scores"].items():
        assert found == pytest.approx(scores(task_name), rel=1e-12, abs=1e-12), task_name


def scores(task_name, *, sharded=False):
    """Of an untrained model, over eight batches that would be others if each rank cut its own."""
    task, rows, _ = make_task(task_name, count=40, **SHORT.get(task_name, {}))
    features = datasets.Dataset.from_dict(task.encode(rows[:], training=False))
    trainee = make_trainee(task, sharded=sharded)
    split = Split(rows, features)
    return evaluate_split(task, trainee.bare_model, split, accelerator=trainee.accelerator, batch_size=5)


def launch(file, world_size, folder, *arguments):
    """Run a file on several processes through torchrun; what its main process saved."""
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size), file, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", *command, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=False)  # written by this very test


def main(folder, sharded):
    """What each process does."""
    task, _, features = make_task("ner")
    trainee = make_trainee(task, sharded=sharded)
    accelerator, rank = trainee.accelerator, trainee.accelerator.process_index
    predictions = {}
    for count in (16, 1):  # more and fewer features than processes
        part = features.select(range(count))
        found = predict(task, trainee.bare_model, part, accelerator=accelerator, batch_size=3)
        predictions[count] = found, gather_object([len(found) == count])
    micro = [task.collate(examples(features, np.array([rank])))]
    results = {
        "updates": {
            name: {
                split: make_updates(name, setup, **how, sharded=sharded)
                for split, how in (("whole", WHOLE), ("1 each", ONE_EACH), ("2 each", TWO_EACH))
            }
            for name, setup in ACROSS_RANKS.items()
        },
        "predictions": predictions,
        "scores": {name: scores(name, sharded=sharded) for name in ACROSS_RANKS},
        "masks": len(set(gather_object([masks(rank)]))),
        "stop": gather_object([run_update(trainee, micro, features, step=0, stop=rank == 1).stop]),
        "nan": gather_object([stops_at_nan(trainee, micro, features)]),
        "ill row": gather_object([stops_at_a_row(make_trainee(task, sharded=sharded), features, folder / "ill")]),
        "disk": gather_object([stops_at_full_disk(trainee, folder / "checkpoints")]),
    }
    if accelerator.is_main_process:
        torch.save(results, folder / "results.pt")


def masks(rank):
    seed_step(0, 0, rank)
    return tuple(torch.rand(4).tolist())


def stops_at_nan(trainee, micro, features):
    """A NaN on the last rank must stop all of them before any weight has changed."""
    before = flat(trainee.bare_model)
    if trainee.accelerator.is_last_process:
        trainee = replace(trainee, task=Poisoned(trainee.task))
    try:
        run_update(trainee, micro, features, step=1)
    except NonFiniteLossError:
        return torch.equal(flat(trainee.bare_model), before)
    return False


def stops_at_a_row(trainee, features, folder):
    """What is said where the loss of one row is NaN, what to go on from, and whether that is the model as it was."""
    trainee = replace(trainee, task=Poisoned(trainee.task, row=ill_row(features, trainee.accelerator.num_processes)))
    batching = Batching(4, seed=0, micro_batch_size=1, strategy="sequential")
    try:
        train(
            trainee,
            epochs(features, batching, step=0),
            batching=batching,
            schedule=Schedule(total_steps=4, headline="f1", eval_every=None, save_every=1, keep=2),
            evaluate=dict,
            folder=folder,
            tracker=Tracker(None, Console(quiet=True), log_every=1),
            position=Position(),
        )
    except NonFiniteLossError as error:
        before, good = flat(trainee.bare_model), checkpoints.newest_whole(folder, say=pytest.fail)
        checkpoints.load_model(good, trainee.bare_model)
        return error.where, good.name, torch.equal(flat(trainee.bare_model), before)


def ill_row(features, world_size):
    """One that the second rank alone sees, in the third update of four rows each."""
    index = rank_share(np.arange(8, 12), np.asarray(features["length"]), rank=1, world_size=world_size)[0]
    return features["row"][int(index)]


def stops_at_full_disk(trainee, folder):
    """If the main process alone knew, the others would wait for ever."""
    if trainee.accelerator.is_main_process:
        folder.write_text("a file where the folder should be")
    try:
        _save(trainee, folder, Position(step=1), keep=1)
    except UserError:
        return True
    return False


class Poisoned:
    """A task whose loss is NaN, of every row or of one."""

    def __init__(self, task, row=None):
        self.count, self.collate, self._loss, self._row = task.count, task.collate, task.loss, row

    def loss(self, model, batch):
        ill = self._row is None or self._row in batch["row"]
        return self._loss(model, batch) * (float("nan") if ill else 1.0)


def one_update(trainee, features, *, step=0, rows=8):
    return run_update(trainee, [trainee.task.collate(examples(features, np.arange(rows)))], features, step=step)


@pytest.mark.fault("the loss becomes NaN", "stops before the weights change; exit code 3, naming the rows")
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(optim):
    task, _, features = make_task("classification")
    trainee = make_trainee(task, optim=optim)
    one_update(trainee, features)
    trainee.bare_model.classifier.bias.data[1] = float("inf")
    before, rate, state = flat(trainee.model), trainee.scheduler.get_last_lr(), str(trainee.optimizer.state_dict())
    with pytest.raises(NonFiniteLossError) as caught:
        one_update(trainee, features, step=1)
    assert torch.equal(flat(trainee.model), before)
    assert (trainee.scheduler.get_last_lr(), str(trainee.optimizer.state_dict())) == (rate, state)
    assert caught.value.exit_code == 3
    assert "step 2, training rows [0, 1, 2, 3, 4, 5, 6, 7]" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_stops_too(value):
    task, _, features = make_task("ner")
    trainee = make_trainee(task, max_grad_norm=0.0)
    trainee.model.classifier.weight.register_hook(lambda grad: grad * value)
    before = flat(trainee.model)
    with pytest.raises(NonFiniteLossError, match=r"training rows \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        one_update(trainee, features)
    assert torch.equal(flat(trainee.model), before)


def test_targets_that_are_all_ignored_change_nothing():
    task, _, features = make_task("ner")
    trainee = make_trainee(task, optim="sgd", learning_rate=1.0)
    batch = task.collate(examples(features, np.arange(4)))
    batch["labels"][:] = -100
    before = flat(trainee.model)
    update = run_update(trainee, [batch], features, step=0)
    assert (update.loss, update.grad_norm) == (0.0, 0.0)
    assert torch.equal(flat(trainee.model), before)


def test_the_loss_is_the_mean_over_the_targets():
    """Against cross_entropy on the whole batch, and the gradient's norm against autograd's."""
    task, _, features = make_task("ner")
    trainee = make_trainee(task, max_grad_norm=0.001)
    batch = task.collate(examples(features, np.arange(8)))
    model = make_model("bert", task.auto_class, dropout=False, initializer_range=0.2, **task.model_kwargs())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    loss = torch.nn.functional.cross_entropy(model(**inputs).logits.transpose(1, 2), batch["labels"])
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    update = one_update(trainee, features)
    assert update.loss == pytest.approx(loss.item(), rel=1e-5)
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert update.tokens == int(batch["attention_mask"].sum())


@pytest.mark.parametrize(("limit", "clipped"), [(0.05, True), (0.0, False), (1e6, False)])
def test_the_gradient_is_clipped_to_its_limit(limit, clipped):
    task, _, features = make_task("ner")
    trainee = make_trainee(task, optim="sgd", learning_rate=1.0, max_grad_norm=limit)
    before = flat(trainee.model)
    update = one_update(trainee, features)
    assert update.grad_norm > 0.1  # before clipping
    change = (flat(trainee.model) - before).norm().item()
    assert change == pytest.approx(limit if clipped else update.grad_norm, rel=1e-4)


def test_an_empty_share_runs_at_weight_zero():
    task, _, features = make_task("classification")
    trainee = make_trainee(task)
    before = flat(trainee.model)
    update = run_update(trainee, [], features, step=0)
    assert (update.loss, update.tokens) == (0.0, 0)
    assert torch.equal(flat(trainee.model), before)


def test_dropout_is_a_function_of_seed_step_and_rank_alone():
    task, _, features = make_task("classification")

    def change(step, *, disturb):
        trainee = make_trainee(task, dropout=True)
        before = flat(trainee.model)
        if disturb:
            torch.rand(7)
            predict(task, trainee.model, features, accelerator=trainee.accelerator, batch_size=4)
            trainee.model.eval()
        one_update(trainee, features, step=step)
        return flat(trainee.model) - before

    assert torch.equal(change(3, disturb=False), change(3, disturb=True))
    assert not torch.equal(change(3, disturb=False), change(4, disturb=False))


def test_every_seed_step_and_rank_has_its_own_masks():
    def draw(*key):
        seed_step(*key)
        return torch.rand(2).tolist()

    keys = [(seed, step, rank) for seed in range(4) for step in range(4) for rank in range(4)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(1, 2, 3) == draw(1, 2, 3)


def test_the_rate_is_that_of_the_update():
    task, _, features = make_task("classification")
    trainee = make_trainee(task, learning_rate=0.1, warmup=2)
    rates = [one_update(trainee, features, step=step).learning_rate for step in range(4)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1 * 5 / 6])


class Course:
    """A run in ``folder``: 6 updates an epoch, dropout on; ``scores`` are what evaluation finds."""

    def __init__(self, folder, scores=(), **schedule):
        self.folder, self.scores, self.history = folder, list(scores), folder / "history.jsonl"
        self.task, _, self.features = make_task("classification")
        settings = {"total_steps": 8, "headline": "accuracy", "eval_every": None, "save_every": None, "keep": 2}
        self.schedule = Schedule(**settings | schedule)
        self.said, self.position = [], Position()
        self.trainee = make_trainee(self.task, optim="adamw_torch_fused", learning_rate=1e-3, dropout=True, warmup=2)

    def evaluate(self):
        predict(self.task, self.trainee.model, self.features, accelerator=self.trainee.accelerator, batch_size=5)
        return {"accuracy": self.scores.pop(0)}

    def run(self, **batching):
        self.folder.mkdir(exist_ok=True)
        batching = Batching(3, seed=2, **batching)
        with open(self.folder / "log.txt", "a") as log:
            return train(
                self.trainee,
                epochs(self.features, batching, step=self.position.step),
                batching=batching,
                schedule=self.schedule,
                evaluate=self.evaluate,
                folder=self.folder,
                tracker=Tracker(self.history, Console(file=log), log_every=1),
                position=self.position,
            )

    def resume(self):
        path = checkpoints.newest_whole(self.folder, say=pytest.fail)
        self.position = checkpoints.load(
            path,
            model=self.trainee.bare_model,
            optimizer=self.trainee.optimizer.optimizer,
            scheduler=self.trainee.scheduler,
        )
        return self

    @property
    def left(self):
        return [path.name for path in checkpoints.steps(self.folder)]

    @property
    def losses(self):
        return self.logged("loss")

    def logged(self, key):
        lines = [json.loads(line) for line in self.history.read_text().splitlines()]
        return {line["step"]: line[key] for line in lines if "loss" in line}


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_a_run_that_is_stopped_goes_on_to_the_bit(stop, tmp_path):
    """Other evaluations, other workers, a new process's worth of objects: the same losses and the same weights."""
    straight = Course(tmp_path / "straight")
    straight.run()
    first = Course(tmp_path / "stopped", total_steps=stop)
    first.run(num_workers=2)
    second = Course(tmp_path / "stopped", scores=[0.1] * 9, eval_every=1).resume()
    assert second.position.step == stop
    second.run()
    assert second.losses == straight.losses
    assert torch.equal(flat(second.trainee.model), flat(straight.trainee.model))


def test_every_epoch_has_an_order_of_its_own_and_is_counted(tmp_path):
    course = Course(tmp_path, total_steps=12)
    course.trainee = make_trainee(course.task, learning_rate=0.0)
    course.run()
    first, second = np.split(np.array(list(course.losses.values())), 2)
    assert not np.allclose(first, second, rtol=1e-3)
    assert course.logged("epoch") == pytest.approx({step: step / 6 for step in range(1, 13)}, abs=1e-4)


def test_the_best_is_kept_beside_the_newest(tmp_path):
    course = Course(tmp_path, scores=[0.5, 0.9, 0.8, 0.9], eval_every=2, keep=1, save_every=3)
    position = course.run()
    assert (position.best_step, position.best_score, position.stale_evaluations) == (4, 0.9, 2)
    assert course.left == ["step-4", "step-8"]
    assert checkpoints.read_position(tmp_path / "step-8") == position


def test_a_run_without_evaluation_saves_its_end(tmp_path):
    course = Course(tmp_path)
    assert course.run().best_step is None
    assert course.left == ["step-8"]


@pytest.mark.parametrize(("headline", "best"), [("accuracy", 2), ("perplexity", 4), ("mse", 4)])
def test_what_is_better_depends_on_the_metric(headline, best):
    schedule, position = Schedule(8, headline, eval_every=2, save_every=None, keep=1), Position()
    for position.step, score in [(2, 9.0), (4, 5.0), (6, 7.0), (8, float("nan"))]:
        note_score(position, schedule, score)
    assert position.best_step == best


@pytest.mark.parametrize(
    ("scores", "threshold", "steps"),
    [([0.5, 0.4, 0.4], 0.0, 6), ([0.5, 0.5, 0.5], 0.0, 6), ([0.5, 0.4, 0.6, 0.1], 0.0, 8), ([0.5, 0.55, 0.6], 0.1, 6)],
)
def test_patience(scores, threshold, steps, tmp_path):
    course = Course(tmp_path, scores=scores, eval_every=2, patience=2, threshold=threshold)
    assert course.run().step == steps
    assert course.left[-1] == f"step-{steps}"


def test_sigterm_saves_and_stops(tmp_path):
    course = Course(tmp_path / "stopped")

    def note(tracker, step, epoch, update):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "update", note)
        with pytest.raises(Stopped, match="after saving step 4"):
            course.run()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert course.left == ["step-4"]
    straight, resumed = Course(tmp_path / "straight"), Course(tmp_path / "stopped").resume()
    straight.run()
    resumed.run()
    assert torch.equal(flat(resumed.trainee.model), flat(straight.trainee.model))


def test_due():
    schedule = Schedule(total_steps=7, headline="f1", eval_every=3, save_every=None, keep=1)
    assert [step for step in range(1, 8) if schedule.due(3, step)] == [3, 6, 7]
    assert not any(schedule.due(None, step) for step in range(1, 8))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sharded=sys.argv[2] == "fsdp2")
    leave(0)
