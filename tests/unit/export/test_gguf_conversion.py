"""Blocks and types of GGUF files are llama.cpp's own."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from job.common.export_formats import EXPORT_FORMATS
from job.export.gguf import TYPES
from job.export.gguf_conversion import _blocks_by_ggml, _file_type, _that_fits

ERROR = {"Q4_0": 0.12, "Q5_0": 0.06, "Q5_1": 0.06, "Q8_0": 0.01, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03}


@pytest.fixture
def packaged() -> Iterator[Any]:
    """The package gguf, put back as it was."""
    import gguf as package

    table = package.quants._type_traits
    kinds = {kind: vars(kind).get("quantize_blocks") for kind in table.values()}
    rows = package.quants._apply_over_grouped_rows
    yield package
    package.quants._apply_over_grouped_rows = rows
    for kind, method in kinds.items():
        if method is not None:
            kind.quantize_blocks = method
        elif "quantize_blocks" in vars(kind):
            del kind.quantize_blocks


def test_blocks_are_llama_cpps_own(packaged: Any) -> None:
    """Every type holds the numbers up to its rounding; those that the package makes too have the same bytes."""
    types, quants = packaged.GGMLQuantizationType, packaged.quants
    weights = np.random.default_rng(0).standard_normal((96, 512), dtype=np.float32)
    own = {name: quants.quantize(weights, types[name]) for name in ("Q4_0", "Q5_0", "Q5_1", "Q8_0")}
    with pytest.raises(NotImplementedError):
        quants.quantize(weights, types.Q4_K)
    _blocks_by_ggml()
    for name, bound in ERROR.items():
        made = quants.quantize(weights, types[name])
        assert name not in own or np.array_equal(made, own[name])
        error = np.abs(quants.dequantize(made, types[name]) - weights).mean()
        assert bound / 8 < error < bound


def test_a_type_that_does_not_fit_is_replaced_as_llama_cpp_does() -> None:
    """Rows that are no multiple of 256 have no k-quants: the next larger kind of 32 takes their place, or 16 bits."""
    types, fits = import_module("gguf").GGMLQuantizationType, _that_fits
    assert fits(types.Q4_K, 512) == types.Q4_K
    assert [fits(kind, 576) for kind in (types.Q4_K, types.Q5_K, types.Q6_K)] == [types.Q5_0, types.Q5_1, types.Q8_0]
    assert fits(types.Q8_0, 100) == fits(types.Q6_K, 100) == types.F16


def test_every_type_is_one_of_llama_cpps() -> None:
    """The names are llama.cpp's own, and those of the settings."""
    assert tuple(TYPES) == tuple(EXPORT_FORMATS["gguf"].types)
    assert all(_file_type(name).name.endswith(name.upper()) for name in TYPES)
