"""One side of the comparison of decoding, alone in its process: answer the test split with the model as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import typer
from accelerate import Accelerator

from pipelines.config import load
from pipelines.preparation import build_accelerator
from scripts.peer import Parts, machine, now, peak_mib, prepare
from tasks.protocol import Task
from training.evaluation import predict


@dataclass(frozen=True)
class Answerer:
    """A model on its device, and the features to answer."""

    task: Task
    model: Any
    accelerator: Accelerator
    options: Any
    batch_size: int

    def as_heedful(self, features: datasets.Dataset) -> list[list[int]]:
        """As ``heedful evaluate`` does: batches of like lengths."""
        found = predict(self.task, self.model, features, accelerator=self.accelerator, batch_size=self.batch_size)
        return [prediction["generated"].tolist() for prediction in found]

    def plainly(self, features: datasets.Dataset) -> list[list[int]]:
        """As in transformers' examples: batches in the order of the data, padded, and ``generate``."""
        answers: list[list[int]] = []
        for first in range(0, len(features), self.batch_size):
            ids, start = self._generate(features[first : first + self.batch_size])
            answers += ids[:, start:].tolist()
        return answers

    def _generate(self, rows: Mapping[str, Any]) -> tuple[Any, int]:
        encoder_decoder, prompts = self.model.config.is_encoder_decoder, rows["input_ids"]
        if not encoder_decoder:
            prompts = [ids[:length] for ids, length in zip(prompts, rows["prompt_length"], strict=True)]
        side = "right" if encoder_decoder else "left"
        batch = self.task.tokenizer.pad({"input_ids": prompts}, padding_side=side, return_tensors="pt")
        decoding = {"max_new_tokens": self.options.max_new_tokens, "num_beams": self.options.num_beams}
        with torch.inference_mode(), self.accelerator.autocast():
            ids = self.model.generate(**batch.to(self.accelerator.device), **decoding, do_sample=False)
        return ids, 1 if encoder_decoder else batch["input_ids"].shape[1]


SIDES = {"heedful": Answerer.as_heedful, "trainer": Answerer.plainly}


def answerer(parts: Parts) -> Answerer:
    """Both sides start from the same."""
    train = parts.config.train
    accelerator = build_accelerator(bf16=train.bf16)
    model = parts.loaded.model.eval().to(accelerator.device)
    options: Any = parts.config.options
    return Answerer(parts.task, model, accelerator, options.decoding, train.per_device_eval_batch_size)


def main(
    side: str,
    config: Path,
    out: Annotated[Path, typer.Option(help="The report, JSON.")],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    """Run one side of the comparison in this process."""
    parts = prepare(load(config, overrides or []), splits=("train", "test"), max_features=None, dropout=True)
    ready, features, answer = answerer(parts), parts.features["test"], SIDES[side]
    answer(ready, features.select(range(min(len(features), ready.batch_size))))  # to warm up
    start = now()
    answers = answer(ready, features)
    seconds = now() - start
    filling = {parts.task.tokenizer.pad_token_id, parts.task.tokenizer.eos_token_id}
    tokens = sum(token not in filling for ids in answers for token in ids)
    report = {
        "side": side,
        "task": parts.task.name,
        "seed": parts.config.seed,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_mib": peak_mib(),
        **machine(),
    }
    out.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
