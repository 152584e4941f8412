"""Summary, committed file, table and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stepkd.claims.claim_file import load_claim
from stepkd.claims.results import (
    committed_verdict,
    number_text,
    print_results,
    read_results,
    results_path,
    save_results,
    summarise_claim,
)
from stepkd.claims.runner import run_claim
from stepkd.cli import main
from stepkd.errors import DataError
from stepkd.statistics import t_interval

Write = Callable[..., Path]


def summary_of(path: Path, out: Path) -> dict[str, Any]:
    claim = load_claim(path)
    manifest = run_claim(claim, out, report=lambda line: None)
    return summarise_claim(claim, out, manifest["packages"])


def test_summary_of_a_clear_effect(write_claim: Write, tmp_path: Path) -> None:
    summary = summary_of(write_claim(), tmp_path / "out")
    assert summary["verdict"] == "reproduced"
    (statement,) = summary["statements"]
    assert statement["text"] == "correct: better - plain > 0"
    assert statement["verdict"] == "reproduced"
    assert 0 < statement["low"] <= statement["value"] <= statement["high"]
    metrics = summary["metrics"]["main"]
    assert statement["value"] == pytest.approx(
        metrics["better"]["correct"]["value"] - metrics["plain"]["correct"]["value"]
    )
    interval = t_interval(statement["per_seed"])
    assert statement["over_seeds"] == pytest.approx([interval.low, interval.high], abs=1e-5)
    assert metrics["plain"]["steps"]["per_seed"] == [100.0] * 5


@pytest.mark.parametrize(
    ("statement", "verdict"),
    [
        ({"metric": "correct", "better": "plain", "worse": "better"}, "not reproduced"),
        ({"metric": "share", "better": "plain", "worse": "better"}, "inconclusive"),
        ({"metric": "correct", "arm": "better", "bound": 0.6}, "reproduced"),
        (
            {"metric": "correct", "better": "better", "worse": "plain", "measure": "ratio", "bound": 1.1},
            "reproduced",
        ),
        ({"metric": "steps", "arm": "plain", "direction": "lower", "bound": 99}, "not reproduced"),
    ],
)
def test_verdicts(statement: dict[str, Any], verdict: str, write_claim: Write, tmp_path: Path) -> None:
    assert summary_of(write_claim(statements=[statement]), tmp_path / "out")["verdict"] == verdict


def test_numbers_as_text() -> None:
    def text(value: float | None, low: float | None, high: float | None) -> str:
        return number_text({"value": value, "low": low, "high": high})

    assert text(0.5, 0.25, 0.75) == "0.500\n(0.250 to 0.750)"
    assert text(0.00042, -0.001, 0.002) == "0.00042\n(-0.001 to 0.002)"
    assert text(51200.0, 51200.0, 51200.0) == "51,200"
    assert text(0.0, None, None) == "0.000"
    assert text(None, None, None) == "-"


def test_one_seed_is_inconclusive(write_claim: Write, tmp_path: Path) -> None:
    summary = summary_of(write_claim(seeds=[0]), tmp_path / "out")
    assert summary["verdict"] == "inconclusive"
    assert summary["statements"][0]["low"] is None
    assert "one seed has no interval" in printed(summary)


def test_variants_have_statements_of_their_own(write_claim: Write, tmp_path: Path) -> None:
    path = write_claim(variants={"easy": {}, "flat": {"base": 1.0}})  # everything is correct in the second
    summary = summary_of(path, tmp_path / "out")
    assert [(s["variant"], s["verdict"]) for s in summary["statements"]] == [
        ("easy", "reproduced"),
        ("flat", "inconclusive"),
    ]
    assert summary["verdict"] == "inconclusive"
    assert "easy: correct: better - plain > 0" in " ".join(printed(summary).split())


def test_the_committed_file_is_the_same_to_the_byte(write_claim: Write, tmp_path: Path) -> None:
    path = write_claim()
    claim = load_claim(path)
    saved = save_results(claim, summary_of(path, tmp_path / "first"))
    data = saved.read_bytes()
    assert saved == results_path(claim) == tmp_path / "results" / "fake.json"
    assert save_results(claim, summary_of(path, tmp_path / "second")).read_bytes() == data
    text = data.decode()
    assert str(tmp_path) not in text
    assert '"p0"' not in text  # nothing per problem
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert read_results(claim) == json.loads(text)


def test_the_list_shows_no_verdict_on_an_earlier_form(write_claim: Write, tmp_path: Path) -> None:
    path = write_claim()
    claim = load_claim(path)
    assert committed_verdict(claim) == "no results yet"
    saved = save_results(claim, summary_of(path, tmp_path / "out"))
    assert committed_verdict(claim) == "reproduced"
    assert committed_verdict(load_claim(write_claim(seeds=[0, 1]))) == "not run in this form"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "stale": "the loss changed"}))
    assert committed_verdict(claim) == "not run in this form"
    saved.write_text("{}")
    with pytest.raises(DataError, match="not claim results of format 1"):
        committed_verdict(claim)
    saved.write_text("{")
    with pytest.raises(DataError, match="not a readable results file"):
        committed_verdict(claim)


def printed(summary: dict[str, Any], **options: Any) -> str:
    stream = StringIO()
    print_results(Console(file=stream, width=100), "fake", summary, **options)
    return stream.getvalue()


def test_the_table_shows_numbers_verdicts_and_the_paper(write_claim: Write, tmp_path: Path) -> None:
    summary = summary_of(write_claim(source="Table [3]"), tmp_path / "out")
    text = printed(summary)
    statement = summary["statements"][0]
    for part in (
        "The better arm is correct more often.",
        "source: Table [3]",
        "correct: better - plain > 0",
        "paper: 0.8 against 0.5",
        f"{statement['value']:.3f}",
        f"{statement['low']:.3f} to {statement['high']:.3f}",
        "fake: reproduced",
    ):
        assert part in text
    assert "not the claim's" not in text
    assert "its verdict is not the claim's" in printed(summary, quick=True)


def test_the_command(write_claim: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(write_claim()), str(tmp_path / "runs")
    assert main(["claims", "run", path, "--out", out, "--save"]) == 0
    assert "fake: reproduced" in capsys.readouterr().out
    assert (tmp_path / "results" / "fake.json").is_file()
    assert json.loads((tmp_path / "runs" / "fake" / "summary.json").read_bytes())["fake"]["verdict"] == "reproduced"
    assert main(["report", out]) == 0
    assert "correct: better - plain &gt; 0" in (tmp_path / "runs" / "report.html").read_text()
    (tmp_path / "runs" / "report.html").unlink()
    capsys.readouterr()
    flipped = [{"metric": "correct", "better": "plain", "worse": "better"}]
    negative = str(write_claim(statements=flipped))
    assert main(["claims", "run", negative, "--out", out]) == 0, "a negative result is a result"
    text = capsys.readouterr().out
    assert "fake: not reproduced" in text
    assert "drawn (call)" not in text  # the rows were there
    assert main(["claims", "run", str(write_claim(settings={"base": 0.1})), "--out", out]) == 2
    assert "variants.main.base: 0.5 then, 0.1 now" in capsys.readouterr().err
    assert main(["claims", "run", path, "--out", out, "--overwrite"]) == 0
    assert "drawn (call)" in capsys.readouterr().out


def test_claims_share_a_run(write_claim: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claims with different arms and metrics do what they have in common once."""
    first = write_claim(run="both").rename(tmp_path / "first.yaml")
    other = {"arms": {"best": {"gain": 0.5}, "better": {"gain": 0.3}}, "metrics": {"rate": "drawn.correct"}}
    other["statements"] = [{"metric": "rate", "better": "best", "worse": "better", "bound": -0.5}]
    second = write_claim(run="both", **other).rename(tmp_path / "second.yaml")
    command = ["claims", "run", str(first), str(second), "--out", str(tmp_path / "runs")]
    for arguments, jobs in ((command, 15), ([*command, "--overwrite"], 0)):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert text.count("drawn (call)") == jobs  # gains of 0, 0.3 and 0.5 in every seed, once each; and they stay
        assert ("may be those of other claims, and stay" in " ".join(text.split())) == (not jobs)
        assert "first: reproduced" in text
        assert "second: reproduced" in text
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["both", "first", "second"]
    assert [folder.name for folder in (tmp_path / "runs" / "both").iterdir()] == ["units"]
    second.unlink()
    assert main(["claims", "run", str(write_claim(run="both").rename(second)), "--out", str(tmp_path / "runs")]) == 2
    assert "begun under other settings" in capsys.readouterr().err


