"""A tiny model, small labelling jobs, and an engine that records what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepkd.data.completion import Completion
from stepkd.errors import StepkdError
from stepkd.grading.pool import GradingConfig
from stepkd.labels.job import run_label_job
from stepkd.labels.monte_carlo import MonteCarlo
from stepkd.labels.settings import LabelConfig, Sampled
from stepkd.models.policy import Policy
from stepkd.models.spec import PolicyConfig
from stepkd.runs.job import JobOptions
from stepkd.sampling.config import Transformers
from stepkd.sampling.engine import Branch, BranchContinuations, SamplingConfig
from stepkd.sampling.transformers_engine import TransformersEngine


class RecordingEngine:
    """Samples as usual and keeps the numbers of problems and solutions it was asked for; may stop at a call."""

    def __init__(self, policy: Policy, *, stop_at: int | None = None) -> None:
        self.inner = TransformersEngine(policy, max_rows=4)
        self.stop_at = stop_at
        self.sampled: list[int] = []
        self.continued: list[int] = []
        self.calls = 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: SamplingConfig, *, indices: Sequence[int], **options: Any
    ) -> list[list[Completion]]:
        self._count()
        self.sampled += indices
        return self.inner.generate(prompts, spec, indices=indices, **options)

    def continue_branches(
        self, branches: Sequence[Branch], spec: SamplingConfig, **options: Any
    ) -> list[BranchContinuations]:
        self._count()
        self.continued += [branch.index for branch in branches]
        return self.inner.continue_branches(branches, spec, **options)


@pytest.fixture(scope="session")
def policy() -> Policy:
    return Policy.load(PolicyConfig(path="tiny-0.1m", dtype="float64"))


@pytest.fixture
def spec(tmp_path: Path) -> LabelConfig:
    """Five tiny problems, two solutions each, two continuations per step: 3 + 5 groups."""
    return LabelConfig(
        out=str(tmp_path / "job"),
        solutions=Sampled(
            problems='task:task="modular:terms=3,modulus=2",n=5',
            model="tiny-0.1m",
            sampling=SamplingConfig(n=2, max_new_tokens=16),
        ),
        labeller=MonteCarlo(sampling=SamplingConfig(n=2, max_new_tokens=16)),
        engine=Transformers(4),
        # Random text now and then gets it right, without a grading process.
        grading=GradingConfig(extractors=("last_number",)),
        dtype="float64",
        device="cpu",
    )


Drawn = Callable[..., LabelConfig]


@pytest.fixture
def drawn() -> Drawn:
    """The same job with solutions, and continuations, that are drawn otherwise; ``n`` is that of the solutions."""

    def change(config: LabelConfig, **changes: Any) -> LabelConfig:
        assert isinstance(config.solutions, Sampled)
        solutions = replace(config.solutions, sampling=replace(config.solutions.sampling, **changes))
        labeller, rest = config.labeller, {name: value for name, value in changes.items() if name != "n"}
        if isinstance(labeller, MonteCarlo):
            labeller = replace(labeller, sampling=replace(labeller.sampling, **rest))
        return replace(config, solutions=solutions, labeller=labeller)

    return change


Run = Callable[..., dict[str, Any] | None]


@pytest.fixture
def run(policy: Policy) -> Run:
    """Run a job in this process, perhaps with an engine and a labeller that are made already."""

    def start(spec: LabelConfig, *, engine: Any = None, labeller: Any = None, **options: Any) -> dict[str, Any] | None:
        return run_label_job(spec, policy=policy, engine=engine, labeller=labeller, options=JobOptions(**options))

    return start


@pytest.fixture
def recording(policy: Policy) -> Callable[..., RecordingEngine]:
    """Make a recording engine."""

    def make(*, stop_at: int | None = None) -> RecordingEngine:
        return RecordingEngine(policy, stop_at=stop_at)

    return make


@pytest.fixture
def run_ranks(run: Run) -> Callable[..., tuple[list[dict[str, Any] | None], int]]:
    """Run the ranks of a job in turn until the last one is done; a rank that would wait comes again."""

    def start(spec: LabelConfig, world_size: int, **options: Any) -> tuple[list[dict[str, Any] | None], int]:
        results: dict[int, dict[str, Any] | None] = {}
        waits = 0
        while len(results) < world_size:
            for rank in range(world_size):
                if rank in results:
                    continue
                try:
                    results[rank] = run(spec, rank=rank, world_size=world_size, wait_s=0, **options)
                except StepkdError as error:
                    if "waits for" not in str(error):
                        raise
                    waits += 1
        return [results[rank] for rank in range(world_size)], waits

    return start
