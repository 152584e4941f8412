"""Solutions as a reader looks at them: steps with labels and scores, whichever kind of row they come from."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any

from stepkd.grading.judge import solution_steps
from stepkd.steps.labels import is_settled, passes, verdicts

Row = Mapping[str, Any]

LONGEST_SHARE = 0.05
"""Share of all solutions that count as the longest."""
OF_ONE_PROBLEM = 64
"""Most solutions of one problem that are shown."""
SCORES = {"step_scores": "scorer", "scores": "scorer", "credit": "step credit", "step_values": "continuations"}
"""Columns of step scores -> what gave them."""
COSTS = ("tokens drawn", "scorer calls")
"""What an answer of a search cost, as columns of :func:`searched_rows`."""
LONGEST_FACT = 80
"""Characters of a fact; of a longer one there is the beginning."""
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text with its control characters and half surrogates written out, as ``⟨U+202E⟩``: none of them changes the
    direction or colour of what stands around it."""
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """One solution; its texts are :func:`visible`."""

    run: str
    """Name of the folder it comes from."""
    problem: str
    """Id of its problem."""
    sample: str
    """Which of the problem's solutions it is."""
    prompt: str
    """Text of the problem; of a chat, its last message."""
    answer: str | None
    """Reference answer."""
    steps: tuple[str, ...]
    """Step texts, at least one."""
    labels: tuple[bool | None, ...]
    """For each step whether its label calls it correct; empty without labels."""
    scores: tuple[float | None, ...]
    """For each step its score in [0, 1]; empty without scores."""
    scored_by: str
    """What gave the scores: ``scorer``, ``step credit``, or ``continuations`` (the share that ends correctly)."""
    correct: bool | None
    """Whether its answer is correct; None: not graded."""
    found: str | None
    """Answer that was found in it."""
    cut_off: bool
    """Whether it ended at the token limit."""
    tokens: int | None
    """Its tokens, where they were counted."""
    values: Mapping[str, float | None]
    """Its reward with the parts of several, or its score as a whole, None where a reward passed it over; of a search
    also what it cost."""
    step: int | None
    """Optimiser step at which it was sampled, for rollouts."""
    trace: tuple[Mapping[str, Any], ...]
    """Rounds of decisions that led to it (:func:`rounds`), of a search."""
    key: tuple[str, ...]
    """Equal where rows of several jobs hold one solution; empty: no other job has it."""

    @property
    def problem_key(self) -> tuple[str, str | None]:
        """Equal for solutions of one problem: ids of two data sets may be the same, and prompts differ by template."""
        return self.problem, self.answer

    @property
    def disagrees(self) -> list[int]:
        """Steps on which score and label disagree, up to the first incorrect one: what is correct after it is a matter
        of convention. None where the labels are made of the scores."""
        end = self.labels.index(False) + 1 if False in self.labels else len(self.labels)
        judged = enumerate(zip(map(passes, self.scores), self.labels[:end], strict=False))
        is_other = self.scored_by != "continuations"
        return [i for i, (score, label) in judged if is_other and None not in (score, label) and score != label]

    @property
    def length(self) -> int:
        """Tokens, or characters where tokens were not counted."""
        return sum(map(len, self.steps)) if self.tokens is None else self.tokens


FILTERS: Mapping[str, tuple[str, Callable[[Solution], bool]]] = {
    "correct_with_incorrect_step": (
        "correct answer with an incorrect step",
        lambda s: s.correct is True and False in s.labels,
    ),
    "disagrees": ("scores disagree with labels", lambda s: bool(s.disagrees)),
    "incorrect": ("incorrect answer", lambda s: s.correct is False),
    "clean": (
        "incorrect answer, every step labelled correct",
        lambda s: s.correct is False and False not in s.labels and is_settled(len(s.labels), s.labels.count(True), 0),
    ),
    "cut-off": ("cut off at the token limit", lambda s: s.cut_off),
    "longest": (f"the longest {LONGEST_SHARE:.0%}", lambda s: False),
}
"""Name -> title and predicate; which are the longest depends on the others (:func:`tags_of`)."""


def tags_of(solutions: Sequence[Solution]) -> list[list[str]]:
    """Of every solution the filters that it passes."""
    lengths: dict[bool, list[int]] = defaultdict(list)
    for each in sorted(solutions, key=lambda each: -each.length):
        lengths[each.tokens is None].append(each.length)
    longest = {unit: every[int(len(every) * LONGEST_SHARE)] for unit, every in lengths.items()}
    tags = [[name for name, (_, holds) in FILTERS.items() if holds(each)] for each in solutions]
    return [
        own + ["longest"] * (each.length > longest[each.tokens is None])
        for each, own in zip(solutions, tags, strict=True)
    ]


