"""The only training loop.

One update: the global batch's targets are counted over all ranks and micro-batches, every micro-batch's summed loss is
divided by that one count, and the gradients add up. ``accelerator.backward`` divides by accelerate's own accumulation
setting, which therefore stays at 1; DDP averages over ranks, so the loss is multiplied by their number. See ADR 3.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from attention.sharing import ring_size
from heedful import NonFiniteLossError, UserError
from tasks.protocol import LOWER_IS_BETTER, Batch, Task
from training import checkpoints
from training.batches import (
    Batching,
    Block,
    EpochSteps,
    epoch_batches,
    epoch_loader,
    examples,
    micro_batches,
    rank_share,
)
from training.checkpoints import Position
from training.sharding import passes
from training.tracking import Tracker


@dataclass(frozen=True)
class Schedule:
    """What happens when, in updates.

    Args:
        total_steps: Updates in the whole run.
        headline: The metric that picks the best checkpoint; see ``tasks.protocol.LOWER_IS_BETTER``.
        eval_every: Updates between evaluations; None never evaluates.
        save_every: Updates between checkpoints; None saves a new best and the end only.
        keep: Checkpoints kept, beside the best one.
        patience: Evaluations without a better score before stopping; None never stops early.
        threshold: By how much a better score must be better.
    """

    total_steps: int
    headline: str
    eval_every: int | None
    save_every: int | None
    keep: int
    patience: int | None = None
    threshold: float = 0.0

    def due(self, every: int | None, step: int) -> bool:
        """Whether something done every so many updates is due after this one, as it always is after the last."""
        return every is not None and (step % every == 0 or step == self.total_steps)


@dataclass(frozen=True)
class Update:
    """What one update did, over all ranks.

    Args:
        loss: Mean over the update's targets.
        grad_norm: L2 norm of the whole gradient before clipping.
        learning_rate: The one that it was made with.
        tokens: Tokens seen, padding left out.
        stop: Whether some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    stop: bool


class Stopped(Exception):
    """SIGTERM came and the checkpoint is written."""


@dataclass(frozen=True)
class Trainee:
    """What an update needs and changes; model and optimizer as ``accelerator.prepare`` returned them."""

    accelerator: Accelerator
    task: Task
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    max_grad_norm: float
    seed: int

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper of data parallelism."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    @property
    def share(self) -> tuple[int, int]:
        """Which part of each global batch this process trains on, of how many: the same in all processes of a ring."""
        size = ring_size(self.bare_model)
        return self.accelerator.process_index // size, self.accelerator.num_processes // size


def train(
    trainee: Trainee,
    blocks: Iterable[Block],
    *,
    batching: Batching,
    schedule: Schedule,
    evaluate: Callable[[], dict[str, float]],
    folder: Path,
    tracker: Tracker,
    position: Position,
) -> Position:
    """Run the updates that ``position`` leaves to be done; evaluate, log and save as scheduled.

    Args:
        blocks: The encoded training rows from the block of the last update, or of the next one, to that of the last.
        evaluate: Scores the validation rows; the same result on every rank.
        folder: Where the checkpoints go.

    Raises:
        NonFiniteLossError: Loss or gradient became NaN or infinite; the weights are as before that update.
        Stopped: SIGTERM came; the run is saved.
    """
    with _sigterm() as stop_asked, tracker.live(schedule.total_steps, done=position.step):
        for block, epoch, micro in updates(trainee, blocks, batching, start=position.step, stop=schedule.total_steps):
            update = run_update(trainee, micro, block.features, step=position.step, stop=stop_asked())
            position.step, position.block = position.step + 1, block.start
            tracker.update(position.step, epoch, update)
            better = False
            if schedule.due(schedule.eval_every, position.step):
                metrics = evaluate()
                better = note_score(position, schedule, metrics[schedule.headline])
                tracker.evaluation(position.step, epoch, metrics, best=better)
            exhausted = schedule.patience is not None and position.stale_evaluations >= schedule.patience
            last = position.step == schedule.total_steps or exhausted
            if better or last or update.stop or schedule.due(schedule.save_every, position.step):
                _save(trainee, folder, position, keep=schedule.keep)
            if update.stop and not last:
                raise Stopped(f"stopped by SIGTERM after saving step {position.step}")
            if exhausted:
                tracker.say(f"stopped early: {schedule.patience} evaluations without a better {schedule.headline}")
                break
    return position


