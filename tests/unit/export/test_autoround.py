"""The 4-bit formats: auto-round's output checked by independent arithmetic, and loaded to be scored."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from job.common import helper_process
from job.common.hashing import hash_file
from job.common.resources import MainMemory
from job.errors import Killed, Preempted, TrainingFailed
from job.evaluation.scorer import score_questions
from job.export import autoround
from job.export.autoround import AWQ, COMPRESSED, GPTQ, Layout, calibration_sequences, make_four_bit, run_process
from job.export.autoround_process import Task, quantize
from job.export.exported_model import ScoringOptions, load_exported
from job.export.formats import DerivedInputs
from job.export.quantizable import CannotMake
from job.records import QuantizationRecord, Question
from tests.helpers import make_base
from tests.warm import ROOT

HOW = ScoringOptions(torch.device("cpu"), torch.float32, 512, packed=True)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, as a merge leaves it."""
    folder = tmp_path_factory.mktemp("merged")
    make_base(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def inputs_for(merged: Path, folder: Path, steps: int = 2) -> DerivedInputs:
    """With ten rows for calibration."""
    chosen = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 300, (20 + row,), generator=chosen).tolist() for row in range(10)]
    return DerivedInputs(
        merged=merged,
        kind="",
        folder=folder / "files",
        work=folder / "work",
        calibration=rows,
        device=torch.device("cpu"),
        seed=0,
        check_stop=lambda **_: None,
        steps=steps,
    )


def in_process(task: Task, _work: Path, _check_stop: Callable[..., None]) -> None:
    """auto-round in this process, which saves its imports."""
    quantize(replace(task, sequences=calibration_sequences(task.sequences, 32)))


Made = tuple[Path, QuantizationRecord, Layout]


@pytest.fixture(scope="module")
def packed(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """In the layout of compressed-tensors."""
    folder = tmp_path_factory.mktemp("w4a16")
    return folder / "files", make_four_bit(COMPRESSED, inputs_for(merged, folder), in_process), COMPRESSED


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight: eight numbers of 4 bits in one of 32, less 8, times the scale of their group."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in (name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")):
        words, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
        numbers = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(1) - 8
        found[name] = (numbers.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None].float()).flatten(1)
    return found


@pytest.mark.long
def test_w4a16_holds_the_merged_weights_in_four_bits(merged: Path, packed: Made) -> None:
    """Each weight is within one step of the merged one; all other tensors are the merged ones bit for bit."""
    folder, record, _ = packed
    before, after = load_file(merged / "model.safetensors"), load_file(folder / "model.safetensors")
    weights = decompressed(folder)
    assert len(weights) == record.layers == 14
    for name, weight in weights.items():
        step = after[f"{name}_scale"].float().abs().repeat_interleave(128, dim=1)
        assert ((weight - before[name].float()).abs() <= 1.01 * step).all()
    for name in before.keys() - weights.keys():
        assert torch.equal(before[name], after[name])
    assert {after[name].dtype for name in after if name.endswith("_scale")} == {torch.bfloat16}


@pytest.mark.long
def test_w4a16_is_what_compressed_tensors_reads(packed: Made) -> None:
    """Its config class takes the configuration, and it decompresses to what own arithmetic does."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((packed[0] / "config.json").read_text())
    how = QuantizationConfig.model_validate(config["quantization_config"])
    (group,) = how.config_groups.values()
    weights = group.weights
    assert (how.format, how.ignore, config["dtype"]) == ("pack-quantized", ["lm_head"], "bfloat16")
    assert (weights.num_bits, weights.type, weights.strategy, weights.group_size, weights.symmetric) == (
        4, "int", "group", 128, True,
    )  # fmt: skip
    assert group.input_activations is None
    tensors = load_file(packed[0] / "model.safetensors")
    reader = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, weight in decompressed(packed[0]).items():
        own = {f"weight{part}": tensors[f"{name}{part}"] for part in ("_packed", "_scale", "_shape")}
        assert torch.equal(reader.decompress(own, group)["weight"].float(), weight.bfloat16().float())


def scores(load: Callable[[Path, ScoringOptions], Any], folder: Path) -> torch.Tensor:
    """Log-likelihoods of some choices."""
    questions = [Question((5, 9, number, 40), ((7, 8), (30 + number,), (12, 13, 14))) for number in range(6)]
    found = load(folder, HOW)
    asked = score_questions(found.model, questions)
    found.close()
    return torch.tensor([choice.log_likelihood for choices in asked for choice in choices])


def plain_copy(merged: Path, folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
    """The merged model with other weights, as an unquantized model."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, strict=False)
    model.save_pretrained(folder)
    return folder


@pytest.mark.long
def test_w4a16_is_scored_as_what_it_holds(merged: Path, packed: Made, tmp_path: Path) -> None:
    """Loaded by transformers it answers as an unquantized model with the same weights."""
    same = plain_copy(merged, tmp_path / "plain", decompressed(packed[0]), torch.bfloat16)
    assert torch.allclose(scores(autoround.load_quantized, packed[0]), scores(load_exported, same), atol=0.05)


