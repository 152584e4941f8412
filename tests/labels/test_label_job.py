"""The labelling job: what it writes, that ranks and interruptions change nothing, and what it refuses."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.completion import Completion
from stepkd.data.config import DataConfig
from stepkd.data.load import load_rows
from stepkd.data.rows import COMPLETION
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.labels.labellers import Outcome, Scored, Solution, StepLabels, TaskChecker
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.settings import Cut, Fitted, LabelConfig, OwnSteps, Reject, Sampled, StepsConfig
from stepkd.runs.files import write_json
from stepkd.runs.job import Job, read_settings
from stepkd.sampling.config import Transformers
from stepkd.sampling.engine import SamplingConfig
from stepkd.steps.confidence import SegmentThreshold, fit_threshold
from stepkd.tasks.rows import check_row

FILES = ["labels.jsonl", "log", "parts", "settings.json", "summary.json"]


def rows(spec: LabelConfig) -> list[dict[str, Any]]:
    return load_rows(DataConfig(path=str(Path(spec.out) / "labels.jsonl")), contract=COMPLETION)


def content(spec: LabelConfig) -> tuple[bytes, bytes]:
    """The two files that must not depend on how the job was run."""
    return tuple((Path(spec.out) / name).read_bytes() for name in ("labels.jsonl", "summary.json"))  # type: ignore


class StubEngine:
    """The same given texts for every problem."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], *, eos: bool = True) -> None:
        self.tokenizer, self.texts, self.eos = tokenizer, texts, eos

    def generate(self, prompts: Any, spec: Any, **options: Any) -> list[list[Completion]]:
        return [[self._completion(p, j, text) for j, text in enumerate(self.texts)] for p in range(len(prompts))]

    def _completion(self, p: int, j: int, text: str) -> Completion:
        ids = (*self.tokenizer(text, add_special_tokens=False)["input_ids"], *[self.tokenizer.eos_token_id] * self.eos)
        return Completion([], ids, logprobs=(-1.0,) * len(ids), raw_logprobs=(-1.0,) * len(ids), text=text, sample=j)


# ---- what a job leaves behind --------------------------------------------------------------------------------------


def test_folder_rows_and_provenance(spec: LabelConfig, run: Any, drawn: Any) -> None:
    spec = drawn(spec, max_new_tokens=200, seed=3)  # what is cut off has no answer
    reports: list[tuple[str, int, int]] = []
    summary = run(spec, report=lambda phase, done, total, figures: reports.append((phase, done, total)))
    assert sorted(path.name for path in Path(spec.out).iterdir()) == FILES
    parts = {phase.name: len(list(phase.iterdir())) for phase in (Path(spec.out) / "parts").iterdir()}
    assert parts == {"solutions": 3, "labels": 5}
    assert [r for r in reports if r[0] == "solutions"] == [("solutions", done, 5) for done in (2, 4, 5)]
    assert [r for r in reports if r[0] == "labels"] == [("labels", done, 10) for done in range(2, 11, 2)]
    labelled = rows(spec)
    assert [row["id"] for row in labelled] == [f"{row['problem_id']}/{j % 2}" for j, row in enumerate(labelled)]
    assert summary is not None
    assert summary["labelled"] == len(labelled) == 10
    for row in labelled:
        assert "".join(row["steps"]) == row["completion"]
        assert len(row["steps"]) == len(row["step_labels"]) == len(row["step_values"]) == len(row["step_ends"])
        assert row["step_labels"] == [value > 0 for value in row["step_values"]]
        samples = [each["correct"] for each in labelled if each["problem_id"] == row["problem_id"]]
        assert row["pass_rate"] == sum(samples) / len(samples)
        assert row["sampling"]["temperature"] == 1.0
        assert row["seed"] == 3
        assert set(row["label_facts"]) >= {"successes", "trials", "generated_tokens", "prefill_tokens"}
        facts = row["labelling"]
        assert (facts["labeller"], facts["model"], facts["J"], facts["temperature"], facts["seed"]) == (
            "monte_carlo", "tiny-0.1m", 2, 1.0, 3
        )  # fmt: skip
        assert facts["segmenter"]["name"] == "newline"
        assert facts["data"] == "task:train"
        check_row(row, row["steps"])  # the problem is whole: task, meta and answer are there
    assert {label for row in labelled for label in row["step_labels"]} == {True, False}
    assert str(Path.home()) not in json.dumps(read_settings(spec.out))


