"""What a checkpoint holds: every bit of the training state, and nothing executable."""

from __future__ import annotations

import ast
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState, get_linear_schedule_with_warmup

from job.checkpoints import optimizer_state, trainer_state
from job.checkpoints.trainer_state import (
    FILES,
    ComputationOptions,
    TrainerFiles,
    read_computation_options,
    read_metrics,
    read_trainer_state,
    read_validations,
    validate_trainer_state,
    write_metrics,
    write_trainer_state,
    write_validations,
)
from job.errors import TrainingFailed
from job.records import StepMetrics, ValidationMetrics

JOB = Path(trainer_state.__file__).parents[1]
OPTIMIZERS = ("adamw_8bit", "adamw_32bit", "adamw_torch")


def make(optimizer: str, seed: int = 0, scaler: Any = None) -> TrainerFiles:
    """A linear model of three layers, of which the last is frozen, its optimizer and its scheduler.

    The weights are large enough for 8 bits (4,096 numbers) and share their quantization maps, the biases are not.
    """
    from bitsandbytes.optim import AdamW, AdamW8bit

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 128), torch.nn.Linear(128, 4))
    model[2].requires_grad_(requires_grad=False)
    kind = {"adamw_8bit": AdamW8bit, "adamw_32bit": AdamW, "adamw_torch": torch.optim.AdamW}[optimizer]
    made = kind(model[:2].parameters(), lr=1e-2)
    return TrainerFiles(model, made, get_linear_schedule_with_warmup(made, 2, 20), scaler, TrainerState())


def train(files: TrainerFiles, steps: int) -> list[StepMetrics]:
    """Trains on data that depends on the step alone."""
    history = []
    for _ in range(steps):
        files.state.global_step += 1
        data = torch.randn(8, 128, generator=torch.Generator().manual_seed(files.state.global_step))
        loss = files.model(data).square().mean()
        loss.backward()
        files.optimizer.step()
        files.scheduler.step()
        files.optimizer.zero_grad()
        history.append(metrics(files.state.global_step, loss.item()))
    return history


def metrics(step: int, loss: float = 0.1) -> StepMetrics:
    """A step's metrics."""
    measured = {"seconds": 0.1, "memory_bytes": None, "micro_batch_tokens": 512}
    return StepMetrics(step, step / 7, loss, 1e-2, 0.1 + 0.2, 8, 100, measured)


def bits(value: Any) -> Any:
    """A checkpoint with every tensor replaced by its type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def everything(files: TrainerFiles) -> Any:
    """All bits of model, optimizer and scheduler."""
    scheduler = {key: value for key, value in files.scheduler.state_dict().items() if key != "lr_lambdas"}
    return bits([files.model.state_dict(), files.optimizer.state_dict(), scheduler])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The checkpoint of step 3 with 8-bit optimizer states."""
    files = make("adamw_8bit")
    history = train(files, 3)
    write_trainer_state(tmp_path / "checkpoint", files, history)
    return tmp_path / "checkpoint"


# There and back.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_bit_comes_back(tmp_path: Path, optimizer: str) -> None:
    """Weights, optimizer and scheduler are restored bit by bit into a model that was another one."""
    files = make(optimizer)
    history = train(files, 3)
    write_trainer_state(tmp_path / "checkpoint", files, history)
    validate_trainer_state(tmp_path / "checkpoint", 3)
    other = make(optimizer)
    train(other, 1)
    with torch.no_grad():
        other.model[0].weight.fill_(7)
    assert read_trainer_state(tmp_path / "checkpoint", other) == history
    assert everything(other) == everything(files)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, optimizer: str) -> None:
    """Stopped and resumed at any step, training ends with the same bits as without a stop."""
    whole = make(optimizer)
    whole_history = train(whole, 8)
    for stop in (1, 4, 7):
        folder = tmp_path / str(stop)
        first = make(optimizer)
        write_trainer_state(folder, first, train(first, stop))
        second = make(optimizer)
        history = read_trainer_state(folder, second)
        second.state.global_step = stop
        assert history + train(second, 8 - stop) == whole_history
        assert everything(second) == everything(whole)


