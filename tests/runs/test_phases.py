from __future__ import annotations

import copy
import pickle

import pytest

from stepkd.runs.phases import Phase, PhaseTracker


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, tuple[str, ...]]] = []

    def note(self, event: str, tracker: PhaseTracker, phase: Phase) -> None:
        self.seen.append((event, str(phase), tuple(open_.name for open_ in tracker.stack)))

    def on_phase_start(self, tracker: PhaseTracker, phase: Phase) -> None:
        self.note("start", tracker, phase)

    def on_phase_advance(self, tracker: PhaseTracker, phase: Phase) -> None:
        self.note("advance", tracker, phase)

    def on_phase_end(self, tracker: PhaseTracker, phase: Phase) -> None:
        self.note("end", tracker, phase)


def test_listeners_hear_nested_phases_in_order() -> None:
    tracker, recorder = PhaseTracker(), Recorder()
    tracker.subscribe(recorder)
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
    tracker, recorder = PhaseTracker(), Recorder()
    tracker.subscribe(recorder)
    with pytest.raises(RuntimeError), tracker.phase("a"), tracker.phase("b"):
        raise RuntimeError
    assert tracker.current is None
    assert [event for event, *_ in recorder.seen] == ["start", "start", "end", "end"]


def test_phases_of_one_name_are_told_apart() -> None:
    tracker = PhaseTracker()
    with tracker.phase("rollout") as outer:
        with tracker.phase("rollout"):
            pass
        assert tracker.stack == (outer,)


def test_unsubscribing_ends_the_events_and_may_be_repeated() -> None:
    tracker, recorder = PhaseTracker(), Recorder()
    unsubscribe = tracker.subscribe(recorder)
    unsubscribe()
    unsubscribe()
    with tracker.phase("a"):
        pass
    assert recorder.seen == []


def test_time_is_measured_and_advance_outside_a_phase_is_harmless() -> None:
    tracker = PhaseTracker()
    tracker.advance()
    with tracker.phase("a") as phase:
        assert phase.seconds == 0.0
    assert phase.seconds >= 0.0


def test_a_negative_total_is_refused() -> None:
    with pytest.raises(ValueError, match="total must be at least 0, got -1"), PhaseTracker().phase("a", total=-1):
        pass


def test_copies_have_no_listeners_and_no_open_phases() -> None:
    tracker, recorder = PhaseTracker(), Recorder()
    tracker.subscribe(recorder)
    with tracker.phase("a"):
        copies = [copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))]
    heard = len(recorder.seen)
    for other in copies:
        assert other.current is None
        with other.phase("b"):
            pass
    assert len(recorder.seen) == heard