def test_solutions_that_share_prefixes_are_labelled_in_one_batch(spec: LabelConfig, run: Any) -> None:
    """Else a prefix would be drawn anew in every batch of a problem: the job has room for two continuations at once."""
    labeller = MonteCarlo(sampling=SamplingConfig(n=2), share=True)
    spec = replace(spec, labeller=labeller, engine=Transformers(2))
    run(spec)
    parts = list((Path(spec.out) / "parts" / "labels").iterdir())
    assert len(parts) == len({row["problem_id"] for row in rows(spec)}) < len(rows(spec))


def test_summary_by_recount(spec: LabelConfig, run: Any, drawn: Any) -> None:
    spec = drawn(replace(spec, labeller=TaskChecker()), temperature=0.7)
    summary = run(spec)
    labelled = rows(spec)
    assert json.loads((Path(spec.out) / "summary.json").read_text()) == summary
    flat = Counter(label for row in labelled for label in row["step_labels"])
    assert (
        summary["steps"]
        == sum(flat.values())
        == sum(part["incorrect"] + part["correct"] for part in summary["by_position"])
    )
    assert (summary["balance"]["correct"], summary["balance"]["incorrect"]) == (flat[True], flat[False])
    for part in summary["by_position"]:
        here = [row["step_labels"][part["position"]] for row in labelled if len(row["steps"]) > part["position"]]
        assert (part["correct"], part["incorrect"], part["unlabelled"]) == (sum(here), len(here) - sum(here), 0)
    assert summary["sampling"]["tokens_generated"] == sum(len(row["token_ids"]) for row in labelled)
    assert summary["cut_off"] == sum(row["finish"] == "length" for row in labelled)
    assert all(len(row["raw_logprobs"]) == len(row["logprobs"]) for row in labelled), "temperature is not 1"


def test_duplicates_and_empty_solutions_are_counted(spec: LabelConfig, run: Any, drawn: Any, policy: Any) -> None:
    texts = ["1+1=2\n#### 2", "1+1=2\n#### 2", "", " \n", "3"]
    spec = drawn(replace(spec, labeller=TaskChecker()), n=5)
    stub = StubEngine(policy.tokenizer, texts)
    summary = run(spec, engine=stub)
    assert summary["dropped"] == {"duplicate": 5, "no_steps": 10}
    assert (summary["solutions"], summary["labelled"]) == (25, 10)
    assert [row["id"].rpartition("/")[2] for row in rows(spec)][:4] == ["0", "4", "0", "4"]
    every = replace(spec, solutions=replace(spec.solutions, dedupe=False), out=spec.out + "-all")
    assert run(every, engine=stub)["labelled"] == 15
    nothing = replace(drawn(spec, n=1), out=spec.out + "-none")
    with pytest.raises(DataError, match=r"none of 5 solutions could be labelled \(5 no_steps\)"):
        run(nothing, engine=StubEngine(policy.tokenizer, [""]))


def test_a_solution_without_labels_is_dropped(spec: LabelConfig, run: Any, policy: Any) -> None:
    class Undecided:
        def label(self, solutions: Sequence[Solution]) -> list[StepLabels]:
            return [StepLabels(((True,) if s.index % 4 else (None,)) * len(s.steps)) for s in solutions]

        def provenance(self) -> dict[str, Any]:
            return {"labeller": "undecided"}

    summary = run(replace(spec, labeller=TaskChecker()), labeller=Undecided())
    assert summary["dropped"] == {"no_labels": 3}
    assert summary["labelled"] == 7


