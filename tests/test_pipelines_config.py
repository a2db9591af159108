"""The configuration: YAML and overrides in, one validated RunConfig out, every fault said at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from attention.options import OPTIONS, settings_of
from heedful import UserError
from pipelines import config, sections
from tasks import TASKS

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CONTRACT = """
task output_dir resume seed model.name model.max_length model.init data.train data.validation data.test
data.max_train_samples data.max_eval_samples train.batch_size train.max_steps train.num_train_epochs train.save_steps
train.eval_steps train.optim train.learning_rate train.per_device_train_batch_size train.gradient_accumulation_steps
train.warmup_steps train.lr_scheduler_type train.bf16 train.max_grad_norm lora.r lora.lora_alpha lora.target_modules
attention distributed tracking.wandb
"""
FIELDS = {"RunConfig": 13, "model": 11, "data": 17, "train": 30, "lora": 6, "transfer": 4, "tracking": 4}


@pytest.fixture
def write(tmp_path):
    def write(text="task: ner\nmodel: {name: m}\n"):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    return str(caught.value)


def test_configs_exist_for_every_task():
    assert {path.stem for path in CONFIGS if path.parent.name == "configs"} >= set(TASKS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_load_and_round_trip(path):
    loaded = config.load(path)
    written = yaml.safe_load(yaml.safe_dump(loaded.to_dict()))
    assert config.validate(written, where="again") == loaded


def test_lora_and_infinity_round_trip(write):
    overrides = ["lora.r=4", "lora.use_dora=true", "train.max_grad_norm=.inf", "ner.strict=true", "data.columns.tags=t"]
    loaded = config.load(write(), overrides)
    assert (loaded.lora.r, loaded.options.strict, loaded.data.columns) == (4, True, {"tags": "t"})
    assert config.validate(yaml.safe_load(yaml.safe_dump(loaded.to_dict())), where="again") == loaded


def test_every_key_of_the_contract_exists():
    keys = set(config._keys(sections.RunConfig))
    assert not set(CONTRACT.split()) - keys


def test_number_of_settings_is_frozen():
    """Every setting costs every reader; one more is a decision, made here too."""
    parts = {"RunConfig": sections.RunConfig} | {
        name: sections.RunConfig.model_fields[name].annotation for name in FIELDS if name != "RunConfig"
    }
    assert {name: len(section.model_fields) for name, section in parts.items()} == FIELDS


def test_every_fault_is_reported_at_once(write):
    text = """
    task: ner
    modle: {name: m}
    model: {name: m, max_length: short}
    train: {learning_rat: 1, batch_size: 0, optim: adam, bf16: perhaps}
    lora: {use_dora: true}
    options: {strict: true}
    ner: {schema: IOB2, strict: maybe}
    qa: {n_best_size: 3}
    """
    message = refusal(write(text))
    for part in (
        "11 faults",
        "modle: unknown key. Did you mean model?",
        "model.max_length='short'",
        "train.learning_rat: unknown key. Did you mean train.learning_rate?",
        "train.batch_size=0",
        "train.optim='adam'",
        "train.bf16='perhaps'",
        "lora.r is not set, so ['use_dora'] would have no effect",
        "options: unknown key",
        "ner.schema: unknown key. Did you mean ner.scheme?",
        "ner.strict='maybe'",
        "section `qa` belongs to another task",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batchsize=1", "Did you mean train.batch_size?"),
        ("ner.scheme=IOB3", "ner.scheme='IOB3'"),
        ("train.learning_rate=.inf", "train.learning_rate=inf"),
        ("train.optim", "KEY=VALUE"),
        ("task=nre", "Did you mean ner"),
        ("model.name=null", "model.name is required and not given"),
    ],
)
def test_a_fault_names_its_key_and_the_nearest_known_one(write, override, expected):
    assert expected in refusal(write(), override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["distributed=deepspeed_zero2"], "distributed=fsdp2 shards all that ZeRO-3 does"),
        (["distributed=deepspeed_zero3"], "distributed='deepspeed_zero3': not built"),
        (["distributed=fsdp2", "train.optim=adafactor"], "use adamw_torch_fused"),
    ],
)
def test_what_sharding_can_not_do_is_refused(write, overrides, expected):
    assert expected in refusal(write(), *overrides)
    assert config.load(write(), ["distributed=fsdp2"]).distributed == "fsdp2"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.load_in_4bit=true"], "model.load_in_4bit: weights in 4 bits are not trained: say what is, lora.r=16"),
        (["model.load_in_4bit=true", "lora.r=2", "distributed=fsdp2"], "use ddp"),
        (["model.load_in_4bit=true", "lora.r=2", "model.init=encoder_decoder"], "draws new ones: leave it out"),
        (["model.bnb_4bit_quant_type=fp4", "lora.r=2"], "no effect without model.load_in_4bit=true"),
        (["model.bnb_4bit_use_double_quant=true"], "no effect without model.load_in_4bit=true"),
        (["model.load_in_4bit=true", "lora.r=2", "model.bnb_4bit_quant_type=int4"], "'nf4' or 'fp4'"),
    ],
)
def test_what_4_bits_can_not_do_is_refused(write, overrides, expected):
    assert expected in refusal(write(), *overrides)


def test_4_bits_are_off_unless_asked_for(write):
    assert not config.load(write(), ["lora.r=2"]).model.load_in_4bit
    held = config.load(write(), ["model.load_in_4bit=true", "model.bnb_4bit_use_double_quant=true", "lora.r=2"]).model
    assert (held.bnb_4bit_quant_type, held.bnb_4bit_use_double_quant) == ("nf4", True)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["attention=sliding_windw"],
            "no such variant: 'sliding_windw'. Did you mean sliding_window? The variants: full",
        ),
        (["attention={cross: ful}"], "no such variant at cross: 'ful'. Did you mean full?"),
        (["attention.reach=3"], "'reach' is of sliding_window, local_global: say attention=sliding_window first"),
        (["attention={encoder.self: {reach: 3}}"], "no variant is named at encoder.self: {'reach': 3}"),
        (["attention.encoder.self=full"], "'encoder' is no place. A place is encoder.self, decoder.self, cross"),
        (["attention={encoder.self: 3}"], "no variant is named at encoder.self: 3"),
        (["attention={3: full}"], "3 is no place"),
        (["attention={variant: [strided]}"], "no such variant: ['strided']"),
        (
            ["attention=[{place: cross, variant: full}, {place: cross, variant: additive}]"],
            "a place that is given twice",
        ),
        (["attention=[{place: [1], variant: full}]"], "neither a variant nor places"),
        (["attention=[]"], "attention=[]: neither a variant nor places: []"),
        (["attention={'encoder.self[0]': full, '*': strided}"], "'*' beside other places"),
        (
            ["attention=sliding_window", "attention.global_tokens={0: 1}"],
            "attention.global_tokens: Input should be a list",
        ),
        (["attention=3"], "attention=3: neither a variant nor places"),
        (["attention={}"], "attention: neither a variant nor places"),
        (
            ["attention=sliding_window", "attention.reech=3"],
            "attention.reech: no setting of sliding_window, which has ",
        ),
        (["attention={cross: {variant: full, k: 3}}"], "attention.cross.k: no setting of full, which has none"),
        (["attention={cross: {variant: strided, stride: 1}}"], "attention.cross.stride=1: Input should be greater"),
        (
            ["attention=sliding_window", "attention.global_tokens=0"],
            "attention.global_tokens=0: Input should be a list",
        ),
        (["attention=sliding_window", "attention.reach=1e3"], "attention.reach='1e3': Input should be a valid integer"),
        (["attention=block_sparse", "attention.window_blocks=4"], "attention: window_blocks=4: an odd number"),
    ],
)
def test_a_plan_that_is_none_is_refused_in_its_own_words(write, overrides, expected):
    """Not in pydantic's, which speak of tags and discriminators."""
    assert expected in refusal(write(), *overrides)


