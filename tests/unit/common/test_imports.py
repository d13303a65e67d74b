"""Imports of libraries without packages that they can do without."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from job.common.imports import without


def test_a_package_is_hidden_within_and_found_afterwards() -> None:
    """A library that looks for a hidden package, or tries to import it, finds it not installed."""
    sys.modules.pop("colorsys", None)
    with without("colorsys"):
        assert find_spec("colorsys") is None
        with pytest.raises(ModuleNotFoundError):
            import_module("colorsys")
    assert import_module("colorsys").__name__ == "colorsys"


def test_what_is_imported_stays_as_it_is() -> None:
    """A package that something uses already is not taken away from it."""
    with without("json"):
        assert import_module("json") is sys.modules["json"]
    assert "json" in sys.modules


def test_an_error_within_hides_nothing_for_good() -> None:
    """After a failed import, packages are visible again."""
    sys.modules.pop("colorsys", None)
    with pytest.raises(ZeroDivisionError), without("colorsys"):
        raise ZeroDivisionError
    assert find_spec("colorsys") is not None