# ---- ranks and interruptions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [OwnSteps(), Fitted(quantile=0.1)])
def test_ranks_do_not_change_the_labels(
    spec: LabelConfig, run: Any, run_ranks: Any, recording: Any, steps: StepsConfig
) -> None:
    spec = replace(spec, steps=steps)
    run(spec)
    for world_size in (2, 3):
        sharded = replace(spec, out=f"{spec.out}-{world_size}")
        engine = recording()
        results, waits = run_ranks(sharded, world_size, engine=engine)
        assert waits >= 1, "some rank came before the others had drawn their share"
        assert content(sharded) == content(spec)
        assert any(result is None for result in results), "a rank that is not the last one writes nothing"
        assert sorted(engine.sampled) == list(range(5)), "no problem twice"
        assert max(Counter(engine.continued).values()) == 1, "no solution twice"


def test_an_interruption_anywhere_repeats_only_what_was_in_flight(spec: LabelConfig, run: Any, recording: Any) -> None:
    whole = recording()
    run(spec, engine=whole)
    for stop_at in range(1, whole.calls + 1):
        torn = replace(spec, out=f"{spec.out}-{stop_at}")
        first, then = recording(stop_at=stop_at), recording()
        with pytest.raises(KeyboardInterrupt):
            run(torn, engine=first)
        assert not (Path(torn.out) / "labels.jsonl").exists()
        run(torn, engine=then)
        assert content(torn) == content(spec)
        assert sorted(first.sampled + then.sampled) == list(range(5))
        assert sorted(first.continued + then.continued) == sorted(whole.continued)


def test_resume_with_another_number_of_ranks(spec: LabelConfig, run: Any, run_ranks: Any, recording: Any) -> None:
    run(spec)
    torn = replace(spec, out=spec.out + "-torn")
    first, then = recording(stop_at=None), recording()
    with pytest.raises(StepkdError, match=r"rank 0 waits for units of solutions"):
        run(torn, rank=0, world_size=2, wait_s=0, engine=first)
    run_ranks(torn, 3, engine=then)
    assert content(torn) == content(spec)
    assert sorted(first.sampled + then.sampled) == list(range(5))


def test_the_same_command_again_draws_nothing(spec: LabelConfig, run: Any, recording: Any) -> None:
    first = run(spec)
    before = content(spec)
    (Path(spec.out) / "labels.jsonl").unlink()  # as if killed while merging
    engine = recording()
    assert run(spec, engine=engine) == first
    assert engine.calls == 0
    assert content(spec) == before


# ---- the fitted threshold ------------------------------------------------------------------------------------------


def test_the_threshold_is_fitted_on_the_pool_and_kept(spec: LabelConfig, run: Any, drawn: Any, recording: Any) -> None:
    spec = drawn(replace(spec, steps=Fitted(quantile=0.1)), temperature=0.8)
    other, spec = replace(spec, out=spec.out + "-2"), replace(spec, labeller=TaskChecker())
    summary = run(spec)
    path = Path(spec.out) / "threshold.json"
    found = SegmentThreshold.load(path)
    by_hand = fit_threshold([row["raw_logprobs"] for row in rows(spec)], 0.1)
    assert (found.value, found.share, found.num_tokens) == (by_hand.value, by_hand.share, by_hand.num_tokens)
    assert (found.model, found.sampling["temperature"], found.quantile) == ("tiny-0.1m", 0.8, 0.1)
    assert summary["threshold"] == found.value
    assert rows(spec)[0]["labelling"]["segmenter"] == {
        "name": "adaptive_step", "threshold": found.value
    }  # fmt: skip
    assert max(len(row["steps"]) for row in rows(spec)) > 1

    # Killed between the fit and the labels: the same threshold is fitted, on the solutions that are there.
    with pytest.raises(KeyboardInterrupt):
        run(other, engine=recording(stop_at=4))
    (Path(other.out) / "threshold.json").unlink()
    assert run(other)["threshold"] == found.value
    assert (Path(other.out) / "threshold.json").read_bytes() == path.read_bytes()


