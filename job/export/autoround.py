"""The formats `w4a16`, `gptq` and `awq`: weights of linear layers in 4 bits, by auto-round.

All three are the same quantization (integers, symmetric, a scale for each group of weights, whose rounding auto-round
optimizes by the layers' outputs on calibration rows), in three layouts: that of compressed-tensors, of GPTQ, of AWQ.

The calibration rows are joined in the order of the batch plan, and cut into sequences of one length. Tensors that are
not quantized are those of the merged model, bit for bit; in `gptq` and `awq`, whose kernels require it, in fp16.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from job.common.helper_process import start_helper
from job.common.out_of_memory import ran_out
from job.errors import Killed
from job.export.autoround_process import Task
from job.export.exported_model import ExportedModel, ScoringOptions, load_quantized
from job.export.quantizable import CannotMake, quantizable, why_not_quantizable
from job.export.tensor_files import copy_other_files, read_headers, read_tensor, write_config, write_weights
from job.model.files import MAX_CONFIG_BYTES, build_empty, read_config, read_json
from job.records import QuantizationRecord

if TYPE_CHECKING:
    from job.export.formats import DerivedInputs

MAX_SEQUENCE_TOKENS = 2048
"""Tokens of a calibration sequence, at most: as auto-round has it."""
GROUP_SIZES = (128, 64, 32)
"""Sizes of a group that vLLM's kernels have, the first that divides the inputs of all layers is taken."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Layout:
    """How quantized weights are written.

    Attributes:
        name: auto-round's.
        method: As readers name it.
        packed: Ending of the tensor that holds a layer's weights.
        half: Whether all other tensors are in fp16.
    """

    name: str
    method: str
    packed: str
    half: bool = False


COMPRESSED = Layout("llm_compressor", "compressed-tensors", "weight_packed")
GPTQ = Layout("auto_gptq", "gptq", "qweight", half=True)
AWQ = Layout("auto_awq", "awq", "qweight", half=True)


def cannot_score_awq(_device: torch.device) -> str:
    """As `Format.cannot_score`: auto-round's own reader of AWQ fails on a CPU."""
    if find_spec("gptqmodel") is None:
        return "transformers reads AWQ by gptqmodel, which is not installed"
    return ""


def check_four_bit(empty: Any, _kind: str) -> str:
    """As `Format.check`."""
    return why_not_quantizable(empty) or ("" if group_size(empty) else "its layers' inputs are not multiples of 32")


def group_size(empty: Any) -> int | None:
    """The largest of `GROUP_SIZES` that divides the inputs of all layers; None if there is none."""
    inputs = [empty.get_submodule(name).in_features for name in quantizable(empty)]
    return next((size for size in GROUP_SIZES if all(width % size == 0 for width in inputs)), None)


def calibration_sequences(rows: Sequence[Sequence[int]], longest: int = MAX_SEQUENCE_TOKENS) -> list[list[int]]:
    """The rows joined in their order, and cut into sequences of one length; the incomplete last one is left out."""
    joined = [token for row in rows for token in row]
    length = min(longest, len(joined))
    return [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]


def make_four_bit(
    layout: Layout, inputs: DerivedInputs, run: Callable[[Task, Path, Callable[..., None]], None] | None = None
) -> QuantizationRecord:
    """As `Format.make`.

    Args:
        layout: How the weights are written.
        inputs: What it is made from.
        run: (task, folder for its files, check_stop) quantizes; by default in a separate process.

    Raises:
        CannotMake: auto-round cannot quantize this model.
        Killed: Its process was killed.
        DataError: The merged model cannot be read.
    """
    empty = build_empty(inputs.merged, read_config(inputs.merged))
    size = group_size(empty)
    if size is None:
        raise CannotMake("its layers' inputs are not multiples of 32")
    inputs.work.mkdir(parents=True)
    task = Task(
        merged=str(inputs.merged.absolute()),
        output=str((inputs.work / "made").absolute()),
        layout=layout.name,
        group_size=size,
        sequences=calibration_sequences(inputs.calibration),
        steps=inputs.steps,
        seed=inputs.seed,
        device=str(inputs.device),
        threads=torch.get_num_threads(),
    )
    (run or run_process)(task, inputs.work, inputs.check_stop)
    (quantized_folder,) = (path.parent for path in (inputs.work / "made").rglob("config.json"))
    layers, kept_layers = _write(layout, inputs, quantized_folder, empty)
    return QuantizationRecord(
        method=layout.method,
        scheme="W4A16",
        bits=4,
        group_size=size,
        activations="16 bit",
        library="auto-round",
        version=version("auto-round"),
        layers=layers,
        kept=kept_layers,
    )


