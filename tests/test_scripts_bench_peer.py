"""The comparison with the Trainer, on a tiny model: both sides run here, and the figures are what they claim to be."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from tiny_families import make_decoder_tokenizer, make_rows, make_seq2seq_tokenizer, save_body
from tiny_text import make_model, make_tokenizer

from pipelines.config import load
from scripts import bench_peer, peer, peer_decoding
from scripts.bench_peer import Settings

TEXTS = ["the cat sat", "a dog ran far away over the hill", "cats", "dogs run", "the dog", "a cat sat on the hill"]
BATCH = 4


@pytest.fixture
def config(tmp_path):
    """A configuration of 36 short texts, nine updates an epoch."""
    make_model("bert", transformers.AutoModelForMaskedLM).save_pretrained(tmp_path / "model")
    make_tokenizer("bert", TEXTS * 50).save_pretrained(tmp_path / "model")
    rows = {"text": TEXTS * 6, "label": ["dog" if "dog" in text else "cat" for text in TEXTS] * 6}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    content = {
        "task": "classification",
        "model": {"name": str(tmp_path / "model"), "max_length": 16},
        "data": {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")},
        "train": {"batch_size": BATCH, "num_train_epochs": 2, "learning_rate": 1e-3},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def sides_here(monkeypatch, tmp_path):
    """Run the sides in this process, where everything is imported; two processes are left to the real thing."""
    calls = []

    def run_here(side, task, overrides, *options, processes=1, cpu=False):
        calls.append(side)
        named = dict(option.removeprefix("--").split("=") for option in options if "=" in option)
        numbers = {"warmup": int(named.get("warmup", 1)), "max_features": named.get("max-features")}
        numbers["max_features"] = numbers["max_features"] and int(numbers["max_features"])
        paths = {"out": tmp_path / "out.json", "update": named.get("update")}
        peer.main(side, task, overrides=list(overrides), scored="--scored" in options, **numbers, **paths)
        return json.loads(paths["out"].read_text())

    monkeypatch.setattr(bench_peer, "run_side", run_here)
    monkeypatch.setattr(bench_peer, "LAYOUTS", bench_peer.LAYOUTS[:2])
    yield calls
    torch.use_deterministic_algorithms(False)


def test_whole_runs_of_both_sides_see_the_same_tokens_and_take_turns(config, sides_here):
    section = bench_peer.measure_quality(config, Settings(1, 5, 1, 2, ()))
    assert sides_here == ["heedful", "trainer", "trainer", "heedful"]
    assert [report["steps"] for report in section.reports] == [18] * 4  # two epochs of nine
    assert all(0 <= report["metrics"]["accuracy"] <= 1 and report["peak_mib"] > 10 for report in section.reports)
    assert "heedful, test accuracy" in section.tables


@pytest.fixture(params=["t5", "llama"])
def writing_config(request, tmp_path):
    """Twelve texts to summarize, all in one batch: the mean loss is the same whatever their order."""
    tokenizer = make_decoder_tokenizer() if request.param == "llama" else make_seq2seq_tokenizer()
    tokenizer.pad_token = "[PAD]"
    save_body(request.param, tmp_path / "model", tokenizer=tokenizer)
    for split in ("train", "test"):
        make_rows("summarization", 12).remove_columns("row").to_parquet(tmp_path / f"{split}.parquet")
    content = {
        "task": "summarization",
        "model": {"name": str(tmp_path / "model"), "max_length": 32},
        "data": {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")},
        "train": {"batch_size": 12, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}
        | {"per_device_eval_batch_size": 5},
        "summarization": {"max_target_length": 8, "decoding": {"max_new_tokens": 4}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "tiny.yaml"


def parts_of(path, *overrides):
    return peer.prepare(load(path, overrides), splits=("train", "test"), max_features=None, dropout=False)


def test_one_update_of_a_task_that_writes_is_the_same_on_both_sides(writing_config):
    ours, theirs = parts_of(writing_config), parts_of(writing_config)
    before = flat(ours.loaded.model)
    for side, part in (("heedful", ours), ("trainer", theirs)):
        assert peer.run_side(side, part, warmup=0)["steps"] == 1
    move, other = (flat(part.loaded.model) - before for part in (ours, theirs))
    assert move.norm() > 0
    assert (move - other).norm() < 1e-4 * move.norm()
    torch.use_deterministic_algorithms(False)


def test_the_trainer_trains_an_adapter_where_heedful_does(writing_config):
    parts = parts_of(writing_config, "lora.r=2")
    assert peer.run_side("trainer", parts, warmup=0)["steps"] == 1
    trained = [name for name, p in parts.loaded.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(("ours", "theirs"), [("random", "group_by_length"), ("sequential", "sequential")])
def test_the_trainer_at_its_best_groups_by_length_whatever_heedful_does(ours, theirs, config, tmp_path):
    settings = peer.load(config, [f"train.train_sampling_strategy={ours}"])
    assert peer.trainer_arguments(settings, str(tmp_path), defaults=False).train_sampling_strategy == theirs


def test_decoding_is_compared_on_the_same_answers(writing_config, tmp_path, monkeypatch):
    ready = peer_decoding.answerer(parts := parts_of(writing_config))
    both = zip(ready.as_heedful(parts.features["test"]), ready.plainly(parts.features["test"]), strict=True)
    assert all(one[: len(other)] == other[: len(one)] for one, other in both)  # but for the padding

    def run_here(side, task, overrides, *, script):
        peer_decoding.main(side, Path(task), tmp_path / "out.json", list(overrides))
        return json.loads((tmp_path / "out.json").read_text())

    monkeypatch.setattr(bench_peer, "run_side", run_here)
    section = bench_peer.measure_decoding(str(writing_config), Settings(2, 0, 0, 0, ()))
    ours, theirs = section.reports[0], section.reports[1]
    assert (ours["side"], theirs["side"], ours["tokens"]) == ("heedful", "trainer", theirs["tokens"])
    assert "| tokens/s, heedful / plain generate |" in section.tables


def flat(model):
    return torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])


def test_a_kept_run_is_not_run_again_unless_its_configuration_changed(config, sides_here, tmp_path):
    settings = Settings(1, 5, 1, 1, (), keep=tmp_path / "kept")
    first = bench_peer.measure_quality(config, settings)
    again = bench_peer.measure_quality(config, settings)
    assert (sides_here, again.reports) == (["heedful", "trainer"], first.reports)
    Path(config).write_text(Path(config).read_text() + "# changed\n")
    bench_peer.measure_quality(config, settings)
    assert len(sides_here) == 4


def test_speed_counts_the_tokens_of_the_timed_updates_alone(config, monkeypatch, sides_here):
    ticks = iter(range(1000))
    monkeypatch.setattr(peer, "now", lambda: float(next(ticks)))  # one second between start and end
    overrides = ("train.train_sampling_strategy=sequential", "data.max_train_samples=36")
    section = bench_peer.measure_speed(config, Settings(1, 2, 1, 1, overrides))
    reports = {report["side"]: report for report in section.reports}
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(config).with_name("model"))
    lengths = [len(ids) for ids in tokenizer(TEXTS * 6)["input_ids"]]
    for side in ("heedful", "trainer"):
        assert reports[side]["tokens_per_second"] == sum(lengths[BATCH : 3 * BATCH])
        rate = reports[side]["tokens_per_second"] * len(lengths) / sum(lengths)
        assert reports[side]["examples_per_second"] == pytest.approx(rate)
    assert "heedful / Trainer's defaults" in section.tables


def test_heedfuls_update_does_not_depend_on_the_layout(config, sides_here):
    section = bench_peer.measure_invariance(config, Settings(1, 1, 1, 1, ()))
    accumulated = {report["side"]: report for report in section.reports if "accumulated" in report["layout"]}
    assert accumulated["heedful"]["difference"] < 1e-5
    assert accumulated["heedful"]["ratio"] == pytest.approx(1)
    assert np.isfinite(accumulated["trainer"]["ratio"])


def test_an_update_is_compared_by_norm():
    found = bench_peer._compare(np.array([6.0, 8.0]), np.array([3.0, 4.0]))
    assert found == {"difference": 1.0, "ratio": 2.0}


def test_stopwatch_starts_after_the_warm_up_and_stops_at_the_last_update(monkeypatch):
    now = iter([10.0, 13.0])
    monkeypatch.setattr(peer, "now", lambda: next(now))
    watch = peer.Stopwatch(warmup=2, steps=3)
    for tokens in (1, 2, 4, 8, 16):
        watch.step_done(tokens)
    assert (watch.seconds, watch.tokens) == (3.0, 28)


def test_ratios_are_taken_seed_by_seed():
    speeds = {("trainer", 1): 20, ("heedful", 0): 30, ("trainer", 0): 10, ("heedful", 1): 10}  # as the turns shuffle
    reports = [
        {"side": side, "seed": seed, "peak_mib": speed}
        | {"task": "ner", "headline": "f1", "metrics": {"f1": speed / 100}}
        for (side, seed), speed in speeds.items()
    ]
    tables = bench_peer.quality_tables(reports)
    assert "| peak memory, heedful / Trainer at its best | 1.75 | 0.50 | 3.00 |" in tables
    assert "| +0.0500 | -0.1000 | +0.2000 |" in tables
