"""Processes that end right after a collective; started by test_leaving.py with their number and a folder to meet in.

Prints how each of them ended: 0, or minus the signal that it died of.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from stepkd.runs.process import leave_group


def work(rank: int, meeting: str) -> None:
    sys.setswitchinterval(1000)  # the group's thread waits for Python's lock until this one ends
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))
    dist.all_gather_object([None, None], rank)


def main(pairs: int, folder: str) -> None:
    for pair in range(pairs):
        children = []
        for rank in range(2):
            child = os.fork()
            if not child:
                work(rank, f"{folder}/{pair}")
                leave_group()
                return
            children.append(child)
        for child in children:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