@pytest.mark.parametrize("number", ["1:30", "1:30.5", "0x10", "0b1"])
def test_a_number_is_decimal(write, number):
    """Of 010 YAML 1.1 makes 8, of 1:30 it makes 90."""
    assert f"train.batch_size='{number}'" in refusal(write(), f"train.batch_size={number}")
    assert f"train.batch_size='{number}'" in refusal(
        write(f"task: ner\nmodel: {{name: m}}\ntrain: {{batch_size: {number}}}")
    )
    for text, value in (("1_000", 1000), ("010", 10)):
        assert config.load(write(), [f"train.batch_size={text}"]).train.batch_size == value
    for text in ("1.5e-3", "0.0015", ".0015", "1e-3", "1_0.5"):
        expected = float(text)
        assert config.load(write(), [f"train.learning_rate={text}"]).train.learning_rate == expected
    assert config.load(write(), ["train.max_grad_norm=.inf"]).train.max_grad_norm == float("inf")


@pytest.mark.parametrize(
    ("variant", "setting"),
    [(variant, name) for variant in OPTIONS for name in settings_of(variant) if name != "global_tokens"],
)
def test_no_setting_is_larger_than_any_text(write, variant, setting):
    """Which would end in an OverflowError or a MemoryError, when a model is looked at or later."""
    expected = f"attention.{setting}={10**20}: Input should be less than"
    assert expected in refusal(write(), f"attention={variant}", f"attention.{setting}={10**20}")


