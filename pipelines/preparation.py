"""What the verbs need before they start: accelerator, assets, rows, model, features. Settings become values here."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from rich.console import Console
from transformers.utils import logging as transformers_logging

from heedful import UserError
from hub.client import cached_instead, go_offline
from pipelines import building
from pipelines.report import learned_tokens
from pipelines.scoring import check_answers
from pipelines.sections import DataSection, ModelSection, RunConfig
from sources.assets import ensure, record
from sources.audit import Audit, audit, check, summary
from sources.readers import find_splits, fingerprint, pinned, read_blocks, read_rows
from sources.tables import Dialect
from sources.texts import counted, first_few
from tasks import TASKS, saved
from tasks.protocol import Task
from training.batches import Batching, Block, BlockStart, examples
from training.models import Loaded, unread

ENCODE_BATCH = 1000

# torch 2.13 says so once a rank; accelerate's DistributedDataParallelKwargs has no field for the successor yet.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively; elsewhere bf16 on a CPU is emulated and several times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))


PATIENCE = timedelta(hours=2)
"""How long ranks wait for what the main one does alone: an export, intervals, hashes. NCCL gives up in 10 minutes."""

OTHER_LOOPS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # by which accelerate divides gradients, beside the loop's own count
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_FSDP": "false",  # plain DDP on a CPU
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
    "ACCELERATE_DYNAMO_BACKEND": "no",
}
"""Variables that change what ``Accelerator`` does behind the loop's back, and their values where they do not."""


def build_accelerator(*, bf16: bool | str) -> Accelerator:
    """Make the accelerator; its own accumulation stays at 1, since the loop counts for itself.

    Args:
        bf16: ``auto`` uses bf16 where the hardware multiplies it natively.

    Raises:
        UserError: The launcher started several processes that would each have trained alone, or asks by accelerate's
            own variables for what is not done.
    """
    if asked := [name for name, idle in OTHER_LOOPS.items() if os.environ.get(name, idle).lower() != idle]:
        raise UserError(
            f"{asked[0]}={os.environ[asked[0]]}, which would be obeyed in part, or not at all, in silence",
            where="the environment, as `accelerate launch` sets it",
            expected="heedful's own settings: train.bf16, train.gradient_accumulation_steps, distributed=fsdp2",
            fix=f"unset {' '.join(asked)}; use --nproc, or torchrun",
        )
    cpu = not torch.accelerator.is_available()  # accelerate joins several processes on a CPU only if told so
    device = PartialState(cpu=cpu, timeout=PATIENCE).device
    on = supports_bf16(device) if bf16 == "auto" else bf16
    # No model here changes its buffers in training, and one of them is as large as the word embeddings (UsedRows).
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if on else "no", kwargs_handlers=[parallel])
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, of which accelerate joined {accelerator.num_processes}",
            fix="use --nproc, or torchrun --nproc_per_node",
        )
    return accelerator


def build_console(accelerator: Accelerator, console: Console | None = None) -> Console:
    """The main process's console; the others' are quiet. What the libraries' loggers say goes there too."""
    console = open_console(console)
    if not accelerator.is_main_process:
        console.quiet = True
    transformers_logging.disable_progress_bar()  # of reading and writing weights; downloads show their own
    if not (console.is_terminal and accelerator.is_main_process):
        datasets.disable_progress_bars()
    return console


def open_console(console: Console | None = None) -> Console:
    """A console on stderr, unless one is given; heedful's own loggers speak there too."""
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)  # "owner/name:train:" holds the name of one
    logger = logging.getLogger("heedful")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_ConsoleHandler(console)]
    return console


def tell(console: Console, *lines: str) -> None:
    """Show plain lines: no markup is read into what may be the user's data."""
    for line in lines:
        console.print(line, highlight=False, markup=False)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, entry: logging.LogRecord) -> None:
        tell(self._console, entry.getMessage())


def say_unread(model: str, console: Console, *, trust_remote_code: bool) -> None:
    """Name what lies in a model's folder, could run code, and was not read."""
    if found := unread(model, trust_remote_code=trust_remote_code):
        tell(console, f"! not read, since it could run code: {first_few(found)} in {model}")


@dataclass(frozen=True)
class Prepared:
    """The data of a run, audited, and the model that fits it; every dict is keyed by split.

    Of a stream it is the first block.
    """

    task: Task
    loaded: Loaded
    sources: dict[str, str]
    rows: dict[str, datasets.Dataset]
    features: dict[str, datasets.Dataset]
    assets: list[dict[str, Any]]
    audited: Audit


