"""One side of the comparison with transformers' Trainer, alone in its process: train, and write down what it took.

Both sides get the same features, the same model with the same fresh head, and the same hyperparameters; both are
scored by the task's own scorer. The Trainer is used as its documentation says, with its own losses and collators.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import datasets
import numpy as np
import torch
import typer
from rich.console import Console
from torch import nn

from pipelines import building
from pipelines.config import load
from pipelines.preparation import build_accelerator, encode, read_splits, split_sources, supports_bf16
from pipelines.scoring import evaluate_split
from pipelines.sections import RunConfig
from sources.assets import ensure
from tasks.baselines import Split
from tasks.protocol import Task
from training.batches import epochs
from training.embeddings import restore_embeddings
from training.lora import add_lora
from training.models import Loaded

if TYPE_CHECKING:
    from transformers import TrainingArguments

Side = Literal["heedful", "trainer", "trainer-defaults"]
TRAINER_COLUMNS = ("input_ids", "token_type_ids", "label", "labels", "start_positions", "end_positions", "length")
"""What of the features the Trainer is given; it takes out by itself what a model's forward does not name."""


def now() -> float:
    """Seconds of a clock, with all work on the GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Stopwatch:
    """Times the updates after a warm-up, and reads the peak of memory at the end of the last one."""

    warmup: int
    steps: int
    done: int = 0
    tokens: int = 0
    start: float = field(default_factory=now)
    seconds: float = 0.0
    peak_mib: float = 0.0

    def step_done(self, tokens: int) -> None:
        """Note one update, which saw so many tokens."""
        self.done += 1
        self.tokens += tokens if self.done > self.warmup else 0
        if self.done == self.warmup:
            self.start = now()
        if self.done == self.warmup + self.steps:
            self.seconds = now() - self.start
            self.peak_mib = peak_mib()


@dataclass(frozen=True)
class Parts:
    """What both sides start from."""

    config: RunConfig
    task: Task
    loaded: Loaded
    rows: Mapping[str, datasets.Dataset]
    features: Mapping[str, datasets.Dataset]

    @property
    def total_steps(self) -> int:
        """Updates in the run."""
        train = self.config.train
        return train.max_steps or ceil(train.num_train_epochs * ceil(len(self.features["train"]) / train.batch_size))


def prepare(config: RunConfig, *, splits: Sequence[str], max_features: int | None, dropout: bool) -> Parts:
    """Read and encode the splits and load the model, as ``heedful finetune`` does."""
    sources = {name: source for name, source in split_sources(config.data).items() if name in splits}
    ensure([str(config.model.name), *sources.values()], root=Path.cwd(), say=print)
    rows = read_splits(config, sources)
    task = building.build_task(config, rows["train"])
    features = {name: encode(task, split, training=name == "train", where=name) for name, split in rows.items()}
    if max_features is not None:
        features["train"] = features["train"].select(range(max_features))
    loaded = building.load_base(config, task)
    if not dropout:
        _leave_out_dropout(loaded.model)
    return Parts(config, task, loaded, rows, features)


def train_heedful(parts: Parts, watch: Stopwatch) -> nn.Module:
    """Train with heedful's loop, as ``heedful finetune`` does, without evaluations in between."""
    from pipelines.finetune import be_deterministic
    from training.checkpoints import Position
    from training.loop import Schedule, Update, train
    from training.tracking import Tracker

    class TimedTracker(Tracker):
        """The usual tracker, history and all; its last act in each update is to tell the stopwatch."""

        def update(self, step: int, epoch: float, update: Update) -> None:
            super().update(step, epoch, update)
            watch.step_done(update.tokens)

    config, total = parts.config, parts.total_steps
    accelerator = build_accelerator(bf16=config.train.bf16)
    be_deterministic(config.seed)
    model = building.adapt(config, parts.task, parts.loaded, parts.features["train"])
    trainee = building.build_trainee(config, parts.task, model, accelerator, total_steps=total)
    schedule = Schedule(total, parts.task.headline, eval_every=None, save_every=None, keep=1)
    batching = building.build_batching(config, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / "history.jsonl"
        train(
            trainee,
            epochs(parts.features["train"], batching, step=0),
            batching=batching,
            schedule=schedule,
            evaluate=dict,
            folder=Path(folder) / "checkpoints",
            tracker=TimedTracker(history, Console(quiet=True), log_every=config.train.logging_steps),
            position=Position(world_size=accelerator.num_processes, data={}),
        )
    restore_embeddings(trainee.bare_model)
    return trainee.bare_model


def train_trainer(parts: Parts, watch: Stopwatch, *, defaults: bool) -> nn.Module:
    """Train with transformers' Trainer, at its best or with its defaults (fp32, random order)."""
    from transformers import Trainer, TrainerCallback  # noqa: TID251 - it is the peer, not a second loop

    lora, model = parts.config.lora, parts.loaded.model
    if lora.r is not None:
        model = add_lora(model, parts.loaded.new, **lora.model_dump())
    collate, step_tokens = _counting(_trainer_collator(parts.task, model))
    accumulation = parts.config.train.gradient_accumulation_steps or 1

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Tells the stopwatch; batches are collated one ahead, in the order of the updates."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            first = watch.done * accumulation
            watch.step_done(sum(step_tokens[first : first + accumulation]))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=trainer_arguments(parts.config, folder, defaults=defaults),
            train_dataset=_trainer_dataset(parts.features["train"]),
            data_collator=collate,
            processing_class=parts.task.tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return cast(nn.Module, trainer.model)


def trainer_arguments(config: RunConfig, folder: str, *, defaults: bool) -> TrainingArguments:
    """The same hyperparameters for the Trainer. Nothing is logged, evaluated or saved while the clock runs."""
    from transformers import TrainingArguments

    train = config.train
    on_gpu = torch.cuda.is_available()
    native_bf16 = supports_bf16(torch.device("cuda" if on_gpu else "cpu"))
    best = {
        # What makes it fast, whatever heedful does, whose micro-batches are of like length anyway.
        "train_sampling_strategy": "sequential" if train.train_sampling_strategy == "sequential" else "group_by_length",
        "bf16": native_bf16 if train.bf16 == "auto" else train.bf16,  # emulated, it is slower than fp32
        "dataloader_pin_memory": on_gpu,
    }
    return TrainingArguments(
        output_dir=folder,
        seed=config.seed,
        per_device_train_batch_size=train.per_device_train_batch_size or train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps or 1,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        label_smoothing_factor=getattr(config.options, "label_smoothing_factor", 0.0),
        use_cpu=not on_gpu,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({} if defaults else best),
    )


def score(parts: Parts, model: nn.Module) -> dict[str, float]:
    """The task's own metrics on the test split, in the precision of the training."""
    accelerator = build_accelerator(bf16=parts.config.train.bf16)
    with accelerator.autocast():
        return evaluate_split(
            parts.task,
            model.to(accelerator.device),
            Split(parts.rows["test"], parts.features["test"]),
            accelerator=accelerator,
            batch_size=parts.config.train.per_device_eval_batch_size,
        )


def run_side(
    side: Side, parts: Parts, *, warmup: int, update: Path | None = None, scored: bool = False
) -> dict[str, Any]:
    """Train one side and report.

    Args:
        warmup: Updates before the clock starts, or all but one of a run that has no more.
        update: Where to store by how much training moved the parameters.
        scored: Whether to score the last model on the test split.

    Returns:
        ``seconds``, ``examples_per_second``, ``tokens_per_second``, ``peak_mib``, ``metrics`` and the circumstances.
    """
    warmup = min(warmup, parts.total_steps - 1)
    watch = Stopwatch(warmup, parts.total_steps - warmup)
    before = _flat(parts.loaded.model) if update else None
    train = train_heedful if side == "heedful" else _trainer(defaults=side == "trainer-defaults")
    model = train(parts, watch)
    if update and before is not None:
        np.save(update, _flat(model) - before)
    lengths = np.array([len(ids) for ids in parts.features["train"]["input_ids"]])
    tokens_per_second = watch.tokens / watch.seconds if watch.seconds else None
    return {
        "side": side,
        "task": parts.task.name,
        "seed": parts.config.seed,
        "steps": parts.total_steps,
        "seconds": watch.seconds,
        "tokens_per_second": tokens_per_second,
        # A few updates' examples may be longer or shorter than the rest; their tokens are what takes the time.
        "examples_per_second": tokens_per_second and tokens_per_second * len(lengths) / float(lengths.sum()),
        "peak_mib": watch.peak_mib,
        "metrics": score(parts, model) if scored else {},
        "headline": parts.task.headline,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on, and with which code."""
    on_gpu = torch.cuda.is_available()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "native_bf16": supports_bf16(torch.device("cuda" if on_gpu else "cpu")),
        "threads": torch.get_num_threads(),
    }


def main(
    side: str,
    config: Path,
    out: Annotated[Path, typer.Option(help="The report, JSON.")],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    warmup: int = 10,
    update: Annotated[Path | None, typer.Option(help="Store the change of the parameters here; no dropout.")] = None,
    max_features: int | None = None,
    scored: Annotated[bool, typer.Option("--scored", help="Score the last model on the test split.")] = False,
) -> None:
    """Run one side of the comparison in this process."""
    settings = load(config, overrides or [])
    splits = ("train", "test") if scored else ("train",)
    parts = prepare(settings, splits=splits, max_features=max_features, dropout=update is None)
    main_rank = os.environ.get("RANK", "0") == "0"
    report = run_side(cast(Side, side), parts, warmup=warmup, update=update if main_rank else None, scored=scored)
    if main_rank:
        out.write_text(json.dumps(report), encoding="utf-8")


def _leave_out_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # T5 and BART drop attention by a function, and keep the share here
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _trainer(*, defaults: bool) -> Callable[[Parts, Stopwatch], nn.Module]:
    return lambda parts, watch: train_trainer(parts, watch, defaults=defaults)


def _trainer_dataset(features: datasets.Dataset) -> datasets.Dataset:
    """The features as the Trainer's collators expect them, attention mask included."""
    kept = features.select_columns([name for name in TRAINER_COLUMNS if name in features.column_names])
    return kept.add_column("attention_mask", [[1] * len(ids) for ids in features["input_ids"]])


def _trainer_collator(task: Task, model: nn.Module) -> Callable[[list[dict[str, Any]]], Any]:
    from transformers import DataCollatorForSeq2Seq, DataCollatorForTokenClassification, DataCollatorWithPadding

    collators: dict[str, Callable[[], Any]] = {
        "ner": lambda: DataCollatorForTokenClassification(task.tokenizer),
        "summarization": lambda: DataCollatorForSeq2Seq(task.tokenizer, model),
        "translation": lambda: DataCollatorForSeq2Seq(task.tokenizer, model),
        "generation": lambda: DataCollatorForSeq2Seq(task.tokenizer),  # it pads labels of any kind
    }
    made = collators.get(task.name, lambda: DataCollatorWithPadding(task.tokenizer))()
    return cast(Callable[[list[dict[str, Any]]], Any], made)


def _counting(
    collate: Callable[[list[dict[str, Any]]], Any],
) -> tuple[Callable[[list[dict[str, Any]]], Any], list[int]]:
    """The collator, and a list that grows by the number of tokens of each batch it makes."""
    tokens: list[int] = []

    def counted(examples: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    return counted, tokens


def _flat(model: nn.Module) -> Any:
    return np.concatenate([p.detach().cpu().numpy().ravel().copy() for _, p in sorted(model.named_parameters())])


def peak_mib(device: str = "cuda" if torch.cuda.is_available() else "cpu") -> float:
    """Peak memory of the GPU, else of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


if __name__ == "__main__":
    typer.run(main)
