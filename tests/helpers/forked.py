"""Commands of ``stepkd`` in processes of their own, forked from a server that has imported what every command imports.

A process that starts by itself imports torch and Lightning first: 5 s of a CPU, many hundred times over in these tests.
Otherwise a forked one is what a shell starts: own number, signals, exit code, standard streams and variables. What
concerns the start of Python or the launchers themselves is tested with the real ``python -m stepkd`` and torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("stepkd.training.fit", "stepkd.labels.job", "stepkd.evaluation.runner"),
        *("transformers.models.llama.modeling_llama", "stepkd.cli.parser", "rich._emoji_codes"),
        # With a Trainer's first step; bitsandbytes, where it is installed, brings torch's compiler to peft.
        *("peft", "attrs", "transformers.training_args", "transformers.trainer_pt_utils", "torch.profiler"),
    ]
)
_running: set[Any] = set()


class Command:
    """``stepkd WORDS`` (or a script with its words), with those methods of :class:`subprocess.Popen` that tests need.

    Args:
        words: arguments of the command.
        script: a Python file that runs in place of the command.
        variables: of the environment, on top of this process's; ``PYTHONPATH`` goes in front of ``sys.path``.
    """

    def __init__(self, words: Sequence[str], *, script: Path | None = None, **variables: str) -> None:
        self.args = list(words)
        self._folder = tempfile.TemporaryDirectory(prefix="stepkd-command-")
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        places = (os.getcwd(), environ, [str(file) for file in self._files])
        self._process = SERVER.Process(target=_work, args=(self.args, script and str(script), *places))
        self._process.start()
        _running.add(self._process)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 240) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, *self.streams())
        _running.discard(self._process)
        return self._process.exitcode

    def streams(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        texts = [file.read_text("utf-8") if file.is_file() else "" for file in self._files]
        return texts[0], texts[1]

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        return self.streams()

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Ranks:
    """Processes with the variables that torchrun gives them; one that fails ends the others, as under torchrun."""

    def __init__(self, words: Sequence[str], ranks: int = 2, *, script: Path | None = None, **variables: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": f"forked-{port}"}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        self.args = list(words)
        self.ranks = [
            Command(words, script=script, **variables, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(ranks)
        ]

    def poll(self) -> int | None:
        codes = [rank.poll() for rank in self.ranks]
        failed = [code for code in codes if code]
        if None not in codes:
            return failed[0] if failed else 0
        if failed:
            for rank in self.ranks:
                rank.terminate()
        return None

    def wait(self, timeout: float = 240) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout, *self.streams())
            time.sleep(0.01)
        return code

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def streams(self) -> tuple[str, str]:
        outputs, errors = zip(*(rank.streams() for rank in self.ranks), strict=True)
        return "".join(outputs), "".join(errors)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        return self.streams()


def run(
    words: Sequence[str], *, ranks: int = 1, script: Path | None = None, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, alone or over several ranks."""
    if ranks > 1:
        started: Ranks | Command = Ranks(words, ranks, script=script, **variables)
    else:
        started = Command(words, script=script, **variables)
    output, errors = started.communicate(timeout)
    return subprocess.CompletedProcess(list(words), started.poll() or 0, output, errors)


def _work(words: list[str], script: str | None, folder: str, environ: Mapping[str, str], files: Sequence[str]) -> None:
    """In the forked process: become the command."""
    for number, name in enumerate(files, start=1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:0] = [place for place in environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.argv = [script or "stepkd", *words]
    try:
        if script is not None:
            runpy.run_path(script, run_name="__main__")
        else:
            from stepkd.cli import main

            sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without


def _end_all() -> None:
    """What a failed test left must not hold up the end of pytest."""
    for process in _running:
        process.kill()


atexit.register(_end_all)
