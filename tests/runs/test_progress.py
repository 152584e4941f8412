from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from stepkd.runs.progress import Phase, PhaseTracker, duration, metric


class Recorder:
    def __init__(self, tracker: PhaseTracker) -> None:
        self.seen: list[tuple[str, str, tuple[str, ...]]] = []
        self.tracker = tracker
        self.unsubscribe = tracker.subscribe(self.note)

    def note(self, event: str, phase: Phase) -> None:
        self.seen.append((event, str(phase), tuple(open_.name for open_ in self.tracker.stack)))


def test_listeners_hear_nested_phases_in_order() -> None:
    tracker = PhaseTracker()
    recorder = Recorder(tracker)
    with tracker.phase("validation"):
        with tracker.phase("rollout", total=4):
            tracker.advance(3)
        tracker.advance()
    assert recorder.seen == [
        ("start", "validation", ("validation",)),
        ("start", "rollout 0/4", ("validation", "rollout")),
        ("advance", "rollout 3/4", ("validation", "rollout")),
        ("end", "rollout 3/4", ("validation",)),
        ("advance", "validation 1", ("validation",)),
        ("end", "validation 1", ()),
    ]


def test_done_never_passes_the_total() -> None:
    tracker = PhaseTracker()
    with tracker.phase("rollout", total=4) as phase:
        tracker.advance(3)
        tracker.advance(3)
        assert phase.done == 4


def test_an_exception_closes_the_phase() -> None:
    tracker = PhaseTracker()
    recorder = Recorder(tracker)
    with pytest.raises(RuntimeError), tracker.phase("a"), tracker.phase("b"):
        raise RuntimeError
    assert not tracker.stack
    assert [event for event, *_ in recorder.seen] == ["start", "start", "end", "end"]


def test_phases_of_one_name_are_told_apart() -> None:
    tracker = PhaseTracker()
    with tracker.phase("rollout") as outer:
        with tracker.phase("rollout"):
            pass
        assert tracker.stack == (outer,)


def test_unsubscribing_ends_the_events() -> None:
    tracker = PhaseTracker()
    recorder = Recorder(tracker)
    recorder.unsubscribe()
    with tracker.phase("a"):
        pass
    assert recorder.seen == []


def test_advance_outside_a_phase_is_harmless() -> None:
    PhaseTracker().advance()


def test_copies_have_no_listeners_and_no_open_phases() -> None:
    tracker = PhaseTracker()
    recorder = Recorder(tracker)
    with tracker.phase("a"):
        copies = [copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))]
    heard = len(recorder.seen)
    for other in copies:
        assert not other.stack
        with other.phase("b"):
            pass
    assert len(recorder.seen) == heard


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 0.693147, "0.6931"),
        ("loss", math.nan, "nan"),
        ("tokens/s", 950.0, "950"),
        ("tokens/s", 12345.0, "12.3k"),
        ("tokens_per_second", 2.5e6, "2.5M"),
        ("rows", 12345, "12345"),
        ("accuracy", torch.tensor(0.5), "0.5"),
        ("name", "abc", "abc"),
    ],
)
def test_metric(name: str, value: Any, text: str) -> None:
    assert metric(name, value) == text
