"""Causal language modelling: every token learned once, from its own text alone, and only the answers of a prompt."""

import re
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from attention_samples import swap
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import DECODERS, HABITS, TEXTS, input_widths, make_decoder_tokenizer, make_model, make_task
from tiny_text import make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig

from heedful import UserError
from pipelines.report import learned_tokens
from tasks.generation import Generation, logger
from tasks.options import GenerationOptions
from tasks.positions import check_lengths
from tasks.prompts import answer_end
from training.lora import add_lora

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}[SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "barked"},
]
PAIRS = {"prompt": ["the cat", "a dog barked", "Anna"], "completion": [" sat", " at the moon", " met Paul"]}


@pytest.fixture(scope="module")
def tokenizer():
    made = make_decoder_tokenizer()
    made.chat_template = TEMPLATE
    return made


def table(**columns):
    return datasets.Dataset.from_dict({"row": list(range(len(next(iter(columns.values()))))), **columns})


def build(tokenizer, rows, *, max_length=32, stride=4, **options):
    return Generation.build(
        tokenizer, rows, model_config=None, max_length=max_length, stride=stride, options=GenerationOptions(**options)
    )


def as_examples(features):
    return [dict(zip(features, cells, strict=True)) for cells in zip(*features.values(), strict=True)]


def encoded(task, rows, *, training=True):
    return as_examples(task.encode(rows[:], training=training))


