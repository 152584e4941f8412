"""What goes wrong with servers is asked again or said with the address, and nothing is lost; against a stand-in."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
import vllm_standin as standin
import yaml

from stepkd.errors import ConfigError, MachineError, ModelError
from stepkd.models.policy import Policy
from stepkd.models.spec import LoRAConfig, PolicyConfig
from stepkd.modules.base import StepModule
from stepkd.modules.gkd import GKDModule
from stepkd.runs.logger import read_metrics
from stepkd.runs.process import STOP_REQUEST
from stepkd.sampling import vllm
from stepkd.sampling.client import Client
from stepkd.sampling.engine import SamplingConfig
from stepkd.sampling.vllm import ServerEngine
from stepkd.sampling.weights import WeightSender
from stepkd.teachers import server as teachers
from stepkd.teachers.config import Served, TopK
from stepkd.training.fit import FitResult, fit

SIX = SamplingConfig(max_new_tokens=6)


@pytest.fixture
def other(policy: Policy) -> Iterator[Any]:
    found = standin.StandIn(policy, policy.spec.path)
    yield found
    found.close()


def engine(policy: Policy, *servers: Any, timeout_s: float = 30.0, **settings: Any) -> ServerEngine:
    return ServerEngine(policy, Client([each.address for each in servers], 4, timeout_s), **settings)


def adapted(policy: Policy) -> Policy:
    """With an adapter that does something."""
    found = Policy.load(PolicyConfig(path=policy.spec.path, lora=LoRAConfig(r=4)))  # type: ignore[union-attr]
    move(found)
    return found


def move(policy: Policy) -> None:
    """What an optimiser does."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)


def prompts(policy: Policy, number: int = 3) -> list[tuple[int, ...]]:
    return [tuple(policy.tokenizer(f"{i}+2=").input_ids) for i in range(1, number + 1)]


def tokens(drawn: list[list[Any]]) -> list[list[Any]]:
    return [[each.key for each in row] for row in drawn]


# ---- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refuse", "busy", "fail", "drop", "half", "words"])
def test_a_request_that_is_lost_is_asked_again(fault: str, policy: Policy, server: Any) -> None:
    whole = engine(policy, server).generate(prompts(policy), SIX)
    server.faults = [fault]
    assert tokens(engine(policy, server).generate(prompts(policy), SIX)) == tokens(whole)
    assert not server.faults


@pytest.mark.parametrize(
    ("answer", "lacks"),
    [
        ({"object": "error"}, "'choices' is missing"),
        ({"choices": []}, "0 choices in place of one"),
        ({"choices": [{"index": 0}] * 2}, "2 choices in place of one"),
        ([1], "list indices must be integers"),
        ("<html>", "string indices must be integers"),
    ],
)
def test_answers_that_are_not_vllms_are_told(answer: Any, lacks: str, policy: Policy, server: Any) -> None:
    ours = engine(policy, server)
    server.spoil = lambda _: answer
    message = rf"at {server.address} does not answer /v1/completions as vLLM does \({lacks}.*\); it says .*vllm serve"
    with pytest.raises(ModelError, match=message):
        ours.generate(prompts(policy)[:1], SIX)


def test_another_servers_list_of_models_is_told(server: Any) -> None:
    server.models = {"object": "list"}
    with pytest.raises(ModelError, match=rf"{server.address} does not answer /v1/models as vLLM does \('data' is miss"):
        Client([server.address])


def test_a_server_that_says_no_context_has_none(policy: Policy, server: Any) -> None:
    server.context = None
    assert engine(policy, server).max_length == policy.max_length
    teacher = teachers.ServerTeacher(Served(server.address, top_k=TopK(5)))
    teacher.bind(policy.tokenizer)
    assert teacher.max_length is None


def test_a_server_that_fails_or_is_too_slow_is_named(policy: Policy, server: Any) -> None:
    ours = engine(policy, server, timeout_s=0.5)
    server.faults = ["fail"] * 200
    with pytest.raises(ModelError, match=rf"{server.address} fails \(500 at /v1/completions: not now\): its log says"):
        ours.generate(prompts(policy)[:1], SIX)
    server.faults = ["slow"] * 9
    with pytest.raises(MachineError, match=rf"no answer from the vLLM server at {server.address} .*engine's timeout_s"):
        ours.generate(prompts(policy)[:1], SIX)