def test_eight_bits_stay_eight_bits(written: Path) -> None:
    """A large parameter's state is stored quantized, with its maps and scales; a small one's in full."""
    tensors = load_file(written / trainer_state.OPTIMIZER)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    leaf = {name.rpartition("/")[2]: kind for name, kind in kinds.items() if name.startswith("0/")}
    assert leaf == {
        "state1": (torch.uint8, (64, 128)),
        "state2": (torch.uint8, (64, 128)),
        "absmax1": (torch.float32, (32,)),
        "absmax2": (torch.float32, (32,)),
        "qmap1": (torch.float32, (256,)),
        "qmap2": (torch.float32, (256,)),
    }
    assert {kind[0] for name, kind in kinds.items() if name.startswith("1/")} == {torch.float32}


def test_frozen_weights_are_not_stored(written: Path) -> None:
    """A checkpoint holds what is trained, not the base."""
    assert load_file(written / trainer_state.ADAPTER).keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("number", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, math.inf, 1 / 3, 1e16 + 2])
def test_numbers_survive_as_text(tmp_path: Path, number: float) -> None:
    """Every float of the metrics comes back as the same float, infinity (an overflow in fp16) included."""
    history = [replace(metrics(1), loss=number, grad_norm=number)]
    write_metrics(tmp_path / "metrics.jsonl", history)
    back = read_metrics(tmp_path / "metrics.jsonl")
    assert back == history
    assert math.copysign(1, back[0].loss) == math.copysign(1, number)
    assert trainer_state._parse_as(list[StepMetrics], tmp_path / "metrics.jsonl") == history


def test_loss_scale_is_restored(tmp_path: Path) -> None:
    """In fp16 the scale of the loss goes on where it was."""

    def scaler(scale: float) -> Any:
        made = SimpleNamespace(scale=scale)
        made.state_dict = lambda: {"scale": made.scale}
        made.load_state_dict = made.__dict__.update
        return made

    files = make("adamw_torch", scaler=scaler(2.0**13))
    write_trainer_state(tmp_path / "checkpoint", files, train(files, 1))
    validate_trainer_state(tmp_path / "checkpoint", 1)
    other = make("adamw_torch", scaler=scaler(2.0**16))
    read_trainer_state(tmp_path / "checkpoint", other)
    assert other.scaler.scale == 2.0**13


# What is refused.


@pytest.mark.parametrize("change", ["shape", "name", "missing", "more"])
def test_state_of_another_model(written: Path, change: str) -> None:
    """A checkpoint that does not fit the model is refused before anything of the model has changed."""
    tensors = load_file(written / trainer_state.ADAPTER)
    weight = tensors.pop("0.weight")
    if change == "shape":
        tensors["0.weight"] = weight[:1, :1].contiguous()  # would be stretched over the whole weight
    elif change == "name":
        tensors["9.weight"] = weight
    elif change == "more":
        tensors |= {"0.weight": weight, "9.weight": weight.clone()}
    save_file(tensors, written / trainer_state.ADAPTER)
    files = make("adamw_8bit")
    before = everything(files)
    with pytest.raises(ValueError, match="not of this model"):
        read_trainer_state(written, files)
    assert everything(files) == before


STATE1 = "0/__bnb_optimizer_quant_state__/state1"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (STATE1, torch.zeros(1, dtype=torch.uint8)),
        (STATE1, torch.zeros(64, 129, dtype=torch.uint8)),
        (STATE1, torch.zeros(64, 128, dtype=torch.int64)),
        (STATE1.replace("state1", "absmax1"), torch.zeros(31)),
        (STATE1.replace("state1", "qmap1"), torch.zeros(255)),
        (STATE1.replace("state1", "qmap1"), torch.zeros(256, dtype=torch.float16)),
        (STATE1.replace("state1", "else"), torch.zeros(1)),
        ("4/state1", torch.zeros(64)),
    ],
)
def test_optimizer_state_that_does_not_fit(written: Path, name: str, tensor: torch.Tensor) -> None:
    """A tensor of a wrong size or type never reaches an optimizer's kernel, which would read beyond its end."""
    save_file(load_file(written / trainer_state.OPTIMIZER) | {name: tensor}, written / trainer_state.OPTIMIZER)
    files = make("adamw_8bit")
    before = everything(files)
    with pytest.raises(ValueError, match="optimizer's"):
        read_trainer_state(written, files)
    assert everything(files) == before