def run_process(task: Task, work: Path, check_stop: Callable[..., None]) -> None:
    """Runs auto-round in a separate process, which ends when this function does.

    Raises:
        CannotMake: It ended with an error.
        Killed: It was killed.
        TrainingFailed: It was killed because main memory was full.
    """
    task_file = work / "task.json"
    task_file.write_text(json.dumps(asdict(task)), encoding="utf-8")
    with start_helper("job.export.autoround_process", str(task_file)) as helper:
        cpu_seconds, code = 0.0, None
        while code is None:
            cpu_seconds_before, cpu_seconds = cpu_seconds, _cpu_seconds(helper.process.pid)
            check_stop(progress=cpu_seconds > cpu_seconds_before)
            with suppress(subprocess.TimeoutExpired):
                code = helper.process.wait(_POLL_SECONDS)
        error_line, out_of_memory = helper.last_error_line(), helper.killed_for_memory()
    if out_of_memory:
        raise ran_out(
            "weights were quantized by auto-round", "leave this format out of JOB_EXPORT__FORMATS", MemoryError()
        )
    if code < 0:
        raise Killed(f"the process that quantizes was killed by signal {-code}; give the job more main memory")
    if code:
        raise CannotMake(f"auto-round ended with an error: {error_line or 'without a message'}")


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _write(layout: Layout, inputs: DerivedInputs, quantized_folder: Path, empty: Any) -> tuple[int, list[str]]:
    """Writes the format's files from auto-round's output and from the merged model.

    Returns:
        How many layers are quantized, and the linear layers that are not.

    Raises:
        CannotMake: A tensor does not fit into fp16.
    """
    source = inputs.merged
    merged, quantized_tensors = read_headers(source), read_headers(quantized_folder)
    layers = {
        name.removesuffix(f".{layout.packed}") for name in quantized_tensors if name.endswith(f".{layout.packed}")
    }
    # Only what holds quantized weights: auto-round also writes a head that is tied to the embeddings, as a copy.
    quantized_tensors = {
        name: tensor for name, tensor in quantized_tensors.items() if name.rpartition(".")[0] in layers
    }
    plain = {name: tensor for name, tensor in merged.items() if name.removesuffix(".weight") not in layers}
    config = read_json(source / "config.json", MAX_CONFIG_BYTES)
    main: torch.dtype = torch.float16 if layout.half else getattr(torch, config["dtype"])
    tensors = {}
    for name, (file, shape, dtype) in {**quantized_tensors, **plain}.items():
        same = not dtype.is_floating_point or (name in plain and not layout.half)
        tensors[name] = (file, shape, dtype if same else main)

    def written(name: str) -> torch.Tensor:
        file, _, dtype = tensors[name]
        tensor = read_tensor(file, name)
        cast = tensor.to(dtype).contiguous()
        if tensor.isfinite().all() and not cast.isfinite().all():
            raise CannotMake(f"{name} has numbers that are too large for fp16")
        return cast

    inputs.folder.mkdir(parents=True)
    write_weights(
        inputs.folder, {name: (s, d) for name, (_, s, d) in tensors.items()}, written, check_stop=inputs.check_stop
    )
    config["quantization_config"] = read_json(quantized_folder / "config.json", MAX_CONFIG_BYTES)["quantization_config"]
    config["dtype"] = str(main).removeprefix("torch.")
    write_config(inputs.folder, config)
    copy_other_files(source, inputs.folder)
    linear = [name for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)]
    return len(layers), [name for name in linear if name not in layers]


def load_gptq(folder: Path, scoring: ScoringOptions) -> ExportedModel:
    """Loads by auto-round's quantizer in transformers: that of GPTQ itself needs packages with their own kernels."""
    from transformers import AutoRoundConfig

    # `g_idx` is the order of the inputs, which the layout requires; here it is the identity
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # which is on purpose
        return load_quantized(folder, scoring, quantization_config=AutoRoundConfig(), ignored=".g_idx")
