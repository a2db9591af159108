"""The verbs as a user meets them: files on a disk in, messages and exit codes out. Every fault is one message."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import SHORT, make_masking_tokenizer, make_rows, save_body, save_marian
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from heedful import UserError
from tasks import TASKS
from tasks.fitting import require_fast

ROOT = Path(__file__).parent.parent
TOKENS = "tokenizer_config.json"
HEADER = "text,label\n"
GOOD = HEADER + "".join(
    f"the cat {word} {'dog' * i},{'ab'[i % 2]}\n" for i, word in enumerate(["sat", "on", "mat"] * 4)
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a tiny model, two good splits and a configuration for a run of two steps."""
    monkeypatch.chdir(tmp_path)
    save_body("bert", "model")
    Path("train.csv").write_text(GOOD)
    Path("dev.csv").write_text(GOOD)
    write_config(task="classification")
    return tmp_path


def write_config(*, task, train="train.csv", validation="dev.csv"):
    values = {
        "task": task,
        "model": {"name": "./model", "max_length": 32},
        "data": {"train": train, "validation": validation, "stride": 8},
        "train": {"max_steps": 2, "batch_size": 4, "logging_steps": 1, "bf16": False},
        task: SHORT.get(task, {}),
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))


def test_finetune_leaves_what_the_contract_names(project, cli_run):
    code, _, log = cli_run("finetune", "run.yaml")
    assert code == 0, log
    run = project / "runs/run"
    names = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "manifest.json",
        "history.jsonl",
        "metrics.json",
        "audit.json",
        "checkpoints",
        "model",
    } <= names
    metrics = json.loads((run / "metrics.json").read_text())["validation"]
    assert {"accuracy", "macro_f1", "mcc"} <= metrics.keys()
    low, high = metrics["accuracy_ci95"]
    assert low <= metrics["accuracy"] <= high
    assert len((run / "history.jsonl").read_text().splitlines()) == 3  # two steps and one evaluation
    assert json.loads((run / "baselines.json").read_text())["validation"]["always a"]["accuracy"] == 0.5
    assert (run / "checkpoints/step-2/MANIFEST.json").is_file()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"].keys() == {"train", "validation"}
    classifier = pipeline("text-classification", model=str(run / "model"))
    assert classifier("the cat sat")[0]["label"] in {"a", "b"}


@pytest.mark.parametrize("lora", [(), ("lora.r=2",)], ids=["whole", "lora"])
def test_a_run_with_another_attention(project, cli_run, lora):
    window = ("attention=sliding_window", "attention.reach=2")
    code, _, log = cli_run("finetune", "run.yaml", *window, *lora)
    assert code == 0, log
    assert "attention: encoder.self[0-1] sliding_window reach=2 global_tokens=[]" in log
    run = project / "runs/run"
    assert yaml.safe_load((run / "config.yaml").read_text())["attention"]["reach"] == 2
    saved = json.loads((run / "model/config.json").read_text())
    assert saved["attention_plan"]["variant"] == "sliding_window"
    if lora:  # PEFT would put it on the model in model/, with full attention
        with pytest.raises(KeyError, match="heedful"):
            PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("model"), "runs/run/adapter")
    code, _, log = cli_run("predict", "runs/run", "the cat sat")
    assert code == 0, log
    code, _, log = cli_run("finetune", "run.yaml", "model.name=runs/run/model", "output_dir=runs/on")
    assert code == 0, log
    assert "sliding_window reach=2" in log, "a saved plan is kept"
    code, _, log = cli_run(
        "finetune", "run.yaml", "model.name=runs/run/model", "attention=full", "output_dir=runs/back"
    )
    assert code == 0, log
    assert "attention: sliding_window reach=2 global_tokens=[] of the checkpoint was taken out" in log
    assert "attention_plan" not in json.loads(Path("runs/back/model/config.json").read_text())
    code, _, log = cli_run("evaluate", "runs/run", "attention=full")
    assert code == 2
    assert "no effect on a model that is trained" in log


def test_a_run_says_that_its_attention_changes_nothing_or_is_too_short_for_its_texts(project, cli_run):
    code, _, log = cli_run("plan", "run.yaml", "attention=sliding_window")
    assert code == 0, log
    assert "! attention: encoder.self[0-1] changes nothing: it is full attention over texts of up to " in log
    code, _, log = cli_run("plan", "run.yaml", "attention=sliding_window", "attention.reach=2")
    assert code == 0, log
    assert "changes nothing" not in log
    code, _, log = cli_run("plan", "run.yaml", "attention=additive", "model.max_length=2049")
    assert code == 2
    assert "2,049 tokens for additive attention" in log


