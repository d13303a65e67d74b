"""Long rows, layer by layer: the exact gradient, the same bits wherever activations are kept and after a restart."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch.nn import functional

from job.distributed.processes import ALONE
from job.model import placed_weights
from job.model.architecture import Architecture
from job.model.fused import long_attention
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.fused.long_attention import CpuKernel, FlashKernel, choose_kernel, heads_at_once
from job.model.lora import add_adapter, trainable
from job.model.packed_layout import Segment, build_layout
from job.model.placed_weights import taking_part
from job.records import Example, ExecutionPlan
from job.stages.train import software_of
from job.training import long_rows, micro_batch, step
from job.training.activation_store import ActivationStore
from job.training.lm_head_loss import padded_loss
from job.training.long_rows import LongRows, why_not_here
from job.training.memory_model import attention_copies
from job.training.packing import packed_inputs
from tests.helpers import LINEAR, deepened, fill_adapter, load_plain, make_examples, make_model
from tests.unit.model.test_placed_weights import team
from tests.unit.training import recipes
from tests.unit.training.test_step import make_step
from tests.unit.training.training_runs import adapter_hash, run

CPU = torch.device("cpu")
LONG = 40
"""Tokens above which a row is long in these tests."""
PLAN = replace(recipes.PLAN, forward="fused all, torch", tile_tokens=16)
EXAMPLES = make_examples(8, longest=90, prompt=0.3)


@pytest.fixture(autouse=True)
def _short_rows_are_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (long_rows, micro_batch, step):
        monkeypatch.setattr(module, "LONG_ROW", LONG)
    return


def fused(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny base with a filled adapter in NF4, by the fused layers."""
    model = fill_adapter(make_model(folder, quantization="nf4", dtype=dtype))
    assert fuse_layers(model, keep_dequantized=False, kernels=TORCH) == "all"
    return model.train()


def rows_of(model: Any) -> LongRows:
    """With the loss of training."""
    head = model.get_base_model().get_output_embeddings()
    return LongRows(model, lambda hidden, labels: padded_loss(hidden, head, labels))