def test_a_statement_about_what_the_run_lacks(write_claim: Write, tmp_path: Path) -> None:
    path = write_claim(run="both")
    summary_of(path, tmp_path / "out")
    for part in (tmp_path / "out" / "parts").rglob("*.jsonl"):
        part.write_text(part.read_text().replace('"correct"', '"incorrect"'))
    with pytest.raises(DataError, match="the arm 'better' has no 'correct'"):
        summary_of(path, tmp_path / "out")


def test_the_list_goes_on_past_a_broken_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stepkd.cli import claims

    broken = tmp_path / "a.yaml"
    broken.write_text("claim: x\n")
    found = {"a": broken, **claims.all_claims()}
    monkeypatch.setattr(claims, "all_claims", lambda: found)
    assert main(["claims", "list"]) == 2
    text = capsys.readouterr().out
    assert "needs the key 'source'" in text
    assert "noisy_student" in text


def test_quick_has_a_folder_of_its_own(write_claim: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_claim())
    assert main(["claims", "quick", path, "--out", str(tmp_path / "runs")]) == 0
    assert "its verdict is not the claim's" in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["fake-quick"]
    assert main(["claims", "quick", path, "--save=true"]) == 2
    assert "'save' is not a setting" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_mistakes_on_the_command_line(
    write_claim: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["claims", "run"]) == 2
    assert "name at least one claim" in capsys.readouterr().err
    assert main(["claims", "run", "noisy_studnt"]) == 2
    assert "Did you mean 'noisy_student'?" in capsys.readouterr().err
    out = tmp_path / "runs"
    broken = write_claim(seeds=[0]).rename(tmp_path / "broken.yaml")
    broken.write_text(broken.read_text().replace("seeds", "seedz", 1))
    assert main(["claims", "run", str(write_claim()), str(broken), "--out", str(out)]) == 2
    assert "no key 'seedz'" in capsys.readouterr().err
    assert not out.exists()  # every claim is read before any runs
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["claims", "run", str(write_claim()), "--out", str(out)]) == 2
    assert "without a launcher" in capsys.readouterr().err


@pytest.mark.parametrize("count", [5, 6])
def test_many_arms_are_rows(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    number = {"value": 0.25, "low": 0.25, "high": 0.25}
    arms = {f"arm{i}": {"correct": number, "steps": number} for i in range(count)}
    summary = {"claim": "c", "source": "s", "seeds": [0], "metrics": {"main": arms}, "statements": []}
    print_results(Console(width=100), "name", summary | {"verdict": "inconclusive"})
    header = next(line for line in capsys.readouterr().out.splitlines() if "┃" in line and line.strip("┃ "))
    assert ("arm4" in header) == (count == 5)
    assert ("steps" in header) == (count == 6)