@pytest.mark.parametrize("lora", [(), ("lora.r=2",)], ids=["whole", "lora"])
def test_texts_longer_than_the_model_was_made_for(lora, project, cli_run):
    long = "the cat sat on the mat " * 20
    Path("train.csv").write_text(HEADER + "".join(f"{long * (1 + i % 2)},{'ab'[i % 2]}\n" for i in range(8)))
    given = ("model.max_length=160", "attention=sliding_window", "attention.reach=8", *lora)
    code, _, log = cli_run("finetune", "run.yaml", *given, "train.save_steps=1", "data.validation=train.csv")
    assert code == 0, log
    assert "positions: 64 -> 160 by tile" in log
    assert "max 160" in log, "no window of fewer tokens"
    assert float(re.search(r"reloaded model/: logits within (\S+) of", log)[1]) < 1e-5
    table = "bert.embeddings.position_embeddings.weight"
    assert table in log.split("new, not in the checkpoint")[1]
    saved = load_file("runs/run/model/model.safetensors")
    assert len(saved[table]) == 160
    assert not torch.equal(saved[table][:32], saved[table][64:96]), "each row learned for itself"
    assert AutoTokenizer.from_pretrained("runs/run/model").model_max_length >= 160
    stored = json.loads(Path("runs/run/metrics.json").read_text())
    assert json.loads(cli_run("evaluate", "runs/run")[1]) == stored
    assert cli_run("predict", "runs/run", long * 2)[0] == 0
    shutil.rmtree("runs/run/checkpoints/step-2")
    code, _, log = cli_run(
        "finetune", "run.yaml", *given, "train.save_steps=1", "data.validation=train.csv", "resume=auto"
    )
    assert "resuming after step 1" in log
    again = load_file("runs/run/model/model.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_a_prompt_longer_than_the_model_was_made_for_has_room_for_its_answer(project, cli_run):
    save_body("llama", "model")
    rows = [{"prompt": "the cat sat on the mat " * 9, "completion": "a dog"}] * 4
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_config(task="generation", train="train.jsonl", validation="train.jsonl")
    refused(cli_run("finetune", "run.yaml", "model.max_length=60"), "model.max_length=60 + generation.decoding")
    code, _, log = cli_run("finetune", "run.yaml", "model.max_length=112")
    assert code == 0, log
    assert "positions: 64 -> 128 by yarn, factor 2" in log
    code, _, log = cli_run("predict", "runs/run", "the cat sat on the mat " * 9)
    assert code == 0, log


def test_where_positions_have_no_end_the_tokenizers_limit_follows(project, cli_run):
    save_body("t5", "model")
    for name, change in {"config.json": {"max_position_embeddings": None}, TOKENS: {"model_max_length": 64}}.items():
        kept = {k: v for k, v in (json.loads(Path("model", name).read_text()) | change).items() if v is not None}
        Path("model", name).write_text(json.dumps(kept))
    rows = [{"source": "the cat sat on the mat " * 9, "target": "a dog"}] * 4
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_config(task="translation", train="train.jsonl", validation="train.jsonl")
    for length, said in {32: 64, 80: 80}.items():
        code, _, log = cli_run("finetune", "run.yaml", f"model.max_length={length}")
        assert code == 0, log
        assert ("positions: relative, without an end" in log) == (said == 80)
        assert AutoTokenizer.from_pretrained("runs/run/model").model_max_length == said


def test_what_an_attention_learns_is_kept_from_run_to_run(project, cli_run):
    slots, brought = ("attention=linformer", "attention.k=8"), "attention.self.attention_variant.E"
    code, _, log = cli_run("finetune", "run.yaml", *slots)
    assert code == 0, log
    assert brought in log.split("new, not in the checkpoint")[1]
    code, _, log = cli_run("predict", "runs/run", "the cat sat")
    assert code == 0, log
    code, _, log = cli_run("finetune", "run.yaml", *slots, "model.name=runs/run/model", "output_dir=runs/on")
    assert code == 0, log
    assert brought not in log, "it is in the checkpoint"


def test_an_attention_that_the_model_can_not_take_is_refused_before_anything_is_written(project, cli_run):
    code, _, log = cli_run("finetune", "run.yaml", "attention={cross: blockwise}")
    assert code == 2
    assert "no such place in this model: cross" in log
    assert "encoder.self[0-1]" in log
    assert not (project / "runs").exists()
    code, _, log = cli_run("finetune", "run.yaml", "attention=telepathy", "attention.reach=0")
    assert code == 2
    assert "telepathy" in log


def test_the_model_is_scored_before_training_too(project, cli_run):
    """A learning rate that moves nothing leaves the score where it was."""
    code, _, log = cli_run("finetune", "run.yaml", "train.eval_on_start=true", "train.learning_rate=1e-30")
    assert code == 0, log
    before, after = (json.loads(Path(f"runs/run/{n}.json").read_text())["validation"] for n in ("baselines", "metrics"))
    assert before["before training"] == {name: value for name, value in after.items() if not name.endswith("_ci95")}
    assert "validation, before training: accuracy" in log


@pytest.mark.parametrize("separator", ["|", ",", "#", "/", ";"])
def test_a_separator_is_taken_as_it_stands(separator, project, cli_run):
    """YAML reads a lone | as an empty text and # as null: single labels would be learned, and nobody told."""
    Path("train.csv").write_text(GOOD.replace(",a", f',"a{separator}b"'))
    code, _, log = cli_run("finetune", "run.yaml", f"data.label_separator={separator}", "data.validation=train.csv")
    assert code == 0, log
    assert "multi_label_classification; labels: a, b" in log
    assert yaml.safe_load(Path("runs/run/config.yaml").read_text())["data"]["label_separator"] == separator


@pytest.mark.parametrize("tab", ["tab", r"\t"])
def test_a_tab_has_two_names(tab, project, cli_run):
    Path("train.csv").write_text(GOOD.replace(",", "\t"))
    code, _, log = cli_run("finetune", "run.yaml", f"data.delimiter={tab}", "data.validation=null")
    assert code == 0, log


def test_what_predict_does_not_read_is_said(project, cli_run):
    cli_run("finetune", "run.yaml")
    code, _, log = cli_run("predict", "runs/run", "the cat sat on the mat " * 30)
    assert code == 0
    assert re.search(r"! INPUT: \d+ tokens cut off", log)


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_settings_of_the_training_are_refused_afterwards(verb, project, cli_run):
    Path("kept").mkdir()
    Path("kept/heedful.json").write_text(json.dumps({"task": "classification", "settings": {}}))
    given = ["dev.csv"] * (verb == "predict")
    for setting in ("train.learning_rate=1", "classification.decoding.num_beams=2"):
        refused(cli_run(verb, "kept", *given, setting), f"'{setting.partition('=')[0]}' has no effect")


def test_a_search_is_refused_where_plain_text_is_scored(project, cli_run):
    save_body("llama", "model")
    make_rows("generation", 12).remove_columns("row").to_json("train.jsonl")
    write_config(task="generation", train="train.jsonl", validation="train.jsonl")
    code, _, log = cli_run("finetune", "run.yaml")
    assert code == 0, log
    search = "generation.decoding.max_new_tokens=1"
    result = cli_run("evaluate", "runs/run", search)
    refused(result, "'generation.decoding.max_new_tokens' has no effect", untouched="other")
    assert "decoding:" not in result[2]
    assert cli_run("evaluate", "runs/run", "data.max_eval_samples=2")[0] == 0
    _, out, _ = cli_run("predict", "runs/run", "the cat", search)
    assert len(json.loads(out)["generated"].split()) <= 1


def test_a_label_is_no_markup(project, cli_run):
    Path("train.csv").write_text(GOOD.replace(",a", ",[/x]"))
    Path("dev.csv").write_text(GOOD.replace(",a", ",[/x]"))
    code, _, log = cli_run("finetune", "run.yaml")
    assert code == 0, log
    assert "always [/x]" in " ".join(log.split())


@pytest.mark.parametrize("place", ["train.csv", "train.csv/run", "/proc/run"])
def test_a_folder_that_can_not_be_written_is_found_out_before_the_work(place, project, cli_run):
    result = cli_run("finetune", "run.yaml", f"output_dir={place}")
    refused(result, f"output_dir={place}")
    assert "train:" not in result[2], "nothing was read yet"


def test_without_data_to_score_on_there_is_no_table(project, cli_run):
    code, _, log = cli_run("finetune", "run.yaml", "data.validation=null")
    assert (code, "95 % interval" in log) == (0, False), log


@pytest.mark.parametrize("task", TASKS)
def test_every_verb_of_every_task(task, project, cli_run):
    if family := {"generation": "llama", "summarization": "llama", "translation": "t5"}.get(task):
        save_body(family, "model")
    for name, seed in {"train": 0, "dev": 1}.items():
        make_rows(task, 12, seed=seed).remove_columns("row").to_json(f"{name}.jsonl")
    write_config(task=task, train="train.jsonl", validation="dev.jsonl")
    # In bf16 a merged model rounds otherwise than its parts beside each other: figures are of what is saved.
    run = ["lora.r=2", "train.bf16=true", "train.learning_rate=0.05", "train.max_steps=8"]
    code, _, log = cli_run("finetune", "run.yaml", *run)
    assert code == 0, log
    stored = json.loads(Path("runs/run/metrics.json").read_text())
    code, out, log = cli_run("evaluate", "runs/run")
    assert code == 0, log
    assert json.loads(out) == {"validation": stored["validation"]}
    given = "dev.jsonl" if task == "qa" else "Anna met the cat"
    code, out, log = cli_run("predict", "runs/run/model", given)
    assert code == 0, log
    assert [json.loads(line)["row"] for line in out.splitlines()] == list(range(12 if task == "qa" else 1))
    assert {"adapter_config.json", "MANIFEST.json"} <= {path.name for path in Path("runs/run/adapter").iterdir()}


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_a_plan_says_what_a_run_needs_and_writes_nothing(task, project, cli_run):
    if task == "generation":
        save_body("llama", "model")
    make_rows(task, 12).remove_columns("row").to_json("train.jsonl")
    write_config(task=task, train="train.jsonl", validation="train.jsonl")
    code, _, log = cli_run("plan", "run.yaml")
    assert code == 0, log
    assert all(
        word in log for word in ("parameters", "activations", "largest micro-batch that fits", "2 of 4 examples")
    )
    code, _, log = cli_run("plan", "run.yaml", "train.batch_size=64")
    assert code == 0, log
    assert re.search(r"of (\d|1[0-2]) examples", log), "no update has more than there are"
    assert not Path("runs").exists()


def test_a_run_in_4_bits_leaves_a_model_that_needs_no_package_for_them(project, cli_run, monkeypatch):
    save_body("llama", "model")
    for name, seed in {"train": 0, "dev": 1}.items():
        make_rows("generation", 12, seed=seed).remove_columns("row").to_json(f"{name}.jsonl")
    write_config(task="generation", train="train.jsonl", validation="dev.jsonl")
    settings = ("lora.r=2", "model.load_in_4bit=true", "model.bnb_4bit_quant_type=fp4", "train.learning_rate=1e-2")
    code, _, log = cli_run("plan", "run.yaml", *settings)
    assert code == 0, log
    code, _, log = cli_run("finetune", "run.yaml", *settings)
    assert code == 0, log
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained("model").parameters())
    assert f"{whole + 1_088:,} parameters, 5,120 in 4 bits, 1,088 trained" in log
    assert json.loads(Path("runs/run/manifest.json").read_text())["versions"]["bitsandbytes"]
    monkeypatch.setattr("training.quantization.bnb", None)
    code, out, log = cli_run("evaluate", "runs/run")
    assert code == 0, log
    stored = json.loads(Path("runs/run/metrics.json").read_text())["validation"]
    assert json.loads(out)["validation"] == {name: pytest.approx(value, rel=1e-5) for name, value in stored.items()}
    code, _, log = cli_run("finetune", "run.yaml", *settings)
    assert (code, "bitsandbytes is not installed" in log) == (2, True)


