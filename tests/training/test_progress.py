from __future__ import annotations

import errno
import re
from io import StringIO
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from stepkd.runs import progress as progress_module
from stepkd.runs.progress import PhaseTracker
from stepkd.training.progress import StepProgress


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CI log, a terminal that can redraw, and no plain lines but those of the training's tenths."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 1e9)


class Manual(LightningModule):
    """Manual optimisation with phases, ``inner`` optimiser steps per batch."""

    def __init__(self, inner: int = 1, fail_at: int | None = None, phases: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(2, 1)
        self.inner = inner
        self.fail_at = fail_at
        self.phases = PhaseTracker() if phases else None

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        if self.phases is not None:
            with self.phases.phase("rollout", total=8):
                self.phases.advance(4)
                if index == self.fail_at:
                    raise RuntimeError("lost")
                self.phases.advance(4)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        for _ in range(self.inner):
            optimizer.zero_grad()
            loss = self.layer(batch).square().mean()
            self.manual_backward(loss)
            optimizer.step()
        self.print(f"batch {index} [done]")
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", 0.25, prog_bar=True)
        self.log("tokens/s", 12345.0, prog_bar=True)
        self.log("hidden", 1.0)

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        if self.phases is not None:
            with self.phases.phase("grading"):
                self.log("val/accuracy", 0.5, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock:
    """A second passes with every look."""

    def __init__(self, tick: float = 1.0) -> None:
        self.now = 0.0
        self.tick = tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def loader(rows: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.ones(rows, 2), batch_size=2)  # type: ignore[arg-type]


def run(progress: StepProgress, module: LightningModule, *, live: bool, method: str = "fit", **options: Any) -> str:
    stream = StringIO()
    progress.console = Console(file=stream, force_terminal=live, width=160)
    validate = options.pop("validate", False)
    trainer = Trainer(
        callbacks=[progress],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )
    try:
        if method == "fit":
            trainer.fit(module, loader(10), loader(4) if validate else None)
        else:
            getattr(trainer, method)(module, loader(4), verbose=False)
    finally:
        run.output = stream.getvalue()  # type: ignore[attr-defined]
    return stream.getvalue()


def test_a_plain_line_for_every_tenth_with_all_facts() -> None:
    progress = StepProgress()
    lines = run(progress, Manual(), live=False, max_steps=25, max_epochs=5).splitlines()
    shown = [line for line in lines if line.startswith("training ")]
    assert [re.findall(r"step (\d+/\d+)", line) for line in shown] == [
        [f"{step}/25"] for step in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)
    ]
    for line in shown:
        assert re.search(r"  \d+:\d\d left  loss [\d.e-]+  accuracy 0.25  tokens/s 12.3k$", line)
    assert re.match(r"trained 25 steps in \d+:\d\d  loss ", lines[-1])
    assert "\x1b" not in "".join(lines)
    assert "batch 3 [done]" in lines


def test_time_left_is_the_rate_so_far_times_what_remains() -> None:
    clock = Clock(tick=0.0)

    class TenSeconds(Manual):
        def training_step(self, batch: torch.Tensor, index: int) -> None:
            super().training_step(batch, index)
            clock.now += 10.0

    progress = StepProgress()
    progress._clock = clock
    text = run(progress, TenSeconds(), live=False, max_steps=5)
    assert re.findall(r"(\d+:\d\d) left", text) == ["0:40", "0:30", "0:20", "0:10", "0:00"]
    assert "trained 5 steps in 0:50" in text


def test_the_live_line_shows_phases_and_what_is_printed_stays() -> None:
    progress = StepProgress()
    progress._clock = Clock()
    text = run(progress, Manual(), live=True, max_steps=5, validate=True, num_sanity_val_steps=0)
    for fact in ("rollout 0/8", "rollout 4/8", "training", "step 4/5", "validation 1/2 > grading", "tokens/s 12.3k"):
        assert fact in text
    assert "hidden" not in text
    lines = [line.rpartition("\r")[2] for line in text.split("\n")[:-1]]
    assert "\x1b[2Kbatch 3 [done]" in lines
    assert re.match(r"\x1b\[2Ktrained 5 steps", lines[-1])


@pytest.mark.parametrize("method", ["validate", "fit"])
def test_what_is_printed_after_it_begins_on_an_empty_line(method: str) -> None:
    text = run(StepProgress(), Manual(), live=True, method=method, max_steps=2)
    assert re.search(r"(\r|\n)\x1b\[2K$", text)


@pytest.mark.parametrize("live", [False, True])
def test_an_exception_ends_the_output(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.5)
    progress = StepProgress()
    progress._clock = Clock()
    module = Manual(fail_at=2)
    with pytest.raises(RuntimeError, match="lost"):
        run(progress, module, live=live, max_steps=5)
    text = run.output  # type: ignore[attr-defined]
    assert "rollout 4/8" in text
    stream = progress.console.file
    before = stream.getvalue()  # type: ignore[attr-defined]
    assert module.phases is not None
    with module.phases.phase("later"):
        module.phases.advance()
    assert stream.getvalue() == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("live", [False, True])
def test_no_output_after_teardown(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.5)
    progress = StepProgress()
    progress._clock = Clock()
    module = Manual()
    before = run(progress, module, live=live, max_steps=2)
    assert module.phases is not None
    with module.phases.phase("later"):
        module.phases.advance()
    assert progress.console.file.getvalue() == before  # type: ignore[attr-defined]


def test_inner_steps_are_counted_as_steps() -> None:
    progress = StepProgress()
    text = run(progress, Manual(inner=2), live=False, max_epochs=2)
    # 2 epochs x 5 batches x 2 inner steps.
    assert re.findall(r"step (\d+/\d+)", text) == [f"{step}/20" for step in range(2, 21, 2)]


def test_a_long_phase_prints_plain_lines_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 3.0)
    progress = StepProgress()
    progress._clock = Clock(tick=1.0)
    text = run(progress, Manual(), live=False, max_steps=5)
    assert re.search(r"^rollout [048]/8  step \d/5", text, flags=re.M)


def test_other_entry_points_show_their_batches() -> None:
    progress = StepProgress()
    text = run(progress, Manual(), live=False, method="validate")
    assert text == "validation 2/2  val/accuracy 0.5\n"


def test_without_phases_and_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    progress = StepProgress()
    module = Manual(phases=False)

    def stop() -> None:
        if module.global_step == 5:
            module.trainer.should_stop = True

    module.on_train_batch_end = lambda *args: stop()  # type: ignore[method-assign]
    text = run(progress, module, live=False, max_epochs=-1)
    assert re.search(r"^training  step 5  loss", text, flags=re.M)
    assert "left" not in text


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = StepProgress()
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    module = Manual()
    module.print = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert run(progress, module, live=False, max_steps=2) == ""


@pytest.mark.parametrize(("terminal", "ci", "live"), [(True, "", True), (True, "true", False), (False, "", False)])
def test_a_line_is_redrawn_only_in_a_terminal_outside_ci(
    terminal: bool, ci: str, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    text = run(StepProgress(), Manual(), live=terminal, max_steps=2)
    assert ("\r" in text) == live


@pytest.mark.parametrize("live", [False, True])
def test_a_lost_reader_does_not_end_the_training(live: bool) -> None:
    class Gone(StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "hung up") if live else BrokenPipeError

    progress = StepProgress()
    module = Manual()
    trainer = Trainer(max_steps=3, callbacks=[progress], accelerator="cpu", logger=False, enable_checkpointing=False)
    progress.console = Console(file=Gone(), force_terminal=live)
    trainer.fit(module, loader(10))
    assert trainer.global_step == 3
