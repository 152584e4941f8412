"""A scorer from one command-line word."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from stepkd.data.templates import TEMPLATES, PromptTemplate, get_template
from stepkd.errors import ConfigError, nearest
from stepkd.models.checkpoint import find_checkpoint, load_trained
from stepkd.models.source import trained_template
from stepkd.models.step_head import StepHeadConfig, step_head_from_dict
from stepkd.runs.launcher import LaunchInfo
from stepkd.scorers.calibration import TemperatureScaling
from stepkd.scorers.judge import JUDGE_TEMPLATE, PromptedJudge
from stepkd.scorers.prm import PRMScorer
from stepkd.scorers.published import PublishedKind, load_published, recognise
from stepkd.scorers.rules import ArithmeticScorer, CheckerScorer, GainScorer
from stepkd.scorers.scorer import StepScorer

ScorerKind = Literal["prm", "judge", "checker", "arithmetic", "gain", "math-shepherd", "qwen-prm", "trl"]
"""Kinds of scorers by the word before the colon: a reward model of stepkd (run folder, checkpoint, export, or a plain
model with a head setting); any language model, asked whether each step is correct; the exact checker of the tiny world;
the sums that a step writes out, done again, everything else passes; what of the row's solution a step adds, less what
it says again; published models with the layout of math-shepherd-mistral-7b-prm, of Qwen2.5-Math-PRM, and token
classification models trained by TRL's PRMTrainer."""
_WITHOUT_MODEL: dict[str, Callable[[], StepScorer]] = {
    "checker": CheckerScorer,
    "arithmetic": ArithmeticScorer,
    "gain": GainScorer,
}
"""Scorers that stand alone, without a model."""


@dataclasses.dataclass(frozen=True)
class ScorerOptions:
    """How a scorer is loaded and run; what a kind has no use for is refused, not ignored."""

    template: str | PromptTemplate | None = None
    """Prompt template, a name or a YAML file; None: that of the run, of the published model, or of the judge. A judge
    takes no built-in one: those ask for a solution."""
    head: StepHeadConfig | None = None
    """How a plain model scores steps (``prm``)."""
    reference: bool = False
    """Show the gold solution to the model (``judge``)."""
    answers: tuple[str, str] | None = None
    """The tokens for yes and no (``judge``); None: the usual forms."""
    separator: str | None = None
    """Separator it was trained with (``trl``); None: a newline."""
    dtype: str | None = None
    """Weights' dtype; None: as stored."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU when there is one."""
    attention: str | None = None
    """Attention implementation; None lets transformers choose."""
    max_length: int | None = None
    """Longest row in tokens; None: the model's context."""
    max_rows: int = 32
    """Most rows in one forward pass."""
    shared_prefix: bool = True
    """Read what rows have in common once."""
    temperature: TemperatureScaling | None = None
    """Scaling of the scores."""


def load_scorer(text: str, options: ScorerOptions | None = None) -> StepScorer:
    """Load a scorer.

    Args:
        text: ``judge:MODEL``, ``checker``, ``arithmetic``, ``gain``, ``prm:PATH``, ``math-shepherd:PATH``,
            ``qwen-prm:PATH``, ``trl:PATH``; or a path or hub id alone, whose kind is told from what is there.
        options: see :class:`ScorerOptions`.

    Raises:
        ConfigError: an unknown kind, an option that the kind has no use for, no template to be found, or an
            impossible device.
        ModelError: nothing loadable there, or a model without a step head.
    """
    options = options or ScorerOptions()
    kind, path = _split(text)
    _check_options(kind, options)
    if kind in _WITHOUT_MODEL:
        return _WITHOUT_MODEL[kind]()
    device = pick_device(options.device)
    weights: dict[str, Any] = {"dtype": options.dtype, "attention": options.attention}
    same = ("max_length", "max_rows", "shared_prefix", "temperature")
    reading: Any = {name: getattr(options, name) for name in same} | {"name": path}
    scorer: PRMScorer | PromptedJudge
    if kind == "judge":
        policy = load_trained(path, **weights)
        asked = JUDGE_TEMPLATE if options.template is None else options.template
        yes, no = ([form] for form in options.answers) if options.answers else (None, None)
        scorer = PromptedJudge(policy, template=asked, yes=yes, no=no, reference=options.reference, **reading)
    elif kind in get_args(PublishedKind):
        if options.separator is not None:
            weights["separator"] = options.separator
        scorer = load_published(path, cast(PublishedKind, kind), template=options.template, **weights, **reading)
    else:
        policy = load_trained(path, **weights)
        if options.head is not None:
            policy.attach_step_head(options.head)
        policy.require_step_head()
        template = trained_template(path) if options.template is None else get_template(options.template)
        if template is None:
            raise ConfigError(
                f"{path} does not say which prompt template it was trained with: give one (--template "
                f"{', '.join(TEMPLATES)}, or a YAML file)"
            )
        scorer = PRMScorer(policy, template=template, **reading)
    scorer.policy.to(device)
    return scorer


def parse_head(text: str) -> StepHeadConfig:
    """Read a head setting from JSON, as in ``step_head.json``.

    Raises:
        ConfigError: not a JSON object, unknown keys, or settings that contradict each other.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the head setting is not JSON ({error}): {text!r}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'the head setting must be a JSON object such as {{"kind": "label_tokens"}}, found {text!r}')
    try:
        return step_head_from_dict({"labels": StepHeadConfig().labels, **values})
    except Exception as error:  # unknown keys, values of a wrong type
        raise ConfigError(f"the head setting {text!r} cannot be used: {error}") from error


def pick_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ConfigError: not a device, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but no CUDA device is available: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def rank_device(name: str, launch: LaunchInfo) -> str:
    """The name of the device of one process of a launch: ``auto`` is a GPU for each where there are several of both."""
    if name == "auto" and launch.local_world_size > 1 and torch.cuda.is_available():
        return f"cuda:{launch.local_rank % torch.cuda.device_count()}"
    return name


def _split(text: str) -> tuple[ScorerKind, str]:
    """Kind and path of a scorer's text."""
    word, colon, path = text.partition(":")
    if text in _WITHOUT_MODEL:
        return cast(ScorerKind, text), ""
    if colon and "/" not in word and "." not in word and not Path(text).exists():
        if word not in get_args(ScorerKind) or word in _WITHOUT_MODEL:
            raise ConfigError(
                f"unknown kind of scorer {word!r} in {text!r}.{nearest(word, get_args(ScorerKind))} Known: "
                f"{', '.join(get_args(ScorerKind))} ({', '.join(_WITHOUT_MODEL)} stand alone)"
            )
        if not path:
            raise ConfigError(f"{text!r} names no model: write {word}:PATH")
        return cast(ScorerKind, word), path
    own = (Path(text).expanduser() / "step_head.json").is_file() or find_checkpoint(Path(text).expanduser()) is not None
    return cast(ScorerKind, ("prm" if own else recognise(text)) or "prm"), text


def _check_options(kind: ScorerKind, options: ScorerOptions) -> None:
    uses = {
        "head": kind == "prm",
        "reference": kind == "judge",
        "answers": kind == "judge",
        "separator": kind == "trl",
        "template": kind not in _WITHOUT_MODEL and not (kind == "judge" and options.template in (*TEMPLATES,)),
        "temperature": kind not in _WITHOUT_MODEL,
    }
    for name, used in uses.items():
        if getattr(options, name) not in (None, False) and not used:
            raise ConfigError(f"the scorer {kind!r} has no use for {name}: drop it")
