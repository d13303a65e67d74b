"""Shared by tests of whole runs."""

from __future__ import annotations

import pytest

from tests.forked import Forks


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Starts the processes."""
    return Forks(tmp_path_factory.mktemp("logs"))
