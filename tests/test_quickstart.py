"""The quick start runs end to end (scaled down), resumes, and reports what it measured."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import random
import re
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from rich.console import Console

from stepkd.claims.jobs import Measured
from stepkd.cli import main
from stepkd.quickstart import FILE, STAGES, Context, next_commands, paragraph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["quickstart", "--out", str(out), "--scale", "0.01"]) == 0
    assert "│ weighted vote │" in printed.getvalue()
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


def interval(low: float, high: float) -> dict[str, Any]:
    return {"value": (low + high) / 2, "low": low, "high": high, "method": "bootstrap"}


FACTS = {"noise": {"rate": 0.15, "recover": 0.5}} | dict.fromkeys(
    set(re.findall(r"\{(\w+)", str(FILE["paragraphs"]))) - {"noise"}, 7
)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.3, "rose"), (-0.3, -0.1, "fell"), (-0.1, 0.2, "no clear change")]
)
def test_a_paragraph_says_what_the_interval_says(low: float, high: float, verdict: str) -> None:
    for name, words in FILE["paragraphs"].items():
        numbers = [key for key in words if key != "trained"]
        text = paragraph(name, FACTS, dict.fromkeys(numbers, interval(low, high)))
        assert text.count(f": {verdict}, {100 * (low + high) / 2:+.1f} (") == len(numbers)
        for key in numbers:
            reasons = {each: str(words[key][each]).format_map(FACTS) for each in words[key] if each != "what"}
            assert [each for each, reason in reasons.items() if reason in text] == [verdict] * (verdict in reasons)


def test_a_paragraph_leaves_out_what_is_undefined() -> None:
    undefined = {"value": 0.1, "low": None, "high": None, "method": "bootstrap"}
    assert paragraph("kdrl", FACTS, {"correct": undefined, "correct_with_incorrect_step": None}) == paragraph(
        "kdrl", FACTS, {}
    )
    rounding = {"correct": interval(1e-17, 2e-17)}
    assert "no clear change" in paragraph("kdrl", FACTS, rounding)


def test_every_stage_has_a_paragraph_and_its_time() -> None:
    names = [stage.name for stage in STAGES]
    assert list(FILE["paragraphs"]) == names
    assert list(FILE["seconds"]) == [*names, "report"]


def test_time_left_is_that_of_the_stages_to_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from stepkd import quickstart
    from stepkd.runs.job import Job
    from stepkd.runs.progress import Pace

    now = [0.0]

    def takes(seconds: float) -> Any:
        def run(context: quickstart.Context) -> dict[str, Any]:
            now[0] += seconds
            return {}

        return run

    monkeypatch.setattr(quickstart, "FILE", FILE | {"seconds": {"teacher": 30, "student": 10, "prm": 20, "report": 5}})
    monkeypatch.setattr(quickstart, "Pace", lambda done: Pace(done, lambda: now[0]))
    stages = [quickstart.Stage("teacher", "", takes(60.0)), quickstart.Stage("student", "", takes(20.0))]
    job = Job(tmp_path / "run", "quick start", ["summary.json"])
    job.begin({})
    context = quickstart.Context(tmp_path / "run", Console(width=200))
    quickstart.run_stages(context, stages, job)
    said = capsys.readouterr().out
    assert "at --scale 1 on two CPU cores this takes about 0:45" in said
    assert re.findall(r"about (\d:\d\d) left", said) == ["0:30", "0:10"]  # twice as slow as that machine
    quickstart.run_stages(context, [*stages, quickstart.Stage("prm", "", takes(20.0))], job)
    said = capsys.readouterr().out
    assert "at --scale 1 on two CPU cores this takes about 0:25" in said
    assert re.findall(r"about (\d:\d\d) left", said) == ["0:05"]


def test_a_job_of_several_stages_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Path] = []

    def run(kind: str, settings: dict[str, Any], out: Path) -> Measured:
        ran.append(out)
        return Measured({"count": len(ran)})

    monkeypatch.setattr("stepkd.quickstart.run_job", run)
    for name in ("teacher", "student", "gkd"):
        (tmp_path / name / "model").mkdir(parents=True)
    context = Context(tmp_path, Console())
    first = context.run("sampled", "evaluations/student", evaluated="$student")
    assert context.run("sampled", "evaluations/student", evaluated="$student") == first
    assert first == (tmp_path / "evaluations" / "student", Measured({"count": 1}))
    alike = [context.run("alike", evaluated=f"${name}")[1].columns["count"] for name in ("student", "gkd", "student")]
    assert alike == [2, 3, 2], "of another model, in the same folder"
    assert len(ran) == 3


def test_next_commands_parse_and_name_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepkd.training.fit import StepkdCLI

    out, ran = tmp_path / "a folder", list[str]()
    assert next_commands(out) == []
    for name in ("evaluations/student-sampled", "evaluations/step_kto-sampled", "student/model", "teacher/model"):
        (out / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # not a checkout
    for name in ("before_instantiate_classes", "instantiate_classes", "_run_subcommand"):
        monkeypatch.setattr(StepkdCLI, name, lambda *arguments: None)
    for name in ("samples", "compare"):
        module = importlib.import_module(f"stepkd.cli.{name}")

        @functools.wraps(module.run)  # the command line reads the settings' class off it
        def run(config: Any) -> int:
            ran.append(type(config).__name__)
            return 0

        monkeypatch.setattr(module, "run", run)
    commands = [shlex.split(line) for line in next_commands(out)]
    assert [words[1] for words in commands] == ["samples", "compare", "fit"]
    for program, *words in commands:
        assert (program, main(words)) == ("stepkd", 0)
        assert all(Path(word).is_dir() for word in words if word.startswith(str(out)))
    assert ran == ["SamplesConfig", "CompareConfig"]
    (tmp_path / "runs").symlink_to(out)
    assert [line.split()[1] for line in next_commands(Path("runs"))] == ["samples", "compare", "fit"]


@pytest.mark.slow
def test_pictures_and_next_commands_are_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("best_of_n.png", "reliability.png"):
        assert (folder / "figures" / name).read_bytes().startswith(b"\x89PNG")
    samples, compare, fit = (shlex.split(line)[1:] for line in next_commands(folder))
    assert main(samples) == main(compare) == 0
    assert "first sample" in capsys.readouterr().out
    assert all(Path(word).exists() for word in fit if word.startswith(str(folder)))


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
