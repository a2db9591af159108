"""``heedful attention``: a plan looked at before it runs, and weights drawn as they were."""

import base64
import json
import os
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import make_config, make_model, make_task, save_body
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from attention import VARIANTS, VariantEntry, folding
from attention.options import Plan
from attention.seam import install
from attention.tiled import Tiled
from pipelines import attention_check, attention_pictures, attention_show
from pipelines.attention_check import check, common_path
from pipelines.attention_pictures import View, draw_figure, page
from sources.files import write_whole
from tasks.saved import save_task
from training.export import write_model
from training.models import load_model

WINDOW = {"variant": "sliding_window", "reach": 3}
TEXT = "the cat sat on the mat in Berlin"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands run, with room for what they print."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attention_check, "WIDTH", 300)
    return tmp_path


class Page(HTMLParser):
    """What a browser takes for markup."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.parts, self.at = [], {}, None
        self.feed(text)
        self.views = json.loads(self.parts["data"])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.at = dict(attributes).get("id", tag)

    def handle_data(self, text):
        self.parts[self.at] = self.parts.get(self.at, "") + text


def table(view):
    """A view's weights, HNM."""
    shape = len(view["heads"]), len(view["rows"]), len(view["columns"])
    return np.frombuffer(base64.b64decode(view["table"]), "<u2").reshape(shape) / 65535


def shown(cli_run, *arguments):
    code, _, log = cli_run("attention", "show", *arguments, "--out", "page.html")
    assert code == 0, log
    return Page(Path("page.html").read_text())


# --- check ---


def test_without_a_plan_every_variant_is_tried(folder, cli_run):
    save_body("bert", "model", max_position_embeddings=128)
    Path("model/model.safetensors").unlink()  # which is not read
    code, out, log = cli_run("attention", "check", "model")
    assert code == 0, log
    assert all(name in out for name in VARIANTS)
    assert "BertModel, 128 tokens" in out
    assert out.count("goes in") == len(VARIANTS) - 1
    assert "encoder.layer.*.attention.self" in out


def test_without_a_plan_ring_is_proved_too(folder, cli_run):
    """Layers that are called in turns would share a text out twice."""
    save_body("albert", "model", num_hidden_layers=4, max_position_embeddings=128)
    code, out, log = cli_run("attention", "check", "model")
    assert code == 0, log
    assert out.count("goes in") == len(VARIANTS) - 2
    assert out.count(", refused: ") == 1
    assert "refused: AlbertModel answers differently where its blocks see tokens in another order" in out


def test_a_plan_that_goes_in_is_counted(folder, cli_run):
    save_body("t5", "model")
    code, out, log = cli_run("attention", "check", "model", "attention=sliding_window", "attention.reach=3")
    assert code == 0, log
    assert "cross[0], full stays: sliding_window is for encoder.self, decoder.self\n" in out
    save_body("bart", "longer")
    found = {finding.site.role: finding for finding in check("longer", ["attention=sliding_window"], length=2000)}
    assert [finding.chosen.variant for finding in found.values()] == ["sliding_window", "sliding_window", "full"]
    window = found["encoder.self"]
    assert window.work.seen == 2000 * 257 - 128 * 129
    assert window.work.seen < window.work.scored < window.full == 2000**2
    assert found["decoder.self"].full == 2000 * 2001 // 2
    assert found["cross"].work.seen == 2000**2


def test_a_plan_that_is_refused_is_shown_with_its_reason(folder, cli_run):
    save_body("bart", "model")
    window_at_cross = "attention={encoder.self: blockwise, cross: sliding_window}"
    code, out, log = cli_run("attention", "check", "model", window_at_cross)
    assert code == 2
    assert "goes in" in out
    assert "cross[0], refused: sliding_window at cross[0]; expected it at encoder.self, decoder.self" in out
    assert "elsewhere it has no meaning" in log


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention={cross: blockwise}"], "no such place in this model: cross"),
        (["attention={cross: full}"], "no such place in this model: cross"),
        (["attention={'encoder.self[1,2]': strided}"], "no such place in this model: encoder.self[1,2]"),
        (["attention={'encoder.self[1-0]': strided}"], "'encoder.self[1-0]' is no place"),
        (["attention=telepathy"], "telepathy"),
        (["train.seed=1"], "no effect here"),
        (["attentions=full"], "no effect here"),
    ],
)
def test_what_is_no_plan_for_the_model_ends_with_2(folder, cli_run, overrides, message):
    save_body("bert", "model")
    code, out, log = cli_run("attention", "check", "model", *overrides)
    assert (code, out) == (2, "")
    assert message in log