@pytest.mark.parametrize("name", ["absmax1", "qmap2", "state1"])
def test_optimizer_state_of_another_optimizer(tmp_path: Path, name: str) -> None:
    """A tensor that only another optimizer has, or of its dtype, is refused where the run's own is known."""
    files = make("adamw_8bit")
    write_trainer_state(tmp_path / "checkpoint", files, train(files, 1))
    kept = load_file(tmp_path / "checkpoint" / trainer_state.OPTIMIZER)
    path = tmp_path / "checkpoint" / trainer_state.OPTIMIZER
    save_file({place: tensor for place, tensor in kept.items() if place.endswith(name)}, path)
    before = everything(files)
    with pytest.raises(ValueError, match=f"{name} belongs to no known optimizer"):
        read_trainer_state(tmp_path / "checkpoint", replace(files, optimizer_name="adamw_torch"))
    assert everything(files) == before


@pytest.mark.parametrize("place", ["4/state1", "9/qmap1", "0/unknown"])
def test_optimizer_state_without_a_parameter(place: str) -> None:
    """The number of a tensor is that of a parameter that there is, and its name that of a known optimizer."""
    plain = {"param_groups": [{"params": [0, 1, 2, 3]}]}
    with pytest.raises(ValueError, match=f"{place} belongs to no known optimizer"):
        optimizer_state.check_fit({place: torch.zeros(256)}, plain, [(64,)] * 4)


@pytest.mark.parametrize("place", ["0", "x/state1", "1/state1", "0/state2", "0/state1/deeper", "0/lr"])
def test_places_of_the_optimizers_tensors(place: str) -> None:
    """Each is in the state of a parameter, in a place that was left for it; joined, nothing else is replaced."""
    state = {"0": {"state1": None, "lr": 0.1}, "x": {"state1": None}}
    optimizer_state.check_places(["0/state1"], {"state": state, "tensors": ["0/state1"]})
    with pytest.raises(ValueError, match=f"tensor {place} is not part of its state"):
        optimizer_state.check_places([place], {"state": state, "tensors": [place]})


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 2, 3]])
def test_optimizer_state_of_other_parameters(written: Path, order: list[int]) -> None:
    """A checkpoint whose parameters are others, or in another order, is refused."""
    edit(
        written / trainer_state.PROGRESS, lambda progress: progress["optimizer"]["param_groups"][0].update(params=order)
    )
    with pytest.raises(ValueError, match="4 parameters"):
        read_trainer_state(written, make("adamw_8bit"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_validation_passes_what_was_written(written: Path) -> None:
    """A checkpoint is valid as it was written."""
    validate_trainer_state(written, 3)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("garbage", ["empty", "pickle", "zip", "zeros", "text", "deep", "list", "huge header"])
def test_every_file_is_checked(written: Path, name: str, garbage: str) -> None:
    """Garbage in the place of any file is a ValueError, and a pickle is not run."""
    torch.save({"x": Payload(written / "owned")}, written.parent / "zip")
    data = {
        "empty": b"",
        "pickle": pickle.dumps(Payload(written / "owned")),
        "zip": (written.parent / "zip").read_bytes(),
        "zeros": bytes(1000),
        "text": b"\xff\xfe\x00 no JSON",
        "deep": b"[" * 100_000,
        "list": b"[1]\n",
        "huge header": (1 << 60).to_bytes(8, "little") + b"{}",
    }[garbage]
    (written / name).write_bytes(data)
    with pytest.raises(ValueError, match=r".") as caught:
        validate_trainer_state(written, 3)
    assert len(str(caught.value)) < 500
    assert not (written / "owned").exists()


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_is_needed(written: Path, name: str) -> None:
    """A checkpoint without one of its files is invalid."""
    (written / name).unlink()
    with pytest.raises(ValueError, match=name):
        validate_trainer_state(written, 3)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "adapter_model.bin"]
)
def test_no_other_file_is_let_in(written: Path, name: str) -> None:
    """A file that Trainer would unpickle if it found it makes a checkpoint invalid."""
    (written / name).write_bytes(pickle.dumps(Payload(written / "owned")))
    with pytest.raises(ValueError, match=name):
        validate_trainer_state(written, 3)


