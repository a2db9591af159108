"""Make data/debian-summaries and data/debian-chat from the package descriptions of the Debian archive.

    python -m scripts.build_debian         # on a Debian machine, from the folder of heedful

apt fetches two indexes from the machine's own mirror, main/i18n/Translation-en (the descriptions) and
main/binary-amd64/Packages (which source package each belongs to), with a state of its own: nothing of the machine's
is touched, and root is not needed. The same indexes make the same files; the cards name their hashes.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from sources.cards import write_card
from sources.conversions import columns_of, write_splits
from sources.files import sha256_of
from sources.texts import normalize

Row = dict[str, str]

CODENAME = "bookworm"
ROWS = {"test": 500, "validation": 500, "train": 11_000}
CHATS = {"test": 200, "validation": 200, "train": 3_000}
SIBLINGS = 3
"""At most so many packages of one source package: a few sources have hundreds, all alike."""
TEXT_WORDS, SUMMARY_WORDS, ANSWER_WORDS = range(20, 251), range(3, 21), range(8, 81)
TERMS = (
    "Each description is under the license of its package; all are free by Debian's Free Software Guidelines, since "
    "packages of main are. The index itself states no terms. The authors and the license of a text are in the "
    "copyright file of its package, which each row names."
)
COLUMNS = ("text", "summary", "package", "source_package")

# ---------------------------------------------------------------------------------------------- what apt fetches

APT = """
#clear Acquire::Languages;
#clear APT::Update;
Acquire::Languages {{ "en"; }};
Acquire::GzipIndexes "false";
APT::Architecture "amd64";
APT::Sandbox::User "";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
"""
"""Read after the machine's own settings, of which the second line takes away what they do after an update."""


def fetch_indexes(folder: Path) -> tuple[Path, Path, str]:
    """Let apt fetch Translation-en and Packages; return their paths, and Debian's version."""
    (folder / "state/lists/partial").mkdir(parents=True)
    (folder / "cache/archives/partial").mkdir(parents=True)
    (folder / "status").touch()
    (folder / "apt.conf").write_text(APT.format(folder=folder), encoding="utf-8")
    apt = ["apt-get", "--config-file", str(folder / "apt.conf"), "--quiet"]
    subprocess.run([*apt, "update"], check=True)
    found = []
    for key in ("main/i18n/Translation-en", "main/binary-amd64/Packages"):
        wanted = [f"MetaKey: {key}", "Label: Debian", f"Codename: {CODENAME}"]
        command = [*apt, "indextargets", "--format", "$(FILENAME) $(VERSION)", *wanted]
        found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    (translation, version), (packages, _) = found
    return Path(translation), Path(packages), version


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Read a control file (Debian Policy, 5.1): fields by name, continuation lines as they are."""
    for block in re.split(r"\n\n+", path.read_text(encoding="utf-8").strip("\n")):
        fields = re.findall(r"^([^\s:]+):[ \t]*(.*(?:\n[ \t].*)*)", block, flags=re.MULTILINE)
        yield dict(fields)


def unfolded(lines: Iterable[str]) -> str:
    """Undo the folding of a long description (Debian Policy, 5.6.13).

    Lines that begin with one blank are words of a paragraph, with more they stand for themselves, and a dot is an
    empty line.
    """
    found: list[str] = []
    wrapped = False
    for line in lines:
        words = not line.startswith("  ") and line != " ."
        if words and wrapped:
            found[-1] += " " + line.strip()
        else:
            found.append("" if line == " ." else line.removeprefix(" ").rstrip())
        wrapped = words
    return "\n".join(found).strip("\n")


def descriptions(translation: Path, packages: Path) -> tuple[list[Row], int]:
    """Return a row for each package of amd64, and how many descriptions are of none."""
    source_of = {
        (entry["Package"], entry["Description-md5"]): entry.get("Source", entry["Package"]).split()[0]
        for entry in stanzas(packages)
    }
    rows, left_out = [], 0
    for entry in stanzas(translation):
        package = entry["Package"]
        if (source := source_of.get((package, entry["Description-md5"]))) is None:
            left_out += 1
            continue
        summary, *lines = entry["Description-en"].split("\n")
        rows.append({"text": unfolded(lines), "summary": summary, "package": package, "source_package": source})
    return rows, left_out


# ------------------------------------------------------------------------------------------- what becomes of them


def _order(row: Row) -> list[bytes]:
    return [hashlib.sha256(row[name].encode()).digest() for name in ("source_package", "package")]


def _fault(row: Row) -> str:
    """Say why a description is left out; "" if it is not."""
    if re.search(r"\b(transitional|dummy)\b", f"{row['summary']}\n{row['text']}", re.IGNORECASE):
        return "transitional or dummy packages"
    if len(row["summary"].split()) not in SUMMARY_WORDS:
        return f"synopses of fewer than {SUMMARY_WORDS[0]} or more than {SUMMARY_WORDS[-1]} words"
    if len(row["text"].split()) not in TEXT_WORDS:
        return f"descriptions of fewer than {TEXT_WORDS[0]} or more than {TEXT_WORDS[-1]} words"
    return ""


def chosen(rows: Iterable[Row]) -> tuple[list[Row], Counter[str]]:
    """Return the rows that are fit, in the order of a hash of the source package, and count why the others are not."""
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    known: set[str] = set()
    siblings: Counter[str] = Counter()
    for row in sorted(rows, key=_order):
        fault = _fault(row)
        if not fault and normalize(row["text"]) in known:
            fault = "the text of another package (case and punctuation apart)"
        if not fault and siblings[row["source_package"]] == SIBLINGS:
            fault = f"beyond {SIBLINGS} of their source package"
        if fault:
            dropped[fault] += 1
            continue
        known.add(normalize(row["text"]))
        siblings[row["source_package"]] += 1
        kept.append(row)
    return kept, dropped


def cut(rows: Sequence[Row], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Take the splits from the front, each from the next source package on."""
    splits, start = {}, 0
    for split, size in sizes.items():
        splits[split] = list(rows[start : start + size])
        start += size
        while 0 < start < len(rows) and rows[start]["source_package"] == rows[start - 1]["source_package"]:
            start += 1
    return {split: splits[split] for split in ("train", "validation", "test")}


