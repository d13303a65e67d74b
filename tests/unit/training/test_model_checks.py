"""What a model's configuration excludes is reported from the configuration alone, all errors together."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import SettingsError, Unreachable
from job.export.model_checks import export_problems
from job.model.adapter_options import PLAIN, AdapterOptions, make_options, too_few_steps
from job.model.fused import long_attention
from job.model.load_base import inspect
from job.settings.load import load_settings
from job.settings.schema import Export, Lora
from job.stages import export_check, placement, pull_checks
from job.stages.pull import checked_settings
from job.stages.pull_checks import check_files_of_exports, check_model, check_rows, refuse_long_row, step_problems
from job.training.model_checks import model_problems
from tests.families.models import tiny_config
from tests.helpers import make_examples

DEMO = Path(__file__).parents[3] / "job" / "demo" / "base"


def problems(folder: Path, family: str, **changes: Any) -> dict[str, str]:
    """Setting -> what is wrong with it, of a tiny model of the family; its own `changes` begin with `config_`."""
    config = tiny_config(family)
    for name in [name for name in changes if name.startswith("config_")]:
        setattr(config, name.removeprefix("config_"), changes.pop(name))
    config.save_pretrained(folder)
    options = changes.pop("options", PLAIN)
    max_length, compute = changes.pop("max_length", 64), changes.pop("compute", "dtype")
    run = {"compute": compute, "placement": changes.pop("placement", "gpu")}
    run["optimizer"] = changes.pop("optimizer", "adamw_8bit")
    how: dict[str, Any] = {"targets": None, "rank": 4, "options": options} | changes
    try:
        inspect(
            folder,
            max_length=max_length,
            **how,
            problems=lambda config, empty: model_problems(config, empty, **how, **run),
        )
    except SettingsError as error:
        return {problem.where: problem.what for problem in error.problems}
    return {}


IN_8_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("family", "changes", "where", "what"),
    [
        ("mixtral", {"compute": "fp8"}, "JOB_TRAIN__COMPUTE", "does not support a mixture's experts"),
        ("llama", {"compute": "fp8", "config_intermediate_size": 120}, "JOB_TRAIN__COMPUTE", "gate_proj of 64 x 120"),
        ("gpt2", {"compute": "fp8"}, "JOB_TRAIN__COMPUTE", "the sizes of a gpt2 model are not known"),
        ("llama", {"options": AdapterOptions(init="pissa"), "rank": 33}, "JOB_LORA__RANK", "32 here, and not 33"),
        ("llama", {"options": AdapterOptions(init="loftq"), "rank": 33}, "JOB_LORA__RANK", "32 here, and not 33"),
        ("llama", {"options": AdapterOptions(init="eva"), "rank": 65}, "JOB_LORA__RANK", "inputs, 64 here, and not 65"),
        (
            "llama",
            {"options": AdapterOptions(init="loftq"), "config_quantization_config": IN_8_BITS},
            "JOB_LORA__INIT",
            "loftq needs the unquantized base",
        ),
        (
            "llama",
            {"placement": "host", "config_quantization_config": IN_8_BITS},
            "JOB_MODEL__PLACEMENT",
            "published in 8 bits; take gpu",
        ),
        ("llama", {"options": AdapterOptions(experts=True)}, "JOB_LORA__EXPERTS", "LlamaForCausalLM has no experts"),
        (
            "llama",
            {"optimizer": "muon", "options": AdapterOptions(modules_to_save=("lm_head", "norm"))},
            "JOB_TRAIN__OPTIMIZER",
            "JOB_LORA__MODULES_TO_SAVE=norm also trains model.norm.weight, of shape (64,)",
        ),
        ("mamba2", {"targets": ["out_proj"]}, "JOB_LORA__TARGET_MODULES", "PEFT does not adapt out_proj"),
    ],
)
def test_a_setting_that_the_model_excludes(
    tmp_path: Path, family: str, changes: dict[str, Any], where: str, what: str
) -> None:
    """Each by its setting, with the fix; without the change nothing is wrong."""
    found = problems(tmp_path, family, **changes)
    assert found.keys() == {where}
    assert what in found[where]
    allowed = {"targets": ["in_proj"]} if family == "mamba2" else {"rank": 16}
    assert problems(tmp_path, family, **allowed) == {}


def test_all_that_the_model_excludes_is_told_together(tmp_path: Path) -> None:
    """Length, layers, experts, options and compute in one error."""
    options = AdapterOptions(experts=True, layers=(9,))
    more = {"max_length": 4096, "targets": ["q_prj"], "compute": "fp8", "config_model_type": "llama"}
    found = problems(tmp_path, "llama", options=options, config_hidden_size=60, **more)
    assert found.keys() == {
        *("JOB_TRAIN__MAX_LENGTH", "JOB_LORA__TARGET_MODULES", "JOB_LORA__EXPERTS", "JOB_LORA__LAYERS"),
    }
    more["targets"] = ["q_proj"]
    found = problems(tmp_path, "llama", options=options, config_intermediate_size=120, config_hidden_size=72, **more)
    assert "q_proj of 72 x 64" in found["JOB_TRAIN__COMPUTE"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    ("lora", "setting"),
    [
        ({"rank": 65}, "JOB_LORA__RANK"),
        ({"rank": 2**32 - 1}, "JOB_LORA__RANK"),
        ({"rank_pattern": {".*": 100_000}}, "JOB_LORA__RANK_PATTERN"),
        ({"kind": "adalora", "init_rank": 100_000}, "JOB_LORA__INIT_RANK"),
    ],
)
def test_a_rank_that_no_layer_can_have_is_refused(
    tmp_path: Path, family: str, lora: dict[str, Any], setting: str
) -> None:
    """It would end for want of memory, which names other settings, or train for hours on nothing."""
    given = {"rank": 4, **lora}
    options = make_options(dict(Lora()) | given, 100)
    found = problems(tmp_path, family, rank=given["rank"], options=options)
    assert list(found) == [setting]
    assert "64 is the highest rank" in found[setting]
    possible = make_options(dict(Lora()) | given | dict.fromkeys(lora, 64) if "rank" in lora else dict(Lora()), 100)
    assert not problems(tmp_path, family, rank=64, options=possible)


def test_what_cannot_be_exported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats that the model's layers do not allow, and what cannot be merged onto."""
    tiny_config("mixtral").save_pretrained(tmp_path)
    config, empty = inspect(tmp_path, max_length=64, targets=None)

    def found(*formats: str, onto: str = "best", nf4: bool = True, gate_format: str = "adapter") -> dict[str, str]:
        asked: dict[str, Any] = {"formats": formats, "onto": onto, "nf4": nf4, "gate_format": gate_format}
        return {
            one.where: one.what for one in export_problems(config, empty, **asked, device=SimpleNamespace(type="cpu"))
        }

    assert "in one tensor, which cannot be quantized here; leave it out" in found("fp8")["JOB_EXPORT__FORMATS"]
    assert found("merged") == found("adapter:fp16", onto="dequantized") == {}
    assert "experts of a mixture" in found("merged", onto="dequantized")["JOB_EXPORT__MERGE_ONTO"]
    assert (
        "no weight of the base is quantized" in found("merged", onto="dequantized", nf4=False)["JOB_EXPORT__MERGE_ONTO"]
    )
    monkeypatch.setattr("job.export.autoround.find_spec", lambda _: None)
    assert "awq cannot be scored here" in found("awq", gate_format="awq")["JOB_GATE__ON"]
    config.quantization_config = IN_8_BITS
    assert "published in 8 bits" in found("merged")["JOB_EXPORT__FORMATS"]
    assert "only published quantized" in found("merged", onto="original")["JOB_EXPORT__MERGE_ONTO"]