def test_a_threshold_of_another_model_is_said(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    file = tmp_path / "threshold.json"
    threshold = fit_threshold([[-0.1, -2.0, -0.3, -0.01]] * 5, 0.3, model="tiny-0.5m")
    write_json(file, threshold.to_dict())
    spec = replace(spec, steps=Cut(segmenter=f"adaptive_step:{file}"), labeller=TaskChecker())
    with pytest.warns(UserWarning, match=r"fitted on samples of tiny-0.5m, and tiny-0.1m is another model.*30.0%"):
        run(spec)
    write_json(file, replace(threshold, model="tiny-0.1m").to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(replace(spec, out=spec.out + "-2"))


def test_the_entropy_threshold(spec: LabelConfig, run: Any) -> None:
    spec = replace(spec, steps=Fitted(segmenter="entropy", quantile=0.1), labeller=TaskChecker())
    assert run(spec)["segmenter"]["name"] == "entropy"
    assert SegmentThreshold.load(Path(spec.out) / "threshold.json").signal == "entropy"


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labeller": MonteCarlo(sampling=SamplingConfig(n=3, max_new_tokens=16))}, "labeller.J: 2 then, 3 now"),
        ({"temperature": 0.5}, "sampling.temperature: 1.0 then, 0.5 now"),
        ({"steps": Cut(segmenter="sentence")}, "segmenter"),
        ({"seed": 1}, "labeller.seed: 0 then, 1 now"),
        ({"labeller": TaskChecker()}, "labeller.labeller: 'monte_carlo' then, 'checker' now"),
        ({"problems": 'task:task="modular:terms=3,modulus=2",n=6'}, "data.rows: 5 then, 6 now"),
        ({"template": "plain"}, "prompt"),
        ({"engine": Transformers(8)}, "batch_size: 4 then, 8 now"),
    ],
)
def test_other_settings_are_refused(
    spec: LabelConfig, run: Any, drawn: Any, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(spec, report=_interrupt)
    other = replace(spec, **{name: value for name, value in change.items() if name in vars(spec)})
    for name, value in change.items():
        if name == "problems":
            other = replace(other, solutions=replace(other.solutions, problems=value))
        elif name not in vars(spec):
            other = drawn(other, **change)
    with pytest.raises(ConfigError) as error:
        run(other)
    assert named in str(error.value)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_overwrite(spec: LabelConfig, run: Any, drawn: Any) -> None:
    run(drawn(spec, seed=1))
    old = content(spec)
    run(spec, overwrite=True)
    new = content(spec)
    assert new != old
    (Path(spec.out) / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"more than a labelling job \(notes.txt\)"):
        run(spec, overwrite=True)


def test_foreign_folders_are_refused(spec: LabelConfig, run: Any, tmp_path: Path) -> None:
    Path(spec.out).mkdir()
    (Path(spec.out) / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not empty \(thesis.tex\) and holds no labelling job"):
        run(spec)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file: give a folder"):
        run(replace(spec, out=str(tmp_path / "file")))
    Job(tmp_path / "other", "evaluation").begin({})
    with pytest.raises(ConfigError, match=r"another kind of job \(evaluation\), not a labelling job"):
        run(replace(spec, out=str(tmp_path / "other")))


GREEDY = SamplingConfig(n=2, temperature=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampled(problems="task", model="m", sampling=replace(GREEDY, n=0)), "n=0: must be at least 1"),
        (lambda: Sampled(problems="task", model="m", sampling=GREEDY), "2 solutions of a problem at temperature 0"),
        (lambda: MonteCarlo(sampling=GREEDY), "2 continuations of a step at temperature 0 would all be the same"),
        (lambda: MonteCarlo(reduce="all"), "unknown reduce 'all'"),
        (lambda: Fitted(quantile=2.0), r"quantile=2.0: must lie in \(0, 1\)"),
        (lambda: Cut(segmenter="newlines"), "unknown segmenter 'newlines'"),
        (lambda: Cut(segmenter="reject"), "choose Reject, with the teacher"),
        (lambda: Reject(teacher="m", probability=2.0), "reject threshold 2.0"),
        (lambda: TaskChecker(given="lies"), "unknown given 'lies'"),
        (lambda: Outcome(scope="first"), "unknown scope 'first'"),
        (lambda: Scored(scorer="judge:m", threshold=1.0), "threshold=1.0: must lie between 0 and 1"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