def test_a_model_that_takes_no_variant_is_told_from_one_left_as_it_is(folder, cli_run):
    save_body("deberta-v2", "model")
    code, _, log = cli_run("attention", "check", "model", "attention=blockwise")
    assert code == 2
    assert "in its own way" in log
    code, out, log = cli_run("attention", "check", "model", "attention=full")
    assert code == 0, log
    assert "full attention, as the model has it" in out


def test_a_model_that_is_not_there_is_said_to_be_absent(folder, cli_run):
    code, _, log = cli_run("attention", "check", "./model", "attention=full")
    assert code == 2
    assert "no such model folder" in log


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "the checkpoint holds sliding_window reach=3 global_tokens=[]; a run that names no attention keeps it"),
        (
            ["attention=strided"],
            "the checkpoint holds sliding_window reach=3 global_tokens=[], which this plan replaces",
        ),
        (["attention=sliding_window", "attention.reach=3"], "a run that names no attention keeps it"),
        (["attention=full"], "the checkpoint holds sliding_window reach=3 global_tokens=[], which this plan replaces"),
    ],
)
def test_the_plan_that_a_checkpoint_holds_is_said(folder, cli_run, overrides, message):
    model = make_model("bert", AutoModel)
    install(model, Plan.model_validate(WINDOW))
    model.save_pretrained("model")
    code, out, log = cli_run("attention", "check", "model", *overrides)
    assert code == 0, log
    assert message in out


def test_a_longer_text_is_counted_with_the_positions_that_a_run_would_give(folder, cli_run):
    save_body("bert", "model")
    arguments = ("attention", "check", "model", "attention=linformer", "attention.k=8")
    code, out, log = cli_run(*arguments, "--length", "4096")
    assert code == 0, log
    assert "positions: 64 -> 4,096 by tile" in out
    assert f"{2 * 2 * 8 * 4096:,}" in out  # E and F, in two layers
    assert "positions" not in cli_run(*arguments, "--length", "64")[1]


def test_a_model_of_more_tokens_than_a_variant_takes_is_counted_for_as_many_as_it_takes(folder, cli_run):
    save_body("llama", "model", max_position_embeddings=4096)
    code, out, log = cli_run("attention", "check", "model", "attention=additive")
    assert code == 0, log
    assert "LlamaModel, 4,096 tokens" in out
    assert "additive: counted for 2,048 tokens, as many as it takes" in out
    assert check("model", ["attention=additive"])[0].full == 2048 * 2049 // 2


def test_what_was_learned_for_its_positions_is_not_said_to_go_with_more(folder, cli_run):
    model = make_model("bert", AutoModel)
    install(model, Plan.model_validate({"variant": "linformer", "k": 8}))
    model.save_pretrained("model")
    code, _, log = cli_run("attention", "check", "model", "--length", "65")
    assert code == 2
    assert "a text of 65 tokens for what linformer has learned" in log
    assert cli_run("attention", "check", "model", "--length", "64")[0] == 0
    assert cli_run("attention", "check", "model", "attention=linformer", "attention.k=9", "--length", "65")[0] == 0


def test_a_text_beyond_the_end_of_a_variant_is_refused(folder, cli_run):
    save_body("bert", "model")
    code, out, _ = cli_run("attention", "check", "model", "attention=additive", "--length", "2049")
    assert code == 2
    assert "refused: 2,049 tokens for additive attention; expected at most 2,048" in out
    assert cli_run("attention", "check", "model", "attention=additive", "--length", "2048")[0] == 0


