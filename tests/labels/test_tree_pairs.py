"""The job of tree-search pairs: what it writes, that ranks and interruptions change nothing, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepkd.data.completion import Completion
from stepkd.data.config import parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import STEP_PREFERENCE
from stepkd.data.templates import get_template
from stepkd.errors import ConfigError, DataError, ModelError
from stepkd.grading.pool import GradingConfig
from stepkd.labels.job import run_pair_job
from stepkd.labels.settings import ContinuationShare, SelfEvaluation, StepScore, TreePairConfig
from stepkd.labels.tree_pairs import GoldSteps
from stepkd.models.policy import Policy
from stepkd.randomness import generator
from stepkd.runs.job import JobOptions, read_settings
from stepkd.sampling.config import Transformers
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.scorers.judge import PromptedJudge
from stepkd.search.generate import SampledSteps
from stepkd.search.mcts import PairTreeConfig
from stepkd.search.state import Problem, State, Step
from stepkd.search.tree import PairConfig
from stepkd.tasks.rows import check_row

Run = Callable[..., dict[str, Any] | None]
FILES = ("pairs.jsonl", "summary.json")


@pytest.fixture
def spec(tmp_path: Path) -> TreePairConfig:
    """Five tiny problems in three groups; an untrained model, whose steps end at letters."""
    return TreePairConfig(
        out=str(tmp_path / "job"),
        problems='task:task="modular:terms=3,modulus=2",n=5',
        model="tiny-0.1m",
        search=PairTreeConfig(iterations=1, root_factor=2, actions=2, depth=2, max_steps=2),
        pairs=PairConfig(require="none"),
        sampling=SamplingConfig(max_new_tokens=10),
        value=ContinuationShare(continuations=1),
        segmenter="regex:[a-m]",
        max_step_tokens=10,
        engine=Transformers(4),
        grading=GradingConfig(extractors=("last_number",)),
        dtype="float64",
        device="cpu",
    )


@pytest.fixture
def run(policy: Policy) -> Run:
    def start(spec: TreePairConfig, *, engine: Any = None, scorer: Any = None, **options: Any) -> dict[str, Any] | None:
        return run_pair_job(spec, policy=policy, engine=engine, scorer=scorer, options=JobOptions(**options))

    return start


class Watched:
    """Samples as usual and keeps the first tokens of the prompts of each call; may stop at a call."""

    def __init__(self, policy: Policy, *, stop_at: int | None = None) -> None:
        self.inner = TransformersEngine(policy, max_rows=4)
        self.max_length, self.stop_at = policy.max_length, stop_at
        self.prompts: list[set[str]] = []
        self.decode = policy.tokenizer.decode

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: SamplingConfig, **options: Any
    ) -> list[list[Completion]]:
        self.prompts.append({self.decode(prompt).partition("\n")[0] for prompt in prompts})
        if len(self.prompts) == self.stop_at:
            raise KeyboardInterrupt
        return self.inner.generate(prompts, spec, **options)

    def forget(self) -> None:
        """See the one inside."""
        self.inner.forget()


def content(spec: TreePairConfig) -> list[bytes]:
    return [(Path(spec.out) / name).read_bytes() for name in FILES]


def rows(spec: TreePairConfig) -> list[dict[str, Any]]:
    return load_rows(parse_spec(spec.out), contract=STEP_PREFERENCE)


# ---- what a job leaves behind --------------------------------------------------------------------------------------


def test_rows_and_summary(spec: TreePairConfig, run: Run, policy: Policy) -> None:
    reports: list[tuple[str, int, int]] = []
    drawn: list[int] = []

    class Counting(TransformersEngine):
        def generate(self, *arguments: Any, **options: Any) -> Any:
            found = super().generate(*arguments, **options)
            drawn.extend(len(each.token_ids) for row in found for each in row)
            return found

    engine = Counting(policy, max_rows=4)
    summary = run(spec, engine=engine, report=lambda phase, done, total, figures: reports.append((phase, done, total)))
    assert reports == [("pairs", done, 5) for done in (2, 4, 5)]
    assert summary is not None
    pairs = rows(spec)
    assert summary["pairs"] == len(pairs) > 3
    assert summary["items"] == 5
    assert summary["facts"]["correct_paths"] <= summary["facts"]["trees_with_a_correct_end"] <= 5
    assert summary["facts"]["tokens_of_steps"] + summary["facts"]["tokens_of_continuations"] == sum(drawn)
    for row in pairs:
        for side in ("chosen", "rejected"):
            text = policy.tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True)
            assert text == row[side]
        assert policy.tokenizer.decode(row["prefix_ids"], skip_special_tokens=True) == "".join(row["prefix"])
        assert row["pair_facts"]["chosen_value"] > row["pair_facts"]["rejected_value"]
        assert set(row) >= {"problem_id", "answer", "task", "meta"}
        assert row["pairing"]["builder"] == "tree"
        assert (row["pairing"]["model"], row["pairing"]["search"]["depth"]) == ("tiny-0.1m", 2)
    settings = read_settings(spec.out)
    assert settings["kind"] == "pair job"
    assert settings["pairing"] == pairs[0]["pairing"]
    assert str(Path.home()) not in json.dumps(settings)


class NoisySolver:
    """Types the row's own solution; a line slips now and then, and behind a slip all lines are incorrect."""

    def __init__(self, policy: Policy, problems: Sequence[dict[str, Any]]) -> None:
        self.tokenizer, self.max_length = policy.tokenizer, policy.max_length
        self.problems = problems

    def forget(self) -> None:
        """Nothing is kept."""

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: SamplingConfig, *, purpose: str, indices: Any, **_: Any
    ) -> list[list[Completion]]:
        return [
            [self._continuation(p, j, prompt, spec, generator(spec.seed, purpose, *index, j)) for j in range(spec.n)]
            for p, (prompt, index) in enumerate(zip(prompts, indices, strict=True))
        ]

    def _continuation(self, p: int, j: int, prompt: Sequence[int], spec: SamplingConfig, noise: Any) -> Completion:
        text = self.tokenizer.decode(prompt)
        row = next(row for row in self.problems if text.startswith(row["prompt"]))
        before, lines = text[len(row["prompt"]) :], row["solution"].splitlines(keepends=True)
        done, typed = before.count("\n"), ""
        slipped = before != "".join(lines[:done])
        for line in lines[done : done + 1] if "\n" in spec.stop else lines[done:]:
            body = line.rstrip("\n")
            slipped = slipped or noise.random() < 0.3
            typed += (f"{body[:-1]}{(int(body[-1]) + 1) % 10}" if slipped else body) + line[len(body) :]
        ids = list(self.tokenizer(typed, add_special_tokens=False)["input_ids"])
        ids += [] if typed.endswith("\n") else [self.tokenizer.eos_token_id]
        return Completion(prompt, ids, raw_logprobs=(-0.1,) * len(ids), text=typed, sample=j)


