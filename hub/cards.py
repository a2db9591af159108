"""The model card, made from what the run left: figures with their intervals, data with its terms, how to do it again.

Nothing in it depends on the day or the machine, so that the same run gives the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from heedful import __version__
from hub.facts import Facts, Source
from hub.redaction import redact

PIPELINES = {
    "classification": "text-classification",
    "ner": "token-classification",
    "qa": "question-answering",
    "summarization": "summarization",
    "translation": "translation",
    "generation": "text-generation",
    "mlm": "fill-mask",
}
"""The Hub's names of the tasks."""
FOLDER = "FOLDER"
"""Where it lies, if not on a hub."""
NO_PIPELINE = ("question-answering", "summarization", "translation")
"""That transformers 5 has no pipeline for."""
SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "decay_steps",
    "optim",
)
"""Of ``train``, that have a line of their own; the others share one."""
FOUR_BITS = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
FOLDED = "grouped_query"
"""The attention that leaves no plan behind once a model is converted."""
RESULTS = ".eval_results/heedful.yaml"


def card(facts: Facts, name: str, *, hub_id: str | None) -> str:
    """The text of README.md.

    Args:
        name: What the model is called.
        hub_id: Where it goes, owner/name; None for a folder.
    """
    front = yaml.safe_dump(_metadata(facts, name), sort_keys=False, allow_unicode=True)
    sections = {
        "Use": _use(facts, hub_id or FOLDER),
        "Results": _results(facts),
        "Base model": _base(facts),
        "Data": _sources(facts.data),
        "Attention": _attention(facts),
        "Training": _training(facts),
        "Limits": _limits(facts),
        "How to make it again": _reproduction(facts),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text)
    pipeline = PIPELINES.get(facts.task, facts.task).replace("-", " ")
    first = f"A model for {pipeline}, fine-tuned with heedful {__version__}."
    return f"---\n{front}---\n\n# {name}\n\n{first}\n\n{redact(body)}"