def computed(model: Any, examples: list[Example], plan: ExecutionPlan) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and the gradients of a model, which are zero before."""
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    loss = rows_of(model).gradient(examples, torch.tensor(0.01), plan)
    return loss, [p.grad for p in trainable(model).values() if p.grad is not None]


@pytest.mark.parametrize("examples", [EXAMPLES[-1:], EXAMPLES[:3]], ids=["one row", "three rows"])
def test_the_gradient_is_that_of_the_whole(base_folder: Path, examples: list[Example]) -> None:
    """Loss and every gradient are those of one pass through autograd, in fp32, but for rounding."""
    model = fused(base_folder)
    inputs = packed_inputs(examples, CPU)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[0, :-1]
    whole = functional.cross_entropy(logits, labels[0, 1:], reduction="sum") * 0.01
    expected = torch.autograd.grad(whole, list(trainable(model).values()))
    loss, gradients = computed(model, examples, PLAN)
    torch.testing.assert_close(loss, whole.detach())
    for one, other in zip(gradients, expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-5 * other.norm()
    torch.testing.assert_close(rows_of(model).summed_loss(examples, PLAN) * 0.01, whole.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_activations_wait_changes_no_bit(base_folder: Path, dtype: torch.dtype) -> None:
    """Offloaded or not, attention kept or computed again: four ways, one result."""
    model = fused(base_folder, dtype)
    found = [
        computed(model, EXAMPLES[-1:], replace(PLAN, offloaded=offloaded, kept_attention=kept))
        for offloaded in (False, True)
        for kept in (False, True)
    ]
    assert all(torch.equal(found[0][0], loss) for loss, _ in found)
    assert all(torch.equal(a, b) for _, other in found for a, b in zip(found[0][1], other, strict=True))


def test_no_autograd_graph_outlives_the_row(base_folder: Path) -> None:
    """Wherever activations wait: a CUDA graph that is recorded next could not use the same nodes."""
    model = fused(base_folder)

    def nodes() -> list[Any]:
        return [p.expand_as(p).grad_fn.next_functions[0][0] for p in trainable(model).values()]

    def are_kept() -> bool:
        for node in nodes():
            node.metadata["made"] = "before"
        del node
        return any(node.metadata for node in nodes())

    graph = next(iter(trainable(model).values())) * 2
    assert are_kept()
    del graph
    gc.disable()  # nor may it wait to be collected
    try:
        for offloaded in (False, True):
            for kept in (False, True):
                computed(model, EXAMPLES[-1:], replace(PLAN, offloaded=offloaded, kept_attention=kept))
                assert not are_kept()
    finally:
        gc.enable()


@pytest.mark.parametrize("place", ["host", "sharded"])
def test_in_fp8_with_weights_that_come_layer_by_layer(base_folder: Path, tmp_path: Path, place: str) -> None:
    """The bits are those of weights that are kept in FP8 on the device."""
    folder, found = deepened(base_folder, tmp_path / "base", 3), []
    for where in ("gpu", place):
        base = load_plain(folder, quantization="nf4", dtype=torch.bfloat16, placement=where, group=ALONE)
        how: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": LINEAR, "seed": 1}
        model = fill_adapter(add_adapter(base, **how)).train()
        assert fuse_layers(model, keep_dequantized=where == "gpu", kernels=TORCH, fp8=True) == "all"
        with taking_part(model):
            found.append(computed(model, EXAMPLES[-1:], replace(PLAN, offloaded=where != "gpu")))
    (loss, gradients), (other_loss, others) = found
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    assert all(gradient.norm() > 0 for gradient in gradients)


def test_no_layer_is_fetched_in_vain(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass finds the last two layers where the forward pass had them; a validation begins again."""
    fetched: list[int] = []
    fetch = placed_weights._Host.fetch
    monkeypatch.setattr(placed_weights._Host, "fetch", lambda *x: fetched.append(x[1]) or fetch(*x))
    base = load_plain(deepened(base_folder, tmp_path / "base", 4), quantization="nf4", placement="host")
    model = fill_adapter(add_adapter(base, rank=8, alpha=16, dropout=0.0, target_modules=LINEAR, seed=1)).train()
    assert fuse_layers(model, keep_dequantized=False, kernels=TORCH) == "all"
    fetched.clear()
    computed(model, EXAMPLES[-1:], PLAN)
    assert fetched == [0, 1, 2, 3, 1, 0]
    rows_of(model).summed_loss(EXAMPLES[-1:], PLAN)
    assert fetched == [0, 1, 2, 3, 1, 0, 2, 3, 0]