def test_longer_answers_are_waited_for_longer(policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    once, ours = Client.once, engine(policy, server)
    monkeypatch.setattr(Client, "once", lambda self, *given: asked.append(given[3:]) or once(self, *given))
    monkeypatch.setattr("stepkd.sampling.client.TOKENS", 100)
    for limit, expected in ((50, 30.0), (250, 75.0)):
        ours.generate(prompts(policy)[:1], SamplingConfig(max_new_tokens=limit))
        assert asked[-1] == (expected,)


def test_an_interrupt_waits_for_nobody(policy: Policy, server: Any) -> None:
    """Neither for answers under way nor for another try: the stand-in would hang until the end of the test."""

    def interrupt() -> bool:
        raise KeyboardInterrupt

    ours = engine(policy, server, timeout_s=3600.0)
    server.faults = ["hang"] * 2
    with pytest.raises(KeyboardInterrupt):
        list(
            ours.client.map(
                lambda i: ours.client.ask("/v1/completions", {"i": i}, read=dict), range(6), until=interrupt
            )
        )


def test_a_request_to_stop_hangs_up(policy: Policy, server: Any) -> None:
    asked: list[bool] = []
    ours = engine(policy, server, timeout_s=3600.0, breaks_off=lambda: bool(asked))
    server.faults = ["", "hang", "hang"]
    server.heard = lambda _: asked.append(True)
    found = [each.token_ids.tolist() for (each,) in ours.generate(prompts(policy), SIX)]
    assert found.count([min(policy.eos_ids)]) >= 2


# ---- several servers -----------------------------------------------------------------------------------------------


def test_several_addresses_share_the_work_and_one_may_go(policy: Policy, server: Any, other: Any) -> None:
    ours = ServerEngine(policy, Client([server.address, f"{other.address}/v1/"], 1, 5.0))
    whole = ours.generate(prompts(policy), SamplingConfig(n=2, max_new_tokens=6))
    assert (len(server.requests), len(other.requests)) == (3, 3)
    other.close()
    again = ours.generate(prompts(policy), SamplingConfig(n=2, max_new_tokens=6))
    assert tokens(again) == tokens(whole)
    different = standin.StandIn(policy, "another")
    with pytest.raises(ConfigError, match=rf"{different.address} serves 'another' .*: start the same model there"):
        Client([server.address, different.address])
    different.close()


@pytest.mark.slow
def test_one_that_hangs_holds_up_none_of_the_others(policy: Policy, server: Any, other: Any) -> None:
    """It is asked by the requests that meet it first, and by one at a time that looks for it."""
    ours = engine(policy, server, other, timeout_s=5.0)
    whole = ours.generate(prompts(policy, 12), SIX)
    other.hangs = True
    before = len(other.posts), len(other.gets)
    assert tokens(ours.generate(prompts(policy, 12), SIX)) == tokens(whole)
    assert tokens(ours.generate(prompts(policy, 12), SIX)) == tokens(whole)
    assert list(ours.client.away) == [other.address]
    assert len(other.posts) - before[0] <= 4
    assert len(other.gets) - before[1] < 12


def test_one_that_was_away_is_given_the_weights_before_anything_is_asked(
    policy: Policy, server: Any, other: Any
) -> None:
    """Also by ranks that did not see it go."""
    ours = engine(adapted(policy), server, other)
    here = engine(ours.policy, server, other)  # another rank
    here._sender = WeightSender(here.policy, here.client, None)
    ours.update(0)
    assert ours._sender is not None
    port = int(other.address.rpartition(":")[2])
    other.close()
    move(ours.policy)
    version, away = ours._sender.send(1)
    assert away == [other.address]
    back = standin.StandIn(policy, policy.spec.path, port=port)  # type: ignore[union-attr]
    try:
        here._sender.adopt(version, away)
        while "/v1/completions" not in [path for path, _ in back.posts]:
            here.generate(prompts(policy, 4), SIX)
        assert back.posts[0][0] == "/v1/load_lora_adapter"
    finally:
        back.close()


@pytest.mark.parametrize("name", ["same", "another"])
def test_a_server_that_was_restarted_is_given_the_weights_again(name: str, policy: Policy, server: Any) -> None:
    ours = engine(adapted(policy), server, timeout_s=10.0)
    ours.update(0)
    ours.generate(prompts(policy), SIX)
    move(ours.policy)
    ours.update(1)
    port = int(server.address.rpartition(":")[2])
    server.close()
    restarted = standin.StandIn(policy, server.name if name == "same" else name, port=port)
    restarted.faults = ["drop"]  # while it was away
    try:
        if name == "same":
            ours.generate(prompts(policy), SIX)
            assert list(restarted.adapters) == [ours.client.name]
        else:
            with pytest.raises(ConfigError, match=r"serves 'another' .*: start the same model there"):
                ours.generate(prompts(policy), SIX)
    finally:
        restarted.close()


# ---- weights -------------------------------------------------------------------------------------------------------


def test_any_error_of_the_first_rank_reaches_the_others(
    policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    group = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 0, broadcast_object_list=said.append)
    monkeypatch.setattr(vllm, "dist", group)
    monkeypatch.setattr(WeightSender, "_write", lambda *_: 1 / 0)
    with pytest.raises(ModelError, match=r"the weights were not sent: ZeroDivisionError: division by zero"):
        engine(adapted(policy), server).update(0)
    assert [type(each) for each in said[0]] == [ModelError]


def test_a_folder_of_weights_that_a_killed_process_left_goes(policy: Policy, server: Any, tmp_path: Path) -> None:
    begins = f"stepkd-weights-{socket.gethostname()}"
    kept = [f"{begins}-{os.getpid()}-x", f"{begins}-of-someone-else", "stepkd-weights-elsewhere-99999999-x"]
    for name in (f"{begins}-99999999-x", *kept):
        (tmp_path / name / "version").mkdir(parents=True)
    ours = engine(adapted(policy), server, weights=str(tmp_path))
    ours.update(0)
    assert ours._sender is not None
    assert ours._sender.version is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ours._sender.version.parent.name])


