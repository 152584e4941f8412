"""Step-DPO pairs: the sides and their ids, every reason for dropping, ranks and interruptions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.completion import Completion
from stepkd.data.config import parse_spec
from stepkd.data.load import load_rows
from stepkd.data.rows import STEP_PREFERENCE
from stepkd.errors import ConfigError, DataError
from stepkd.grading.pool import GradingConfig
from stepkd.labels.job import run_pair_job
from stepkd.labels.settings import LabelConfig, StepPairConfig
from stepkd.labels.step_pairs import first_incorrect_step, next_step, segmenter_of
from stepkd.models.policy import Policy
from stepkd.runs.job import JobOptions
from stepkd.sampling.config import Transformers
from stepkd.sampling.engine import Branch, BranchContinuations, SamplingConfig
from stepkd.scorers.load import Judge
from stepkd.scorers.scorer import Solutions
from stepkd.steps.confidence import AdaptiveStepSegmenter, EntropySegmenter
from stepkd.steps.segment import RegexSegmenter, get_segmenter, segment
from stepkd.steps.text import text_from_ids

INCORRECT = ["1+1=0\n", "0*1=1\n", "#### 1"]  # correct, incorrect, incorrect; the answer is 0
CORRECT = "0*1=0\n#### 0"
TASK = {"task": "modular:terms=3,modulus=2,operators=+-*", "meta": {"numbers": [1, 1, 1], "operators": "+*"}}

Pairs = Callable[..., dict[str, Any] | None]


def encode(policy: Policy, text: str, *, eos: bool = True) -> tuple[int, ...]:
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    return (*ids, *[policy.tokenizer.eos_token_id] * eos)


def continuation(
    policy: Policy, identity: str, steps: Sequence[str], labels: list[Any] | None, **given: Any
) -> dict[str, Any]:
    eos = given.get("finish", "stop") == "stop"
    ids = list(encode(policy, "".join(steps), eos=eos))
    ends = [len(encode(policy, "".join(steps[: i + 1]), eos=False)) for i in range(len(steps))]
    ends[-1] = len(ids)
    row = {
        "id": identity,
        "problem_id": identity.partition("/")[0],
        "prompt": "1+1*1%2=\n",
        "completion": "".join(steps),
        "token_ids": ids,
        "logprobs": [-1.0] * len(ids),
        "step_ends": ends,
        "finish": "stop",
        "correct": False,
        "model": "tiny-0.1m",
        "sampling": {"temperature": 1.0},
        "seed": 0,
        "answer": "0",
        "steps": list(steps),
        **TASK,
    }
    return row | ({} if labels is None else {"step_labels": labels}) | given


class ScriptedEngine:
    """Continues every prefix with the same given texts; keeps what it was asked for, and may stop at a call."""

    def __init__(
        self, policy: Policy, texts: Sequence[str], *, finish: str = "stop", stop_at: int | None = None
    ) -> None:
        self.policy, self.texts, self.finish, self.stop_at = policy, texts, finish, stop_at
        self.asked: list[Branch] = []
        self.calls = 0

    def continue_branches(
        self, branches: Sequence[Branch], spec: SamplingConfig, **options: Any
    ) -> list[BranchContinuations]:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        assert spec.n == len(self.texts)
        self.asked += branches
        return [
            BranchContinuations((tuple(self._continuation(branch, j) for j in range(spec.n)),), branch.cuts[0])
            for branch in branches
        ]

    def _continuation(self, branch: Branch, j: int) -> Completion:
        ids = encode(self.policy, self.texts[j], eos=self.finish == "stop")
        return Completion(
            branch.token_ids[: branch.cuts[0]],
            ids,
            raw_logprobs=(-1.0,) * len(ids),
            finish=self.finish,
            text=self.texts[j],
            sample=j,
        )


@pytest.fixture
def pair_spec(tmp_path: Path) -> StepPairConfig:
    return StepPairConfig(
        out=str(tmp_path / "pairs"),
        completions=str(tmp_path / "rows.jsonl"),
        sampling=SamplingConfig(n=2, temperature=0.8, top_p=0.95, max_new_tokens=24),
        engine=Transformers(4),
        grading=GradingConfig(extractors=("hash",)),
        dtype="float64",
        device="cpu",
    )


@pytest.fixture
def build(policy: Policy) -> Pairs:
    """Write rows, and run the job with an engine that says these texts."""

    def start(
        spec: StepPairConfig,
        rows: Sequence[dict[str, Any]] | None = None,
        texts: Sequence[str] = (),
        *,
        engine: Any = None,
        **options: Any,
    ) -> dict[str, Any] | None:
        if rows is not None:
            Path(spec.completions).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if texts:
            spec = replace(spec, sampling=replace(spec.sampling, n=len(texts)))
            engine = ScriptedEngine(policy, texts)
        return run_pair_job(spec, policy=policy, engine=engine, options=JobOptions(**options))

    return start


def pairs(spec: StepPairConfig) -> list[dict[str, Any]]:
    return load_rows(parse_spec(spec.out), contract=STEP_PREFERENCE)


def content(spec: StepPairConfig) -> tuple[bytes, ...]:
    return tuple((Path(spec.out) / name).read_bytes() for name in ("pairs.jsonl", "summary.json"))


# ---- the pairs -----------------------------------------------------------------------------------------------------


def test_a_pair_by_hand(pair_spec: StepPairConfig, build: Pairs, policy: Policy) -> None:
    row = continuation(policy, "p/0", INCORRECT, [True, False, False], labelling={"labeller": "checker"})
    engine = ScriptedEngine(policy, ["0*1=1\n#### 0", "0*1=1\n#### 1", CORRECT, CORRECT, "0*1= 0\n#### 0"])
    summary = build(replace(pair_spec, sampling=replace(pair_spec.sampling, n=5), max_pairs=2), [row], engine=engine)
    (branch,) = engine.asked
    prompt_ids = branch.token_ids[: branch.cuts[0] - len(encode(policy, INCORRECT[0], eos=False))]
    assert policy.tokenizer.decode(prompt_ids).endswith("1+1*1%2=\n")
    assert (len(branch.cuts), branch.index) == (1, 0), "one prefix, read once"
    found = pairs(pair_spec)
    assert [row["id"] for row in found] == ["p/0/0", "p/0/1"]
    assert [row["chosen"] for row in found] == ["0*1=0\n", "0*1= 0\n"], "in the order they were drawn"
    for pair, sample in zip(found, (2, 4), strict=True):
        assert (pair["prefix"], pair["rejected"]) == ([INCORRECT[0]], INCORRECT[1])
        assert pair["prefix_ids"] + pair["rejected_ids"] == row["token_ids"][: row["step_ends"][1]]
        assert pair["chosen_ids"] == list(encode(policy, pair["chosen"], eos=False)), "no end token on a step between"
        assert (pair["problem_id"], pair["answer"], pair["meta"]) == ("p", "0", TASK["meta"])
        assert pair["labelling"] == {"labeller": "checker"}
        assert pair["pair_facts"] == {
            "solution_id": "p/0", "answer_was_correct": False, "sample": sample,
            "continuations": 5, "correct_continuations": 4
        }  # fmt: skip
        facts = pair["pairing"]
        assert (facts["builder"], facts["temperature"], facts["top_p"], facts["seed"]) == ("step_dpo", 0.8, 0.95, 0)
        assert (facts["continuations"], facts["model"], facts["check"]) == (5, "tiny-0.1m", None)
    assert summary is not None
    assert summary["dropped"] == {}
    assert summary["by_position"] == [{"position": 1, "pairs": 2, "share": 1.0}]
    texts = engine.texts
    assert summary["facts"] == {
        "continuations": 5,
        "repeated_steps": 1,
        "correct_continuations": 4,
        "steps_beyond_max_pairs": 0,
        "steps_like_the_incorrect_one": 1,
        "steps_that_failed_the_check": 0,
        "tokens_generated": sum(len(encode(policy, text)) for text in texts),
        "tokens_prefilled": branch.cuts[0],
    }


def test_the_last_step_keeps_its_end_token_and_the_prefix_may_be_empty(
    pair_spec: StepPairConfig, build: Pairs, policy: Policy
) -> None:
    eos = policy.tokenizer.eos_token_id
    rows = [
        continuation(policy, "p/0", [INCORRECT[0], "0*1=0\n", "#### 1"], [True, True, False]),
        continuation(policy, "q/0", ["#### 1"], [False]),
    ]
    build(pair_spec, rows, ["#### 0", "\n#### 0\n"])
    last, first = pairs(pair_spec)
    assert (last["chosen"], last["rejected"]) == ("#### 0", "#### 1")
    assert last["chosen_ids"][-1] == last["rejected_ids"][-1] == eos
    assert last["prefix_ids"] + last["rejected_ids"] == rows[0]["token_ids"]
    assert "".join([*last["prefix"], last["rejected"]]) == rows[0]["completion"]
    assert (first["prefix"], first["prefix_ids"], first["rejected_ids"]) == ([], [], rows[1]["token_ids"])


def test_dropped_by_reason(pair_spec: StepPairConfig, build: Pairs, policy: Policy) -> None:
    labels = [True, False, False]
    rows = [
        continuation(policy, "a/0", INCORRECT, labels),
        continuation(policy, "b/0", INCORRECT, None),
        continuation(policy, "c/0", INCORRECT, [True, True, True]),
        continuation(policy, "d/0", INCORRECT, [None, False, True]),
        continuation(policy, "e/0", INCORRECT, labels, correct=True),
        continuation(policy, "f/0", INCORRECT, labels, correct=None),
        continuation(policy, "g/0", INCORRECT[:2], [True, False], finish="length"),
        continuation(policy, "h/0", ["1+1=0\n" * 50, *INCORRECT[1:]], labels, prompt="1" * 1000 + "\n"),
        continuation(policy, "i/0", INCORRECT, labels, answer="7"),
        continuation(policy, "j/0", [INCORRECT[0], "0*1=0\n", "#### 1"], [True, False, False]),
    ]
    summary = build(pair_spec, rows, [CORRECT, "0*1=1\n#### 1"])
    assert summary is not None
    assert summary["dropped"] == {
        "first_error_unknown": 1,
        "no_labels": 1,
        "no_correct_continuation": 1,
        "no_incorrect_step": 1,
        "only_the_incorrect_step": 1,
        "correct_answer": 1,
        "too_long": 1,
        "ungraded": 1,
        "incorrect_step_cut_off": 1,
    }
    assert [row["id"] for row in pairs(pair_spec)] == ["a/0/0"]
    assert (summary["items"], summary["items_with_pairs"], summary["problems"]) == (10, 1, 1)
    both = build(replace(pair_spec, take="all", out=pair_spec.out + "-all"), rows, [CORRECT, "0*1=1\n#### 1"])
    assert both is not None
    assert both["pairs"] == 3
    assert not {"correct_answer", "ungraded"} & set(both["dropped"])
    conflict = pairs(replace(pair_spec, out=pair_spec.out + "-all"))[1]
    assert (conflict["id"], conflict["pair_facts"]["answer_was_correct"]) == ("e/0/0", True)


def test_nothing_left_is_an_error_and_the_summary_says_why(
    pair_spec: StepPairConfig, build: Pairs, policy: Policy
) -> None:
    after_the_answer = continuation(policy, "a/0", ["#### 0\n", "0*1=1\n"], [True, False])
    with pytest.raises(DataError, match=r"no pair could be made from 1 items \(1 no_usable_step\)"):
        build(pair_spec, [after_the_answer], ["", " "])
    summary = json.loads((Path(pair_spec.out) / "summary.json").read_text())
    assert (summary["dropped"], summary["facts"]["unusable_steps"]) == ({"no_usable_step": 1}, 2)
    assert not (Path(pair_spec.out) / "pairs.jsonl").exists()


def test_the_same_mistake_of_several_solutions_counts_once(
    pair_spec: StepPairConfig, build: Pairs, policy: Policy
) -> None:
    labels = [True, False, False]
    rows = [
        continuation(policy, "a/0", INCORRECT, labels),
        continuation(policy, "a/1", [*INCORRECT[:2], "#### 5"], labels),
        continuation(policy, "a/2", [INCORRECT[0], "0*1=8\n", "#### 8"], labels),
        continuation(policy, "b/0", INCORRECT, labels),
    ]
    summary = build(pair_spec, rows, [CORRECT])
    assert [row["id"] for row in pairs(pair_spec)] == ["a/0/0", "a/2/0", "b/0/0"]
    assert summary is not None
    assert (summary["pairs"], summary["items_with_pairs"], summary["dropped"]) == (3, 3, {"repeated_pair": 1})


def test_labels_of_other_kinds(policy: Policy, pair_spec: StepPairConfig) -> None:
    def step(labels: list[Any], **settings: Any) -> int | str:
        return first_incorrect_step(continuation(policy, "a/0", INCORRECT, labels), replace(pair_spec, **settings))

    assert step([1, 0, -1]) == 2
    assert step([1, 0, -1], neutral="incorrect") == 1
    assert step([1, 0, -1], neutral="mask") == "first_error_unknown"
    assert step([0.9, 0.5, 0.4]) == 2
    assert step([0.9, 0.6, 0.5], threshold=0.7) == 1
    assert step([0.9, 0.6, 0.5], threshold=0.1) == "no_incorrect_step"


# ---- the check of the better step ----------------------------------------------------------------------------------


def test_the_better_step_is_checked(pair_spec: StepPairConfig, build: Pairs, policy: Policy) -> None:
    spec = replace(pair_spec, check="checker")
    rows = [continuation(policy, "a/0", INCORRECT, [True, False, False])]
    lucky = "1*1=1\n#### 0"  # an incorrect step that ends correct
    summary = build(spec, rows, [lucky, CORRECT])
    assert summary is not None
    assert summary["facts"]["steps_that_failed_the_check"] == 1
    assert [row["chosen"] for row in pairs(spec)] == ["0*1=0\n"]
    assert pairs(spec)[0]["pairing"]["check"]["scorer"]["scorer"] == "checker"
    with pytest.raises(DataError, match=r"1 failed_the_check"):
        build(replace(spec, out=spec.out + "-2"), rows, [lucky, lucky])
    unknown = [{name: value for name, value in rows[0].items() if name not in TASK}]
    with pytest.raises(DataError, match=r"row 'a/0' has no 'task' and 'meta'.*choose another labeller or scorer"):
        build(replace(spec, template="task", out=spec.out + "-3"), unknown, [CORRECT])


class StubScorer:
    """Scores every step by its length in tenths; no score for one that was cut off."""

    meaning = "correctness"

    def __init__(self) -> None:
        self.asked: list[Solutions] = []

    def score(self, problems: Sequence[Solutions]) -> list[list[list[float]]]:
        self.asked += problems
        return [[[math.nan if "x" in s else len(s) / 10 for s in steps] for steps in p.solutions] for p in problems]

    def provenance(self) -> dict[str, Any]:
        return {"scorer": "stub"}


def test_a_scorer_checks_the_better_step(
    pair_spec: StepPairConfig, build: Pairs, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, loaded = StubScorer(), []
    monkeypatch.setattr("stepkd.labels.step_pairs.load_scorer", lambda given, **_: loaded.append(given) or scorer)
    rows = [continuation(policy, f"{name}/0", INCORRECT, [True, False, False]) for name in "ab"]
    rows[1] |= {"answer": "5"}  # nothing to check there
    spec = replace(pair_spec, check=Judge("m", reference=True), threshold=0.4)
    summary = build(spec, rows, ["1\n#### 0", "xxxx\n#### 0", "123\n#### 0"])
    assert summary is not None
    assert loaded == [Judge("m", reference=True)]
    (asked,) = scorer.asked
    assert (asked.row["answer"], asked.row["prompt"]) == ("0", rows[0]["prompt"])
    assert list(asked.solutions) == [[INCORRECT[0], step] for step in ("1\n", "xxxx\n", "123\n")]
    assert [row["chosen"] for row in pairs(spec)] == ["123\n"], "0.4 passes, 0.2 and no score do not"
    assert summary["facts"]["steps_that_failed_the_check"] == 2
    assert summary["dropped"] == {"no_correct_continuation": 1}


# ---- how the next step is cut --------------------------------------------------------------------------------------


def drawn(policy: Policy, text: str, **given: Any) -> Completion:
    ids = encode(policy, text, eos=given.get("finish", "stop") == "stop")
    raw = given.pop("raw", (-0.1,) * len(ids))
    return Completion([5], ids, raw_logprobs=raw, finish=given.get("finish", "stop"), text=text)


@pytest.mark.parametrize(
    "name", ["newline", "blank_line", "step_heading", "sentence", "whole", "regex:;", "regex_before:;"]
)
def test_the_step_is_the_rows_next_one(policy: Policy, name: str) -> None:
    """Cutting a continuation alone gives the step that cutting the whole solution gives."""
    whole = "a. b;\n\nStep 2: c; d\ne. f"
    segmenter = get_segmenter(name)
    ids = encode(policy, whole)
    spans = segment(segmenter, text_from_ids(policy.tokenizer, ids))
    for start, end in spans:
        rest = Completion([5, *ids[:start]], ids[start:], raw_logprobs=(-1.0,) * len(ids[start:]))
        step = next_step(rest, start, segmenter, policy)
        assert step is not None
        assert step.token_ids == ids[start:end]


def test_steps_that_cannot_be_chosen(policy: Policy) -> None:
    newline = get_segmenter("newline")

    def step(continuation: Completion) -> Any:
        return next_step(continuation, 1, newline, policy)

    assert step(drawn(policy, "")) is None
    assert step(drawn(policy, " \n")) is None
    assert step(drawn(policy, "12", finish="length")) is None
    assert step(drawn(policy, "12\n34", finish="length")).text == "12\n"


def test_signal_segmenters(policy: Policy) -> None:
    raw = (-0.1, -3.0, -0.1, -0.1, -0.1)
    step = next_step(drawn(policy, "1234", raw=raw), 1, AdaptiveStepSegmenter(0.5), policy)
    assert step is not None
    assert step.text == "12"
    every = next_step(drawn(policy, "1234"), 1, EntropySegmenter(0.0), policy)
    assert every is not None
    assert every.text == "1", "an untrained model is in doubt everywhere"


def test_the_segmenter_of_a_row() -> None:
    def of(facts: Any) -> Any:
        return segmenter_of({"id": "a", "labelling": {"segmenter": facts}})

    assert segmenter_of({"id": "a"}) == of(None) == of({"name": "of the row"}) == get_segmenter("newline")
    assert of({"name": "sentence"}) == get_segmenter("sentence")
    assert of({"name": "regex", "pattern": ";", "cut": "after"}) == RegexSegmenter(";")
    assert of({"name": "regex_before", "pattern": "Step", "cut": "before"}) == RegexSegmenter("Step", "before")
    assert of({"name": "adaptive_step", "threshold": 0.3}) == AdaptiveStepSegmenter(0.3)
    with pytest.raises(ConfigError, match="'reject', which needs a teacher"):
        of({"name": "reject", "threshold": 0.3})
    with pytest.raises(ConfigError, match="needs a number as threshold"):
        of({"name": "entropy", "limit": 1})


# ---- ranks and interruptions ---------------------------------------------------------------------------------------


def many(policy: Policy) -> list[dict[str, Any]]:
    """Seven solutions with an incorrect step and two without, in no order."""
    correct = {3, 6}
    return [
        continuation(
            policy, f"p{i}/0", INCORRECT, [True, i in correct, True], prompt=f"{i}+1*1%2=\n", **{"correct": False}
        )
        for i in range(9)
    ]


def test_ranks_do_not_change_the_pairs(pair_spec: StepPairConfig, build: Pairs, policy: Policy) -> None:
    texts = [CORRECT, "0*1=1\n#### 0"]
    build(pair_spec, many(policy), texts)
    assert [row["id"] for row in pairs(pair_spec)] == [f"p{i}/0/0" for i in (0, 1, 2, 4, 5, 7, 8)]
    for world_size in (2, 3):
        sharded = replace(pair_spec, out=f"{pair_spec.out}-{world_size}")
        engine = ScriptedEngine(policy, texts)
        results = [build(sharded, engine=engine, rank=r, world_size=world_size) for r in range(world_size)]
        assert [result is None for result in results] == [True] * (world_size - 1) + [False]
        assert content(sharded) == content(pair_spec)
        assert sorted(branch.index for branch in engine.asked) == [0, 1, 2, 4, 5, 7, 8], "no solution twice"


def test_an_interruption_repeats_only_what_was_in_flight(
    pair_spec: StepPairConfig, build: Pairs, policy: Policy
) -> None:
    texts = [CORRECT, "0*1=1\n#### 0"]
    whole = ScriptedEngine(policy, texts)
    build(pair_spec, many(policy), engine=whole)
    assert whole.calls == 4
    for stop_at in range(1, whole.calls + 1):
        torn = replace(pair_spec, out=f"{pair_spec.out}-{stop_at}")
        first, then = ScriptedEngine(policy, texts, stop_at=stop_at), ScriptedEngine(policy, texts)
        with pytest.raises(KeyboardInterrupt):
            build(torn, engine=first)
        assert not (Path(torn.out) / "pairs.jsonl").exists()
        if stop_at == 2:  # a write cut off in the middle
            (Path(torn.out) / "parts" / "pairs" / ".000001.jsonl.0.tmp").write_bytes(b'{"id": "p')
        assert build(torn, engine=then, rank=0, world_size=1) is not None
        assert content(torn) == content(pair_spec)
        asked = [branch.index for branch in first.asked + then.asked]
        assert sorted(asked) == sorted(branch.index for branch in whole.asked)
    again = ScriptedEngine(policy, texts)
    build(pair_spec, engine=again)
    assert again.calls == 0


def test_a_real_sampler_draws_the_same_whatever_the_ranks(
    pair_spec: StepPairConfig, build: Pairs, policy: Policy
) -> None:
    """An untrained model, whose steps are single characters here; a prefix ends in the answer, and may go on without
    another number."""
    settings: dict[str, Any] = {"sampling": replace(pair_spec.sampling, n=8, max_new_tokens=6)}
    settings["grading"] = GradingConfig(extractors=("last_number",))
    pair_spec = replace(pair_spec, engine=Transformers(16), max_pairs=3, **settings)
    cut = {"segmenter": {"name": "regex", "pattern": "[^0-9]", "cut": "after"}}
    rows = [row | {"labelling": cut} for row in many(policy)]
    summary = build(pair_spec, rows)
    assert summary is not None
    assert summary["pairs"] > 2
    assert summary["facts"]["correct_continuations"] < summary["facts"]["continuations"] == 7 * 8
    solutions = {row["id"]: row for row in rows}
    for pair in pairs(pair_spec):
        source = solutions[pair["pair_facts"]["solution_id"]]
        k = len(pair["prefix"])
        assert source["step_labels"][: k + 1] == [True] * k + [False]
        assert pair["prefix"] + [pair["rejected"]] == source["steps"][: k + 1]
        assert pair["prefix_ids"] + pair["rejected_ids"] == source["token_ids"][: source["step_ends"][k]]
        assert policy.tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True) == pair["chosen"]
    sharded = replace(pair_spec, out=pair_spec.out + "-2")
    assert build(sharded, rank=0, world_size=2) is None
    assert build(sharded, rank=1, world_size=2) == summary
    assert content(sharded) == content(pair_spec)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"take": "correct"}, "unknown take 'correct'"),
        ({"max_pairs": 0}, "max_pairs=0: must be at least 1"),
        ({"sampling": SamplingConfig(n=2, temperature=0)}, "2 continuations of a prefix at temperature 0 would all be"),
        ({"threshold": 1.0}, "threshold=1.0: must lie between 0 and 1"),
        ({"neutral": "good"}, "unknown neutral 'good'"),
    ],
)
def test_contradicting_settings(pair_spec: StepPairConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(pair_spec, **change)


def test_rows_and_folders_that_are_refused(
    pair_spec: StepPairConfig, build: Pairs, policy: Policy, spec: LabelConfig, run: Any
) -> None:
    row = continuation(policy, "a/0", INCORRECT, [True, False, False])
    with pytest.raises(DataError, match="row 'a/0' is no completion"):
        build(pair_spec, [{"id": "a/0", "prompt": "p", "completions": ["x"], "labels": [True]}])
    with pytest.raises(DataError, match="row 'a/0' has no 'answer'"):
        build(pair_spec, [row | {"answer": None}])
    with pytest.raises(DataError, match="its token ids are not those of its text"):
        build(pair_spec, [row | {"completion": "another\n" + row["completion"]}], [CORRECT])
    with pytest.raises(ConfigError, match="labelled under another prompt"):
        build(pair_spec, [row | {"labelling": {"prompt": "0123"}}], [CORRECT])
    assert not (Path(pair_spec.out) / "pairs.jsonl").exists()
    pair_spec = replace(pair_spec, out=pair_spec.out + "-2")
    build(pair_spec, [row], [CORRECT])
    seed_1 = replace(pair_spec, sampling=replace(pair_spec.sampling, seed=1))
    with pytest.raises(ConfigError, match=r"pairing.seed: 0 then, 1 now"):
        build(seed_1, [row], [CORRECT])
    with pytest.raises(ConfigError, match=r"another kind of job \(pair job\), not a labelling job"):
        run(replace(spec, out=pair_spec.out))
    run(spec)
    with pytest.raises(ConfigError, match=r"another kind of job \(labelling job\), not a pair job"):
        build(replace(pair_spec, out=spec.out), [row], [CORRECT])
    build(seed_1, [row], [CORRECT], overwrite=True)
    assert pairs(pair_spec)[0]["pairing"]["seed"] == 1
