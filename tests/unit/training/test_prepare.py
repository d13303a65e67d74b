"""How a machine will train: what can be determined without a GPU, and the log if a slower path is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from job.common.resources import MainMemory
from job.distributed.processes import Alone
from job.distributed.ranks import Place
from job.errors import SettingsError
from job.model.adapter_options import AdapterOptions
from job.model.fused import kernels, long_attention
from job.model.fused.long_attention import FLASH, TRITON
from job.model.packed_attention import NAME
from job.records import PEFT, ExecutionPlan
from job.training import cpu_plan, gpu_capability, long_row_plan
from job.training import prepare as prepare_module
from job.training.config import CPU_MICRO_BATCH_TOKENS
from job.training.fp8_check import require_fp8
from job.training.gpu_capability import agree_on_kernels, fast_kernels, why_not_fused
from job.training.prepare import prepare, token_budget
from tests.helpers import make_model

SETTINGS: dict[str, Any] = {
    "global_batch_size": 2,
    "quantization": "nf4",
    "optimizer": "adamw_8bit",
    "budget": 100,
    "keep_base": True,
    "recompute": False,
    "gigabytes": 16,
}


def with_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """This machine has a GPU of that compute capability."""
    for module in (gpu_capability, prepare_module):
        monkeypatch.setattr(module, "compute_capability", lambda: capability)


def with_memory(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    """The GPU has so many bytes, and so many are free."""
    for module in (long_row_plan, prepare_module):
        monkeypatch.setattr(module, "gpu_memory", lambda _: (total, free))


def test_a_cpu_trains_by_pefts_own_layers(base_folder: Path) -> None:
    """Whatever is set for a GPU: they are untouched, and it is no warning."""
    model = make_model(base_folder)
    before = [type(module).forward for module in model.modules()]
    with capture_logs() as lines:
        made = prepare(model, [10, 20], **SETTINGS)
    assert (made.forward, made.kept_activations, made.droppable) == (PEFT, True, ())
    assert made.reason == "on a CPU PEFT's own layers are used"
    assert [(line["log_level"], line["event"]) for line in lines] == [("info", "execution plan")]
    assert [type(module).forward for module in model.modules()] == before
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("gigabytes", "kept"), [(0.001, False), (100, True)])
def test_a_cpu_keeps_activations_where_it_has_the_memory(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float, *, kept: bool
) -> None:
    """Left to itself it says what they take and what comes of it."""
    monkeypatch.setattr(cpu_plan, "available_bytes", lambda: int(gigabytes * 10**9))
    made = prepare(make_model(base_folder), [10, 20], **SETTINGS | {"recompute": "auto"})
    assert made.kept_activations is kept
    assert f"B: {'kept' if kept else 'recomputed in the backward pass'}" in made.reason


def on_a_gpu(
    dtype: torch.dtype = torch.bfloat16,
    model_type: str = "mistral",
    attention: str = NAME,
    sizes: dict[str, int] | None = None,
) -> Any:
    """As much of a model on a GPU as is looked at before its layers are fused."""
    config = SimpleNamespace(
        model_type=model_type,
        to_dict=lambda: {"model_type": model_type, **(sizes or {})},
        _attn_implementation=attention,
    )
    return SimpleNamespace(
        device=torch.device("cuda"),
        peft_config={"default": SimpleNamespace(r=16, target_modules={"q_proj"}, trainable_token_indices=None)},
        get_base_model=lambda: SimpleNamespace(dtype=dtype, config=config),
    )


@pytest.mark.parametrize(
    ("model", "capability", "reason"),
    [
        (
            on_a_gpu(torch.float32),
            (9, 0),
            "the compute dtype is float32; fused layers need bf16 or fp16 (JOB_MODEL__DTYPE)",
        ),
        (on_a_gpu(), (7, 5), "the GPU's compute capability is 7.5; fused layers need 8.0 in bf16"),
        (on_a_gpu(torch.float16), (6, 0), "the GPU's compute capability is 6.0; fused layers need 7.0 in fp16"),
        (on_a_gpu(model_type="strange"), (9, 0), "the sizes of a strange model are not known"),
        (on_a_gpu(attention="eager"), (9, 0), "examples are computed one at a time"),
    ],
    ids=["fp32", "bf16 on an old GPU", "an older GPU", "unknown sizes", "not packed"],
)
def test_a_gpu_that_trains_slowly_says_why(
    monkeypatch: pytest.MonkeyPatch, model: Any, capability: tuple[int, int], reason: str
) -> None:
    """What moves training off the fused layers is a warning with its reason, and in the manifest's record."""
    with_capability(monkeypatch, capability)
    with capture_logs() as lines:
        plan = prepare(model, [10, 20], **SETTINGS | {"recompute": "auto"})
    assert plan == ExecutionPlan(kept_base=False, kept_activations=False, recorded=False, reason=reason, forward=PEFT)
    (line,) = lines
    assert line["log_level"] == "warning"
    assert "less than half speed" in line["event"]
    assert (line["reason"], line["forward"]) == (reason, "peft")