@pytest.mark.parametrize(("family", "lora"), [("t5", ()), ("llama", ("lora.r=2",))])
def test_answers_are_decoded_in_bf16_where_the_run_computes_in_it(family, lora, project, cli_run, monkeypatch):
    save_body(family, family)
    for name, seed in {"train": 0, "dev": 1}.items():
        make_rows("summarization", 12, seed=seed).remove_columns("row").to_json(f"{name}.jsonl")
    write_config(task="summarization", train="train.jsonl", validation="dev.jsonl")
    monkeypatch.setattr("tasks.lm_loss.CHUNK", 400 * 4)
    forward, decoded, learned = nn.Linear.forward, [], []

    def spy(self, hidden):
        answer = forward(self, hidden)
        if torch.is_inference_mode_enabled() and hidden.ndim == 3 and hidden.shape[1] == 1:  # one more token
            decoded.append(answer.dtype)
        elif torch.is_grad_enabled() and self.out_features == 400:
            learned.append((answer.dtype, len(answer)))
        return answer

    monkeypatch.setattr(nn.Linear, "forward", spy)
    code, _, log = cli_run("finetune", "run.yaml", f"model.name={family}", "train.bf16=true", *lora)
    assert "computed in bf16" in log
    assert json.loads(Path("runs/run/manifest.json").read_text())["machine"]["precision"] == "bf16"
    assert code == 0, log
    assert ("what is learned of the first example: " in log) == (family == "llama")
    assert {dtype for dtype, _ in learned} == {torch.bfloat16}
    assert max(rows for _, rows in learned) == 4
    assert set(decoded) == {torch.bfloat16}
    decoded.clear()
    code, out, log = cli_run("evaluate", "runs/run")
    assert code == 0, log
    assert set(decoded) == {torch.bfloat16}
    assert "rougeL" in json.loads(out)["validation"]