def prepare(config: RunConfig, accelerator: Accelerator, console: Console) -> Prepared:
    """Fetch and read the data, load the model, and only then, since it may take long, encode and audit the data.

    Raises:
        UserError: It can not be learned from as it is, by this model, or exceeds a limit that the user set.
    """
    sources = split_sources(config.data)
    if "train" not in sources:
        raise UserError("no training data", where="data.train", fix="name it: data.train=FILE")
    assets = fetch_assets([config.model.name, config.model.tokenizer, *sources.values()], accelerator, console)
    sources = pin_stream(sources, accelerator) if config.data.streaming else sources
    ask_for_models(config.model, accelerator, console)
    rows = read_splits(config, sources)
    try:
        task = building.build_task(config, rows["train"])
    except UserError as error:  # a task knows its rows, and not where they are
        error.where = error.where.replace("data.train", sources["train"])
        raise
    for split in rows:
        task.check(rows[split], where=sources[split])
        if split != "train":
            check_answers(task, rows[split], where=sources[split])
    loaded = building.load_base(config, task)
    for name in (config.model.name, config.model.tokenizer):
        say_unread(name or "", console, trust_remote_code=config.model.trust_remote_code)
    features = {split: encode(task, rows[split], training=split == "train", where=sources[split]) for split in rows}
    losses = {split: task.account(features[split], rows[split]) for split in rows}
    for split, counts in losses.items():
        _require_learned(counts, where=sources[split])
    audited = audit(
        rows,
        columns=TASKS[config.task].columns,
        lengths={split: features[split]["length"] for split in rows},
        losses=losses,
    )
    tell(console, *summary(audited))
    if config.data.streaming:
        first = counted(f"{len(rows['train']):,}", "rows")
        tell(
            console,
            "train is a stream: labels, their weights, the audit with its limits and the baselines are those of its "
            f"first {first}; the rest is read, checked and shuffled in blocks of as many",
        )
    if (shown := learned_tokens(task.tokenizer, features["train"][0], colours=console.is_terminal)) is not None:
        console.print(shown)
    check(audited, building.audit_limits(config))
    return Prepared(task, loaded, sources, rows, features, assets, audited)


def _require_learned(counts: Mapping[str, int], *, where: str) -> None:
    if counts.get("learned_tokens") == 0:
        raise UserError(
            "no token carries loss",
            where=where,
            expected="texts, completions, or answers of the assistant, that are not empty",
            fix="raise model.max_length, or look at the data",
        )


def fetch_assets(names: Sequence[str | None], accelerator: Accelerator, console: Console) -> list[dict[str, Any]]:
    """Make sure that the assets among these paths lie there, whole.

    Returns:
        Their records, and those of the runs that models among these come from: terms stay with what was learned from.

    Raises:
        UserError: An asset can not be had, or such a run's manifest.json is broken.
    """
    given = [name for name in names if name]
    with accelerator.main_process_first():
        folders = ensure(given, root=Path.cwd(), say=partial(tell, console))
    before = [asset for name in given for asset in _assets_of_run(Path(name))]
    records = [*before, *(content for folder in folders if (content := record(folder)) is not None)]
    return list({content["name"]: content for content in records}.values())


def ask_for_models(model: ModelSection, accelerator: Accelerator, console: Console) -> None:
    """Find out once, for all ranks, whether the hub of the model answers; if not, say what stands in for it."""
    said: list[str] = []
    if accelerator.is_main_process:
        named = [(model.tokenizer, None), (model.name, model.revision)]
        asked = [cached_instead(name, revision) for name, revision in named if name and not os.path.isdir(name)]
        said = [line for line in asked if line is not None]
    if said := broadcast_object_list([said])[0]:
        go_offline()
        tell(console, *said)


def _assets_of_run(model: Path) -> list[dict[str, Any]]:
    if not os.path.isfile(model / saved.FILE):  # unlike Path.is_file, no error where a name is too long for a file
        return []
    manifest = model.resolve().parent / "manifest.json"
    if not manifest.is_file():
        return []
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("assets", [])  # type: ignore[no-any-return]
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"broken JSON: {error}", where=str(manifest), expected="what the run wrote, with the terms of its data"
        ) from error


def split_sources(data: DataSection) -> dict[str, str]:
    """Where each split is. A folder given as train brings its own validation and test."""
    given = {name: source for name in ("train", "validation", "test") if (source := getattr(data, name)) is not None}
    if "train" in given and os.path.isdir(given["train"]):
        given = find_splits(given["train"]) | {name: source for name, source in given.items() if name != "train"}
    return given


def read_splits(config: RunConfig, sources: Mapping[str, str]) -> dict[str, datasets.Dataset]:
    """Read each split's rows as the task wants them; of a stream its first block, which stands for the whole."""
    data = config.data
    limits = {"train": data.max_train_samples}
    streamed = {"train": first_block(config, sources["train"])} if data.streaming else {}
    return streamed | {
        name: read_rows(
            source,
            columns=TASKS[config.task].columns,
            mapping=data.columns,
            dialect=dialect(data),
            max_rows=limits.get(name, data.max_eval_samples),
            seed=config.seed,
        )
        for name, source in sources.items()
        if name not in streamed
    }