def test_an_adapter_that_is_left_to_peft_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA and AdaLoRA take PEFT's layers on a GPU that could do better: a warning, with the setting's name."""
    with_capability(monkeypatch, (9, 0))
    slow = AdapterOptions(use_dora=True).not_fused
    with capture_logs() as lines:
        plan = prepare(on_a_gpu(), [10, 20], **SETTINGS | {"recompute": "auto"}, slow=slow)
    assert plan.forward == PEFT
    assert "JOB_LORA__USE_DORA" in plan.reason
    assert [line["log_level"] for line in lines] == ["warning"]


def test_noise_is_not_recorded(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph would add the same noise in every step: the fused layers compute, launched one by one."""
    monkeypatch.setattr(prepare_module, "why_not_fused", lambda _: None)
    with_memory(monkeypatch, 80 << 30, 70 << 30)
    with_capability(monkeypatch, (9, 0))
    made = prepare(make_model(base_folder), [10, 20], **SETTINGS, random=True)
    assert made.forward.startswith("fused all, ")
    assert not made.recorded
    assert "JOB_TRAIN__NEFTUNE_NOISE_ALPHA" in made.reason


def test_training_in_fp8_is_in_the_plan(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is the end of `forward`, which scores do not have; what is kept may be given up as without it."""
    monkeypatch.setattr(prepare_module, "why_not_fused", lambda _: None)
    with_memory(monkeypatch, 80 << 30, 70 << 30)
    with_capability(monkeypatch, (9, 0))
    made = prepare(
        make_model(base_folder, dtype=torch.bfloat16), [10, 20], **SETTINGS | {"quantization": "none"}, compute="fp8"
    )
    plain = prepare(make_model(base_folder, dtype=torch.bfloat16), [10, 20], **SETTINGS | {"quantization": "none"})
    assert made.forward == f"{plain.forward}, fp8"
    assert (made.fp8, plain.fp8, made.padded) == (True, False, True)
    assert made.scoring_forward == plain.scoring_forward == plain.forward
    # Of an unquantized base nothing is dequantized, but it has copies in FP8.
    assert (made.kept_base, plain.kept_base) == (True, False)


@pytest.mark.parametrize(
    ("model", "capability", "reason"),
    [
        (on_a_gpu(torch.float32), (9, 0), "the compute dtype is float32"),
        (on_a_gpu(torch.float16), (9, 0), "the compute dtype is float16"),
        (on_a_gpu(attention="eager"), (9, 0), "examples are computed one at a time"),
    ],
)
def test_fp8_is_refused_where_peft_computes(
    monkeypatch: pytest.MonkeyPatch, model: Any, capability: tuple[int, int], reason: str
) -> None:
    """What is slower without FP8 is an error with it: the setting affects the result."""
    with_capability(monkeypatch, capability)
    with pytest.raises(SettingsError, match=reason) as caught:
        prepare(model, [10, 20], **SETTINGS, compute="fp8")
    assert [problem.where for problem in caught.value.problems] == ["JOB_TRAIN__COMPUTE"]


def test_sizes_that_a_gpu_cannot_multiply_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer whose sizes are no multiples of 16 is named, before anything is quantized."""
    sizes = {"hidden_size": 40, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 5}
    model = on_a_gpu(sizes={**sizes, "vocab_size": 400})
    with_capability(monkeypatch, (9, 0))
    with pytest.raises(SettingsError, match="multiples of 16; this model has q_proj of 40 x 40"):
        prepare(model, [10, 20], **SETTINGS, compute="fp8")


@pytest.mark.parametrize(
    ("device", "capability", "reason"),
    [("cpu", (9, 0), "there is no GPU"), ("cuda", (8, 6), "the GPU's compute capability is 8.6, less than 8.9")],
)
def test_a_machine_without_fp8(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], reason: str
) -> None:
    """It is refused before the model is loaded."""
    with_capability(monkeypatch, capability)
    with pytest.raises(SettingsError, match=reason):
        require_fp8(torch.device(device))


