"""Settings of an iterated training: what they become, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepkd import cli
from stepkd.cli.iterate import IterateRunConfig
from stepkd.cli.parser import parse
from stepkd.errors import ConfigError, StepkdError
from stepkd.iteration import stages
from stepkd.iteration.spec import (
    IterateConfig,
    PairsConfig,
    StepPairs,
    TreePairs,
    explicit_word,
    iteration_seed,
)
from stepkd.iteration.stages import Iteration, training_settings
from stepkd.labels.convert import Preference
from stepkd.labels.labellers import TaskChecker
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.settings import Cut, LabelConfig, OwnSteps, Sampled, StepPairConfig, TreePairConfig
from stepkd.runs.job import Job
from stepkd.search.mcts import PairTreeConfig
from stepkd.training.fit import check_fit
from stepkd.yaml_files import find_recipe


def load_spec(path: Path, changes: dict[str, Any] | None = None) -> IterateConfig:
    """The settings of ``stepkd iterate --config FILE``, and dotted options."""
    words = [
        f"--{name}={each if isinstance(each, str) else json.dumps(each)}" for name, each in (changes or {}).items()
    ]
    config = parse(IterateConfig, ["--config", str(path), *words], command="iterate")
    assert isinstance(config, IterateConfig)
    return config


def iteration(spec: IterateConfig, out: Path, k: int) -> Iteration:
    return Iteration(spec, Job(out, "iterated training"), k, "", lambda line: None)


def drawn(job: LabelConfig) -> Sampled:
    assert isinstance(job.solutions, Sampled)
    return job.solutions


def test_jobs_of_an_iteration(small: Any, write: Any) -> None:
    spec = load_spec(write(small()), {"problems_per_iteration": 5, "evaluation.steps": "Cut"})
    first, second = (spec.label_spec(k, out="a", model=f"M{k - 1}") for k in (1, 2))
    problems = 'task:task="modular:terms=3,modulus=3",n=16,split=train'
    assert drawn(first).problems == f"{problems},offset=0,limit=5"
    assert drawn(second).problems == f"{problems},offset=5,limit=5"
    assert (drawn(first).sampling.n, first.labeller, drawn(first).dedupe) == (4, TaskChecker(), True)
    assert drawn(first).sampling.seed != drawn(second).sampling.seed
    held_out = [spec.held_out_spec(out="b", model=model) for model in ("M0", "M1")]
    assert drawn(held_out[0]).sampling == drawn(held_out[1]).sampling, "every model is sampled with the same noise"
    assert (drawn(held_out[0]).sampling.n, drawn(held_out[0]).dedupe, held_out[0].steps) == (4, False, Cut())
    assert first.steps == OwnSteps()


def test_the_same_problems_get_other_noise(small: Any, write: Any) -> None:
    spec = load_spec(write(small()))
    first, second = (spec.label_spec(k, out="a", model="m") for k in (1, 2))
    assert drawn(first).problems == drawn(second).problems
    assert drawn(first).sampling.seed != drawn(second).sampling.seed
    assert len({iteration_seed(0, purpose, k) for purpose in ("label", "train") for k in range(50)}) == 100


def test_held_out_sampling_is_its_own(small: Any, write: Any) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 9}
    settings = small(label={"labeller": "TaskChecker", "sampling": sampling, "template": "plain"})
    held_out = load_spec(write(settings)).held_out_spec(out="b", model="m")
    found = drawn(held_out).sampling
    assert (found.temperature, found.top_p, found.max_new_tokens, held_out.template) == (1.0, 1.0, 9, "plain")


def test_everything_that_an_iteration_draws_has_its_seed(small: Any, write: Any) -> None:
    label = {"labeller": {"class_path": "MonteCarlo", "init_args": {"sampling": {"n": 2}}}}
    spec = load_spec(write(small(label=label, convert={"class_path": "Preference", "init_args": {"max_pairs": 2}})))
    job = spec.label_spec(1, out="a", model="m")
    assert isinstance(job.labeller, MonteCarlo)
    assert job.labeller.sampling.seed == drawn(job).sampling.seed != 0
    assert (job.labeller.sampling.n, drawn(job).sampling.n) == (2, 4)
    first, second = (spec.converter(k) for k in (1, 2))
    assert isinstance(first, Preference)
    assert first == replace(second, seed=first.seed) != second


@pytest.mark.parametrize(
    ("word", "explicit"),
    [
        ("gsm8k", "gsm8k:split=train"),
        ("gsm8k:split=test,limit=3", "gsm8k:split=test,limit=3,split=test"),
        ("dir/rows.jsonl", "rows:path=dir/rows.jsonl,split=train"),
        ('task:task="modular:terms=3",n=4', 'task:task="modular:terms=3",n=4,split=train'),
    ],
)
def test_explicit_words(word: str, explicit: str) -> None:
    assert explicit_word(word) == explicit


def test_training_settings_of_both_references(small: Any, write: Any, tmp_path: Path) -> None:
    spec = load_spec(write(small("models/m0")), {"reference": "kept", "iterations": 3})
    settings = training_settings(iteration(spec, tmp_path, 2), tmp_path / "rows.jsonl")
    arguments = settings["model"]["init_args"]
    assert arguments["policy"]["path"] == str(tmp_path / "iteration-1" / "model")
    assert arguments["reference"] == {"path": "models/m0"}
    assert settings["data"]["init_args"]["train"]["path"] == str(tmp_path / "rows.jsonl")
    assert settings["trainer"]["max_steps"] == 3
    spec = load_spec(write(small("models/m0")))
    settings = training_settings(iteration(spec, tmp_path, 1), tmp_path / "rows.jsonl")
    assert settings["model"]["init_args"] == {"policy": {"path": "models/m0"}}, "the module starts at its reference"


def test_identity_leaves_out_what_may_change(small: Any, write: Any) -> None:
    path = write(small())
    spec = load_spec(path)
    assert spec.identity() == load_spec(path, {"iterations": 7, "launcher": "torchrun"}).identity()
    assert spec.identity() != load_spec(path, {"seed": 1}).identity()
    recipe = spec.identity()["train"]["recipes"]["recipes/tiny/sft.yaml"]
    assert recipe["trainer"]["max_steps"] == 800, "the recipe's settings themselves, not its name"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"iteration": 3}, "'iteration' is not a setting; did you mean --iterations"),
        ({"label.samplng": {}}, "'samplng' is not a setting of label; did you mean --label.sampling"),
        ({"label.sampling.m": 3}, "'m' is not a setting of label.sampling"),
        ({"temperature": 1}, "did you mean --evaluation.sampling.temperature or --label.s"),
        ({"evaluation.problms": "x"}, "did you mean --evaluation.problems"),
        ({"train.recipe": []}, "'recipe' is not a setting of train; did you mean --train.recipes"),
        ({"label.dtype": "auto"}, "label.dtype=auto: every job would measure its own"),
        ({"label.labeller": "TaskCheker"}, "no class 'TaskCheker'; did you mean 'TaskChecker'"),
        ({"label.sampling.n": "many"}, "sampling.n: expected int, got 'many'"),
        ({"label.solutions": "Existing"}, "'solutions' is not a setting of label"),
        ({"iterations": 0}, "iterations=0: must be at least 1"),
        ({"problems_per_iteration": 0}, "problems_per_iteration=0"),
        ({"reference": "rset"}, "reference: expected one of .*, got 'rset'; did you mean 'reset'"),
        ({"convert": "Demonstration"}, "no class 'Demonstration'; did you mean 'Demonstrations'"),
        (
            {"convert": {"class_path": "Demonstrations", "init_args": {"cleen": True}}},
            "'cleen' is not a setting of conv",
        ),
        ({"pairs": "StepPairs"}, "convert and pairs both"),
        ({"convert": None, "pairs": "StepPair"}, "no class 'StepPair'; did you mean 'StepPairs'"),
        ({"convert": None, "pairs": "StepPairs", "pairs.max_pair": 3}, "did you mean --pairs.max_pairs"),
        ({"convert": None, "pairs": "StepPairs", "pairs.max_pairs": "x"}, "pairs.max_pairs: expected int, got 'x'"),
        ({"convert": None, "pairs": "StepPairs", "pairs.model": "m"}, "'model' is not a setting of pairs"),
        ({"evaluation.sampling.n": 1}, "at least 2 samples"),
        ({"evaluation.sampling.temperature": 0.0}, "a temperature above 0"),
        ({"evaluation.problems": "prm800k:path=x.jsonl"}, "source 'prm800k' cannot be evaluated"),
        ({"label.steps": "Fitted"}, "set evaluation.steps"),
        ({"train.recipes": []}, "recipes names no file"),
        ({"train.overrides.data.init_args.train.path": "x"}, "is set by every iteration itself"),
        ({"train.overrides": {"data.init_args.train": {"limit": 3}}}, "is set by every iteration itself"),
        ({"model.path": "x"}, "model has no settings of its own"),
    ],
)
def test_refused_settings(small: Any, write: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_spec(write(small()), overrides)
    assert "\n" not in str(caught.value)


def test_refused_files(small: Any, write: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*absent\.yaml"):
        load_spec(tmp_path / "absent.yaml")
    for text, message in (
        ("a: 1\nb: [\n", "line 3"),
        ("- 1\n", "must be keys with values"),
        ("iteration: 3\n", r"settings\.yaml: 'iteration' is not a setting; did you mean 'iterations'"),
    ):
        with pytest.raises(StepkdError, match=message):
            load_spec(write(text))
    for name in ("model", "evaluation"):
        with pytest.raises(ConfigError, match=f"give --{name}"):
            load_spec(write({key: value for key, value in small().items() if key != name}))
    with pytest.raises(ConfigError, match=r"sft\.yaml is a training recipe: run it with `stepkd fit`"):
        load_spec(find_recipe("recipes/tiny/sft.yaml"))
    with pytest.raises(ConfigError, match=r"no file 'recipes/tiny/stf.yaml' here.* Did you mean 'tiny/sft'"):
        load_spec(Path("recipes/tiny/stf.yaml"))


def test_training_overrides_may_be_nested_or_dotted(small: Any, write: Any, tmp_path: Path) -> None:
    overrides = {"trainer": {"max_steps": 4, "val_check_interval": None}, "data.init_args.validation": None}
    path = write(small("tiny-0.1m", train={"recipes": ["tiny/sft"], "overrides": overrides}))
    for changes, steps in (({}, 4), ({"train.overrides.trainer.max_steps": "5"}, 5)):
        spec = load_spec(path, changes)
        found = check_fit(spec.train.recipes, training_settings(iteration(spec, tmp_path, 1), tmp_path / "rows.jsonl"))
        assert found.trainer["max_steps"] == steps
        assert (found.module.policy_spec.path, found.data.specs["train"].path) == (
            "tiny-0.1m",
            str(tmp_path / "rows.jsonl"),
        )
        assert spec.identity()["train"]["overrides"]["trainer"]["max_steps"] == steps  # also where it was a word


def test_where_it_runs_decides_no_result(small: Any, write: Any) -> None:
    words = ["--config", str(write(small())), "--out", "runs/x", "--overwrite"]
    config = parse(IterateRunConfig, words, command="iterate")
    assert (config.out, config.overwrite) == ("runs/x", True)
    assert config.identity() == load_spec(Path(words[1])).identity()


def test_pair_jobs_share_the_labelling_jobs_settings(small: Any, write: Any) -> None:
    changes = {"class_path": "StepPairs", "init_args": {"sampling": {"n": 4}, "check": "checker"}}
    spec = load_spec(write(small(convert=None, pairs=changes)))
    pairs = spec.pair_spec(1, spec.label_spec(1, out="labels", model="m"), out="pairs")
    assert isinstance(pairs, StepPairConfig)
    assert (pairs.completions, pairs.model, pairs.out) == ("labels", "m", "pairs")
    assert (pairs.sampling.n, pairs.sampling.temperature, pairs.check, pairs.device) == (4, 0.8, "checker", "cpu")
    assert pairs.sampling.max_new_tokens == 24
    assert spec.pairs is not None
    assert pairs.sampling.seed != spec.pairs.sampling.seed
    tree = load_like(spec, pairs=TreePairs(max_step_tokens=9, search=PairTreeConfig(iterations=7)))
    pairs = tree.pair_spec(1, tree.label_spec(1, out="labels", model="m"), out="pairs")
    assert isinstance(pairs, TreePairConfig)
    assert (pairs.problems, pairs.max_step_tokens, pairs.search.iterations) == (spec.problem_word(1), 9, 7)


def load_like(spec: IterateConfig, **changes: Any) -> IterateConfig:
    return IterateConfig(**{**vars(spec), **changes})


@pytest.mark.parametrize("pairs", [None, StepPairs(), TreePairs()])
def test_a_job_under_a_launcher_gets_the_same_settings(
    pairs: PairsConfig | None, small: Any, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_like(load_spec(write(small(convert=None, launcher="python"))), pairs=pairs)
    job: Any = spec.label_spec(1, out=str(tmp_path / "labels"), model="m")
    if pairs is not None:
        job = spec.pair_spec(1, job, out=str(tmp_path / "pairs"))
    given: list[Any] = []
    for name in ("job.run_label_job", "job.run_pair_job"):
        monkeypatch.setattr(f"stepkd.labels.{name}", lambda config, options: given.append(config))
    monkeypatch.setattr(stages.subprocess, "run", lambda words, check: Done(cli.main(words[3:])))
    with pytest.raises(
        StepkdError, match=r"ended without summary\.json: its launcher must return when the work is done"
    ):
        stages._run_job(iteration(spec, tmp_path, 1), job)
    assert given == [job]


class Done:
    def __init__(self, returncode: int) -> None:
        self.returncode = returncode
