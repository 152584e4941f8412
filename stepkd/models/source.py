"""What the name of a model means: a run's checkpoint, a folder or file here, or a model on the hub."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from stepkd.errors import ModelError, nearest
from stepkd.models.spec import PolicySpec, spec_from_dict
from stepkd.models.tiny import TINY_PRESETS
from stepkd.runs.checkpoint_files import read_checkpoint
from stepkd.runs.rundir import read_marker

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


_KEPT = ("tokenizer", "chat_template", "lora", "trust_remote_code")


def as_trained(spec: PolicySpec) -> PolicySpec:
    """The same settings with the model that a run was trained from, and its adapter, where the path is a run's.

    Raises:
        ModelError: a checkpoint that cannot be read.
    """
    found = find_checkpoint(Path(spec.path).expanduser())
    if found is None:
        return spec
    base = as_trained(spec_from_dict(read_checkpoint(found)["stepkd"]["policy"]))
    kept = {name: getattr(spec, name) or getattr(base, name) for name in _KEPT}
    dtype = base.dtype if spec.dtype == "auto" else spec.dtype
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
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name!r} is gated: accept its terms at https://huggingface.co/{name} and log in (hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name!r} on the hub has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise LookupError("unknown there; if it is private, log in with hf auth login") from error
    except errors.HFValidationError as error:
        raise LookupError("no name that the hub allows") from error
    except LookupError:
        raise
    except Exception as error:  # those of the HTTP library
        raise LookupError(f"it cannot be reached: {type(error).__name__}") from error


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