def test_a_run_checks_its_model_before_its_weights_and_rows(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter, export and main memory for a base that lies there, for as many copies as the machine has processes."""
    words = ["--preset=demo", f"--model.id={base_folder}", "--lora.experts=true", "--lora.dropout=0"]
    attempt: Any = SimpleNamespace(processes=SimpleNamespace(place=SimpleNamespace(local_world_size=3)))
    monkeypatch.setattr(placement, "available_bytes", lambda: 1000)
    monkeypatch.setattr(pull_checks, "choose_device", lambda _: SimpleNamespace(type="cpu"))
    asked = load_settings([*words, "--model.placement=host", "--model.quantization=nf4"], {})
    later = load_settings(["--preset=demo", "--export.formats=merged", "--export.merge_onto=dequantized"], {})
    with pytest.raises(SettingsError) as caught:
        check_model(attempt, base_folder, checked_settings(asked, (later,)))
    found = {problem.where: problem.what for problem in caught.value.problems}
    assert found.keys() == {"JOB_LORA__EXPERTS", "JOB_MODEL__PLACEMENT"}
    assert "for each of 3 processes" in found["JOB_MODEL__PLACEMENT"]
    plain = load_settings(["--preset=demo", f"--model.id={base_folder}", "--model.quantization=none"], {})
    with pytest.raises(SettingsError, match="JOB_EXPORT__MERGE_ONTO"):
        check_model(attempt, base_folder, checked_settings(plain, (later,)))
    check_model(attempt, base_folder, checked_settings(plain, ()))


def test_an_export_that_is_too_large_is_refused_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the GPU that scores it, or for the disk: what it takes in 16 bits is known from the configuration."""
    place = SimpleNamespace(local_world_size=1)
    attempt: Any = SimpleNamespace(processes=SimpleNamespace(place=place), work=tmp_path)
    words = ["--preset=demo", f"--model.id={DEMO}", "--export.formats=merged"]
    settings = checked_settings(load_settings(words, {}), ())
    monkeypatch.setattr(pull_checks, "choose_device", lambda _: SimpleNamespace(type="cuda"))
    numbers = sum(parameter.numel() for parameter in inspect(DEMO, max_length=64, targets=None)[1].parameters())
    monkeypatch.setattr(export_check, "gpu_bytes", lambda _: 2 * numbers)
    check_model(attempt, DEMO, settings)
    monkeypatch.setattr(export_check, "gpu_bytes", lambda _: 2 * numbers - 1)
    with pytest.raises(Unreachable, match="of the GPU's memory to be scored"):
        check_model(attempt, DEMO, settings)
    monkeypatch.setattr(pull_checks, "choose_device", lambda _: SimpleNamespace(type="cpu"))
    needed: list[int] = []
    monkeypatch.setattr(export_check, "check_disk", lambda _, need: needed.append(need))
    check_model(attempt, DEMO, settings)
    assert needed == [export_check.required_bytes([2 * numbers])]


def test_adalora_needs_steps_to_take_ranks_away_in() -> None:
    """Known when the rows are counted, and told then: by the pull, and by `plan`."""
    words = ["--lora.tinit=5", "--lora.tfinal=5", "--train.epochs=1", "--train.global_batch_size=2"]
    settings = checked_settings(load_settings(["--lora.kind=adalora", *words], {}), ())
    assert [one.where for one in step_problems(settings, make_examples(20))] == ["JOB_LORA__TINIT"]
    assert list(step_problems(settings, make_examples(22))) == []
    assert list(too_few_steps(make_options(dict(load_settings([], {}).lora), 1))) == []


def test_formats_that_the_bases_files_exclude(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once for all types of a format, and only where the base's own files are on this machine."""
    asked: list[Path] = []
    why = SimpleNamespace(check_files=lambda folder, _: asked.append(folder) or "its tokenizer is unknown")
    monkeypatch.setattr("job.export.model_checks.derived_format", lambda name: (why, name))
    attempt: Any = SimpleNamespace(check_stop=lambda: None)
    export = Export(formats=("gguf:q8_0", "merged", "gguf:f16"))
    check_files_of_exports(attempt, None, export)
    check_files_of_exports(attempt, DEMO, Export(formats=("adapter:bf16",)))
    assert asked == []
    with pytest.raises(SettingsError, match=r"JOB_EXPORT__FORMATS: gguf:f16 cannot be made: its tokenizer is unknown"):
        check_files_of_exports(attempt, DEMO, export)
    assert asked == [DEMO]


def test_adalora_needs_a_step_before_the_one_that_takes_the_last_ranks_away() -> None:
    """PEFT's allocator has the importance of earlier steps only; without one it raises a KeyError in the first step."""
    for steps, final, wrong in ((1, 0, True), (4, 3, True), (2, 0, False), (5, 3, False)):
        lora = load_settings(["--lora.kind=adalora", f"--lora.tfinal={final}"], {}).lora
        found = [problem.where for problem in too_few_steps(make_options(dict(lora), steps))]
        assert found == ["JOB_LORA__TFINAL"] * wrong


def test_eva_needs_target_tokens() -> None:
    """As many as ranks in one of the first micro-batches: known when the rows are read."""
    rows = make_examples(4, shortest=8, longest=8)
    given = (load_settings(["--lora.init=eva", f"--lora.rank={rank}"], {}) for rank in (28, 29))
    fits, above = (checked_settings(settings, ()) for settings in given)
    assert list(step_problems(fits, rows)) == []
    assert ["target tokens in one micro-batch as the rank, 29" in one.what for one in step_problems(above, rows)] == [
        True
    ]


@pytest.mark.parametrize(("offload", "processes", "most"), [("auto", 1, 2), ("false", 1, 1), ("auto", 2, 3)])
def test_a_row_that_certainly_does_not_fit_is_refused_before_the_weights_come(
    monkeypatch: pytest.MonkeyPatch, offload: str, processes: int, most: int
) -> None:
    """By the GPU's whole memory; where activations may go to main memory, or to several GPUs, longer rows fit."""
    monkeypatch.setattr(pull_checks, "choose_device", lambda _: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(pull_checks, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(pull_checks, "gpu_memory", lambda _: (1 << 30, 1 << 30))
    monkeypatch.setattr(pull_checks, "main_memory", lambda: SimpleNamespace(total_bytes=1 << 40))
    monkeypatch.setattr(long_attention, "processors", lambda _: 132)
    place = SimpleNamespace(local_world_size=processes, world_size=processes)
    attempt: Any = SimpleNamespace(processes=SimpleNamespace(place=place))
    words = ["--preset=demo", f"--model.id={DEMO}", "--model.dtype=bf16", "--lora.dropout=0"]
    settings = checked_settings(load_settings([*words, f"--train.offload_activations={offload}"], {}), ())
    limits = (58_000, 58_500, 60_000, 70_000)
    refuse_long_row(attempt, DEMO, settings, limits[most - 1], "")
    with pytest.raises(SettingsError, match=r"JOB_TRAIN__MAX_LENGTH: the longest row, rows.jsonl:7, has .* tokens fit"):
        refuse_long_row(attempt, DEMO, settings, limits[most], "rows.jsonl:7")


def test_rows_are_checked_by_the_first_attempt_only() -> None:
    """Later ones train on the same rows."""
    rows: Any = SimpleNamespace(examples=make_examples(2), record=SimpleNamespace(longest_at=""))
    words = ["--lora.kind=adalora", "--lora.tinit=50", "--run.device=cpu"]
    settings = checked_settings(load_settings(words, {}), ())
    for earlier, refused in ((None, True), ("a record", False)):
        attempt: Any = SimpleNamespace(recorded=lambda *_, earlier=earlier: earlier)
        with pytest.raises(SettingsError, match="JOB_LORA__TINIT") if refused else nullcontext():
            check_rows(attempt, Path(), settings, rows)