def test_one_of_two_processes_has_a_long_row(base_folder: Path, tmp_path: Path) -> None:
    """Of sharded weights, the other one with a short row gives its share until both are done."""
    folder, row, short = deepened(base_folder, tmp_path / "base", 3), EXAMPLES[-1:], EXAMPLES[:1]

    def work(model: Any, rank: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        assert fuse_layers(model, keep_dequantized=False, kernels=TORCH) == "all"
        return computed(model.train(), short if rank else row, PLAN)

    expected = []
    for rank in (0, 1):
        with team(folder, 1) as alone:
            expected += alone(lambda model, _, rank=rank: work(model, rank))  # type: ignore[misc]
    with team(folder, 2) as together:
        found = together(work)
    for (loss, gradients), (own_loss, own) in zip(found, expected, strict=True):
        assert torch.equal(loss, own_loss)
        assert all(torch.equal(one, other) for one, other in zip(gradients, own, strict=True))


def test_loss_scaling_is_in_the_gradient_and_not_in_the_loss(base_folder: Path) -> None:
    """As fp16 needs it, in a step with long rows; in fp32 no bit is lost."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (plain, plain_gradient), (loss, gradient) = (
        (float(step(0)), parameters.gradient.clone())
        for step, parameters in (
            make_step(fused(base_folder), 64, examples=EXAMPLES * 2, plan=PLAN, scaler=one) for one in (None, scaler)
        )
    )
    assert loss == plain
    assert torch.equal(gradient, 1024 * plain_gradient)


def test_a_stop_is_seen_before_each_layer_of_a_long_row(base_folder: Path) -> None:
    """The step goes on while its rest fits into the time left, and is abandoned as soon as it does not."""
    model, row, asked = fused(base_folder), [max(EXAMPLES, key=lambda one: len(one.input_ids))], list[float]()

    def fits(share: float) -> bool:
        asked.append(share)
        return len(asked) < last

    for last in (100, 3):
        subject, _ = make_step(model, 64, examples=row, plan=PLAN, stop=lambda: True, fits=fits)
        asked.clear()
        with nullcontext() if last == 100 else pytest.raises(step.StepAbandoned):
            subject(0)
        assert len(asked) == min(last, 1 + 2 * 2)  # before the micro-batch, and each of two layers, forward and back


def test_kept_attention_is_not_computed_again(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs once a layer where its output is kept, else twice."""
    calls: list[int] = []
    kernel = CpuKernel.forward
    monkeypatch.setattr(CpuKernel, "forward", lambda *x: calls.append(1) or kernel(*x))
    model = fused(base_folder)
    counts = []
    for kept in (True, False):
        calls.clear()
        computed(model, EXAMPLES[-1:], replace(PLAN, kept_attention=kept))
        counts.append(len(calls))
    assert counts == [2, 4]  # the model has two layers


def test_a_killed_run_ends_with_the_same_bits(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Stopped after a step and resumed with other places for activations, and repeated: one adapter."""
    recipe = replace(recipes.RECIPE, total_steps=3, global_batch_size=4, micro_batch_tokens=64, save_every_steps=1)
    hashes = []
    for name, stop in (("whole", None), ("killed", 1), ("again", None)):
        model, resume, plan = fused(base_folder), None, PLAN
        if stop is not None:
            _, saved = run(model, tokenizer, EXAMPLES, recipe, tmp_path / name, plan=plan, stop_after=stop)
            model, resume = fused(base_folder), saved[-1]
            plan = replace(PLAN, offloaded=True, kept_attention=True, kept_activations=False)
        made, _ = run(model, tokenizer, EXAMPLES, recipe, tmp_path / name, plan=plan, resume=resume)
        assert len(made.history) == 3
        hashes.append(adapter_hash(model))
    assert len(set(hashes)) == 1
    assert hashes[0] != adapter_hash(fused(base_folder))


def test_a_full_gpu_moves_activations_first(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is repeated with activations in host memory, to the same bits; where that is forbidden, with less."""
    recipe = replace(recipes.RECIPE, global_batch_size=4, micro_batch_tokens=64)
    calls: list[ExecutionPlan] = []
    gradient = LongRows.gradient

    def fails_once(self: LongRows, examples: Any, weight: Any, plan: ExecutionPlan, team: Any) -> torch.Tensor:
        calls.append(plan)
        found = gradient(self, examples, weight, plan, team)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(LongRows, "gradient", fails_once)
    results = []
    for may_offload in (True, False, None):
        calls[:] = [PLAN] * 2 if may_offload is None else []  # the last one does not fail
        model, plan = fused(base_folder), replace(PLAN, kept_attention=True, may_offload=may_offload is not False)
        made, _ = run(model, tokenizer, EXAMPLES, recipe, tmp_path, plan=plan)
        assert len(calls) > 2
        results.append((made.plan, adapter_hash(model)))
    assert [(plan.offloaded, plan.kept_activations) for plan, _ in results] == [
        (True, True),
        (False, False),
        (False, True),
    ]
    assert len({found for _, found in results}) == 1


def test_a_row_for_which_there_is_no_time_is_abandoned(base_folder: Path) -> None:
    """Between two of its layers, forward or backward: at each it is asked whether to go on."""
    model, asked = fused(base_folder), list[int]()
    rows, weight = rows_of(model), torch.tensor(0.01)
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)

    def check() -> None:
        asked.append(1)
        if len(asked) in last:
            raise step.StepAbandoned

    rows.check = check
    for last in ((2,), (3,), ()):
        asked.clear()
        with nullcontext() if not last else pytest.raises(step.StepAbandoned):
            rows.gradient(EXAMPLES[-1:], weight, PLAN)
        assert not any("forward" in vars(layer) for layer in model.get_base_model().model.layers)
    assert len(asked) == 4  # two layers, forward and backward


def test_the_layers_are_as_before(base_folder: Path) -> None:
    """After an error too: a layer has its own forward, and is recomputed if it was."""
    model = fused(base_folder)
    layers = model.get_base_model().model.layers
    layers[1].gradient_checkpointing = True
    layers[1].mlp.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        computed(model, EXAMPLES[-1:], PLAN)
    assert not any("forward" in vars(layer) for layer in layers)
    assert [layer.gradient_checkpointing for layer in layers] == [False, True]


def test_a_model_that_trains_its_embedding_is_left_to_autograd(base_folder: Path) -> None:
    """The gradient ends at the first layer's adapter here."""
    model = fused(base_folder)
    assert why_not_here(model) is None
    model.get_base_model().get_input_embeddings().weight.requires_grad_()
    assert "outside" in (why_not_here(model) or "")


def test_a_store_gives_back_what_it_got() -> None:
    """Last in, first out, of several dtypes, with buffers that are used again by shorter and longer rows."""
    host: dict[int, torch.Tensor] = {}
    for tokens in (5, 3, 7):
        groups = [(torch.randn(tokens, 4).bfloat16(), torch.randn(2, tokens)) for _ in range(3)]
        with ActivationStore(CPU, host) as store:
            for group in groups:
                store.put([x.clone() for x in group])
            store.settle()
            for group in reversed(groups):
                taken = store.take()
                assert all(torch.equal(a, b) for a, b in zip(taken, group, strict=True))
    assert [len(host[place]) for place in range(3)] == [7 * (4 * 2 + 2 * 4)] * 3


def test_the_flash_kernel_gets_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups, each with the heads of its keys and values, and with all its arguments in their places.

    Torch's kernel for GPUs is replaced by its kernel for CPUs.
    """
    layout = build_layout([Segment(0, 20), Segment(20, 33)], CPU)
    calls: list[int] = []

    def forward(q: Any, k: Any, v: Any, *lengths: Any, return_debug_mask: bool, **how: Any) -> Any:
        assert not return_debug_mask
        return CpuKernel(layout, how["scale"], window(how, lengths)).forward(q, k, v)

    def window(how: dict[str, Any], lengths: Any) -> int | None:
        queries, keys, *longest, dropout, causal = lengths
        assert (longest, dropout, how["window_size_right"]) == ([20, 20], 0.0, 0)
        assert queries is keys
        assert queries[:3].tolist() == [0, 20, 33]
        assert causal == (how["window_size_left"] < 0)
        return None if causal else how["window_size_left"] + 1

    def backward(gradient: Any, *saved: Any, **how: Any) -> Any:
        saved, lengths = saved[:5], saved[5:-2]
        calls.append(gradient.shape[1])
        return CpuKernel(layout, how["scale"], window(how, lengths)).backward(gradient, *saved)

    monkeypatch.setattr("job.model.fused.long_attention.processors", lambda _: 8)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    tensors = [torch.randn(33, heads, 16) for heads in (16, 4, 4)]
    gradient = torch.randn(33, 16, 16)
    for seen in (None, 5):
        found, expected = [], []
        for kind, results in ((FlashKernel, found), (CpuKernel, expected)):
            kernel = kind(layout, 0.3, seen)
            output = kernel.forward(*tensors)
            results += [*output, *kernel.backward(gradient, *tensors, *output)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert calls == [8, 8] * 2


@pytest.mark.parametrize(
    ("heads", "shared_by", "segments", "processors", "expected"),
    [(32, 4, 1, 132, (4, 0)), (32, 4, 1, 108, (4, 0)), (64, 8, 1, 132, (64, 1)), (8, 8, 1, 132, (8, 1))],
)
def test_attention_uses_the_processors(
    heads: int, shared_by: int, segments: int, processors: int, expected: tuple[int, int]
) -> None:
    """Blocks of the backward kernel fill whole rounds: 33 times four heads are the 132 processors of an H100."""
    assert heads_at_once(heads, shared_by, segments, processors) == expected


class _Off(CpuKernel):
    def backward(self, gradient: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = super().backward(gradient, *saved)
        return query, key, 1.1 * value


class _Unsteady(CpuKernel):
    def forward(self, *tensors: torch.Tensor) -> Any:
        out, sums = super().forward(*tensors)
        return out + 1e-4 * torch.rand(()), sums


class _OffAtTheEnd(CpuKernel):
    """Wrong in the last block of keys alone, whose gradients are small beside the others."""

    def backward(self, gradient: torch.Tensor, *saved: torch.Tensor) -> Any:
        query, key, value = super().backward(gradient, *saved)
        value[-12:] *= 2
        return query, key, value


class _OffForFew(CpuKernel):
    """Wrong where a head of keys is shared by one head of queries."""

    def forward(self, *tensors: torch.Tensor) -> Any:
        out, sums = super().forward(*tensors)
        return out * (1.1 if tensors[0].shape == tensors[1].shape else 1), sums


class _Broken(CpuKernel):
    def forward(self, *tensors: torch.Tensor) -> Any:
        raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (CpuKernel, None),
        (_Off, "its results differ from flash's by 10.0%"),
        (_Unsteady, "its results differ from call to call"),
        (_Broken, "RuntimeError: no kernel image is available"),
        (_OffAtTheEnd, "its results differ from flash's by .*% in a block of 64 tokens"),
        (_OffForFew, "its results differ from flash's by 10.0%"),
    ],
)
def test_a_kernel_is_tried_out(monkeypatch: pytest.MonkeyPatch, kernel: Any, why: str | None) -> None:
    """Where it raises, is wrong or does not repeat, flash takes its place, and the log says why."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(long_attention, "FlashKernel", CpuKernel)
    monkeypatch.setattr(long_attention, "TritonKernel", kernel)
    sizes = Architecture(hidden=128, intermediate=256, layers=1, heads=2, kv_heads=1, head_size=128, vocabulary=8)
    found_why = long_attention._why_not_triton(sizes, torch.float32, CPU, windowed=True, processes=2)
    assert re.fullmatch(str(why), str(found_why))
    monkeypatch.setattr(long_attention, "_why_not_triton", lambda *_, **__: why)
    choose_kernel.cache_clear()
    with capture_logs() as lines:
        found = [choose_kernel(sizes, torch.bfloat16, torch.device("cuda"), windowed=False) for _ in range(2)]
    assert found == [("flash" if why else "cudnn and triton")] * 2
    assert [line["why"] for line in lines] == ([why] if why else [])
    choose_kernel.cache_clear()


def test_a_checkpoint_names_the_kernel() -> None:
    """Beside the versions, so that a run that is resumed with another one says so; without long rows it does not."""
    plain, named = software_of(PLAN), software_of(replace(PLAN, attention="flash"))
    assert named == plain | {"attention of long rows": "flash"}


@pytest.mark.parametrize(("capability", "size"), [((8, 0), 128), ((10, 0), 128), ((9, 0), 64)])
def test_only_what_was_measured_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], size: int
) -> None:
    """On other GPUs and with other heads it is flash; and the memory of flash is planned for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    sizes = Architecture(hidden=4096, intermediate=8192, layers=1, heads=32, kv_heads=8, head_size=size, vocabulary=8)
    choose_kernel.cache_clear()
    assert choose_kernel(sizes, torch.bfloat16, torch.device("cuda"), windowed=False) == "flash"
    assert attention_copies(sizes, capability) == 132
    assert attention_copies(replace(sizes, head_size=128), (9, 0)) == 1
    choose_kernel.cache_clear()