def test_marian_of_the_hub_translates_with_its_slow_tokenizer(project, cli_run):
    """Its two sides have a SentencePiece model each, so a target that is read as a source would be another text."""
    save_marian(project / "opus")
    for name, seed in {"train": 0, "dev": 1}.items():
        make_rows("translation", 12, seed=seed).remove_columns("row").to_json(f"{name}.jsonl")
    write_config(task="translation", train="train.jsonl", validation="dev.jsonl")
    limits = ("translation.decoding.max_new_tokens=8", "translation.max_target_length=32")
    code, _, log = cli_run("finetune", "run.yaml", "model.name=opus", "lora.r=2", *limits)
    assert code == 0, log
    stored = json.loads(Path("runs/run/metrics.json").read_text())["validation"]
    _, out, log = cli_run("evaluate", "runs/run")
    assert json.loads(out)["validation"] == {name: pytest.approx(value, rel=1e-6) for name, value in stored.items()}
    signature = json.loads(Path("runs/run/manifest.json").read_text())["scored_by"]
    assert re.fullmatch(r"sacrebleu: BLEU\|nrefs:1\|.*tok:13a.*; chrF2\|.*version:[\d.]+", signature)
    assert f"scored by {signature}" in log
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in ("opus", "runs/run/model"))
    targets = [row["target"] for row in map(json.loads, Path("train.jsonl").read_text().splitlines())]
    counted = json.loads(Path("runs/run/audit.json").read_text())["losses"]["train"]["target_tokens"]
    assert counted == sum(map(len, before(text_target=targets, add_special_tokens=False)["input_ids"]))
    for kind in ("text", "text_target"):
        assert after(**{kind: "the cat sat"})["input_ids"] == before(**{kind: "the cat sat"})["input_ids"]
    with pytest.raises(UserError, match="MarianTokenizer, a slow tokenizer"):
        require_fast(before)


