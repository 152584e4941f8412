"""The job that compares test-time methods: its rows, its costs, how it resumes, and settings that it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stepkd.cli import main
from stepkd.cli.parser import parse
from stepkd.errors import ConfigError
from stepkd.evaluation.config import METHODS, SearchJobConfig
from stepkd.evaluation.metrics import compare_runs
from stepkd.evaluation.search import search_benchmark
from stepkd.models.policy import Policy
from stepkd.runs.job import JobOptions, read_results
from stepkd.sampling.config import Transformers
from stepkd.sampling.engine import SamplingConfig
from stepkd.search.beam import Beam
from stepkd.search.best_of_n import BestOfN, Greedy
from stepkd.search.revise import Refine, VerifyRevise
from stepkd.settings import build_settings

OUTPUTS = ("settings.json", "results.jsonl", "summary.json")
TASK = "task=modular:terms=3,n=3"
NAMES = ("greedy", "self_consistency@2", "best_of_n@3", "beam@2x2")


@pytest.fixture
def config(tmp_path: Path) -> SearchJobConfig:
    return SearchJobConfig(
        model="tiny-0.1m",
        benchmark="task",
        data=TASK,
        out=str(tmp_path / "out"),
        methods=(BestOfN(n=2, vote="majority"), BestOfN(n=3, vote="max"), Beam(n=2, width=2)),
        scorer="checker",
        samples=3,
        difficulty_samples=2,
        max_step_tokens=4,
        sampling=SamplingConfig(max_new_tokens=8),
        engine=Transformers(4),
        dtype="float64",
        device="cpu",
    )


def whole(out: str | Path) -> list[bytes]:
    return [(Path(out) / name).read_bytes() for name in OUTPUTS]


def test_rows_hold_answers_costs_and_decisions_and_the_summary_is_made_of_them(
    config: SearchJobConfig, policy: Policy
) -> None:
    summary = search_benchmark(config, policy=policy)
    rows = read_results(config.out)
    assert [(row["index"], row["method"]) for row in rows] == [
        (i, name)
        for i in range(3)
        for name in ("pool", "self_consistency@2", "best_of_n@3", "difficulty", "greedy", "beam@2x2")
    ]
    by_method = {row["method"]: row for row in rows if row["index"] == 0}
    pool = by_method["pool"]
    assert list(pool) == [
        "id", "index", "prompt", "answer", "method", "samples", "tokens", "scorer_calls", "unscored", "trace"
    ]  # fmt: skip
    lengths = [sample["tokens"] for sample in pool["samples"]]
    assert (len(lengths), pool["tokens"]["generated"], pool["scorer_calls"]) == (3, sum(lengths), 3)
    for sample in pool["samples"]:
        assert sample["step_chars"][-1] == len(sample["completion"])
        assert len(sample["step_scores"]) == len(sample["step_chars"])
        assert set(sample["scores"]) == {"product", "min", "mean", "last"}
    # Methods on the pool are charged for what they choose among, and hold their answer alone.
    vote, best = by_method["self_consistency@2"], by_method["best_of_n@3"]
    assert (vote["tokens"], vote["scorer_calls"]) == ({"generated": sum(lengths[:2]), "scored": 0}, 0)
    assert (best["tokens"], best["scorer_calls"]) == (pool["tokens"], 3)
    assert best["samples"][0]["completion"] == pool["samples"][best["trace"][0]["kept"][0]]["completion"]
    assert [len(row["samples"]) for row in (vote, best, by_method["greedy"], by_method["difficulty"])] == [1, 1, 1, 2]
    assert by_method["greedy"]["tokens"]["scored"] == 0
    assert [event["event"] for event in by_method["beam@2x2"]["trace"]][-1] == "choice"
    drawn = {sample["completion"] for name in ("pool", "difficulty") for sample in by_method[name]["samples"]}
    assert len(drawn) == 5, "samples for difficulty are not those of the pool"

    written = json.loads((Path(config.out) / "summary.json").read_text())
    assert written == {key: value for key, value in summary.items() if key != "settings"}
    assert tuple(written["methods"]) == NAMES
    assert (written["problems"], written["pool"]["samples"], written["pool"]["reduction"]) == (3, 3, "product")
    assert summary["settings"]["methods"]["beam@2x2"]["class_path"] == "stepkd.search.beam.Beam"
    log = [json.loads(line) for line in (Path(config.out) / "log" / "rank-0.jsonl").read_text().splitlines()][1:]
    assert {entry["unit"].rpartition("-")[0] for entry in log} == {"pool", "difficulty", "greedy", "beam@2x2"}
    assert all(entry["tokens/s"] > 0 for entry in log)
    assert not any(re.search(rb"seconds|tokens/s|host", content) for content in whole(config.out))


@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_is_missing_the_job_ends_with_the_same_bytes(
    config: SearchJobConfig, policy: Policy, tmp_path: Path, ranks: int
) -> None:
    config = replace(config, methods=(BestOfN(n=2, vote="majority"), Beam(n=2, width=2)), difficulty_samples=0)
    search_benchmark(config, policy=policy)
    out = tmp_path / "again"
    shutil.copytree(config.out, out, ignore=shutil.ignore_patterns("results.jsonl", "summary.json"))
    for part in sorted((out / "parts" / "search").iterdir())[1:]:
        part.unlink()
    told = [
        search_benchmark(replace(config, out=str(out)), policy=policy, options=JobOptions(rank=rank, world_size=ranks))
        for rank in range(ranks)
    ]
    assert [bool(each) for each in told] == [False, True][-ranks:]
    assert whole(out) == whole(config.out)


def test_methods_without_a_scorer_need_none_and_another_job_is_refused(config: SearchJobConfig, policy: Policy) -> None:
    plain = replace(config, methods=(Greedy(),), scorer=None, samples=1, difficulty_samples=0)
    config = replace(config, data="task=modular:terms=3,n=2")
    summary = search_benchmark(plain, policy=policy)
    assert list(summary["methods"]["greedy"]["minus_best_of_n"]) == ["majority"]
    assert set(summary["pool"]["curves"]) == {"pass", "majority"}
    assert (summary["difficulty"], summary["settings"]["scorer"]) == (None, None)
    with pytest.raises(ConfigError, match=r"(?s)samples: 1 then, 2 now.*another --out"):
        search_benchmark(replace(plain, samples=2), policy=policy)
    with pytest.raises(ConfigError, match="holds no evaluation, but another kind of job"):
        compare_runs(plain.out, plain.out)


@dataclass(frozen=True, kw_only=True)
class Nothing(Greedy):
    """Finds nothing, under a name that a test gives it."""

    called: str = "nothing"

    @property
    def name(self) -> str:
        return self.called

    def run(self, problems: Any, tools: Any) -> Any:
        return [[] for _ in problems]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": None}, r"best_of_n@3 needs a step scorer and there is none: give --scorer"),
        ({"samples": 2}, r"best_of_n@3 chooses among n=3 samples, and samples=2 are drawn: give --samples 3"),
        ({"methods": (BestOfN(n=2), BestOfN(n=2))}, r"two are called best_of_n_weighted@2"),
        ({"methods": (Nothing(called="pool"),)}, r"'pool' is no name for a method"),
        ({"methods": (Nothing(called="a/b"),)}, r"'a/b' is no name for a method"),
        ({"sampling": SamplingConfig(temperature=0.0)}, r"sampling\.temperature=0: every sample"),
        ({"sampling": SamplingConfig(n=2)}, r"sampling\.n=2: a search takes its numbers"),
        ({"methods": ()}, r"methods is empty: give at least one"),
        ({"samples": 0}, r"samples=0"),
        ({"difficulty_samples": -1}, r"difficulty_samples=-1"),
        ({"segmenter": "newlines"}, r"newlines"),
        ({"limit": 0}, r"limit=0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_once(
    config: SearchJobConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes)


def test_a_method_that_finds_nothing_is_an_error(config: SearchJobConfig, policy: Policy) -> None:
    broken = replace(config, methods=(Greedy(), Nothing()), difficulty_samples=0, samples=1, limit=1)
    with pytest.raises(ConfigError, match="nothing found nothing for a problem"):
        search_benchmark(broken, policy=policy)


def test_greedy_is_run_whether_or_not_it_is_named(config: SearchJobConfig) -> None:
    assert [each.name for each in config.all_methods] == list(NAMES)
    assert replace(config, methods=(Greedy(),)).all_methods == (Greedy(),)
    other = replace(config, methods=(Nothing(),)).all_methods
    assert [each.name for each in other] == ["greedy", "nothing"], "a class of one's own may be based on it"


def test_methods_that_revise_drafts_ask_the_policy_or_a_model_of_their_own(
    config: SearchJobConfig, policy: Policy, tmp_path: Path
) -> None:
    revising = [VerifyRevise(rounds=2, draft="sampled"), VerifyRevise(rounds=1, draft="sampled", revision="rewrite")]
    config = replace(config, methods=(*revising, Refine(refiner="tiny-0.1m")), samples=1, difficulty_samples=0)
    summary = search_benchmark(config, policy=policy)
    rows = {(row["method"], row["index"]): row for row in read_results(config.out)}
    for number in range(2):
        (sample,) = rows["pool", number]["samples"]
        for method in revising:
            row = rows[method.name, number]
            events = [event for event in row["trace"] if event["event"] == "verify"]
            assert row["scorer_calls"] == len(events) == len(row["samples"]) <= 1 + method.rounds
            assert "".join(events[0]["steps"]) == sample["completion"], "the draft is the first of the pool"
            assert row["tokens"]["generated"] > sample["tokens"], "a random model's draft is not accepted"
        verify, refine, _ = rows["refine_tiny-0.1m", number]["trace"]
        assert "".join(verify["steps"]) == rows["greedy", number]["samples"][0]["completion"]
        assert refine["kinds"][0] == "draft"
        assert rows["refine_tiny-0.1m", number]["tokens"]["generated"] > rows["greedy", number]["tokens"]["generated"]
    assert set(summary["settings"]["models"]) == {"tiny-0.1m"}
    again = replace(config, out=str(tmp_path / "again"), engine=Transformers(1))
    search_benchmark(again, policy=policy)
    assert read_results(again.out) == read_results(config.out), "what is found does not depend on the batch"


def test_methods_of_different_classes_are_read_from_a_file_and_an_unknown_setting_is_named(tmp_path: Path) -> None:
    """As in a claim: the keys of one class may be unknown to the others, or have other values."""
    beam = {"class_path": "Beam", "init_args": {"n": 4, "width": 2}}
    soft = {"class_path": "BestOfN", "init_args": {"n": 4, "vote": "soft"}}
    values = {"model": "m", "scorer": "checker", "out": str(tmp_path), "methods": [beam, soft]}
    names = [method.name for method in build_settings(SearchJobConfig, values, "search").methods]
    assert names == ["beam@4x2", "best_of_n_soft@4"]
    incorrect = {"class_path": "Beam", "init_args": {"wdth": 2}}
    with pytest.raises(ConfigError, match=r"'wdth' is not a setting of methods\[0\]; did you mean 'width'"):
        build_settings(SearchJobConfig, values | {"methods": [incorrect, soft]}, "search")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("[{class_path: BestOfN, init_args: {width: 4}}, {class_path: Beam}]",
         r"'width' is not a setting of methods\[0\], whose class has n, vote, reduction, temperature"),
        ("[{class_path: Beam}, {class_path: BestOfN, init_args: {vote: best}}]",
         r"methods\[1\]\.vote: expected one of \['max', 'majority', 'weighted', 'soft'\], got 'best'"),
        ("[{class_path: Beam}, {class_path: Beam, init_args: {n: 8, width: 3}}]",
         r"methods\[1\] \(Beam\): n=8 is no multiple of width=3"),
        ("Beam --methods.n 8", r"are given with it: --methods '\[{class_path: CLASS, init_args: {n: VALUE}}\]'"),
    ],
    ids=["another class's setting", "a value", "a contradiction", "dotted"],
)  # fmt: skip
def test_a_mistake_in_a_method_is_told_with_its_place_in_the_list(words: str, message: str) -> None:
    value, *more = words.split(" --")
    given = [each for word in more for each in f"--{word}".split()]
    with pytest.raises(ConfigError, match=message):
        parse(
            SearchJobConfig, ["--out=o", "--model=m", "--scorer=checker", "--methods", value, *given], command="search"
        )


def test_the_command_prints_tables_notes_and_times(config: SearchJobConfig, capsys: pytest.CaptureFixture[str]) -> None:
    methods = "[{class_path: BestOfN, init_args: {n: 2, vote: majority}}]"
    words = f"--model tiny-0.1m --benchmark task --data {TASK} --limit 1 --samples 2 --sampling.max_new_tokens 8 --out"
    assert main(["search", *words.split(), config.out, "--device", "cpu", "--methods", methods]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("- majority *", "seconds per problem (pool: of all methods that choose among it): pool ", ", greedy "):
        assert word in shown


def test_the_guide_has_a_row_for_every_class() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "search.md").read_text("utf-8")
    assert {kind.__name__ for kind in METHODS} == set(re.findall(r"^\| `(\w+)`", guide, re.M))


RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "search").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_with_a_tiny_model(recipe: Path, policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        re.sub(r"\b(runs|models|HuggingFaceTB)/[\w./-]+", "tiny-0.1m", recipe.read_text("utf-8"))
    )
    own = "--scorer checker --engine Transformers --dtype float64 --device cpu "
    own += f"--model tiny-0.1m --benchmark task --data {TASK} --limit 1 --few_shot null"
    short = f"--sampling.max_new_tokens 8 --max_step_tokens 4 --difficulty_samples 0 --out {tmp_path / 'out'}"
    words = ["--config", str(tmp_path / "recipe.yaml"), *own.split(), *short.split()]
    config = parse(SearchJobConfig, words, command="search")
    summary = search_benchmark(config, policy=policy)
    assert set(summary["methods"]) == {method.name for method in config.all_methods}
    assert all(method["generated_tokens"]["value"] > 0 for method in summary["methods"].values())