class Learned(torch.nn.Linear):
    """A variant that says neither what it costs nor what it sees."""


def make_learned(options, site):
    return Learned(3, 4)


def test_what_a_variant_brings_and_does_not_say_is_shown(folder, cli_run, monkeypatch):
    save_body("bert", "model")
    monkeypatch.setitem(VARIANTS, "blockwise", VariantEntry(f"{__name__}:make_learned"))
    findings = check("model", ["attention=blockwise"])
    assert [(finding.parameters, finding.work) for finding in findings] == [(16, None)] * 2
    code, out, _ = cli_run("attention", "check", "model", "attention=blockwise")
    assert code == 0
    assert [cell.strip() for cell in out.splitlines()[4].split("│")[-4:-1]] == ["32", "-", "-"]


@pytest.mark.parametrize(
    ("name", "unit"), [("linformer", "a query and a slot"), ("additive", "values of tanh"), ("blockwise", None)]
)
def test_what_is_counted_is_said_where_it_is_no_pair_of_a_product(folder, cli_run, name, unit):
    save_body("bert", "model", max_position_embeddings=128)
    code, out, _ = cli_run("attention", "check", "model", f"attention={name}")
    assert code == 0
    assert (f"{name}, scored: " in out) == (unit is not None)
    assert unit is None or unit in out


def test_a_plan_that_goes_in_nowhere_is_refused(folder, cli_run, monkeypatch):
    save_body("bert", "model")
    monkeypatch.setitem(VARIANTS, "blockwise", replace(VARIANTS["blockwise"], roles=("cross",)))
    code, _, log = cli_run("attention", "check", "model", "attention=blockwise")
    assert code == 2
    assert "no place for blockwise in this model: encoder.self[0-1]" in log


def test_what_ring_does_is_said_and_where_it_can_not_be_refused(folder, cli_run):
    save_body("bert", "model")
    code, out, log = cli_run("attention", "check", "model", "attention=ring")
    assert code == 0, log
    assert "each holds a part of every text" in out
    code, out, log = cli_run("attention", "check", "model", "attention={'encoder.self[1]': full, encoder.self: ring}")
    assert code == 2
    assert "encoder.self[0], refused: ring beside another attention at encoder.self[1]" in out
    assert "ring beside another attention at encoder.self[1]" in log
    save_body("albert", "turns", num_hidden_layers=4)
    code, out, log = cli_run("attention", "check", "turns", "attention=ring")
    assert code == 2
    assert "answers differently" in log


def test_a_path_for_all_layers():
    assert common_path(["h.0.attn", "h.1.attn"]) == "h.*.attn"
    assert common_path(["a.b"]) == "a.b"
    assert common_path(["a.0", "a.b.0"]) == "a.0 ... a.b.0"


# --- show ---


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_the_page_holds_the_weights_that_transformers_gives(family, folder, cli_run):
    save_body(family, "model")
    views = shown(cli_run, "model", TEXT).views
    tokenizer = AutoTokenizer.from_pretrained("model")
    kind = AutoModelForSeq2SeqLM if family == "bart" else AutoModel
    model = kind.from_pretrained("model", attn_implementation="eager")
    inputs = {name: tensor for name, tensor in tokenizer(TEXT, return_tensors="pt").items() if name != "token_type_ids"}
    if family == "bart":
        inputs["decoder_input_ids"] = model.generate(**inputs, max_new_tokens=63, do_sample=False)[:, :-1]
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    expected = out.attentions if family != "bart" else (*out.encoder_attentions, *out.decoder_attentions)
    expected = [*expected, *out.cross_attentions] if family == "bart" else expected
    assert len(views) == len(expected)
    for view, weights in zip(views, expected, strict=True):
        np.testing.assert_allclose(table(view), weights[0], rtol=0, atol=1e-5)
    assert views[0]["rows"][-3:] == views[0]["columns"][-3:]
    assert len(views[0]["rows"]) == inputs["input_ids"].shape[1]