def test_layers_that_cannot_be_fused_are_said_too(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it only turns out on the way that there is nothing to fuse, PEFT's layers remain, with that reason."""
    monkeypatch.setattr(prepare_module, "why_not_fused", lambda _: None)
    with_memory(monkeypatch, 80 << 30, 70 << 30)
    with_capability(monkeypatch, (9, 0))
    made = prepare(make_model(base_folder, options=AdapterOptions(use_dora=True)), [10, 20], **SETTINGS)
    assert made.forward == PEFT
    assert "for which there are no fused layers" in made.reason


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_that_can_be_fused_is(base_folder: Path, monkeypatch: pytest.MonkeyPatch, *, keep: bool) -> None:
    """Its plan names what was fused and whose kernels; what was set holds; it is no warning."""
    monkeypatch.setattr(prepare_module, "why_not_fused", lambda _: None)
    with_memory(monkeypatch, 80 << 30, 70 << 30)
    with_capability(monkeypatch, (9, 0))
    model = make_model(base_folder, quantization="nf4")
    with capture_logs() as lines:
        made = prepare(model, [10, 20], **SETTINGS | {"keep_base": keep})
    assert made.forward.startswith("fused all, ")
    assert (made.kept_base, made.kept_activations, made.recorded) == (keep, True, True)
    assert made.padded
    assert [line["log_level"] for line in lines] == ["info"]


@pytest.mark.parametrize("works", [True, False])
def test_triton_that_cannot_run_is_replaced(monkeypatch: pytest.MonkeyPatch, *, works: bool) -> None:
    """One launch decides, however often it is asked: a library that cannot be loaded costs a warning and some speed."""
    launched = 0

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        nonlocal launched
        launched += 1
        if not works:
            raise ImportError("cuda_utils.so: undefined symbol: cuModuleGetFunction")
        return gate * up

    fast = replace(kernels.TORCH, name="triton", swiglu=swiglu)
    monkeypatch.setattr(kernels, "triton", lambda: fast)
    fast_kernels.cache_clear()
    try:
        with capture_logs() as lines:
            found, name = fast_kernels(torch.device("cpu"), "float16")
            assert fast_kernels(torch.device("cpu"), "float16") == (found, name)
    finally:
        fast_kernels.cache_clear()
    assert launched == 1
    if works:
        assert (found, name, lines) == (fast, "triton", [])
        return
    assert (found, name) == (kernels.TORCH, "torch")
    (line,) = lines
    assert line["log_level"] == "warning"
    assert "undefined symbol: cuModuleGetFunction" in line["why"]


class Several(Alone):
    """One of three processes; what the others answer to the question for kernels."""

    place = Place(0, 3, 0, 3)

    def __init__(self, *others: dict[str, str]) -> None:
        self.others = others

    def gather(self, what: str, value: Any) -> list[Any]:
        """Of all processes."""
        return [value, *self.others]


@pytest.mark.parametrize("theirs", ["triton", "torch"])
def test_all_processes_compute_by_the_same_kernels(monkeypatch: pytest.MonkeyPatch, theirs: str) -> None:
    """Where one of them cannot use Triton for a dtype, none does: their results differ in the last bits."""
    fast, gpu = replace(kernels.TORCH, name="triton"), torch.device("cuda")
    monkeypatch.setattr(kernels, "triton", lambda: fast)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.tensor([1.0]))
    monkeypatch.setattr(gpu_capability, "_TORCH_IN_ALL", set())
    fast_kernels.cache_clear()
    try:
        others = {"bfloat16": theirs, "float16": "triton"}, {"bfloat16": "triton", "float16": "triton"}
        with capture_logs() as lines:
            agree_on_kernels(Several(*others), gpu, ["bfloat16", "float16"])
            agree_on_kernels(Alone(), gpu, ["bfloat16", "float16"])
            assert [fast_kernels(gpu, dtype)[1] for dtype in others[0]] == [theirs, "triton"]
    finally:
        fast_kernels.cache_clear()
    assert [(line["dtypes"], line["log_level"]) for line in lines] == [(["bfloat16"], "warning")] * (theirs == "torch")