def run_update(trainee: Trainee, micro: list[Batch], features: Any, *, step: int, stop: bool = False) -> Update:
    """Make update number ``step`` from this rank's micro-batches of the global batch.

    Args:
        micro: Empty where the global batch has fewer examples than there are ranks. What a rank lacks of the passes
            that it must make (``training.sharding.passes``) it makes with an example at weight zero.

    Raises:
        NonFiniteLossError: Before the optimizer could spread a NaN.
    """
    accelerator, task, model = trainee.accelerator, trainee.task, trainee.model
    if spare := passes(model, accelerator, len(micro)) - len(micro):
        micro = micro + [task.collate(examples(features, np.zeros(1, np.int64)))] * spare
    weights = [1.0] * (len(micro) - spare) + [0.0] * spare
    seed_step(trainee.seed, step, accelerator.process_index)
    model.train()
    micro = [send_to_device(batch, accelerator.device) for batch in micro]
    count, tokens = _sum_over_ranks(
        accelerator,
        sum(weight * task.count(batch).double() for weight, batch in zip(weights, micro, strict=True)),
        sum(weight * batch["attention_mask"].sum() for weight, batch in zip(weights, micro, strict=True)),
    )
    losses = []
    for number, (weight, batch) in enumerate(zip(weights, micro, strict=True), start=1):
        with nullcontext() if number == len(micro) else accelerator.no_sync(model):
            with accelerator.autocast():  # the model's own forward is in autocast anyway, a loss over its head is not
                loss = weight * task.loss(model, batch)
            accelerator.backward(loss * (accelerator.num_processes / max(count, 1e-12)))
        losses.append(loss.detach())
    loss_sum = sum(losses, torch.zeros((), device=accelerator.device))
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), trainee.max_grad_norm or inf))
    loss_mean, stops = _sum_over_ranks(accelerator, loss_sum / max(count, 1e-12), float(stop))
    if not (isfinite(loss_mean) and isfinite(grad_norm)):
        own = list(zip(micro, losses, strict=True))[: len(micro) - spare]
        raise _non_finite(own, step=step, loss=loss_mean, grad_norm=grad_norm)
    learning_rate = float(trainee.scheduler.get_last_lr()[0])
    trainee.optimizer.step()
    trainee.scheduler.step()
    trainee.optimizer.zero_grad()
    # Of count and loss, too, each process of a ring gave the whole: there it cancels out.
    seen = round(tokens / ring_size(trainee.bare_model))
    return Update(loss_mean, grad_norm, learning_rate, seen, stop=stops > 0)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one update on one rank.

    Dropout is thereby a function of (seed, step, rank): nothing that happens between two updates, such as an
    evaluation or a restart, can shift it, and no random state has to be saved. See ADR 5.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def updates(
    trainee: Trainee, blocks: Iterable[Block], batching: Batching, *, start: int, stop: int
) -> Iterator[tuple[Block, float, list[Batch]]]:
    """This rank's micro-batches of updates ``start`` to ``stop``, each with its block and the epochs done after it."""
    rank, world_size = trainee.share
    step, following = start, iter(blocks)
    while step < stop:
        block = next(following)
        number, first = block.start.number, block.start.first_step
        lengths = np.asarray(block.features["length"])
        shares = [
            rank_share(batch, lengths, rank=rank, world_size=world_size)
            for batch in epoch_batches(lengths, batching, epoch=number)
        ]
        plan = [micro_batches(share, lengths, batching) for share in shares[: stop - first]]
        steps = EpochSteps(block.features, trainee.task.collate, plan, draw=(trainee.seed, number))
        for micro in epoch_loader(steps, start=step - first, num_workers=batching.num_workers):
            step += 1
            yield block, block.epochs_done((step - first) / len(shares)), micro


def _sum_over_ranks(accelerator: Accelerator, *values: Any) -> list[float]:
    own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=accelerator.device) for v in values])
    return accelerator.reduce(own, "sum").tolist()  # type: ignore[no-any-return]


def note_score(position: Position, schedule: Schedule, score: float) -> bool:
    """Record an evaluation; say whether it is the best so far."""
    sign = -1.0 if schedule.headline in LOWER_IS_BETTER else 1.0
    if better := isfinite(score) and (
        position.best_score is None or sign * (score - position.best_score) > schedule.threshold
    ):
        position.best_score, position.best_step, position.stale_evaluations = score, position.step, 0
    else:
        position.stale_evaluations += 1
    return better


def _save(trainee: Trainee, folder: Path, position: Position, *, keep: int) -> None:
    """Save on the main process, parts on each; every rank learns of a failure, so that none waits for ever."""
    accelerator, failure = trainee.accelerator, None
    try:
        checkpoints.save(
            folder,
            model=trainee.bare_model,
            optimizer=trainee.optimizer.optimizer,
            scheduler=trainee.scheduler,
            position=position,
            main=accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            checkpoints.prune(folder, keep=keep, best_step=position.best_step)
    except Exception as error:  # re-raised below, after the other ranks were told
        failure = error
    (failures,) = _sum_over_ranks(accelerator, float(failure is not None))
    if failures:
        raise UserError(
            f"step {position.step} could not be saved: {failure or 'see the main process'}",
            where=str(folder),
            fix="make room on the disk, then go on with resume=auto: the checkpoints before it are whole",
        ) from failure


def _non_finite(
    own: list[tuple[Batch, torch.Tensor]], *, step: int, loss: float, grad_norm: float
) -> NonFiniteLossError:
    """Name the rows of the passes whose loss is no number, on all ranks; all rows, where the gradient alone is none.

    Args:
        own: This rank's micro-batches with their losses. All ranks call this, and all say the same.
    """
    found = gather_object([(row, isfinite(part)) for batch, part in own for row in batch["row"].tolist()])
    rows = sorted({row for row, finite in found if not finite} or {row for row, _ in found})
    return NonFiniteLossError(
        f"loss {loss}, gradient norm {grad_norm}",
        where=f"step {step + 1}, training rows {rows[:8]}{'...' if len(rows) > 8 else ''}",
        expected="finite numbers; the weights were left as they were before this step",
        fix="look at these rows; try a smaller train.learning_rate or train.bf16=false; resume=auto goes on",
    )


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM only sets a flag, which the loop shares between ranks at the next update."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event.is_set
        return

    def note(signum: int, frame: FrameType | None) -> None:
        event.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
