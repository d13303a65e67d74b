"""How `verify` rounds an adapter's numbers without torch, to compare a copy with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from job.verification.check_adapter_copy import adapter_files

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AWKWARD = [0.0, -0.0, 65504.0, 65519.99, 1e-8, 6e-8, 2.9802322e-08, 1.00390625, 1.01171875, 3.3e38]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
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
