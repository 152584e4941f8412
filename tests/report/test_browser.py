"""The page in headless Chromium, at the width of a phone and of a desktop, dark and light."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from left import HOSTILE, begin, evaluation_rows, scored_rows

from stepkd.report.page import write_report
from stepkd.runs.files import write_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture
def report(quickstart: Path, search: Path, judgement: Path, claim: Path, iterated: Path) -> Path:
    """A page of every kind of folder, with hostile texts and long lines."""
    rows = []
    for number, text in enumerate((*HOSTILE, "x" * 4000)):
        (row,) = evaluation_rows("f")
        row["samples"][0] |= {"completion": text, "extracted": text, "step_labels": None}
        rows.append(row | {"id": text, "index": number, "prompt": text, "answer": text})
    settings = {"benchmark": {"name": HOSTILE[0], "data": "d"}, "model": {"name": "m" * 300}}
    begin(quickstart / "hostile", "evaluation", 40, **settings)
    write_jsonl(quickstart / "hostile" / "results.jsonl", rows)
    many = [row | {"problem_id": "many", "id": f"many/{i}"} for i, row in enumerate(scored_rows() * 2)]
    begin(quickstart / "many", "scoring job", 41)
    write_jsonl(quickstart / "many" / "results.jsonl", many)
    return write_report([quickstart])


@pytest.fixture
def opened(chromium: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing must have been said on the console."""
    said: list[str] = []
    contexts = []

    def make(fragment: str = "", *, width: int = 1280, scheme: str = "light") -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else said.append(request.url))
        page.goto(f"{report.as_uri()}{fragment}")
        return page

    yield make
    for context in contexts:
        context.close()
    assert said == []


def colours(page: Any) -> list[str]:
    """Background and text colour."""
    return list(
        page.evaluate("(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))")
    )


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_width_in_both_themes_and_no_text_becomes_markup(
    opened: Callable[..., Any], width: int, scheme: str
) -> None:
    page = opened(width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title().endswith("stepkd report")
    assert page.locator("img, iframe, object, embed, link").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    assert (
        tuple(colours(page))
        == {
            "light": ("rgb(255, 255, 255)", "rgb(27, 31, 36)"),
            "dark": ("rgb(20, 24, 29)", "rgb(231, 234, 238)"),
        }[scheme]
    )
    page.locator("#search").fill("onerror")
    assert HOSTILE[0] in page.locator("#list").inner_text()


def test_the_theme_button_goes_round_and_is_kept(opened: Callable[..., Any]) -> None:
    page = opened(scheme="dark")
    dark = colours(page)
    button = page.locator("#theme")
    button.focus()
    page.keyboard.press("Enter")
    assert button.inner_text() == "Theme: light"
    assert colours(page) != dark
    page.reload()
    assert button.inner_text() == "Theme: light"
    page.keyboard.press("Tab")
    button.press("Space")
    button.press("Space")
    assert button.inner_text() == "Theme: system"
    assert colours(page) == dark


def test_filters_are_links_that_the_keyboard_reaches_and_select_solutions(opened: Callable[..., Any]) -> None:
    page = opened()
    link = page.locator(".filters a", has_text="correct answer with an incorrect step")
    link.focus()
    page.keyboard.press("Enter")
    assert page.url.endswith("#show-correct_with_incorrect_step")
    page.wait_for_selector(
        ".filters a[href='#show-correct_with_incorrect_step'][aria-current=true]"
    )  # the address changes first
    cards = page.locator(".solution")
    assert cards.count() >= 2
    for card in cards.all():
        assert "✓ correct" in card.inner_text()
        assert "first incorrect step" in card.inner_text()
    opened_there = opened("#show-disagrees")
    assert "≠ scorer says correct" in opened_there.locator(".solution").first.inner_text()
    opened_there.locator("#run").select_option("judged")
    runs = opened_there.locator(".solution .runs").all_inner_texts()
    assert runs
    assert all(text.startswith("judged") for text in runs)


def test_a_problem_and_a_solution_have_addresses(opened: Callable[..., Any]) -> None:
    page = opened("#problem-p3")
    assert page.evaluate("document.activeElement.id") == "problem-p3"
    page = opened("#problem-many.15")  # behind the button for more, and equal to number 7
    assert page.evaluate("document.activeElement.dataset.numbers") == "7 15"
    page.locator(".problem h3 a").first.click()
    assert "#problem-" in page.url


def test_j_and_k_walk_over_solutions_and_leave_the_text_field_alone(opened: Callable[..., Any]) -> None:
    page = opened()
    ids = page.evaluate("[...document.querySelectorAll('.solution')].slice(0, 2).map((each) => each.id)")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == ids[1]
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.id") == ids[0]
    page.locator("#search").focus()
    page.keyboard.type("jk")
    assert page.locator("#search").input_value() == "jk"
    assert page.locator("#found").inner_text() == "0 solutions of 0 problems"


def test_steps_are_told_apart_without_colour(opened: Callable[..., Any]) -> None:
    page = opened("#show-disagrees")
    marks = page.locator(".step .mark")
    assert set(marks.all_inner_texts()) <= {"✓", "✗", "·"}
    assert marks.first.get_attribute("aria-label") in ("labelled correct", "labelled incorrect", "no label")
    widths = page.evaluate(
        "['good', 'bad'].map((kind) => getComputedStyle(document.querySelector(`.step.${kind}`)).borderLeftStyle)"
    )
    assert widths == ["solid", "double"]


def test_decisions_open_by_the_keyboard_and_tell_what_was_kept_without_colour(opened: Callable[..., Any]) -> None:
    page = opened("#problem-s2")
    trace = page.locator("#problem-s2 .solution", has_text="beam@4x2").locator(".trace")
    assert not trace.locator(".candidate").first.is_visible()
    trace.locator("summary").focus()
    page.keyboard.press("Enter")
    first, second, third, last = trace.locator(".candidate").all()[:4]
    assert "first" in first.inner_text()
    assert first.locator(".mark").inner_text() == "●"
    assert first.locator(".mark").get_attribute("aria-label") == "kept"
    assert third.locator(".mark").inner_text() == "○"
    assert "<b>third</b>" in third.inner_text()
    assert last.locator(".score").count() == 0
    assert second.inner_text().endswith("-0.70")
    assert [each.locator(".bar").count() for each in (first, second)] == [1, 0]  # no share of one
    weights = page.evaluate(
        "['kept', 'dropped'].map((kind) => getComputedStyle(document.querySelector(`.candidate.${kind}`)).fontWeight)"
    )
    assert weights == ["600", "400"]


def test_print_shows_all_that_is_selected_without_controls(opened: Callable[..., Any]) -> None:
    page = opened("#show-incorrect")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("#controls").is_visible()
    shown = page.locator(".problem").count()
    assert shown == int(page.locator("#found").text_content().split()[3])
    assert len(page.pdf()) > 10_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.locator(".problem").count() == min(shown, 8)