@pytest.mark.long
def test_the_three_layouts_hold_the_same_weights(merged: Path, packed: Made, tmp_path: Path) -> None:
    """GPTQ and AWQ are other layouts of the same quantization; GPTQ is scored as the weights that it holds."""
    expected = decompressed(packed[0])
    for layout in (GPTQ, AWQ):
        inputs = inputs_for(merged, tmp_path / layout.method)
        record = make_four_bit(layout, inputs, in_process)
        config = json.loads((inputs.folder / "config.json").read_text())
        said = config["quantization_config"]
        assert (said["quant_method"], said["bits"], said["group_size"]) == (layout.method, 4, 128)
        assert (record.method, record.layers, record.kept, config["dtype"]) == (
            layout.method,
            14,
            ["lm_head"],
            "float16",
        )
        tensors = load_file(inputs.folder / "model.safetensors")
        order = [0, 4, 1, 5, 2, 6, 3, 7] if layout is AWQ else list(range(8))
        for name, weight in expected.items():
            words, scale = (tensors[name.replace("weight", part)] for part in ("qweight", "scales"))
            numbers = torch.stack([(words >> (4 * place)) & 15 for place in order], dim=-1)
            rows = numbers.flatten(1) if layout is AWQ else numbers.transpose(1, 2).flatten(0, 1)
            found = ((rows - 8).unflatten(0, (scale.shape[0], -1)) * scale[:, None].float()).flatten(0, 1).T
            assert torch.allclose(found, weight, rtol=0.01, atol=0.002)
    same = plain_copy(merged, tmp_path / "plain", expected, torch.float16)
    found = scores(autoround.load_gptq, tmp_path / "gptq/files")
    assert torch.allclose(found, scores(load_exported, same), atol=0.1)
    assert "gptqmodel" in autoround.cannot_score_awq(torch.device("cpu"))


@pytest.mark.long
def test_made_twice_in_processes_of_its_own_it_has_the_same_bytes(merged: Path, tmp_path: Path) -> None:
    """Time, path and process change nothing."""
    made = []
    for number in range(2):
        inputs = inputs_for(merged, tmp_path / str(number))
        make_four_bit(COMPRESSED, inputs)
        made.append({path.name: hash_file(path) for path in inputs.folder.iterdir()})
    assert made[0] == made[1]


def test_calibration_rows_are_joined_and_cut() -> None:
    """All sequences have one length, and the rows keep their order."""
    rows = [[1, 2, 3], [4], [5, 6, 7, 8], [9]]
    assert calibration_sequences(rows, 4) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert calibration_sequences(rows, 100) == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Another program in place of auto-round's."""
    started = autoround.subprocess.Popen

    def replaced(program: str) -> None:
        def popen(command: list[str], **how: Any) -> Any:
            return started([command[0], "-c", program], **how)

        monkeypatch.setattr(autoround.subprocess, "Popen", popen)

    yield replaced
    monkeypatch.undo()


TASK = Task("", "", "auto_awq", 128, [[1]], 0, 0, "cpu", 1)


@pytest.mark.parametrize(("seconds", "code"), [(0.2, 0), (60, 1)])
def test_its_process_ends_with_its_work_or_with_the_job(tmp_path: Path, seconds: float, code: int) -> None:
    """Waiting for the job's end does not disturb its own; without the job it does not go on."""
    (tmp_path / "task").write_text(json.dumps(asdict(TASK)), encoding="utf-8")
    program = (
        "import sys, time; from job.export import autoround_process as it; sys.modules['auto_round'] = sys; "
        f"it.quantize = lambda _: time.sleep({seconds}); it.main()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "task")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        if code:
            process.stdin.close()
        assert process.wait(60) == code


def test_its_process_ends_when_the_job_has_to(stand_in: Callable[[str], None], tmp_path: Path) -> None:
    """A request to stop is answered at once, and no process is left behind."""
    stand_in("import time; time.sleep(300)")
    others = set(psutil.Process().children())

    def check_stop(*, progress: bool) -> None:
        if set(psutil.Process().children()) - others:
            raise Preempted("stop")

    began = time.monotonic()
    with pytest.raises(Preempted):
        run_process(TASK, tmp_path, check_stop)
    assert time.monotonic() - began < 60
    assert set(psutil.Process().children()) <= others


def test_its_error_is_told(stand_in: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What auto-round refuses is a sentence; a kill is another error, after which a restart tries again.

    Unless the kernel did it because main memory was full, as it would again.
    """
    stand_in("raise ValueError('this family is unknown')")
    with pytest.raises(CannotMake, match="this family is unknown"):
        run_process(TASK, tmp_path, lambda **_: None)
    stand_in(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    with pytest.raises(Killed):
        run_process(TASK, tmp_path, lambda **_: None)
    counts = iter([1, 2])  # of the container's processes that were killed for want of main memory
    monkeypatch.setattr(helper_process, "main_memory", lambda: MainMemory(1, 1, next(counts)))
    with pytest.raises(TrainingFailed, match=r"memory ran out while .* by auto-round.*JOB_EXPORT__FORMATS"):
        run_process(TASK, tmp_path, lambda **_: None)


@pytest.mark.parametrize(("width", "group"), [(128, 128), (64, 64), (96, 32), (40, None)])
def test_the_group_divides_every_layer(width: int, group: int | None) -> None:
    """The largest size that vLLM has and all layers' inputs are a multiple of; without one it is refused."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert autoround.group_size(empty) == group
    assert bool(autoround.check_four_bit(empty, "")) is (group is None)
