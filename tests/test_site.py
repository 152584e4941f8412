"""The documentation as mkdocs builds it: every public name, every link and anchor, and some pages in headless Chromium.

mkdocs' strict build reports broken links and anchors of the Markdown. The slow tests read the built HTML, with what the
theme and mkdocstrings made; ``STEPKD_SITE`` names its folder (``mkdocs build --site-dir DIR``).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def public_names() -> dict[str, list[ast.ClassDef | ast.FunctionDef]]:
    """Module -> the classes and functions that it defines without an underscore; all but the command line."""
    paths = [path for path in sorted((ROOT / "stepkd").rglob("*.py")) if path.parent.name != "cli"]
    found = {}
    for path in paths:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        kinds = (ast.ClassDef, ast.FunctionDef)
        found[module] = [node for node in nodes if isinstance(node, kinds) and not node.name.startswith("_")]
    return {module: nodes for module, nodes in found.items() if nodes}


def test_every_public_name_has_a_docstring_and_its_module_is_on_a_page_that_leaves_out_private_names_alone() -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    listed = re.findall(r"^::: (\S+)$", "\n".join(hooks._reference().values()), re.MULTILINE)
    assert len(public_names()) > 100
    assert set(public_names()) <= set(listed)
    assert re.findall(r"filters: (.*)", (ROOT / "mkdocs.yml").read_text()) == ['["!^_"]']
    bare = [
        f"{name}.{each.name}" for name, nodes in public_names().items() for each in nodes if not ast.get_docstring(each)
    ]
    assert bare == []  # mkdocstrings passes them over


# ---- the built site --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Path:
    """The folder of the built site."""
    if "STEPKD_SITE" not in os.environ:
        pytest.skip("no STEPKD_SITE: mkdocs build --site-dir DIR")
    return Path(os.environ["STEPKD_SITE"])


class Links(HTMLParser):
    """Ids of a page, and addresses that it names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.addresses = {""}, set[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.ids |= {own["id"] or ""} if "id" in own else set()
        self.addresses |= {own[name] or "" for name in ("href", "src") if name in own}


@functools.cache
def links(path: Path) -> Links:
    """Of a page, read once."""
    return Links(path)


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    there = set[str]().union(*(links(path).ids for path in site.glob("api/*/index.html")))
    names = {f"{module}.{each.name}" for module, nodes in public_names().items() for each in nodes}
    assert names - there == set()


@pytest.mark.slow
def test_every_link_has_its_target(site: Path) -> None:
    broken = []
    for path in site.rglob("*.html"):
        for address in links(path).addresses if path.name != "404.html" else ():  # it may stand anywhere
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = Path(posixpath.normpath(path.parent / unquote(parts.path))) if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            is_page = target.suffix == ".html" and target.is_file()
            if not target.is_file() or (is_page and unquote(parts.fragment) not in links(target).ids):
                broken.append(f"{path.relative_to(site)}: {address}")
    assert broken == []


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site's address on this machine."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_their_width_in_both_themes_say_nothing_and_load_nothing_from_elsewhere(
    chromium: Any, served: str, width: int, scheme: str
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said = context.new_page(), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(served) else said.append(request.url))
    for name in ("", "data/", "report/", "commands/", "claims/", "api/losses/"):
        page.goto(served + name, wait_until="networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]
    context.close()
    assert said == []
