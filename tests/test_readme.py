"""README and docs say what is true: commands, recipes, files, names exist; CI runs the test command to the letter."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stepkd.claims.results import NOT_RUN
from stepkd.cli import COMMANDS, TRAINER_COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "training.md", *sorted((ROOT / "docs").glob("*.md"))]
"""In the order in which a reader meets their commands: what a run makes, later pages use."""
DOCUMENTS = [*dict.fromkeys(PAGES), ROOT / "recipes" / "README.md", ROOT / "recipes" / "claims" / "README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "stepkd").rglob("*.py")))


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
    commands = set(re.findall(r"(?:^|[`&] ?)stepkd ([a-z]+(?:-[a-z]+)*)\b", text, re.MULTILINE))
    assert commands or path.parent.name == "docs", "no command found"
    assert commands <= {*COMMANDS, *TRAINER_COMMANDS}, commands - {*COMMANDS, *TRAINER_COMMANDS}
    for name in set(re.findall(r"recipes/[\w./-]+\.yaml", text)):
        assert (ROOT / name).is_file(), name
    for module in set(re.findall(r"`(stepkd/[\w/]+\.py)`", text)):
        assert (ROOT / module).is_file(), module
    for name in set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", text)):
        assert re.search(rf"\b{name}\b", SOURCE), name


def test_contributing_names_where_things_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where is what")[2].partition("\n## ")[0]
    assert 6 < len(text.strip().splitlines()) <= 12
    for path in (found := re.findall(r"`([\w/]+\.(?:py|yaml))`", text)):
        assert (ROOT / "stepkd" / path).is_file(), path
    named = re.findall(r"`([\w/]+)\.py`: `([\w.]+)`", text)
    assert len(named) >= len(found) - 1, "a file of code stands with the name to read there"
    for module, name in named:
        home = importlib.import_module(f"stepkd.{module.removesuffix('/__init__').replace('/', '.')}")
        assert functools.reduce(getattr, name.split("."), home)


def test_verdicts_in_the_readme_are_those_of_the_results() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\w ]+) \|$", README, re.MULTILINE)
    results = {
        path.stem: json.loads(path.read_text()) for path in (ROOT / "recipes" / "claims" / "results").glob("*.json")
    }
    verdicts = {name: NOT_RUN if result.get("stale") else result["verdict"] for name, result in results.items()}
    assert dict(rows) == verdicts


def test_messages_of_the_troubleshooting_page_are_real() -> None:
    """Every part of a message between dots and values stands in the code."""
    code = re.sub(r'"\s*\n\s*f?"', "", SOURCE)  # strings over several lines
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in code, message


# ---- code blocks ----------------------------------------------------------------------------------------------------

TEXT = "\n".join(path.read_text(encoding="utf-8") for path in dict.fromkeys(PAGES))


def commands() -> list[list[str]]:
    """The ``stepkd`` commands of README's and docs' blocks, as words, in their order, save those with dots."""
    blocks = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE) if not kind]
    lines = [line for line in "\n".join(blocks).replace("\\\n", " ").splitlines() if "stepkd " in line]
    found = [shlex.split(line, comments=True) for line in lines]
    words = [line[line.index("stepkd") :] for line in found if "stepkd" in line]
    return [line[1:] for line in words if line[1:] and "..." not in line]


def header_commands() -> list[list[str]]:
    """The ``stepkd`` commands of the recipes' headers, each once; some leave out what the one before has."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
    lines = [line for text in texts for line in re.sub(r"\\\n# +", "", text).splitlines()]
    found = dict.fromkeys(line[4:].split("   ")[0] for line in lines if re.match(r"#   stepkd [a-z]", line))
    return [shlex.split(line, comments=True)[1:] for line in found if "..." not in line]


def test_commands_can_be_pasted() -> None:
    assert len(commands()) > 15
    for words in commands():
        for word in words:
            assert word == "VLLM" or not re.search(r"\b[A-Z]{4,}\b", word), f"{words}: {word} is to be filled in"


def named(words: Sequence[str]) -> set[str]:
    """Files and folders of one's own that a command names, and its recipes."""
    own = {match for word in words for match in re.findall(r"(?:runs|models|data)/[\w./-]+", word)}
    recipes = [ROOT / word for word in words if word.startswith("recipes/")]
    return own | {match for path in recipes for match in re.findall(r"path: (runs/[\w./-]+)", path.read_text())}


def test_every_folder_is_made_by_a_command_above() -> None:
    made: set[str] = set()
    for words in commands():
        out = next((words[words.index(name) + 1] for name in ("--out", "--to") if name in words), "")
        missing = {name for name in named(words) - {out} if not any(is_in(name, folder) for folder in made)}
        assert not missing, f"stepkd {' '.join(words)}: no command above makes {missing}"
        made.add(out)


def is_in(name: str, folder: str) -> bool:
    return bool(folder) and (name == folder or name.startswith(f"{folder}/"))


@pytest.mark.parametrize(
    "words",
    [*commands(), *(pytest.param(words, marks=pytest.mark.slow) for words in header_commands())],
    ids=lambda words: "_".join(words)[:60],
)
def test_commands_of_documents_and_of_recipes_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command's own parser takes it; nothing is run."""
    monkeypatch.chdir(ROOT)
    ran: list[str] = []
    if words[0] in TRAINER_COMMANDS:
        from stepkd.training.fit import StepkdCLI

        monkeypatch.setattr(StepkdCLI, "before_instantiate_classes", lambda self: ran.append(words[0]))
        for name in ("instantiate_classes", "_run_subcommand"):
            monkeypatch.setattr(StepkdCLI, name, lambda *arguments: None)
    else:
        module = importlib.import_module(f"stepkd.cli.{words[0].replace('-', '_')}")

        @functools.wraps(module.run)  # the command line reads the settings' class off it
        def run(config: Any) -> int:
            ran.append(words[0])
            return 0

        monkeypatch.setattr(module, "run", run)
    assert main(words) == 0
    assert ran == [words[0]]


def test_the_method_of_the_guide_is_supervised_fine_tuning(tmp_path: Path) -> None:
    """As printed; a few steps in the tiny world give SFTModule's weights."""
    import torch
    from lightning.pytorch import Trainer, seed_everything

    from stepkd.data.config import DataConfig
    from stepkd.data.datamodule import StepData
    from stepkd.models.spec import PolicyConfig
    from stepkd.modules.sft import SFTModule

    scope: dict[str, Any] = {"__name__": "readme"}
    guide = (ROOT / "docs" / "writing_a_method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "writing_a_method.md", "exec"), scope)
    weights = []
    for method in (scope["MyModule"], SFTModule):
        seed_everything(0)
        task = DataConfig(source="task", options={"task": "modular:terms=2,modulus=10", "n": 8})
        data = StepData(train=task, validation=task, template="task", global_batch_size=4)
        module = method(PolicyConfig(path="tiny-0.1m"), loss_weights={"ce": 0.5})
        trainer = Trainer(
            max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            default_root_dir=tmp_path, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
        assert module.loss_names == ("ce",)
        assert float(trainer.callback_metrics["train/loss"]) > 0
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)
