"""Search with a tiny model: the same whatever is searched beside it, within the context, with a scorer that is slow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import tiny_policy
from vllm_standin import StandIn

from stepkd.errors import DataError, MachineError
from stepkd.grading.pool import Grader, GradingConfig
from stepkd.models.policy import Policy
from stepkd.sampling.client import Client
from stepkd.sampling.config import VLLMServer
from stepkd.sampling.engine import Engine, SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine
from stepkd.sampling.vllm import ServerEngine
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.load import Judge, load_scorer
from stepkd.scorers.scorer import Solutions
from stepkd.search.beam import Beam, ParticleFilter
from stepkd.search.best_of_n import BestOfN, Greedy
from stepkd.search.generate import SampledSteps, ScorerValue
from stepkd.search.mcts import MCTS
from stepkd.search.phi import PhiDecoding
from stepkd.search.revise import VerifyRevise
from stepkd.search.state import Costs, Found, Problem, Search, State, Tools
from stepkd.tasks.base import keyed_fraction

TEXTS = {0: "1+2=", 4: "a much longer problem: 17*3+4=", 7: "9"}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(dtype="float64")


@pytest.fixture(scope="module")
def problems(policy: Policy) -> list[Problem]:
    return [
        Problem(i, {"id": str(i), "prompt": text}, tuple(policy.tokenizer(text)["input_ids"]))
        for i, text in TEXTS.items()
    ]


class Hashed:
    """A score of every step by its text and its problem."""

    meaning = "value"

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        return [
            [[keyed_fraction(each.row["id"], step) for step in steps] for steps in each.solutions] for each in problems
        ]

    def provenance(self) -> dict[str, Any]:
        return {}


def tools(engine: Engine, policy: Policy, scorer: Any = None, **limits: Any) -> Tools:
    costs, spec = Costs(), SamplingConfig(max_new_tokens=12, seed=2)
    limits = {"segmenter": "regex:[a-m]", "max_step_tokens": 5, "max_tokens": 12, "costs": costs} | limits
    value = ScorerValue(scorer or Hashed(), costs=costs)
    grader = Grader(GradingConfig(extractors=("last_number",)))
    return Tools(SampledSteps(engine, policy, spec, **limits), grader, value, costs)


def shape(found: Sequence[Found]) -> list[Any]:
    """All that should be the same, numbers to nine decimals: log-probabilities differ in rounding."""
    return [rounded([each.token_ids.tolist(), each.text, each.finish, each.score, each.trace]) for each in found]


def rounded(value: Any) -> Any:
    """Floats in JSON values to nine decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 9) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "search",
    [
        *(Greedy(), BestOfN(n=3, vote="soft")),
        *(Beam(n=4, width=2, max_steps=3), Beam(n=4, width=2, max_steps=3, diverse=True)),
        *(
            pytest.param(search, marks=pytest.mark.slow)
            for search in (
                ParticleFilter(n=3, max_steps=3),
                MCTS(iterations=3, root_factor=1, actions=2, depth=2, max_steps=3),
                PhiDecoding(beams=2, rollouts=2, max_rounds=3, min_rounds=2),
                VerifyRevise(rounds=2, theta=0.9),
            )
        ),
    ],
    ids=lambda search: search.name,
)
def test_what_is_found_does_not_depend_on_the_batch(search: Search, policy: Policy, problems: list[Problem]) -> None:
    def run(part: Sequence[Problem], max_rows: int = 64) -> tuple[list[Any], list[Any]]:
        own = tools(TransformersEngine(policy, max_rows=max_rows), policy)
        found = search.run(part, own)
        return [shape(each) for each in found], [own.costs[problem.index] for problem in part]

    together, costs = run(problems)
    assert run(problems[::-1], 3) == (together[::-1], costs[::-1])
    assert run(problems[1:2], 1) == (together[1:2], costs[1:2])
    assert len({str(each) for each in together}) == 3


