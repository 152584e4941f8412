"""``stepkd evaluate-prm``, ``best-of-n``, and ``compare`` of step scorers from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepkd.cli import main

DATA = 'task:task="modular:terms=3",n=8,noise.rate=0.4,split=test'


def evaluate(out: Path, *extra: str) -> int:
    return main(["evaluate-prm", "--scorer", "checker", "--sets", DATA, "--out", str(out), *extra])


def test_tables_figures_and_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(tmp_path / "a", "--tune-on", DATA) == 0
    shown = capsys.readouterr().out
    for text in (
        "first incorrect step",
        "always",
        "positive",
        "tuned",
        "AUROC",
        "Brier skill",
        "expected by chance",
        "are swapped",
    ):
        assert text in " ".join(shown.split()), text
    figures = sorted(path.name for path in (tmp_path / "a").glob("*.svg"))
    assert [name.split("-")[0] for name in figures] == ["argmin", "reliability"]
    assert evaluate(tmp_path / "b", "--figures", "false") == 0
    assert not list((tmp_path / "b").glob("*.svg"))
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "fixed" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    assert f"{DATA}, fixed" in json.loads((tmp_path / "c" / "comparison.json").read_text())


def test_mean_f1_is_compared_with_a_published_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums that are not written out are never faulted: all solutions count as correct, F1 0."""
    folder = tmp_path / "processbench"
    folder.mkdir()
    names = ("gsm8k", "math", "olympiadbench", "omnimath")
    for name in names:
        rows = [{"id": f"{name}-{i}", "problem": f"p{i}", "steps": ["a", "b"], "label": i % 2 - 1} for i in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "parity.yaml"
    recipe.write_text("reference: {value: 90, low: 85, high: 95, source: a table, settings: none, ran: not run here}\n")
    words = ["evaluate-prm", "--scorer", "arithmetic", "--processbench", str(folder), "--config", str(recipe)]
    words += ["--out", str(tmp_path / "out"), "--figures", "false"]
    assert main([*words, "--check_parity"]) == 2
    assert "sets lacks olympiadbench, omnimath" in capsys.readouterr().err
    words += ["--sets", *names]
    assert main([*words, "--check_parity"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "mean of" in shown
    assert "parity: differ. Measured 0.0 (0.0 to" in shown
    assert main(words) == 0, "without --check_parity it is only said"


def test_prmbench_has_a_row_for_every_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = {"modified_question": "p", "modified_process": ["1+1=2", "1+1=3"], "error_steps": [2, 4]}
    items = [{**item, "idx": f"t{i}", "classification": kind} for i in range(3) for kind in ("circular", "deception")]
    (tmp_path / "subset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    words = [
        *("evaluate-prm", "--scorer", "arithmetic", "--limit", "2"),
        *("--sets", f"prmbench:path={tmp_path}/subset.jsonl"),
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("PRMScore over all steps", "circular", "deception", "4 error numbers lie behind", "called late"):
        assert text in shown, text
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in ("PRMScore: out", "deception", "first incorrect step", "correct steps"):
        assert text in page, text


def test_best_of_n(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"problem_id": p, "sample": i, "completion": f"#### {i}", "answer": "1", "correct": i == 1, "score": i / 4}
        for p in ("p", "q")
        for i in range(4)
    ]
    path = tmp_path / "scores" / "results.jsonl"  # the folder of stepkd score, or the file
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["best-of-n", f"prm={path}", f"orm={path.parent}", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "best-of-N on 2 problems" in shown
    assert "prm_vote" in shown
    assert "from N=2 to 4, prm - majority grows by" in " ".join(shown.split())
    assert (tmp_path / "out" / "best_of_n.svg").is_file()
    assert json.loads((tmp_path / "out" / "best_of_n.json").read_text())["ks"] == [1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["best-of-n", "scores.jsonl"], "write NAME=PATH"),
        (["best-of-n", "prm=a.jsonl", "prm=b.jsonl"], "'prm' is given twice (a.jsonl and b.jsonl)"),
        (["best-of-n", "prm=a.jsonl", "--seed", "-1"], "seed=-1"),
        (["evaluate-prm", "--scorer", "checker", "--seed", "-1", "--out", "OUT"], "seed=-1"),
        (
            ["evaluate-prm", "--scorer", "checker", "--sets", DATA, "--processbench", "here", "--out", "OUT"],
            "processbench=here is the folder of ProcessBench's files",
        ),
        (["evaluate-prm", "--scorer", "checker"], "give --out"),
        (["evaluate-prm", "--scorer", "checker", "--sets", "gms8k", "--out", "OUT"], "Did you mean 'gsm8k'?"),
        (["evaluate-prm", "--scorer", "tiny-0.1m", "--sets", DATA, "--out", "OUT"], "step head"),
        (
            ["evaluate-prm", "--scorer", "checker", "--out", "OUT", "--sampling.n", "8"],
            "'sampling' is not a setting",
        ),
        (
            ["evaluate-prm", "--scorer", "PRM", "--scorer.path", "m", "--scorer.reference", "true", "--out", "OUT"],
            "'reference' is not a setting of scorer",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_scorer_is_named_by_its_class_in_a_process_that_has_imported_nothing_else() -> None:
    words = ["evaluate-prm", "--config", "parity/qwen2.5-math-prm-7b", "--out", "x", "--print_config"]
    ran = subprocess.run([sys.executable, "-m", "stepkd", *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "path: Qwen/Qwen2.5-Math-PRM-7B" in ran.stdout


def test_a_plain_model_with_a_head_and_a_temperature(tmp_path: Path) -> None:
    head = ["--scorer", "PRM", "--scorer.path", "tiny-0.1m", "--scorer.template", "task"]
    head += ["--scorer.head", "Classifier", "--figures", "false"]
    common = ["evaluate-prm", "--sets", DATA, "--device", "cpu", *head]
    assert main([*common, "--out", str(tmp_path / "a")]) == 0
    assert main([*common, "--out", str(tmp_path / "b"), "--scorer.temperature", "4"]) == 0
    plain, scaled = (
        [
            score
            for line in (tmp_path / out / "results.jsonl").read_text().splitlines()
            for score in json.loads(line)["scores"]
        ]
        for out in "ab"
    )
    assert all(abs(b - 0.5) < abs(a - 0.5) for a, b in zip(plain, scaled, strict=True))
