"""Summarization and translation, by encoder-decoders and by decoder-only models."""

from urllib.error import URLError

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from tiny_families import (
    HABITS,
    LANGUAGES,
    SEQ2SEQ,
    TEXTS,
    input_widths,
    make_config,
    make_decoder_tokenizer,
    make_language_tokenizer,
    make_model,
    make_seq2seq_tokenizer,
    tokenizer_for,
)
from torch.nn.functional import cross_entropy

from heedful import UserError
from tasks.decoding import to_texts
from tasks.metrics.bleu.bleu import bleu
from tasks.metrics.rouge.rouge import KINDS, rouge
from tasks.options import SummarizationOptions, TranslationOptions
from tasks.positions import check_lengths
from tasks.saved import load_task, save_task
from tasks.text_to_text import TextToText
from training.tokenizers import load_tokenizer

ROWS = {"source": [*TEXTS, "a dog"], "target": ["the cat", "a dog barked at", "Anna", "rain all day", "dog"]}


@pytest.fixture(scope="module")
def tokenizer():
    return make_seq2seq_tokenizer()


def config_of(family):
    return make_config(family, dropout=False)


def seq2seq(family):
    model = make_model(family, transformers.AutoModelForSeq2SeqLM, dropout=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def table(**columns):
    return datasets.Dataset.from_dict({"row": list(range(len(columns["source"]))), **columns})


def build(tokenizer, config, options=None, *, max_length=32):
    rows = table(**ROWS)
    options = options or SummarizationOptions(decoding={"max_new_tokens": 6})
    return TextToText.build(tokenizer, rows, model_config=config, max_length=max_length, stride=0, options=options)


def encoded(task, rows, *, training=True):
    features = task.encode(rows[:], training=training)
    return [dict(zip(features, cells, strict=True)) for cells in zip(*features.values(), strict=True)]


def outputs_of(task, model, rows):
    bare = rows.remove_columns("target") if "target" in rows.column_names else rows
    with torch.no_grad():
        found = task.predict(model, task.collate(encoded(task, bare, training=False)))
    return task.decode([{k: v[i].numpy() for k, v in found.items()} for i in range(len(rows))], rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_loss_is_that_of_transformers_own_labels(family, smoothing, tokenizer):
    model, rows = seq2seq(family).train(), table(**ROWS)
    options = SummarizationOptions(label_smoothing_factor=smoothing)
    task = build(tokenizer, model.config, options)
    batch = task.collate(encoded(task, rows))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, labels=batch["labels"]).logits  # shifts the labels itself
    if family == "mbart":  # which wraps the last token around, the language's, where ours is decoder_start_token_id
        logits = model(**inputs, decoder_input_ids=batch["decoder_input_ids"]).logits
    whole = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(task.loss(model, batch), whole)
    alone = sum(task.loss(model, task.collate([example])) for example in encoded(task, rows))
    torch.testing.assert_close(task.loss(model, batch), alone)
    assert task.count(batch) == (batch["labels"] != -100).sum()


def test_targets_begin_after_the_start_and_end_with_the_end(tokenizer):
    task = build(tokenizer, config_of("bart"))
    for example, target in zip(encoded(task, table(**ROWS)), ROWS["target"], strict=True):
        ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        assert example["labels"] == [*ids, tokenizer.sep_token_id]  # [CLS] is what the decoder begins with
    batch = task.collate(encoded(task, table(**ROWS)))
    assert (batch["decoder_input_ids"][:, 0] == 2).all()


@pytest.mark.parametrize("training", [True, False])
def test_each_source_begins_with_its_prefix(training, tokenizer):
    task = build(tokenizer, config_of("t5"), SummarizationOptions(source_prefix="moon day "))
    plain = build(tokenizer, config_of("t5"))
    start, prefix = tokenizer.cls_token_id, tokenizer("moon day", add_special_tokens=False)["input_ids"]
    pairs = zip(*(encoded(one, table(**ROWS), training=training) for one in (task, plain)), strict=True)
    for example, without in pairs:
        assert example["input_ids"] == [start, *prefix, *without["input_ids"][1:]]
        assert example["labels"] == without["labels"]


def test_what_is_no_token_is_left_out_of_a_text(tokenizer):
    """Predictions may be padded with -100, and a model may have rows for more tokens than there are."""
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert to_texts(tokenizer, [np.array([-100, *ids, len(tokenizer), 10**6, -100]), np.array([-100])]) == [
        "the cat",
        "",
    ]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_answers_do_not_depend_on_the_batch(family, beams, tokenizer):
    model, rows = seq2seq(family), table(**ROWS)
    options = SummarizationOptions(decoding={"max_new_tokens": 6, "num_beams": beams})
    task = build(tokenizer, model.config, options)
    together = outputs_of(task, model, rows)
    alone = [outputs_of(task, model, table(source=[text]))[0] for text in ROWS["source"]]
    assert together == alone


SEARCHES = [
    ({}, {"num_beams": 3}),
    ({"num_beams": 3}, {"num_beams": 3, "length_penalty": -4.0}),
    ({}, {"min_new_tokens": 6}),
    ({}, {"no_repeat_ngram_size": 1}),
    ({}, {"repetition_penalty": 3.0}),
]


@pytest.mark.parametrize(("other", "search"), SEARCHES, ids=lambda settings: " ".join(settings))
def test_answers_are_searched_for_as_transformers_does(other, search):
    tokenizer, model, rows, found = tokenizer_for("t5"), seq2seq("t5"), table(**ROWS), []
    model.generation_config.eos_token_id = list(range(3, 400, 4))  # a quarter of all tokens: answers do end
    for settings in (other, search):
        task = build(tokenizer, model.config, SummarizationOptions(decoding={"max_new_tokens": 8, **settings}))
        batch = task.collate(encoded(task, rows, training=False))
        with torch.no_grad():
            found.append(task.predict(model, batch)["generated"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = model.generate(**inputs, **search, max_new_tokens=8, do_sample=False, suppress_tokens=[0])
    assert torch.equal(found[1], plain[:, 1:])
    assert not torch.equal(*found)  # the setting has an effect on this model


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_checkpoints_own_habits_of_decoding_are_left(family):
    tokenizer, model, rows = tokenizer_for(family), seq2seq(family), table(**ROWS)
    task = build(tokenizer, model.config)
    before = outputs_of(task, model, rows)
    for name, value in HABITS.items():
        setattr(model.generation_config, name, value)
    with input_widths(model.get_decoder()) as widths:
        assert outputs_of(task, model, rows) == before
    assert widths == [1] * 6


def test_a_decoder_only_model_learns_the_target_alone():
    tokenizer = make_decoder_tokenizer()
    model, rows = make_model("llama", transformers.AutoModelForCausalLM, initializer_range=0.3), table(**ROWS)
    task = build(tokenizer, model.config)
    assert task.auto_class is transformers.AutoModelForCausalLM
    for example, target in zip(encoded(task, rows), ROWS["target"], strict=True):
        learned = [token for token in example["labels"] if token != -100]
        assert tokenizer.decode(learned).strip() == target + "[SEP]"
    batch = task.collate(encoded(task, rows))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    whole = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(task.loss(model, batch), whole)
    together = outputs_of(task, model, rows)
    assert together == [outputs_of(task, model, table(source=[text]))[0] for text in ROWS["source"]]


def test_a_long_source_is_cut_inside_its_prompt_and_counted():
    tokenizer = make_decoder_tokenizer()
    config = make_model("llama", transformers.AutoModelForCausalLM).config
    task = build(tokenizer, config, SummarizationOptions(max_target_length=4), max_length=40)
    rows = table(source=["the cat sat " * 30], target=["Anna met Paul in Berlin"])
    (example,) = encoded(task, rows)
    prompt = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
    assert prompt.endswith("\n\nSummary:\n")
    assert 36 <= example["prompt_length"] <= 40
    labels = [token for token in example["labels"] if token != -100]
    assert len(labels) == 4
    assert labels[-1] == tokenizer.eos_token_id
    account = task.account(task.encode(rows[:], training=True), rows)
    assert account["source_tokens_lost"] > 0 < account["target_tokens_lost"]


@pytest.mark.parametrize("room", range(36, 42))
def test_a_source_is_never_cut_through_a_character(room):
    tokenizer = make_decoder_tokenizer()  # byte-level: four tokens a face
    config = make_model("llama", transformers.AutoModelForCausalLM).config
    task, rows = build(tokenizer, config, max_length=room), table(source=["😀" * 30])
    (example,) = encoded(task, rows, training=False)
    assert example["prompt_length"] <= room
    assert "\ufffd" not in tokenizer.decode(example["input_ids"])


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_what_is_read_and_written_fits_into_the_positions(family, tokenizer):
    decoder = family == "gpt2"
    auto_class = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForSeq2SeqLM
    model = make_model(family, auto_class)
    for options in ({"max_target_length": 65}, {"max_target_length": 16, "decoding": {"max_new_tokens": 65}}):
        task = build(make_decoder_tokenizer() if decoder else tokenizer, model.config, SummarizationOptions(**options))
        with pytest.raises(UserError, match="at most 64"):
            check_lengths(model, task.sequences())
    options = {"max_target_length": 32, "decoding": {"max_new_tokens": 32}}
    task = build(make_decoder_tokenizer() if decoder else tokenizer, model.config, SummarizationOptions(**options))
    check_lengths(model, task.sequences())


@pytest.mark.parametrize("kind", ["rouge", "bleu"])
def test_scores_and_their_resampled_form(kind, tokenizer):
    options = TranslationOptions() if kind == "bleu" else SummarizationOptions()
    task, rows = build(tokenizer, config_of("t5"), options), table(**ROWS)
    texts = ["the cat sat", "a dog barked at", "Paul", "all day rain", ""]
    outputs = [{"generated": text} for text in texts]
    scores = task.score(outputs, rows)
    assert task.headline in scores
    assert scores == (bleu if kind == "bleu" else rouge)(texts, ROWS["target"])
    draw = np.array([0, 0, 3, 4, 1])
    again = task.score([outputs[i] for i in draw], rows.select(draw))
    assert task.resample(outputs, rows)(draw) == {name: pytest.approx(again[name], rel=1e-12) for name in again}


def test_bleu_and_chrf_are_sacrebleus():
    texts, golds = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "the dog"]
    assert bleu(texts, golds) == {
        "bleu": BLEU().corpus_score(texts, [golds]).score,
        "chrf": CHRF().corpus_score(texts, [golds]).score,
    }


def test_rouge_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    text, gold = "cats were sitting on mats", "the cat sat on the mat"
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    expected = {name: score.fmeasure for name, score in scorer.score(gold, text).items()}
    assert {name: value for name, value in rouge([text], [gold]).items() if name in expected} == expected


@given(text=st.text(st.characters(max_codepoint=127)), gold=st.text(st.characters(max_codepoint=127)))
def test_rouge_of_ascii_is_rouge_scores_own(text, gold):
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(KINDS, use_stemmer=True).score(gold, text)
    assert rouge([text], [gold]) == {name: score.fmeasure for name, score in expected.items()}


@pytest.mark.parametrize("text", ["привет мир", "schön größer", "猫が座った", "γάτα"])
def test_rouge_knows_every_script(text):
    assert rouge([text], [text])["rougeL"] == 1.0


def test_faults_of_the_user_are_named(tokenizer):
    config = config_of("t5")
    with pytest.raises(UserError, match="a tokenizer that knows none"):
        build(tokenizer, config, TranslationOptions(source_lang="en_XX", target_lang="es_XX"))
    with pytest.raises(UserError, match="row 1"):
        build(tokenizer, config).check(table(source=["a", " "]), where="data.train")
    with pytest.raises(UserError, match="an empty target"):
        build(tokenizer, config).check(table(source=["a", "b"], target=["c", ""]), where="data.train")
    with pytest.raises(UserError, match="decoder_start_token_id"):
        build(tokenizer, make_config("bart", decoder_start_token_id=None))
    decoder = make_model("llama", transformers.AutoModelForCausalLM).config
    with pytest.raises(UserError, match=r"source_prefix='summarize: ' has no effect on a decoder-only model"):
        build(tokenizer, decoder, SummarizationOptions(source_prefix="summarize: "))
    with pytest.raises(UserError, match=r"prompt_template='{source} tl;dr' has no effect on an encoder-decoder"):
        build(tokenizer, config, SummarizationOptions(prompt_template="{source} tl;dr"))
    with pytest.raises(ValueError, match="source"):
        SummarizationOptions(prompt_template="no place")


def test_a_tokenizer_for_bleu_that_would_be_fetched_offline_is_named_before_training(tokenizer, monkeypatch):
    def fetch(tokenize):
        raise URLError("no route to host")

    monkeypatch.setattr("tasks.text_to_text.signatures", fetch)
    with pytest.raises(UserError, match=r"translation.tokenize=flores200(.|\n)*can not be had(.|\n)*be online"):
        build(tokenizer, config_of("t5"), TranslationOptions(tokenize="flores200"))


@pytest.mark.parametrize("kind", LANGUAGES)
def test_answers_are_in_the_language_asked_for(kind, tmp_path):
    tokenizer, (source, target) = make_language_tokenizer(kind, tmp_path), LANGUAGES[kind]
    written = {"source": f"__{source}__", "target": f"__{target}__"} if kind == "m2m_100" else {}
    language = tokenizer.convert_tokens_to_ids(written.get("target", target))
    first = language if kind == "mbart" else tokenizer.eos_token_id
    ids = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": first}
    model = make_model("mbart", transformers.AutoModelForSeq2SeqLM, dropout=False, **ids)
    options = TranslationOptions(source_lang=source, target_lang=target, decoding={"max_new_tokens": 6})
    task, rows = build(tokenizer, model.config, options), table(source=TEXTS, target=TEXTS[::-1])
    (example, *_) = encoded(task, rows)
    text = tokenizer(TEXTS[-1], add_special_tokens=False)["input_ids"]
    assert example["labels"] == [*([] if kind == "mbart" else [language]), *text, tokenizer.eos_token_id]
    assert tokenizer.convert_tokens_to_ids(written.get("source", source)) in example["input_ids"]
    batch = task.collate(encoded(task, rows))
    assert batch["decoder_input_ids"][0, : len(text) + 1].tolist() == [first, *example["labels"][: len(text)]]
    with torch.no_grad():
        generated = task.predict(model, batch)["generated"]
    assert kind == "mbart" or (generated[:, 0] == language).all()
    texts = outputs_of(task, model, rows)
    assert not any(target in output["generated"] for output in texts)
    save_task(task, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_task(tmp_path, load_tokenizer(str(tmp_path), own=False))
    assert encoded(again, rows) == encoded(task, rows)
    assert outputs_of(again, model, rows) == texts
    with pytest.raises(UserError, match="does not know: 'xx'"):
        build(tokenizer, model.config, TranslationOptions(source_lang=source, target_lang="xx"))
    if written:
        with pytest.raises(UserError, match=r"does not know: '__en__'(.|\n)*one of af, am"):
            build(tokenizer, model.config, TranslationOptions(source_lang="__en__", target_lang="__es__"))


def test_a_t5_without_its_prefix_is_said_aloud(tokenizer, caplog):
    config = config_of("t5")
    config.task_specific_params = {"summarization": {"prefix": "summarize: "}}
    build(tokenizer, config)
    assert "'summarize: '" in caplog.text
