"""``configs/hub``: refused in one message without a network; with a few rows of the Hub's own features, each one runs.

What is proven is that columns, labels and settings fit together. That the Hub has these features is from memory.
"""

import json
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Features, List, Translation, Value
from test_pipelines_cli import refused
from tiny_families import WORDS, save_body, tokenizer_for

from pipelines import config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs/hub").glob("*.yaml"))
FAMILY_OF = {"smollm2": "llama"}
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXT, INDEX = Value("string"), Value("int32")
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
SQUAD = {"id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT}
SQUAD |= {"answers": {"text": List(TEXT), "answer_start": List(INDEX)}}
CONLL = {"id": TEXT, "document_id": INDEX, "sentence_id": INDEX, "tokens": List(TEXT)}
CONLL |= {"pos_tags": List(ClassLabel(names=["NN", "NNP"])), "chunk_tags": List(ClassLabel(names=["O", "B-NP"]))}
CONLL |= {"ner_tags": List(ClassLabel(names=TAGS))}
NLI = ClassLabel(names=["entailment", "neutral", "contradiction"])
MESSAGES = List({"content": TEXT, "role": TEXT})

FEATURES = {
    "tomaarsen/conll2003": CONLL,
    "nyu-mll/glue[sst2]": {"sentence": TEXT, "label": ClassLabel(names=["negative", "positive"]), "idx": INDEX},
    "nyu-mll/glue[mnli]": {"premise": TEXT, "hypothesis": TEXT, "label": NLI, "idx": INDEX},
    "rajpurkar/squad": SQUAD,
    "rajpurkar/squad_v2": SQUAD,
    "EdinburghNLP/xsum@refs/convert/parquet": {"document": TEXT, "summary": TEXT, "id": TEXT},
    "wmt/wmt16[ro-en]": {"translation": Translation(["ro", "en"])},
    "trl-lib/Capybara": {"source": TEXT, "messages": MESSAGES, "num_turns": Value("int64")},
    "EleutherAI/wikitext_document_level[wikitext-2-raw-v1]": {"page": TEXT},
}
SPLITS = {"nyu-mll/glue[mnli]": {"train", "validation_matched", "validation_mismatched"}}
SPLITS |= {"trl-lib/Capybara": {"train", "test"}}
for name in ("nyu-mll/glue[sst2]", "rajpurkar/squad", "rajpurkar/squad_v2"):
    SPLITS[name] = {"train", "validation"}  # the test splits have no labels

SAID = {
    "ner-conll2003-bert": ["entities PER 4, LOC 4", "tomaarsen/conll2003:train: columns not used: 'id'"],
    "classification-sst2-roberta": ["labels: negative, positive"],
    "classification-mnli-roberta": ["labels: contradiction, entailment, neutral"],
    "generation-capybara-smollm2": ["rows of the form chat"],
    "generation-wikitext2-gpt2": ["rows of the form text"],
    "qa-squad_v2-bert": ["NoAns_f1"],
    "translation-wmt16_en_ro-t5": ["tok:intl"],
}
"""What the run says of the data or of how it is read."""
METRICS = {
    "classification": {"accuracy"},
    "ner": {"f1"},
    "qa": {"exact_match", "f1"},
    "summarization": {"rougeL"},
    "translation": {"bleu", "chrf"},
    "generation": {"perplexity"},
    "mlm": {"perplexity"},
}


def cell(feature, row, name):
    """A cell of this feature: words that differ from row to row, labels in turn."""
    words = [WORDS[(row + i) % len(WORDS)] for i in range(3 + row)]
    if name == "messages":
        turns = [("user", words[:3]), ("assistant", words[3:] or ["no"])]
        return [{"content": " ".join(said), "role": role} for role, said in turns * (1 + row % 2)]
    if name == "answers":
        return {"text": ["cat"], "answer_start": [4]}
    if name == "ner_tags":
        return [1 + 4 * (row % 2), *[0] * (2 + row)]
    if isinstance(feature, Translation):
        return {"en": " ".join(words), "ro": " ".join(words[::-1])}
    if isinstance(feature, ClassLabel):
        return row % feature.num_classes
    if isinstance(feature, List):
        return words if feature.feature == TEXT else [0] * len(words)
    if feature == TEXT:
        return "the cat " + " ".join(words) if name == "context" else " ".join(words)
    return row


def table(name):
    """Eight rows as the Hub has them; of SQuAD 2.0 every other question has no answer."""
    features = Features(FEATURES[name])
    rows = [{column: cell(feature, row, column) for column, feature in features.items()} for row in range(8)]
    if name == "rajpurkar/squad_v2":
        for row in rows[::2]:
            row["answers"] = {"text": [], "answer_start": []}
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds ``FEATURES``; returns what was asked of it, (name, split)."""
    asked = []

    def load(name, subset, *, split, revision, streaming):
        assert not streaming
        source = name + (f"@{revision}" if revision else "") + (f"[{subset}]" if subset else "")
        asked.append((source, split))
        if source not in FEATURES or split not in SPLITS.get(source, {"train", "validation", "test"}):
            raise ValueError(f"the Hub has no {source}:{split}")
        return table(source)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def save_tiny(family):
    tokenizer = tokenizer_for(family)
    if family == "llama":
        tokenizer.chat_template = TEMPLATE
    save_body(family, "model", tokenizer=tokenizer)


def tiny(task):
    """Settings for a single step of a tiny model."""
    settings = ["model.name=./model", "model.max_length=32", "data.stride=4", "train.max_steps=1", "train.batch_size=4"]
    settings += ["train.bf16=false", "train.per_device_train_batch_size=2", "output_dir=runs/tiny"]
    settings += [f"{task}.decoding.max_new_tokens=4"] * (task in ("summarization", "translation", "generation"))
    return settings + [f"{task}.max_target_length=16"] * (task in ("summarization", "translation"))


def test_each_task_has_a_run():
    assert {config.load(path).task for path in CONFIGS} == set(METRICS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_without_a_network_one_message_names_the_data(path, tmp_path, monkeypatch, cli_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    result = cli_run("finetune", path)
    refused(result, config.load(path).data.train)
    assert "HF_HUB_OFFLINE" in result[2]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_without_a_network_one_message_names_the_model(path, tmp_path, monkeypatch, cli_run, hub):
    monkeypatch.chdir(tmp_path)
    refused(cli_run("finetune", path), config.load(path).model.name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_columns_labels_and_settings_fit_together(path, tmp_path, monkeypatch, cli_run, hub):
    monkeypatch.chdir(tmp_path)
    loaded = config.load(path)
    family = path.stem.rpartition("-")[2]
    save_tiny(FAMILY_OF.get(family, family))
    code, _, log = cli_run("finetune", path, *tiny(loaded.task))
    assert code == 0, log
    assert [part for part in SAID.get(path.stem, []) if part not in log] == [], log
    given = {split: source for split in ("train", "validation", "test") if (source := getattr(loaded.data, split))}
    assert {f"{name}:{split}" for name, split in hub} == set(given.values())
    metrics = json.loads(Path("runs/tiny/metrics.json").read_text())
    assert metrics.keys() == given.keys() - {"train"}
    assert all(METRICS[loaded.task] <= scores.keys() for scores in metrics.values())