def results_file(facts: Facts) -> str | None:
    """The text of ``.eval_results/heedful.yaml``: what was scored on data sets of the Hub; None where none is."""
    entries = [
        EvalResultEntry(
            dataset_id=source.hub_id,
            task_id=source.config or "default",
            value=value,
            dataset_revision=source.revision,
            notes=f"{metric} on {source.split or split}"
            + (f", 95 % interval {_interval(interval)}" if interval else ""),
        )
        for split, metric, value, interval in _scores(facts)
        if (source := facts.data.get(split)) is not None and source.hub_id is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def license_of(facts: Facts) -> str | None:
    """As the card says: the base model's, unless what was learned from stands against passing it on."""
    if facts.restricted:
        return "other"
    return facts.base.license if facts.base else None


def _metadata(facts: Facts, name: str) -> dict[str, Any]:
    sources = facts.data
    pipeline = PIPELINES.get(facts.task)
    plan = facts.architecture.get("attention_plan") or {}
    results = [
        EvalResult(
            task_type=pipeline or facts.task,
            dataset_type=sources[split].hub_id or sources[split].name,
            dataset_name=sources[split].name,
            dataset_config=sources[split].config,
            dataset_revision=sources[split].revision,
            dataset_split=sources[split].split or split,
            metric_type=metric,
            metric_name=f"{metric} ({split})",
            metric_value=value,
        )
        for split, metric, value, _ in _scores(facts)
        if split in sources
    ]
    front = ModelCardData(
        language=sorted({code for source in sources.values() for code in source.language}) or None,
        license=license_of(facts),
        library_name="transformers",
        pipeline_tag=pipeline,
        base_model=facts.base.hub_id if facts.base else None,
        datasets=sorted({source.hub_id for source in sources.values() if source.hub_id}) or None,
        tags=["heedful", *([f"attention-{plan['variant']}"] if "variant" in plan else [])],
        model_name=name,
        eval_results=results or None,
    )
    return front.to_dict()  # type: ignore[no-untyped-call, no-any-return]


def _scores(facts: Facts) -> Iterator[tuple[str, str, float, list[float] | None]]:
    """Split, metric, value and interval; metrics of single classes stay in metrics.json."""
    for split, metrics in facts.metrics.items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and not metric.startswith("f1_"):
                yield split, metric, value, metrics.get(f"{metric}_ci95")


def _interval(ends: list[float]) -> str:
    return f"{ends[0]:.4f} - {ends[1]:.4f}"


def _use(facts: Facts, where: str) -> str:
    source = f"file:///{where}" if where == FOLDER else where
    ours = f"    heedful pull {source} my-model\n    heedful predict my-model INPUT"
    if "attention_plan" in facts.architecture:
        return f"Its attention is heedful's own: transformers alone refuses to open it. With the project:\n\n{ours}"
    task = PIPELINES.get(facts.task)
    if task not in NO_PIPELINE:
        plain = f'from transformers import pipeline\n    model = pipeline("{task}", "{where}")'
    else:
        auto = facts.architecture.get("architectures", ["AutoModel"])[0]
        plain = f'from transformers import AutoTokenizer, {auto}\n    model = {auto}.from_pretrained("{where}")'
    return f"    {plain}\n\nor, with the windows and the search that it was scored with:\n\n{ours}"


def _results(facts: Facts) -> str:
    baselines = {split: found for split, found in facts.baselines.items() if found}
    names = list(dict.fromkeys(name for found in baselines.values() for name in found))
    head = ["split", "metric", "value", "95 % interval", *names]
    rows = [
        [split, metric, f"{value:.4f}", _interval(interval) if interval else ""]
        + [_number(baselines.get(split, {}).get(name, {}).get(metric)) for name in names]
        for split, metric, value, interval in _scores(facts)
    ]
    if not rows:
        return "None: the run had no data to score on."
    table = "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))
    by = f"\n\nScored by `{signature}`." if (signature := facts.manifest.get("scored_by")) else ""
    return f"{table}{by}\n\nIntervals are of a bootstrap over the rows of the split, and say nothing of other data."


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _base(facts: Facts) -> str:
    before = [f"- made from: {_source(source)}" for source in facts.inherited]
    return "\n".join([*([_sources({"base": facts.base})] if facts.base else []), *before])


def _sources(sources: Mapping[str, Source]) -> str:
    told: dict[str, list[str]] = {}
    for split, source in sources.items():
        told.setdefault(_source(source), []).append(split)
    return "\n".join(f"- {', '.join(splits)}: {text}" for text, splits in told.items())


def _source(source: Source) -> str:
    where = f"[{source.name}](https://huggingface.co/{source.hub_id})" if source.hub_id else f"`{source.name}`"
    details = [source.config, f"split {source.split}" if source.split else None, source.revision]
    license_ = f"license {source.license}" if source.license else "license not stated by the run"
    terms = f" {source.terms}" if source.terms else ""
    notice = f" Notice of its publisher: {source.notice}" if source.notice else ""
    return ", ".join([where, *(d for d in details if d), license_]) + "." + terms + notice


def _attention(facts: Facts) -> str:
    if (plan := facts.architecture.get("attention_plan")) is not None:
        return f"`{json.dumps(plan, sort_keys=True)}` in place of full attention."
    if FOLDED not in json.dumps(facts.config.get("attention")):  # in the short form or at some place
        return ""
    return (
        f"Trained with {FOLDED}, and converted to a plain model with fewer key/value heads by `heedful attention "
        "convert`. The figures are of the model before that, whose logits are the same but for rounding."
    )


def _training(facts: Facts) -> str:
    train, lora, model = (facts.config.get(section) or {} for section in ("train", "lora", "model"))
    values = {name: train.get(name) for name in SETTINGS}
    values |= {f"lora.{name}": value for name, value in lora.items() if lora.get("r") and value}
    values |= {f"model.{name}": model.get(name) for name in FOUR_BITS if model.get("load_in_4bit")}
    values |= {"seed": facts.config.get("seed"), "max_length": model.get("max_length")}
    rest = (f"{name} {value}" for name, value in train.items() if name not in SETTINGS and value is not None)
    values["other settings of train"] = ", ".join(rest) or None
    lines = [f"- {name}: {value}" for name, value in values.items() if value is not None]
    if rows := facts.audit.get("rows"):
        lines.append("- rows: " + ", ".join(f"{split} {count:,}" for split, count in rows.items()))
    return "\n".join(lines) if facts.has_run else "Not known: the model came without its run."


def _limits(facts: Facts) -> str:
    """What the audit found, and what the run left out."""
    found = [
        f"- {leak['normalized']} of the rows ({leak['fraction']:.2%}) stand in both of {name.replace('->', ' and ')}."
        for name, leak in facts.audit.get("leaks", {}).items()
        if leak.get("normalized")
    ]
    for split, losses in facts.audit.get("losses", {}).items():
        for name, share in losses.items():
            if name.endswith("_lost_fraction") and share:
                found.append(f"- {split}: {share:.2%} of the {name.removesuffix('_lost_fraction')} were cut off.")
    data = facts.config.get("data") or {}
    for name in ("max_train_samples", "max_eval_samples"):
        if data.get(name):
            found.append(f"- {name} was {data[name]}: not all of the data was used.")
    if facts.has_run:
        found.append("- It was scored on the splits above alone; bias, safety and other domains were not looked at.")
    return "\n".join(found)


def _reproduction(facts: Facts) -> str:
    if not facts.has_run:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in facts.manifest.get("versions", {}).items() if version)
    machine = facts.manifest.get("machine", {})
    commit = facts.manifest.get("git_commit")
    of = f", commit {commit}" + ("" if facts.manifest.get("git_clean") else ", with changes") if commit else ""
    on = ", ".join(str(v) for v in (machine.get("gpu"), machine.get("processor")) if v)
    hashes = "\n".join(f"- {split}: sha256 `{sha256}`" for split, sha256 in facts.manifest.get("data", {}).items())
    command = facts.manifest.get("command", "")
    return f"    {command}\n\nheedful {facts.manifest.get('heedful')}{of}; {versions}; on {on}.\n\n{hashes}"