SLOTS = ["attention=linformer", "attention.k=8"]


def test_a_transfer_stands_beside_the_plan_and_not_in_it(write):
    short = config.load(write(), [*SLOTS, "attention.transfer.steps=200"])
    assert short.attention.model_dump() == {"variant": "linformer", "k": 8}
    assert (short.transfer.steps, short.transfer.stages) == (200, "both")
    assert short.to_dict()["attention"] == {"variant": "linformer", "k": 8, "transfer": short.transfer.model_dump()}
    text = "task: ner\nmodel: {name: m}\nattention: {encoder.self: linformer, transfer: {steps: 5, stages: layers}}\n"
    long = config.load(write(text), ["attention.transfer.batch_size=8"])
    assert list(long.attention.root) == ["encoder.self"]
    assert (long.transfer.steps, long.transfer.stages, long.transfer.batch_size) == (5, "layers", 8)
    for loaded in (short, long, config.load(write(), SLOTS)):
        assert config.validate(yaml.safe_load(yaml.safe_dump(loaded.to_dict())), where="again") == loaded
    assert config.load(write(), ["attention.transfer=null"]).to_dict()["attention"] is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*SLOTS, "attention.transfer.step=1"], "step: unknown key. Did you mean attention.transfer.steps?"),
        ([*SLOTS, "attention.transfer.steps=0"], "attention.transfer.steps=0: Input should be greater"),
        ([*SLOTS, "attention.transfer.steps=yes"], "attention.transfer.steps=True: Input should be a number"),
        ([*SLOTS, "attention.transfer.learning_rate=.nan"], "attention.transfer.learning_rate=nan"),
        ([*SLOTS, "attention.transfer.batch_size=0"], "attention.transfer.batch_size=0"),
        ([*SLOTS, "attention.transfer.steps=1", "attention.transfer.stages=all"], "attention.transfer.stages='all'"),
        ([*SLOTS, "attention.transfer=200"], "attention.transfer=200"),
        ([*SLOTS, "attention.transfer.batch_size=8"], "attention.transfer.steps is not set, so ['batch_size'] would"),
        (["attention.transfer.steps=1"], "attention.transfer: no attention is named"),
        (["attention=blockwise", "attention.transfer.steps=1"], "attention.transfer: nothing to transfer"),
        (["transfer.steps=1"], "transfer: unknown key"),
        (
            [*SLOTS, "attention.transfer.steps=1", "model.init=scratch", "model.architecture={model_type: bert}"],
            "attention.transfer: a model with model.init=scratch",
        ),
    ],
)
def test_a_transfer_that_can_not_be_is_refused(write, overrides, expected):
    assert expected in refusal(write(), *overrides)


def test_another_plan_leaves_the_transfer(write):
    """Whatever is said first; and a plan's own settings are not undone without a word."""
    turned = ["attention.transfer.steps=5", *SLOTS]
    assert config.load(write(), turned) == config.load(write(), [*SLOTS, "attention.transfer.steps=5"])
    text = "task: ner\nmodel: {name: m}\nattention: {variant: strided, stride: 4, transfer: {steps: 5}}\n"
    for plan in ("attention=linformer", "attention={variant: linformer}"):
        other = config.load(write(text), [plan])
        assert (other.transfer.steps, other.attention.model_dump()["variant"]) == (5, "linformer")
    assert "attention.k=... before attention=..., which undoes it" in refusal(write(), *SLOTS[::-1])


def test_missing_keys_are_named(write):
    assert "model: required and not given" in refusal(write("task: ner"))
    assert "model.name is required and not given" in refusal(write("task: ner\nmodel: {max_length: 64}"))