def test_triton_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, with what installs it: torch's own operations are slower. A CPU needs none."""

    def missing() -> kernels.Kernels:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(kernels, "triton", missing)
    fast_kernels.cache_clear()
    try:
        with capture_logs() as lines:
            for device in ("cuda", "cuda", "cpu"):
                assert fast_kernels(torch.device(device), "float16") == (kernels.TORCH, "torch")
    finally:
        fast_kernels.cache_clear()
    assert [(line["log_level"], "pip install triton" in line["change"]) for line in lines] == [("warning", True)]


def test_a_gpu_that_can_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on an Ampere is what the fused layers are for; older ones have fp16."""
    with_capability(monkeypatch, (8, 0))
    assert why_not_fused(on_a_gpu()) is None
    with_capability(monkeypatch, (7, 0))
    assert why_not_fused(on_a_gpu(torch.float16)) is None


def test_what_cannot_be_recorded_is_fused_all_the_same(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the attention kernel for segments a CUDA graph would need, on a Turing, and it is said."""
    monkeypatch.setattr(prepare_module, "why_not_fused", lambda _: None)
    with_memory(monkeypatch, 16 << 30, 15 << 30)
    with_capability(monkeypatch, (7, 5))
    made = prepare(make_model(base_folder), [10, 20], **SETTINGS)
    assert made.forward.startswith("fused all, ")
    assert made.padded
    assert not made.recorded
    assert made.reason.endswith("attention is computed segment by segment on a GPU of compute capability 7.5")


def test_a_set_budget_holds() -> None:
    """On any machine."""
    assert token_budget(torch.device("cpu"), None, None) == CPU_MICRO_BATCH_TOKENS
    assert token_budget(torch.device("cpu"), 77, None) == token_budget(torch.device("cuda"), 77, None) == 77


def long_rows(base_folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, host: int = 1 << 40, **how: Any) -> Any:
    """The plan for rows of 30,000 tokens among short ones, with so much free memory."""
    monkeypatch.setattr(prepare_module, "why_not_fused", lambda _: None)
    with_memory(monkeypatch, free, free)
    with_capability(monkeypatch, (9, 0))
    monkeypatch.setattr(prepare_module, "available_bytes", lambda: host)
    lengths = how.pop("lengths", [10, 30_000])
    return prepare(make_model(base_folder), lengths, **SETTINGS | {"keep_base": "auto"} | how)


