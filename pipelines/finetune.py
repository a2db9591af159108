"""``heedful finetune``: build the parts in the one legal order, train, evaluate, leave a model behind.

seed -> rows -> tokenizer and task -> model -> features (audited) -> LoRA -> attention transfer -> sharding ->
optimizer -> accelerator.prepare -> resume -> train
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from heedful import UserError
from hub.redaction import redacted
from pipelines import building, runs
from pipelines.baselines import described, merged, score_baselines, score_before_training
from pipelines.preparation import (
    Prepared,
    build_accelerator,
    build_console,
    fingerprints,
    prepare,
    stream_blocks,
    tell,
)
from pipelines.report import progress_lines, show_end
from pipelines.runs import Run
from pipelines.scoring import evaluate_split, scored_by
from pipelines.sections import RunConfig
from pipelines.transfer import recover
from sources.files import fault, strays, write_json
from sources.texts import counted, first_few
from tasks.baselines import Split
from training import checkpoints
from training.batches import Batching, Block, epochs, examples
from training.checkpoints import Position
from training.embeddings import restore_embeddings
from training.export import export
from training.loop import Schedule, Trainee, train
from training.lora import adapter_merged
from training.sharding import is_sharded
from training.tracking import Tracker, open_sinks, require_installed, truncate_history

NOT_A_SCORE = ("best_f1_thresh",)
"""Metrics that are neither better when greater nor when less."""


class Score(Protocol):
    """Metrics of a split."""

    def __call__(self, split: str, *, final: nn.Module | None = None) -> dict[str, Any]:
        """Score the model as it is then, or ``final``, which is to be saved, with intervals of confidence."""
        ...


def finetune(config: RunConfig, *, former: Mapping[str, Any] | None = None, console: Console | None = None) -> Path:
    """Fine-tune as configured.

    Args:
        former: The manifest of a run that this one repeats: other data and another base than its are refused.

    Returns:
        The run's folder.

    Raises:
        UserError: Whatever the user can mend. Until training begins, nothing has been written then.
    """
    accelerator = build_accelerator(bf16=config.train.bf16)
    console = build_console(accelerator, console)
    be_deterministic(config.seed)
    run = Run(Path(config.output_dir))
    run.require_writable()
    require_installed(config.tracking.trackers)
    batching = building.build_batching(config, accelerator)
    checkpoint = runs.find_checkpoint(run, config, say=partial(tell, console))
    data = prepare(config, accelerator, console)
    task, loaded, features = data.task, data.loaded, data.features
    schedule = building.build_schedule(
        config, task, batching.steps_per_epoch(len(features["train"])), validated="validation" in features
    )
    check_schedule(schedule, data, console)
    model = building.adapt(config, task, loaded, features["train"])
    tell(
        console,
        *building.describe_tokenizer(config, task),
        building.describe_model(config, task, loaded, model, features["train"]),
    )
    tell(console, *building.describe_precision(config, accelerator))
    recovered = recover(
        config, data, batching, resumed=checkpoint is not None, accelerator=accelerator, console=console
    )
    tell(console, *building.distribute(config, model, accelerator))
    trainee = building.build_trainee(config, task, model, accelerator, total_steps=schedule.total_steps)
    score = scorer(config, data, trainee, console)
    baselines = score_baselines(task, data.rows, features)
    if checkpoint is None:
        check_headline(schedule, data, score)
    hashes = fingerprints(config, data.sources, accelerator)
    manifest = runs.manifest(
        config,
        data=hashes,
        base=loaded.sha256,
        assets=data.assets,
        world_size=accelerator.num_processes,
        precision=accelerator.mixed_precision,
        scored_by=scored_by(task),
    )
    if former is not None:
        tell(console, *runs.compare_starts(former, manifest))
    position = resume(run, checkpoint, trainee, data=hashes, base=loaded.sha256, console=console)
    if accelerator.is_main_process:
        run.open_(config, manifest, asdict(data.audited))
        if recovered is not None:
            write_json(run.transfer, recovered)
    if config.train.eval_on_start:
        baselines = merged(baselines, score_before_training(run, position, score, splits=list(baselines)))
    if accelerator.is_main_process:
        write_json(run.baselines, baselines)
        tell(console, *described(baselines, task.headline))
    tracker = build_tracker(run, config, trainee, console)
    position = train(
        trainee,
        training_blocks(config, data, batching, position),
        batching=batching,
        schedule=schedule,
        evaluate=lambda: score("validation"),
        folder=run.checkpoints,
        tracker=tracker,
        position=position,
    )
    tracker.close()
    best = run.checkpoints / f"step-{position.best_step or position.step}"
    checkpoints.load_model(best, trainee.bare_model)
    model = plain_model(config, trainee, features["train"], best)
    with adapter_merged(model):  # as model/ will hold it: bf16 rounds the sum of both once more
        metrics = {split: score(split, final=model) for split in features if split != "train"}
    if accelerator.is_main_process:
        finish(run, config, data, model, metrics, console)
        columns = data.rows["train"].column_names
        show_end(console, metrics, baselines, folder=str(run.folder), task=task.name, columns=columns)
    accelerator.wait_for_everyone()
    return run.folder


def scorer(config: RunConfig, data: Prepared, trainee: Trainee, console: Console) -> Score:
    """What scores the model on a split."""

    def score(split: str, *, final: nn.Module | None = None) -> dict[str, Any]:
        return evaluate_split(
            data.task,
            trainee.bare_model if final is None else final,
            Split(data.rows[split], data.features[split]),
            accelerator=trainee.accelerator,
            batch_size=config.train.per_device_eval_batch_size,
            tick=progress_lines(console, split),
            intervals=final is not None,
        )

    return score


def check_schedule(schedule: Schedule, data: Prepared, console: Console) -> None:
    """Refuse to choose by what can not be chosen by; say it where nothing is evaluated.

    Raises:
        UserError: The metric has no better side, or there is nothing to stop early by.
    """
    if schedule.headline in NOT_A_SCORE:
        raise UserError(
            f"{schedule.headline!r} is not better when greater, nor when less",
            where="train.metric_for_best_model",
            expected=f"such as {data.task.headline}",
        )
    if "validation" not in data.rows:
        if schedule.patience is not None:
            raise UserError("no validation data", where="train.early_stopping_patience", expected="data.validation")
        tell(console, "no validation data: nothing is evaluated in training, and the last model is the result")


def check_headline(schedule: Schedule, data: Prepared, score: Score) -> None:
    """Score the untrained model if another metric than usual is asked for, so that a wrong name is not found out late.

    Raises:
        UserError: The task has no such metric.
    """
    if "validation" not in data.rows or schedule.headline == data.task.headline:
        return
    # On all of it: two rows rarely hold every class.
    if schedule.headline not in (metrics := score("validation")):
        raise UserError(
            f"no metric {schedule.headline!r}",
            where="train.metric_for_best_model",
            expected=f"one of: {', '.join(metrics)}",
        )


def training_blocks(config: RunConfig, data: Prepared, batching: Batching, position: Position) -> Iterator[Block]:
    """Features to learn from, without end, from where the run is: epochs, or blocks of a stream."""
    if config.data.streaming:
        return stream_blocks(config, data.task, data.sources["train"], batching, position.block)
    return epochs(data.features["train"], batching, step=position.step)


def be_deterministic(seed: int) -> None:
    """Seed everything and use deterministic kernels, so that a run can be repeated to the bit on one machine."""
    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a debugging aid that costs a pass over every tensor


def resume(
    run: Run, path: Path | None, trainee: Trainee, *, data: dict[str, str], base: str, console: Console
) -> Position:
    """Go on from a checkpoint, or from nothing; then a former run of this name is moved aside, not overwritten.

    Args:
        data: Hashes of what is learned from and scored on.
        base: Of the pretrained weights, of which a checkpoint holds those alone that are trained.

    Raises:
        UserError: The checkpoint is broken or belongs to other settings, other data or another base.
    """
    accelerator = trainee.accelerator
    say = partial(tell, console)
    accelerator.wait_for_everyone()  # every rank has looked before the main one moves anything
    if path is None:
        if accelerator.is_main_process and (former := run.set_aside()) is not None:
            say(f"the former {run.folder} is now {former}")
        return Position(world_size=accelerator.num_processes, data=data, base=base)
    # First, since other data may bring another table of words: shapes would be said to differ, which is no help.
    then = checkpoints.read_position(path)
    runs.refuse_changed(
        runs.origin(then.data, then.base),
        runs.origin(data, base),
        since="this checkpoint",
        where=str(path),
        fix="put them back, or start anew with resume=none",
    )
    position = checkpoints.load(
        path, model=trainee.bare_model, optimizer=trainee.optimizer.optimizer, scheduler=trainee.scheduler
    )
    if position.world_size != accelerator.num_processes:
        say(
            f"resuming on {counted(accelerator.num_processes, 'processes')} what {position.world_size} began: "
            "the same examples in the same updates, but other dropout masks"
        )
        position.world_size = accelerator.num_processes
    best = path.parent / f"step-{position.best_step}"
    if position.best_step is not None and (reason := fault(best)):
        say(f"the best checkpoint, {best.name}, is lost ({reason}): the best of the evaluations to come is kept")
        position.best_step = position.best_score = None
    if accelerator.is_main_process:
        truncate_history(run.history, after=position.step)
    say(f"resuming after step {position.step} from {path}")
    if added := strays(path):
        say(f"! not read, since it came there later: {first_few(added)} in {path}")
    return position


def build_tracker(run: Run, config: RunConfig, trainee: Trainee, console: Console) -> Tracker:
    """The main process's tracker; the others' record nothing."""
    if not trainee.accelerator.is_main_process:
        return Tracker(None, console, log_every=config.train.logging_steps)
    sinks = open_sinks(
        config.tracking.trackers,
        project=config.tracking.project,
        folder=run.folder,
        history=run.history,
        config=redacted(config.to_dict()),
    )
    return Tracker(run.history, console, log_every=config.train.logging_steps, sinks=sinks)


def plain_model(config: RunConfig, trainee: Trainee, features: datasets.Dataset, best: Path) -> nn.Module:
    """The trained model as transformers made it. A sharded one is made anew, whole and in fp32, on each rank."""
    task = trainee.task
    if is_sharded(trainee.model):
        anew = building.adapt(config, task, building.load_base(config, task), features)
        checkpoints.load_model(best, anew)
        return anew.to(trainee.accelerator.device)
    model: nn.Module = trainee.accelerator.unwrap_model(trainee.model, keep_fp32_wrapper=False)
    restore_embeddings(model)
    return model


def finish(
    run: Run,
    config: RunConfig,
    data: Prepared,
    model: nn.Module,
    metrics: dict[str, Any],
    console: Console,
) -> None:
    """Leave the model, proved to answer as the trained one does, and the metrics."""
    task, features = data.task, data.features["train"]
    # Two with padding, and one without: masks are made in other ways then. No more, since logits can be large.
    by_length = np.argsort(np.asarray(features["length"]), kind="stable")
    rows = np.unique(by_length[[0, len(by_length) // 2]])
    probes = [task.collate(examples(features, part)) for part in (rows, rows[:1])]
    differences = export(
        model,
        task,
        run.folder,
        probes=probes,
        base=building.base_of(config, task),
        base_hash=data.loaded.sha256,
        four_bits=building.four_bits_of(config),
    )
    write_json(run.metrics, metrics)
    for name, difference in differences.items():
        tell(console, f"reloaded {name}/: logits within {difference:.1e} of the trained model's")
