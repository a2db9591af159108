"""What goes to a hub, and how: compared first, in one commit on what was looked at, compared again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from heedful import UserError
from hub import cards
from hub import folder as shelf
from hub.client import STATUSES, connect, explained, is_same, listing, retried
from hub.facts import Facts
from hub.redaction import refuse_secrets
from hub.storage import MAIN, is_ref
from sources.files import MANIFEST, fault, sha256_of

PUSHED = (
    *("config.json", "generation_config.json", "heedful.json", "README.md", "LICENSE*", ".eval_results/*.yaml"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/base.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "vocab.txt", "vocab.json", "merges.txt", "*.model", "*.spm", "*.tiktoken"),
    *("preprocessor_config.json", "processor_config.json"),
)
"""Paths that a push may write, and may take away where the model has them no more. All else stays here, or there."""
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "*.safetensors"),
)
"""Files in which whatever looks like a path is a word."""


@dataclass(frozen=True)
class Parcel:
    """What goes.

    Args:
        files: By their paths in the repository.
        stays: Names of files of the model's folder that are not for others.
    """

    files: dict[str, Path]
    stays: list[str]


def pack(facts: Facts, name: str, *, hub_id: str | None, staging: Path) -> Parcel:
    """Choose the model's files, and write its card.

    Args:
        name: What it is called there.
        staging: An empty folder for what is written anew.

    Raises:
        UserError: The model is broken, or a file that would go holds a token or a path of this machine.
    """
    found = _files(facts.model)
    if facts.adapter is not None and facts.model.name == "model":
        found |= {
            f"adapter/{n}": path for n, path in _files(facts.adapter).items() if n != "README.md"
        }  # an empty form
    files = {n: path for n, path in found.items() if _is_ours(n)}
    if "config.json" not in files:
        raise UserError("no config.json", where=str(facts.model), expected="a model folder, such as runs/ner/model")
    written = {} if "README.md" in files else {"README.md": cards.card(facts, name, hub_id=hub_id)}
    if (results := cards.results_file(facts)) is not None:
        written[cards.RESULTS] = results
    if (adapter := files.get("adapter/adapter_config.json")) is not None:
        written["adapter/adapter_config.json"] = _adapter_config(adapter, facts)
    for path, text in written.items():
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / path).write_text(text, encoding="utf-8")
        files[path] = staging / path
    for path, file in files.items():
        if not any(fnmatch(path, pattern) for pattern in VOCABULARIES):
            refuse_secrets(file, path)
    return Parcel(dict(sorted(files.items())), sorted(set(found) - set(files)))


def _files(folder: Path) -> dict[str, Path]:
    if (folder / MANIFEST).is_file() and (reason := fault(folder)):
        raise UserError(f"broken model folder: {reason}", where=str(folder), fix="train it again, or pull it")
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if name != MANIFEST}


def _is_ours(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in PUSHED)


def _adapter_config(path: Path, facts: Facts) -> str:
    """With the base model's name on the Hub. ``assets/x`` would be looked for there, as x of an owner called assets."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts.base is not None:
        config["base_model_name_or_path"] = facts.base.hub_id or facts.base.name
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


