"""What the name of a model means: a run's checkpoint, a folder or file here, or a model on the hub; and the prompt
template that it was trained with."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from stepkd.data.templates import PromptTemplate, get_template, read_template, template_name
from stepkd.errors import ConfigError, DataError, ModelError, nearest
from stepkd.models.spec import TINY_PRESETS, PolicyConfig, spec_from_dict
from stepkd.runs.files import write_json
from stepkd.runs.launcher import detect_launch
from stepkd.runs.rundir import read_checkpoint, read_marker

logger = logging.getLogger(__name__)

TEMPLATE_NAME = "prompt_template.json"
BEST, LAST = "best.ckpt", "last.ckpt"


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint a path means: a ``.ckpt`` file itself, or a run folder's best (else last) one."""
    if path.suffix == ".ckpt":
        return path
    for folder in (path / "checkpoints", path):
        for name in (BEST, LAST):
            if (folder / name).is_file():
                return folder / name
    return None


_KEPT = ("tokenizer", "chat_template", "special_tokens", "lora", "trust_remote_code")


def as_trained(spec: PolicyConfig) -> PolicyConfig:
    """The same settings with the model that a run was trained from, and its adapter, where the path is a run's.

    Raises:
        ModelError: a checkpoint that cannot be read.
    """
    found = find_checkpoint(Path(spec.path).expanduser())
    if found is None:
        return spec
    base = as_trained(spec_from_dict(read_checkpoint(found)["stepkd"]["policy"]))
    kept = {name: getattr(spec, name) or getattr(base, name) for name in _KEPT}
    dtype = spec.dtype or base.dtype
    return replace(spec, path=base.path, revision=base.revision, init_seed=base.init_seed, dtype=dtype, **kept)


def check_source(path: str, revision: str | None = None) -> None:
    """Refuse a name that is nothing here and no model on the hub, after one quick request at most.

    Args:
        path: folder, file or hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: names both readings.
    """
    here = Path(path).expanduser()
    if here.is_dir():
        return
    beside = here.parent.iterdir() if here.parent.is_dir() else ()
    near = nearest(str(here), [*TINY_PRESETS, *map(str, beside)], cutoff=0.8)
    only_local = path.startswith((".", "/", "~")) or path.endswith((".gguf", ".ckpt")) or here.is_file()
    if only_local or path.count("/") > 1:  # hub ids are ``name`` or ``org/name``
        raise ModelError(f"no model folder at {path}.{near}")
    try:
        _ask_hub(path, revision, may_ask="/" not in path or not here.parent.is_dir())
    except LookupError as error:
        raise ModelError(
            f"no folder {path!r} here, and no model {path!r} on the hub ({error}).{near} Give a run or model folder, a "
            ".gguf file, a tiny preset or a hub id"
        ) from error


@cache  # what it raises is not kept: whoever logs in may ask again
def _ask_hub(name: str, revision: str | None, *, may_ask: bool) -> None:
    """Look into the hub's cache, then ask once for the model's settings, without retries."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache

    try:
        for file in ("config.json", "tokenizer_config.json", "adapter_config.json"):
            if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
                return
        if not may_ask:
            raise LookupError(f"not asked: {Path(name).parent} is a folder here")
        if is_offline_mode():
            raise LookupError("HF_HUB_OFFLINE is set, and it is not in the cache")
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=5)
    except errors.EntryNotFoundError:
        return  # a model in another form; loading says which
    except LookupError:
        raise
    except Exception as error:  # the hub's own classes and those of its HTTP library
        reasons = {
            errors.GatedRepoError: f"gated: accept its terms at https://huggingface.co/{name}, log in (hf auth login)",
            errors.RevisionNotFoundError: f"it has no revision {revision!r}",
            errors.RepositoryNotFoundError: "unknown there; if it is private, log in with hf auth login",
            errors.HFValidationError: "no name that the hub allows",
        }
        default = f"it cannot be reached: {type(error).__name__}"
        raise LookupError(next((why for kind, why in reasons.items() if isinstance(error, kind)), default)) from error


def no_model(folder: Path) -> str:
    """What to say of a folder that holds neither a checkpoint nor a model."""
    if find_checkpoint(folder) is not None:
        return f"{folder} is a run folder, which load_policy() and load_trained() read"
    run = read_marker(folder)
    text = f"{folder} is a folder without config.json: not a transformers model folder"
    if run is not None:
        text = f"{folder} is a run folder (kind {run['kind']!r}, status {run.get('status')}) without a checkpoint"
    within = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    models = [str(each) for each in within if (each / "config.json").is_file() or find_checkpoint(each)]
    return f"{text}; there are models in {', '.join(models[:4])}" if models else text


def model_file(path: str, folder: Path, name: str, revision: str | None) -> Path | None:
    """A file of the model: beside its weights, or (hub id) from the hub or its cache."""
    if (folder / name).is_file():
        return folder / name
    if folder.exists() or path in TINY_PRESETS or path.endswith(".gguf"):
        return None
    from transformers.utils import cached_file

    found = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def trained_template(path: str | Path, revision: str | None = None) -> PromptTemplate | None:
    """The prompt template of a run folder, a checkpoint, an export, an adapter folder or a hub repository.

    Args:
        path: the model as commands name it.
        revision: hub revision.

    Returns:
        The template; None where nothing says it.

    Raises:
        ModelError: a file that cannot be read.
    """
    saved = None
    with contextlib.suppress(OSError, ModelError):  # neither a folder nor a repository: whoever loads it says so
        if str(path) not in TINY_PRESETS:
            check_source(str(path), revision)
        saved = model_file(str(path), Path(path).expanduser(), TEMPLATE_NAME, revision)
    try:
        if saved is not None:
            return read_template(saved)
        if (checkpoint := find_checkpoint(Path(path).expanduser())) is None:
            return None
        values = read_checkpoint(checkpoint)["stepkd"].get("template")
        return PromptTemplate(**values) if values else None
    except (TypeError, ConfigError, DataError) as error:
        raise ModelError(
            f"the prompt template of {path} cannot be used ({error}): give one (template: a name or a YAML file)"
        ) from error


def template_for(model: str | Path, benchmark: str, given: str | PromptTemplate | None = None) -> PromptTemplate:
    """The prompt template that a job asks a model under.

    Args:
        model: the model as commands name it.
        benchmark: name of the benchmark's own template.
        given: what the user asked for, which wins; None: the one that the model was trained with, else the benchmark's.
            Where the two differ, one line says so.

    Raises:
        ConfigError, DataError, ModelError: a template that cannot be used.
    """
    own = get_template(benchmark)
    trained = trained_template(model) if given is None else get_template(given)
    if given is None and trained is not None and trained != own and detect_launch().is_rank_zero:
        logger.warning(
            "prompt template: %s, with which %s was trained (the benchmark's own: --template %s)",
            template_name(trained),
            model,
            benchmark,
        )
    return own if trained is None else trained


def save_template(template: PromptTemplate, folder: Path) -> None:
    """Write a template into a model or run folder."""
    write_json(folder / TEMPLATE_NAME, asdict(template))
