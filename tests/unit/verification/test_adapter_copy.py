"""How `verify` rounds an adapter's numbers without torch, to compare a copy with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from job.verification.check_adapter_copy import adapter_files

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AWKWARD = [0.0, -0.0, 65504.0, 65519.99, 1e-8, 6e-8, 2.9802322e-08, 1.00390625, 1.01171875, 3.3e38]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
def test_it_rounds_as_torch_does(kind: str, held: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit: random numbers of every size, ties, the smallest and the largest; what is no float is left."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    numbers = torch.cat([bits.view(torch.float32), torch.tensor(AWKWARD)]).to(held)
    tensors = {"a": numbers[numbers.isfinite()], "b": torch.arange(3)}
    for folder, made in (
        ("adapter", tensors),
        (f"export/adapter-{kind}", {**tensors, "a": tensors["a"].to(DTYPES[kind])}),
    ):
        (tmp_path / folder).mkdir(parents=True)
        save_file(made, tmp_path / folder / "adapter_model.safetensors")
    paths = [f"artifacts/{folder}/adapter_model.safetensors" for folder in ("adapter", f"export/adapter-{kind}")]
    copies = {path: tmp_path / path.removeprefix("artifacts/") for path in paths}
    assert list(adapter_files({"format": f"adapter:{kind}", "dtype": kind}, copies)) == []
    for folder in ("adapter", f"export/adapter-{kind}"):  # of a signed run, each folder has a signature of its own
        (tmp_path / folder / "model.sig").write_text(folder)
        copies[f"artifacts/{folder}/model.sig"] = tmp_path / folder / "model.sig"
    assert list(adapter_files({"format": f"adapter:{kind}", "dtype": kind}, copies)) == []
    off = {"a": tensors["a"].to(DTYPES[kind]).flip(0), "b": tensors["b"]}
    save_file(off, tmp_path / f"export/adapter-{kind}/adapter_model.safetensors")
    (found,) = adapter_files({"format": f"adapter:{kind}", "dtype": kind}, copies)
    assert found.where == f"{paths[1]} a"


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER, COPY = "artifacts/adapter/", "artifacts/export/adapter-bf16/"


def copied(folder: Path) -> dict[str, Path]:
    """An adapter of a matrix and a whole number, and its copy in bf16: path in the run -> file."""
    copies = {}
    for prefix, dtype, card in ((ADAPTER, torch.float32, "a card"), (COPY, torch.bfloat16, "the card of an export")):
        (folder / prefix).mkdir(parents=True)
        tensors = {"a": torch.tensor([[1.5, -2.0]], dtype=dtype), "b": torch.arange(2)}
        save_file(tensors, folder / prefix / WEIGHTS)
        for name, text in ((CONFIG, "{}"), ("README.md", card)):
            (folder / prefix / name).write_text(text)
        copies |= {prefix + name: folder / prefix / name for name in (WEIGHTS, CONFIG, "README.md")}
    return copies


def weights(**tensors: torch.Tensor) -> Callable[[dict[str, Path]], object]:
    """Writes others than the copy has."""
    return lambda copies: save_file(tensors, copies[COPY + WEIGHTS])


MATRIX, NUMBER = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), torch.arange(2)


@pytest.mark.parametrize(
    ("change", "where", "found"),
    [
        (lambda copies: copies.pop(COPY + CONFIG), [f"{COPY} files"], '["adapter_model.safetensors"]'),
        (lambda copies: copies.pop(ADAPTER + CONFIG), [f"{COPY} files"], '["adapter_model.safetensors"]'),
        (lambda copies: copies[COPY + CONFIG].write_text("{ }"), [COPY + CONFIG], "other bytes"),
        (lambda copies: copies[COPY + WEIGHTS].write_text("{}"), [COPY + WEIGHTS], "SafetensorError"),
        (lambda copies: copies[ADAPTER + WEIGHTS].write_text("{}"), [COPY + WEIGHTS], "SafetensorError"),
        (weights(a=MATRIX), [f"{COPY}{WEIGHTS} tensors"], '["a", "b"]'),
        (weights(a=MATRIX.float(), b=NUMBER), [f"{COPY}{WEIGHTS} a"], "other numbers"),
        (weights(a=MATRIX.half(), b=NUMBER), [f"{COPY}{WEIGHTS} a"], "other numbers"),
        (weights(a=MATRIX.T.contiguous(), b=NUMBER), [f"{COPY}{WEIGHTS} a"], "other numbers"),
        (weights(a=MATRIX, b=NUMBER + 1), [f"{COPY}{WEIGHTS} b"], "other numbers"),
        (weights(a=-MATRIX, b=NUMBER + 1), [f"{COPY}{WEIGHTS} a"], "other numbers"),  # the first one alone
    ],
)
def test_a_copy_that_differs(
    tmp_path: Path, change: Callable[[dict[str, Path]], object], where: list[str], found: str
) -> None:
    """A file or tensor too few, other bytes, dtype, shape or numbers; a card is not compared, each has its own."""
    copies = copied(tmp_path)
    export = {"format": "adapter:bf16", "dtype": "bf16"}
    assert list(adapter_files(export, copies)) == []
    (difference,) = adapter_files({**export, "dtype": "fp16"}, copies)
    assert (difference.where, difference.claimed, difference.found) == (
        "results.json exports adapter:bf16 dtype",
        '"fp16"',
        '"bf16"',
    )
    change(copies)
    differences = list(adapter_files(export, copies))
    assert [difference.where for difference in differences] == where
    assert found in str(differences[0])


def test_numbers_beyond_fp16_become_infinite(tmp_path: Path) -> None:
    """As IEEE 754 rounds them: from 65520 on, halfway between the largest number, 65504, and the next power of two."""
    copies = {}
    for prefix, numbers in (
        (ADAPTER, np.array([65519.0, 65520.0, -1e9, 2**-24, 2**-25, 1.5 * 2**-25], np.float32)),
        ("artifacts/export/adapter-fp16/", np.array([65504, np.inf, -np.inf, 2**-24, 0, 2**-24], np.float16)),
    ):
        (tmp_path / prefix).mkdir(parents=True)
        copies[prefix + WEIGHTS] = tmp_path / prefix / WEIGHTS
        save_numpy({"a": numbers}, copies[prefix + WEIGHTS])
    assert list(adapter_files({"format": "adapter:fp16", "dtype": "fp16"}, copies)) == []