# ---- rows of every kind ----------------------------------------------------------------------------------------------


def solution(run: str, row: Row) -> Solution | None:
    """The solution of a labelled, scored, judged, sampled or rolled-out row; None where it holds no text.

    Labels and scores of another division of the text into steps are left out, and so is what has another type than its
    column: rows of others may hold anything.
    """
    name = str(row["id"])
    steps = row.get("steps") or row.get("completions") or solution_steps(row.get("completion") or "")
    if steps == [""] and "completion" not in row:
        return None
    prompt, problem = row.get("prompt") or "", str(row.get("problem_id", name))
    if isinstance(prompt, list):
        prompt = prompt[-1].get("content", "")
    fitting = {name: each for name, each in row.items() if isinstance(each, list) and len(each) == len(steps)}
    labels = next((fitting.get(column, ()) for column in ("step_labels", "labels") if row.get(column)), ())
    column = next((column for column in SCORES if column in fitting), None)
    values = {name: _number(row[name]) for name in ("reward", "score", *COSTS) if name in row}
    rewards = row.get("rewards")
    rewards = rewards if isinstance(rewards, Mapping) else {}
    values |= {visible(str(name)): _number(value) for name, value in rewards.items()} if len(rewards) > 1 else {}
    tokens, step = row.get("tokens"), row.get("step")
    correct = row.get("outcome") if row.get("correct") is None else row["correct"]
    answer, found = (None if row.get(each) is None else visible(str(row[each])) for each in ("answer", "extracted"))
    return Solution(
        run=run,
        problem=visible(problem),
        sample=visible(name.removeprefix(problem).lstrip("/") or "0"),
        prompt=visible(str(prompt).strip("\n")),
        answer=answer,
        steps=tuple(map(visible, steps)),
        labels=tuple(verdicts(labels)),
        scores=tuple(map(_number, fitting[column])) if column else (),
        scored_by=SCORES[column] if column else "",
        correct=correct if isinstance(correct, bool) else None,
        found=found,
        cut_off=row.get("finish") == "length",
        tokens=tokens if isinstance(tokens, int) else len(row.get("token_ids") or ()) or None,
        values=values,
        step=step if isinstance(step, int) else None,
        trace=rounds(row.get("trace")),
        key=(name, str(row["model"]), *steps) if "model" in row else (),
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def rounds(trace: Any) -> tuple[dict[str, Any], ...]:
    """A decision trace (:attr:`stepkd.search.state.Found.trace`) as a reader looks at it.

    Lists of an event that are as long as its candidates are many say something of each.

    Returns:
        For each event its ``head``, a line; whether it has ``told`` which candidates were kept; and the ``candidates``:
        text, score or None, how often kept, and facts, a line. All texts are :func:`visible`.
    """
    return tuple(_round(event) for event in trace if isinstance(event, Mapping)) if isinstance(trace, list) else ()


def _round(event: Row) -> dict[str, Any]:
    lists = {name: value for name, value in event.items() if isinstance(value, list) and name != "kept"}
    size = len(lists["steps"]) if "steps" in lists else max(map(len, lists.values()), default=0)
    columns = {name: value for name, value in lists.items() if len(value) == size}
    facts = {name: value for name, value in columns.items() if name not in ("steps", "scores")}
    steps, scores = (columns.get(name, [None] * size) for name in ("steps", "scores"))
    kept = event.get("kept")
    times = Counter(at for at in (kept if isinstance(kept, list) else [kept]) if isinstance(at, int))
    candidates = [
        (
            f"solution {i + 1}" if steps[i] is None else visible(str(steps[i]).strip("\n")),
            _number(scores[i]),
            times[i],
            ", ".join(_fact(name, value[i]) for name, value in facts.items() if value[i] is not None),
        )
        for i in range(size)
    ]
    head = [f"step {event['step'] + 1}"] if isinstance(event.get("step"), int) else []
    head.append(visible(str(event.get("event", "decision")).replace("_", " ")))
    head += [f"kept {sum(times[i] > 0 for i in range(size))} of {size}"] * (kept is not None and size > 0)
    told = {"event", "step", "kept", *columns}
    head += [_fact(name, value) for name, value in event.items() if name not in told and value is not None]
    return {"head": ", ".join(head), "told": kept is not None, "candidates": candidates}


def _fact(name: str, value: Any) -> str:
    name = "answer" if name == "votes" else name.replace("_", " ")
    if isinstance(value, float):
        value = f"{value:.3g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return visible(f"{name} {text[:LONGEST_FACT]}{'…' * (len(text) > LONGEST_FACT)}")


def sampled_rows(problems: Iterable[Row]) -> Iterator[Row]:
    """Result rows of ``stepkd evaluate``, a row per sample."""
    for row in problems:
        shared = {"problem_id": row["id"], "prompt": row.get("prompt"), "answer": row.get("answer")}
        for number, sample in enumerate(row["samples"]):
            yield {**shared, **sample, "id": f"{row['id']}/{number}", "correct": sample["verdict"] == "correct"}


def searched_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """Result rows of ``stepkd search``, a row per answer of a method; steps have scores where it is one of the shared
    samples."""
    from stepkd.evaluation.search_summary import DIFFICULTY, POOL

    pool = {row["id"]: row["samples"] for row in rows if row["method"] == POOL}
    for row in rows:
        if row["method"] in (POOL, DIFFICULTY):
            continue
        answer = {name: value for name, value in row["samples"][0].items() if value is not None}
        shared = {"problem_id": row["id"], **{name: row[name] for name in ("prompt", "answer", "method", "trace")}}
        shared |= dict(zip(COSTS, (row["tokens"]["generated"], row["scorer_calls"]), strict=True))
        for same in pool.get(row["id"], ()):
            if same["completion"] == answer["completion"] and "step_scores" in same:
                cuts = pairwise([0, *same["step_chars"]])
                steps = [answer["completion"][start:end] for start, end in cuts]
                shared |= {"steps": steps, "step_scores": same["step_scores"]}
        yield {**shared, **answer, "id": f"{row['id']}/answer", "correct": answer["verdict"] == "correct"}


def rollout_rows(entries: Iterable[Row]) -> Iterator[Row]:
    """Entries of a run's ``samples.jsonl``, a row per rollout."""
    for entry in entries:
        for number, sample in enumerate(entry["samples"]):
            own = {"problem_id": sample["id"], "id": f"{sample['id']}/step {entry['step']}, {number}"}
            own |= {"credit": sample["step_scores"], "step_scores": None, "step": entry["step"]}
            yield {**sample, **own, "finish": "length" if sample["cut_off"] else "stop"}


# ---- which are shown -------------------------------------------------------------------------------------------------


def merged(solutions: Iterable[Solution]) -> list[Solution]:
    """Solutions without repetitions: rows that one job labelled and a later one labelled again or scored are one
    solution, with the later labels and whichever scores of a model there are."""
    found: dict[tuple[str, ...], Solution] = {}
    for number, each in enumerate(solutions):
        key = each.key or (str(number),)
        earlier = found.pop(key, None)
        if earlier is not None and each.scored_by != "scorer" and earlier.scored_by == "scorer":
            each = replace(each, scores=earlier.scores, scored_by=earlier.scored_by, values=earlier.values)
        if earlier is not None and not each.labels:
            each = replace(each, labels=earlier.labels)
        found[key] = each
    return list(found.values())


def pick(solutions: Sequence[Solution], tags: Sequence[Sequence[str]], most: int) -> list[int]:
    """Numbers of the solutions that a page shows: of every run and every filter the first problem, then the second
    ones, and so on, each with its first :data:`OF_ONE_PROBLEM` solutions; of the last one those that fit.

    Args:
        solutions: all there are.
        tags: of every solution, what :func:`tags_of` gives.
        most: how many are shown at most.

    Returns:
        Ascending numbers.
    """
    of_problem: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    lists: dict[tuple[str, str], dict[tuple[str, str | None], None]] = defaultdict(dict)
    for number, (each, own) in enumerate(zip(solutions, tags, strict=True)):
        of_problem[each.problem_key].append(number)
        for name in ("", *own):
            lists[each.run, name][each.problem_key] = None
    order = dict.fromkeys(each for group in zip_longest(*lists.values()) for each in group if each is not None)
    chosen: list[int] = []
    for problem in order:
        chosen += of_problem[problem][:OF_ONE_PROBLEM][: most - len(chosen)]
    return sorted(chosen)
