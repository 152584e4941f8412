"""A callback that runs of the tests load by name: it records what is in force while they train and validate."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback


class Watcher(Callback):
    """Records into the class, because the command makes the instance."""

    seen: ClassVar[dict[str, Any]] = {}
    counts: ClassVar[Counter[str]] = Counter()

    @classmethod
    def clear(cls) -> None:
        cls.seen.clear()
        cls.counts.clear()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        load = trainer.datamodule.train_dataloader
        trainer.datamodule.train_dataloader = lambda: self.counts.update(["loaders"]) or load()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
        self.seen["benchmark"] = torch.backends.cudnn.benchmark
        self.seen["detect_anomaly"] = torch.is_anomaly_enabled()
        self.seen["precision"] = str(trainer.precision)
        self.seen["root"] = str(trainer.default_root_dir)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.counts["steps"] = trainer.global_step

    def on_train_epoch_end(self, *_: Any) -> None:
        self.counts["epochs"] += 1

    def on_sanity_check_start(self, *_: Any) -> None:
        self.counts["sanity"] += 1

    def on_validation_end(self, *_: Any) -> None:
        self.counts["validations"] += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.counts["validation batches"] += 1

    def on_test_batch_start(self, *_: Any) -> None:
        self.seen["inference_mode"] = torch.is_inference_mode_enabled()
        self.counts["test batches"] += 1

    def on_predict_batch_start(self, *_: Any) -> None:
        self.seen["inference_mode"] = torch.is_inference_mode_enabled()
        self.counts["predict batches"] += 1