@pytest.mark.fault("the saved model answers otherwise than the trained one", "refused, and no model is left")
def test_a_model_that_differs_once_reloaded_is_refused(project, cli_run, monkeypatch):
    """As it would be if a setting that the model runs by were not saved."""

    def lose_a_setting(task, folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"layer_norm_eps": 1.0}))

    monkeypatch.setattr("training.export.save_task", lose_a_setting)
    refused(cli_run("finetune", "run.yaml"), "the reloaded model answers differently", untouched="runs/run/model")


def test_an_encoder_used_twice_summarizes(project, cli_run):
    for name, seed in {"train": 0, "dev": 1}.items():
        make_rows("summarization", 12, seed=seed).remove_columns("row").to_json(f"{name}.jsonl")
    write_config(task="summarization", train="train.jsonl", validation="dev.jsonl")
    code, _, log = cli_run("finetune", "run.yaml", "model.init=encoder_decoder")
    assert code == 0, log
    assert "crossattention" in log, "what is new is said"
    loaded = AutoModelForSeq2SeqLM.from_pretrained("runs/run/model")
    assert loaded.config.decoder_start_token_id == make_masking_tokenizer().cls_token_id
    assert (loaded.config.encoder.is_decoder, loaded.config.decoder.is_decoder) == (False, True)
    stored = json.loads(Path("runs/run/metrics.json").read_text())
    assert json.loads(cli_run("evaluate", "runs/run")[1]) == stored
    short = ("summarization.decoding.max_new_tokens=1", "summarization.decoding.num_beams=2")
    code, out, log = cli_run("predict", "runs/run", "dev.jsonl", *short)
    assert "decoding: 2 beams, at most 1 new token" in log
    assert all(len(json.loads(line)["generated"].split()) <= 1 for line in out.splitlines())
    long = cli_run("evaluate", "runs/run", "summarization.decoding.max_new_tokens=999")
    refused(long, "summarization.decoding.max_new_tokens", untouched="other")
    other = cli_run("evaluate", "runs/run", "summarization.max_target_length=9")
    refused(other, "has no effect on a model", untouched="other")
    twice = cli_run("finetune", "run.yaml", "model.init=encoder_decoder", "model.name=runs/run/model")
    refused(twice, "an encoder-decoder already", untouched="runs/run.1")
    save_body("llama", "decoder")
    decoder = cli_run("finetune", "run.yaml", "model.init=encoder_decoder", "model.name=./decoder")
    refused(decoder, "a llama, which is no encoder", untouched="runs/run.1")


