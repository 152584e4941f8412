"""Manifests: what they hold, atomic writing, and which differences stop a resume."""

from __future__ import annotations

import copy
import errno
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.evaluation.manifest import (
    build_manifest,
    check_resumable,
    manifest_differences,
    read_manifest,
    write_manifest,
)


def manifest(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": "acme/tiny",
        "revision": None,
        "weights_fingerprint": "w1",
        "prompt_id": "chat-v1",
        "extractor_version": "gsm8k-1",
        "dtype": "bfloat16",
        "seed": 0,
        "backend": "transformers",
        "device": "cpu",
        "sampling": {"samples": 4, "temperature": 0.7, "stop": ("\n\n",)},
        "batch_size": 8,
        "benchmark": "gsm8k",
        "benchmark_source": "test.jsonl",
        "data_fingerprint": "d1",
        "limit": 32,
    }
    return build_manifest(**(settings | changes))


def test_round_trip_is_equal_and_resumable(tmp_path: Path) -> None:
    built = manifest()
    write_manifest(tmp_path, built)
    assert read_manifest(tmp_path) == built
    check_resumable(read_manifest(tmp_path), manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_contents_name_versions_but_not_the_machine() -> None:
    built = manifest()
    assert set(built["versions"]) == {"stepkd", "torch", "transformers", "peft", "lightning", "math-verify"}
    assert built["versions"]["torch"]
    assert built["threads"] >= 1
    text = json.dumps(built)
    for private in (platform.node(), str(Path.cwd()), str(Path.home())):
        assert len(private) < 3 or private not in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": "acme/big"}, "model.name: 'acme/tiny' then, 'acme/big' now"),
        ({"revision": "v2"}, "model.revision: None then, 'v2' now"),
        ({"weights_fingerprint": "w2"}, "model.weights: 'w1' then, 'w2' now"),
        ({"prompt_id": "plain"}, "prompt: 'chat-v1' then, 'plain' now"),
        ({"extractor_version": "x"}, "extractor: 'gsm8k-1' then, 'x' now"),
        ({"dtype": "float32"}, "dtype: 'bfloat16' then, 'float32' now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"backend": "vllm"}, "backend: 'transformers' then, 'vllm' now"),
        ({"device": "cuda"}, "device: 'cpu' then, 'cuda' now"),
        ({"batch_size": 4}, "batch_size: 8 then, 4 now"),
        ({"benchmark": "svamp"}, "benchmark.name: 'gsm8k' then, 'svamp' now"),
        ({"benchmark_source": "x"}, "benchmark.source: 'test.jsonl' then, 'x' now"),
        ({"data_fingerprint": "d2"}, "benchmark.data: 'd1' then, 'd2' now"),
        ({"limit": None}, "benchmark.limit: 32 then, None now"),
        ({"sampling": {"samples": 4, "temperature": 0.7}}, r"sampling.stop: \['\\n\\n'\] then, '\(absent\)' now"),
        ({"extra": {"fewshot": 4}}, r"extra.fewshot: '\(absent\)' then, 4 now"),
    ],
)
def test_every_setting_that_changes_results_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        check_resumable(manifest(), manifest(**changes))
    assert str(error.value).count(" then, ") == 1
    assert "another --out folder" in str(error.value)


def test_all_differing_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_resumable(manifest(), manifest(seed=5, dtype="float32", limit=8))
    for key in ("seed: 0 then, 5 now", "dtype: ", "benchmark.limit: "):
        assert key in str(error.value)


def edited(change: Callable[[dict[str, Any]], None], **settings: Any) -> dict[str, Any]:
    other = copy.deepcopy(manifest(**settings))
    change(other)
    return other


def test_versions_and_threads_matter_where_they_can_change_results() -> None:
    old = manifest()
    assert manifest_differences(old, edited(lambda m: m.update(created="1999-01-01"))) == {}
    assert manifest_differences(old, edited(lambda m: m["versions"].update(lightning="0.0"))) == {}
    assert list(manifest_differences(old, edited(lambda m: m["versions"].update(torch="0.0")))) == ["versions.torch"]
    assert list(manifest_differences(old, edited(lambda m: m.update(threads=99)))) == ["threads"]
    on_gpu = edited(lambda m: m.update(threads=99), device="cuda")
    assert manifest_differences(manifest(device="cuda"), on_gpu) == {}


def test_true_and_one_are_different_settings() -> None:
    assert manifest_differences(manifest(extra={"x": True}), manifest(extra={"x": 1})) == {"extra.x": (True, 1)}


def test_failed_write_keeps_the_earlier_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path, manifest())
    before = (tmp_path / "manifest.json").read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StepkdError, match=r"manifest\.json: No space left .*The previous file is intact"):
        write_manifest(tmp_path, manifest(seed=1))
    monkeypatch.undo()
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_bad_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no readable manifest .*is this the --out folder"):
        read_manifest(tmp_path)
    for content, message in [
        (b"{", "not valid JSON"),
        (b"[]", "format 'list'"),
        (b'{"format": 99}', "format 99; this version reads format 1"),
    ]:
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_manifest(tmp_path)
    with pytest.raises(ConfigError, match="a value JSON cannot"):
        manifest(extra={"temperature": float("nan")})
    with pytest.raises(ConfigError, match="a value JSON cannot"):
        manifest(sampling={"stop": object()})
