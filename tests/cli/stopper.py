"""Callbacks that runs of the tests load by name: they record what is trained on, and end the process at a given point.

``STOP_AT`` holds the point, ``PHASE:STEP:SIGNAL``: the optimiser step that is about to be taken when the phase
(``optimizer``, ``batch_end``, or one that the module opens, ``rollout`` for instance) is next seen. The signal
``MEMORY`` raises what torch raises when memory runs out. With ``STOP_RANK`` only that rank ends. The file ``.ended``
beside ``out`` is as old as that.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Stopper(Callback):
    """Records batches and the completions of every step beside ``out``, and ends the process where it is told to."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.point = os.environ.get("STOP_AT", "").split(":")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.module = pl_module
        if os.environ.get("STOP_RANK", str(trainer.global_rank)) != str(trainer.global_rank):
            self.point = [""]
        self.rank = trainer.global_rank
        pl_module.phases.subscribe(self.heard)
        if stage == "fit":
            self._take_step, pl_module._optimizer_step = pl_module._optimizer_step, self._recorded

    def reached(self, phase: str) -> None:
        if self.point[0] == phase and self.module.global_step == int(self.point[1]):
            name, self.point = self.point[2], [""]
            Path(f"{self.out}.ended").touch()
            if name == "MEMORY":
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")
            os.kill(os.getpid(), getattr(signal, name))

    def _recorded(self, prepared: Any, *arguments: Any, **named: Any) -> None:
        """Take a step, then note the completions that it was taken on: one that is given up is taken again."""
        step = self.module.global_step
        self._take_step(prepared, *arguments, **named)
        rows = [example for batch in prepared for example in batch.examples]
        found = sorted((row.id, each.token_ids.tolist()) for row in rows for each in row.completions)
        with open(f"{self.out}.tokens.{self.rank}", "a", encoding="utf-8") as stream:
            print(json.dumps([step, found]), file=stream)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with open(f"{self.out}.batches.{self.rank}", "a", encoding="utf-8") as stream:
            print(json.dumps([trainer.global_step, sorted(example.id for example in batch.examples)]), file=stream)

    def on_train_batch_end(self, *_: Any) -> None:
        self.reached("batch_end")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.reached("optimizer")

    def heard(self, event: str, phase: Any) -> None:
        if event == "advance":
            self.reached(phase.name)
