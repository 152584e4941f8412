"""The model card of an export: method, base and its licence, data, metrics with intervals, limits, how to load it.

Everything in it comes from the run's own files and is written as text: a name or a path that somebody else chose is no
markup here, no folder of this machine and no credential gets in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub.repocard import metadata_load

from stepkd.data.templates import PromptTemplate, template_name
from stepkd.models.source import as_trained, find_checkpoint, model_file
from stepkd.models.spec import TINY_PRESETS
from stepkd.runs.job import package_versions
from stepkd.runs.rundir import newest_config, read_checkpoint, read_marker
from stepkd.safe import SECRET_NAME
from stepkd.yaml_files import read_yaml

_CREDENTIAL = re.compile(r"(?<=://)[^/\s@]+@|\b(hf|sk|ghp|wandb)[_-][\w-]{8,}|\b[0-9a-f]{40}\b")
"""More than commands refuse (:func:`stepkd.safe.refuse_credentials`): what it hides by mistake stops nobody."""
_ABSOLUTE = re.compile(r"(?<![\w:/.])~?/(?:[^\s/,;\"']+/)*")
_METRICS = re.compile(r"(pass|maj)@\d+|step_accuracy|correct_with_incorrect_step|truncated_rate|f1|acc_\w+|auroc")


def write_card(
    folder: Path,
    source: str | Path,
    policy: Any,
    template: PromptTemplate | None,
    *,
    title: str,
    weights: str,
    form: str,
) -> None:
    """Write ``README.md`` into an export.

    Args:
        folder: of the export, as it is being written.
        source: what is exported; files of its run, and evaluations beside it, are read where there are some.
        policy: the model, loaded.
        template: its prompt template.
        title: name of the model.
        weights: the fingerprint by which evaluations name these weights.
        form: ``merged`` or ``adapter``, or the layout of a reward model for others.
    """
    found, head = find_checkpoint(Path(source).expanduser()), policy.step_head
    base, licence, hub = _base(policy.spec)
    known: dict[str, Any] = {
        "title": title,
        "base": base,
        "licence": licence,
        "template": template and template_name(template),
        "weights": weights,
        "form": form,
        "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
        "meaning": head and head.spec.meaning,
        "format": head and ", ".join(f"{name} {value!r}" for name, value in asdict(head.spec.format).items()),
    }
    metrics: list[dict[str, str]] = []
    if found is not None:
        checkpoint, run = (
            read_checkpoint(found),
            found.parent.parent if found.parent.name == "checkpoints" else found.parent,
        )
        known |= {"method": checkpoint["stepkd"].get("module", "").rpartition(".")[2].removesuffix("Module")}
        known |= {"updates": checkpoint.get("global_step"), "data": _data(run), "last": _last_validation(run)}
        words = str((read_marker(run) or {}).get("command")).replace("--config=", "--config ").split()
        known["recipes"] = ", ".join(Path(name).stem for option, name in pairwise(words) if option == "--config")
        metrics = list(_measured(run, weights))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["stepkd"] + ["reward-model"] * (head is not None)}
    front |= {name: _clean(value) for name, value in (("license", licence), ("base_model", hub)) if value}
    card = jinja2.Template(Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")).render(
        {name: _text(value) for name, value in known.items() if value},
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        steps=head is not None,
        metrics=[{name: _text(value) for name, value in row.items()} for row in metrics],
    )
    (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")


def _clean(value: object) -> str:
    """A text on one line without control and direction marks, credentials and folders of this machine."""
    text = "".join(char if unicodedata.category(char)[0] != "C" else " " for char in str(value))
    for name, secret in os.environ.items():
        if SECRET_NAME.search(name) and len(secret) >= 8:
            text = text.replace(secret, "...")
    text = _ABSOLUTE.sub("", _CREDENTIAL.sub("...", text))
    return " ".join(text.split())[:300]


def _text(value: object) -> str:
    """The same, in which Markdown and HTML find nothing of theirs."""
    return "".join(char if char.isalnum() or char in " .,:;/@+-=_%()'" else f"&#{ord(char)};" for char in _clean(value))


def _base(spec: Any) -> tuple[str, str, str]:
    """What was trained, the licence that its own card names, and its hub id, where there is one."""
    spec = as_trained(spec)
    if spec.path in TINY_PRESETS:
        return f"{spec.path}, random weights of stepkd", "", ""
    here = Path(spec.path).expanduser()
    is_local, values = here.exists() or here.is_absolute(), dict[str, Any]()
    if (card := model_file(spec.path, here, "README.md", spec.revision)) is not None:
        with contextlib.suppress(ValueError, OSError, yaml.YAMLError):  # a card of another make
            values = metadata_load(card) or {}
    licence = values.get("license_name") if values.get("license") == "other" else values.get("license")
    above = values.get("base_model") if is_local else spec.path
    name = here.name if is_local else spec.path
    return f"{name}, of {above}" if is_local and above else name, str(licence or ""), str(above or "")


def _data(run: Path) -> str:
    """Source, file name and split of the training data, as its settings have them."""
    config = newest_config(run)
    data: Any = read_yaml(config, "run's settings").get("data") if config is not None else None
    train: Any = ((data or {}).get("init_args") or {}).get("train") or {}
    train = train if isinstance(train, Mapping) else {"path": train}  # of a data module of one's own
    path = Path(str(train["path"])).name if train.get("path") else train.get("hub")
    facts = [
        train.get("source"),
        path,
        train.get("split"),
        *(f"{k}={v}" for k, v in (train.get("options") or {}).items()),
    ]
    return ", ".join(str(each) for each in facts if each)


def _measured(run: Path, weights: str) -> Iterator[dict[str, str]]:
    """Metrics with intervals of evaluations in or beside the run that were of these very weights."""
    beside = [*run.parent.glob("*/summary.json"), *run.parent.glob("evaluations/*/summary.json")]
    for file in sorted({*run.glob("*/summary.json"), *beside}):
        try:
            settings = json.loads(file.with_name("settings.json").read_text(encoding="utf-8"))
            summary = json.loads(file.read_text(encoding="utf-8"))
            of = settings.get("scorer") or settings.get("model") or {}
            if of.get("weights") != weights:
                continue
            name = str((settings.get("benchmark") or {}).get("name", file.parent.name))
        except (OSError, ValueError, AttributeError):
            continue
        for at, found in _intervals(summary):
            where = name if at[0] != "sets" else at[1]
            interval = f"{found['low']:.3f} to {found['high']:.3f}"
            yield {"where": where, "name": at[-1], "value": f"{found['value']:.3f}", "interval": interval}


def _intervals(values: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, float]]]:
    """Metrics worth a line of a summary, with their place; baselines are others' metrics."""
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping) and {"value", "low", "high"} <= set(value):
            if _METRICS.fullmatch(key) and None not in (value["value"], value["low"], value["high"]):
                yield (*at, key), value
        elif key not in ("baselines", "tuned"):
            yield from _intervals(value, (*at, key))


def _last_validation(run: Path) -> str:
    """The last validation's loss and accuracies."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if '"val/' in line and line.endswith("}")]
    except (OSError, ValueError):
        return ""
    found = {k.removeprefix("val/"): v for k, v in (rows[-1] if rows else {}).items() if k.startswith("val/")}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
