"""The generative verifier: what is asked, what verdicts say, votes and ties, costs, engines, bad input."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepkd.cli.parser import parse
from stepkd.data.completion import Completion
from stepkd.data.templates import PromptTemplate, get_template
from stepkd.errors import ConfigError, DataError
from stepkd.evaluation.config import EvaluatePRMConfig
from stepkd.models.policy import Policy
from stepkd.sampling.config import VLLM
from stepkd.sampling.engine import Engine, SamplingConfig, Wanted
from stepkd.scorers import load
from stepkd.scorers.critic import CRITIC_TEMPLATE, GenerativeVerifier
from stepkd.scorers.critiques import FORMS, CritiqueForm, get_form
from stepkd.scorers.scorer import Judged, Solutions, reduce_scores, score_one
from stepkd.tasks import check_row, critique_rows, make_rows
from stepkd.tasks.rows import Noise

MakePolicy = Callable[..., Policy]
OFFICIAL = "0e7dba24bfaa9dea379907e11b8dc701c6cd6e74453ab2ffc9b1d63237cc4434"
PLAIN = PromptTemplate(style="plain")


class Scripted(Engine):
    """Writes what a script says to a request, the votes in order; notes the requests."""

    def __init__(self, policy: Policy, script: Callable[[str], Sequence[str]]) -> None:
        self.policy, self.script = policy, script
        self.requests: list[str] = []
        self.limits: list[int] = []

    def _draw(self, wanted: Sequence[Wanted], spec: SamplingConfig, on_progress: Any) -> list[list[Completion]]:
        tokenizer = self.policy.tokenizer
        drawn = []
        for each in wanted:
            request = tokenizer.decode(each.prompt)
            self.requests.append(request)
            self.limits.append(each.limit)
            texts = self.script(request)
            assert len(texts) == spec.n
            ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64) for text in texts]
            drawn.append([Completion(each.prompt, own, text=text) for own, text in zip(ids, texts, strict=True)])
        return drawn

    def _score(self, completions: Any, top_k: int) -> Any:
        raise AssertionError("a critic writes")

    def choice_logps(self, prompts: Any, token_ids: Any) -> Any:
        raise AssertionError("a critic writes")


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy()


def critic(policy: Policy, script: Callable[[str], Sequence[str]], votes: int, form: str, **reading: Any) -> Any:
    engine = Scripted(policy, script)
    sampling = SamplingConfig(n=votes, max_new_tokens=40)
    return GenerativeVerifier(policy, form=form, sampling=sampling, template=PLAIN, engine=engine, **reading), engine


CORRECT = r"It is \boxed{\text{Correct}}.", r"\boxed{incorrect}? No: \boxed{ \textbf {correct} }"


def boxed(*verdicts: str | None) -> list[str]:
    """A critique with each verdict, and an earlier box that does not count."""
    return ["no." if each is None else rf"\boxed{{7}} so \boxed{{ {each} }}." for each in verdicts]


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_the_official_prompt_word_for_word(policy: Policy) -> None:
    form = FORMS["processbench"]
    template = form.prompt.replace("{steps}", "{tagged_response}").replace("{}", "{{}}")
    assert hashlib.sha256(template.encode()).hexdigest() == OFFICIAL, "critique_template.txt, stripped"
    scorer, engine = critic(policy, lambda _: boxed("-1"), 1, "processbench")
    score_one(scorer, r"Is \frac{problem}{2}?", ["a {steps}\n", " b"])
    written = template.format(
        problem=r"Is \frac{problem}{2}?",
        tagged_response="<paragraph_0>\na {steps}\n</paragraph_0>\n\n<paragraph_1>\n b\n</paragraph_1>",
    )
    assert engine.requests == [written]


def test_a_request_about_each_step_shows_what_stands_before_it(policy: Policy) -> None:
    scorer, engine = critic(policy, lambda request: [CORRECT[r"step 2" in request]], 1, "step")
    messages = Solutions({"id": "x", "prompt": [{"role": "user", "content": "1+1="}]}, [["2\n", "so 2"]])
    assert scorer.score([messages]) == [[[1.0, 1.0]]]
    first, second = engine.requests
    assert "Problem:\n1+1=\n\nSolution so far:\nStep 1: 2\n\nJudge step 1 alone" in first
    assert "Solution so far:\nStep 1: 2\nStep 2: so 2\n\nJudge step 2 alone" in second


def test_chat_models_are_asked_as_users(policy: Policy) -> None:
    engine = Scripted(policy, lambda _: boxed("-1"))
    score_one(GenerativeVerifier(policy, form="processbench", sampling=SamplingConfig(), engine=engine), "p", ["a"])
    (request,) = engine.requests
    assert request.startswith("user: The following is a math problem")
    assert request.endswith("\nassistant: ")


# ---- verdicts and votes ----------------------------------------------------------------------------------------------


def test_scores_are_shares_of_votes_per_step(policy: Policy) -> None:
    said = {1: ("correct", "Correct", "incorrect", None), 2: ("correct", "incorrect", "maybe", None)}

    def script(request: str) -> list[str]:
        return boxed(*said[int(re.findall(r"Judge step (\d)", request)[0])])

    scores = score_one(critic(policy, script, 4, "step")[0], "p", ["a", "b"])
    assert isinstance(scores, Judged)
    assert scores == [2 / 3, 1 / 2]
    assert scores.prediction == -1, "a step that half of the votes call correct is correct"
    assert scores.facts["without_verdict"] == 3
    assert [each["verdict"] for each in scores.facts["critiques"]] == [*said[1][:3], None, *said[2][:3], None]
    said[1] = ("incorrect", "incorrect", "correct", None)
    assert score_one(critic(policy, script, 4, "step")[0], "p", ["a", "b"]).prediction == 0  # type: ignore[attr-defined]
    said[2] = (None,) * 4
    silent = score_one(critic(policy, script, 4, "step")[0], "p", ["a", "b"])
    assert (silent[0], math.isnan(silent[1])) == (1 / 3, True)
    said[1] = ("correct",) * 4
    unknown = score_one(critic(policy, script, 4, "step")[0], "p", ["a", "b"])
    assert unknown.prediction is None, "whether the second is the first incorrect one is not known"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("verdicts", "scores", "prediction"),
    [
        (["-1", "1", "1", "2"], [1.0, 2 / 4, 1 / 2], 1),
        (["2", "0", "0", "2"], [1 / 2, 1.0, 0.0], 2),  # a tie: what was named first
        (["0", "0", "0", None], [0.0, 0.0, 0.0], 0),  # none comes as far as the second step
        (["two", "two", "1", "-1"], [1.0, 1 / 2, 1.0], None),  # counted, as in the official code
        (["3", "3", "1", "-2"], [1.0, 0.0, 0.0], None),  # nor is there a fourth step
        ([None, "-1", None, None], [1.0, 1.0, 1.0], -1),
    ],
)
def test_votes_on_the_first_incorrect_step(
    policy: Policy, verdicts: list[str | None], scores: list[float], prediction: int | None
) -> None:
    scorer, _ = critic(policy, lambda _: boxed(*verdicts), 4, "processbench")
    found = score_one(scorer, "p", ["a", "b", "c"])
    assert isinstance(found, Judged)
    assert (list(found), found.prediction) == (scores, prediction)
    clean = sum(each == "-1" for each in verdicts) / sum(each in ("-1", "0", "1", "2") for each in verdicts)
    assert reduce_scores(found, meaning=scorer.meaning) == pytest.approx(clean), "the share that finds no error"


def test_a_solution_without_any_verdict_has_no_score(policy: Policy) -> None:
    found = score_one(critic(policy, lambda _: boxed(None, "x"), 2, "processbench")[0], "p", ["a", "b"])
    assert isinstance(found, Judged)
    assert all(map(math.isnan, found))
    assert (found.prediction, found.facts["without_verdict"]) == (None, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([None, "-1", "0", "1", "2", "9", "x", "1.0"]), min_size=1, max_size=8))
def test_the_prediction_is_that_of_the_official_code(verdicts: list[str | None]) -> None:
    """Voting of run_eval.py, written anew; an index that no paragraph has can never match there."""
    named = [each for each in verdicts if each is not None]
    winner = Counter(named).most_common(1)[0][0] if named else None
    official = int(winner) if winner in ("-1", "0", "1", "2", "9") else None
    scorer = GenerativeVerifier.__new__(GenerativeVerifier)
    scorer.form, scorer.sampling, scorer.temperature = FORMS["processbench"], SamplingConfig(n=len(verdicts)), None
    critiques = [(None, Completion(np.array([1]), np.array([2]), text=text)) for text in boxed(*verdicts)]
    assert scorer._judged(3, critiques).prediction == (None if official == 9 else official)


def test_costs_are_counted(policy: Policy) -> None:
    scorer, engine = critic(policy, lambda _: [r"\boxed{correct}", "abc"], 2, "step")
    found = scorer.score([Solutions({"id": "x", "prompt": "p"}, [["a", "b"], ["c"]])])[0]
    lengths = [len(request) for request in engine.requests]
    assert [each.facts["generated_tokens"] for each in found] == [2 * 18, 18]
    assert [each.facts["prefill_tokens"] for each in found] == [sum(lengths[:2]), lengths[2]]
    assert [each["tokens"] for each in found[1].facts["critiques"]] == [15, 3]


def test_a_request_that_solutions_share_is_made_once(policy: Policy) -> None:
    scorer, engine = critic(policy, lambda _: boxed("correct"), 1, "step")
    pair = scorer.score([Solutions({"id": "x", "prompt": "p"}, [["a", "b"], ["a", "c"]])])[0]
    assert len(engine.requests) == len(set(engine.requests)) == 3
    assert [len(each.facts["critiques"]) for each in pair] == [2, 2]
    assert pair[0].facts["generated_tokens"] == pair[1].facts["generated_tokens"]


def test_requests_that_leave_no_room_are_not_made(policy: Policy) -> None:
    lengths = [len(text) for _, text in FORMS["step"].questions({"prompt": "p"}, ["a", "b"])]
    scorer, engine = critic(policy, lambda _: boxed("correct"), 1, "step", max_length=lengths[0] + 5)
    found = score_one(scorer, "p", ["a", "b"])
    assert (found[0], math.isnan(found[1]), engine.limits) == (1.0, True, [5])
    assert scorer.score([Solutions({"prompt": "p"}, [])]) == [[]]


def test_a_score_depends_on_nothing_else_that_is_scored(make_policy: MakePolicy) -> None:
    policy = make_policy()
    sampling = SamplingConfig(n=2, max_new_tokens=6)
    form = CritiqueForm(prompt="{problem}{steps}?", line="{text}", verdict="([a-z])", words=("a", "b"))
    scorer = GenerativeVerifier(policy, form=form, sampling=sampling, template=PLAIN, name="m")
    texts = [
        [each["text"] for each in row.facts["critiques"]]  # type: ignore[attr-defined]
        for row in scorer.score([Solutions({"prompt": "p"}, [["a", "b"], ["c"]]), Solutions({"prompt": "q"}, [["a"]])])[
            0
        ]
    ]
    alone = scorer.score([Solutions({"prompt": "p"}, [["c"]])])[0][0]
    assert [each["text"] for each in alone.facts["critiques"]] == texts[1]  # type: ignore[attr-defined]
    assert len({text for row in texts for text in row}) > 3
    found = scorer.provenance()
    assert (found["scorer"], found["model"], found["sampling"]["n"]) == ("critic", "m", 2)
    assert found["form"]["words"] == ("a", "b")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_name_the_form_and_the_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--scorer Critic --scorer.path m --scorer.form processbench --scorer.sampling.n 8 --out x"
    config = parse(EvaluatePRMConfig, [*words.split(), "--scorer.sampling.temperature", "1"], command="evaluate-prm")
    assert config.scorer == load.Critic("m", form="processbench", sampling=SamplingConfig(n=8, max_new_tokens=2048))
    assert load.scorer_of("critic:m") == load.Critic("m")
    assert load.Critic("m", engine=VLLM()).engine == VLLM()
    scorer = load.load_scorer(load.Critic("tiny-0.1m", template="task", form="task"), device="cpu", max_rows=3)
    assert isinstance(scorer, GenerativeVerifier)
    assert (scorer.template.style, scorer.max_rows, scorer.form) == ("plain", 3, FORMS["task"])
    for trained, taken in (("gsm8k", CRITIC_TEMPLATE), ("task", get_template("task"))):
        monkeypatch.setattr("stepkd.models.source.trained_template", lambda _, name=trained: get_template(name))
        found = load.load_scorer(load.Critic("tiny-0.1m"), device="cpu")
        assert found.template == taken, "a template that asks for a solution is not put around a request"  # type: ignore[attr-defined]
    own = tmp_path / "own.yaml"
    own.write_text("prompt: '{problem} {steps}'\nline: '{text}'\nverdict: '(.)'\nwords: [y, n]\n")
    assert get_form(str(own)) == CritiqueForm(
        prompt="{problem} {steps}", line="{text}", verdict="(.)", words=("y", "n")
    )


@pytest.mark.slow
def test_a_fresh_process_knows_scorers_by_name() -> None:
    """A command reads its settings before anything has loaded a scorer."""
    code = (
        "from stepkd.cli.parser import parse; from stepkd.evaluation.config import EvaluatePRMConfig; "
        "words = '--scorer Tags --scorer.path m --scorer.correct Y --scorer.incorrect N --out x'; "
        "print(parse(EvaluatePRMConfig, words.split(), command='evaluate-prm').scorer.correct)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Y\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "{problem}"}, r"must hold \{steps\} once"),
        ({"line": ""}, r"must hold \{text\} once"),
        ({"verdict": "("}, "is not a regular expression"),
        ({"verdict": "a"}, "one group"),
        ({"words": ("a", "a")}, "two different words"),
        ({"words": ("Y", "y")}, "two different words"),
    ],
)
def test_forms_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    usable = {"prompt": "{problem}{steps}", "line": "{text}", "verdict": "(a)"}
    with pytest.raises(ConfigError, match=message):
        CritiqueForm(**usable | change)


def test_bad_input(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="3 critiques at temperature 0 would all be the same"):
        load.Critic("m", sampling=SamplingConfig(n=3, temperature=0))
    with pytest.raises(ConfigError, match="template 'gsm8k' asks for a solution, and a critic is asked for a critique"):
        load.Critic("m", template="gsm8k")
    with pytest.raises(ConfigError, match=r"no form of critiques 'stop'.* Did you mean 'step'"):
        load.Critic("m", form="stop")
    scorer, _ = critic(policy, lambda _: boxed("-1"), 1, "processbench")
    with pytest.raises(DataError, match="x, column 'completions': step 1 of 2, from 0, has no text"):
        scorer.score([Solutions({"id": "x", "prompt": "1"}, [["a", " "]])])
    with pytest.raises(DataError, match="x, column 'prompt': the row has no problem"):
        scorer.score([Solutions({"id": "x"}, [["a"]])])


# ---- the tiny world --------------------------------------------------------------------------------------------------


def test_the_tiny_worlds_critiques_are_judged_as_the_exact_checker_does(policy: Policy) -> None:
    """A verifier that repeats them, asked in the form `task`."""
    rows = [
        row
        for name in ("modular:terms=4", "cellular", "star_graph")
        for row in make_rows(name, 6, seed=1, noise=Noise(0.4))
    ]
    known = {each["prompt"]: each["solution"] for row in rows for each in critique_rows(row)}
    scorer, engine = critic(policy, lambda request: [known.get(request, "#### 0")], 1, "task")
    for row in rows:
        (scores,) = scorer.score([Solutions(row, [row["steps"]])])[0]
        marks = check_row(row, row["steps"])
        first = marks.index(False) if False in marks else -1
        assert scores.prediction == first
    assert set(known) <= set(engine.requests)
