"""The quick start runs end to end (scaled down), resumes, and reports what it measured."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import forked
import pytest

from stepkd.cli import main
from stepkd.quickstart import STAGES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    assert main(["quickstart", "--out", str(out), "--scale", "0.01"]) == 0
    return out


@pytest.mark.slow
def test_summary_has_every_stage(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["stages"]) == [stage.name for stage in STAGES]
    assert summary["settings"]["scale"] == 0.01
    for name in ("teacher", "student"):
        metrics = summary["stages"]["evaluate"][name]["sampled"]["metrics"]
        assert 0 <= metrics["pass@1"]["low"] <= metrics["pass@1"]["value"] <= metrics["pass@1"]["high"] <= 1
        assert (folder / name / "model" / "model.safetensors").is_file()
        assert (folder / name / "metrics.jsonl").is_file()
    assert "<title>run · stepkd report</title>" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_every_model_knows_its_prompt_template(folder: Path) -> None:
    from stepkd.data.templates import get_template
    from stepkd.models.source import trained_template
    from stepkd.scorers.load import load_scorer

    models = sorted(folder.glob("*/model"))
    assert len(models) == 6
    assert all(trained_template(model) == get_template("task") for model in models)
    load_scorer(str(folder / "prm" / "model"), device="cpu")  # it had to be told


@pytest.mark.slow
def test_summary_can_be_recomputed_from_the_rows(folder: Path) -> None:
    from stepkd.evaluation.metrics import summarise

    summary = json.loads((folder / "summary.json").read_text())
    path = folder / "evaluations" / "student-sampled" / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    again = summarise(rows, (1, 2, 4), seed=0)["metrics"]
    assert again == summary["stages"]["evaluate"]["student"]["sampled"]["metrics"]


@pytest.mark.slow
def test_finished_stages_are_not_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(["quickstart", "--out", str(folder), "--scale", "0.01"]) == 0
    assert capsys.readouterr().out.count("finished earlier, not repeated") == len(STAGES)
    assert (folder / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "techer"], "did you mean 'teacher'?"),
        (["--scale", "0"], "must be positive"),
        (["--stages", "evaluate"], "needs the model of stage 'teacher'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_other_settings_do_not_mix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--out", str(folder), "--scale", "0.02"]) == 2
    assert "scale: 0.01 then, 0.02 now" in capsys.readouterr().err
    assert main(["quickstart", "--out", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_steps_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    from stepkd.quickstart import marked_solution

    sample = {"completion": "3+4=7\n7*2=15\n#### 5", "step_labels": [True, False, False]}
    lines = marked_solution("3+4*2%10=\n", sample).plain.splitlines()
    assert lines == ["  3+4*2%10=", "  ✓ 3+4=7", "  ✗ 7*2=15", "  ✗ #### 5"]


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quickstart", "--help"])
    assert ", ".join(repr(stage.name) for stage in STAGES) in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_summary(folder: Path, tmp_path: Path) -> None:
    out, moments, kills = tmp_path / "run", random.Random(0), 0
    for attempt in range(40):
        process = forked.Command(["quickstart", "--out", str(out), "--scale", "0.01"])
        done = len(list(out.glob("parts/stages/*.jsonl")))
        while process.poll() is None and len(list(out.glob("parts/stages/*.jsonl"))) == done:
            time.sleep(0.01)  # until a stage ends; then at some moment of the next one
        time.sleep(moments.uniform(0, 2.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGTERM if attempt % 2 else signal.SIGKILL)
        kills += process.wait() != 0
    assert process.returncode == 0, process.streams()[1]
    assert kills >= 3
    assert (out / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()
    model = Path("kdrl", "model", "model.safetensors")
    assert (out / model).read_bytes() == (folder / model).read_bytes()
