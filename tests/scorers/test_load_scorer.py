"""A scorer from one word: kinds, the run's own template, options that do not fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, ModelError
from stepkd.models.checkpoint import save_policy
from stepkd.models.policy import Policy
from stepkd.models.source import save_template, trained_template
from stepkd.models.step_head import StepHeadConfig
from stepkd.scorers.calibration import TemperatureScaling
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.load import ScorerOptions, load_scorer, parse_head, pick_device
from stepkd.scorers.prm import PRMScorer
from stepkd.scorers.rules import CheckerScorer
from stepkd.steps.format import StepFormat

TASK = ScorerOptions(template="task", device="cpu")


@pytest.fixture
def export(tmp_path: Path, make_policy: Callable[..., Policy]) -> Path:
    """An exported reward model."""
    save_policy(make_policy(StepHeadConfig(meaning="value"), dtype="float32"), tmp_path / "prm")
    return tmp_path / "prm"


def with_template(folder: Path, template: object) -> Path:
    """A run folder of version 0.1: ``config.yaml`` beside a checkpoint that says nothing of a template."""
    import yaml

    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "stepkd": {"policy": {}}}, folder / "checkpoints" / "last.ckpt")
    config = {"data": {"class_path": "stepkd.data.StepLabelData", "init_args": {"template": template}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_checker_and_judge() -> None:
    assert isinstance(load_scorer("checker"), CheckerScorer)
    judge = load_scorer("judge:tiny-0.1m", ScorerOptions(answers=("Y", "N"), reference=True, device="cpu", max_rows=3))
    assert isinstance(judge, PromptedJudge)
    assert (judge.reference, judge.max_rows) == (True, 3)
    assert judge.yes_ids == (judge.tokenizer.convert_tokens_to_ids("Y"),)
    assert judge.provenance()["model"] == "tiny-0.1m"


def test_an_export_is_a_reward_model(export: Path) -> None:
    for text in (str(export), f"prm:{export}"):
        options = dataclasses.replace(TASK, dtype="float64", max_length=99, max_rows=5, shared_prefix=False)
        scorer = load_scorer(text, options)
        assert isinstance(scorer, PRMScorer)
        assert (scorer.meaning, scorer.max_length, scorer.max_rows, scorer.shared_prefix) == ("value", 99, 5, False)
        assert scorer.provenance()["dtype"] == "float64"
        assert scorer.provenance()["model"] == str(export)
    with pytest.raises(ConfigError, match="does not say which prompt template it was trained with"):
        load_scorer(str(export))


def test_a_plain_model_needs_a_head() -> None:
    with pytest.raises(ModelError, match="this model scores no steps"):
        load_scorer("tiny-0.1m", TASK)
    head = parse_head('{"kind": "classifier", "format": {"marker": null}, "classes": 3}')
    assert head == StepHeadConfig(kind="classifier", format=StepFormat(marker=None), classes=3)
    scorer = load_scorer("tiny-0.1m", dataclasses.replace(TASK, head=head))
    assert isinstance(scorer, PRMScorer)
    assert scorer.policy.require_step_head().spec == head


def test_the_template_of_a_run(tmp_path: Path) -> None:
    assert trained_template(str(tmp_path)) is None
    run = with_template(tmp_path / "run", "gsm8k")
    assert (
        trained_template(str(run)) == trained_template(str(run / "checkpoints" / "last.ckpt")) == get_template("gsm8k")
    )
    own = PromptTemplate(style="plain", plain="Q: {prompt}\n", few_shot=1)
    values = dataclasses.asdict(own)
    assert trained_template(str(with_template(tmp_path / "run", values))) == own
    assert trained_template(str(with_template(tmp_path / "run", {"class_path": "x", "init_args": values}))) == own
    assert trained_template(str(with_template(tmp_path / "run", None))) is None
    (run / "config.yaml").unlink()
    assert trained_template(str(run)) is None


def test_the_template_of_an_export(export: Path) -> None:
    own = PromptTemplate(style="plain", plain="Frage: {prompt}\n", few_shot=1, chat_kwargs={"enable_thinking": False})
    save_template(own, export)
    assert trained_template(export) == own
    scorer = load_scorer(str(export), ScorerOptions(device="cpu"))
    assert isinstance(scorer, PRMScorer)
    assert scorer.template == own
    for text in ("{", "[1]", '{"unheard_of": 1}'):
        (export / "prompt_template.json").write_text(text)
        with pytest.raises(ModelError, match=r"cannot be used \(.*prompt_template\.json.*give one \(--template\)"):
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
        load_scorer(text, TASK)


@pytest.mark.parametrize(
    ("text", "options", "name"),
    [
        ("checker", {"template": "task"}, "template"),
        ("checker", {"temperature": TemperatureScaling(2.0, 1.0, 1.0, 1)}, "temperature"),
        ("judge:tiny-0.1m", {"template": "math"}, "template"),
        ("judge:tiny-0.1m", {"head": StepHeadConfig()}, "head"),
        ("judge:tiny-0.1m", {"separator": "\n"}, "separator"),
        ("tiny-0.1m", {"reference": True}, "reference"),
        ("tiny-0.1m", {"answers": ("Y", "N")}, "answers"),
        ("qwen-prm:x", {"head": StepHeadConfig()}, "head"),
    ],
)
def test_options_that_a_kind_has_no_use_for(text: str, options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=f"has no use for {name}: drop it"):
        load_scorer(text, ScorerOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the head setting is not JSON"),
        ("[1]", "must be a JSON object"),
        (json.dumps({"knd": "classifier"}), r"cannot be used: unknown step head settings \['knd'\]"),
        (json.dumps({"kind": "clasifier"}), "cannot be used: unknown head.kind 'clasifier'"),
        (json.dumps({"format": 3}), "cannot be used"),
    ],
)
def test_head_settings(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_head(text)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="device='gpu': must be auto, cpu, cuda or cuda:N"):
        pick_device("gpu")
    with pytest.raises(ConfigError, match=r"device='cuda:99', but (no CUDA|this machine has \d+ CUDA)"):
        pick_device("cuda:99")
