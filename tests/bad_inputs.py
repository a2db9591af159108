"""What users hand in by mistake, and what heedful must say to it: one literal table, by kind.

`test_pipelines_bad_inputs.py` runs each row through the command line; `fault_table.py` shows them in
docs/reliability.md.
"""

import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from sources.files import MANIFEST, sha256_of

HEADER = "text,label\n"
GOOD = HEADER + "".join(
    f"the cat {word} {'dog' * i},{'ab'[i % 2]}\n" for i, word in enumerate(["sat", "on", "mat"] * 4)
)
VERB = ("finetune", "run.yaml")


@dataclass(frozen=True)
class Bad:
    """One bad input; the folder that it lies in is good but for that.

    Args:
        said: What the message must hold: what was found, where, what to do.
        files: Files that are written, by name; what is neither text nor bytes is written as JSON, a list in a .jsonl
            file as one row a line. The first is ``data.train``.
        task: Of the configuration.
        given: Settings on the command line.
        spoil: What is done in the folder.
        verb: What is run.
        ends: The exit code; 0 where the input has no effect but for the message.
    """

    said: Sequence[str]
    files: Mapping[str, Any] = field(default_factory=dict)
    task: str = "classification"
    given: Sequence[str] = ()
    spoil: Callable[[], Any] = lambda: None
    verb: Sequence[str] = VERB
    ends: int = 2

    def prepare(self):
        """Make the input; return the arguments of the command line."""
        self.spoil()
        for name, content in self.files.items():
            write(Path(name), content)
        data = [f"data.train={name}" for name in [*self.files][:1] if not name.endswith(".yaml")]
        return [*self.verb, *data, *self.given]


def write(path, content):
    """Write bytes, text, or JSON values (one a line in a .jsonl file)."""
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    elif not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------------------------------------- data


def data(file, content, said, task="classification", *given):
    return Bad(said, {file: content}, task, given)


def ner(file, content, said):
    return data(file, content, said, "ner")


def qa(file, content, said):
    return data(file, content, said, "qa")


def squad(answer_start=4, **extra):
    answers = {"text": ["cat"], "answer_start": [answer_start]}
    return [{"question": "q", "context": "the cat", "answers": answers} | extra]


def labels(*values):
    return [{"text": "x", "label": value} for value in values]


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def save_dataset_and(change):
    """A folder of save_to_disk, changed."""
    datasets.Dataset.from_list(labels("a", "b")).save_to_disk("kept")
    change(Path("kept"))


def kept(change, said, *given):
    return Bad(said, given=given or ["data.train=kept"], spoil=lambda: save_dataset_and(change))