@pytest.mark.parametrize("name", [trainer_state.ADAPTER, trainer_state.OPTIMIZER])
@pytest.mark.parametrize("size", [-1, 1])
def test_tensors_cover_their_file(written: Path, name: str, size: int) -> None:
    """A safetensors file with a byte too few or too many is invalid."""
    data = (written / name).read_bytes()
    (written / name).write_bytes(data[:size] if size < 0 else data + b"x")
    with pytest.raises(ValueError, match=name):
        validate_trainer_state(written, 3)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (trainer_state.PROGRESS, lambda p: p.update(step=4)),
        (trainer_state.PROGRESS, lambda p: p.update(step="three")),
        (trainer_state.PROGRESS, lambda p: p.pop("scheduler")),
        (trainer_state.PROGRESS, lambda p: p["optimizer"]["state"]["0"].clear()),
        (trainer_state.PROGRESS, lambda p: p["optimizer"]["state"].update({"0": 1})),
        (trainer_state.PROGRESS, lambda p: p["optimizer"]["tensors"].pop()),
        (trainer_state.PROGRESS, lambda p: p["optimizer"]["tensors"].append("0/more")),
        (trainer_state.PROGRESS, lambda p: p["optimizer"].update(param_groups=3)),
        (trainer_state.TRAINER, lambda t: t.update(global_step=4)),
        (trainer_state.TRAINER, lambda t: t.pop("global_step")),
        (trainer_state.TRAINER, lambda t: t.update(unknown=4)),
    ],
)
def test_files_must_agree(written: Path, name: str, change: Callable[[Any], Any]) -> None:
    """JSON of the wrong shape, of another step, or without a place for each tensor is invalid."""
    edit(written / name, change)
    with pytest.raises(ValueError, match=r"."):
        validate_trainer_state(written, 3)


COMPUTED = {"forward": "peft", "tile_tokens": 8192, "processes": 2, "padded": [[512, 8], [640, 16]], "divided_above": 9}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"padded": None, "tile_tokens": None, "divided_above": None}, None),
        ({"padded": []}, None),
        ({"padded": [[10**12, 8]]}, "shapes"),
        ({"padded": [[512, 10**12]]}, "shapes"),
        ({"padded": [[512, 8], [-640, 16]]}, "shapes"),
        ({"padded": [[512, 0]]}, "shapes"),
        ({"padded": [[512, 8]] * 2}, "shapes"),
        ({"padded": [[640, 16], [512, 8]]}, "shapes"),
        ({"padded": [[0, 1]]}, "shapes"),
        ({"padded": [[512, 576]]}, None),
        ({"padded": [[512, 577]]}, "shapes"),
        ({"padded": [[2**24, 8]], "tile_tokens": 2**24, "divided_above": 1}, None),
        ({"padded": [[2**24 + 1, 8]]}, "shapes"),
        ({"tile_tokens": 2**24 + 1}, "tile_tokens"),
        ({"divided_above": 0}, "divided_above"),
        ({"processes": 1_000_001}, "processes"),
        ({"padded": [[512]]}, "cannot be read"),
        ({"padded": [512, 8]}, "cannot be read"),
        ({"padded": {"512": 8}}, "cannot be read"),
        ({"padded": [["long", 8]]}, "cannot be read"),
        ({"padded": [[512.5, 8]]}, "cannot be read"),
        ({"divided_above": -1}, "divided_above"),
        ({"divided_above": [9]}, "cannot be read"),
        ({"divided_above": 10**30}, "divided_above"),
        ({"tile_tokens": 0}, "tile_tokens"),
        ({"processes": 0}, "processes"),
        ({"processes": None}, "cannot be read"),
        ({"forward": None}, "cannot be read"),
    ],
)
def test_what_decides_the_last_bits_is_checked(written: Path, change: dict[str, Any], fault: str | None) -> None:
    """A resumed run allocates and divides by these numbers: one that cannot be is damage, found without a model."""
    edit(written / trainer_state.PROGRESS, lambda progress: progress.update(computed=COMPUTED | change))
    if fault is None:
        validate_trainer_state(written, 3)
        return
    with pytest.raises(ValueError, match=fault) as caught:
        validate_trainer_state(written, 3)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("budget", [0, 0.5, -512, math.inf, math.nan, "absent"])
