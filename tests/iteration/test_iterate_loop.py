"""A whole iterated training in the tiny world: its files, interruptions after every stage, and what stops it."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from vllm_standin import StandIn

from stepkd.cli.parser import parse
from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.iteration import loop, stages
from stepkd.iteration.loop import run_iterations
from stepkd.iteration.spec import IterateConfig
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.runs.job import Job

STAGES = ["label", "convert", "train", "export", "greedy", "samples", "measure"]


def load_spec(path: Path, changes: dict[str, Any] | None = None) -> IterateConfig:
    """The settings of ``stepkd iterate --config FILE``, and dotted options."""
    words = [
        f"--{name}={each if isinstance(each, str) else json.dumps(each)}" for name, each in (changes or {}).items()
    ]
    config = parse(IterateConfig, ["--config", str(path), *words], command="iterate")
    assert isinstance(config, IterateConfig)
    return config


def silent(line: str) -> None:
    pass


def iteration(spec: IterateConfig, out: Path, k: int) -> stages.Iteration:
    return stages.Iteration(spec, Job(out, "iterated training"), k, "", silent)


def finished(out: Path, k: int) -> set[str]:
    """Stages of an iteration that left a part."""
    return {path.stem for path in (out / "parts" / f"iteration-{k}").glob("*.jsonl")}


@pytest.fixture(scope="module")
def settings(student: Path, small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(yaml.safe_dump(small(student)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One iteration, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run_iterations(load_spec(settings, {"iterations": 1}), out, report=silent)


@pytest.fixture(scope="module")
def longer(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two iterations, never interrupted."""
    out = tmp_path_factory.mktemp("longer") / "run"
    return out, run_iterations(load_spec(settings), out, report=silent)


@pytest.fixture
def spec(settings: Path) -> IterateConfig:
    return load_spec(settings, {"iterations": 1})


def weights(out: Path, k: int) -> bytes:
    return (out / f"iteration-{k}" / "model" / "model.safetensors").read_bytes()


