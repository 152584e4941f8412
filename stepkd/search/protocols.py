"""What search works with: states (solutions so far), steps that continue them, and the two protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

End = Literal["step", "stop", "length"]
"""How a step ends: the solution goes on (``step``), is over (``stop``: end token or stop string), or was cut off
(``length``: no room for more tokens)."""


@dataclass(frozen=True)
class Problem:
    """A problem to search solutions of."""

    index: int
    """Number of the problem in the whole run; keys everything that is drawn for it."""
    row: Mapping[str, Any]
    """Problem row: ``id``, ``prompt``, ``answer``; scorers may want ``solution``, ``task`` and ``meta``."""
    prompt_ids: tuple[int, ...]
    """Prompt as the generator reads it."""


@dataclass(frozen=True)
class State:
    """A solution so far."""

    problem: Problem
    """What is being solved."""
    steps: tuple[str, ...] = ()
    """Texts of the steps, separators included; joined they are the solution's text."""
    token_ids: tuple[int, ...] = ()
    """Sampled ids of all steps, without the prompt."""
    path: tuple[int, ...] = ()
    """Which of its siblings each step was when it was sampled: names the state within its problem, and keys what is
    drawn from it."""
    correct: bool | None = None
    """Whether the final answer is right; None: the solution goes on."""

    @property
    def text(self) -> str:
        """The solution's text."""
        return "".join(self.steps)


@dataclass(frozen=True)
class Step:
    """What continues a state: its next step, or all the rest of the solution."""

    text: str
    """Text, separator included; blank where the solution ends at once."""
    token_ids: tuple[int, ...]
    """Sampled ids; an end token only where it ends the solution."""
    logprob: float
    """Sum of the tokens' log-probabilities under the model at temperature 1 (nats, <= 0)."""
    end: End
    """How it ends."""
    sample: int = 0
    """Which of the samples it was, from 0."""


class StepGenerator(Protocol):
    """Continues states. What it gives for a state depends on the state alone, not on the others of a call."""

    def propose(self, states: Sequence[State], n: int) -> list[list[Step]]:
        """Draw ``n`` next steps of every state.

        Args:
            states: unfinished solutions, of any problems.
            n: steps per state, >= 1.

        Returns:
            For each state its steps by sample number; several may say the same.
        """
        ...

    def complete(self, states: Sequence[State], n: int) -> list[list[Step]]:
        """Draw ``n`` continuations of every state to the end of the solution; as :meth:`propose`."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What the steps come from, as JSON values: model, sampling settings, segmenter, seed."""
        ...


class StateValue(Protocol):
    """Estimates how good states are."""

    def values(self, states: Sequence[State]) -> list[float | None]:
        """Estimate states.

        Args:
            states: solutions of at least one step, finished ones (``correct`` is known) among them.

        Returns:
            For each a number in [0, 1], the higher the better; None: no estimate.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the values come from, as JSON values."""
        ...