def test_the_budget_is_checked(written: Path, budget: Any) -> None:
    """The token budget of the last step, with which a resumed run goes on."""
    history = read_metrics(written / trainer_state.METRICS)
    measured = {"micro_batch_tokens": budget} if budget != "absent" else {}
    write_metrics(written / trainer_state.METRICS, [*history[:-1], replace(history[-1], measured=measured)])
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        validate_trainer_state(written, 3)


@pytest.mark.parametrize("steps", [[1, 2], [1, 2, 3, 4], [1, 1, 3], [2, 1, 3], []])
def test_metrics_are_those_of_every_step(written: Path, steps: list[int]) -> None:
    """Metrics that lack a step, or have one twice, do not belong to the checkpoint."""
    write_metrics(written / trainer_state.METRICS, [metrics(step) for step in steps])
    with pytest.raises(ValueError, match="metrics"):
        validate_trainer_state(written, 3)


def test_metrics_with_an_unknown_field(written: Path) -> None:
    """A line with a field of which nothing is known is invalid."""
    path = written / trainer_state.METRICS
    path.write_text(path.read_text().replace('"loss"', '"more": 1, "loss"', 1))
    with pytest.raises(ValueError, match="unknown"):
        validate_trainer_state(written, 3)


def validations(*steps: int, budget: Any = 512) -> list[ValidationMetrics]:
    """A validation after each of the steps."""
    return [ValidationMetrics(step, step / 7, 0.5, 2, 15, {"micro_batch_tokens": budget}) for step in steps]


