"""Shared fixtures. Nothing here needs a network; data fixtures skip when the data folder is absent."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        default=os.environ.get("STEPKD_DATA"),
        help="folder with gsm8k/, math500/, processbench/, ...: enables the tests on real data "
        "(default: $STEPKD_DATA, else ../shared/data beside the checkout when it exists)",
    )


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """Folder of real benchmark files; the test is skipped without it."""
    given = request.config.getoption("--data")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}: pass --data DIR or set STEPKD_DATA")
    return path


_WORKERS: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


@pytest.fixture(autouse=True)
def one_grading_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graders with the same limits share their workers, each of which takes half a second to start."""
    if request.path.parent.name == "grading":  # where the workers themselves are tested
        return
    from stepkd.grading.pool import Grader

    begin = Grader.__init__

    def join(self: Grader, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        limits = (self._owner, self.config.memory_mb, self.config.deadline_s, self.config.grader)
        self._lock, self._pool = _WORKERS.setdefault(limits, (self._lock, self._pool))

    monkeypatch.setattr(Grader, "__init__", join)
    monkeypatch.setattr(Grader, "close", lambda self: None)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


CHROMIUM = os.environ.get("STEPKD_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Headless Chromium: Debian's package of that name, or what ``STEPKD_CHROMIUM`` names, with its driver from the
    package index (``pip install playwright``); without them its tests are skipped, but not where ``CI`` is set."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if CHROMIUM is None or sync_playwright is None:
        assert not os.environ.get("CI"), "pip install playwright, apt-get install chromium"
        pytest.skip("no Chromium, or no playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


LONGEST = [
    *("test_real_model.py", "test_strategies.py", "test_claim_quick.py", "test_quickstart.py"),
    *("test_cluster_scripts.py", "test_label_kill.py", "test_kill_and_resume.py", "test_jobs_killed.py", "test_cli.py"),
    *("test_pool.py", "test_readme.py", "test_recipes.py", "test_invariance.py", "test_kdrl.py", "test_gkd.py"),
]
"""Files that take long, longest first: at the end of a run one worker would be left waiting for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files (xdist keeps this order: ``--no-loadscope-reorder``)."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 10)
