"""Judges on engines: the numbers of this process, each solution read once, and jobs that say what held the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_standin import StandIn

from stepkd.cli.parser import parse
from stepkd.data.config import LABELS_NAME
from stepkd.errors import ConfigError, ModelError
from stepkd.evaluation.config import ScoreConfig
from stepkd.evaluation.score_rows import score_file
from stepkd.labels.job import run_label_job
from stepkd.labels.labellers import Scored
from stepkd.labels.settings import Existing, LabelConfig
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.sampling.config import VLLM, Transformers, VLLMServer
from stepkd.sampling.engine import SamplingConfig
from stepkd.scorers.judge import PromptedJudge
from stepkd.scorers.load import PRM, Critic, Judge, QwenPRM, load_scorer
from stepkd.scorers.scorer import Solutions


@pytest.fixture(scope="module")
def path(make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny float32 model that tells steps apart."""
    policy, folder = make_policy(dtype="float32"), tmp_path_factory.mktemp("judge")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server(path: str) -> Iterator[Any]:
    found = StandIn(Policy.load(PolicyConfig(path=path)), path)
    yield found
    found.close()


def judge(path: str, **settings: Any) -> Judge:
    return Judge(path, answers=("Y", "N"), **settings)


def flat(scores: list[list[list[float]]]) -> list[float]:
    return [value for problem in scores for solution in problem for value in solution]


def test_engines_judge_as_this_process_does(path: str, server: Any, problems: list[Solutions]) -> None:
    here = load_scorer(judge(path), device="cpu")
    expected = flat(here.score(problems))
    assert len({round(value, 4) for value in expected}) > 20
    apart = load_scorer(judge(path, engine=Transformers(max_rows=3)), device="cpu")
    assert isinstance(apart, PromptedJudge)
    assert apart.max_rows == 3
    assert flat(apart.score(problems)) == pytest.approx(expected, rel=0, abs=1e-6)
    there = load_scorer(judge(path, engine=VLLMServer(server.address)), device="cpu")
    assert isinstance(there, PromptedJudge)
    assert there.policy.device.type == "meta"
    assert flat(there.score(problems)) == pytest.approx(expected, rel=0, abs=1e-6)
    engine = there.provenance()["engine"]
    assert (engine["name"], engine["vllm"], engine["served_model"]) == ("ServerEngine", "0.0", path)
    assert here.provenance()["engine"] == {"name": "TransformersEngine"}


def test_engines_write_the_critiques_of_this_process(path: str, server: Any, problems: list[Solutions]) -> None:
    form = {"form": "task", "template": "task", "sampling": SamplingConfig(temperature=0.0, max_new_tokens=8)}
    found = []
    for engine in (None, Transformers(max_rows=3), VLLMServer(server.address)):
        scorer = load_scorer(Critic(path, engine=engine, **form), device="cpu")
        found.append([each.facts for each in scorer.score(problems[:2])[1]])
    assert found[0] == found[1] == found[2]
    assert sum(facts["generated_tokens"] for facts in found[0]) > 50


def test_a_servers_prefix_cache_holds_a_solution_before_its_steps_are_asked_about(
    path: str, server: Any, problems: list[Solutions]
) -> None:
    """The question stands behind the steps, and the last step's question comes first."""
    there = load_scorer(judge(path, engine=VLLMServer(server.address, requests=1)), device="cpu")
    there.score(problems)
    asked = [body["prompt"] for body in server.requests]
    solutions = sum(len(problem.solutions) for problem in problems)
    question = "\n1 ok?".replace(
        "1 ok?", "Is step 1 right, given the problem and the steps before it? Answer Yes or No."
    )
    tail = len(question) + len("\nassistant: ")
    for prompt in asked[solutions:]:
        assert any(prompt[:-tail] == first[: len(prompt) - tail] for first in asked[:solutions])
    assert {len(body["logprob_token_ids"]) for body in server.requests} == {2}


def test_steps_that_leave_a_server_no_room_for_an_answer_have_no_score(path: str, server: Any) -> None:
    text = "Problem:\np\n\nSolution:\n"
    steps = [Solutions({"id": "x", "prompt": "p"}, [["abc"] * 3])]
    here = load_scorer(judge(path), device="cpu")
    full = here.score(steps)[0][0]
    lengths = (
        len("user: ")
        + len(text)
        + 3 * len("Step 1: abc\n")
        + len("\nIs step 1 right, given the problem and the steps before it? Answer Yes or No.\nassistant: ")
    )
    for context, scored in ((lengths + 1, 3), (lengths, 2)):
        server.context = context
        found = load_scorer(judge(path, engine=VLLMServer(server.address)), device="cpu").score(steps)[0][0]
        assert found[:scored] == pytest.approx(full[:scored], abs=1e-6)
        assert all(value != value for value in found[scored:])


def test_jobs_score_and_label_through_a_server(path: str, server: Any, tmp_path: Path) -> None:
    """By command line and settings; the folders say which engine and build."""
    row = {"id": "a", "prompt": "1+2=", "completions": ["1+2=3\n", "so 3"], "labels": [True, True], "answer": "3"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"id": str(i), "prompt": f"{i}+2="}) + "\n" for i in range(3)))
    words = ["--scorer", "Judge", "--scorer.path", path, "--scorer.answers", "Y", "N", "--completions", str(rows)]
    engine = ["--scorer.engine", "VLLMServer", "--scorer.engine.urls", server.address]
    found = {}
    for name, more in (("here", []), ("there", engine)):
        config = parse(ScoreConfig, [*words, *more, "--out", str(tmp_path / name), "--device", "cpu"], command="score")
        assert isinstance(config, ScoreConfig)
        score_file(config)
        found[name] = [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
    for here, there in zip(found["here"], found["there"], strict=True):
        assert there["step_scores"] == pytest.approx(here["step_scores"], abs=1e-6)
    settings = json.loads((tmp_path / "there" / "settings.json").read_text())
    assert settings["scorer"]["engine"]["vllm"] == "0.0"
    labels = LabelConfig(
        out=str(tmp_path / "labels"),
        solutions=Existing(completions=str(rows), model=path),
        labeller=Scored(scorer=judge(path, engine=VLLMServer(server.address)), threshold=None),
        device="cpu",
    )
    assert run_label_job(labels)
    labelled = [json.loads(line) for line in (tmp_path / "labels" / LABELS_NAME).read_text().splitlines()]
    assert [each["labelling"]["scorer"]["engine"]["vllm"] for each in labelled] == ["0.0"] * 3
    for each, scored in zip(labelled, found["here"], strict=True):
        assert each["labels"] == pytest.approx(scored["step_scores"], abs=1e-6)


def test_engines_that_cannot_score_say_what_can() -> None:
    with pytest.raises(ConfigError, match=r"scorer.engine=VLLMServer: the model of a PRM is read in this process"):
        PRM("runs/prm", engine=VLLMServer("http://x"))
    with pytest.raises(ConfigError, match=r"scorer.engine=VLLM: .* drop scorer.engine. .* export --layout qwen_prm"):
        QwenPRM("m", engine=VLLM())


def test_a_server_that_says_nothing_of_the_answers_is_named(path: str, server: Any) -> None:
    there = load_scorer(judge(path, engine=VLLMServer(server.address)), device="cpu")
    server.spoil = lambda answer: {"choices": [{"logprobs": {"top_logprobs": [{"token_id:1": -1.0}]}}]}
    with pytest.raises(ModelError, match=r"gives no log-probabilities of tokens .* older than logprob_token_ids"):
        there.score([Solutions({"id": "x", "prompt": "p"}, [["a"]])])
