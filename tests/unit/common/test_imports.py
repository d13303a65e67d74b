"""Imports of libraries without their optional packages."""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from job.common.imports import MAX_READ_AHEAD, distributions_read_when_needed, imported_files, without


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


def test_what_another_thread_has_put_in_its_place_stays() -> None:
    """A package that is there at the end of the block, or gone altogether, is left as it is."""
    sys.modules.pop("colorsys", None)
    with without("colorsys", "sndhdr_of_nobody"):
        del sys.modules["colorsys"], sys.modules["sndhdr_of_nobody"]
        imported = import_module("colorsys")
    assert sys.modules["colorsys"] is imported


def test_distributions_are_read_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that only keeps the answer reads nothing; one that uses it gets what it would have got, read once."""
    reads = []
    known = {"yaml": ["PyYAML"]}
    monkeypatch.setattr(metadata, "packages_distributions", own := lambda: reads.append(1) or known)
    with distributions_read_when_needed():
        kept = metadata.packages_distributions()
    assert metadata.packages_distributions is own
    assert not reads
    assert (kept["yaml"], kept.get("vllm"), dict(kept)) == (["PyYAML"], None, known)
    assert reads == [1]
    with pytest.raises(KeyError):
        kept["vllm"]


def test_the_files_of_imports_are_named() -> None:
    """Compiled modules and native libraries that this process has, and no large ones."""
    import pydantic_core

    files = imported_files()
    assert pydantic_core._pydantic_core.__file__ in files
    assert any(f"{Path(pytest.__file__).stem}" in Path(file).name and file.endswith(".pyc") for file in files)
    assert max(Path(file).stat().st_size for file in files) <= MAX_READ_AHEAD
