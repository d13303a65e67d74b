"""The format `fp8`: weights of linear layers as 8-bit floats (E4M3), activations quantized at run time.

This is FP8_DYNAMIC of compressed-tensors, which vLLM computes on GPUs from Ada and Hopper on. For a layer's weight W of
shape (outputs, inputs), row by row:

    scale = max |W| / 448            rounded to the dtype of the merged model
    Q     = W / scale                computed in fp32, limited to +-448, rounded to the nearest E4M3

A reader multiplies Q by its scale, and each token's input by that token's scale. Nothing is calibrated. In memory is
one file of the result and one tensor in fp32.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from job.export.quantizable import kept_linear, quantizable, why_not_quantizable
from job.export.tensor_files import (
    copy_other_files,
    parameter_names,
    read_headers,
    read_tensor,
    write_config,
    write_weights,
)
from job.model.files import MAX_CONFIG_BYTES, build_empty, read_config, read_json
from job.records import QuantizationRecord

if TYPE_CHECKING:
    from job.export.formats import DerivedInputs

SCHEME = "FP8_DYNAMIC"
"""compressed-tensors' name: weights by row, activations by token."""
METHOD = "compressed-tensors"
_SCALE = "_scale"


def check_fp8(empty: Any, _kind: str) -> str:
    """As `Format.check`."""
    return why_not_quantizable(empty)


def make_fp8(inputs: DerivedInputs) -> QuantizationRecord:
    """As `Format.make`.

    Raises:
        DataError: The merged model cannot be read.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    source = inputs.merged
    empty = build_empty(source, read_config(source))
    layers, kept_layers = set(quantizable(empty)), kept_linear(empty)
    tensors = read_headers(source)
    modules = {name: parameter.removesuffix(".weight") for name, parameter in parameter_names(tensors, empty).items()}
    quantized = {name for name, module in modules.items() if module in layers and name.endswith(".weight")}
    scheme = preset_name_to_scheme(SCHEME, ["Linear"])
    packing = CompressionFormat.float_quantized.value
    compressor = BaseCompressor.get_value_from_registry(packing)
    shapes = {}
    for name, (_, shape, dtype) in tensors.items():
        shapes[name] = (shape, torch.float8_e4m3fn if name in quantized else dtype)
        if name in quantized:
            shapes[name + _SCALE] = ((shape[0], 1), dtype)

    def written(name: str) -> torch.Tensor:
        weight_of = name.removesuffix(_SCALE)
        if weight_of not in quantized:
            return read_tensor(tensors[name][0], name).contiguous()
        file, _, dtype = tensors[weight_of]
        weight = read_tensor(file, weight_of).float()
        lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        # Rounded before it is used: transformers holds it in the model's dtype, vLLM in fp32, and both read the same.
        scale: torch.Tensor = calculate_qparams(lowest, highest, scheme.weights)[0].to(dtype)
        if name != weight_of:
            return scale.contiguous()
        compressed = compressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
        packed: torch.Tensor = compressed["weight"].contiguous()
        return packed

    inputs.folder.mkdir(parents=True)
    write_weights(inputs.folder, shapes, written, check_stop=inputs.check_stop)
    config = read_json(source / "config.json", MAX_CONFIG_BYTES)
    config["quantization_config"] = _quantization_config(scheme, packing, kept_layers)
    write_config(inputs.folder, config)
    copy_other_files(source, inputs.folder)
    return QuantizationRecord(
        method=METHOD,
        scheme=SCHEME,
        bits=8,
        group_size=None,
        activations="8-bit floats, by token at run time",
        library=METHOD,
        version=version(METHOD),
        layers=len(quantized),
        kept=kept_layers,
    )


def _quantization_config(scheme: Any, packing: str, kept_layers: list[str]) -> Any:
    """What config.json says of the quantization, as compressed-tensors writes it."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        quantization_status=QuantizationStatus.COMPRESSED,
        format=packing,
        ignore=kept_layers,
    )
    return json.loads(quantization.model_dump_json())
