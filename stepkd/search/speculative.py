"""Samples of a large model, drafted by a small one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from stepkd.errors import ConfigError, check_bounds
from stepkd.search.state import Found, Problem, Search, Tools, found
from stepkd.search.tokens import longest, sampled_steps


@dataclass(frozen=True, kw_only=True)
class Speculative(Search):
    """Exact speculative sampling (Leviathan et al. 2022, arXiv 2211.17192), with SpecDec++'s stop rule where there is a
    head (Huang et al. 2024, arXiv 2405.19715): see :mod:`stepkd.sampling.speculative`.

    Solutions are distributed as the model samples them alone, at fewer forward passes of it: cheap samples of a large
    teacher. That holds as far as both contexts reach: where the draft's is the shorter one, it cuts solutions off.
    Temperature, top-p and top-k are those of the search's sampling; the transformers engine alone does it. Of a
    problem's costs, ``tokens`` are those of its solutions, ``drafted`` those that the small model drew, and ``passes``
    the large one's forward passes.
    """

    needs_scorer: ClassVar[bool] = False

    draft: str
    """Model that drafts, of the same vocabulary: a run, a folder, a hub id or a GGUF file."""
    length: int = 5
    """Most tokens of a draft, at least 1; 20 with a head in the paper."""
    head: str | None = None
    """File of an acceptance head for this draft (``train_acceptance_head(...).save``); null: all drafts have the full
    length."""
    threshold: float = 0.3
    """Probability of a rejection so far at which a head ends a draft, in (0, 1); the paper's repository has 0.3 and
    0.7."""
    shortest: int = 2
    """Fewest tokens of a draft that a head ends, at least 1; 2 in the paper."""
    n: int = 1
    """Samples of a problem, at least 1; the first one is the answer."""

    def __post_init__(self) -> None:
        check_bounds("", self, length="[1, inf)", threshold="(0, 1)", shortest="[1, inf)", n="[1, inf)")

    @property
    def models(self) -> tuple[str, ...]:
        """See :attr:`~stepkd.search.state.Search.models`."""
        return (self.draft,)

    def run(self, problems: Sequence[Problem], tools: Tools) -> list[list[Found]]:
        """See :meth:`~stepkd.search.state.Search.run`; one solution after the other.

        Raises:
            ConfigError: another engine, or a head of another draft.
            ModelError: a draft of another vocabulary.
        """
        from stepkd.sampling.acceptance import AcceptanceHead
        from stepkd.sampling.speculative import Speculator, Stop
        from stepkd.sampling.transformers_engine import TransformersEngine

        generator, drafts = (sampled_steps(each, self.name) for each in (tools.generator, tools.other(self.draft)))
        if not isinstance(generator.engine, TransformersEngine):
            raise ConfigError(
                f"{self.name} reads the probabilities of all tokens, which {type(generator.engine).__name__} does not "
                "give (vLLM has speculative decoding of its own): take --engine Transformers"
            )
        head = None if self.head is None else AcceptanceHead.load(self.head).to(generator.policy.device)
        stop = Stop(self.length, head, self.threshold, self.shortest)
        speculator = Speculator(generator.policy, drafts.policy, stop)
        results: list[list[Found]] = []
        for problem in problems:
            results.append([])
            spec = replace(generator.sampling, max_new_tokens=max(1, longest(generator, problem)))
            for number in range(self.n):
                completion, drafted, accepted, passes = speculator.sample(
                    problem.prompt_ids, spec, problem.index, number
                )
                new = {"tokens": len(completion.token_ids), "drafted": drafted, "passes": passes}
                tools.costs[problem.index].update(new)
                ids, raw = completion.token_ids.tolist(), completion.raw_logprobs.tolist()
                state = generator.cut(problem, ids, raw, completion.finish)
                told = {"event": "speculation", **new, "accepted": accepted}
                results[-1].append(found(state, sample=number, trace=[told]))
        return results
