"""The end of a process that trained with others."""

from __future__ import annotations

import sys


def leave_group() -> None:
    """End a gloo group and its threads while Python still runs; all ranks call it, and nothing else needs it.

    Lightning ends an NCCL group itself and leaves a gloo group to the interpreter's end. A thread of the group that
    lets go of a tensor just then finds no interpreter, and the finished process dies with ``terminate called without an
    active exception``.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo":
        distributed.barrier()  # what still holds the group may keep its threads; while this waits, they let go
        distributed.destroy_process_group()