@pytest.mark.parametrize("value", [StepScore(scorer="checker"), ContinuationShare(continuations=8)])
def test_the_better_side_is_correct(spec: TreePairConfig, run: Run, policy: Policy, value: Any) -> None:
    """A solver that slips: the search finds correct solutions, prefers correct steps and turns down incorrect ones."""
    problems = load_rows(parse_spec("task:task=modular,n=6"))
    noisy = replace(
        spec,
        problems="task:task=modular,n=6",
        search=PairTreeConfig(iterations=4, root_factor=2, actions=3, depth=3),
        pairs=PairConfig(),
        value=value,
        sampling=SamplingConfig(max_new_tokens=256),
        segmenter="newline",
        max_step_tokens=64,
        template="task",
        grading=GradingConfig(),
    )
    summary = run(noisy, engine=NoisySolver(policy, problems))
    assert summary is not None
    pairs = rows(noisy)
    correct = {"chosen": 0, "rejected": 0}
    for row in pairs:
        for side in correct:
            steps = [*row["prefix"], *row[side].splitlines(keepends=True)]
            correct[side] += check_row(row, steps)[len(row["prefix"])]
        assert (policy.tokenizer.eos_token_id in row["chosen_ids"]) is (not row["chosen"].endswith("\n"))
    assert summary["facts"]["correct_paths"] / summary["items"] >= 0.8
    assert len(pairs) >= 8
    assert correct == {"chosen": len(pairs), "rejected": 0}
    assert {len(row["prefix"]) for row in pairs} >= {0, 1}


