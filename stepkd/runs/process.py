"""This process among others: a request to stop it, its launcher's report, the end of its group, notices of libraries.

SIGTERM: a scheduler takes the machine back, and the run has a grace period to leave a state to resume from. The signal
only sets a flag. Sampling for training looks at it at every token and breaks off; the module looks at it before every
batch's first optimiser step, together with all other ranks, and gives up that batch, which a resumed run draws again
with the same noise. Nothing of the step before is lost, and no rank waits for another. Servers often get the same
signal: what waits for one is given up, too (:meth:`StopRequest.excuses`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]

from stepkd.errors import ConfigError, MachineError, StepkdError

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.lost_server = False
        """Whether something was given up since then that waited for a server."""

    def __bool__(self) -> bool:
        return self.name is not None

    @contextlib.contextmanager
    def excuses(self) -> Iterator[None]:
        """A block that ends where it waits for a server that is away, once this process was asked to stop: what stops a
        run often stops its servers, some of them first. The run's ranks give up together what is incomplete then."""
        try:
            yield
        except MachineError as error:
            if not self:
                raise
            logger.warning("%s: what waits for it is given up", error)
            self.lost_server = True

    def listen(self, signum: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
        """Take the signal as a request from now on; only the main thread can.

        Returns:
            A function that gives the signal its earlier meaning back, and forgets the request.
        """
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        before = signal.signal(signum, self._on_signal)

        def restore() -> None:
            signal.signal(signum, before)
            self.name, self.lost_server = None, False

        return restore

    def preempted(self) -> Preempted:
        """What every rank raises where one was asked to."""
        return Preempted(f"asked to stop by {self.name or 'a signal to another rank'}")

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(signum).name
            os.write(2, f"\n{self.name}: stopping after this step\n".encode())  # print is not safe in a handler


STOP_REQUEST = StopRequest()
"""The request to this process."""


class Preempted(Exception):
    """The run was asked to stop, and every rank agreed to; its state is that of the last finished step."""


def rank_name(environ: Mapping[str, str] = os.environ) -> str:
    """``" (rank 1)"`` where a launcher started several processes, else nothing."""
    several = environ.get("WORLD_SIZE", "1") not in ("", "1")
    return f" (rank {environ.get('RANK', '?')})" if several else ""


def tell_agent(error: BaseException) -> bool:
    """Let the agent of torchrun or accelerate, if there is one, put this error on top of its report.

    A traceback goes with it only where the error does not explain itself.

    Returns:
        Whether the report says enough: the error is a mistake in the command or the recipe, which every rank finds,
        and this is not the first rank of its machine.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    if not isinstance(error, StepkdError):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        return False
    message = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError:
        return False
    return not isinstance(error, MachineError) and os.environ.get("LOCAL_RANK", "0") != "0"


def group_rank() -> int:
    """This process's rank in its group; 0 without one."""
    return 0 if (group := _group()) is None else int(group.get_rank())


def _group() -> Any:
    """``torch.distributed`` where this process is in a group."""
    distributed = sys.modules.get("torch.distributed")
    has_group = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if has_group else None


def leave_group() -> None:
    """End a gloo group and its threads while Python still runs; all ranks call it, and nothing else needs it.

    Lightning ends an NCCL group itself and leaves a gloo group to the interpreter's end. A thread of the group that
    lets go of a tensor just then finds no interpreter, and the finished process dies with ``terminate called without an
    active exception``.
    """
    group = _group()
    if group is not None and group.get_backend() == "gloo":
        group.barrier()  # what still holds the group may keep its threads; while this waits, they let go
        group.destroy_process_group()


def quiet_libraries() -> None:
    """Turn down notices of Lightning, and progress bars of transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning.pytorch  # noqa: F401 (importing it sets the levels that are lowered here)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # reports that were asked for
    logging.getLogger("lightning").handlers.clear()  # it would repeat what the root logger prints
    for text in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Using ModelCheckpoint with manual optimization.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*`is_gradient_checkpointing` is deprecated.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        r".*self\.log\('(val|test)/.*sync_dist=True.*",  # ours are reduced over ranks before they are logged
    ):
        warnings.filterwarnings("ignore", text)


def this_process() -> dict[str, Any]:
    """What tells this process from every other, for :func:`check_unused`."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": psutil.Process().create_time()}


def check_unused(folder: Path, marker: Mapping[str, Any]) -> None:
    """Refuse a folder at which another process of this machine works, as its marker (:func:`this_process`) tells.

    Raises:
        ConfigError: names the process.
    """
    pid, start = marker.get("pid"), marker.get("pid_start")
    if marker.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return
    with contextlib.suppress(psutil.Error, TypeError):  # it is gone; a text as start, in runs of 0.1
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - start) < 2  # not a later process of the same number
        if is_same and process.status() != psutil.STATUS_ZOMBIE:
            raise ConfigError(
                f"{folder} is in use by process {pid} on this machine: wait for it, stop it, or give another --out"
            )