@pytest.mark.parametrize(("task", "pairs"), [("classification", True), ("classification", False), ("qa", False)])
def test_the_next_command_is_one_that_works(task, pairs, project, cli_run):
    rows = make_rows(task, 12).remove_columns("row")
    if pairs:
        rows = rows.add_column("text_pair", rows["text"][:])
    rows.to_json("train.jsonl")
    write_config(task=task, train="train.jsonl", validation="train.jsonl")
    log = cli_run("finetune", "run.yaml")[2]
    given = re.search('INPUT="(.*)"', log)[1]
    code, _, log = cli_run("predict", "runs/run", given)
    assert code == 0, log


@pytest.mark.fault("a run of a name that is taken", "the former one is moved aside, not overwritten")
def test_a_former_run_is_moved_aside_not_overwritten(project, cli_run):
    cli_run("finetune", "run.yaml")
    before = Path("runs/run/manifest.json").read_text()
    log = cli_run("finetune", "run.yaml")[2]
    assert "the former runs/run is now runs/run.1" in log
    assert Path("runs/run.1/manifest.json").read_text() == before


def test_without_validation_the_last_model_is_kept_and_it_is_said(project, cli_run):
    code, _, log = cli_run("finetune", "run.yaml", "data.validation=null")
    assert code == 0
    assert "no validation data" in log
    assert json.loads(Path("runs/run/metrics.json").read_text()) == {}


@pytest.mark.fault("test rows without the answers that figures are made by", "refused before anything is trained")
def test_a_split_that_can_not_be_scored_is_found_before_training(project, cli_run):
    save_body("llama", "model")
    write_config(task="generation", train="train.jsonl", validation=None)
    Path("train.jsonl").write_text('{"prompt": "the cat", "completion": " sat"}\n' * 4)
    Path("asked.jsonl").write_text('{"prompt": "the dog"}\n')
    code, _, log = cli_run("finetune", "run.yaml", "data.test=asked.jsonl")
    assert (code, "asked.jsonl, row 0" in log, Path("runs").exists()) == (2, True, False), log
    assert cli_run("finetune", "run.yaml")[0] == 0
    code, _, log = cli_run("evaluate", "runs/run", "data.test=asked.jsonl")
    assert (code, "without an answer to compare with" in log) == (2, True), log


