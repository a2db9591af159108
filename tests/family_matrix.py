"""Every task on every family, tiny and random: which go together, and what a short training of a pair comes to.

Run as a script, it trains all pairs that go together and writes the table:

    .venv/bin/python tests/family_matrix.py docs/families.md
"""

import json
import logging
import math
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from tiny_families import DECODERS, FAMILIES, JOINED, SEQ2SEQ, SHORT, make_config, make_rows, save_body, tokenizer_for

from heedful import UserError
from pipelines import building
from pipelines.config import validate
from pipelines.preparation import build_accelerator
from tasks import TASKS
from tasks.fitting import kind_of, misfit
from training.batches import examples
from training.embeddings import restore_embeddings
from training.export import export
from training.loop import run_update

EVERY = FAMILIES | DECODERS | SEQ2SEQ | JOINED
CONFIGS = {family: make_config(family) for family in EVERY}
PAIRS = [(family, task) for family in EVERY for task in TASKS]
LEGAL = [(family, task) for family, task in PAIRS if not misfit(task, CONFIGS[family])]
SINUSOIDAL = ("marian", "pegasus")
"""Families whose positions transformers computes, and looks up without a gradient."""
INTRO = """# Families and tasks

Which kinds of checkpoint each task can be trained on. Made by

    .venv/bin/python tests/family_matrix.py docs/families.md

which takes a tiny random model of each family (transformers {transformers}, torch {torch}) through the parts of
`heedful finetune`: one update of the whole model, or two with LoRA. A pair passes if the loss is finite, all that is
to be trained has moved, with LoRA exactly the adapter and what the checkpoint did not hold, and the saved model
answers as the trained one did and is loaded whole by transformers alone. The checkpoints hold no head, but a decoder's
or an encoder-decoder's for the next token. `tests/test_training_families.py` holds this table to the code.

SmolLM is a Llama; MiniLM is a BERT.
"""

OUTRO = """`full, LoRA`: both pass. `-`: refused before anything is read, naming models and tasks that would do:
"""


@dataclass(frozen=True)
class Trial:
    """What came of one short training; names of parameters as in the model before it was adapted."""

    lora: bool
    new: set[str]
    moved: set[str]
    resting: set[str]
    """What should have moved and did not."""
    losses: list[float]
    differences: dict[str, float]
    lost: set[str]
    """Weights of the saved model that transformers alone does not find again."""

    def faults(self):
        """What a pair that goes together must not show; nothing is well."""
        strayed = {name for name in self.moved if "lora_" not in name} - self.new if self.lora else set()
        found = {
            "a loss that is no number": [loss for loss in self.losses if not math.isfinite(loss)],
            "new and not trained": self.new - self.moved,
            "to be trained and not moved": self.resting,
            "moved beside the adapter": strayed,
            "lost in the saved folder": self.lost,
        }
        return {fault: names for fault, names in found.items() if names}


def save_pretrained(family, folder, *, padding_side="right"):
    """A checkpoint as the Hub would hold it: no head, but a decoder's and an encoder-decoder's for the next token."""
    tokenizer = tokenizer_for(family)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    save_body(family, folder, tokenizer=tokenizer)
    # By hand: a tokenizer that was not loaded saves the side that it was made with, not the one that was set.
    file = Path(folder) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": padding_side}))
    return folder


def run_config(folder, task, *, lora=False):
    values = {
        "task": task,
        "output_dir": "run",
        "model": {"name": str(folder), "max_length": 32},
        "data": {"train": "rows.jsonl", "stride": 4},
        "train": {"learning_rate": 0.05, "lr_scheduler_type": "constant"},
        "lora": {"r": 4} if lora else {},
        task: SHORT.get(task, {}),
    }
    return validate(values, where="family_matrix")


def attempt(folder, task_name, out, *, lora):
    """Load, adapt, update, export, with the parts of ``finetune``; LoRA's A moves in the second update only."""
    config, rows, accelerator = (
        run_config(folder, task_name, lora=lora),
        make_rows(task_name),
        build_accelerator(bf16=False),
    )
    task = building.build_task(config, rows)
    features = datasets.Dataset.from_dict(task.encode(rows[:], training=True))
    loaded = building.load_base(config, task)
    model = building.adapt(config, task, loaded, features)
    before = {name: parameter.detach().clone() for name, parameter in parameters(model)}
    wanted = {name for name, parameter in parameters(model) if parameter.requires_grad}
    trainee = building.build_trainee(config, task, model, accelerator, total_steps=2)
    batch = task.collate(examples(features, np.arange(min(8, len(features)))))
    losses = [run_update(trainee, [batch], features, step=step).loss for step in range(2 if lora else 1)]
    moved = {name for name, parameter in parameters(model) if not torch.equal(before[name], parameter)}
    restore_embeddings(model)
    differences = export(model, task, out, probes=[batch], base=building.base_of(config, task), base_hash=loaded.sha256)
    _, info = task.auto_class.from_pretrained(out / "model", output_loading_info=True)
    fixed = {name for name in wanted if "embed_positions" in name and loaded.model.config.model_type in SINUSOIDAL}
    return Trial(
        lora=lora,
        new=set(loaded.new),
        moved={plain(name) for name in moved},
        resting={plain(name) for name in wanted - fixed - moved},
        losses=losses,
        differences=differences,
        lost=set(info["missing_keys"]) | set(info["unexpected_keys"]),
    )


def parameters(model):
    return model.named_parameters(remove_duplicate=False)


def plain(name):
    """A name in a model that PEFT wraps, as the model itself has it."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def verdict(folder, task, out, *, lora):
    """``passes``, or what is wrong."""
    try:
        return "; ".join(attempt(folder, task, out, lora=lora).faults()) or "passes"
    except UserError as error:
        return f"refused: {error.found}"


def cell(family, task, scratch):
    if (family, task) not in LEGAL:
        return "-"
    folder = scratch / family
    if not folder.is_dir():
        save_pretrained(family, folder)
    full, lora = (verdict(folder, task, scratch / f"{family}-{task}-{lora}", lora=lora) for lora in (False, True))
    return "full, LoRA" if full == lora == "passes" else f"full: {full}; LoRA: {lora}"


def reasons():
    """Why pairs do not go together, with the families of each reason."""
    found = defaultdict(list)
    for family, task in PAIRS:
        if reason := misfit(task, CONFIGS[family]):
            found[reason.removesuffix(f" for {family}")].append(family)
    return [f"- {reason}: {', '.join(families)}" for reason, families in found.items()]


def document(cells):
    intro = INTRO.format(transformers=transformers.__version__, torch=torch.__version__)
    lines = [f"| family | kind | {' | '.join(TASKS)} |", "| --- " * (2 + len(TASKS)) + "|"]
    for family, config in CONFIGS.items():
        row = [cells[family, task] for task in TASKS]
        lines.append(f"| {family} | {kind_of(config)} | {' | '.join(row)} |")
    return "\n".join([intro, *lines, "", OUTRO, *reasons(), ""])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        text = document({pair: cell(*pair, Path(folder)) for pair in PAIRS})
    Path(sys.argv[1]).write_text(text)
