"""Quick versions run from end to end, and leave what their claims' statements need; claims that differ from these by
settings and arms alone are not all run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepkd.claims.claim_file import load_claim
from stepkd.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2] / "recipes" / "claims"
NAMES = (
    *("step_dpo", "iterated_step_kto", "cached_teacher", "prm_best_of_n", "implicit_prm", "binary_search_labels"),
    *("phi_decoding", "consensus_filter", "active_labels", "sorm_balance", "generative_verifier", "prm_distillation"),
    *("adaptive_step", "noisy_student", "step_kto_ablation"),
)


def test_claims_that_are_run_have_every_kind_of_job() -> None:
    kinds = {path.stem: {kind for kind, _ in load_claim(path, quick=True).wanted()} for path in ROOT.glob("*.yaml")}
    assert set().union(*(kinds[name] for name in NAMES)) == set().union(*kinds.values())


@pytest.mark.parametrize("name", NAMES)
def test_quick_claim(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = load_claim(ROOT / f"{name}.yaml", quick=True)
    assert main(["claims", "quick", name, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "claims quick: a smaller experiment" in " ".join(shown.split())
    rows = [json.loads(line) for line in (tmp_path / claim.folder / "results.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows if "arm" in row} == set(claim.arms)
    # A second time nothing is left to do, and the same rows are shown.
    assert main(["claims", "quick", name, "--out", str(tmp_path)]) == 0
    assert "done in" not in capsys.readouterr().out