def test_a_saved_plan_is_what_is_drawn(folder, cli_run):
    save_body("bert", "model")
    model = make_model("bert", AutoModel)
    install(model, Plan.model_validate({"encoder.self[0]": WINDOW}))
    model.save_pretrained("model")

    first, second = shown(cli_run, "model", TEXT).views
    assert (first["variant"], second["variant"]) == ("sliding_window reach=3 global_tokens=[]", "full")
    n = len(first["rows"])
    far = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) > 3
    assert n > 8
    assert (table(first)[:, far] == 0).all()
    assert (table(second)[:, far] > 0).any()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_decoder_of_a_classifier_reads_what_its_head_makes(family, folder, cli_run):
    task, _, _ = make_task("classification", family)
    make_model(family, AutoModelForSequenceClassification, **task.model_kwargs()).save_pretrained("model")
    task.tokenizer.save_pretrained("model")
    save_task(task, Path("model"))
    views = {view["name"]: view for view in shown(cli_run, "model", "the cat sat").views}
    assert views.keys() == {"encoder.self[0]", "decoder.self[0]", "cross[0]"}
    assert views["encoder.self[0]"]["rows"] == ["[CLS]", "the", "cat", "sat", "[SEP]"]
    assert views["decoder.self[0]"]["rows"][1:] == ["[CLS]", "the", "cat", "sat"]
    assert views["cross[0]"]["columns"] == views["encoder.self[0]"]["rows"]


def test_a_layer_that_is_used_twice_is_drawn_twice(folder, cli_run):
    save_body("albert", "model", num_hidden_groups=1)
    names = [view["name"] for view in shown(cli_run, "model", TEXT).views]
    assert names == ["encoder.self[0]", "encoder.self[0], call 2"]


def test_a_variant_without_a_table_is_said_to_have_none(folder, cli_run, monkeypatch):
    save_body("bert", "model")
    model = make_model("bert", AutoModel)
    install(model, Plan.model_validate({"encoder.self[1]": "blockwise"}))
    model.save_pretrained("model")
    monkeypatch.delattr(Tiled, "weights")
    read = shown(cli_run, "model", TEXT)
    assert [view["table"] is None for view in read.views] == [False, True]
    assert "no table of weights" in read.parts["script"]


def test_one_layer_and_one_head(folder, cli_run):
    save_body("bert", "model")
    (whole,) = shown(cli_run, "model", TEXT, "--layer", 1).views
    (view,) = shown(cli_run, "model", TEXT, "--layer", 1, "--head", 1).views
    assert (view["name"], view["heads"], whole["heads"]) == ("encoder.self[1]", [1], [0, 1])
    assert (table(view)[0] == table(whole)[1]).all()


def test_of_a_long_text_the_first_tokens_are_shown_and_it_is_said(folder, cli_run):
    save_body("bert", "model", max_position_embeddings=256)
    read = shown(cli_run, "model", "cat " * 200)
    assert {len(view[side]) for view in read.views for side in ("rows", "columns")} == {128}
    assert "The first 128 of 202 tokens of the text are shown" in read.parts["p"]
    assert table(read.views[0]).sum(-1).max() < 0.99, "of all keys, not of those that are shown"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the text is empty"),
        (["cat " * 63], "a text of 65 tokens"),
        ([TEXT, "--layer", 2], "no layer 2"),
        ([TEXT, "--head", 2], "no head 2"),
        ([TEXT, "--out", "nowhere/page.html"], "no such folder"),
        ([TEXT, "--figure", "figure.doc"], "a figure of another kind"),
        ([TEXT, "--figure", "figure.svg"], "matplotlib is not installed"),
    ],
)
def test_what_can_not_be_drawn_ends_with_2(folder, cli_run, monkeypatch, arguments, message):
    save_body("bert", "model")
    monkeypatch.setattr(attention_pictures, "find_spec", lambda name: None)
    code, _, log = cli_run("attention", "show", "model", *arguments)
    assert code == 2
    assert message in log
    assert not list(Path().glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "."], "a folder"),
        (["--out", "/proc/x.html"], "can not be written"),
        (["--figure", "/proc/x.svg"], "can not be written"),
        (["--out", "model/config.json"], "expected a name that ends with .html"),
    ],
)
def test_where_nothing_can_be_written_is_said(folder, cli_run, arguments, message):
    save_body("bert", "model")
    code, _, log = cli_run("attention", "show", "model", TEXT, *arguments)
    assert code == 2
    assert message in log


