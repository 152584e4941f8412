"""The README says what is true: its commands, recipes and files exist, and CI runs its test command to the letter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepkd.cli import COMMANDS, TRAINER_COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "recipes" / "claims" / "README.md"]


def test_ci_runs_the_test_command_to_the_letter() -> None:
    blocks = re.findall(r"```\n(pip install [^\n]*)\n```", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2, "one command for the main job, one for the tests"
    assert blocks[0].endswith("&& stepkd quickstart")
    assert blocks[1].endswith("&& pytest")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"\n{blocks[1]}\n" in ci


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:^|[`\s])stepkd ([a-z]+(?:-[a-z]+)?)\b", text))
    assert commands, "no command found"
    assert commands <= {*COMMANDS, *TRAINER_COMMANDS}, commands - {*COMMANDS, *TRAINER_COMMANDS}
    for name in set(re.findall(r"recipes/[\w./-]+\.yaml", text)):
        assert (ROOT / name).is_file(), name
    for module in set(re.findall(r"`(stepkd/[\w/]+\.py)`", text)):
        assert (ROOT / module).is_file(), module
    for package in set(re.findall(r"`stepkd\.(\w+)`", text)):
        assert (ROOT / "stepkd" / package).is_dir(), package
