"""One side of the comparison of decoding, alone in its process: answer the test split with the model as it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pipelines.config import load
from pipelines.preparation import build_accelerator
from scripts.peer import Parts, machine, now, peak_mib, prepare
from training.evaluation import predict


def answer(parts: Parts) -> list[Sequence[int]]:
    """As ``heedful evaluate`` does: batches of like lengths."""
    config, model = parts.config, parts.loaded.model
    accelerator = build_accelerator(bf16=config.train.bf16)
    size = config.train.per_device_eval_batch_size
    model = accelerator.prepare_model(model, evaluation_mode=True)
    predictions = predict(parts.task, model, parts.features["test"], accelerator=accelerator, batch_size=size)
    return [prediction["generated"].tolist() for prediction in predictions]


def answer_plainly(parts: Parts) -> list[Sequence[int]]:
    """As in transformers' examples: batches in the order of the data, padded, and ``generate``."""
    model: Any = parts.loaded.model.eval()
    options: Any = parts.config.options
    tokenizer, size = parts.task.tokenizer, parts.config.train.per_device_eval_batch_size
    encoder_decoder, features = model.config.is_encoder_decoder, parts.features["test"]
    prompts = [
        {"input_ids": feature["input_ids"][: None if encoder_decoder else feature["prompt_length"]]}
        for feature in features
    ]
    answers: list[Sequence[int]] = []
    for first in range(0, len(prompts), size):
        side = "right" if encoder_decoder else "left"
        batch = tokenizer.pad(prompts[first : first + size], padding_side=side, return_tensors="pt").to(model.device)
        with torch.no_grad():
            ids = model.generate(
                **batch,
                max_new_tokens=options.decoding.max_new_tokens,
                num_beams=options.decoding.num_beams,
                do_sample=False,
            )
        answers += ids[:, 1 if encoder_decoder else batch["input_ids"].shape[1] :].tolist()
    return answers


SIDES = {"heedful": answer, "trainer": answer_plainly}


def main(
    side: str,
    config: Path,
    out: Annotated[Path, typer.Option(help="The report, JSON.")],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    """Run one side of the comparison in this process."""
    parts = prepare(load(config, overrides or []), splits=("train", "test"), max_features=None, dropout=True)
    start = now()
    answers = SIDES[side](parts)
    seconds = now() - start
    filling = {parts.task.tokenizer.pad_token_id, parts.task.tokenizer.eos_token_id}
    tokens = sum(_written(answer, filling) for answer in answers)
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


def _written(answer: Iterable[int], filling: set[Any]) -> int:
    return sum(token not in filling for token in answer)


if __name__ == "__main__":
    typer.run(main)