def test_no_text_becomes_markup():
    tokens = ["<script>alert(1)</script>", "</script>", "<!--", "&lt;", '"', "\\", "\u2028", "@SCRIPT@"]
    view = View("<b>", "<i>", "</script>", tokens, tokens, [0], torch.full((1, 8, 8), 0.125))
    plain = Page(page("<h2>@DATA@", ["<img src=x>"], [view]))
    harmless = replace(view, name="x", module="x", variant="x", rows=["x"] * 8, columns=["x"] * 8)
    assert plain.tags == Page(page("x", ["x"], [harmless])).tags
    assert plain.tags.count("script") == 2
    assert (plain.views[0]["rows"], plain.views[0]["name"]) == (tokens, "<b>")
    assert plain.parts["h1"].strip() == "<h2>@DATA@"
    assert "<img src=x>" in plain.parts["p"]
    assert "innerHTML" not in plain.parts["script"]


def test_a_page_asks_for_nothing_else():
    view = View("a", "b", "full", ["x"], ["x"], [0], torch.ones(1, 1, 1))
    text = page("a", [], [view])
    assert "default-src 'none'" in text
    assert not any(sign in text for sign in ("http:", "https:", "//cdn", "src=", "href=", "@import", "url("))


def test_weights_that_are_no_shares_are_not_packed():
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside of 0 and 1"):
            page("a", [], [View("a", "b", "full", ["x"], ["x"], [0], torch.full((1, 1, 1), wrong))])


def test_a_token_reads_as_text_or_by_its_name():
    @dataclass
    class Bytes:
        def decode(self, ids):
            return {0: " the", 1: "\ufffd", 2: "", 3: ""}[ids[0]]

        def convert_ids_to_tokens(self, i):
            return {0: "Ġthe", 1: "æ", 2: "▁", 3: None}[i]

    assert attention_show._pieces(Bytes(), torch.arange(4)) == ["the", "æ", "▁", "id 3"]


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_a_figure_is_drawn_and_the_same_each_time(folder, cli_run, suffix):
    pytest.importorskip("matplotlib")
    save_body("bert", "model")
    for name in ("one", "two"):
        code, _, log = cli_run("attention", "show", "model", TEXT, "--figure", f"{name}.{suffix}")
        assert code == 0, log
    assert Path(f"one.{suffix}").read_bytes() == Path(f"two.{suffix}").read_bytes()
    if suffix == "svg":
        assert ">encoder.self[1]<" in Path("one.svg").read_text()


def test_a_variant_that_has_learned_something_is_drawn(folder, cli_run):
    pytest.importorskip("matplotlib")
    save_body("bert", "model")
    model = AutoModel.from_pretrained("model")
    install(model, Plan.model_validate("additive"))
    model.save_pretrained("model")
    code, _, log = cli_run("attention", "show", "model", TEXT, "--figure", "learned.svg")
    assert code == 0, log


def test_a_token_is_no_formula_in_a_figure(folder):
    pytest.importorskip("matplotlib")
    tokens = ["$x_$", "<b>"]
    views = [View("a", "b", "full", tokens, tokens, [0], torch.full((1, 2, 2), 0.5))] * 5
    draw_figure(Path("a.svg"), [*views, replace(views[0], weights_HNM=None)])
    text = Path("a.svg").read_text()
    assert text.count(">$x_$<") == 10
    assert "&lt;b&gt;" in text


# --- convert ---


@pytest.fixture
def pooled(folder):
    """A folder of a model of four key/value heads that are pooled to two, as a run leaves it."""
    task, _, _ = make_task("generation", "llama")
    model = make_model("llama", AutoModelForCausalLM, num_attention_heads=4, num_key_value_heads=4)
    install(model, Plan.model_validate({"variant": "grouped_query", "kv_heads": 2}))
    write_whole(Path("model"), lambda aside: write_model(model, task, aside))
    return model


