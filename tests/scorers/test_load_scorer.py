"""A scorer from one word: kinds, the run's own template, options that do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepkd.data.templates import PromptTemplate
from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import save_policy
from stepkd.models.policy import Policy
from stepkd.models.source import save_template, trained_template
from stepkd.models.spec import Classifier, LabelTokens
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.load import PRM, Judge, load_scorer, pick_device, scorer_of
from stepkd.scorers.prm import PRMScorer
from stepkd.scorers.rules import Checker
from stepkd.steps.format import StepFormat


@pytest.fixture
def export(tmp_path: Path, make_policy: Callable[..., Policy]) -> Path:
    """An exported reward model."""
    save_policy(make_policy(LabelTokens(meaning="value"), dtype="float32"), tmp_path / "prm")
    return tmp_path / "prm"


def with_template(folder: Path, template: dict[str, object] | None) -> Path:
    """A run folder whose checkpoint says which template the model was trained with."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    own = {"policy": {}, "template": template}
    torch.save({"state_dict": {}, "stepkd": own}, folder / "checkpoints" / "last.ckpt")
    return folder


def test_checker_and_judge() -> None:
    assert isinstance(load_scorer("checker"), Checker)
    judge = load_scorer(Judge("tiny-0.1m", answers=("Y", "N"), reference=True), device="cpu", max_rows=3)
    assert isinstance(judge, PromptedJudge)
    assert (judge.reference, judge.max_rows) == (True, 3)
    assert judge.yes_ids == (judge.tokenizer.convert_tokens_to_ids("Y"),)
    assert judge.provenance()["model"] == "tiny-0.1m"


def test_an_export_is_a_reward_model(export: Path) -> None:
    for text in (str(export), f"prm:{export}"):
        assert scorer_of(text) == PRM(str(export))
        config = PRM(str(export), template="task", dtype="float64", max_length=99)
        scorer = load_scorer(config, device="cpu", max_rows=5)
        assert isinstance(scorer, PRMScorer)
        assert (scorer.meaning, scorer.max_length, scorer.max_rows) == ("value", 99, 5)
        assert scorer.provenance()["dtype"] == "float64"
        assert scorer.provenance()["model"] == str(export)
    told = load_scorer(PRM(str(export), template="task", meaning="outcome"), device="cpu")
    assert told.meaning == told.provenance()["meaning"] == "outcome", "read otherwise than it was trained"
    with pytest.raises(ConfigError, match="does not say which prompt template it was trained with"):
        load_scorer(str(export))


def test_a_plain_model_needs_a_head() -> None:
    with pytest.raises(ModelError, match="this model scores no steps"):
        load_scorer(PRM("tiny-0.1m", template="task"), device="cpu")
    head = Classifier(format=StepFormat(marker=None), classes=3)
    scorer = load_scorer(PRM("tiny-0.1m", template="task", head=head), device="cpu")
    assert isinstance(scorer, PRMScorer)
    assert scorer.policy.require_step_head().spec == head


def test_the_template_of_a_run(tmp_path: Path) -> None:
    assert trained_template(str(tmp_path)) is None
    own = PromptTemplate(style="plain", plain="Q: {prompt}\n", few_shot=1)
    run = with_template(tmp_path / "run", dataclasses.asdict(own))
    assert trained_template(str(run)) == trained_template(str(run / "checkpoints" / "last.ckpt")) == own
    assert trained_template(str(with_template(tmp_path / "run", None))) is None


def test_the_template_of_an_export(export: Path) -> None:
    own = PromptTemplate(style="plain", plain="Frage: {prompt}\n", few_shot=1, chat_kwargs={"enable_thinking": False})
    save_template(own, export)
    assert trained_template(export) == own
    scorer = load_scorer(str(export), device="cpu")
    assert isinstance(scorer, PRMScorer)
    assert scorer.template == own
    for text in ("{", "[1]", '{"unheard_of": 1}'):
        (export / "prompt_template.json").write_text(text)
        with pytest.raises(ModelError, match=r"cannot be used \(.*prompt_template\.json.*give one \(template: "):
            trained_template(export)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("juge:tiny-0.1m", "unknown kind of scorer 'juge' in 'juge:tiny-0.1m'. Did you mean 'judge'?"),
        ("checker:x", r"unknown kind of scorer 'checker' .* \(checker, arithmetic, gain stand alone\)"),
        ("judge:", "'judge:' names no model: write judge:PATH"),
    ],
)
def test_words_that_are_no_scorer(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scorer(text)


def test_a_built_in_template_is_no_judges() -> None:
    with pytest.raises(ConfigError, match="template 'math' asks for a solution"):
        Judge("tiny-0.1m", template="math")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="device='gpu': must be auto, cpu, cuda or cuda:N"):
        pick_device("gpu")
    with pytest.raises(ConfigError, match=r"device='cuda:99', but (no CUDA|this machine has \d+ CUDA)"):
        pick_device("cuda:99")
