from __future__ import annotations

import errno
import json
import math
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer

from stepkd.errors import DataError, MachineError
from stepkd.runs.logger import JsonlLogger, place_loggers, read_metrics


def raw_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_mlflows_files_have_a_folder_of_their_own_in_the_run(tmp_path: Path) -> None:
    """It takes every folder beside its experiments for one of them."""
    options = [{"save_dir": "./mlruns", "run_name": None}, {"save_dir": "."}, {"save_dir": "elsewhere"}]
    place_loggers([SimpleNamespace(class_path="a.Logger", init_args=each) for each in options], tmp_path)
    assert options[0] == {"save_dir": str(tmp_path / "mlruns"), "run_name": tmp_path.name}
    assert [each["save_dir"] for each in options[1:]] == [str(tmp_path), "elsewhere"]


def test_one_line_per_call_with_its_facts(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "new")
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 0}, step=3)
    logger.log_metrics({"val/accuracy": 1}, step=3)
    first, second = raw_lines(tmp_path / "new")
    assert first.pop("seconds") >= 0
    assert first == {"run": 1, "step": 3, "loss": 0.5, "epoch": 0}
    assert second["val/accuracy"] == 1


def test_lines_are_on_disk_before_the_logger_closes(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step=step)
        assert len(raw_lines(tmp_path)) == step + 1


def test_a_reader_merges_the_lines_of_a_step(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 2.0}, step=1)
    logger.log_metrics({"val": 0.1}, step=1)
    (row,) = read_metrics(tmp_path)
    assert (row["loss"], row["val"]) == (2.0, 0.1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [row]


def test_resume_from_an_earlier_step_keeps_all_lines_and_reads_the_newest(tmp_path: Path) -> None:
    first = JsonlLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": 10.0 + step}, step=step)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    second = JsonlLogger(tmp_path)
    for step in range(3, 7):
        second.log_metrics({"loss": 20.0 + step}, step=step)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["run"], row["loss"]) for row in rows] == [
        (0, 1, 10.0),
        (1, 1, 11.0),
        (2, 1, 12.0),
        (3, 2, 23.0),
        (4, 2, 24.0),
        (5, 2, 25.0),
        (6, 2, 26.0),
    ]


def test_closing_and_logging_again_stays_in_the_same_run(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.finalize("success")
    logger.log_metrics({"test": 1.0}, step=0)
    assert [line["run"] for line in raw_lines(tmp_path)] == [1, 1]


@pytest.mark.parametrize("torn", [b'{"run": 1, "step": 1, "lo', b"\x00\x00\x00", b'{"run": 1, "step": 1, "x": "\xc3'])
def test_a_torn_last_line_is_tolerated_and_survives_a_resume(tmp_path: Path, torn: bytes) -> None:
    JsonlLogger(tmp_path).log_metrics({"loss": 1.0}, step=0)
    with open(tmp_path / "metrics.jsonl", "ab") as stream:
        stream.write(torn)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0]
    JsonlLogger(tmp_path).log_metrics({"loss": 2.0}, step=1)
    assert [(row["run"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]
    assert [line["run"] for line in raw_lines(tmp_path)] == [1, 2], "the torn line is gone"


def test_a_broken_line_that_no_crash_explains_is_named(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.finalize("success")
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "oops\n" + '{"run": 1, "step": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: this line is not a metrics record"):
        read_metrics(tmp_path)


def test_no_metrics_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no metrics here"):
        read_metrics(tmp_path)


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf)}
    JsonlLogger(tmp_path).log_metrics(values, step=0)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.log_hyperparams({"lr": 1.0})
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_training_error_and_keeps_the_lines(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)

    class Full(FileIO):
        """Has room for ten bytes more."""

        def write(self, data: Any) -> int:
            if len(data) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:10])

    assert logger._stream is not None
    logger._stream.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    logger._stream = Full(tmp_path / "metrics.jsonl", "ab")
    with pytest.raises(MachineError, match=r"metrics\.jsonl: No space left .*The lines before are intact\. Free some"):
        logger.log_metrics({"loss": 2.0}, step=1)
    logger.finalize("failed")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 1})
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, steps: int, resume: str | None = None) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        logger=JsonlLogger(folder),
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = torch.ones(8, 1)  # a tensor serves as a dataset of its rows
    trainer.fit(Tiny(), torch.utils.data.DataLoader(data), ckpt_path=resume)
    return trainer


def test_with_a_trainer_across_a_resume(tmp_path: Path) -> None:
    trainer = fit(tmp_path, 3)
    saved = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert Path(saved).parent == tmp_path / "checkpoints"
    fit(tmp_path, 5, resume=saved)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["run"] for row in rows] == [1, 1, 1, 2, 2]