def test_validations_come_back(written: Path) -> None:
    """All of them, and every bit of the best adapter; None where that is the checkpoint's own."""
    with pytest.raises(ValueError, match="has no validations"):
        read_validations(written)
    write_validations(written, validations(0, 2))
    validate_trainer_state(written, 3)
    assert read_validations(written) == (validations(0, 2), None)
    best = {name: tensor + 1 for name, tensor in load_file(written / trainer_state.ADAPTER).items()}
    write_validations(written, validations(0, 3), best)
    validate_trainer_state(written, 3)
    found, adapter = read_validations(written)
    assert (found, bits(adapter)) == (validations(0, 3), bits(best))


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (validations(), "do not rise"),
        (validations(2, 0), "do not rise"),
        (validations(0, 2, 2), "do not rise"),
        (validations(0, 4), "go beyond 3"),
        (validations(-1, 2), "do not rise"),
        (validations(0, 2, budget=0), "validation.jsonl has no micro_batch_tokens"),
    ],
)
def test_validations_are_checked(written: Path, made: list[ValidationMetrics], fault: str) -> None:
    """None, in another order, of steps that are still to come, or without a token budget to go on with."""
    write_validations(written, made)
    with pytest.raises(ValueError, match=fault):
        validate_trainer_state(written, 3)


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "missing", "cut"])
def test_the_best_adapter_fits_the_checkpoints_own(written: Path, change: str) -> None:
    """It would be published in its place, or loaded into the model after the last step."""
    best = load_file(written / trainer_state.ADAPTER)
    bias = best.pop("0.bias")
    other = {"shape": {"0.bias": bias[:1]}, "dtype": {"0.bias": bias.half()}, "name": {"2.bias": bias}}
    write_validations(written, validations(0, 2), best | other.get(change, {}))
    if change == "cut":
        write_validations(written, validations(0, 2), best | {"0.bias": bias})
        (written / trainer_state.BEST).write_bytes((written / trainer_state.BEST).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        validate_trainer_state(written, 3)


@pytest.mark.parametrize("data", [b"", b"no tensors"])
def test_the_state_of_adaloras_allocator_is_tensors(written: Path, data: bytes) -> None:
    """A file of that name, which only checkpoints of such adapters have, can be read."""
    save_file({"x": torch.zeros(1)}, written / trainer_state.ADALORA)
    validate_trainer_state(written, 3)
    (written / trainer_state.ADALORA).write_bytes(data)
    with pytest.raises(ValueError, match=r"adalora\.safetensors is not a safetensors file"):
        validate_trainer_state(written, 3)


@pytest.mark.parametrize("computed", [None, ComputationOptions("peft", 8192, 2, [(512, 8)], 9)])
def test_how_gradients_were_computed_comes_back(tmp_path: Path, computed: ComputationOptions | None) -> None:
    """A resumed run computes by it; without it an older version wrote the checkpoint."""
    files = make("adamw_torch")
    write_trainer_state(tmp_path / "step", files, train(files, 1), computed)
    assert read_computation_options(tmp_path / "step") == computed


def test_rewards_of_preferences_come_back(tmp_path: Path) -> None:
    """Steps on preferences keep their rewards, which the report shows; others have no such field in their line."""
    history = [metrics(1), replace(metrics(2), preference={"rewards/margins": 0.5})]
    write_metrics(tmp_path / "metrics.jsonl", history)
    assert read_metrics(tmp_path / "metrics.jsonl") == history
    assert ["preference" in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [False, True]


def test_a_checkpoint_without_a_loss_scale_keeps_the_trainers(tmp_path: Path) -> None:
    """One that was written in bf16 is restored in fp16: the scale is as it was made."""
    files = make("adamw_torch")
    write_trainer_state(tmp_path / "step", files, train(files, 1))
    loaded: list[Any] = []
    read_trainer_state(tmp_path / "step", make("adamw_torch", scaler=SimpleNamespace(load_state_dict=loaded.append)))
    assert loaded == []


def test_tensors_that_are_not_contiguous_are_stored(tmp_path: Path) -> None:
    """Weights and optimizer state of a transposed matrix come back as they are."""
    files = make("adamw_torch")
    with torch.no_grad():
        files.model[0].weight = torch.nn.Parameter(torch.randn(128, 64).t())
    optimizer = torch.optim.AdamW(files.model[:2].parameters(), lr=1e-2)
    files = replace(files, optimizer=optimizer, scheduler=get_linear_schedule_with_warmup(optimizer, 2, 20))
    history = train(files, 1)
    assert not files.model[0].weight.is_contiguous()
    write_trainer_state(tmp_path / "step", files, history)
    other = make("adamw_torch")
    read_trainer_state(tmp_path / "step", other)
    assert everything(other) == everything(files)


def test_step_is_that_of_the_marker(written: Path) -> None:
    """A checkpoint that is whole, but of another step than its marker says, is invalid."""
    with pytest.raises(ValueError, match="of step 3"):
        validate_trainer_state(written, 2)


# Nothing that could be run.

UNPICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNPICKLING_CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("pd", "read_pickle")}


def unpickling(source: str) -> list[str]:
    """What in a source text could run a file's content: imports of picklers, calls that pickle inside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLING_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.split(".")[0] in UNPICKLING_MODULES else []
            found += [f"{module}.{alias.name}" for alias in node.names if (module, alias.name) in UNPICKLING_CALLS]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.{node.attr}"] if (node.value.id, node.attr) in UNPICKLING_CALLS else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", sorted(JOB.rglob("*.py")), ids=lambda path: path.relative_to(JOB).as_posix())
def test_job_unpickles_nothing(path: Path) -> None:
    """No file of the job imports a pickler or calls what unpickles."""
    assert unpickling(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill as json",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import numpy\nnumpy.lib.format.read_array(file, allow_pickle=True)",
    ],
)
def test_the_search_finds_unpickling(source: str) -> None:
    """The search above finds what it looks for."""
    assert unpickling(source)


def test_a_state_holds_no_pickle(written: Path) -> None:
    """What is written is safetensors and JSON, and nothing else."""
    assert {path.name for path in written.iterdir()} == FILES
    for path in written.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
        if path.suffix == ".safetensors":
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        else:
            [json.loads(line) for line in (data.splitlines() if path.suffix == ".jsonl" else [data])]


def test_adalora_of_an_older_version_that_trained_its_constant_cannot_go_on(tmp_path: Path) -> None:
    """Its optimizer state is of more tensors, and its adapter is not the one that would be published."""
    files = make("adamw_torch")
    write_trainer_state(tmp_path / "step", files, train(files, 1))
    adapter = tmp_path / "step" / trainer_state.ADAPTER
    save_file(load_file(adapter) | {"layers.0.ranknum.default": torch.ones(1)}, adapter)
    with pytest.raises(TrainingFailed, match=r"an older version .* another JOB_RUN__ID"):
        read_trainer_state(tmp_path / "step", files)
