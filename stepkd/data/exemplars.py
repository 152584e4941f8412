"""Four worked word problems for few-shot prompts, written for this project (from no dataset)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exemplar:
    """A worked example."""

    prompt: str
    """The problem."""
    reasoning: str
    """The solution, one step per line, without the answer line."""
    answer: str
    """The final number."""


EXEMPLARS: tuple[Exemplar, ...] = (
    Exemplar(
        prompt=(
            "A ferry carries 18 cars on each morning trip and 12 cars on each afternoon trip. On Saturday it makes "
            "3 morning trips and 4 afternoon trips. How many cars does it carry on Saturday?"
        ),
        reasoning=(
            "The morning trips carry 3 * 18 = 54 cars.\n"
            "The afternoon trips carry 4 * 12 = 48 cars.\n"
            "Together they carry 54 + 48 = 102 cars."
        ),
        answer="102",
    ),
    Exemplar(
        prompt=(
            "Ines is tiling a hallway that is 9 metres long and 2 metres wide. Each square metre takes 25 tiles, and "
            "tiles come in boxes of 50. How many boxes does she need?"
        ),
        reasoning=(
            "The hallway has an area of 9 * 2 = 18 square metres.\n"
            "It takes 18 * 25 = 450 tiles.\n"
            "That is 450 / 50 = 9 boxes."
        ),
        answer="9",
    ),
    Exemplar(
        prompt=(
            "A choir sells tickets at $14 for adults and half that price for children. It sells 60 tickets, of which "
            "one third are for children, and pays $180 for the hall. How many dollars are left?"
        ),
        reasoning=(
            "A child's ticket costs 14 / 2 = 7 dollars.\n"
            "There are 60 / 3 = 20 children's tickets and 60 - 20 = 40 adult tickets.\n"
            "The adults pay 40 * 14 = 560 dollars and the children 20 * 7 = 140 dollars.\n"
            "The choir takes 560 + 140 = 700 dollars.\n"
            "After the hall, 700 - 180 = 520 dollars are left."
        ),
        answer="520",
    ),
    Exemplar(
        prompt=(
            "Marek's phone battery was full at noon. It lost 20% of its charge by 3 o'clock and then 4 percentage "
            "points every hour. What percentage of charge was left at 8 o'clock?"
        ),
        reasoning=(
            "At 3 o'clock the charge was 100 - 20 = 80 percent.\n"
            "From 3 to 8 o'clock there are 8 - 3 = 5 hours.\n"
            "In that time it lost 5 * 4 = 20 percentage points.\n"
            "So 80 - 20 = 60 percent was left."
        ),
        answer="60",
    ),
)
"""In the order in which ``few_shot: n`` takes them."""