def test_a_server_that_a_killed_run_left_paused_works_again(policy: Policy, server: Any) -> None:
    server.paused = True
    engine(policy, server)
    assert not server.paused


def test_a_server_that_another_rank_has_paused_stays_paused(
    policy: Policy, server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 gives it weights while this one gets ready."""
    server.paused = True
    monkeypatch.setattr("stepkd.sampling.client.group_rank", lambda: 1)
    engine(policy, server)
    assert server.paused
    assert "left paused" not in caplog.text


def failing(server: Any) -> None:
    """Have it fail at weights, as one does whose engine is dying."""
    answer = server.answer
    server.answer = lambda path, body: (500, {"error": {"message": "x"}}) if "lora" in path else answer(path, body)


def test_one_that_fails_at_weights_is_told_and_left_out(
    policy: Policy, server: Any, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ours = engine(adapted(policy), server, other)
    failing(other)
    ours.update(0)
    ours.update(1)
    assert list(ours.client.away) == [other.address]
    assert caplog.text.count(f"{other.address}: 500 at /v1/load_lora_adapter: the weights in") == 1
    ours.generate(prompts(policy), SIX)
    assert (len(server.requests), len(other.requests)) == (3, 0)


def test_a_server_that_goes_on_failing_at_weights_stops_the_run(policy: Policy, server: Any) -> None:
    ours = engine(adapted(policy), server, timeout_s=1.5)
    failing(server)
    with pytest.raises(ModelError, match=r"fails \(500 at /v1/load_lora_adapter: .* Does it see that folder"):
        ours.update(0)


def test_a_request_to_stop_hangs_up_weights(policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine(adapted(policy), server, timeout_s=3600.0, breaks_off=STOP_REQUEST.__bool__)
    monkeypatch.setattr(STOP_REQUEST, "name", None)

    def hang(*_: Any) -> tuple[int, str]:
        STOP_REQUEST.name = "SIGTERM"
        server.closed.wait()
        return 200, ""

    server.answer = hang
    ours.update(0)
    assert ours._gives_up


def test_a_hanging_server_is_not_waited_for_long_after_a_request_to_stop(
    policy: Policy, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where completions are not broken off, as in a validation. One that is slow is waited for."""
    monkeypatch.setattr("stepkd.sampling.client._STOPPING_S", (0.0, 0.2))
    monkeypatch.setattr(STOP_REQUEST, "name", "SIGTERM")
    ours, server.faults = engine(policy, server, timeout_s=3600.0), ["slow"]
    assert len(ours.generate(prompts(policy), SIX)) == 3
    assert "/health" in server.gets
    server.hangs = True
    with pytest.raises(MachineError, match=r"is away .* and nobody waits for it"):
        ours.generate(prompts(policy), SIX)


def test_one_that_was_away_before_a_request_to_stop_costs_no_answer_of_the_others(
    policy: Policy, server: Any, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepkd.sampling.client._STOPPING_S", (0.0, 0.2))
    ours, server.faults = engine(policy, server, other), ["slow"]
    other.close()
    ours.client.leave([other.address])
    monkeypatch.setattr(STOP_REQUEST, "name", "SIGTERM")
    assert len(ours.generate(prompts(policy), SIX)) == 3
    ours.client.away[other.address] = 0.0, 0.1  # it is looked for
    assert len(ours.generate(prompts(policy), SIX)) == 3


@pytest.mark.parametrize("answer", ["words", {}, None])
def test_a_gateway_that_answers_anything_is_not_paused(
    answer: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = Client.once
    monkeypatch.setattr(
        Client, "once", lambda self, url, path, *a, **k: answer if "paused" in path else once(self, url, path, *a, **k)
    )
    Client([server.address])


# ---- runs ----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
KDRL: dict[str, Any] = {
    "rewards": [{"name": "length", "options": {"limit": 20}}, {"name": "format", "options": {"pattern": r"\d"}}],
    "teacher": {"class_path": "Local", "init_args": {"path": "tiny-0.1m"}},
    "rollout": {"sampling": {"n": 2, "max_new_tokens": 8}},
    "kd": {"class_path": "SampledKL", "init_args": {"beta": 0.3}},
}


def settings(policy: str, steps: int, model: dict[str, Any], *, lora: bool = True) -> dict[str, Any]:
    """Of a short run with a checkpoint at every step."""
    trained = {"path": policy, "lora": {"r": 4} if lora else None}
    shared = {"policy": trained, "optimizer": {"lr": 1e-2, "warmup": 0}, "validation": {"sampling": None}}
    return {
        "trainer": {"max_steps": steps, "val_check_interval": None},
        "checkpoint": {"every_n_steps": 1, "monitor": None},
        "model": {"init_args": {**shared, **model}},
        "data": {"init_args": {"train": {"options": {"n": 24}}, "validation": None, "global_batch_size": 4}},
    }


def weights_of(run: Path) -> dict[str, Any]:
    return dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def learnt(run: Path) -> list[dict[str, Any]]:
    """What was logged of every step, times and rates left out."""
    rows = [row for row in read_metrics(run) if "train/loss" in row]
    return [{k: v for k, v in row.items() if k.startswith("train/") or k == "step"} for row in rows]


def assert_alike(run: Path, whole: Path) -> None:
    assert learnt(run) == learnt(whole)
    mine, other = weights_of(run), weights_of(whole)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)


RUNS: dict[str, tuple[str, Any]] = {
    "teacher": ("tiny/gkd", lambda at: {
        "teacher": {"class_path": "Served", "init_args": {"urls": at, "top_k": {"k": 5}}}, "source": {"lmbda": 0.0},
    }),
    "engine": ("tiny/kdrl", lambda at: {
        **KDRL, "engine": {"class_path": "VLLMServer", "init_args": {"urls": at, "timeout_s": 5}},
    }),
}  # fmt: skip
"""Recipe and settings of runs with a teacher, or an engine, at an address."""


def train(kind: str, out: Path, server: Any, **how: Any) -> FitResult:
    recipe, model = RUNS[kind]
    return fit([recipe], settings(server.name, 3, model(server.address)), out=out, **how)


@pytest.fixture(scope="module")
def whole(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run to its end, and how often it asked for completions."""

    @functools.cache
    def made(kind: str) -> tuple[Path, int]:
        server = standin.StandIn(policy, policy.spec.path)  # type: ignore[union-attr]
        out = tmp_path_factory.mktemp("runs") / kind
        assert train(kind, out, server).steps == 3
        server.close()
        return out, len(server.requests)

    return made


@pytest.mark.parametrize("kind", ["teacher", pytest.param("engine", marks=pytest.mark.slow)])
def test_a_run_whose_server_goes_away_is_told_its_address_and_resumed(
    kind: str, whole: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted, asked = whole(kind)
    monkeypatch.setattr(teachers, "Client", lambda urls, **named: Client(urls, timeout_s=1.0, **named))
    server.heard = lambda _: setattr(server, "gone", len(server.requests) >= asked // 3 + 2)
    with pytest.raises(MachineError, match=rf"no answer from the vLLM server at {server.address} within"):
        train(kind, tmp_path / "run", server)
    server.gone, server.heard = False, lambda _: None
    train(kind, tmp_path / "run", server, resume=True)
    assert_alike(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("kind", "phase"),
    [("teacher", "loss"), *(pytest.param("engine", phase, marks=pytest.mark.slow) for phase in ("weights", "draw"))],
)
def test_a_server_that_goes_with_a_request_to_stop_costs_no_step(
    kind: str, phase: str, whole: Any, server: Any, tmp_path: Path
) -> None:
    """While it is asked for scores or samples of a step, or is given the weights of one."""
    asked, read = whole(kind)[1], server.read
    paths: list[str] = []

    def go() -> None:
        server.gone, STOP_REQUEST.name = True, "SIGTERM"

    def heard(_: Any) -> None:
        if phase != "weights" and len(server.requests) > asked // 3:
            go()

    def load(path: str) -> Any:
        paths.append(path)
        if phase == "weights" and len(paths) == 2:
            go()
            raise ConnectionError("gone")
        return read(path)

    server.heard, server.read = heard, load
    assert train(kind, tmp_path / "run", server)[1:] == ("stopped", 1)
    server.gone, server.heard, server.read = False, lambda _: None, read
    assert train(kind, tmp_path / "run", server, resume=True)[1:] == ("finished", 3)
    assert_alike(tmp_path / "run", whole(kind)[0])


@pytest.mark.parametrize(
    "phase", ["draw", *(pytest.param(phase, marks=pytest.mark.slow) for phase in ("weights", "teacher"))]
)
def test_a_server_that_goes_in_a_validation_with_a_request_to_stop_costs_no_step(
    phase: str, policy: Policy, server: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation is left out: of the engine's weights or samples, or of the teacher's part of the loss."""
    begin = StepModule.on_validation_epoch_start

    def begins(module: Any) -> None:
        if phase != "weights":
            begin(module)
        if module.global_step == 2:
            server.gone, STOP_REQUEST.name = True, "SIGTERM"
        if phase == "weights":
            begin(module)

    monkeypatch.setattr(StepModule, "on_validation_epoch_start", begins)
    sampling, model = None, RUNS["teacher"][1](server.address)
    if phase != "teacher":
        sampling = {"temperature": 0, "max_new_tokens": 8}
        there = {"class_path": "VLLMServer", "init_args": {"urls": server.address, "timeout_s": 60}}
        model |= {"teacher": KDRL["teacher"], "engine": there}
    found = settings(server.name, 3, {**model, "validation": {"sampling": sampling}})
    found["trainer"]["val_check_interval"], found["checkpoint"]["every_n_steps"] = 1, 100
    found["data"]["init_args"]["validation"] = {"options": {"n": 4}}
    assert fit(["tiny/gkd"], found, out=tmp_path / "run")[1:] == ("stopped", 2)
    server.gone = False
    monkeypatch.undo()
    assert fit(["tiny/gkd"], found, out=tmp_path / "run", resume=True)[1:] == ("finished", 3)
    assert len([row for row in read_metrics(tmp_path / "run") if "val/loss" in row]) == 2
    if phase == "teacher":
        assert_alike(tmp_path / "run", whole("teacher")[0])


def test_a_judge_that_goes_with_a_request_to_stop_costs_no_step(
    server: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any server that is asked before a step."""
    prepare = GKDModule.prepare

    def prepared(module: Any, batch: Any) -> Iterator[Any]:
        if module.global_step == 1:
            STOP_REQUEST.name = "SIGTERM"
            raise MachineError("gone")
        yield from prepare(module, batch)

    monkeypatch.setattr(GKDModule, "prepare", prepared)
    assert train("teacher", tmp_path / "run", server)[1:] == ("stopped", 1)
    monkeypatch.undo()
    assert train("teacher", tmp_path / "run", server, resume=True)[1:] == ("finished", 3)
    assert_alike(tmp_path / "run", whole("teacher")[0])


# ---- kills ---------------------------------------------------------------------------------------------------------


class Torn:
    """A KDRL run and the stand-in that it samples from, in processes of their own that are killed and started again."""

    def __init__(self, model: str, folder: Path, steps: int) -> None:
        self.model, self.out, self.asked = model, folder / "run", folder / "asked"
        folder.mkdir()
        self.asked.touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        found = settings(model, steps, RUNS["engine"][1](f"http://127.0.0.1:{self.port}"))
        found["model"]["init_args"]["engine"]["init_args"]["timeout_s"] = 120
        found["trainer"]["callbacks"] = [{"class_path": "stopper.Stopper", "init_args": {"out": str(self.out)}}]
        (folder / "run.yaml").write_text(yaml.safe_dump(found))
        self.words = ["fit", "--config", "tiny/kdrl", "--config", str(folder / "run.yaml")]
        self.words += ["--out", str(self.out), "--resume"]
        self.processes: dict[str, forked.Command] = {}
        self.start("server")
        self.start("run")

    def start(self, which: str) -> None:
        if which == "server":
            words = [self.model, self.port, str(self.asked)]
            self.processes[which] = forked.Command(words, script=Path(standin.__file__))
        else:
            paths = os.pathsep.join([str(ROOT / "tests" / "cli"), *filter(None, [os.environ.get("PYTHONPATH")])])
            self.processes[which] = forked.Command(self.words, PYTHONPATH=paths)

    def kill(self, which: str, after: int, pause: float) -> None:
        """Once so many more completions were asked for, and a moment after that; then start it again."""
        until = len(self.asked.read_text().splitlines()) + after
        while len(self.asked.read_text().splitlines()) < until and self.processes["run"].poll() is None:
            time.sleep(0.01)
        time.sleep(pause)
        assert self.processes["run"].poll() is None, self.processes["run"].streams()[1][-3000:]
        self.processes[which].send_signal(signal.SIGKILL)
        self.processes[which].wait()
        self.start(which)

    def end(self) -> None:
        assert self.processes["run"].wait(600) == 0, self.processes["run"].streams()[1][-3000:]
        self.processes["server"].send_signal(signal.SIGKILL)
        self.processes["server"].wait()

    def used(self) -> dict[int, list[str]]:
        """By step, the completions that it was taken on, every time that it was."""
        found: dict[int, list[str]] = {}
        for step, tokens in map(json.loads, Path(f"{self.out}.tokens.0").read_text().splitlines()):
            found.setdefault(step, []).append(json.dumps(tokens))
        return found


@pytest.mark.slow
def test_kills_of_run_and_server_lose_and_repeat_no_prompt(policy: Policy, tmp_path: Path) -> None:
    """Killed at drawn times, the run is resumed and the server started again: every step is taken on the samples that
    it is taken on uninterrupted, also where it is taken again, and the weights are the same bit for bit."""
    assert policy.spec is not None
    number, steps = 20, 30
    draw = random.Random(number)
    kills = ["run", "server"] * (number // 2)
    draw.shuffle(kills)
    torn = Torn(policy.spec.path, tmp_path / "torn", steps)
    for which in kills:
        torn.kill(which, draw.randint(1, 8 * steps // number // 3), draw.random() / 10)
    torn.end()
    whole = Torn(policy.spec.path, tmp_path / "whole", steps)
    whole.end()
    used, expected = torn.used(), whole.used()
    assert sorted(used) == sorted(expected) == list(range(steps))
    assert {step: set(each) for step, each in used.items()} == {step: set(each) for step, each in expected.items()}
    asked = [sorted(set(each.asked.read_text().splitlines())) for each in (torn, whole)]
    assert asked[0] == asked[1]
    assert_alike(torn.out, whole.out)
