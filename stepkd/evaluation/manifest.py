"""The manifest beside the results: everything that decides what the numbers are.

Two runs with equal manifests (apart from the date) give equal results, so a killed run may be resumed only under an
equal manifest, and a comparison names every setting that differs. No host names, user names or absolute paths are
collected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import stepkd
from stepkd.errors import ConfigError, DataError
from stepkd.runs.files import write_file

MANIFEST_NAME = "manifest.json"
RESULTS_NAME = "results.jsonl"
MANIFEST_FORMAT = 1
PACKAGES = ("torch", "transformers", "peft", "lightning", "math-verify")

IRRELEVANT = frozenset({"created", "versions.lightning"})
"""Keys that cannot change an evaluation's results: the date, and a package that only training uses."""

ABSENT = "(absent)"


def build_manifest(
    *,
    model: str,
    revision: str | None,
    weights_fingerprint: str,
    prompt_id: str,
    extractor_version: str,
    dtype: str,
    seed: int,
    backend: str,
    device: str,
    sampling: Mapping[str, Any],
    batch_size: int,
    benchmark: str,
    benchmark_source: str,
    data_fingerprint: str,
    limit: int | None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collects what decides the results of an evaluation.

    Args:
        model: hub id or path as the user gave it.
        revision: hub revision, or None.
        weights_fingerprint: hash of the weights (with adapter) and tokenizer.
        prompt_id: name of the prompt template, with its version or hash.
        extractor_version: name and version of the answer extractor and grader.
        dtype: compute dtype, for example ``bfloat16``.
        seed: sampling seed.
        backend: sampler backend, for example ``transformers``.
        device: device type, for example ``cpu`` or ``cuda``.
        sampling: sampling settings (samples, temperature, top_p, max_new_tokens, stop, ...), JSON values.
        batch_size: problems per batch; a resumed run must form the same batches.
        benchmark: name of the benchmark.
        benchmark_source: hub id or file name the problems come from.
        data_fingerprint: hash of the whole data file or split, before ``limit``.
        limit: number of problems taken, or None for all.
        extra: further settings that decide the results, JSON values.

    Returns:
        A dict of JSON values, with package versions and the CPU thread count added.

    Raises:
        ConfigError: a value JSON cannot hold.
    """
    import torch  # for the thread count only; reading manifests stays light

    manifest = {
        "format": MANIFEST_FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"name": model, "revision": revision, "weights": weights_fingerprint},
        "prompt": prompt_id,
        "extractor": extractor_version,
        "dtype": dtype,
        "seed": seed,
        "backend": backend,
        "device": device,
        "sampling": dict(sampling),
        "batch_size": batch_size,
        "benchmark": {"name": benchmark, "source": benchmark_source, "data": data_fingerprint, "limit": limit},
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
        "extra": dict(extra or {}),
    }
    # Through JSON once, so that a fresh manifest equals the one read back (tuples, integer keys).
    return dict(json.loads(_dump(manifest)))


def package_versions() -> dict[str, str | None]:
    """Versions of stepkd and of the packages that touch the results; None for one that is not installed."""
    versions: dict[str, str | None] = {"stepkd": stepkd.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def write_manifest(directory: str | Path, manifest: Mapping[str, Any]) -> None:
    """Writes ``manifest.json`` into a run folder, as a whole or not at all.

    Raises:
        ConfigError: a value JSON cannot hold.
        StepkdError: the write failed; an earlier manifest is intact.
    """
    write_file(Path(directory) / MANIFEST_NAME, _dump(manifest))


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Reads ``manifest.json`` of a run folder.

    Raises:
        DataError: no manifest there, or not one this version can read.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"no readable manifest ({error.strerror}); is this the --out folder of `stepkd evaluate`?", path=path
        ) from error
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", path=path) from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"manifest format {found!r}; this version reads format {MANIFEST_FORMAT}", path=path)
    return manifest


def manifest_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and can change results, as dotted key -> (old value, new value).

    The date is left out, and so is the CPU thread count when both runs are on an accelerator. A key that only one
    side has counts as different, with :data:`ABSENT` for the other.
    """
    flat_old, flat_new = _flatten(old), _flatten(new)
    ignored = set(IRRELEVANT)
    if all(not str(side.get("device", "cpu")).startswith("cpu") for side in (flat_old, flat_new)):
        ignored.add("threads")
    keys = [key for key in {**flat_old, **flat_new} if key not in ignored]
    pairs = {key: (flat_old.get(key, ABSENT), flat_new.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if _dump(pair[0]) != _dump(pair[1])}


def check_resumable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuses to go on with results that were begun under other settings.

    Args:
        old: manifest found beside the results.
        new: manifest of the run that wants to resume.

    Raises:
        ConfigError: naming every differing key with both values.
    """
    differences = manifest_differences(old, new)
    if differences:
        lines = [f"  {key}: {then!r} then, {now!r} now" for key, (then, now) in differences.items()]
        raise ConfigError(
            "these results were begun under other settings, so they cannot be resumed:\n"
            + "\n".join(lines)
            + "\nGive the old settings again, or another --out folder."
        )


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _dump(value: Any) -> bytes:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the manifest holds a value JSON cannot: {error}") from error