# ---- steps of the reference ------------------------------------------------------------------------------------------


def test_reference_steps_behind_a_state(policy: Policy) -> None:
    """Cut as sampled ones, with the model's own log-probabilities, where the state says the solution's beginning."""
    steps = SampledSteps(TransformersEngine(policy), policy, SamplingConfig(), max_tokens=30)
    gold = GoldSteps(steps, get_template("plain"))
    row = {"id": "p", "prompt": "1+2+3=", "answer": "6", "solution": "1+2=3\n3+3=6\n#### 6"}
    start = State(Problem(0, row, tuple(policy.tokenizer("1+2+3=")["input_ids"])))
    whole = gold([start])[0]
    assert [(step.text, step.end) for step in whole] == [("1+2=3\n", "step"), ("3+3=6\n", "step"), ("#### 6", "stop")]
    assert whole[-1].token_ids[-1] == policy.tokenizer.eos_token_id
    ids = [*start.problem.prompt_ids, *(token for step in whole for token in step.token_ids)]
    with torch.no_grad():
        logps = policy.causal_lm(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    told = logps[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][len(start.problem.prompt_ids) - 1 :]
    place = 0
    for step in whole:
        assert step.logprob == pytest.approx(float(told[place : place + len(step.token_ids)].sum()), rel=1e-9)
        place += len(step.token_ids)
    behind, sampled = start.then(whole[0]), Step(" 1+2=3\n", (5, 6), -1.0, "step")
    other, ahead = replace(sampled, text="1+2=4\n"), replace(sampled, text="1+2")
    found = gold([behind, start.then(sampled), start.then(other), start.then(ahead)])
    assert [[step.text for step in each] for each in found] == [
        ["3+3=6\n", "#### 6"],
        ["3+3=6\n", "#### 6"],
        [],
        ["=3\n", "3+3=6\n", "#### 6"],
    ]
    assert found[0][0].logprob == pytest.approx(whole[1].logprob)
    assert gold([start.then(replace(sampled, text="", token_ids=(5,) * 15))]) == [[]], "no room for the rest"
    steps.sampling = SamplingConfig(stop=("=6",))
    assert gold([start, behind]) == [[], []], "the policy cannot write what holds a stop string"
    assert gold.is_cut(start.problem)


def test_an_untrained_model_is_led_along_the_reference(spec: TreePairConfig, run: Run, tmp_path: Path) -> None:
    """With all options of the released code; only the reference steps end in correct answers."""
    near = replace(
        spec,
        problems="task:task=modular,n=2",
        search=PairTreeConfig(
            **{"iterations": 8, "root_factor": 2, "depth": 2, "force_end": True, "gold_steps": True},
            **{"choose": "visits", "damp_after": 3, "exploration": 0.5},  # type: ignore[arg-type]
        ),
        pairs=PairConfig(require="path"),
        sampling=SamplingConfig(max_new_tokens=48),
        segmenter="newline",
        template="task",
        grading=GradingConfig(),
    )
    summary = run(near)
    assert summary is not None
    problems = {row["id"]: row["solution"] for row in load_rows(parse_spec(near.problems))}
    pairs = rows(near)
    assert summary["facts"]["correct_paths"] == 2
    assert len(pairs) >= 4
    for row in pairs:
        assert problems[row["problem_id"]].startswith("".join([*row["prefix"], row["chosen"]]))
        assert not problems[row["problem_id"]].startswith("".join([*row["prefix"], row["rejected"]]))
    assert pairs[0]["pairing"]["search"]["gold_steps"] is True
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "r", "prompt": "1+1=", "answer": "2"}) + "\n")
    with pytest.raises(DataError, match=r"'r' has no 'solution'.*gold_steps"):
        run(replace(near, problems=str(path), out=near.out + "-bare"))