def first_block(config: RunConfig, source: str) -> datasets.Dataset:
    """The first rows of a stream.

    Raises:
        UserError: There are none.
    """
    rows = next(read_stream(config, source, say_unused=True), None)
    if rows is None:
        raise UserError("0 rows", where=source, expected="at least one row", fix="check how the file was written")
    return rows


def read_stream(
    config: RunConfig, source: str, *, start: int = 0, say_unused: bool = False
) -> Iterator[datasets.Dataset]:
    """One pass over streamed training rows, a block at a time."""
    return read_blocks(
        source,
        columns=TASKS[config.task].columns,
        mapping=config.data.columns,
        size=config.data.buffer_size,
        start=start,
        dialect=dialect(config.data),
        say_unused=say_unused,
    )


def stream_blocks(config: RunConfig, task: Task, source: str, batching: Batching, start: BlockStart) -> Iterator[Block]:
    """Streamed training rows as blocks of features, pass after pass, from where a checkpoint says.

    Raises:
        UserError: Rows that the task can not learn from, when their block is reached.
    """
    while True:
        began = start
        for rows in read_stream(config, source, start=start.row):
            where = f"{source}, rows from {start.row} on"
            _check_later(task, rows, where=where)
            features = _encoded(task, rows, training=True, where=where)
            if _teaches(task, features):
                yield Block(start, features, epoch_share=0.0)
                steps = batching.steps_per_epoch(len(features))
                start = replace(start, number=start.number + 1, first_step=start.first_step + steps)
            start = replace(start, row=start.row + len(rows))
        if start.number == began.number and not began.row:
            raise UserError("nothing to learn from in a whole pass", where=source, fix="check the file")
        start = replace(start, row=0, passes=start.passes + 1)


def _teaches(task: Task, features: datasets.Dataset) -> bool:
    """Whether a target counts in any of them: updates without one would move the optimizer's averages all the same."""
    parts = (
        np.split(np.arange(len(features)), range(ENCODE_BATCH, len(features), ENCODE_BATCH)) if len(features) else []
    )
    return any(bool(task.count(task.collate(examples(features, part))) > 0) for part in parts)


def _check_later(task: Task, rows: datasets.Dataset, *, where: str) -> None:
    try:
        task.check(rows, where=where)
    except UserError as error:
        labels = "for a label, raise data.buffer_size or shuffle the file: the first block says what labels there are"
        fix = f"{error.fix}; {labels}" if error.fix else labels
        raise UserError(error.found, where=error.where, expected=error.expected, fix=fix) from error


def dialect(data: DataSection) -> Dialect:
    """How the text files are written."""
    return Dialect(data.delimiter, data.encoding, data.quotes, data.label_separator)


def encode(task: Task, rows: datasets.Dataset, *, training: bool, where: str) -> datasets.Dataset:
    """Tokenize rows into features, in memory.

    Args:
        where: Names the rows in messages.

    Raises:
        UserError: Rows that the task can not encode; nothing is left to learn from or to score.
    """
    features = _encoded(task, rows, training=training, where=where)
    if not len(features):
        raise UserError("no features: every row is empty after tokenization", where=where)
    return features


def _encoded(task: Task, rows: datasets.Dataset, *, training: bool, where: str) -> datasets.Dataset:
    """Not by ``Dataset.map``: it casts a feature to the type of the row's column of the same name, ids to strings."""
    try:
        parts = [
            datasets.Dataset.from_dict(task.encode(rows[start : start + ENCODE_BATCH], training=training))
            for start in range(0, len(rows), ENCODE_BATCH)
        ]
    except UserError as error:  # a task knows its rows, and not where they are
        error.where = f"{where}, {error.where}" if error.where else where
        raise
    return datasets.concatenate_datasets([part for part in parts if len(part)] or parts[:1])


def fingerprints(config: RunConfig, sources: Mapping[str, str], accelerator: Accelerator) -> dict[str, str]:
    """Hashes of what the run learns from and is scored on, by the main process alone: a stream may be long."""
    hashes: dict[str, str] = {}
    if accelerator.is_main_process:
        hashes = {split: fingerprint(source) for split, source in sources.items()}
        if config.model.tokenizer is not None and Path(config.model.tokenizer).is_dir():
            hashes["tokenizer"] = fingerprint(config.model.tokenizer)
    return broadcast_object_list([hashes])[0]  # type: ignore[no-any-return]


def pin_stream(sources: dict[str, str], accelerator: Accelerator) -> dict[str, str]:
    """Have all ranks, and all passes, read one commit of streamed training rows."""
    source = pinned(sources["train"]) if accelerator.is_main_process else ""
    return sources | {"train": broadcast_object_list([source])[0]}