def test_what_can_be_learned_from_does_not_go_by_where_a_thousand_rows_end(project, cli_run):
    save_body("llama", "model")
    write_config(task="generation", train="train.jsonl", validation=None)
    texts = ["the cat sat"] * 1000 + [""]
    Path("train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, _, log = cli_run("finetune", "run.yaml")
    assert code == 0, log


SCRATCH = [
    "model.init=scratch",
    "model.name=null",
    "model.tokenizer=./words",
    "model.architecture={model_type: distilbert, dim: 16, n_layers: 1, n_heads: 2, hidden_dim: 32}",
]


def test_a_run_from_scratch_goes_through_every_verb(project, cli_run):
    code, _, log = cli_run("tokenizer", "train", "words", "train.csv", "--vocab-size", 262, "--kind", "bpe")
    assert code == 0, log
    code, _, log = cli_run("finetune", "run.yaml", *SCRATCH, "train.save_steps=1")
    assert code == 0, log
    assert "from scratch: every weight starts at random" in log
    assert "vocab_size 262, bos_token_id 2, eos_token_id 3, pad_token_id 0" in log
    stored = Path("runs/run/metrics.json").read_text()
    assert json.loads(cli_run("evaluate", "runs/run")[1]) == json.loads(stored)
    assert cli_run("predict", "runs/run", "the cat sat")[0] == 0
    whole = load_file("runs/run/model/model.safetensors")
    shutil.rmtree("runs/run/checkpoints/step-2")
    code, _, log = cli_run("finetune", "run.yaml", *SCRATCH, "train.save_steps=1", "resume=auto")
    assert code == 0, log
    assert "resuming after step 1" in log
    again = load_file("runs/run/model/model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("lora", [[], ["lora.r=2"]], ids=["whole", "lora"])
def test_a_pretrained_model_takes_a_larger_tokenizer_and_says_so(lora, project, cli_run):
    own = AutoTokenizer.from_pretrained("model")
    save_body("bert", "model", tokenizer=own, vocab_size=len(own))
    own.add_tokens(["moonlight"])
    own.save_pretrained("larger")
    code, _, log = cli_run("finetune", "run.yaml", "model.tokenizer=./larger", *lora)
    assert code == 0, log
    assert "1 new: moonlight" in log
    assert "reloaded model/" in log
    assert cli_run("evaluate", "runs/run")[0] == 0
    body = load_file("runs/run/model/model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert len(body) == len(own)


def refused(result, expected, *, untouched="runs"):
    code, _, log = result
    assert code == 2, log
    assert "Traceback" not in log
    assert log.count("error\n") == 1
    assert any(word.lower() in log.lower() for word in expected.split("|")), log
    assert not Path(untouched).exists(), "nothing may be written"


def test_head_for_other_labels_is_refused_and_new_head_accepted(project, cli_run):
    cli_run("finetune", "run.yaml")
    Path("three.csv").write_text(GOOD + "rain,c\n")
    again = ["finetune", "run.yaml", "model.name=runs/run/model", "data.train=three.csv", "output_dir=runs/again"]
    code, _, log = cli_run(*again)
    assert code == 2
    assert "model.init=new_head" in log
    assert cli_run(*again, "model.init=new_head")[0] == 0


def test_what_lies_around_a_model_leads_to_it(project, cli_run):
    assert cli_run("finetune", "run.yaml", "lora.r=2")[0] == 0
    hint = "give the model of that run: runs/run/model"
    for folder in ("runs/run", "./runs/run/adapter", "runs/run/checkpoints/step-2"):
        refused(cli_run("finetune", "run.yaml", f"model.name={folder}", "output_dir=other"), hint, untouched="other")
    for folder in ("runs/run/adapter", "runs/run/checkpoints/step-2"):
        refused(cli_run("predict", folder, "the cat"), hint, untouched="other")


def test_a_run_trained_from_a_folder_is_evaluated_on_the_same_splits(project, cli_run):
    Path("folder").mkdir()
    for split in ("train", "validation", "test"):
        Path(f"folder/{split}.csv").write_text(GOOD)
    code, _, log = cli_run("finetune", "run.yaml", "data.train=folder", "data.validation=null")
    assert code == 0, log
    stored = json.loads(Path("runs/run/metrics.json").read_text())
    assert stored.keys() == {"validation", "test"}
    assert json.loads(cli_run("evaluate", "runs/run")[1]) == stored


@pytest.mark.parametrize(
    "overrides",
    [
        ["resume=nowhere"],
        ["train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=3"],
    ],
)
def test_what_needs_no_data_is_refused_before_the_data_is_read(overrides, project, cli_run, monkeypatch):
    monkeypatch.setattr("pipelines.preparation.read_splits", lambda *_: pytest.fail("read"))
    code, _, log = cli_run("finetune", "run.yaml", *overrides)
    assert code == 2
    assert "error" in log


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [(["model.max_length=100", "model.positions=yarn"], "tile"), (["model.name=./nan"], "NaN")],
)
def test_a_model_that_does_not_do_is_refused_before_the_data_is_encoded(
    overrides, expected, project, cli_run, monkeypatch
):
    save_body("bert", "nan")
    weights = load_file("nan/model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, "nan/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("pipelines.preparation.encode", lambda *_, **__: pytest.fail("encoded"))
    refused(cli_run("finetune", "run.yaml", *overrides), expected)


@pytest.mark.fault("the best checkpoint was deleted", "it is said, and the run goes on")
def test_resuming_without_the_best_checkpoint_says_so(project, cli_run):
    every = ["train.save_steps=1", "train.eval_steps=1", "train.save_total_limit=9", "train.learning_rate=1e-12"]
    cli_run("finetune", "run.yaml", *every)  # nothing is learned, so the first evaluation stays the best
    shutil.rmtree("runs/run/checkpoints/step-1")
    code, _, log = cli_run("finetune", "run.yaml", *every, "resume=auto")
    assert code == 0, log
    assert "the best checkpoint, step-1, is lost" in log


@pytest.mark.fault("a fault that only another process meets", "it says so itself")
def test_a_fault_that_another_rank_alone_meets_is_said(project):
    command = [sys.executable, "-m", "pipelines.cli", "finetune", "missing.yaml"]
    environment = {**os.environ, "RANK": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 2
    assert "missing.yaml" in ended.stderr


def test_make_hands_any_text_to_predict_as_it_is(tmp_path):
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "constraints.txt", ".venv/.ready"):
        (tmp_path / name).touch()
    (tmp_path / "heedful").write_text('#!/bin/sh\nfor argument; do echo "<$argument>"; done\n')
    (tmp_path / "heedful").chmod(0o755)
    text = """it's "5 $" `and` $(HOME) %s \\ ü"""
    make = [
        "make",
        "--no-print-directory",
        "-f",
        str(ROOT / "Makefile"),
        "predict",
        f"BIN={tmp_path}",
        "CHECKPOINT=my run",
        f"INPUT={text}",
    ]
    ended = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["<predict>", "<-->", "<my run>", f"<{text}>"]


@pytest.mark.fault("the disk is full at a logged step, or when the model is written", "one message, exit code 2")
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("training.tracking.Tracker._record", OSError(28, "No space left on device")),
        ("training.export.write_model", RuntimeError("I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_is_one_message_wherever_it_is_met(place, error, project, cli_run, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(place, fail)
    refused(cli_run("finetune", "run.yaml"), "make room on the disk", untouched="runs/run/model")


@pytest.mark.fault("a learning rate that lets the loss overflow", "exit code 3, one message")
def test_nan_loss_exits_with_3(project, cli_run):
    code, _, log = cli_run(
        "finetune", "run.yaml", "train.learning_rate=1e38", "train.max_grad_norm=0", "train.max_steps=50"
    )
    assert code == 3, log
    assert "training rows" in log


def test_predict_refuses_a_mistyped_file_and_takes_a_long_text(project, cli_run):
    cli_run("finetune", "run.yaml")
    assert cli_run("predict", "runs/run", "rows.csv")[0] == 2
    assert cli_run("predict", "runs/run", "the cat " * 200)[0] == 0


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (["config", "run.yaml"], 0),
        (["config", "run.yaml", "nonsense=1"], 2),
        (["--debug", "config", "run.yaml", "nonsense=1"], 1),
    ],
)
def test_one_process_of_several_ends_without_the_interpreters_end(given, code, project):
    """gloo's threads can hang or abort it there; what others registered for the end (wandb does) is still done."""
    script = """
import atexit, sys
from pipelines import cli, config
class Kept:
    def __del__(self):
        print("taken apart")
def load(*given):
    atexit.register(print, "registered later")
    return plain(*given)
kept, plain, config.load = Kept(), config.load, load
sys.argv = ["heedful", *sys.argv[1:]]
cli.main()
"""
    for rank in ({}, {"RANK": "0"}):
        environment = {**os.environ, **rank, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script, *given], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == code, done.stderr
        assert "registered later" in done.stdout
        assert ("taken apart" in done.stdout) == (not rank)
        assert ("task: classification" in done.stdout) == (code == 0)


def test_help_needs_no_torch_and_lists_the_verbs():
    script = (
        "import sys; sys.argv = ['heedful', '--help']\n"
        "from pipelines import cli\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(verb in shown for verb in ("finetune", "evaluate", "predict", "config", "attention"))
