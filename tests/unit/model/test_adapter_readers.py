"""The published adapter has the fields that other programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from job.model.adapter_files import save_adapter
from job.model.adapter_options import AdapterOptions
from tests.helpers import fill_adapter, make_base, make_model


@pytest.mark.parametrize("options", [AdapterOptions(), AdapterOptions(layers=(1,))], ids=["plain", "one layer"])
def test_llama_cpps_converter_reads_the_adapter(tmp_path: Path, options: AdapterOptions) -> None:
    """What llama.cpp's `convert_lora_to_gguf.py` asks of names, pairs and alpha; it scales by alpha over each rank."""
    make_base(tmp_path / "base")
    model = fill_adapter(make_model(tmp_path / "base", options=options))
    save_adapter(model, tmp_path / "adapter", base="org/base", revision=None)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "org/base"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    with safe_open(tmp_path / "base/model.safetensors", framework="pt") as opened:
        base = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        (side,) = (side for side in ("A", "B") if name.endswith(f".lora_{side}.weight"))  # any other name is refused
        of_base = name.removeprefix("base_model.model.").replace(f".lora_{side}.weight", ".weight")
        pairs.setdefault(of_base, {})[side] = tuple(tensor.shape)
    assert pairs
    modules = dict(model.named_modules())
    for name, pair in pairs.items():
        (rank, inputs), (outputs, same) = pair["A"], pair["B"]
        assert rank == same
        assert base[name] == (outputs, inputs)
        layer = modules[f"base_model.model.{name.removesuffix('.weight')}"]
        assert float(config["lora_alpha"]) / rank == layer.scaling["default"]
