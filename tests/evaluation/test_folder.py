"""The output folder: never anything of somebody else's, never silently overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import stepkd.evaluation.store as store
from stepkd.errors import ConfigError, DataError, ModelError, StepkdError
from stepkd.evaluation.manifest import read_manifest
from stepkd.evaluation.runner import EvaluationSpec, evaluate
from stepkd.evaluation.store import read_rows
from stepkd.models import Policy

FILES = ["manifest.json", "results.jsonl", "summary.json"]


def test_killed_while_the_manifest_was_written(spec: EvaluationSpec, policy: Policy) -> None:
    out = Path(spec.out)
    out.mkdir()
    (out / ".manifest.json.4711.tmp").write_text('{"form')
    assert evaluate(replace(spec, limit=1), policy=policy)["problems"] == 1


@pytest.mark.parametrize("name", ["notes.txt", "results.jsonl", "summary.json"])
def test_folder_of_something_else(spec: EvaluationSpec, policy: Policy, name: str) -> None:
    out = Path(spec.out)
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"is not empty \({name}\) and holds no evaluation .*: give another --out"):
        evaluate(spec, policy=policy)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


def test_out_is_a_file(spec: EvaluationSpec, policy: Policy) -> None:
    Path(spec.out).write_text("mine")
    with pytest.raises(ConfigError, match="out is a file: give a folder"):
        evaluate(spec, policy=policy)


def test_folder_that_cannot_be_made(spec: EvaluationSpec, policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StepkdError, match=r"cannot write .*manifest\.json: Not a directory"):
        evaluate(replace(spec, out=str(tmp_path / "file" / "out")), policy=policy)


# ---- overwriting ---------------------------------------------------------------------------------------------------


def test_overwrite(spec: EvaluationSpec, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    changed = replace(spec, max_new_tokens=5)
    summary = evaluate(changed, policy=policy, overwrite=True)
    assert summary["total_tokens"] <= 7 * 5
    assert read_manifest(spec.out)["sampling"]["max_new_tokens"] == 5
    assert sorted(path.name for path in Path(spec.out).iterdir()) == FILES


def test_overwrite_of_a_new_folder(spec: EvaluationSpec, policy: Policy) -> None:
    assert evaluate(spec, policy=policy, overwrite=True)["problems"] == 7


def test_overwrite_touches_nothing_when_the_new_run_is_in_error(spec: EvaluationSpec, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    before = {path.name: path.read_bytes() for path in Path(spec.out).iterdir()}
    for changes in ({"benchmark": "tusk"}, {"data": "n=0"}, {"template": "gsm"}):
        with pytest.raises(StepkdError):
            evaluate(replace(spec, **changes), policy=policy, overwrite=True)
    with pytest.raises(ModelError):
        evaluate(replace(spec, model="tiny-0.2m"), overwrite=True)
    assert {path.name: path.read_bytes() for path in Path(spec.out).iterdir()} == before


def test_overwrite_refuses_a_folder_with_other_files(spec: EvaluationSpec, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    checkpoints = Path(spec.out) / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.ckpt").write_text("weeks of work")
    with pytest.raises(ConfigError, match=r"holds more than an evaluation \(checkpoints\), so --overwrite does not"):
        evaluate(replace(spec, seed=1), policy=policy, overwrite=True)
    assert (checkpoints / "last.ckpt").read_text() == "weeks of work"
    assert len(read_rows(Path(spec.out) / FILES[1])) == 7


def test_overwrite_refuses_the_manifest_of_something_else(spec: EvaluationSpec, policy: Policy) -> None:
    out = Path(spec.out)
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(DataError, match="manifest format None"):
        evaluate(spec, policy=policy, overwrite=True)
    assert (out / "manifest.json").exists()


def test_overwrite_waits_for_no_running_evaluation(spec: EvaluationSpec, policy: Policy) -> None:
    evaluate(spec, policy=policy)
    with (
        store.ResultStore(Path(spec.out) / "results.jsonl"),
        pytest.raises(StepkdError, match="is already open in this process"),
    ):
        evaluate(spec, policy=policy, overwrite=True)
    assert len(read_rows(Path(spec.out) / FILES[1])) == 7