DATA = {
    "an empty csv file": data("a.csv", "", ["a.csv", "empty"]),
    "blank lines alone": data("a.csv", "\n\n", ["empty"]),
    "a header alone": data("a.csv", "text,label\n", ["0 rows"]),
    "an empty jsonl file": data("a.jsonl", "", ["empty"]),
    "an empty json list": data("a.json", [], ["0 rows"]),
    "an empty parquet file": data("a.parquet", b"", ["a.parquet", "parquet file"]),
    "a parquet file of no rows": data("a.parquet", parquet(text=[], label=[]), ["0 rows"]),
    "an empty CoNLL file": ner("a.conll", "\n \n", ["empty"]),
    "too many cells": data("a.csv", 'text,label\n"x\ny",a\nx,y,a\n', ["line 4", "3 cells", "2 cells"]),
    "too few cells": data("a.csv", "text,label\nx,a\nx\n", ["line 3", "1 cell\n"]),
    "an open quote": data("a.csv", 'text,label\nx,a\n"y,b\nz,c\n', ["starts on line 3", "quotes=false"]),
    "a quote in quotes": data("a.tsv", 'text\tlabel\n"y" z\tb\n', ["starts on line 2"]),
    "not utf-8": data(
        "a.csv",
        b"text,label\nok,a\ncaf\xe9,b\n",
        ["offset 19", "line 3", "0xe9", "data.encoding=cp1252", "holds for all splits"],
    ),
    "utf-16": data("a.csv", "text,label\nx,a\n".encode("utf-16"), ["data.encoding=utf-16"]),
    "an encoding that nobody knows": data("a.csv", GOOD, ["utf-nine"], "classification", "data.encoding=utf-nine"),
    "an encoding that is for names": data(
        "a.csv", GOOD, ["data.encoding", "punycode"], "classification", "data.encoding=punycode"
    ),
    "an encoding of lines that are streamed": data(
        "a.jsonl",
        "{}\n".encode("utf-16"),
        ["utf-16"],
        "classification",
        "data.encoding=utf-16",
        "data.streaming=true",
        "train.eval_strategy=no",
        "train.save_strategy=no",
    ),
    "semicolons": data("a.csv", "text;label\nx;1\n", ["data.delimiter=';'", "'text;label'"]),
    "quotes and semicolons": data("a.csv", '"text";"label"\n"a; b";"x"\n', ["data.delimiter=';'"]),
    "tabs in a csv file": data("a.csv", "text\tlabel\nx\t1\n", ["data.delimiter='tab'"]),
    "commas in a tsv file": data("a.tsv", "text,label\nx,1\n", ["data.delimiter=','"]),
    "a delimiter of two characters": data("a.csv", GOOD, ["'::'"], "classification", "data.delimiter='::'"),
    "a line end as delimiter": data("a.csv", GOOD, ["data.delimiter"], "classification", 'data.delimiter="\\n"'),
    "a broken line": data("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": \n', ["line 3", "broken JSON"]),
    "two objects on a line": data("a.jsonl", '{"text": "x"} {"text": "y"}\n', ["line 1"]),
    "no object": data("a.jsonl", "[1]\n", ["line 1", "list"]),
    "a key twice in a row": data("a.jsonl", '{"text": "x", "text": "y", "label": 1}\n', ["line 1", "twice", "'text'"]),
    "lists in lists without an end": data("a.jsonl", "[" * 200_000, ["line 1", "unusable JSON"]),
    "broken json": data("a.json", '[{"text": "x"},\n {"text" 1}]', ["line 2", "broken JSON"]),
    "a json number": data("a.json", 1, ["a JSON int", "a list of objects"]),
    "columns of lists": data("a.json", {"text": ["x"], "label": ["a"]}, ["['text', 'label']"]),
    "labels of two types": data("a.jsonl", labels(1, 2, "x"), ["line 3", "'int': 2"]),
    "a number as text": data("a.jsonl", [*labels(1), {"text": 7, "label": 1}], ["line 2", "int 7"]),
    "a number too large for one": data("a.jsonl", labels(0.5, 10**400), ["line 2", "label"]),
    "a column of bytes": data("a.parquet", parquet(text=[b"x"], label=["a"]), ["row index 0", "bytes"]),
    "dates as labels": data(
        "a.parquet", parquet(text=["x"], label=pa.array([0], pa.timestamp("s"))), ["row index 0", "datetime"]
    ),
    "a missing key": data("a.jsonl", [*labels(1), {"text": "y"}], ["line 2", "1 of 2 rows"]),
    "a null text": data("a.jsonl", [{"text": None, "label": 1}], ["line 1", "'text'", "null"]),
    "a NaN to be learned": data("a.jsonl", labels(1.5, float("nan")), ["line 2", "NaN"]),
    "an infinity to be learned": data("a.jsonl", labels(-float("inf")), ["line 1"]),
    "a lone surrogate": data("a.jsonl", '{"text": "\\ud83d", "label": 1}\n', ["line 1", "surrogate"]),
    "a lone surrogate in a label": data("a.jsonl", '{"text": "x", "label": "\\ud83d"}\n', ["line 1", "surrogate"]),
    "an empty label": data("a.csv", "text,label\nx,a\ny,\n", ["line 3", "empty label"]),
    "blanks around a label": data("a.csv", "text,label\nx,a\ny,a \n", ["line 3", "blanks"]),
    "0/1 vectors": data("a.jsonl", labels([0, 1], [1, 0]), ["0/1 vectors"]),
    "a label twice in a row": data("a.jsonl", labels(["a", "a"]), ["line 1", "twice"]),
    "a null among labels": data("a.jsonl", labels(["a", None]), ["line 1", "list"]),
    "an object as label": data("a.jsonl", labels({"a": 1}), ["line 1", "dict"]),
    "one class alone": data("a.csv", HEADER + "x,a\ny,a\n", ["a.csv", "at least two classes"]),
    "a label that train has not": Bad(
        ["b.csv", "'c'"], {"a.csv": GOOD, "b.csv": HEADER + "x,a\ny,b\nz,c\n"}, given=["data.validation=b.csv"]
    ),
    "numbers to be learned and names to be scored": Bad(
        ["b.jsonl"],
        {"a.jsonl": labels(0.5, 1.5), "b.jsonl": labels("a", "b")},
        given=["data.validation=b.jsonl"],
    ),
    "bytes that are no parquet": data("a.parquet", b"PAR1nonsense", ["a.parquet", "parquet file"]),
    "no column of that name": data(
        "a.csv", "review,label\nx,a\n", ["'review', 'label'", "'sentence'", "data.columns.text="]
    ),
    "a column in other case": data("a.csv", "Text,label\nx,a\n", ["data.columns.text=Text"]),
    "no column to be learned": data("a.csv", "text\nhello\nworld\n", ["'label'", "add it"]),
    "two columns that would do": data(
        "a.csv", "text,content,label\nx,y,a\n", ["data.columns.text=text or", "'content'"]
    ),
    "a column name twice": data("a.csv", "text,text,label\nx,y,a\n", ["line 1", "twice: 'text'"]),
    "an unknown ending": data("a.docx", "x", [".docx", ".jsonl"]),
    "too few tags": ner("a.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}], ["line 1", "2 tokens but 1 tag in"]),
    "tags as numbers": ner("a.jsonl", [{"tokens": ["a"], "tags": [0]}], ["'tags'", "list of texts", "ClassLabel"]),
    "a tag that is none": ner("a.jsonl", [{"tokens": ["Anna"], "tags": ["PER"]}], ["a.jsonl, row 0, word 0", "PER"]),
    "CoNLL columns as tsv": ner("a.tsv", "the\tO\ncat\tB-X\n", ["ends in .conll"]),
    "one column alone": ner("a.csv", "review\nx\n", ["data.columns.tokens=review"]),
    "tokens as text": ner("a.csv", "tokens,tags\na b,O O\n", ["'tokens'", "line 2", "conll"]),
    "a null token": ner("a.jsonl", [{"tokens": [None], "tags": ["O"]}], ["line 1"]),
    "a lone surrogate in a token": ner("a.jsonl", '{"tokens": ["\\udc00"], "tags": ["O"]}\n', ["surrogate"]),
    "a CoNLL line without its tag": ner("a.conll", "a O\nb\n\nc O\n", ["line 2", "1 column:"]),
    "words without tags": ner("a.conll", "a\nb\n", ["'tags'"]),
    "an answer that stands elsewhere": qa("a.jsonl", squad(4) + squad(3), ["line 2", "1 of 2 rows", "here 4"]),
    "an answer that stands nowhere": qa("a.jsonl", squad(context="dog"), ["within the context"]),
    "an answer before the text": qa("a.jsonl", squad(-3), ["line 1", "not an answer"]),
    "an answer far behind the text": qa("a.jsonl", squad(10**30), ["line 1", "here 4"]),
    "an answer without its place": qa("a.jsonl", squad(answers={"text": ["cat"]}), ["line 1"]),
    "an empty answer": qa("a.jsonl", squad(answers={"text": [""], "answer_start": [0]}), ["empty lists"]),
    "answers in a csv file": qa("a.csv", "question,context,answers\nq,c,c\n", ["line 2", "jsonl"]),
    "not SQuAD's form": qa(
        "a.json", {"data": [{"paragraphs": [{"qas": []}, {"context": "c"}]}]}, ["SQuAD", "KeyError"]
    ),
    "a question that fills the window": qa("a.jsonl", squad(question="cat " * 60), ["a.jsonl", "model.max_length"]),
    "a chat without a template": data(
        "a.jsonl",
        [{"messages": [{"role": "user", "content": "x"}]}],
        ["chat template"],
        "generation",
        "model.name=./llama",
    ),
    "a message without its content": data(
        "a.jsonl", [{"messages": [{"role": "user"}]}], ["line 1", "messages"], "generation", "model.name=./llama"
    ),
    "texts of which no token can be masked": data(
        "a.jsonl", [{"text": " "}], ["a.jsonl", "no token carries loss"], "mlm"
    ),
    "texts of which no token can be learned": data(
        "a.jsonl", [{"text": ""}], ["a.jsonl", "no token carries loss"], "generation", "model.name=./llama"
    ),
    "no such file": Bad(["trian.csv", "train.csv?"], given=["data.train=trian.csv"]),
    "a name that is too long for a file": Bad(["no such file"], given=[f"data.train={'x' * 300}.csv"]),
    "no file named": Bad(["data.train"], given=["data.train=null"]),
    "a folder without train": Bad(["empty", "train"], given=["data.train=empty"], spoil=lambda: Path("empty").mkdir()),
    "a folder with two trains": Bad(
        ["2 candidates for train", "data.train=two/train.csv"],
        {"two/train.csv": GOOD, "two/train.tsv": GOOD},
        given=["data.train=two"],
    ),
    "a saved data set without its rows": kept(lambda kept: next(kept.glob("*.arrow")).unlink(), ["kept", "data set"]),
    "a saved data set, cut short": kept(
        lambda kept: next(kept.glob("*.arrow")).write_bytes(b"ARROW1"), ["kept", "data set"]
    ),
    "a saved data set with a broken state": kept(lambda kept: write(kept / "state.json", "{"), ["kept", "data set"]),
    "a split that a saved data set has not": kept(lambda kept: None, ["'tset'"], "data.train=kept:tset"),
}

# ------------------------------------------------------------------------------------------------- configuration


def settings(*given, said):
    return Bad(said, given=given)


def file(text, *said):
    return Bad(said, {"run.yaml": text})


MODEL = "task: classification\nmodel: {name: ./model}\n"
SCRATCH = ("model.init=scratch", "model.architecture.model_type=bert")
CONFIGURATION = {
    "an unknown key": settings("train.learning_rat=1", said=["Did you mean train.learning_rate?"]),
    "a key of another section": settings("learning_rate=1", said=["Did you mean train.learning_rate?"]),
    "a section of another task": settings("qa.x=1", said=["section `qa` belongs to another task"]),
    "an unknown task": settings("task=clasification", said=["Did you mean classification?"]),
    "a text for a number": settings("train.learning_rate=fast", said=["train.learning_rate='fast'", "number"]),
    "true for a number": settings("train.max_steps=true", said=["train.max_steps=True"]),
    "no steps": settings("train.max_steps=0", said=["train.max_steps=0", "greater than or equal to 1"]),
    "a learning rate of NaN": settings("train.learning_rate=.nan", said=["train.learning_rate=nan"]),
    "epochs without an end": settings("train.num_train_epochs=.inf", said=["train.num_train_epochs=inf"]),
    "a decay without an end": settings("train.weight_decay=.inf", said=["train.weight_decay=inf"]),
    "a seed that is too large": settings("seed=99999999999", said=["seed=99999999999", "less than 4294967296"]),
    "steps without their strategy": settings("train.eval_strategy=steps", said=["does not go with eval_steps=None"]),
    "strategies that do not agree": settings(
        "train.save_steps=5", "train.save_strategy=epoch", said=["save_strategy=epoch does not go with save_steps=5"]
    ),
    "a batch that does not come out": settings(
        "train.per_device_train_batch_size=3",
        "train.gradient_accumulation_steps=2",
        said=["3 x 2", "train.batch_size=4", "leave one of the two out"],
    ),
    "a metric that the task has not": settings("train.metric_for_best_model=acuracy", said=["'acuracy'", "accuracy"]),
    "nothing to stop early by": settings(
        "data.validation=null",
        "train.early_stopping_patience=1",
        said=["train.early_stopping_patience", "data.validation"],
    ),
    "an empty separator": settings("data.label_separator=''", said=["data.label_separator=''", "at least 1 character"]),
    "no such column to map": settings("data.columns.text=txet", said=["txet", "'text'"]),
    "a role that the task has not": settings("data.columns.txt=text", said=["txt"]),
    "more leaks than allowed": settings(
        "data.max_leak_fraction=0.1", said=["1.0000 > 0.1 (max_leak_fraction)", "clean the data"]
    ),
    "an unknown attention": settings("attention=telepathy", said=["telepathy", "sliding_window"]),
    "an attention where there is no place": settings("attention={cross: blockwise}", said=["no such place", "cross"]),
    "a variant's setting that is wrong": settings("attention=sliding_window", "attention.reach=-1", said=["reach"]),
    "an unknown optimizer": settings("train.optim=adam", said=["train.optim='adam'", "adamw_torch"]),
    "layers that are not there": settings(
        "lora.r=2", "lora.target_modules=[qeury]", said=["'qeury'", "lora.target_modules", "query"]
    ),
    "LoRA without its rank": settings("lora.lora_alpha=4", said=["lora.r is not set", "lora_alpha"]),
    "LoRA over new weights": settings(*SCRATCH, "lora.r=2", said=["LoRA would freeze"]),
    "a misspelt model type": settings(
        "model.init=scratch",
        "model.architecture.model_type=brt",
        said=["unknown model_type 'brt'", "did you mean bert?"],
    ),
    "an unknown argument of a model": settings(
        *SCRATCH, "model.architecture.hiden_size=8", said=["hiden_size", "did you mean hidden_size?"]
    ),
    "a model that is scratch but does not say so": settings(
        "model.architecture.hidden_size=8", said=["say model.init=scratch"]
    ),
    "a model type without its model": settings("model.init=scratch", said=["model.architecture.model_type"]),
    "two places of the tokenizer": settings(*SCRATCH, "model.tokenizer=x", said=["give one of them"]),
    "positions that are not built": settings("model.positions=dynamic", said=["the longest text so far", "yarn"]),
    "positions that are not needed": settings(
        "model.positions=tile", said=["has no effect: this model has the positions"]
    ),
    "positions from scratch": settings(*SCRATCH, "model.positions=tile", said=["has no effect", "model.architecture"]),
    "DeepSpeed": settings("distributed=deepspeed_zero3", said=["not built", "distributed=fsdp2"]),
    "a stream without its length": settings(
        "data.streaming=true", said=["a stream's length is not known", "train.eval_steps=N"]
    ),
    "no setting at all": settings("nonsense", said=["'nonsense'", "KEY=VALUE"]),
    "a setting that undoes another": settings("lora.r=2", "lora={}", said=["lora.r=... before lora=..."]),
    "a setting that is no YAML": settings("train.optim=[", said=["train.optim", "not readable as YAML"]),
    "a folder that can not be written": settings("output_dir=train.csv/run", said=["output_dir=train.csv/run"]),
    "a run in the folder of the project": settings("output_dir=.", said=["output_dir=.", "a folder of its own"]),
    "a run in no folder": settings("output_dir=''", said=["output_dir", "a folder of its own"]),
    "no such file": Bad(["rum.yaml", "run.yaml?"], verb=("finetune", "rum.yaml")),
    "no file but a folder": Bad(["no such configuration file"], verb=("finetune", "model")),
    "an empty file": file("", "a NoneType", "a mapping"),
    "a list": file("- 1", "a list", "a mapping"),
    "broken YAML": file("a: [", "run.yaml", "not readable as YAML"),
    "not utf-8": Bad(["run.yaml", "not readable as YAML"], {"run.yaml": b"task: caf\xe9"}),
    "a key twice": file(f"{MODEL}seed: 1\nseed: 2", "'seed' is given twice", "line 4"),
    "a key twice, deep": file(f"{MODEL}lora: {{r: 1, r: 2}}", "'r' is given twice"),
    "a key that is a list": file(f"{MODEL}? [a]\n: 1", "run.yaml", "unhashable key"),
    "a key that is a number": file(f"{MODEL}1: 2", "Keys should be strings"),
    "a key in a section that is a number": file(f"{MODEL}train: {{1: 2}}", "train", "Keys should be strings"),
    "a date that is none": file(f"{MODEL}seed: 2026-13-45", "run.yaml", "not readable as YAML", "month"),
    "a number that is none": file(f"{MODEL}seed: 0b_", "seed='0b_'", "valid integer"),
    "a tag of YAML's that does not fit": file(f"{MODEL}seed: !!bool maybe", "run.yaml", "not readable as YAML"),
    "lists in lists without an end": file("[" * 600, "run.yaml", "not readable as YAML"),
    "a list that holds itself": file(f"{MODEL}lora: {{target_modules: &a [*a]}}", "lora.target_modules"),
    "a mapping that holds itself": file(f"{MODEL}data: &a {{columns: *a}}", "data.columns"),
    "an architecture that holds itself": file(
        "task: classification\nmodel: {init: scratch, name: ./model, architecture: &a {model_type: bert, x: *a}}\n"
        "data: {train: train.csv}",
        "model.architecture",
    ),
    "a text for a section": file("task: classification\nmodel: ./model", "model"),
    "a list for a section": file(f"{MODEL}train: [1]", "train"),
    "a number for the task's section": file(f"{MODEL}classification: 5", "classification"),
    "nothing for a section": file("task: classification\nmodel:", "model"),
}

# -------------------------------------------------------------------------------------------------------- models


def change(name, **values):
    """Change keys of a JSON file of the model; None takes one out."""

    def spoil():
        path = Path("model", name)
        content = json.loads(path.read_text()) | values
        write(path, {key: value for key, value in content.items() if value is not None})

    return spoil


def put(name, content):
    return lambda: write(Path("model", name), content)


def lose(*patterns):
    return lambda: [file.unlink() for pattern in patterns for file in Path("model").glob(pattern)]


def weights(change):
    """Change the tensors of the model, in place."""

    def spoil():
        path = Path("model/model.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return spoil


def rename_all(tensors):
    for name in list(tensors):
        tensors[f"strange.{name}"] = tensors.pop(name)
    del tensors["strange.embeddings.word_embeddings.weight"]


def cut_weights():
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled():
    torch.save(load_file("model/model.safetensors"), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()


POSITIONS = {"weight_map": {"embeddings.position_embeddings.weight": "gone.safetensors"}, "metadata": {}}


def model(spoil, *said, given=(), task="classification"):
    return Bad(said, task=task, given=given, spoil=spoil)


def sharded(index):
    return lambda: (
        lose("model.safetensors")(),
        put("model.safetensors.index.json", index)(),
        put("a.safetensors", b"")(),
    )


MODELS = {
    "no such folder": settings("model.name=./nothing", said=["./nothing", "no such model folder"]),
    "a name that is too long for a folder": settings(f"model.name=./{'x' * 300}", said=["no such model folder"]),
    "a name that is none on the Hub": settings("model.name=a//b", said=["a//b", "no model configuration"]),
    "no such folder of a tokenizer": settings("model.tokenizer=./nothing", said=["./nothing", "no such"]),
    "no such asset": settings("model.name=assets/minilm", said=["assets.yaml", "no table of assets"]),
    "no configuration": model(lose("config.json"), "./model", "config.json"),
    "a broken configuration": model(put("config.json", "{"), "./model", "no model configuration"),
    "a configuration that is a list": model(put("config.json", []), "./model", "no model configuration"),
    "an unknown kind of model": model(change("config.json", model_type="nonsense"), "./model", "nonsense"),
    "a size that is a text": model(change("config.json", hidden_size="big"), "./model", "hidden_size"),
    "no heads": model(change("config.json", num_attention_heads=0), "./model", "ZeroDivisionError"),
    "labels that are not numbered": model(change("config.json", id2label={"x": "a"}), "./model", "'x'"),
    "heads that do not come out": model(change("config.json", num_attention_heads=3), "./model", "multiple"),
    "no weights": model(lose("model.safetensors"), "without safetensors", "save_pretrained"),
    "weights that are pickled": model(pickled, "without safetensors, the only weights that are read"),
    "weights cut short": model(cut_weights, "./model", "safetensors", "fetch it again"),
    "weights of no bytes": model(put("model.safetensors", b""), "./model", "safetensors"),
    "weights whose header is no JSON": model(put("model.safetensors", struct.pack("<Q", 4) + b"oops"), "safetensors"),
    "weights of other shapes": model(
        change("config.json", hidden_size=32), "./model", "of other shapes", "(16,)", "(32,)"
    ),
    "weights that are NaN": model(
        weights(lambda tensors: tensors["pooler.dense.weight"].fill_(float("nan"))),
        "NaN or infinite weights: bert.pooler.dense.weight",
    ),
    "weights of which nothing fits": model(weights(rename_all), "a place for none: strange.embeddings"),
    "an index that is broken": model(sharded("{"), "model.safetensors.index.json", "broken index", "fetch it again"),
    "an index without its weights": model(sharded(POSITIONS), "./model", "gone.safetensors"),
    "an index that is a list": model(sharded([]), "model.safetensors.index.json", "broken index"),
    "no tokenizer": model(lose("*token*", "vocab*"), "tokenizer files", "save_pretrained"),
    "a broken tokenizer": model(put("tokenizer.json", '{"version": "1.0"}'), "./model", "no tokenizer"),
    "a tokenizer cut short": model(put("tokenizer.json", '{"version'), "./model", "no tokenizer"),
    "a tokenizer with broken settings": model(put("tokenizer_config.json", "{"), "./model", "no tokenizer"),
    "a tokenizer larger than the model": model(
        change("config.json", vocab_size=20), "tokens for a model of 20 embeddings"
    ),
    "texts longer than the model": settings(
        "model.max_length=100", "model.positions=refuse", said=["64", "model.max_length"]
    ),
    "a tokenizer for BLEU without its package": Bad(
        ["translation.tokenize=ja-mecab", "can not be had", "sacrebleu[ja]"],
        {"a.jsonl": [{"source": "x y", "target": "z"}]},
        task="translation",
        given=["model.name=./llama", "translation.tokenize=ja-mecab"],
    ),
    "an encoder that is to write": Bad(["bert", "generation"], {"a.jsonl": [{"text": "x y"}]}, task="generation"),
    "4 bits without LoRA": settings("model.load_in_4bit=true", said=["lora.r=16"]),
    "a head for other labels": Bad(
        ["a head for 2 labels", "3 labels", "model.init=new_head"],
        {"a.csv": GOOD + "rain,c\n"},
        given=["model.name=runs/whole/model", "data.validation=null"],
    ),
    "a run in place of its model": settings(
        "model.name=runs/whole", said=["give the model of that run: runs/whole/model"]
    ),
    "a run's model whose manifest.json is broken": Bad(
        ["runs/whole/manifest.json", "broken JSON"],
        given=["model.name=runs/whole/model"],
        spoil=lambda: write(Path("runs/whole/manifest.json"), b"{"),
    ),
}

# ------------------------------------------------------------------------- runs, adapters, checkpoints, and their use

RESUME = ("resume=auto", "output_dir=runs/whole", "train.max_steps=3")
LORA = ("lora.r=2", "output_dir=runs/lora", "train.max_steps=3", "resume=auto")
STEP = Path("runs/whole/checkpoints/step-3")


def again(*said, given=(), spoil=lambda: None, former=RESUME, ends=2):
    return Bad(said, given=[*former, *given], spoil=spoil, ends=ends)


def use(verb, *said, spoil=lambda: None, given=()):
    return Bad(said, spoil=spoil, verb=(verb, "runs/whole", *(["the cat"] if verb == "predict" else []), *given))


def pull_lora():
    """As ``heedful pull`` lays it."""
    shutil.copytree("runs/lora/model", "m")
    shutil.copytree("runs/lora/adapter", "m/adapter")


def stored(name, content):
    return lambda: write(Path("runs/whole", name), content)


def rehashed(name, content):
    """Another content of a checkpoint's file, in a manifest that agrees with it: as another version wrote it."""

    def spoil():
        write(STEP / name, content)
        manifest = json.loads((STEP / MANIFEST).read_text()) | {name: sha256_of(STEP / name)}
        write(STEP / MANIFEST, manifest)

    return spoil


def other_weights():
    """The base as it was, but for one number of a layer that LoRA leaves as it is."""
    weights(lambda tensors: tensors["encoder.layer.0.intermediate.dense.weight"][0].neg_())()


RUNS = {
    "a checkpoint that is not there": settings("resume=./nowhere", said=["no such checkpoint", "resume=nowhere"]),
    "a checkpoint of another run": settings(f"resume={STEP}", said=["a checkpoint of another run", "output_dir="]),
    "a checkpoint cut short": again(
        "broken checkpoint: optimizer.safetensors does not match its hash",
        "resume=auto takes the newest whole one",
        given=[f"resume={STEP}"],
        spoil=lambda: (STEP / "optimizer.safetensors").write_bytes(b"torn"),
    ),
    "a checkpoint without a file": again(
        "broken checkpoint: position.json is missing",
        given=[f"resume={STEP}"],
        spoil=lambda: (STEP / "position.json").unlink(),
    ),
    "a checkpoint without its manifest": again(
        "MANIFEST.json is missing", given=[f"resume={STEP}"], spoil=lambda: (STEP / MANIFEST).unlink()
    ),
    "a checkpoint of another version": again(
        "position.json", "resume=none", spoil=rehashed("position.json", {"step": 3, "moon": "full"})
    ),
    "other settings": again(
        "train.learning_rate=0.5 (was", "give the former values", given=["train.learning_rate=0.5"]
    ),
    "another rank": again("lora.r=3 (was 2)", former=[*LORA, "lora.r=3"]),
    "other layers": again("lora.target_modules=['key'] (was None)", former=[*LORA, "lora.target_modules=[key]"]),
    "another base of the same shape": again(
        "changed since this checkpoint: the base model", former=LORA, spoil=other_weights
    ),
    "other training data": again(
        "changed since this checkpoint: train", spoil=lambda: write(Path("train.csv"), GOOD + "one more,a\n")
    ),
    "other validation data": again(
        "changed since this checkpoint: validation", spoil=lambda: write(Path("dev.csv"), GOOD + "more,a\n")
    ),
    "a run whose configuration is broken": again(
        "config.yaml", "not readable as YAML", spoil=stored("config.yaml", "a: [")
    ),
    "a run whose configuration is empty": again("config.yaml", "a mapping", spoil=stored("config.yaml", "")),
    "a run without its configuration": again(
        "config.yaml", "no config.yaml", spoil=lambda: Path("runs/whole/config.yaml").unlink()
    ),
    "an adapter in place of a model": settings(
        "model.name=runs/lora/adapter", said=["give the model of that run: runs/lora/model"]
    ),
    "an adapter to score": Bad(["give the model of that run: runs/lora/model"], verb=("evaluate", "runs/lora/adapter")),
    "an adapter to predict with": Bad(
        ["give the model of that run: runs/lora/model"], verb=("predict", "runs/lora/adapter", "the cat")
    ),
    "the adapter in a model that was pulled": Bad(
        ["m/adapter", "give the model of that run: m"], given=["model.name=m/adapter"], spoil=pull_lora
    ),
    "the adapter in a model that was pulled, to predict with": Bad(
        ["m/adapter", "give the model of that run: m"], verb=("predict", "m/adapter", "the cat"), spoil=pull_lora
    ),
    "a checkpoint in place of a model": settings(f"model.name={STEP}", said=["runs/whole/model"]),
    "a model with a flipped byte": use(
        "evaluate",
        "model.safetensors does not match its hash",
        spoil=lambda: flip(Path("runs/whole/model/model.safetensors")),
    ),
    "a model whose task is broken": use("evaluate", "heedful.json", spoil=stored("model/heedful.json", "{")),
    "a model for an unknown task": use(
        "predict",
        "heedful.json",
        "'dreaming'",
        spoil=stored("model/heedful.json", {"task": "dreaming", "settings": {}}),
    ),
    "a model whose task lacks its settings": use(
        "predict", "heedful.json", spoil=stored("model/heedful.json", {"task": "classification"})
    ),
    "a run that did not finish": use(
        "evaluate", "a run without a model", "resume=auto", spoil=lambda: shutil.rmtree("runs/whole/model")
    ),
    "no run": Bad(["no such checkpoint"], verb=("evaluate", "runs/ner")),
    "settings of the training, afterwards": use("evaluate", "has no effect on a model", given=["train.max_steps=1"]),
    "nothing to score on": use("evaluate", "no data to score on", "data.test=FILE", given=["data.validation=null"]),
    "labels that the model has not": Bad(
        ["b.csv", "'c'"],
        verb=("evaluate", "runs/whole", "data.test=b.csv"),
        spoil=lambda: write(Path("b.csv"), GOOD + "x,c\n"),
    ),
    "a mistyped file to predict": Bad(["no such file", "rows.csv"], verb=("predict", "runs/whole", "rows.csv")),
    "nothing to predict": Bad(["INPUT is empty"], verb=("predict", "runs/whole", " ")),
}


# ------------------------------------------------------------------------------------------------------- attacks


class Payload:
    """Unpickled, it makes the file ``ran``."""

    def __reduce__(self):
        return open, ("ran", "w")


def evil(*paths):
    for path in paths:
        torch.save({"state": Payload()}, path)


CODE = "open('ran', 'w')\n"
TAG = "!!python/object/apply:builtins.open ['ran', 'w']"
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}


def bring_code():
    put("code.py", CODE)()
    change("config.json", model_type="brought", auto_map=AUTO_MAP)()


def bring_tokenizer_code():
    put("code.py", CODE)()
    change("tokenizer_config.json", tokenizer_class="Brought", auto_map={"AutoTokenizer": ["code.Brought", None]})()


def pickle_for_optimizer():
    evil("optimizer.pickle")
    rehashed("optimizer.safetensors", Path("optimizer.pickle").read_bytes())()


def point_out():
    outside = {"../../../../dev.csv": sha256_of(Path("dev.csv"))}
    write(STEP / MANIFEST, json.loads((STEP / MANIFEST).read_text()) | outside)


def pickled_adapter(folder, config):
    write(
        Path(folder, "adapter_config.json"),
        json.loads(Path("runs/lora/adapter/adapter_config.json").read_text()) | config,
    )
    Path(folder, "adapter_model.safetensors").unlink(missing_ok=True)
    evil(Path(folder, "adapter_model.bin"))


ATTACKS = {
    "a pickle in pytorch_model.bin": model(
        lambda: (lose("*.safetensors")(), evil("model/pytorch_model.bin")), "./model", "safetensors, the only weights"
    ),
    "pickles beside a model: pytorch_model.bin, training_args.bin, optimizer.pt, rng_state.pth": Bad(
        ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "./model", "not read"],
        spoil=lambda: evil(
            *(f"model/{n}" for n in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"))
        ),
        given=["train.max_steps=1"],
        ends=0,
    ),
    "pickles beside a checkpoint: optimizer.bin, random_states_0.pkl, custom_checkpoint_0.pkl": again(
        *("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", str(STEP), "not read"),
        given=["data.train=train.csv"],
        spoil=lambda: evil(*(STEP / n for n in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"))),
        ends=0,
    ),
    "a pickle for a checkpoint's optimizer.safetensors, with a manifest that agrees": again(
        str(STEP), "no readable safetensors", spoil=pickle_for_optimizer
    ),
    "code that a model brings, by auto_map": model(bring_code, "./model", "custom code"),
    "code that a tokenizer brings, by auto_map, beside a tokenizer.json": Bad(
        ["code.py", "./model", "not read"], spoil=bring_tokenizer_code, ends=0
    ),
    "a tag of Python's in a configuration": file(f"{MODEL}seed: {TAG}", "run.yaml", "python/object/apply"),
    "a tag of Python's on the command line": settings(f"seed={TAG}", said=["seed", "python/object/apply"]),
    "a tag of Python's in the run that is gone on with": again(
        "runs/whole/config.yaml", "python/object/apply", spoil=stored("config.yaml", f"{MODEL}seed: {TAG}")
    ),
    "an index that leads out of its folder": model(
        sharded({"weight_map": {"x": "../runs/whole/model/model.safetensors"}}), "../runs", "fetch the model again"
    ),
    "a manifest that leads out of its folder": again(
        "MANIFEST.json names ../../../../dev.csv, which is elsewhere", given=[f"resume={STEP}"], spoil=point_out
    ),
    "a chat template whose name leads out of its folder": model(
        change(
            "tokenizer_config.json",
            chat_template=[{"name": "default", "template": "x"}, {"name": "../../ran", "template": "x"}],
        ),
        "'../../ran'",
        "a plain name",
    ),
    "a chat template that reaches for Python's own": Bad(
        ["chat template", "unsafe"],
        {"a.jsonl": [CHAT], "llama/chat_template.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        task="generation",
        given=["model.name=./llama"],
    ),
    "weights with a header of 2^62 bytes": model(
        put("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"), "./model", "broken safetensors file"
    ),
    "a folder of data with a loading script": Bad(
        ["no train split", "set.py"], given=["data.train=set"], spoil=lambda: write(Path("set/set.py"), CODE)
    ),
    "a loading script for data": Bad(
        ["ends in '.py'"], given=["data.train=set/set.py"], spoil=lambda: write(Path("set/set.py"), CODE)
    ),
    "an adapter with a pickle": Bad(
        ["runs/lora/adapter", "give the model of that run"],
        given=["model.name=runs/lora/adapter"],
        spoil=lambda: pickled_adapter("runs/lora/adapter", {}),
    ),
    "an adapter with a pickle in a model's folder": model(
        lambda: pickled_adapter("model", {"base_model_name_or_path": "./llama"}), "./model", "a folder with an adapter"
    ),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


KINDS = {
    "data": DATA,
    "configuration": CONFIGURATION,
    "models": MODELS,
    "runs, checkpoints, adapters": RUNS,
    "attacks": ATTACKS,
}