def test_files_and_summary(whole: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole
    assert [model["name"] for model in summary["models"]] == ["M0", "M1"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {path.name for path in out.iterdir()} == {
        *("settings.json", "config.yaml", "parts", "log", "summary.json"),
        *("iteration-0", "iteration-1"),
    }
    assert finished(out, 1) == set(STAGES)
    training = summary["models"][1]["training"]
    assert training["rows"] == training["converted"]["rows"]
    assert training["rows"] == training["correct_answers"] - training["converted"]["counts"].get("cut_off", 0)
    assert training["solutions"] == 64 == training["labelled"] + training["dropped"].get("duplicate", 0)
    assert finished(out, 0) == set(STAGES[4:])
    metrics = [model["metrics"] for model in summary["models"]]
    assert metrics[0]["kl_per_solution"]["value"] == 0
    assert metrics[1]["kl_per_solution"]["value"] != 0
    assert all(each["correct_with_incorrect_step"] is not None for each in metrics)


@pytest.mark.slow
def test_the_next_model_learns_from_the_last_ones_solutions(longer: tuple[Path, dict[str, Any]]) -> None:
    out, _ = longer
    assert weights(out, 1) != weights(out, 2)
    first, second = (yaml.safe_load((out / f"iteration-{k}" / "settings.yaml").read_text()) for k in (1, 2))
    model = str(out / "iteration-1" / "model")
    assert second["model"]["init_args"]["policy"]["path"] == model
    assert first["data"]["init_args"]["train"]["path"] == str(out / "iteration-1" / "converted.jsonl")
    assert first["seed_everything"] != second["seed_everything"]
    lines = (out / "iteration-2" / "labels" / "labels.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in lines} == {model}


def test_a_finished_run_only_shows_its_table(
    whole: tuple[Path, dict[str, Any]], spec: IterateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "iteration-1" / "model")  # finished models may be deleted
    monkeypatch.setattr(loop, "_seed_weights", lambda spec: pytest.fail("no model is loaded"))
    lines: list[str] = []
    assert run_iterations(spec, out, report=lines.append) == whole[1]
    assert not lines


def test_other_settings_are_refused_by_name(whole: tuple[Path, dict[str, Any]], settings: Path) -> None:
    with pytest.raises(ConfigError, match=r"settings.label.sampling.n: 4 then, 3 now") as caught:
        run_iterations(load_spec(settings, {"iterations": 1, "label.sampling.n": 3}), whole[0], report=silent)
    assert "--overwrite" in str(caught.value)
    changes = {"iterations": 1, "train.overrides.trainer.max_steps": 9}
    with pytest.raises(ConfigError, match=r"settings\.train\.overrides\.trainer\.max_steps: 3 then, 9 now"):
        run_iterations(load_spec(settings, changes), whole[0], report=silent)


class Interrupted(BaseException):
    """What no code catches, like a kill."""


def interrupt_after_every_stage(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Every stage's work is done, and the process stops before it is recorded; the second time it goes on."""
    calls: Counter[str] = Counter()
    once = Job.once

    def interrupted(self: Job, phase: str, key: str, do: Callable[[], Any], **rest: Any) -> Any:
        def work() -> Any:
            calls[f"{phase} {key}"] += 1
            facts = do()
            if calls[f"{phase} {key}"] == 1:
                raise Interrupted
            return facts

        return once(self, phase, key, work, **rest)

    monkeypatch.setattr(Job, "once", interrupted)
    return calls


@pytest.mark.slow
def test_interrupted_after_every_stage(
    whole: tuple[Path, dict[str, Any]], settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepkd.labels.solutions import SampledSolutions

    out, drawn = tmp_path / "run", Counter[tuple[int, int]]()
    work = SampledSolutions.work

    def counted(self: SampledSolutions, items: Any) -> Any:
        drawn.update((self.sampling.seed, item) for item in items)
        return work(self, items)

    monkeypatch.setattr(SampledSolutions, "work", counted)
    monkeypatch.setattr(loop, "_check", lambda spec, out: None)  # said once is enough
    calls = interrupt_after_every_stage(monkeypatch)
    spec, stops = load_spec(settings, {"iterations": 1}), 0
    while True:
        try:
            summary = run_iterations(spec, out, report=silent)
            break
        except Interrupted:
            stops += 1
    assert stops == len(calls) == 10
    assert set(calls.values()) == {2}
    assert summary["models"] == whole[1]["models"]
    assert weights(out, 1) == weights(whole[0], 1)
    # Training problems once; the held-out ones once for each of the two models, with the same noise.
    assert sorted(Counter(drawn.values()).items()) == [(1, 16), (2, 6)]


@pytest.mark.slow
def test_more_iterations_go_on_from_the_last(
    longer: tuple[Path, dict[str, Any]], settings: Path, tmp_path: Path
) -> None:
    """Two iterations, the second of them forgotten, equal two in one go; a changed model in between is noticed."""
    out = tmp_path / "run"
    shutil.copytree(longer[0], out)
    shutil.rmtree(out / "iteration-2")
    shutil.rmtree(out / "parts" / "iteration-2")
    one = run_iterations(load_spec(settings, {"iterations": 1}), out, report=silent)
    assert one["models"] == longer[1]["models"][:2]
    config = out / "iteration-1" / "model" / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    with pytest.raises(ConfigError, match="is no longer the model that iteration 1 trained"):
        run_iterations(load_spec(settings), out, report=silent)
    config.write_text(text)
    lines: list[str] = []
    summary = run_iterations(load_spec(settings), out, report=lines.append)
    assert [line for line in lines if not line.startswith("iteration 2/2")] == []
    assert [model["metrics"]["pass@1"] for model in summary["models"]] == [
        model["metrics"]["pass@1"] for model in longer[1]["models"]
    ]


@pytest.fixture
def cuda_server(student: Path) -> Iterator[Any]:
    """On a GPU, as it says: embeddings and head share their weight."""
    found = StandIn(Policy.load(PolicyConfig(path=str(student))), str(student))
    found.device = "cuda"
    yield found
    found.close()


def through(server: Any) -> dict[str, Any]:
    return {"class_path": "VLLMServer", "init_args": {"urls": server.address}}


def greedy_rows(out: Path) -> list[list[str]]:
    """What M0 wrote."""
    lines = (out / "iteration-0" / "evaluation" / "greedy" / "results.jsonl").read_text().splitlines()
    return [[each["completion"] for each in json.loads(line)["samples"]] for line in lines]


def test_a_server_is_given_weights_for_every_job(
    whole: tuple[Path, dict[str, Any]], settings: Path, cuda_server: Any, tmp_path: Path
) -> None:
    spec = load_spec(settings, {"label.engine": through(cuda_server)})
    stages.evaluate_model(iteration(spec, tmp_path, 0))
    assert [path for path, _ in cuda_server.posts].count("/collective_rpc") == 2, "samples and greedy solutions"
    assert greedy_rows(tmp_path) == greedy_rows(whole[0])


@pytest.mark.slow
def test_servers_are_given_the_weights_of_every_round(
    whole: tuple[Path, dict[str, Any]], settings: Path, cuda_server: Any, tmp_path: Path
) -> None:
    """M0's greedy solutions are those of this process; at the end the server samples from the last model, whose
    training began with M0."""
    engine, out = through(cuda_server), tmp_path / "run"
    spec = load_spec(settings, {"iterations": 1, "label.engine": engine})
    run_iterations(spec, out, report=silent)
    given = [path for path, _ in cuda_server.posts].count("/collective_rpc")
    assert given == 5, "samples and greedy solutions of M0 and M1, and labels"
    held = dict(cuda_server.policy.model.named_parameters())
    trained = dict(Policy.load(PolicyConfig(path=str(out / "iteration-1" / "model"))).model.named_parameters())
    assert all(bool((held[name] == trained[name]).all()) for name in trained)
    assert greedy_rows(out) == greedy_rows(whole[0])
    found = [folder / "iteration-0" / "evaluation" / "greedy" for folder in (whole[0], out)]
    facts = json.loads((found[1] / "settings.json").read_text())
    assert (facts["engine"]["name"], facts["engine"]["vllm"]) == ("VLLMServer", "0.0")
    assert facts["model"]["weights"] == json.loads((found[0] / "settings.json").read_text())["model"]["weights"]
    other = load_spec(settings, {"iterations": 1, "label.engine": {**engine, "init_args": {"urls": "http://b:1"}}})
    assert other.identity() == spec.identity(), "a resumed run may have other servers"


def test_changed_labels_are_not_trained_on(
    whole: tuple[Path, dict[str, Any]], spec: IterateConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "iteration-1" / "evaluation")
    for name in STAGES[4:]:
        (out / "parts" / "iteration-1" / f"{name}.jsonl").unlink()
    with open(out / "iteration-1" / "converted.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(
        ConfigError, match=r"(?s)train\.jsonl is finished, and what it was made from has changed.*rows: "
    ):
        run_iterations(spec, out, report=silent)


def test_no_correct_answer_stops_and_keeps_the_labels(settings: Path, tmp_path: Path) -> None:
    """A random model; the second attempt says the same without sampling again."""
    changes = {"model": "tiny-0.1m", "label.sampling.max_new_tokens": 4, "problems": 'task:task="modular:terms=3",n=4'}
    changes |= {"evaluation.problems": 'task:task="modular:terms=3",n=2,split=test', "evaluation.sampling.n": 2}
    spec = load_spec(settings, changes)
    for attempt in range(2):
        lines: list[str] = []
        with pytest.raises(
            DataError, match=r"iteration 1 has no correct answer to learn from \(0 correct, 16 incorrect"
        ):
            run_iterations(spec, tmp_path / "run", report=lines.append)
        assert bool(lines) == (attempt == 0)
    assert "label" in finished(tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("correct", "incorrect", "to", "message"),
    [
        (0, 5, "Demonstrations", "no correct answer"),
        (
            5,
            0,
            None,
            r"iteration 2 has no incorrect answer to learn from \(5 correct, 0 incorrect among 5 labelled solutions",
        ),
        (5, 0, "Balanced", "no incorrect answer"),
        (5, 0, "Demonstrations", None),
        (1, 1, None, None),
    ],
)
def test_one_class(settings: Path, tmp_path: Path, correct: int, incorrect: int, to: Any, message: str | None) -> None:
    spec = load_spec(settings, {"convert": to})
    it = iteration(spec, tmp_path, 2)
    facts = {"correct_answers": correct, "incorrect_answers": incorrect, "labelled": correct + incorrect}
    if message is None:
        stages._check_answers(it, facts)
    else:
        with pytest.raises(DataError, match=message):
            stages._check_answers(it, facts)


@pytest.mark.parametrize(("labeller", "judged"), [("MonteCarlo", True), ("Outcome", False)])
def test_who_labels_the_held_out_steps(settings: Path, tmp_path: Path, labeller: str, judged: bool) -> None:
    """Monte-Carlo labels come from M0's continuations, for every model; an outcome says nothing of steps."""
    arguments = {"sampling": {"n": 2, "max_new_tokens": 24}} if judged else {}
    spec = load_spec(settings, {"label.labeller": {"class_path": labeller, "init_args": arguments}})
    stages.evaluate_model(iteration(spec, tmp_path, 0))
    assert finished(tmp_path, 0) == {"greedy", "samples", "measure"} | ({"judge"} if judged else set())
    folder = tmp_path / "iteration-0" / "evaluation"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    marks = [sample["step_labels"] for row in rows for sample in row["samples"]]
    assert len(marks) == 24
    assert any(mark is not None for mark in marks) == judged
    if judged:
        manifest = json.loads((folder / "labels" / "settings.json").read_text())
        assert (manifest["labeller"]["labeller"], manifest["model"]["name"]) == ("monte_carlo", spec.model)


def test_training_reads_the_pairs_of_a_pair_job(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step-DPO's pairs from the labelled solutions, drawn once; training gets their file and the fingerprint of it."""
    given: list[Path] = []

    def train(it: stages.Iteration, rows: Path) -> dict[str, Any]:
        given.append(rows)
        raise Interrupted

    monkeypatch.setattr(stages, "_train", train)
    arguments = {"sampling": {"n": 8, "temperature": 1.0}, "check": "checker", "take": "all"}
    spec = load_spec(settings, {"convert": None, "pairs": {"class_path": "StepPairs", "init_args": arguments}})
    for _ in range(2):
        with pytest.raises(Interrupted):
            stages.train_next(iteration(spec, tmp_path, 1))
    assert given == [tmp_path / "iteration-1" / "pairs" / "pairs.jsonl"] * 2
    rows = [json.loads(line) for line in given[0].read_text().splitlines()]
    facts = iteration(spec, tmp_path, 1).facts("pairs")
    assert facts is not None
    assert facts["counts"]["pairs"] == len(rows) > 0
    assert {"prefix", "chosen", "rejected"} <= set(rows[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"launcher": "acelerate launch"}, "launcher: no command 'acelerate'"),
        ({"train.recipes": ["recipes/tiny/none.yaml"]}, "no file 'recipes/tiny/none.yaml'"),
        (
            {"train.overrides.trainer.max_step": 3},
            "overrides: 'max_step' is not a setting of trainer; did you mean 'max_steps'",
        ),
        ({"train.overrides.model.init_args.optimizer.lr": -1.0}, "optimizer.lr=-1.0"),
        ({"reference": "kept"}, "'reference' is not a setting of model"),
        ({"evaluation.problems": 'task:task="modular:terms=3,modulus=3",n=4'}, "4 of 4 held-out problems are training"),
        ({"problems_per_iteration": 9}, "2 iterations of 9 fresh problems need 18, and .* has 16"),
        ({"problems": "gsm8k:split=test,path=nowhere.jsonl"}, "kept for evaluation"),
        ({"model": "nowhere/model"}, "nowhere/model"),
    ],
)
def test_refused_before_anything_runs(settings: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StepkdError, match=message):
        run_iterations(load_spec(settings, changes), tmp_path / "run", report=silent)
    assert not (tmp_path / "run").exists()


def test_foreign_folder_and_damaged_settings(spec: IterateConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no iterated training"):
        run_iterations(spec, tmp_path, report=silent)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(DataError, match="not the settings of a job"):
        run_iterations(spec, tmp_path, report=silent)


def test_launcher_command(spec: IterateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelling and training get the launcher's command; a failure names iteration and command."""
    commands: list[list[str]] = []

    def fake(words: list[str], **options: Any) -> Any:
        commands.append(words)
        return type("Done", (), {"returncode": 3})

    monkeypatch.setattr(stages.subprocess, "run", fake)
    it = iteration(load_like(spec, launcher="accelerate launch --num_processes 2"), tmp_path, 1)
    with pytest.raises(StepkdError, match=r"iteration 1: `stepkd label` under .* ended with exit code 3"):
        stages._run_job(it, it.spec.label_spec(1, out=str(tmp_path / "labels"), model="m"))
    with pytest.raises(StepkdError, match="`stepkd fit`"):
        stages._train(it, tmp_path / "rows.jsonl")
    start = ["accelerate", "launch", "--num_processes", "2", "-m"]
    assert commands[0] == [*start, "stepkd", "label", "--config", str(tmp_path / "labels.yaml")]
    assert commands[1][:7] == [*start, "stepkd", "fit"]
    assert commands[1][-4:] == ["--out", str(tmp_path / "iteration-1" / "train"), "--resume", "true"]


def load_like(spec: IterateConfig, **changes: Any) -> IterateConfig:
    return IterateConfig(**{**vars(spec), **changes})


KILLED_AT = (
    "iteration-0/evaluation/samples/parts/solutions/000000.jsonl",
    "iteration-0/evaluation/greedy/settings.json",
    "iteration-1/labels/parts/solutions/000000.jsonl",
    "iteration-1/labels/parts/labels/000000.jsonl",
    "iteration-1/converted.jsonl",
    "iteration-1/train/metrics.jsonl",
    "iteration-1/train/checkpoints/last.ckpt",
    "iteration-1/model",
    "iteration-1/evaluation/samples/labels.jsonl",
    "iteration-1/evaluation/results.jsonl",
)
"""Files whose appearance says which stage is at work."""


@pytest.mark.slow
def test_killed_in_every_stage(whole: tuple[Path, dict[str, Any]], settings: Path, tmp_path: Path) -> None:
    """A signal as soon as each stage leaves its first trace, then the same command to the end."""
    out = tmp_path / "run"
    words = ["iterate", "--config", str(settings), "--out", str(out), "--iterations", "1"]
    killed = 0
    for number, name in enumerate(KILLED_AT):
        process = forked.Command(words)
        while process.poll() is None and not (out / name).exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM if number % 2 else signal.SIGKILL)
        killed += process.wait() != 0
        assert (out / name).exists(), process.streams()[1]
    assert killed >= len(KILLED_AT) - 1, "the last one may have been quicker"
    done = forked.run(words)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["models"] == whole[1]["models"]
    assert weights(out, 1) == weights(whole[0], 1)
    for job in {log.parent.parent for log in out.glob("iteration-*/**/log/*.jsonl")}:
        entries = [json.loads(line) for log in job.glob("log/*.jsonl") for line in log.read_text().splitlines()]
        units = Counter((entry["phase"], entry["unit"]) for entry in entries if "unit" in entry)
        assert max(units.values(), default=1) == 1, f"{job}: something was done twice"
        parts = len(list(job.glob("parts/*/*.jsonl")))
        assert parts - len(KILLED_AT) <= len(units) <= parts, "a kill may come between a part and its line in the log"


@pytest.mark.slow
def test_under_a_launcher_the_result_is_the_same(
    whole: tuple[Path, dict[str, Any]], settings: Path, tmp_path: Path
) -> None:
    spec = load_spec(settings, {"launcher": sys.executable, "iterations": 1})
    summary = run_iterations(spec, tmp_path / "run", report=silent)
    assert [model["training"] for model in summary["models"]] == [model["training"] for model in whole[1]["models"]]
