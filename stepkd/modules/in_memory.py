"""The loss of rows that a script has at hand: one step of training up to its backward pass, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from stepkd.data.batching import Position
from stepkd.data.config import Rows
from stepkd.data.datamodule import StepData
from stepkd.errors import TrainingError
from stepkd.losses import component_scales
from stepkd.modules.step_metrics import require_counts
from stepkd.randomness import stream_key

_ALL = 10**9


def loss_of_rows(module: Any, rows: Rows, *, step: int | None = None, **data: Any) -> Tensor:
    """What :meth:`stepkd.modules.base.StepModule.loss` says."""
    if module._trainer is not None and module._trainer.training:
        raise TrainingError("loss(rows) of a module that a Trainer trains would change the run: make a second module")
    module.configure_model()
    module.model.to(module.device)
    module.train()
    feed = StepData(rows, **{"shuffle": False, "overlap_ngram": 0, "global_batch_size": _ALL, **data})
    with _without_trainer(module, feed, step), torch.random.fork_rng([module.device] * (module.device.type == "cuda")):
        feed.setup("fit")
        module.check_run()
        module.begin()
        micro_batches = next(iter(module.prepare(next(iter(feed.train_dataloader())))))
        torch.manual_seed(stream_key(module.seed, "dropout", module.global_step, 0) % 2**63)
        counts = module.count_all(micro_batches)
        require_counts(counts, step=module.global_step, batches=1)
        module.loss_scales = component_scales(module.loss_names, counts, module.loss_weights, 1)
        losses = [module.model(module._micro_loss, each.to(module.device))[0] for each in micro_batches]
    return torch.stack(losses).sum()


@contextmanager
def _without_trainer(module: Any, feed: StepData, step: int | None) -> Iterator[None]:
    """The module beside data alone: what it would ask a trainer has an answer, what it logs goes nowhere, and all of
    it is as before at the end; but what losses are fitted to stays, so that a loop's steps have one and the same."""
    facts = {"precision": "32-true", "global_rank": 0, "world_size": 1, "is_global_zero": True, "training": False}
    step, end = module.global_step if step is None else step, getattr(module._trainer, "max_steps", -1)
    facts |= {"global_step": step, "max_steps": end, "estimated_stepping_batches": end, "logger": None}
    stand_in = SimpleNamespace(lightning_module=module, datamodule=feed, limit_train_batches=1.0, loggers=[], **facts)
    before = module._trainer, module.position, module.loss_scales
    counted = [
        (vars(part), {k: copy(v) for k, v in vars(part).items() if isinstance(v, dict | list) and k != "fitted"})
        for part in module.components
    ]
    feed.trainer = stand_in  # type: ignore[assignment]
    module._trainer, module.position = stand_in, Position(epoch=module.position.epoch)
    module.log = module.log_dict = lambda *_, **__: None
    try:
        yield
    finally:
        module._trainer, module.position, module.loss_scales = before
        del module.log, module.log_dict
        for now, then in counted:
            now.update(then)