def test_long_rows_are_computed_in_tiles(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a row is long, and the loss is over tokens; the short rows are recorded all the same."""
    found = long_rows(base_folder, monkeypatch, 80 << 30)
    assert (found.tile_tokens, found.offloaded, found.kept_attention, found.recorded) == (8192, False, True, True)
    assert "rows of up to 30,000 tokens need" in found.reason
    assert found.attention == "cpu"
    assert long_rows(base_folder, monkeypatch, 80 << 30, method="dpo").tile_tokens is None
    alone = long_rows(base_folder, monkeypatch, 80 << 30, lengths=[20_000, 30_000], recompute=False)
    # If memory runs out, giving up what long rows do not use would repeat a step for nothing.
    assert alone.droppable == ("on_gpu", "kept_attention")
    held_out = prepare(make_model(base_folder), [10, 20], **SETTINGS, validation=[30_000, 10])
    assert held_out.tile_tokens == 8192


class Two:
    """Two processes, of which the other one says that it computes so many tokens of a row alone, by the same kernel."""

    place = Place(0, 2, 0, 2)

    def __init__(self, other: int, kernel: str | None = None) -> None:
        self.other, self.kernel, self.asked = other, kernel, list[int]()

    def gather(self, what: str, own: Any) -> list[Any]:
        """Both."""
        if what == "kernel of long rows":
            return [own, self.kernel or own]
        self.asked.append(own)
        return [own, self.other]


def test_rows_that_do_not_fit_are_divided(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above what the smaller GPU computes alone; none where one of the processes or the settings do not allow it."""
    monkeypatch.setattr(long_row_plan, "main_memory", lambda: MainMemory(1 << 40, 1 << 40))

    def plan(other: int = 20_000, **how: Any) -> tuple[ExecutionPlan, list[int]]:
        group = Two(other)
        found = long_rows(base_folder, monkeypatch, 80 << 30, group=group, sequence_parallel="auto", **how)
        return found, group.asked

    found, asked = plan()
    assert (found.sequence_parallel, found.divided_above, asked) == (2, 20_000, [30_000])
    assert "on each of 2 GPUs" in found.reason
    assert plan(40_000)[0].divided_above == 30_000  # none is longer
    assert (plan(0)[0].sequence_parallel, plan(0)[0].divided_above) == (1, None)
    found, asked = plan(random=True)
    assert (found.divided_above, asked) == (None, [0])
    for how, said in (({"sequence_parallel": "off"}, [0]), ({"method": "dpo"}, [])):
        group = Two(20_000)  # which asks whatever this one's setting is, and would wait for its answer
        made = long_rows(base_folder, monkeypatch, 80 << 30, group=group, **{"sequence_parallel": "auto"} | how)
        assert (made.sequence_parallel, made.divided_above, group.asked) == (1, None, said)


@pytest.mark.parametrize(
    ("own", "other", "agreed"), [(FLASH, TRITON, FLASH), (TRITON, FLASH, FLASH), (TRITON, TRITON, TRITON)]
)
def test_all_processes_use_one_kernel(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, own: str, other: str, agreed: str
) -> None:
    """The kernel affects the last bits: one that failed its trial in one process is used in none, which each says."""
    monkeypatch.setattr(long_row_plan, "main_memory", lambda: MainMemory(1 << 40, 1 << 40))
    asked = dict[str, Any]()

    def choose(*_: Any, **how: Any) -> str:
        asked.update(how)
        return own

    monkeypatch.setattr(long_attention, "choose_kernel", choose)
    group = Two(30_000, kernel=other)
    with capture_logs() as lines:
        found = long_rows(base_folder, monkeypatch, 80 << 30, group=group, sequence_parallel="auto")
    assert found.attention == agreed
    assert asked["processes"] == 2
    said = [line for line in lines if "another process cannot use" in line["event"]]
    assert len(said) == (own != agreed)


def test_which_rows_are_divided_does_not_depend_on_free_memory(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run may find less of it."""
    monkeypatch.setattr(long_row_plan, "main_memory", lambda: MainMemory(1 << 40, 1 << 40))
    found = []
    for free in (3 << 30, 2 << 30):
        with monkeypatch.context() as patch:
            group = Two(200_000)
            how = {"group": group, "sequence_parallel": "auto"}
            patch.setattr(prepare_module, "why_not_fused", lambda _: None)
            with_memory(patch, 4 << 30, free)
            with_capability(patch, (9, 0))
            prepare(make_model(base_folder), [10, 200_000], **SETTINGS | {"keep_base": "auto"} | how)
            found += group.asked
    assert found[0] == found[1]
    assert 16_384 < found[0] < 200_000


def test_offloading_without_a_long_row_is_a_warning(base_folder: Path) -> None:
    """The setting is for long rows on fused layers: where it does nothing, it is said why."""
    with capture_logs() as lines:
        prepare(make_model(base_folder), [10, 20], **SETTINGS, offload=True)
    (line,) = [line for line in lines if line["log_level"] == "warning"]
    assert line["event"] == "JOB_TRAIN__OFFLOAD_ACTIVATIONS has no effect"
    assert "20 tokens" in line["why"]
    assert "auto" in line["change"]


def test_a_row_that_cannot_fit_is_refused(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training, with the figures, the row's place and the settings; as an error of the settings."""
    how = {"host": 20 << 20, "longest_at": "rows.jsonl:17"}
    with pytest.raises(SettingsError) as caught:
        long_rows(base_folder, monkeypatch, 80 << 30, **how)
    text = str(caught.value)
    assert text.startswith("JOB_TRAIN__MAX_LENGTH: the longest row, rows.jsonl:17, has 30,000 tokens")
    assert "20.0 MiB are free; about 99" in text
    assert "JOB_DATA__ON_LONG_ROW" in text
    long_rows(base_folder, monkeypatch, 80 << 30, **how, trains=False)  # a run that is trained may be exported here
    held_out = {**SETTINGS, "longest_at": "rows.jsonl:17", "validation": [30_000]}
    monkeypatch.setattr(prepare_module, "why_not_fused", lambda _: "a CPU")
    assert prepare(make_model(base_folder), [10, 20], **held_out).forward == PEFT  # a validation takes less