def test_with_a_constant_scorer_beam_is_sampling_step_by_step(policy: Policy, problems: list[Problem]) -> None:
    class Constant(Hashed):
        def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
            return [[[0.5] * len(steps) for steps in each.solutions] for each in problems]

    limits = {"segmenter": "regex:[a-z0-9]", "max_tokens": 8}
    found = Beam(n=2, width=2).run(problems, tools(TransformersEngine(policy), policy, Constant(), **limits))
    generator = tools(TransformersEngine(policy), policy, **limits).generator
    lengths = []
    for problem, (answer, *_) in zip(problems, found, strict=True):
        state = State(problem)
        while state.end == "step":
            state = state.then(generator.propose([state], 2)[0][0])
        assert (answer.token_ids.tolist(), answer.text) == ([*state.token_ids], state.text)
        lengths.append(len(state.steps))
    assert max(lengths) > 2


@pytest.fixture
def server() -> Iterator[Any]:
    found = StandIn(tiny_policy(dtype="float32"), "tiny")
    yield found
    found.close()


@pytest.mark.parametrize("where", ["model", "server"])
def test_a_context_that_is_full_in_the_middle_of_a_beam_ends_that_solution(
    where: str, policy: Policy, problems: list[Problem], request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the problem whose prompt is long; the others go on to their own ends."""
    context = len(problems[1].prompt_ids) + 7
    engine: Engine = TransformersEngine(policy)
    if where == "model":
        monkeypatch.setattr(policy.causal_lm.config, "max_position_embeddings", context)
    else:
        server = request.getfixturevalue("server")
        server.context = context
        engine = ServerEngine(policy, Client([server.address], 8, 30.0))
    for search in (Beam(n=2, width=2), Greedy()):
        found = search.run(problems[:2], tools(engine, policy, max_tokens=None, max_step_tokens=12))
        assert {(each.finish, len(each.token_ids)) for each in found[1]} == {("length", 7)}
        assert any(len(each.token_ids) > 7 for each in found[0]), "there was room for more"
    full = Problem(9, {"id": "full"}, (5,) * context)
    with pytest.raises(DataError, match=f"full.* prompt of {context} tokens .*fills the model's context of {context}"):
        Beam(n=4, width=2).run([problems[0], full], tools(engine, policy))


def test_a_scorer_whose_context_is_full_leaves_solutions_unscored(policy: Policy, problems: list[Problem]) -> None:
    """They rank behind those that it could read, and are counted; where it could read none, there is an answer."""
    judge = PromptedJudge(policy, question="{step}?", answers=[("Y", "N")], max_length=70)
    own = tools(TransformersEngine(policy), policy, judge)
    found = Beam(n=4, width=2, max_steps=1).run(problems, own)
    unscored = {problem.index: own.costs[problem.index]["unscored"] for problem in problems}
    assert unscored[4] == own.costs[4]["scorer_calls"] > 0, "the long one"
    assert unscored[7] == 0
    assert [found[i][0].score is None for i in range(3)] == [False, True, False]
    assert len(found[1][0].token_ids)


@pytest.mark.slow
def test_a_scorer_that_answers_late_changes_nothing_and_one_that_does_not_is_named(
    problems: list[Problem], server: Any, tmp_path: Path
) -> None:
    """A judge on a server that is slow, busy, fails and drops requests: they are asked again, and counted once."""
    policy = server.policy
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    server.name = str(tmp_path)
    found = []
    for faults in ([], ["slow", "busy", "drop", "", "fail", "slow"]):
        server.faults = faults
        engine = VLLMServer(server.address, timeout_s=20.0)
        judge = load_scorer(Judge(str(tmp_path), answers=("Y", "N"), engine=engine), device="cpu")
        own = tools(TransformersEngine(policy), policy, judge)
        found.append(([shape(each) for each in Beam(n=4, width=2).run(problems, own)], dict(own.costs)))
        assert not server.faults
    assert found[0] == found[1]
    server.faults = ["slow"] * 99
    engine = VLLMServer(server.address, timeout_s=0.5)
    judge = load_scorer(Judge(str(tmp_path), answers=("Y", "N"), engine=engine), device="cpu")
    with pytest.raises(MachineError, match=f"no answer from the vLLM server at {server.address}"):
        Beam(n=4, width=2).run(problems, tools(TransformersEngine(policy), policy, judge))