# ---- ranks and interruptions ---------------------------------------------------------------------------------------


def test_ranks_batches_and_interruptions_change_nothing(
    spec: TreePairConfig, run: Run, policy: Policy, tmp_path: Path
) -> None:
    whole = Watched(policy)
    run(spec, engine=whole)
    expected = content(spec)

    two = replace(spec, out=str(tmp_path / "two"))
    assert run(two, rank=0, world_size=2) is None
    assert run(two, rank=1, world_size=2) is not None
    assert content(two) == expected
    assert sorted(path.name for path in (Path(two.out) / "log").iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]

    wide = replace(spec, out=str(tmp_path / "wide"), engine=Transformers(64))
    run(wide)
    assert content(wide) == expected, "in one group"

    torn = replace(spec, out=str(tmp_path / "torn"))
    first_group = next(i for i, prompts in enumerate(whole.prompts) if not prompts & whole.prompts[0])
    with pytest.raises(KeyboardInterrupt):
        run(torn, engine=Watched(policy, stop_at=first_group + 2))
    again = Watched(policy)
    run(torn, engine=again)
    assert content(torn) == expected
    assert not set.union(*again.prompts) & whole.prompts[0], "the first group is not searched again"
    assert set.union(*again.prompts) | whole.prompts[0] == set.union(*whole.prompts)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_another_job_in_the_folder(spec: TreePairConfig, run: Run) -> None:
    run(spec)
    with pytest.raises(ConfigError, match="depth"):
        run(replace(spec, search=replace(spec.search, depth=1)))
    run(replace(spec, search=replace(spec.search, depth=1)), overwrite=True)


def test_no_pair_at_all(spec: TreePairConfig, run: Run) -> None:
    """Nothing an untrained model writes is correct by the benchmark's own extractor."""
    with pytest.raises(DataError, match=r"no pair could be made from 5 items \(5 unsolved_tree\)"):
        run(replace(spec, pairs=PairConfig(), grading=GradingConfig(extractors=("boxed",))))
    assert json.loads((Path(spec.out) / "summary.json").read_text())["facts"]["trees_with_a_correct_end"] == 0


def test_self_evaluation_by_the_policy(spec: TreePairConfig, run: Run, policy: Policy) -> None:
    asked = replace(spec, value=SelfEvaluation(), problems=f"{spec.problems},limit=2")
    judge = PromptedJudge(policy, reference=True, answers=[("y", "n")])
    summary = run(asked, scorer=judge)
    assert summary is not None
    assert summary["facts"]["tokens_of_continuations"] == 0
    value = rows(asked)[0]["pairing"]["value"]
    assert (value["value"], value["scorer"]["reference"]) == ("self_evaluation", True)
    with pytest.raises((ConfigError, ModelError), match="single tokens"):
        run(replace(asked, out=asked.out + "-own"))
    whole = replace(asked, value=SelfEvaluation(whole=True), out=asked.out + "-whole")
    assert run(whole, scorer=PromptedJudge(policy, reference=True, whole=True, answers=[("y", "n")])) is not None
    value = rows(whole)[0]["pairing"]["value"]
    assert (value["reduction"], value["scorer"]["whole"]) == ("last", True)
    with pytest.raises(ConfigError, match=r"reduction=min.*whole"):
        SelfEvaluation(whole=True, reduction="min")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": SamplingConfig(temperature=0)}, "temperature"),
        ({"max_step_tokens": 0}, "max_step_tokens=0"),
        ({"segmenter": "newlines"}, "newline"),
    ],
)
def test_bad_settings(spec: TreePairConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(spec, **change)


def test_rows_without_a_checker(spec: TreePairConfig, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "r", "prompt": "1+1=", "answer": "2"}) + "\n")
    with pytest.raises(DataError, match="exact checker"):
        run(replace(spec, problems=str(path), value=StepScore(scorer="checker")))
