from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepkd.errors import ConfigError, DataError, StepkdError
from stepkd.grading import pool
from stepkd.grading.pool import Grade, Grader, GradingConfig, Verdict

HALF = "\\boxed{\\frac{2}{4}}"
"""Takes a worker when the reference answer is 1/2 in another form."""


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GradingConfig(workers=2, deadline_s=1.0)) as grader:
        yield grader


def _works(grader: Grader) -> bool:
    return grader.grade_one(HALF, "0.5").verdict is Verdict.CORRECT


def _gone(pid: int, *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _script(body: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_each_verdict_in_order(grader: Grader) -> None:
    completions = [HALF, "\\boxed{\\frac{3}{4}}", "no answer here", "#### 7", None, "\\boxed{10000000!}", HALF]
    grades = grader.grade(completions, ["0.5", "0.5", "1", "7", "1", "\\frac{3}{7}", "\\frac{4}{8}"])
    assert [g.verdict.value for g in grades] == [
        "correct", "incorrect", "unparsed", "correct", "unparsed", "timeout", "correct",
    ]  # fmt: skip
    assert grades[0] == Grade(Verdict.CORRECT, "\\frac{2}{4}")
    assert grades[2] == Grade(Verdict.UNPARSED, None)
    assert grades[5].extracted == "10000000!"


def test_empty_batch(grader: Grader) -> None:
    assert grader.grade([], []) == []


def test_reference_may_be_a_whole_solution(grader: Grader) -> None:
    assert grader.grade_one("#### 9", "3 * 3 = <<3*3=9>>9\n#### 9") == Grade(Verdict.CORRECT, "9")
    assert grader.grade_one("#### 9", "It is $\\boxed{9}$.").verdict is Verdict.CORRECT


def test_equal_items_are_checked_once(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    original = pool._Worker.give

    def spy(self: pool._Worker, item: pool._Item, wall_s: float) -> None:
        sent.append(item)
        original(self, item, wall_s)

    monkeypatch.setattr(pool._Worker, "give", spy)
    grades = grader.grade([HALF] * 8, ["0.5"] * 8)
    assert [g.verdict for g in grades] == [Verdict.CORRECT] * 8
    assert len(sent) == 1


HOSTILE = {
    "factorial": "\\boxed{10000000!}",
    "parentheses": "\\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
    "square roots": "\\boxed{" + "\\sqrt{" * 250 + "2" + "}" * 250 + "}",
    "digits": "1" * 10**6,
    "boxed digits": "\\boxed{" + "1" * 10**6 + "}",
    "braces": "{" * 10**6,
    "closed braces": "\\boxed{" + "{}" * 500_000 + "}",
    "NUL": "\\boxed{\\frac{1}{2}\0}" + "\0" * 1000,
    "lone surrogates": "\\boxed{\ud800x\udfff}",
    "only surrogates": "\ud800" * 1000,
    "empty": "",
    "None": "None",
    "blank": " \n\t ",
    "empty box": "\\boxed{}",
}
SLOWLY_HOSTILE = {
    "tower": "\\boxed{9^9^9^9}",
    "braced tower": "\\boxed{9^{9^{9^{9}}}}",
    "few parentheses": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "fractions": "\\boxed{" + "\\frac{" * 150 + "1" + "}{2}" * 150 + "}",
    "binomial": "\\boxed{\\binom{100000000}{50000000}}",
    "power of two": "\\boxed{2^{10^{10}}}",
}


@pytest.mark.parametrize("texts", [HOSTILE, pytest.param(SLOWLY_HOSTILE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_hostile_text_ends_in_time_and_leaves_the_pool_working(texts: dict[str, str]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _peak_kib()
    with Grader(GradingConfig(workers=1, deadline_s=0.5)) as grader:
        assert _works(grader)
        for name, text in texts.items():
            start = time.monotonic()
            grade = grader.grade_one(text, "\\frac{3}{7}")
            # Twice 0.5 s of CPU time; the rest is room for replacing workers on a busy machine.
            assert time.monotonic() - start < 300, name
            assert grade.verdict is not Verdict.CORRECT, name
        assert _works(grader)
    grown = _peak_kib() - before
    assert grown < 200 * 1024, f"the parent grew by {grown // 1024} MiB"


def test_the_deadline_is_cpu_time_so_that_a_waiting_worker_loses_nothing() -> None:
    """A worker that gets no CPU for longer than the deadline, as on a busy machine."""
    with Grader(GradingConfig(workers=1, deadline_s=0.5)) as grader:
        assert _works(grader)
        pid = grader._pool[0].process.pid
        os.kill(pid, signal.SIGSTOP)
        waker = threading.Timer(1.5, os.kill, (pid, signal.SIGCONT))
        waker.start()
        assert grader.grade_one("\\boxed{\\frac{5}{10}}", "0.5").verdict is Verdict.CORRECT
        waker.join()
        assert [worker.process.pid for worker in grader._pool] == [pid]


def test_a_timeout_touches_its_own_item_only() -> None:
    with Grader(GradingConfig(workers=2, deadline_s=0.5)) as grader:
        completions = [HALF, "\\boxed{9^{9^{9^9}}}", "\\boxed{\\frac{3}{6}}", "\\boxed{\\frac{4}{8}}"]
        grades = grader.grade(completions, ["0.5"] * 4)
    assert [g.verdict.value for g in grades] == ["correct", "timeout", "correct", "correct"]


def test_memory_is_capped_and_only_the_item_pays() -> None:
    with Grader(GradingConfig(workers=1, memory_mb=256, deadline_s=30)) as grader:
        assert _works(grader)
        limits = Path(f"/proc/{grader._pool[0].process.pid}/limits").read_text()
        assert str(256 * 2**20) in next(line for line in limits.splitlines() if line.startswith("Max address space"))
        bomb = grader.grade_one("\\boxed{2^{10^{10}}}", "\\frac{3}{7}")  # 1.25 GB of digits
        assert bomb.verdict is Verdict.TIMEOUT
        assert _works(grader)


def test_a_worker_past_half_its_memory_is_replaced_after_its_item(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader(GradingConfig(workers=1)) as grader:
        assert _works(grader)
        assert len(grader._pool) == 1
    full = pool._BOOT.replace(
        "from stepkd.grading.worker import main;",
        "from stepkd.grading import worker; worker._address_space_bytes = lambda: 1 << 40; main = worker.main;",
    )
    assert full != pool._BOOT
    monkeypatch.setattr(pool, "_BOOT", full)
    with Grader(GradingConfig(workers=1)) as grader:
        grades = grader.grade([HALF, "\\boxed{\\frac{3}{6}}"], ["0.5", "0.5"])
        assert [g.verdict for g in grades] == [Verdict.CORRECT] * 2
        assert not grader._pool


def test_workers_are_kept_below_a_large_parent() -> None:
    ballast = bytearray(200 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])  # resident: more than half of a worker's cap
    with Grader(GradingConfig(workers=1, memory_mb=256)) as grader:
        assert _works(grader)
        assert len(grader._pool) == 1
    del ballast


def test_an_item_whose_worker_was_killed_is_tried_once_more() -> None:
    with Grader(GradingConfig(workers=1, deadline_s=60)) as grader:
        assert _works(grader)
        pid = grader._pool[0].process.pid
        os.kill(pid, signal.SIGSTOP)  # so that it is still at its item when it is killed

        def kill_when_busy() -> None:
            while not grader._pool[0].item:
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        grades = grader.grade(["\\boxed{\\frac{3}{4}}", HALF], ["0.5", "0.5"])
        killer.join()
        assert [g.verdict.value for g in grades] == ["incorrect", "correct"]
        assert grader._pool[0].process.pid != pid


def test_worker_killed_while_idle_costs_nothing() -> None:
    with Grader(GradingConfig(workers=1)) as grader:
        assert _works(grader)
        os.kill(grader._pool[0].process.pid, signal.SIGKILL)
        assert _works(grader)


def test_signals_for_the_job_do_not_reach_the_workers(grader: Grader) -> None:
    assert _works(grader)
    pids = [worker.process.pid for worker in grader._pool]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in pids:
            os.kill(pid, number)
    assert _works(grader)
    assert [worker.process.pid for worker in grader._pool] == pids


def test_works_from_threads(grader: Grader) -> None:
    results: list[list[Grade]] = []
    threads = [
        threading.Thread(target=lambda: results.append(grader.grade([HALF, "#### 2"], ["0.5", "3"]))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[g.verdict.value for g in r] for r in results] == [["correct", "incorrect"]] * 3


def test_close_leaves_no_process_and_grading_can_go_on() -> None:
    grader = Grader(GradingConfig(workers=1))
    assert _works(grader)
    pid = grader._pool[0].process.pid
    grader.close()
    assert not Path(f"/proc/{pid}").exists()  # reaped, so not even a zombie
    assert _works(grader)
    pid = grader._pool[0].process.pid
    del grader
    assert _gone(pid, within_s=60)


def test_an_interrupt_leaves_no_stale_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader(GradingConfig(workers=1)) as grader:
        assert _works(grader)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pool, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                grader.grade(["\\boxed{10000000!}", "\\boxed{\\frac{3}{4}}"], ["\\frac{3}{7}", "0.5"])
        assert not grader._pool
        assert _works(grader)


def test_an_interrupt_while_workers_start_waits_for_no_item(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool._Worker, "give", lambda *_: given.append(_))
    monkeypatch.setattr(pool, "wait", interrupt)
    with Grader(GradingConfig(workers=1)) as grader, pytest.raises(KeyboardInterrupt):
        grader.grade_one("\\boxed{\\frac{3}{4}}", "0.5")
    assert not given
    assert not grader._pool


def test_a_worker_that_stands_still_is_ended_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_WALL_FACTOR", 2.0)
    with Grader(GradingConfig(workers=1, deadline_s=1.0)) as grader:
        assert _works(grader)
        stopped = grader._pool[0].process.pid
        os.kill(stopped, signal.SIGSTOP)
        assert grader.grade_one("\\boxed{\\frac{5}{10}}", "0.5").verdict is Verdict.CORRECT  # by another worker
        assert _gone(stopped, within_s=60)


@contextlib.contextmanager
def _busy(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Other work on the machine."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def _spellings(n: int) -> Iterator[tuple[str, str, bool]]:
    """Answers, references, and whether they are equal, all different; each takes a worker."""
    for k in range(2, n + 2):
        answer, reference = (
            (f"x+{k}", f"{k}+x"),
            (f"(x-{k})(x+{k})", f"x^2-{k * k}"),
            (f"2\\sqrt{{{k}}}", f"\\sqrt{{{4 * k}}}"),
            (f"y={k}x+1", f"{2 * k}x-2y+2=0"),
            (f"\\frac{{{2 * k}}}{{3}}\\pi", f"\\frac{{{4 * k}\\pi}}{{6}}"),
        )[k % 5]
        yield (answer, reference, True) if k % 6 else (answer, f"{reference}+x", False)


@pytest.mark.parametrize(
    ("items", "others"), [(30, 1), pytest.param(960, 4, marks=pytest.mark.slow)], ids=["some", "960"]
)
def test_items_that_come_at_once_are_graded_as_they_are_on_a_busy_machine(items: int, others: int) -> None:
    answers, references, equal = zip(*_spellings(items), strict=True)
    with _busy(others), Grader(GradingConfig(workers=2)) as grader:
        grades = grader.grade([f"\\boxed{{{answer}}}" for answer in answers], references)
    expected = [Verdict.CORRECT if same else Verdict.INCORRECT for same in equal]
    failed = [
        (a, r, str(g.verdict))
        for a, r, g, e in zip(answers, references, grades, expected, strict=True)
        if g.verdict != e
    ]
    assert not failed


def test_a_worker_that_gets_no_cpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_WALL_FACTOR", 0.0)
    monkeypatch.setattr(pool, "_WATCH_S", 0.001)
    monkeypatch.setattr(pool._Worker, "is_starved", lambda _: True)
    with Grader(GradingConfig(workers=1)) as grader:
        grades = grader.grade([f"\\boxed{{\\frac{{{k}}}{{{2 * k}}}+x}}" for k in range(1, 5)], ["x+0.5"] * 4)
        assert [each.verdict for each in grades] == [Verdict.CORRECT] * 4
        assert len(grader._pool) == 1


def test_a_worker_that_spins_while_it_starts_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_START_LIMIT_S", 0.0)
    monkeypatch.setattr(pool, "_WATCH_S", 0.001)
    monkeypatch.setattr(pool._Worker, "is_starved", lambda _: True)
    with Grader(GradingConfig(workers=1)) as grader, pytest.raises(StepkdError, match="was not ready after"):
        grader.grade_one(HALF, "0.5")


def test_starved_is_what_could_run_and_not_what_waits_or_stands_still() -> None:
    worker = object.__new__(pool._Worker)
    with _busy(1) as (other,):
        worker.process = other  # type: ignore[assignment]
        assert any(worker.is_starved() or time.sleep(0.1) for _ in range(100))
        other.send_signal(signal.SIGSTOP)
        assert any(not worker.is_starved() or time.sleep(0.1) for _ in range(100))
    assert not worker.is_starved(), "it is gone"


def test_a_worker_that_ends_is_noticed_though_another_process_holds_its_pipe() -> None:
    """As a data loader's worker does that is forked in the moment a grading worker starts."""
    done = _script(
        """
        import os, signal, threading, time
        from stepkd.grading import Grader, GradingConfig, pool
        pipe, held = pool.Pipe, []
        def shared():
            ours, theirs = pipe()
            held.append(os.dup(theirs.fileno()))
            return ours, theirs
        pool.Pipe = shared
        grader = Grader(GradingConfig(workers=1, deadline_s=300))
        works = lambda: grader.grade_one("\\\\boxed{\\\\frac{2}{4}}", "0.5").verdict.value
        assert works() == "correct"
        worker = grader._pool[0]
        os.kill(worker.process.pid, signal.SIGSTOP)
        def end():
            while not worker.item:
                time.sleep(0.01)
            worker.process.kill()
        threading.Thread(target=end).start()
        print(works(), worker in grader._pool)
        """
    )
    assert done.stdout == "correct False\n", done.stderr


@pytest.mark.parametrize(
    ("number", "deadline_s"),
    [(signal.SIGINT, 300), (signal.SIGTERM, 2)],
    ids=["killed by the interrupt", "ended by their own limit"],
)
def test_a_signal_to_the_job_leaves_no_worker(number: signal.Signals, deadline_s: float) -> None:
    done = _script(
        f"""
        import os, signal, threading, time
        from stepkd.grading import Grader, GradingConfig
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
        grader = Grader(GradingConfig(workers=2, deadline_s={deadline_s}))
        works = grader.grade(["\\\\boxed{{\\\\frac{{2}}{{4}}}}", "\\\\boxed{{\\\\frac{{3}}{{4}}}}"], ["0.5", "0.5"])
        assert [grade.verdict.value for grade in works] == ["correct", "incorrect"]
        def end():
            while not all(worker.item for worker in grader._pool):
                time.sleep(0.01)
            print(*(worker.process.pid for worker in grader._pool), flush=True)
            os.kill(os.getpid(), {int(number)})
        threading.Thread(target=end, daemon=True).start()
        grader.grade(["\\\\boxed{{10000000!}}", "\\\\boxed{{10000001!}}"], ["\\\\frac{{3}}{{7}}"] * 2)
        """
    )
    assert done.returncode != 0
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert all(_gone(pid, within_s=120) for pid in pids)


def test_copies_carry_settings_not_processes(grader: Grader) -> None:
    assert _works(grader)
    twin = copy.deepcopy(Grader(GradingConfig(workers=3, deadline_s=1.5, memory_mb=512, extractors=("boxed",))))
    assert twin.config == GradingConfig(workers=3, deadline_s=1.5, memory_mb=512, extractors=("boxed",))
    assert copy.deepcopy(grader)._pool == []


def test_a_forked_child_starts_its_own_workers() -> None:
    done = _script(
        r"""
        import os
        from stepkd.grading import Grader, GradingConfig
        grader = Grader(GradingConfig(workers=1))
        right = lambda: grader.grade_one("\\boxed{\\frac{2}{4}}", "0.5").verdict == "correct"
        assert right()
        pid = grader._pool[0].process.pid
        child = os.fork()
        if child == 0:
            ok = right() and grader._pool[0].process.pid != pid
            grader.close()
            raise SystemExit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert right() and grader._pool[0].process.pid == pid
        print("fine", pid)
        """
    )
    assert done.stdout.startswith("fine"), done.stderr
    assert _gone(int(done.stdout.split()[1]), within_s=60)


def test_a_forked_child_closes_though_a_thread_held_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a data loader's worker that was forked while another thread graded."""
    grader = Grader(GradingConfig(workers=1))
    grader._lock.acquire()
    monkeypatch.setattr(grader, "_owner", grader._owner + 1)  # what a child sees
    closing = threading.Thread(target=grader.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_workers_end_with_a_killed_parent_even_when_busy() -> None:
    done = _script(
        r"""
        import os, signal, threading, time
        from stepkd.grading import Grader, GradingConfig
        grader = Grader(GradingConfig(workers=1, deadline_s=1.0))
        assert grader.grade_one("\\boxed{\\frac{2}{4}}", "0.5").verdict == "correct"
        def end():
            while not grader._pool[0].item:
                time.sleep(0.01)
            print(grader._pool[0].process.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=end).start()
        grader.grade_one("\\boxed{10000000!}", "\\frac{3}{7}")
        """
    )
    assert done.returncode == -signal.SIGKILL
    assert _gone(int(done.stdout), within_s=60)  # its CPU limit ends it: about 4 s of CPU time


def test_import_is_light() -> None:
    done = _script(
        """
        import sys
        import stepkd.grading
        print([m for m in ("torch", "math_verify", "sympy", "transformers", "lightning") if m in sys.modules])
        """
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "grading.workers=0: must be at least 1"),
        ({"deadline_s": 0.0}, "deadline_s=0.0: must be positive"),
        ({"deadline_s": float("inf")}, "deadline_s=inf: must be positive"),
        ({"memory_mb": 16}, "memory_mb=16: must be at least 192"),
        ({"convention": "prm8k"}, "unknown grading.convention 'prm8k'"),
        ({"extractors": ("boxd",)}, "did you mean 'boxed'"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradingConfig(**settings)  # type: ignore[arg-type]


def test_bad_columns(grader: Grader) -> None:
    with pytest.raises(DataError, match="2 completions but 1 answers"):
        grader.grade(["1", "2"], ["1"])
    with pytest.raises(DataError, match=r"answers\[0\] is empty"):
        grader.grade(["1"], [" "])


@pytest.mark.parametrize(
    ("boot", "message"),
    [
        ("raise SystemExit(3)", "no grading worker starts, the last one had exit code 3. Raise memory_mb"),
        (
            "import json, sys; from multiprocessing.connection import Connection; "
            "pipe = Connection(json.loads(sys.argv[1])[1]); "
            "pipe.send('ModuleNotFoundError: math_verify')",
            "the last one says: ModuleNotFoundError: math_verify",
        ),
    ],
)
def test_workers_that_cannot_start_are_an_error(boot: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_BOOT", boot)
    with Grader(GradingConfig(workers=1)) as grader, pytest.raises(StepkdError, match=message):
        grader.grade_one(HALF, "0.5")
    assert not grader._pool


def test_failed_starts_between_good_ones_do_not_end_the_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every other start fails, four in all, and each good worker is replaced after its item."""
    starts = tmp_path / "starts"
    boot = f"""
import json, sys
from multiprocessing.connection import Connection
with open({str(starts)!r}, "a") as file:
    file.write("x")
    file.flush()
    if file.tell() % 2:
        sys.exit(3)
pipe = Connection(json.loads(sys.argv[1])[1])
pipe.send("")
pipe.recv()
pipe.send(("correct", True))
"""
    monkeypatch.setattr(pool, "_BOOT", boot)
    with Grader(GradingConfig(workers=1)) as grader:
        assert grader.same([(f"\\sqrt{{{n}x}}", "\\pi y") for n in range(2, 6)]) == [True] * 4
    assert starts.read_text() == "x" * 8
