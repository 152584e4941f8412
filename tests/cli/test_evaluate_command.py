"""``stepkd evaluate`` from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stepkd.cli import main
from stepkd.data.sources import BENCHMARKS
from stepkd.data.templates import EXEMPLARS
from stepkd.runs.job import read_results, read_settings
from stepkd.runs.launcher import LaunchInfo

SMALL = ["--model", "tiny-0.1m", "--benchmark", "task", "--data", "task=modular:terms=3,n=4", "--device", "cpu"]
SHORT = ["--sampling.max-new-tokens", "8", "--engine.max-rows", "2"]


def run(*arguments: str) -> int:
    return main(["evaluate", *SMALL, *SHORT, *arguments])


def prompt(out: Path) -> str:
    return str(read_results(out)[0]["prompt"])


def test_run_and_summary_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "an [odd] name"
    assert (
        run(
            "--out",
            str(out),
            "--sampling.n",
            "2",
            "--sampling.temperature",
            "0.9",
            "--dtype",
            "float64",
            "--sampling.seed",
            "3",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert re.search(r"evaluating 4/4  correct \d+\.\d%  [\d.k]+ tokens/s", shown)
    for text in ("tiny-0.1m on task: 4 problems", "pass@1", "pass@2", "maj@2", "unparsed_rate", "95%"):
        assert text in shown
    assert f"per-problem rows, settings and summary: {out}" in shown, "whole, whatever the width and the brackets"
    settings = read_settings(out)
    assert (settings["dtype"], settings["seed"], settings["batch_size"]) == ("float64", 3, 2)
    assert settings["sampling"]["n"] == 2
    assert json.loads((out / "summary.json").read_text())["samples"] == 8


def test_same_command_again_changes_nothing(tmp_path: Path) -> None:
    assert run("--out", str(tmp_path / "o")) == 0
    before = (tmp_path / "o" / "results.jsonl").read_bytes()
    assert run("--out", str(tmp_path / "o")) == 0
    assert (tmp_path / "o" / "results.jsonl").read_bytes() == before


def test_prompt_overrides(tmp_path: Path) -> None:
    flags = {
        "base": [],
        "shot": ["--few-shot", "1"],
        "system": ["--system", "Be brief."],
        "chat": ["--style", "chat"],
        "plain": ["--template", "plain"],
    }
    for name, extra in flags.items():
        assert run("--out", str(tmp_path / name), "--limit", "1", *extra) == 0
    base = prompt(tmp_path / "base")
    assert prompt(tmp_path / "shot").startswith(EXEMPLARS[0]["prompt"])
    assert prompt(tmp_path / "shot").endswith(base)
    assert prompt(tmp_path / "system") == f"Be brief.\n\n{base}"
    assert prompt(tmp_path / "chat") == f"user: {base}\nassistant: "
    assert prompt(tmp_path / "plain") == f"Question: {base}\nAnswer:\n"
    assert len({read_settings(tmp_path / name)["prompt"] for name in flags}) == len(flags)


def test_other_overrides_reach_the_settings(tmp_path: Path) -> None:
    flags = [
        "--grading.extractors",
        "boxed",
        "hash",
        "--grading.deadline_s",
        "1.5",
        "--sampling.stop",
        "a",
        "--sampling.stop",
        "b",
        "--attention",
        "eager",
    ]
    flags += [
        "--sampling.n",
        "2",
        "--sampling.temperature",
        "0.5",
        "--sampling.top-p",
        "0.9",
        "--sampling.top-k",
        "5",
        "--ks",
        "2",
    ]
    assert run("--out", str(tmp_path / "o"), "--limit", "1", *flags) == 0
    settings = read_settings(tmp_path / "o")
    assert settings["extractors"] == ["boxed", "hash"]
    assert settings["deadline_s"] == 1.5
    assert settings["attention"] == "eager"
    assert settings["sampling"] == {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_new_tokens": 8, "stop": ["a", "b"]
    }  # fmt: skip
    metrics = json.loads((tmp_path / "o" / "summary.json").read_text())["metrics"]
    assert [name for name in metrics if "@" in name] == ["pass@1", "pass@2", "maj@2", "avg@2"]


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert run("--out", str(a)) == 0
    assert run("--out", str(b), "--sampling.seed", "1") == 0
    capsys.readouterr()
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "new" / "c")]) == 0
    shown = capsys.readouterr().out
    assert "task: 4 problems in both runs" in shown
    assert "exact McNemar p = 1" in shown
    assert "seed: 0 -> 1" in shown
    written = json.loads((tmp_path / "new" / "c" / "comparison.json").read_text())
    assert (written["problems"], written["difference"]["value"]) == (4, 0.0)


def test_compare_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "no settings of a job there" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmarks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-3]] == [*BENCHMARKS]
    assert "stepkd evaluate-prm" in lines[-1]


def test_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert run("--out", str(out)) == 0
    assert run("--out", str(out), "--sampling.seed", "1") == 2
    assert "seed: 0 then, 1 now" in capsys.readouterr().err
    assert run("--out", str(out), "--sampling.seed", "1", "--overwrite") == 0
    assert read_settings(out)["seed"] == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "keep.txt").write_text("mine")
    assert run("--out", str(other), "--overwrite") == 2
    assert "is not empty (keep.txt) and holds no evaluation" in capsys.readouterr().err
    assert (other / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{out}"], "give --model"),
        (["--model", "tiny-0.1m"], "give --out"),
        (["--model", "tiny-0.1m", "--out", "{out}", "--benchmark", "gsm9k"], "unknown benchmark 'gsm9k'. Did you mean"),
        ([*SMALL, "--out", "{out}", "--sampling.n", "4"], "4 samples at temperature 0 would all be the same"),
        ([*SMALL, "--out", "{out}", "--ks", "3"], "k=3 of pass@k"),
        ([*SMALL, "--out", "{out}", "--few-shot", "9"], "few_shot=9: there are 4 built-in examples"),
        ([*SMALL, "--out", "{out}", "--engine.max-rows", "0"], "max_rows=0"),
        ([*SMALL, "--out", "{out}", "--sampling.max-new-tokens", "0"], "max_new_tokens=0: must be at least 1"),
        ([*SMALL, "--out", "{out}", "--limit", "0"], "limit=0"),
        ([*SMALL, "--out", "{out}", "--temperature", "1"], "did you mean --sampling.temperature?"),
        ([*SMALL, "--out", "{out}", "--threshold", "0.4"], "'threshold' is not a setting"),
        (["--benchmark", "processbench", "--model", "m", "--out", "{out}"], "stepkd evaluate-prm"),
        (["--model", "runs/none/here", "--benchmark", "task", "--out", "{out}"], "no model folder at runs/none/here"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    out = tmp_path / "o"
    assert main(["evaluate", *(argument.format(out=out) for argument in arguments)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("stepkd evaluate: ")
    assert message in errors
    assert not out.exists()


def test_model_folder_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    assert run("--model", str(tmp_path / "m"), "--out", str(tmp_path / "o")) == 2
    assert "holds a config.json but no weights" in capsys.readouterr().err


def test_ranks_of_a_launcher_share_the_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "alone")) == 0
    capsys.readouterr()
    for rank, said in enumerate(("rank 0 has done its share; the last rank to finish writes the results", "pass@1")):
        info = LaunchInfo(launcher="elastic", rank=rank, local_rank=rank, world_size=2, local_world_size=2)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
        monkeypatch.setattr("stepkd.runs.job.check_launch", lambda info=info: info)
        assert run("--out", str(tmp_path / "shared")) == 0
        shown = capsys.readouterr().out
        assert f"rank {rank}: evaluating 2/2" in shown
        assert said in shown
    for name in ("settings.json", "results.jsonl", "summary.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--model",
        "--benchmark",
        "--data",
        "--sampling.n",
        "--grading.extractors",
        "--overwrite",
        "--few_shot",
    ):
        assert option in shown


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [(50, 10, 90, "agree"), (99, 98, 100, "differ"), (50, 40, 60, "too few problems")],
)
def test_a_result_is_compared_with_the_published_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, low: float, high: float, verdict: str
) -> None:
    """Four problems of a random model, none correct: 0 to 49%."""
    recipe = tmp_path / "parity.yaml"
    texts = "source: a table, settings: greedy, ran: not run here"
    recipe.write_text(f"reference: {{value: {value}, low: {low}, high: {high}, {texts}}}\n")
    given = ("--config", str(recipe), "--out", str(tmp_path / "o"))
    assert run(*given, "--check_parity") == (verdict != "agree")
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"parity: {verdict}. Measured 0.0 (0.0 to 49.0), reference {value} (accepted {low} to {high}; a table)" in shown
    )
    assert run(*given) == 0, "without --check_parity it is only said"


def test_parity_without_a_reference_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", str(tmp_path / "o"), "--check_parity") == 2
    assert "check_parity compares with a reference, and there is none" in capsys.readouterr().err