def test_exponents_without_a_point_are_numbers(write):
    assert yaml.safe_load("3e-5") == "3e-5"  # the trap: YAML 1.1 reads it as text
    assert config.load(write("task: ner\nmodel: {name: m}\ntrain: {learning_rate: 3e-5}")).train.learning_rate == 3e-5
    assert config.load(write(), ["train.learning_rate=3e-5"]).train.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("setting", "said"),
    [("length_penalty=2", "no effect without num_beams"), ("min_new_tokens=65", "exceeds max_new_tokens=64")],
)
def test_decoding_that_can_not_be_done_is_refused(setting, said, write):
    assert said in refusal(write("task: generation\nmodel: {name: m}\n"), f"generation.decoding.{setting}")


@pytest.mark.parametrize(
    ("task", "override"),
    [
        ("ner", "seed=true"),
        ("ner", "train.learning_rate=yes"),
        ("ner", "train.eval_steps=on"),
        ("ner", "lora.lora_alpha=false"),
        ("generation", "generation.decoding.num_beams=true"),
        ("classification", "classification.class_weights={a: true, b: 2}"),
    ],
)
def test_true_is_no_number(write, task, override):
    key = override.partition("=")[0]
    message = refusal(write(f"task: {task}\nmodel: {{name: m}}\n"), override)
    assert "Input should be a number, not true or false" in message
    assert f"- {key}" in message
    numbers = ["seed='7'", "train.learning_rate=1", "train.bf16=true"]
    loaded = config.load(write(), numbers)
    assert (loaded.seed, loaded.train.learning_rate, loaded.train.bf16) == (7, 1.0, True)


def test_an_architecture_round_trips_and_its_exponents_are_numbers(write):
    text = "task: ner\nmodel: {init: scratch, tokenizer: t, architecture: {model_type: bert, layer_norm_eps: 1e-6}}\n"
    loaded = config.load(write(text), ["model.architecture.hidden_size=8"])
    assert loaded.model.architecture == {"model_type": "bert", "layer_norm_eps": 1e-6, "hidden_size": 8}
    assert config.validate(yaml.safe_load(yaml.safe_dump(loaded.to_dict())), where="again") == loaded


@pytest.mark.parametrize("word", ["no", "No", "off", "false"])
def test_yaml_1_1_words_mean_what_they_say(write, word):
    text = f"task: ner\nmodel: {{name: m}}\ntrain: {{eval_strategy: {word}, save_strategy: {word}}}\n"
    train = config.load(write(text), [f"tracking.wandb={word}"])
    assert (train.train.eval_strategy, train.train.save_strategy, train.tracking.wandb) == ("no", "no", "off")


def test_a_missing_file_names_the_nearest(write):
    path = write()
    assert f"Did you mean {path}?" in refusal(path.with_name("rum.yaml"))


def test_overrides_win_and_make_sections(write):
    loaded = config.load(write(), ["model.name=other", "seed=1", "data.train=007", "train.eval_steps=50"])
    assert (loaded.model.name, loaded.seed) == ("other", 1)
    assert (loaded.train.eval_steps, loaded.train.eval_strategy) == (50, "steps")
    assert loaded.output_dir == "runs/run"


def test_settings_are_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        config.load(write()).seed = 3


@pytest.mark.parametrize(
    "command",
    ["import pipelines.config", "import sys; sys.argv = ['heedful', '--help']; import pipelines.cli as c; c.main()"],
)
def test_configuration_and_help_are_light(command):
    """No torch (seconds of import) before it is needed, and under half a second of CPU time."""
    code = (
        "import atexit, sys, time\n"
        "def say():\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'pandas', 'accelerate'} & set(sys.modules)\n"
        "    print('\\nHEAVY', sorted(heavy), time.process_time())\n"
        "atexit.register(say)\n"
    )
    done = subprocess.run([sys.executable, "-c", code + command], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy, seconds = done.stdout.rpartition("HEAVY ")[2].rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 0.5


def test_a_task_given_for_a_file_is_led_to_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/ner.yaml").write_text("task: ner\n")
    (tmp_path / "assets.yaml").write_text("")
    for name in ("ner", "nre"):
        with pytest.raises(UserError, match="no such configuration file") as error:
            config.load(name)
        assert error.value.expected == "one of: configs/ner.yaml"
        assert error.value.fix == "Did you mean configs/ner.yaml?"
