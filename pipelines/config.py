"""The configuration of a run: YAML and dotted overrides in, a frozen and validated ``RunConfig`` out.

It imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from attention.options import EVERYWHERE, settings_of
from heedful import UserError
from hub.redaction import hide, secret_keys
from pipelines.sections import TRANSFER, RunConfig, contradictions
from tasks import TASKS
from tasks.options import Options, Settings

_EXPONENT = r"([eE][-+][0-9]+)?"
_DECIMAL = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        rf"([-+]?[0-9][0-9_]*\.[0-9_]*{_EXPONENT}|\.[0-9][0-9_]*{_EXPONENT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
"""What of a plain word is a number, as YAML 1.1 has it but for numbers to the base of 2, 8, 16 and 60."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML keeps the last without a word.

    And 010 is not 8, nor 1:30 90, which they are in YAML 1.1: numbers are decimal.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 # as PyYAML has it
        first: [(tag, _DECIMAL.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=value`` overrides, and validate.

    Raises:
        UserError: With every fault found, each with its key, its value, what is allowed and the nearest known key; or
            with the keys of what looks like a token, before any value is shown.
    """
    _refuse_secrets({"the path of the file": str(path)}, where=hide(str(path)))
    raw = read_yaml(Path(path))
    raw.setdefault("output_dir", f"runs/{Path(path).stem}")
    return override(raw, overrides, where=str(path))


def override(raw: dict[str, Any], overrides: Sequence[str], *, where: str) -> RunConfig:
    """Apply ``a.b=value`` overrides to plain values, and validate; see ``load``."""
    _refuse_secrets(raw, where=where)
    for key, _, text in (assignment.partition("=") for assignment in overrides):
        _refuse_secrets({key: text}, where="the command line")
    _refuse_undone(overrides)
    for assignment in overrides:
        _apply(raw, assignment)
    return validate(raw, where=where)


def _refuse_secrets(values: dict[str, Any], *, where: str) -> None:
    """A configuration is kept beside the model, shown, and handed to other processes on their command line."""
    if keys := list(secret_keys(values)):
        raise UserError(
            f"a token or a password in {', '.join(keys)}",
            where=where,
            expected="settings without secrets",
            fix="take it out: tokens belong into HF_TOKEN and WANDB_API_KEY, or `hf auth login` and `wandb login`",
        )


def _refuse_undone(overrides: Sequence[str]) -> None:
    """An override of a whole section would undo one of its settings that stands before it, without a word."""
    keys = [assignment.partition("=")[0] for assignment in overrides]
    for place, key in enumerate(keys):
        inside = (k for k in keys[:place] if k.startswith(f"{key}.") and not k.startswith(f"{TRANSFER}."))
        if (undone := next(inside, None)) is not None:
            raise UserError(f"{undone}=... before {key}=..., which undoes it", fix=f"say {key}=... first")


def validate(raw: dict[str, Any], *, where: str) -> RunConfig:
    """Validate a configuration given as plain values; see ``load``."""
    raw, task = dict(raw), raw.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(
            f"task {task!r}",
            where=f"{where}: task",
            expected=f"one of: {', '.join(TASKS)}",
            fix=_nearest(str(task), list(TASKS)),
        )
    # The field that carries the task's section is no key of the user's, and must not be overwritten without a word.
    faults = [f"options: unknown key. The task's own settings stand under `{task}`"] if "options" in raw else []
    options: Options | None = None
    try:
        options = TASKS[task].options.model_validate(raw.pop(task, None) or {})
    except ValidationError as error:
        faults += _faults(error, prefix=f"{task}.", known=list(_keys(TASKS[task].options, f"{task}.")))
    known = [*_keys(RunConfig), *_keys(TASKS[task].options, f"{task}.")]
    known.remove("options")
    try:
        config = RunConfig.model_validate({**raw, "options": options or TASKS[task].options()})
        faults += contradictions(config)
        if not faults:
            return config
    except ValidationError as error:
        faults = _faults(error, prefix="", known=known) + faults
    raise UserError(
        f"{len(faults)} fault{'s' * (len(faults) > 1)} in the configuration\n"
        + "\n".join(f"    - {f}" for f in faults),
        where=where,
        fix="`heedful config FILE` prints every key with its default",
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file as plain values.

    Raises:
        UserError: No such file, no YAML, a key given twice, or no mapping.
    """
    if not path.is_file():
        files = sorted(file for folder in (Path("configs"), path.parent) for file in folder.glob("*.yaml"))
        known = {file.stem: str(file) for file in files if file != Path("assets.yaml")}
        near = difflib.get_close_matches(path.stem, known, n=1)
        raise UserError(
            "no such configuration file",
            where=str(path),
            expected=f"one of: {', '.join(known.values())}" if known else "",
            fix=f"Did you mean {known[near[0]]}?" if near else "",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not readable as YAML: {error}", where=str(path), expected="utf-8 text") from error
    raw = _parse(text, where=str(path))
    if not isinstance(raw, dict):
        raise UserError(f"a {type(raw).__name__}", where=str(path), expected="a mapping of keys to values")
    return raw


def _parse(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except Exception as error:  # of a date, a number or a tag that is none, PyYAML raises what Python does of it
        raise UserError(f"not readable as YAML: {error}", where=where) from error


def _apply(raw: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {assignment!r}", expected="KEY=VALUE, e.g. train.learning_rate=3e-5")
    *parents, last = key.split(".")
    former = raw.get("attention")
    for parent in parents:
        child = raw.get(parent)
        if isinstance(child, str) and parent == "attention":  # the short form: its settings go beside its name
            child = {"variant": child}
        raw[parent] = dict(child) if isinstance(child, dict) else {}
        raw = raw[parent]
    if _is_sign(text):
        raw[last] = text
        return
    raw[last] = _parse(text, where=key)
    if key == "attention" and isinstance(former, dict) and "transfer" in former:  # which is no part of the plan
        plan = {"variant": raw[last]} if isinstance(raw[last], str) else raw[last] or {}
        raw[last] = {"transfer": former["transfer"], **plan}


def _is_sign(text: str) -> bool:
    """A delimiter or separator, of which YAML would make something else: of ``|`` an empty text, of ``#`` null."""
    return bool(text) and text != "~" and not any(character.isalnum() or character in "\"'[]{}" for character in text)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key below ``model``."""
    for name, field in model.model_fields.items():
        name, inner = str(field.validation_alias or name), field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield f"{prefix}{name}"
            yield from _keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _faults(error: ValidationError, *, prefix: str, known: Sequence[str]) -> list[str]:
    faults: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        found, reason = _fault(dict(fault), prefix=prefix, known=known)
        faults.setdefault(found, []).append(reason)  # one reason for each member of a union
    return [f"{found}: {', or: '.join(reasons)}" for found, reasons in faults.items()]


def _fault(fault: Mapping[str, Any], *, prefix: str, known: Sequence[str]) -> tuple[str, str]:
    """What was found, and why it is wrong."""
    # pydantic appends the member of a union that it tried ("bool", "literal[...]"): no key of the user's.
    loc, variant = [str(part) for part in fault["loc"]], None
    # Of a plan it says the place, its variant (the tag of a class) and the setting; of a short form no place is said.
    if loc[:1] == ["attention"] and len(loc) > 2:
        variant = loc.pop(2)
        loc = [part for part in loc if part != EVERYWHERE]
    key = prefix + ".".join(loc)
    exact = variant is not None or fault["type"] == "extra_forbidden"
    while key not in known and not exact and "." in key and key.rsplit(".", 1)[0] in known:
        key = key.rsplit(".", 1)[0]
    if fault["type"] == "extra_forbidden":
        if (head := loc[0]) in TASKS and not prefix:
            return key, f"section `{head}` belongs to another task and would have no effect"
        if variant is not None:
            return key, f"no setting of {variant}, which has {', '.join(settings_of(variant)) or 'none'}"
        return key, f"unknown key. {_nearest(key, known)}".rstrip()
    if fault["type"] == "missing":
        return key, "required and not given"
    reason = fault["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    if isinstance(fault["input"], dict):  # settings that do not go together: the message names them
        return key, reason
    return f"{key}={fault['input']!r}", reason


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not near:
        tail = word.rsplit(".", 1)[-1]
        near = [key for key in known if key.rsplit(".", 1)[-1] == tail] or difflib.get_close_matches(
            tail, [key.rsplit(".", 1)[-1] for key in known], n=1, cutoff=0.6
        )
    return f"Did you mean {near[0]}?" if near else ""
