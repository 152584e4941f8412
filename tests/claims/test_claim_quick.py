"""Every experiment runs from end to end in its quick version, and returns what its claim's statements need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepkd.claims.claim_file import load_claim
from stepkd.claims.experiment import experiment_names
from stepkd.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2] / "recipes" / "claims"


@pytest.mark.parametrize("experiment", experiment_names())
def test_quick_claim(experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = [load_claim(path, quick=True) for path in sorted(ROOT.glob("*.yaml"))]
    claim = next(each for each in claims if each.experiment_name == experiment)
    assert main(["claims", "quick", claim.name, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "claims quick: a smaller experiment" in " ".join(shown.split())
    rows = [json.loads(line) for line in (tmp_path / claim.run / "results.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows if "arm" in row} == set(claim.arms)
    # A second time nothing is left to do, and the same rows are shown.
    assert main(["claims", "quick", claim.name, "--out", str(tmp_path)]) == 0
    assert "done in" not in capsys.readouterr().out