def predictions(task, model, rows):
    with torch.no_grad():
        found = task.predict(model, task.collate(encoded(task, rows, training=False)))
    return [{k: v[i].numpy() for k, v in found.items()} for i in range(len(found["row"]))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_the_packed_loss_is_that_of_each_text_alone(family, training, tokenizer):
    rows = table(text=[*TEXTS, "a", "the cat " * 12])
    model = make_model(family, AutoModelForCausalLM, dropout=False, initializer_range=0.3).train(training)
    packed, plain = (build(tokenizer, rows, packing=packing) for packing in (True, False))
    packed.prepare_model(model)
    batches = [task.collate(encoded(task, rows)) for task in (packed, plain)]
    losses = [task.loss(model, batch) for task, batch in zip((packed, plain), batches, strict=True)]
    assert len(batches[0]["row"]) < len(batches[1]["row"])
    assert (
        packed.count(batches[0])
        == plain.count(batches[1])
        == sum(len(tokenizer(text)["input_ids"]) for text in rows["text"])
    )
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    alone = [plain.loss(model, plain.collate([example])) for example in encoded(plain, rows)]
    torch.testing.assert_close(losses[0], sum(alone), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_cache_would_let_packed_texts_see_each_other(tokenizer):
    """The trap that ``use_cache=False`` is for: with transformers' default no one looks at the positions."""
    rows = table(text=TEXTS)
    model = make_model("llama", AutoModelForCausalLM, initializer_range=0.3)
    batch = build(tokenizer, rows).collate(encoded(build(tokenizer, rows), rows))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        apart, together = (model(**inputs, use_cache=cache).logits for cache in (False, True))
    assert not torch.allclose(apart, together, atol=1e-3)


class Blind(torch.nn.Module):
    """A model that ignores the positions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, use_cache, position_ids=None):
        return self.model(input_ids=input_ids, use_cache=use_cache)


def test_a_model_that_packs_badly_is_refused(tokenizer):
    rows = table(text=TEXTS)
    model = Blind(make_model("llama", AutoModelForCausalLM, initializer_range=0.3))
    with pytest.raises(UserError, match=r"generation.packing=false"):
        build(tokenizer, rows).prepare_model(model)
    build(tokenizer, rows, packing=False).prepare_model(model)


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    max_length=st.integers(8, 32),
    stride=st.integers(1, 4),
    packing=st.booleans(),
)
def test_every_token_is_learned_once(tokenizer, lengths, max_length, stride, packing):
    rows = table(text=["a" * length for length in lengths])
    task = build(tokenizer, rows, max_length=max_length, stride=stride, packing=packing)
    examples = encoded(task, rows)
    ids = [tokenizer(text)["input_ids"] for text in rows["text"]]
    assert all(len(example["input_ids"]) <= max_length for example in examples)
    # All but each text's first token, and the one that ends it.
    assert sum(label != -100 for example in examples for label in example["labels"][1:]) == sum(map(len, ids))


@pytest.mark.parametrize("columns", [{"messages": [CHAT]}, {"text": TEXTS}], ids=["chat", "packed"])
def test_the_preview_shows_what_is_learned_in_green(columns, tokenizer):
    rows = table(**columns)
    feature = encoded(build(tokenizer, rows, max_length=64), rows)[0]
    shown = learned_tokens(tokenizer, feature)
    pairs = zip(feature["input_ids"], feature["labels"], strict=True)
    texts = [(tokenizer.decode([token]), label != -100) for token, label in pairs]
    before, after = "what is learned of the first example: ", "".join(text for text, _ in texts)
    assert shown.plain == before + after
    green = {i for span in shown.spans if span.style == "green underline" for i in range(span.start, span.end)}
    learned = [is_learned for text, is_learned in texts for _ in text]
    assert green == {len(before) + i for i, is_learned in enumerate(learned) if is_learned}
    assert 0 < len(green) < len(after)
    marked = learned_tokens(tokenizer, feature, colours=False).plain
    assert "".join(re.findall("»(.*?)«", marked, re.DOTALL)) == "".join(
        text for text, is_learned in texts if is_learned
    )


def test_the_end_is_learned_though_it_is_the_padding_too(tokenizer):
    tokenizer = make_decoder_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    task = build(tokenizer, table(**PAIRS))
    batch = task.collate(encoded(task, table(**PAIRS)))
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(dim=1)
    assert ends.tolist() == [1, 1, 1]
    assert (batch["input_ids"] == tokenizer.eos_token_id).sum() > 3


def test_only_the_completion_is_learned(tokenizer):
    rows = table(**PAIRS)
    for example, completion in zip(encoded(build(tokenizer, rows), rows), rows["completion"], strict=True):
        learned = [token for token in example["labels"] if token != -100]
        assert tokenizer.decode(learned) == completion + "[SEP]"


def test_only_the_answers_of_a_chat_are_learned(tokenizer):
    rows = table(messages=[CHAT])
    (example,) = encoded(build(tokenizer, rows, max_length=64), rows)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip()
    assert example["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    learned = "".join(tokenizer.decode([token]) if token != -100 else "|" for token in example["labels"])
    assert [part for part in learned.split("|") if part] == ["sat on[SEP]", "barked[SEP]"]
    prompt = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    shown = example["input_ids"][: example["prompt_length"]]
    assert shown == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("border", range(1, 15))
def test_the_prompt_is_tokenized_as_it_will_be_without_its_answer(border, tokenizer):
    text = "the cat sat on"
    (example,) = encoded(build(tokenizer, table(**PAIRS)), table(prompt=[text[:border]], completion=[text[border:]]))
    prompt = example["input_ids"][: example["prompt_length"]]
    assert prompt == tokenizer(text[:border])["input_ids"]


def test_an_answer_ends_with_the_token_that_ends_a_turn(tmp_path):
    """A base model's tokenizer may have a chat template whose turns end otherwise than its texts."""
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("[SEP]", "[UNK]")
    assert answer_end(tokenizer) == tokenizer.convert_tokens_to_ids("[UNK]") != tokenizer.eos_token_id
    rows, model = table(messages=[CHAT]), make_model("llama", AutoModelForCausalLM, initializer_range=0.3)
    task = build(tokenizer, rows, max_length=56, decoding={"max_new_tokens": 8})
    task.prepare_model(model)
    model.save_pretrained(tmp_path)
    stored = GenerationConfig.from_pretrained(tmp_path)  # what pipeline() and generate() go by
    assert {tokenizer.eos_token_id, answer_end(tokenizer)} <= set(stored.eos_token_id)
    model.lm_head.bias = torch.nn.Parameter(1e3 * torch.eye(400)[answer_end(tokenizer)])  # it says nothing else
    batch = task.collate(encoded(task, rows, training=False))
    assert task.predict(model, batch)["generated"].shape[1] == 1


def test_a_prompt_and_its_answer_fit_into_the_positions(tokenizer):
    model = make_model("gpt2", AutoModelForCausalLM)
    check_lengths(model, build(tokenizer, table(**PAIRS), max_length=56, decoding={"max_new_tokens": 8}).sequences())
    check_lengths(model, build(tokenizer, table(text=TEXTS), max_length=64).sequences())  # a text is only read
    task = build(tokenizer, table(**PAIRS), max_length=57, decoding={"max_new_tokens": 8})
    with pytest.raises(UserError, match=r"57 \+ generation.decoding.max_new_tokens=8"):
        check_lengths(model, task.sequences())


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    rows = table(messages=[CHAT])
    with pytest.raises(UserError, match=r"rewrites what stands before turn"):
        build(tokenizer, rows).encode(rows[:], training=True)


def test_a_long_prompt_loses_its_beginning_and_it_is_counted(tokenizer):
    rows = table(prompt=["the cat " * 20], completion=[" sat"])
    task = build(tokenizer, rows, max_length=16)
    (example,) = encoded(task, rows)
    assert len(example["input_ids"]) == 16
    assert tokenizer.decode([t for t in example["labels"] if t != -100]) == " sat[SEP]"
    account = task.account(task.encode(rows[:], training=True), rows)
    assert account["tokens_lost"] == account["tokens"] - 16 > 0


def test_the_loss_is_that_of_the_whole_logits(tokenizer):
    rows = table(**PAIRS)
    task, model = build(tokenizer, rows), make_model("gemma2", AutoModelForCausalLM, initializer_range=0.3)
    batch = task.collate(encoded(task, rows))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    whole = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(task.loss(model, batch), whole)
    assert task.count(batch) == (batch["labels"] != -100).sum()


@pytest.mark.parametrize("family", DECODERS)
def test_answers_do_not_depend_on_the_batch(family, tokenizer):
    """Padding on the left for generation, on the right for the likelihood: each row alone says the same."""
    rows = table(**PAIRS)
    task = build(tokenizer, rows, decoding={"max_new_tokens": 5})
    model = make_model(family, AutoModelForCausalLM, initializer_range=0.3)
    together = task.decode(predictions(task, model, rows), rows)
    for i, output in enumerate(together):
        one = table(**{name: [cells[i]] for name, cells in PAIRS.items()})
        (alone,) = task.decode(predictions(task, model, one), one)
        assert alone["generated"] == output["generated"]
        assert alone["nll"] == pytest.approx(output["nll"], rel=1e-5)


def test_scores_and_their_resampled_form(tokenizer):
    rows = table(**PAIRS)
    task = build(tokenizer, rows, decoding={"max_new_tokens": 5})
    outputs = task.decode(predictions(task, make_model("llama", AutoModelForCausalLM), rows), rows)
    outputs[1]["generated"] = "at the moon"
    scores = task.score(outputs, rows)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores.keys() >= {"rouge1", "rouge2", "rougeL", "perplexity", task.headline}
    resampled = task.resample(outputs, rows)(np.arange(3))
    assert resampled == {name: pytest.approx(scores[name], rel=1e-12) for name in resampled}


def test_perplexity_of_a_text_is_over_all_its_tokens(tokenizer):
    rows = table(text=[TEXTS[0], "the cat " * 30])
    task, model = build(tokenizer, rows), make_model("llama", AutoModelForCausalLM)
    outputs = task.decode(predictions(task, model, rows), rows)
    assert [output["tokens"] for output in outputs] == [len(tokenizer(text)["input_ids"]) for text in rows["text"]]
    ids = torch.tensor([[*tokenizer(TEXTS[0])["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        alone = cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    assert outputs[0]["nll"] == pytest.approx(alone.item(), rel=1e-5)
    total = sum(o["nll"] for o in outputs) / sum(o["tokens"] for o in outputs)
    assert task.score(outputs, rows)["perplexity"] == pytest.approx(np.exp(total))


FAULTS = [
    ({"text": ["a"], "messages": [CHAT]}, {}, r"the columns text, messages"),
    ({"prompt": ["a"]}, {}, r"the columns prompt"),
    ({"text": ["a"]}, {"stride": 0}, r"data.stride=0"),
    ({"text": ["a"]}, {"stride": 17}, r"data.stride=17"),
]


@pytest.mark.parametrize(("columns", "options", "message"), FAULTS)
def test_faults_of_the_user_are_named(columns, options, message, tokenizer):
    with pytest.raises(UserError, match=message):
        build(tokenizer, table(**columns), **options)


def test_faults_of_rows_are_named(tokenizer):
    bad = [{"role": "wizard", "content": "a"}]
    for messages, message in (
        (bad, r"row 0(.|\n)*'wizard'"),
        ([{"role": "system", "content": "a"}], r"without an ans"),
        (CHAT[1:], r"row 0(.|\n)*begins with an answer"),
    ):
        with pytest.raises(UserError, match=message):
            build(tokenizer, table(messages=[CHAT])).check(table(messages=[messages]), where="data.train")
    empty = table(prompt=["a"], completion=["b"])
    with pytest.raises(UserError, match="without an answer to learn"):
        build(tokenizer, empty, max_length=1).encode(empty[:], training=True)
    with pytest.raises(UserError, match=r"rows of the form text"):
        build(tokenizer, table(**PAIRS)).check(table(text=["a"]), where="data.test")
    with pytest.raises(UserError, match="an empty prompt"):
        build(tokenizer, empty).encode(table(prompt=[""], completion=["b"])[:], training=True)


def test_a_chat_that_ends_with_a_question_is_refused_in_training_and_answered_in_prediction(tokenizer):
    asked = table(messages=[CHAT[:3]])
    task = build(tokenizer, table(messages=[CHAT]), max_length=64)
    with pytest.raises(UserError, match=r"row 0(.|\n)*without an answer"):
        task.encode(asked[:], training=True)
    (example,) = encoded(task, asked, training=False)
    assert example["prompt_length"] == len(example["input_ids"])
    with pytest.raises(UserError, match="without an answer to compare with"):
        task.score([{"generated": "a", "nll": 1.0, "tokens": 1}], asked)


def test_a_template_that_leaves_out_the_system_is_refused_where_there_is_one():
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    task = build(tokenizer, table(messages=[CHAT]))
    task.check(table(messages=[CHAT]), where="a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl(.|\n)*leaves out the system"):
        task.check(table(messages=[[{"role": "system", "content": "be brief"}, *CHAT]]), where="a.jsonl")


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["a", "b", "c"], "completion": ["d", " ", ""]},
        {"messages": [CHAT, *[[CHAT[0], {"role": "assistant", "content": said}] for said in (" ", "")]]},
    ],
    ids=["completion", "chat"],
)
def test_an_answer_that_says_nothing_is_learned_and_said(columns, tokenizer, caplog):
    rows = table(**columns)
    task = build(tokenizer, rows)
    logger.addHandler(caplog.handler)
    caplog.clear()
    task.check(rows.select([0]), where="a.jsonl")
    assert not caplog.messages
    task.check(rows, where="a.jsonl")
    logger.removeHandler(caplog.handler)
    assert "a.jsonl: 2 rows with an empty answer, the first of them row 1" in caplog.messages[0]


def test_a_template_that_ends_no_answer_is_refused():
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("[SEP]", "")
    with pytest.raises(UserError, match="token of its own"):
        build(tokenizer, table(messages=[CHAT]))


def test_a_template_that_refuses_a_role_is_a_message_not_a_traceback():
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    task = build(tokenizer, table(messages=[CHAT]))
    with pytest.raises(UserError, match="no system"):
        task.encode(table(messages=[[{"role": "system", "content": "a"}, *CHAT]])[:], training=True)


def test_a_cut_prompt_keeps_what_begins_a_text(tokenizer):
    begun = make_tokenizer("roberta", TEXTS)  # [CLS] before each text
    begun.eos_token = "[SEP]"
    rows = table(prompt=["the cat " * 20], completion=[" sat"])
    (example,) = encoded(build(begun, rows, max_length=16), rows)
    assert len(example["input_ids"]) == 16
    assert example["input_ids"][0] == begun.cls_token_id


@pytest.mark.fault(
    "a checkpoint's own settings of decoding (several answers each, no cache, words that are forbidden)",
    "are left: answers are searched for as the configuration says, with the cache",
)
@pytest.mark.parametrize(("beams", "lora"), [(1, False), (3, True)])
def test_a_checkpoints_own_habits_of_decoding_are_left(beams, lora, tokenizer):
    rows = table(**PAIRS)
    task = build(tokenizer, rows, decoding={"max_new_tokens": 5, "num_beams": beams})
    model = make_model("llama", AutoModelForCausalLM, initializer_range=0.3)
    before = task.decode(predictions(task, model, rows), rows)
    for name, value in HABITS.items():
        setattr(model.generation_config, name, value)
    with input_widths(model.model) as widths:
        wrapped = add_lora(model, [], r=2) if lora else model  # its adapter is zero as yet
        assert task.decode(predictions(task, wrapped, rows), rows) == before
    assert widths[-4:] == [1] * 4  # one token at a time: the cache holds what is before it
    assert model.generation_config.num_return_sequences == 2  # they are the checkpoint's all the same


def test_a_chat_needs_a_template():
    with pytest.raises(UserError, match="chat template"):
        build(make_decoder_tokenizer(), table(messages=[CHAT]))


def test_an_attention_that_goes_by_blocks_of_the_pack_is_refused():
    """On a few tokens such a model answers alike; on a text of more than a block it does not."""
    task, _, _ = make_task("generation", "llama", max_length=64)
    model = make_model("llama", AutoModelForCausalLM)
    swap(model, {"variant": "sliding_window", "reach": 3})
    task.prepare_model(model)
    blocks = {"variant": "block_sparse", "block_size": 8, "window_blocks": 1, "random_blocks": 0}
    for by_blocks in (blocks, {"variant": "lsh", "cluster_size": 3, "rounds": 1}):
        swap(model, by_blocks)
        with pytest.raises(UserError, match="packed behind another"):
            task.prepare_model(model)
    replace(task, options=GenerationOptions(packing=False)).prepare_model(model)
