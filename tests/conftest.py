"""Shared fixtures. Nothing here needs a network; data fixtures skip when the data folder is absent."""

from __future__ import annotations

import os
from pathlib import Path

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


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that the other worker is not left waiting for it (``--no-loadscope-reorder``)."""
    items.sort(key=lambda item: item.path.name != "test_real_model.py")