def chats(rows: Iterable[Row]) -> list[list[Row]]:
    """Make a question and an answer of the first package of each source that opens with a paragraph of prose."""
    found = []
    for _, siblings in groupby(rows, key=lambda row: row["source_package"]):
        for row in siblings:
            answer = row["text"].split("\n\n")[0]
            if len(answer.split()) in ANSWER_WORDS and "\n" not in answer and answer.endswith("."):
                question = f"What is {row['package']}?"
                found.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
                break
    return found


def write_summaries(splits: Mapping[str, list[Row]], target: Path, *, origin: str, selection: str) -> None:
    """Write the descriptions and synopses, with their card."""
    target.mkdir(parents=True, exist_ok=True)
    counts = write_splits({split: columns_of(part, COLUMNS) for split, part in splits.items()}, target)
    openings = {split: [normalize(row["text"].split("\n\n")[0]) for row in part] for split, part in splits.items()}
    shared = {s: sum(text in set(openings["train"]) for text in openings[s]) for s in ("validation", "test")}
    body = (
        f"{counts}\n\nThe long description of a package and its synopsis, one line that a maintainer wrote. {selection}"
        "\n\nThe rows are the first of them in the order of a hash of the source package. **No source package is in "
        "two splits**, since the packages of one have much text in common. Other source packages may have some too: of "
        f"the rows, {shared} open with a paragraph that also opens a row of train. Changed: the folding of control "
        "files is undone, so the lines of a paragraph are one line and lone dots are empty lines; lines that are "
        "indented further, as in lists, stay as they are; blanks at the ends of lines are gone. Columns: `text`, "
        "`summary`, `package`, `source_package`."
    )
    write_card("debian-summaries", target, origin=origin, body=body, license="other", terms=TERMS)


def write_chats(splits: Mapping[str, list[Row]], target: Path, *, origin: str) -> None:
    """Write the conversations, with their card."""
    target.mkdir(parents=True, exist_ok=True)
    messages = {split: {"messages": chats(part)[: CHATS[split]]} for split, part in splits.items()}
    body = (
        f"{write_splits(messages, target)}\n\nConversations of one turn, from the rows of debian-summaries and in its "
        'splits: the user asks "What is PACKAGE?", and the answer is the first paragraph of the package\'s description '
        "as it stands. One package a source package: the first whose first paragraph has "
        f"{ANSWER_WORDS[0]} to {ANSWER_WORDS[-1]} words, has no list in it and ends with a full stop. Column: "
        "`messages`, a list of `role` and `content`."
    )
    write_card("debian-chat", target, origin=origin, body=body, license="other", terms=TERMS)


def build(translation: Path, packages: Path, data: Path, *, version: str) -> None:
    """Write both data sets, with their cards, into the folder ``data``."""
    rows, left_out = descriptions(translation, packages)
    kept, dropped = chosen(rows)
    splits = cut(kept, ROWS)
    origin = (
        f"Made by `python -m scripts.build_debian` from two indexes of Debian {version} ({CODENAME}): "
        f"main/i18n/Translation-en (sha256 `{sha256_of(translation)}`) and main/binary-amd64/Packages "
        f"(sha256 `{sha256_of(packages)}`)."
    )
    reasons = "\n".join(f"- {count:,}: {reason}" for reason, count in sorted(dropped.items()))
    selection = (
        f"Of {len(rows) + left_out:,} descriptions {left_out:,} are not those of amd64's packages. Of the other "
        f"{len(rows):,} these are left out, by the first reason that fits, and {len(kept):,} remain:\n\n{reasons}"
    )
    write_summaries(splits, data / "debian-summaries", origin=origin, selection=selection)
    write_chats(splits, data / "debian-chat", origin=origin)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found_translation, found_packages, found_version = fetch_indexes(Path(scratch))
        build(found_translation, found_packages, Path("data"), version=found_version)