def test_a_pooled_model_becomes_a_plain_one(pooled, cli_run):
    code, _, log = cli_run("attention", "convert", "model", "plain")
    assert code == 0, log
    assert "key/value heads: 4 -> 2" in log
    assert {"model.safetensors", "heedful.json", "tokenizer.json", "MANIFEST.json"} <= set(os.listdir("plain"))
    assert "heedful" not in Path("plain/config.json").read_text()
    ids = torch.arange(5, 30)[None]
    plain = AutoModelForCausalLM.from_pretrained("plain")
    torch.testing.assert_close(plain(input_ids=ids).logits, pooled(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert plain.config.num_key_value_heads == 2


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("ner", AutoModelForTokenClassification),
        ("qa", AutoModelForQuestionAnswering),
    ],
)
def test_a_decoder_with_another_head_is_converted_too(task, kind, folder, cli_run):
    made, _, _ = make_task(task, "llama")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = kind.from_config(make_config("llama", **sizes, **made.model_kwargs())).eval()
    install(model, Plan.model_validate({"variant": "grouped_query", "kv_heads": 2}))
    write_whole(Path("model"), lambda aside: write_model(model, made, aside))
    code, _, log = cli_run("attention", "convert", "model", "plain")
    assert code == 0, log
    ids = torch.arange(5, 30)[None]
    plain = load_model(kind, "plain").model
    torch.testing.assert_close(plain(input_ids=ids)[0], model(input_ids=ids)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "family", "kind", "message"),
    [
        ("generation", "gpt2", AutoModelForCausalLM, "GPT2LMHeadModel, which has no setting for fewer"),
        ("classification", "bert", AutoModelForSequenceClassification, "which has no setting for fewer"),
        ("summarization", "t5", AutoModelForSeq2SeqLM, "which has no setting for fewer"),
        ("classification", "bart", AutoModelForSequenceClassification, "which has no setting for fewer"),
    ],
)
def test_what_has_no_setting_for_fewer_heads_is_not_converted(task, family, kind, message, folder, cli_run):
    made, _, _ = make_task(task, family)
    model = kind.from_config(make_config(family, **made.model_kwargs()))
    install(model, Plan.model_validate({"variant": "grouped_query", "kv_heads": 1}))
    write_whole(Path("model"), lambda aside: write_model(model, made, aside))
    code, _, log = cli_run("attention", "convert", "model", "plain")
    assert code == 2
    assert message in log


def test_a_conversion_that_answers_otherwise_leaves_nothing(pooled, cli_run, monkeypatch):
    monkeypatch.setattr(folding, "_pooled", lambda weight, heads, kept: weight[: len(weight) * kept // heads])
    code, _, log = cli_run("attention", "convert", "model", "plain")
    assert code == 2
    assert "the plain model answers otherwise" in log
    assert os.listdir() == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "other/plain"], "a folder of another run"),
        (["run", "run/model/plain"], "a folder of another run"),
        (["run", "run/checkpoints/plain"], "a folder of another run"),
        (["run", "run/plain"], "plain transformers opens it"),
    ],
)
def test_a_conversion_is_not_put_where_it_would_be_taken_for_another_runs(arguments, message, pooled, cli_run):
    """By its card, with that run's figures and terms."""
    for folder in ("other", "run/checkpoints"):
        Path(folder).mkdir(parents=True)
    Path("other/config.yaml").touch()
    Path("run/config.yaml").touch()
    Path("model").rename("run/model")
    code, _, log = cli_run("attention", "convert", *arguments)
    assert (code, message in log) == ((0, True) if arguments[1] == "run/plain" else (2, True)), log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "model"], "a folder that is there"),
        (["model", "nowhere/plain"], "no such folder"),
        (["nothing", "plain"], "no such checkpoint"),
    ],
)
def test_a_conversion_that_can_not_be_is_refused(pooled, cli_run, arguments, message):
    code, _, log = cli_run("attention", "convert", *arguments)
    assert code == 2
    assert message in log