class Destination(Protocol):
    """Where a parcel goes."""

    where: str

    def compare(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Say of each path: new, changed, same, or gone where it is there and no more here.

        Raises:
            UserError: It can not be looked at.
        """
        ...

    def send(self, files: Mapping[str, Path], *, tag: str | None, message: str) -> str:
        """Make it hold these files, in one step; say what that is called.

        Raises:
            UserError: It does not take them; then nothing of them is visible.
        """
        ...


def destination(target: str, *, private: bool) -> Destination:
    """What ``owner/name`` or ``file:///folder`` stands for.

    Raises:
        UserError: It stands for nothing.
    """
    if not target.startswith("file:"):
        return Repository(connect(), target, private=private)
    if private:
        raise UserError("a folder is as private as its permissions", where="--private", fix="leave it out, and chmod")
    return Shelf(shelf.folder_of(target))


class Shelf:
    """A folder, see ``hub.folder``."""

    def __init__(self, folder: Path) -> None:
        self.where, self._folder = str(folder), folder

    def compare(self, files: Mapping[str, Path]) -> dict[str, str]:
        """See ``Destination``."""
        there = shelf.hashes(self._folder) or {}
        return _states({name: sha256_of(path) == there.get(name) for name, path in files.items()}, there)

    def send(self, files: Mapping[str, Path], *, tag: str | None, message: str) -> str:
        """See ``Destination``."""
        return shelf.put(self._folder, files, tag=tag)


class Repository:
    """A model on a hub that speaks the Hub's protocol.

    Args:
        id_: owner/name.
        private: What it has to be if it is made, and to be already if it is there.
    """

    def __init__(self, api: HfApi, id_: str, *, private: bool) -> None:
        if id_.count("/") != 1:
            raise UserError(f"no repository: {id_!r}", where="REPO", expected="owner/name, or file:///folder")
        self.where = f"{id_} on {api.endpoint}"
        self._api, self._id, self._private = api, id_, private
        self._head: str | None = None

    def compare(self, files: Mapping[str, Path]) -> dict[str, str]:
        """See ``Destination``."""
        with explained(self.where):
            self._head = self._look()
            return self._compare(files, self._head)

    def _look(self) -> str | None:
        """The commit that main is at; None where there is no repository."""
        try:
            info = retried(lambda: self._api.model_info(self._id))
        except RepositoryNotFoundError:
            return None
        if self._private and not info.private:
            raise UserError("it is there, and public", where=self.where, fix="leave out --private, or hide it there")
        return info.sha

    def _compare(self, files: Mapping[str, Path], revision: str | None) -> dict[str, str]:
        there = listing(self._api, self._id, revision) if revision else {}
        same = {name: name in there and is_same(there[name], path) for name, path in files.items()}
        return _states(same, {name for name in there if _is_ours(name)} | (there.keys() & files.keys()))

    def send(self, files: Mapping[str, Path], *, tag: str | None, message: str) -> str:
        """See ``Destination``."""
        if tag is not None and not is_ref(tag):
            raise UserError(f"no name for a tag: {tag!r}", where="--tag", expected="such as v1")
        with explained(self.where):
            states = self._compare(files, self._head) if self._head else self._begin(files)
            differs, commit = bool(set(states.values()) - {"same"}), self._head or ""
            if tag is not None and self._at(tag) not in ({None} if differs else {None, commit}):
                raise self._elsewhere(tag)
            if differs:
                commit = retried(
                    lambda: self._commit(files, states, message), between=lambda: self._went_through(files)
                )
            if wrong := [name for name, state in self._compare(files, commit).items() if state != "same"]:
                raise UserError(f"other bytes on the hub: {', '.join(wrong)}", where=self.where, fix="push again")
            if tag is not None:
                self._tag(tag, commit)
            return commit

    def _begin(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Make the repository that was not there, and compare as it is then."""
        retried(lambda: self._api.create_repo(self._id, private=self._private, exist_ok=True))
        self._head = self._look()
        states = self._compare(files, self._head)
        if set(states.values()) - {"new"}:
            raise UserError(STATUSES[412][0], where=self.where, fix=STATUSES[412][1])
        return states

    def _commit(self, files: Mapping[str, Path], states: Mapping[str, str], message: str) -> str:
        operations = [
            CommitOperationDelete(name) if state == "gone" else CommitOperationAdd(name, files[name])
            for name, state in states.items()
            if state != "same"
        ]
        return self._api.create_commit(
            self._id, operations, commit_message=message, parent_commit=self._head, revision=MAIN
        ).oid

    def _went_through(self, files: Mapping[str, Path]) -> str | None:
        """The commit, where it was made and only the answer was lost."""
        now = self._look()
        return now if now != self._head and set(self._compare(files, now).values()) == {"same"} else None

    def _tag(self, tag: str, commit: str) -> None:
        try:
            retried(lambda: self._api.create_tag(self._id, tag=tag, revision=commit))
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            if self._at(tag) != commit:
                raise self._elsewhere(tag) from None

    def _at(self, tag: str) -> str | None:
        """The commit of a tag; None where there is no such tag."""
        try:
            return retried(lambda: self._api.model_info(self._id, revision=tag)).sha
        except RevisionNotFoundError:
            return None

    def _elsewhere(self, tag: str) -> UserError:
        return UserError(f"the tag {tag} is elsewhere", where=self.where, fix="take another name")


def _states(same: Mapping[str, bool], there: Any) -> dict[str, str]:
    states = {name: "same" if equal else "changed" if name in there else "new" for name, equal in same.items()}
    return states | {name: "gone" for name in sorted(there) if name not in same}
