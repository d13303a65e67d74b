"""Names of export formats: with and without a type, and which packages they need."""

from __future__ import annotations

import pytest

from job.common import export_formats
from job.common.export_formats import (
    ExportFormat,
    find_format,
    needs_merge,
    not_installed,
    split_name,
    to_make,
    weights_bytes,
)


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format with two types, whose package nobody has."""
    found = ExportFormat("of two types", types={"a": 4, "b": 8}, modules=("json", "no_such_module_at_all"))
    monkeypatch.setitem(export_formats.EXPORT_FORMATS, "typed", found)  # type: ignore[arg-type]


def test_a_type_follows_a_colon() -> None:
    """A format with types needs one that it has; one without types takes none."""
    assert split_name("typed:b") == ("typed", "b")
    assert split_name("fp8") == ("fp8", "")
    assert [*find_format("typed:a").types] == ["a", "b"]
    with pytest.raises(ValueError, match="one of a, b"):
        split_name("typed")
    with pytest.raises(ValueError, match="one of a, b"):
        split_name("typed:c")
    for wrong in ("fp8:a", "fp8:", "fp9", ""):
        with pytest.raises(ValueError, match=r"must be of merged, adapter:TYPE, fp8, .*typed:TYPE"):
            split_name(wrong)


def test_what_is_made_for_what_is_asked() -> None:
    """The merge comes first, whether or not it was asked for, and nothing is made for nothing."""
    assert to_make([]) == []
    assert to_make(["fp8"]) == ["merged", "fp8"]
    assert to_make(["awq", "merged", "fp8"]) == ["merged", "awq", "fp8"]


def test_a_copy_of_the_adapter_needs_no_merge() -> None:
    """It is made first, with the run's base in memory; a merge is made only where a whole model was asked for."""
    assert to_make(["adapter:fp16", "adapter:bf16"]) == ["adapter:fp16", "adapter:bf16"]
    assert to_make(["fp8", "adapter:bf16"]) == ["adapter:bf16", "merged", "fp8"]
    assert [needs_merge(names) for names in ([], ["adapter:bf16"], ["adapter:bf16", "merged"])] == [False, False, True]
    with pytest.raises(ValueError, match="one of bf16, fp16"):
        split_name("adapter")


def test_bytes_of_a_model_in_each_format() -> None:
    """What is quantized takes its bits, all else 16 of them; llama.cpp quantizes the embedding as well."""
    sizes = {
        name: weights_bytes(name, 8000, 1000)
        for name in ("merged", "fp8", "w4a16", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m")
    }
    assert sizes == {
        "merged": 18_000,
        "fp8": 10_100,
        "w4a16": 6_200,
        "gguf:f16": 18_000,
        "gguf:q8_0": 9_562,
        "gguf:q4_k_m": 5_825,
    }


def test_missing_packages_are_named() -> None:
    """Only those that are not there, and of the formats that were asked for."""
    assert not_installed(["merged", "typed:a"]) == ["no_such_module_at_all"]
    assert not_installed(["merged"]) == []
