"""These tests need Docker Engine and an image: `make image image-test`. Other test runs leave them out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

if "IMAGE" not in os.environ:
    collect_ignore_glob = ["test_*"]

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """Lines that are printed when all tests are done."""
    return FIGURES


@pytest.fixture
def engine() -> Iterator[object]:
    """Docker Engine; what a test starts is removed when the test ends."""
    from tests.image.engine import Engine

    engine = Engine()
    try:
        yield engine
    finally:
        engine.remove_all()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was measured."""
    for line in FIGURES:
        terminalreporter.write_line(line)
