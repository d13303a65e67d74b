"""A run's quantities and the forecast for GPUs: what is said to fit fits, and assumptions are marked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.common.gpu_context import CONTEXT_BYTES
from job.common.resources import MARGIN_BYTES as RESERVED
from job.common.resources import OTHER_OUTPUT_BYTES, DiskSpace, checkpoint_bytes
from job.errors import Unreachable
from job.model.architecture import Architecture
from job.planning import forecast_time, run_shape, time_model
from job.planning import plan as plan_module
from job.planning.auxiliary_models import AuxiliaryModel, count_weights, judging, screening
from job.planning.forecast import disk_bytes, estimates, forecast_gpu
from job.planning.forecast_input import EVALUATIONS, ForwardWork, RunShape
from job.planning.forecast_memory import scoring_bytes
from job.planning.forecast_time import DOWNLOAD_RATE, LOADING_RATE, START_SECONDS
from job.planning.gpu_prices import GPUS, Gpu, Machine
from job.planning.input_checks import Preflight
from job.planning.known_models_and_data import ARCHITECTURES, TASK_TOKENS, TaskTokens
from job.planning.plan import Plan
from job.planning.plan_text import as_table
from job.planning.preflight import PreflightResult
from job.planning.scaling import (
    LONG_ROW_EFFICIENCY,
    SCORING_EFFICIENCY,
    TRAINING_EFFICIENCY,
    divide,
    training_efficiency,
)
from job.planning.time_model import SCORING_SECONDS
from job.planning.workload import Workload
from job.settings.load import load_settings
from job.settings.training_stages import split_stages
from job.training import memory_model
from job.training.sequence_parallel import row_memory
from tests.unit.training.test_memory_model import REFERENCE

WORK = Workload(94, 1500, 348_932, 345_932, 50_060_888, 503, 4543)
RUN = RunShape(
    setup=REFERENCE,
    setup_basis="computed",
    workload=WORK,
    workload_basis="computed",
    questions=TASK_TOKENS["arc_easy"],
    questions_basis="computed",
    budget=4096,
    scoring_budget=8192,
    download_bytes=0,
    usd_per_hour=None,
)
CHECKED = (PreflightResult("storage", "ok", ""),)
MACHINES = (Machine("m", 1, None, 1.0),)
START = START_SECONDS + 2 * REFERENCE.architecture.parameters / LOADING_RATE
BY_NAME = {gpu.name: gpu for gpu in GPUS}


def test_the_reference_recipe_fits_where_it_is_said_to() -> None:
    """It was published for 16 GB: it fits all GPUs of the table; what is not known of the oldest is said."""
    plans = {gpu.name: forecast_gpu(gpu, RUN, REFERENCE) for gpu in GPUS}
    assert all(plan.fits for plan in plans.values())
    assert [name for name, plan in plans.items() if plan.note] == ["T4"]
    in_full = replace(REFERENCE, value_bytes=4)
    assert forecast_gpu(BY_NAME["A100 80GB"], RUN, in_full).hours is None  # speeds are those of half precision
    small = forecast_gpu(replace(BY_NAME["L4"], memory_bytes=6 << 30), RUN, REFERENCE)
    assert (small.fits, small.hours, small.usd) == (False, None, None)
    assert "are needed" in small.note


@given(st.integers(1, 200), st.integers(10, 2000), st.booleans())
def test_budgets_are_the_largest_that_fit(gigabytes: int, longest: int, recompute: bool) -> None:  # noqa: FBT001
    """Each budget fits by the formula and one token more does not, or is a whole step; 0 only where nothing helps."""
    gpu = Gpu("x", gigabytes * 10**9, 1e14, 1e12, (9, 0), MACHINES)
    run = replace(RUN, workload=replace(WORK, longest=longest))
    plan = forecast_gpu(gpu, run, REFERENCE)
    budget = plan.budget_recomputing if recompute else plan.budget_keeping
    setup, room = replace(REFERENCE, recompute=recompute), memory_model.usable_bytes(gpu.memory_bytes)
    scoring = memory_model.evaluation_bytes(setup, run.scoring_budget, run.reads)
    if budget:
        assert memory_model.training_memory(setup, budget).total <= room
        assert budget == WORK.largest_step or memory_model.training_memory(setup, budget + 1).total > room
        assert budget >= longest
    else:
        assert scoring > room or memory_model.training_memory(setup, longest).total > room
    assert plan.budget_keeping <= plan.budget_recomputing
    assert plan.fits <= (plan.budget_recomputing > 0)


@given(st.integers(1, 10_000), st.integers(1, 600), st.integers(600, 5000))
def test_a_micro_batch_is_within_the_data(budget: int, longest: int, largest: int) -> None:
    """Never less than the longest example, never more than the largest step; the budget where nothing is known."""
    run = replace(RUN, budget=budget, workload=replace(WORK, longest=longest, largest_step=largest))
    assert longest <= run.micro_batch <= largest
    assert run.micro_batch == budget or budget < longest or budget > largest
    assert replace(run, workload=None).micro_batch == budget


def test_hours_add_up_and_dollars_follow() -> None:
    """Start, download, training and two evaluations; at the table's price, or at the user's on whatever GPU."""
    gpu = BY_NAME["H200"]
    plan = forecast_gpu(gpu, replace(RUN, download_bytes=10**10), REFERENCE)
    training = time_model.training_flops(REFERENCE, WORK.tokens, WORK.squares)
    scoring = time_model.evaluation_flops(REFERENCE, RUN.questions.tokens, RUN.questions.reads)  # type: ignore[union-attr]
    computing = (training + EVALUATIONS * scoring) / (time_model.UTILISATION * gpu.flops)
    computing += EVALUATIONS * SCORING_SECONDS
    assert plan.hours == pytest.approx((START + 40 + computing) / 3600, rel=1e-6)
    assert plan.usd == pytest.approx(plan.hours * gpu.machines[0].usd_per_gpu)
    priced = forecast_gpu(gpu, replace(RUN, usd_per_hour=2.0), REFERENCE)
    assert (priced.usd_per_hour, priced.machine) == (2.0, "your price")
    assert priced.usd == pytest.approx(2.0 * (priced.hours or 0))
    assert forecast_gpu(gpu, replace(RUN, workload=None), REFERENCE).usd is None


EXPORT = replace(RUN, fused=True, merges=1, derived=("gguf:q8_0",), adapter_copies=1, trains=False)


def test_a_run_that_only_exports_takes_the_time_of_its_exports() -> None:
    """Start, making the formats, an evaluation of each; the data, and what training on it takes, make no difference."""
    gpu = BY_NAME["H200"]
    plan = forecast_gpu(gpu, EXPORT, REFERENCE)
    scoring = time_model.evaluation_flops(REFERENCE, RUN.questions.tokens, RUN.questions.reads)  # type: ignore[union-attr]
    evaluation = scoring / (time_model.SCORING_UTILISATION * gpu.flops) + SCORING_SECONDS
    made = 3 * EXPORT.export_bytes / DOWNLOAD_RATE + forecast_time.llama_cpp_seconds(EXPORT, REFERENCE)
    made += forecast_time.merging_seconds(REFERENCE) + forecast_time.converting_seconds("gguf:q8_0", REFERENCE)
    assert plan.hours == pytest.approx((START + 2 * evaluation + made) / 3600, rel=1e-6)  # llama.cpp's is made
    assert plan.usd == pytest.approx(plan.hours * gpu.machines[0].usd_per_gpu)
    assert (plan.budget_recomputing, plan.budget_keeping, plan.keeps) == (0, 0, "")
    for workload in (None, replace(WORK, tokens=100 * WORK.tokens, longest=60_000)):
        assert forecast_gpu(gpu, replace(EXPORT, workload=workload), REFERENCE).hours == plan.hours
    two = forecast_gpu(gpu, replace(EXPORT, processes=2), REFERENCE)
    saved = (1 - 1 / (2 * SCORING_EFFICIENCY)) * 2 * (evaluation - SCORING_SECONDS)
    assert two.hours == pytest.approx(plan.hours - saved / 3600, rel=1e-6)


def test_a_run_that_only_exports_needs_memory_to_score() -> None:
    """Of the base with the adapter, without gradients and moments; of the merged model in its place, without either."""
    memory = memory_model.training_memory(REFERENCE, 0)
    unused = memory.gradients + memory.optimizer
    figures = {figure.name: figure.value for figure in estimates(replace(EXPORT, merges=0, derived=()))}
    assert figures["peak in evaluation"] == scoring_bytes(EXPORT, REFERENCE) - unused
    merged = scoring_bytes(EXPORT, replace(REFERENCE, quantization="none")) - unused - memory.adapter
    figures = {figure.name: figure.value for figure in estimates(EXPORT)}
    assert figures["peak in evaluation"] == merged
    assert not figures.keys() & {"peak in training", "memory: optimizer", "training", "optimizer steps", "checkpoint"}
    assert figures["disk"] == RESERVED + EXPORT.export_bytes
    for more in (1, -1):
        limit = round(merged * (1 + memory_model.MARGIN)) + CONTEXT_BYTES + 1_000 * more
        assert forecast_gpu(replace(BY_NAME["L4"], memory_bytes=limit), EXPORT, REFERENCE).fits == (more > 0)


def test_where_only_exports_fit() -> None:
    """A row that could not be trained on is no obstacle, and the job does not refuse it either."""
    long = replace(EXPORT, workload=replace(WORK, longest=60_000, largest_step=60_000))
    plan, trained = (forecast_gpu(BY_NAME["L4"], one, REFERENCE) for one in (long, replace(long, trains=True)))
    assert (plan.fits, plan.note, trained.fits) == (True, "", False)


def test_the_unquantized_base_takes_time_where_it_fits() -> None:
    """It is scored once more and read from the disk; where it does not fit the plan says so, and the run still fits."""
    run = replace(RUN, full_precision=True)
    scoring = time_model.evaluation_flops(REFERENCE, RUN.questions.tokens, RUN.questions.reads)  # type: ignore[union-attr]
    weights = 2 * REFERENCE.architecture.parameters
    for name, fits in (("H200", True), ("L4", True), ("T4", False)):
        gpu = BY_NAME[name]
        plan, plain = forecast_gpu(gpu, run, REFERENCE), forecast_gpu(gpu, RUN, REFERENCE)
        more = scoring / (time_model.UTILISATION * gpu.flops) + SCORING_SECONDS + weights / DOWNLOAD_RATE
        more = more if fits else 0
        assert plan.fits
        assert (plan.hours or 0) - (plain.hours or 0) == pytest.approx(more / 3600, abs=1e-9)
        assert ("the unquantized base is not scored: it takes" in plan.note) == (not fits)
    figures = {figure.name: figure.value for figure in estimates(run)}
    assert "evaluation, 3 times" in figures
    assert figures["peak, unquantized base"] > weights + figures["memory: base"]
    both = replace(run, first_stage=replace(run, download_bytes=0))
    gpu = BY_NAME["H200"]
    once = (forecast_gpu(gpu, both, REFERENCE).hours or 0) - (
        forecast_gpu(gpu, replace(RUN, first_stage=RUN), REFERENCE).hours or 0
    )
    only = (forecast_gpu(gpu, run, REFERENCE).hours or 0) - (forecast_gpu(gpu, RUN, REFERENCE).hours or 0)
    assert once == pytest.approx(only, rel=1e-6)


def test_an_export_takes_disk_memory_and_time() -> None:
    """Each candidate is written in 16 bits and scored like the adapter, unquantized; the chosen one is uploaded."""
    plain, run = RUN, replace(RUN, merges=2)
    gpu = BY_NAME["H200"]
    weights = 2 * REFERENCE.architecture.parameters
    figures = {figure.name: figure.value for figure in estimates(run)}
    assert figures["exported models"] == 2 * weights
    assert figures["disk"] == {figure.name: figure.value for figure in estimates(plain)}["disk"] + 2 * weights
    assert "evaluation, 4 times" in figures
    scoring = time_model.evaluation_flops(REFERENCE, RUN.questions.tokens, RUN.questions.reads)  # type: ignore[union-attr]
    seconds = 2 * scoring / (time_model.UTILISATION * gpu.flops) + 5 * weights / DOWNLOAD_RATE
    seconds += weights / forecast_time.MERGED_PER_SECOND + 2 * SCORING_SECONDS
    assert figures["merging"] == weights / forecast_time.MERGED_PER_SECOND
    longer, shorter = forecast_gpu(gpu, run, REFERENCE).hours, forecast_gpu(gpu, plain, REFERENCE).hours
    assert (longer or 0) - (shorter or 0) == pytest.approx(seconds / 3600, rel=1e-6)
    small = Gpu("x", 12 << 30, 1e15, 3e12, (9, 0), MACHINES)
    assert forecast_gpu(small, replace(plain, budget=512), REFERENCE).fits
    assert not forecast_gpu(small, replace(run, budget=512), REFERENCE).fits


def test_formats_that_are_made_of_the_merged_model_take_time() -> None:
    """auto-round computes on the GPU, fp8 and GGUF are made on one core, and llama.cpp scores on the processor."""
    gpu, run = BY_NAME["H200"], replace(RUN, merges=1)
    before = forecast_gpu(gpu, run, REFERENCE).hours or 0
    weights = REFERENCE.architecture.parameters
    scoring = time_model.evaluation_flops(REFERENCE, RUN.questions.tokens, RUN.questions.reads)  # type: ignore[union-attr]
    rounding = 6 * REFERENCE.architecture.linear_parameters * 1000
    on_gpu = scoring / (time_model.UTILISATION * gpu.flops) + SCORING_SECONDS
    cases = {
        "fp8": (weights / forecast_time.MERGED_PER_SECOND, on_gpu),
        "awq": (rounding / (time_model.UTILISATION * gpu.flops), on_gpu),
        "gguf:q8_0": (
            weights / forecast_time.GGUF_PER_SECOND,
            scoring / (forecast_time.CORES * forecast_time.LLAMA_CPP_FLOPS),
        ),
    }
    for name, seconds in cases.items():
        more = replace(run, derived=(name,), quantizing_tokens=1000)
        longer = 3600 * ((forecast_gpu(gpu, more, REFERENCE).hours or 0) - before)
        # written, read to be scored, uploaded
        assert longer == pytest.approx(sum(seconds) + 3 * more.format_bytes(name) / DOWNLOAD_RATE, rel=1e-6)
        figures = {figure.name: figure for figure in estimates(more)}
        assert figures[f"quantizing, {name}"].value == (rounding if name == "awq" else seconds[0])
        assert figures[f"quantizing, {name}"].basis == "assumed"
        assert (f"scoring, {name}" in figures) == (name == "gguf:q8_0")


@pytest.mark.parametrize(("gigabytes", "keeps"), [(80, "base, activations"), (40, "activations"), (24, ""), (16, "")])
def test_what_is_kept_follows_from_the_room(gigabytes: int, keeps: str) -> None:
    """More where there is more, as the job itself chooses; nothing where PEFT's own layers do the work."""
    run = replace(RUN, fused=True, budget_by_gpu=True)
    gpu = Gpu("x", gigabytes << 30, 1e15, 3e12, (9, 0), MACHINES)
    plan = forecast_gpu(gpu, run, REFERENCE)
    assert plan.keeps == keeps
    assert forecast_gpu(replace(gpu, capability=(7, 5)), run, REFERENCE).keeps == ""
    assert forecast_gpu(gpu, RUN, REFERENCE).keeps == ""


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the run is refused, as the forecast says; what is kept takes the same memory, training less time."""
    run = replace(RUN, fused=True, budget_by_gpu=True, fp8=True)
    gpu = Gpu("x", 80 << 30, 1e15, 3e12, (9, 0), MACHINES)
    plain, saved = forecast_gpu(gpu, replace(run, fp8=False), REFERENCE), []
    for speedup in (1.25, 1.25**2):
        monkeypatch.setattr(time_model, "FP8_SPEEDUP", speedup)
        found = forecast_gpu(gpu, run, REFERENCE)
        assert found.keeps == plain.keeps
        saved.append((plain.hours or 0) - (found.hours or 0))
    assert saved[0] > 0
    assert saved[1] / saved[0] == pytest.approx((1 - 1 / 1.25**2) / (1 - 1 / 1.25))  # of training, and nothing else
    found = forecast_gpu(replace(gpu, capability=(8, 0)), run, REFERENCE)
    assert (found.fits, found.hours, found.keeps) == (False, None, "")
    assert "JOB_TRAIN__COMPUTE=fp8" in found.note


def test_other_decoders_keep_more() -> None:
    """Where the job has code for the adapted layers alone, transformers' own keeps more between them."""
    run = replace(RUN, fused=True, budget_by_gpu=True)
    gpu = Gpu("x", 40 << 30, 1e15, 3e12, (9, 0), MACHINES)
    other = replace(REFERENCE, architecture=replace(REFERENCE.architecture, fused=False))
    assert forecast_gpu(gpu, run, REFERENCE).keeps == "activations"
    assert forecast_gpu(gpu, run, other).keeps == "base"


def test_the_job_on_an_h100_is_as_measured() -> None:
    """94 steps on Alpaca and two evaluations: 23 s once all is recorded and 2 x 6.4 s, within a quarter."""
    run = replace(RUN, fused=True, budget_by_gpu=True)
    hours = forecast_gpu(BY_NAME["H100"], run, REFERENCE).hours
    assert hours
    measured = WORK.target_tokens / 14_724 + 2 * 6.4
    assert hours * 3600 - START == pytest.approx(measured, rel=0.25)


def test_figures_say_what_they_rest_on() -> None:
    """What is made of an assumption is an assumption; what is not known is left out, not made up."""
    assert {figure.basis for figure in estimates(RUN)} == {"computed"}
    of_data = {figure.name: figure.basis for figure in estimates(replace(RUN, workload_basis="assumed"))}
    assert of_data["optimizer steps"] == of_data["training"] == of_data["peak in training"] == "assumed"
    assert of_data["base parameters"] == of_data["memory: base"] == of_data["questions"] == "computed"
    of_model = {figure.name: figure.basis for figure in estimates(replace(RUN, setup_basis="assumed"))}
    assert of_model["optimizer steps"] == "computed"
    assert of_model["peak in training"] == of_model["disk"] == "assumed"
    unknown = {figure.name for figure in estimates(replace(RUN, workload=None, questions=None))}
    assert {"peak in training", "checkpoint"} <= unknown
    assert not unknown & {"optimizer steps", "training", "questions", "evaluation, twice"}
    assert list(estimates(replace(RUN, setup=None, workload=None, questions=None))) == []


@pytest.mark.parametrize(("warmup", "noted"), [(93, False), (94, True)])
def test_a_warmup_that_takes_all_steps_is_noted(warmup: int, noted: bool) -> None:  # noqa: FBT001
    """The rate of the last step is the peak if one step less warms up."""
    note = {figure.name: figure.note for figure in estimates(replace(RUN, warmup_steps=warmup))}["optimizer steps"]
    assert ("the learning rate never reaches its peak; set JOB_TRAIN__WARMUP_RATIO=0.1" in note) == noted


def test_the_figures_are_the_formulas() -> None:
    """The parts of the memory are those of the peak; the recipe has its known size."""
    found = {figure.name: figure.value for figure in estimates(RUN)}
    assert found["base parameters"] == ARCHITECTURES["mistralai/Mistral-7B-v0.1"].parameters == 7_241_732_096
    assert found["adapter parameters"] == 41_943_040
    parts = [value for name, value in found.items() if name.startswith("memory: ")]
    assert sum(parts) == found["peak in training"]
    assert (found["optimizer steps"], found["target tokens"]) == (94, 345_932)


def test_the_table_of_gpus_is_sound() -> None:
    """Names once, sizes and rates of the order they have, prices of one GPU."""
    assert len(BY_NAME) == len(GPUS) == 8
    for gpu in GPUS:
        assert 15e9 < gpu.memory_bytes < 152e9
        assert 5e13 < gpu.flops < 1e15
        assert 0.1 < gpu.machines[0].usd_per_gpu < 12


def test_the_classifier_and_the_judge_take_time() -> None:
    """By weights and tokens: in fp32 for the classifier, all weights a question for the judge; none of a server."""
    gpu, weights = BY_NAME["H100"], 10**9
    classifier = screening(1000, 100_000, 40, 10, weights)
    judge = judging(200, 10_000, weights, 2, served=False)
    server = judging(200, 10_000, weights, 2, served=True)

    def more(*auxiliary: AuxiliaryModel) -> float:
        run = replace(RUN, auxiliary=auxiliary)
        return 3600 * ((forecast_gpu(gpu, run, REFERENCE).hours or 0) - (forecast_gpu(gpu, RUN, REFERENCE).hours or 0))

    reached = time_model.UTILISATION * gpu.flops
    rows, answers = (
        2 * weights * 100_000 * 16 / reached,
        2 * weights * 400 / (forecast_time.CORES * forecast_time.LLAMA_CPP_FLOPS),
    )
    assert more(classifier) == pytest.approx(4 * weights / DOWNLOAD_RATE + rows + answers)
    assert more(judge) == pytest.approx(2 * weights / DOWNLOAD_RATE + 200 * 2 * weights / gpu.bandwidth)
    assert more(server) == more(screening(1000, 100_000, 0, 10, None)) == 0
    figures = {one.name: one for one in estimates(replace(RUN, auxiliary=(classifier, server)))}
    assert (figures["safety screen, texts"].value, figures["safety screen, texts"].basis) == (1040, "computed")
    assert (figures["safety screen, tokens"].value, figures["safety screen, tokens"].basis) == (100_400, "assumed")
    assert figures["safety screen"].value == 2 * weights * 100_400
    unknown = judging(200, 10_000, None, 2, served=False)
    assert [one.note.partition("; ")[2] for one in (judge, unknown)] == [
        "equal answers are not judged",
        "the size of its weights is unknown: not in the hours",
    ]
    assert "the server's time is not in the hours" in figures["judge, tokens"].note
    assert "judge" not in figures


@pytest.mark.parametrize(
    ("config", "width", "heads", "expected"),
    [
        ({"torch_dtype": "float16"}, 2, False, 3000 - 800),
        ({"torch_dtype": "float16", "tie_word_embeddings": False}, 2, False, 3000 - 800),
        ({"dtype": "float64", "tie_word_embeddings": False}, 8, True, 3000 - 2 * 800),
        ({"dtype": "bfloat16"}, 2, True, 3000 - 800),  # transformers' default: the output layer is the embedding
        ({}, 4, True, 3000 - 800),
        ({"hidden_size": None}, 4, False, 3000),
        ({"quantization_config": {"quant_method": "gptq"}}, 4, False, None),
    ],
)
def test_the_weights_of_an_auxiliary_model(
    tmp_path: Path, config: dict[str, Any], width: int, *, heads: bool, expected: int | None
) -> None:
    """Of 3,000 in files of this width, all but the tables of 100 tokens; also where the text model is a part."""
    sizes = {"vocab_size": 100, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config), encoding="utf-8")
    assert count_weights(tmp_path, 3000 * width, heads=heads) == expected
    assert count_weights(tmp_path, None, heads=heads) is None
    outer = {name: value for name, value in config.items() if name in {"dtype", "quantization_config"}}
    whole = outer | {"text_config": sizes | {name: value for name, value in config.items() if name not in outer}}
    (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    assert count_weights(tmp_path, 3000 * width, heads=heads) == expected
    assert count_weights(tmp_path / "missing", 3000, heads=heads) is None


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("field", "count"), [("reference", 1), ("validation", 10)])
def test_rows_that_are_only_read_take_time(field: str, count: int, processes: int) -> None:
    """The forward passes over the rows of validations, and of the reference of dpo and kto, shared by all GPUs.

    13 micro-batches of 4,096 tokens each time, or seven of two GPUs; as long as they compute, or read the weights.
    """
    rows = ForwardWork(count=count, rows=100, tokens=50_000, target_tokens=40_000, longest=900)
    plain = replace(RUN, processes=processes)
    with_them = replace(plain, **{field: rows})
    shared = processes * (SCORING_EFFICIENCY if processes > 1 else 1)
    flops = count * time_model.evaluation_flops(REFERENCE, 50_000, 40_000)
    computing = replace(BY_NAME["A100 80GB"], bandwidth=1e20)
    reading = replace(BY_NAME["A100 80GB"], flops=1e30)
    weights = 4.5 * REFERENCE.architecture.linear_parameters
    for gpu, expected in (
        (computing, flops / (time_model.UTILISATION * computing.flops) / shared),
        (reading, count * {1: 13, 2: 7}[processes] * weights / reading.bandwidth / (shared / processes)),
    ):
        before, after = (forecast_gpu(gpu, run, REFERENCE).hours or 0 for run in (plain, with_them))
        assert 3600 * (after - before) == pytest.approx(expected, rel=1e-6)
    shown = {figure.name: figure.value for figure in estimates(with_them)}
    name = {"reference": "reference, once", "validation": "validation, all"}[field]
    assert shown[name] == flops
    assert not any(field in figure.name for figure in estimates(plain))
    if field == "validation":
        assert (shown["validation rows"], shown["validations"]) == (100, 10)


def test_a_first_stage_takes_time() -> None:
    """A first stage is counted with its own start; the base answers once for both."""
    gpu = BY_NAME["H200"]
    alone = forecast_gpu(gpu, RUN, REFERENCE).hours or 0
    both = replace(RUN, first_stage=replace(RUN, download_bytes=0))
    scoring = time_model.evaluation_flops(REFERENCE, RUN.questions.tokens, RUN.questions.reads)  # type: ignore[union-attr]
    first = alone - (scoring / (time_model.UTILISATION * gpu.flops) + SCORING_SECONDS) / 3600
    assert forecast_gpu(gpu, both, REFERENCE).hours == pytest.approx(alone + first, rel=1e-6)
    shown = {figure.name: figure.value for figure in estimates(both)}
    assert shown["optimizer steps, first stage"] == WORK.steps
    longer = replace(both, first_stage=replace(RUN, workload=replace(WORK, longest=10**6, largest_step=10**6)))
    assert not forecast_gpu(gpu, longer, REFERENCE).fits


def test_each_stage_is_planned_as_it_is_trained() -> None:
    """Of sft,dpo the first has tiles and CUDA graphs, and the second neither: the first stage's long row fits."""
    words = ["--data.sft_source=a.jsonl", "--data.source=b.jsonl", "--train.method=sft,dpo"]
    settings, both = load_settings([], {}), load_settings(words, {})
    assert [run_shape._recorded(one) for one in (settings, both, split_stages(both)[0])] == [True, False, True]
    assert [run_shape._tiles(one, REFERENCE) for one in (settings, both, split_stages(both)[0])] == [True, False, True]
    row = Workload(1, 1, 78_500, 78_499, 78_500**2, 78_500, 78_500)
    for tiles in (True, False):
        before = replace(RUN, workload=row, fused=True, tiles=tiles)
        assert forecast_gpu(BY_NAME["L4"], replace(RUN, fused=True, first_stage=before), REFERENCE).fits == tiles
    recorded, not_recorded = (
        forecast_gpu(BY_NAME["H200"], replace(RUN, fused=True, recorded=recorded), REFERENCE).hours or 0
        for recorded in (True, False)
    )
    assert 0 < recorded < not_recorded


LLAMA_70B = replace(REFERENCE, architecture=Architecture(8192, 28672, 80, 64, 8, 128, 32000))


@pytest.mark.parametrize(
    ("gigabytes", "processes", "held"),
    [(80, 1, "gpu"), (30, 2, "sharded"), (30, 1, "host"), (24, 1, "host"), (24, 8, "sharded")],
)
def test_a_model_larger_than_a_gpu_lies_elsewhere(gigabytes: int, processes: int, held: str) -> None:
    """Llama-70B's shape: on the GPU where it fits, else sharded over several, else in main memory; the note says so."""
    gpu = replace(BY_NAME["H100"], memory_bytes=gigabytes * 10**9)
    places = tuple(place for place in memory_model.PLACEMENTS if place != "sharded" or processes > 1)
    run = replace(RUN, setup=LLAMA_70B, placements=places, processes=processes, fused=True, budget=1024)
    found = forecast_gpu(gpu, run, LLAMA_70B)
    assert (found.fits, found.base_held) == (True, held)
    assert ("main memory" in found.note, "sharded" in found.note) == (held == "host", held != "gpu")
    assert not forecast_gpu(gpu, replace(run, placements=("gpu",)), LLAMA_70B).fits or held == "gpu"


def test_another_placement_is_named_where_it_is_better() -> None:
    """Sharded over too few GPUs: how many are enough, and that main memory is. In main memory without need: the GPU."""
    run = replace(RUN, setup=LLAMA_70B, processes=2, fused=True, budget=1024)
    small, large = BY_NAME["L4"], BY_NAME["H200"]
    sharded = forecast_gpu(small, replace(run, placements=("sharded",)), LLAMA_70B)
    assert not sharded.fits
    (enough,) = re.findall(r"JOB_RUN__PROCESSES=(\d+)", sharded.note)
    assert forecast_gpu(small, replace(run, placements=("sharded",), processes=int(enough)), LLAMA_70B).fits
    assert "JOB_MODEL__PLACEMENT=host fits" in sharded.note
    host = forecast_gpu(large, replace(run, placements=("host",)), LLAMA_70B)
    assert "JOB_MODEL__PLACEMENT=gpu" in host.note
    assert "sharded" not in host.note


def test_hours_that_go_into_reading_the_unquantized_base() -> None:
    """They are named where they are most of a short run, and not where it is not read."""
    gpu = replace(BY_NAME["H200"], flops=1e18, bandwidth=1e15)
    read = forecast_gpu(gpu, replace(RUN, full_precision=True, fused=True, download_bytes=0), REFERENCE)
    left_out = forecast_gpu(gpu, replace(RUN, full_precision=False, fused=True, download_bytes=0), REFERENCE)
    assert read.hours is not None
    assert left_out.hours is not None
    assert f"{read.hours - left_out.hours:.2f} of the hours are for reading" in read.note
    assert not left_out.note


def test_the_memory_of_a_base_whose_placement_is_set() -> None:
    """The figure of the base is what a GPU holds there, and its note says where the rest lies."""
    run = replace(RUN, setup=LLAMA_70B, processes=2)
    on_gpu, sharded, host = (
        {figure.name: figure for figure in estimates(replace(run, placements=(place,)))}["memory: base"]
        for place in memory_model.PLACEMENTS
    )
    assert on_gpu.value > sharded.value > host.value
    assert [("sharded over 2" in one.note, "main memory" in one.note) for one in (on_gpu, sharded, host)] == [
        (False, False),
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(("processes", "over"), [(1, 1), (2, 2), (3, 3), (12, 1)])
def test_a_row_that_does_not_fit_on_one_gpu(processes: int, over: int) -> None:
    """It fits on several that divide it, and the note says so; on one it says how many would do. 12 share no heads."""
    gpu = BY_NAME["A100 80GB"]
    usable = memory_model.usable_bytes(gpu.memory_bytes)
    alone = memory_model.largest_budget(lambda tokens: row_memory(REFERENCE, tokens).total, usable, 10**7)
    tokens = alone + alone // 10
    row = Workload(1, 1, tokens, tokens - 1, tokens**2, tokens, tokens)
    run = replace(RUN, workload=row, fused=True, tiles=True, divide=True, processes=processes)
    found = forecast_gpu(gpu, run, REFERENCE)
    assert (found.fits, found.divided_over) == (over > 1, over)
    if over > 1:
        assert f"the longest row is divided over the {over} GPUs" in found.note
        divided = {figure.name: figure for figure in estimates(run)}["memory: activations, divided"]
        whole = {figure.name: figure for figure in estimates(run)}["memory: activations"]
        assert divided.value < whole.value
        ample = replace(gpu, memory_bytes=10**13)
        alone_there = per_second(replace(run, processes=1), REFERENCE, ample)
        assert per_second(run, REFERENCE, gpu) == pytest.approx(over * LONG_ROW_EFFICIENCY * alone_there)
    else:
        assert "2 of these GPUs compute the longest row together (JOB_RUN__PROCESSES=2)" in found.note
    off = forecast_gpu(gpu, replace(run, divide=False), REFERENCE)
    assert not off.fits
    assert "together" not in off.note
    short = replace(run, workload=replace(row, longest=alone, largest_step=alone))
    assert forecast_gpu(gpu, short, REFERENCE).divided_over == 1


def test_weights_that_come_over_a_link_take_their_time() -> None:
    """Hours grow by the bytes of all layers, twice a micro-batch, where the link is what is slow."""
    gpu = replace(BY_NAME["H200"], flops=1e18, bandwidth=1e15)
    run = replace(RUN, setup=LLAMA_70B, fused=True)
    here, there = (forecast_gpu(gpu, replace(run, placements=(place,)), LLAMA_70B).hours for place in ("gpu", "host"))
    assert here is not None
    assert there is not None
    once = memory_model.packed_bytes(LLAMA_70B) / time_model.LINK_BANDWIDTH["host"]
    assert 3600 * (there - here) > 2 * WORK.steps * once


@pytest.mark.parametrize(
    ("gpu", "tokens", "offloaded"), [("L4", 78_500, True), ("A100 80GB", 343_000, True), ("H200", 64_000, False)]
)
def test_a_long_row_fits_in_tiles(gpu: str, tokens: int, *, offloaded: bool) -> None:
    """With its activations in main memory, which the plan says with how much; as a whole it would not fit on most."""
    row = Workload(1, 1, tokens, tokens - 1, tokens**2, tokens, tokens)
    run = replace(RUN, workload=row, fused=True, tiles=True)
    plan = forecast_gpu(BY_NAME[gpu], run, REFERENCE)
    assert plan.fits
    assert ("activations of the longest row are kept in main memory" in plan.note) == offloaded
    assert (
        "only GPUs from Ampere on compute rows of this length in tiles"
        in forecast_gpu(BY_NAME["T4"], run, REFERENCE).note
    )
    host = {figure.name: figure.value for figure in estimates(run)}["main memory: activations"]
    assert host == memory_model.long_row_host_bytes(REFERENCE, tokens, kept_attention=False)
    assert forecast_gpu(BY_NAME[gpu], replace(run, tiles=False), REFERENCE).fits == (not offloaded)
    if offloaded:
        kept_there = forecast_gpu(BY_NAME[gpu], replace(run, offload=False), REFERENCE)
        assert not kept_there.fits
        assert "main memory" not in kept_there.note


def test_a_long_answer_is_foretold() -> None:
    """Its cache counts: a card that trains and scores the run may not hold one answer, and the figures say so."""
    card = replace(BY_NAME["L4"], memory_bytes=12 << 30)
    answering = replace(RUN, answered=(2_000, 60_000))
    assert forecast_gpu(card, RUN, REFERENCE).fits
    plan = forecast_gpu(card, answering, REFERENCE)
    cache = 2 * 32 * 8 * 128 * 2 * 60_000  # keys and values, layers, their heads, width, bytes
    assert (plan.fits, plan.budget_recomputing, plan.hours) == (False, 0, None)
    assert f"{cache / 2**30:.1f} GiB of it for its cache: lower JOB_EVAL__PROMPTS_MAX_NEW_TOKENS" in plan.note
    assert forecast_gpu(BY_NAME["L4"], answering, REFERENCE).fits
    assert forecast_gpu(card, replace(RUN, answered=(2_000, 2_500)), REFERENCE) == forecast_gpu(card, RUN, REFERENCE)
    figures = {figure.name: figure for figure in estimates(answering)}
    assert cache < figures["peak, answers"].value < figures["memory: base"].value + 2 * cache
    assert "peak, answers" not in {figure.name for figure in estimates(RUN)}


def test_what_is_known_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest of prompts and tasks with its answer; no question is longer than JOB_TRAIN__MAX_LENGTH."""
    monkeypatch.setenv("JOB_EVAL__PROMPTS", "3")
    monkeypatch.setenv("JOB_EVAL__PROMPTS_MAX_NEW_TOKENS", "100")
    monkeypatch.setenv("JOB_DATA__VALIDATION", "0.1")
    own = load_settings(["--train.max-length=512"])
    asked = TaskTokens(1, 700, 200, 500, 700)
    seen = Preflight([], None, None, None, None, None, None, asked, prompts=(40, 30))
    assert run_shape._answered(own, seen) == (312, 512)
    assert run_shape._answered(own, replace(seen, questions=replace(asked, prompt=2, answered=9))) == (40, 140)
    assert run_shape._answered(own, replace(seen, questions=None, prompts=())) == (0, 100)


def per_second(run: RunShape, setup: memory_model.Setup, gpu: Gpu) -> float:
    """Target tokens a second in training as forecast: from the hours with and without twice the work."""
    assert run.workload is not None
    work = run.workload
    twice = replace(work, steps=2 * work.steps, tokens=2 * work.tokens, squares=2 * work.squares)
    once, again = (forecast_gpu(gpu, replace(run, workload=one), setup).hours or 0 for one in (work, twice))
    return work.target_tokens / (3600 * (again - once))


LONG = Workload(1, 1, 64_000, 63_999, 64_000**2, 64_000, 64_000)
OF_4096 = Workload(1, 8, 8 * 4096, 8 * 4095, 8 * 4096**2, 4096, 8 * 4096)


@pytest.mark.parametrize(
    ("changes", "setup", "measured", "apart"),
    [
        ({"workload": WORK}, REFERENCE, 16_000, 0.1),
        ({"workload": OF_4096}, REFERENCE, 14_516, 0.1),
        ({"workload": WORK, "fp8": True}, REFERENCE, 23_247, 0.1),
        ({"workload": LONG, "tiles": True}, REFERENCE, 4_617, 0.15),
        ({"workload": WORK, "placements": ("host",), "budget": 4096, "budget_by_gpu": False}, LLAMA_70B, 548, 0.1),
        (
            {"workload": WORK, "placements": ("sharded",), "processes": 2, "budget": 2048, "budget_by_gpu": False},
            LLAMA_70B,
            1_692,
            0.2,
        ),
    ],
)
def test_speeds_are_as_measured_on_an_h200(
    changes: dict[str, Any], setup: memory_model.Setup, measured: float, apart: float
) -> None:
    """Target tokens a second at Mistral-7B's and Llama-70B's shape: short and long rows, FP8, each placement."""
    run = replace(RUN, setup=setup, fused=True, **{"budget_by_gpu": True, **changes})
    assert per_second(run, setup, BY_NAME["H200"]) == pytest.approx(measured, rel=apart)


def test_an_evaluation_is_as_measured_on_an_h200() -> None:
    """1,087 questions a second of ARC-Easy, beside what an evaluation takes in any case."""
    run = replace(RUN, fused=True, budget_by_gpu=True)
    once, again = (
        forecast_gpu(BY_NAME["H200"], replace(run, adapter_copies=copies), REFERENCE).hours or 0 for copies in (0, 1)
    )
    assert 2376 / (3600 * (again - once) - SCORING_SECONDS) == pytest.approx(1_087, rel=0.05)


def test_narrow_experts_are_slower() -> None:
    """Of a mixture like Qwen3-30B-A3B; one with experts as wide as Mixtral's trains like a dense model of any width."""
    shape = REFERENCE.architecture
    run = replace(RUN, fused=True, budget_by_gpu=True)

    def reached(width: int, experts: int = 64, chosen: int = 8) -> float:
        mixture = replace(shape, intermediate=chosen * width, experts=experts, chosen=chosen)
        setup = replace(REFERENCE, architecture=mixture, targets=tuple(mixture.linear))
        flops = time_model.training_flops(replace(setup, recompute=False), WORK.tokens, WORK.squares)
        gpu = replace(BY_NAME["H200"], memory_bytes=10**13, bandwidth=1e18)
        return flops / WORK.target_tokens * per_second(replace(run, setup=setup), setup, gpu) / gpu.flops

    assert reached(768) == pytest.approx(time_model.FINE_EXPERTS_UTILISATION, rel=1e-3)
    assert reached(14_336) == pytest.approx(time_model.FUSED_UTILISATION, rel=1e-3)
    assert reached(768, experts=0, chosen=1) == pytest.approx(time_model.FUSED_UTILISATION, rel=1e-3)


def test_weights_are_read_for_each_micro_batch() -> None:
    """Where that takes longest: for the forward pass, recomputation and the backward pass; in an evaluation once."""
    gpu = replace(BY_NAME["A100 80GB"], flops=1e30)
    reading = 4.5 * REFERENCE.architecture.linear_parameters / gpu.bandwidth
    questions = TaskTokens(1, 30_000, 100)
    for steps, micro_batches in ((94, 94), (1, 86)):  # of 348,932 tokens in all, 4,096 at a time
        run = replace(RUN, workload=replace(WORK, steps=steps), questions=questions)
        expected = (3 * micro_batches + EVALUATIONS * 4) * reading + START + EVALUATIONS * SCORING_SECONDS
        assert 3600 * (forecast_gpu(gpu, run, REFERENCE).hours or 0) == pytest.approx(expected)


def test_several_gpus_share_training_and_scoring() -> None:
    """As fast as measured with two; the rest takes as long; dollars are those of all, unless the user's price is."""
    gpu = BY_NAME["H200"]
    run = replace(RUN, fused=True, budget_by_gpu=True, download_bytes=10**11)
    two = replace(run, processes=2, processes_here=2)
    assert per_second(two, REFERENCE, gpu) == pytest.approx(2 * 0.94 * per_second(run, REFERENCE, gpu), rel=0.01)
    alone, shared = (forecast_gpu(gpu, one, REFERENCE) for one in (run, two))
    assert alone.hours is not None
    assert shared.hours is not None
    scoring = time_model.evaluation_flops(REFERENCE, RUN.questions.tokens, RUN.questions.reads)  # type: ignore[union-attr]
    evaluations = EVALUATIONS * scoring / (time_model.SCORING_UTILISATION * gpu.flops)
    training = WORK.target_tokens / per_second(run, REFERENCE, gpu)
    faster = training * (1 - 1 / 1.88) + evaluations * (1 - 1 / (2 * SCORING_EFFICIENCY))
    assert 3600 * (alone.hours - shared.hours) == pytest.approx(faster, rel=0.02)
    assert (alone.gpus, shared.gpus) == (1, 2)
    assert shared.usd == pytest.approx(2 * gpu.machines[0].usd_per_gpu * shared.hours)
    assert forecast_gpu(gpu, replace(two, usd_per_hour=3.0), REFERENCE).usd == pytest.approx(3 * shared.hours)


@given(st.integers(1, 64), st.integers(1, 512), st.floats(10, 1e6))
def test_more_gpus_never_make_more_than_they_are(gpus: int, rows: int, tokens: float) -> None:
    """No more parts than rows or GPUs; what is lost grows with fewer tokens for each, by the two measured points."""
    found = divide(gpus, step_rows=rows, step_tokens=tokens, rows_divided=False)
    assert 1 <= found.parts <= min(gpus, rows)
    assert 0 < found.training <= 1
    assert found.training * found.parts < gpus or gpus == 1
    assert divide(gpus, step_rows=rows, step_tokens=2 * tokens, rows_divided=False).training >= found.training
    assert [training_efficiency(at) for at, _ in TRAINING_EFFICIENCY] == pytest.approx([0.94, 0.96])


def test_efficiency_between_and_beyond_the_measured_points() -> None:
    """Lost time as a share: the mean of both halfway by 1 / tokens, twice as much with half the tokens, never less."""
    few, many = 1 / 0.94 - 1, 1 / 0.96 - 1
    halfway = 2 / (1 / 1_900 + 1 / 7_500)
    found = [1 / training_efficiency(tokens) - 1 for tokens in (950, halfway, 1e9)]
    assert found == pytest.approx([2 * few, (few + many) / 2, many])


def test_a_divided_row_is_computed_by_all() -> None:
    """Where the longest row does not fit on one GPU, it takes all of them, whatever the number of rows."""
    assert divide(4, step_rows=1, step_tokens=1e6, rows_divided=True).parts == 4
    assert divide(4, step_rows=1, step_tokens=1e6, rows_divided=True).training == LONG_ROW_EFFICIENCY
    assert divide(4, step_rows=1, step_tokens=1e6, rows_divided=False).parts == 1
    assert divide(1, step_rows=1, step_tokens=1, rows_divided=False).training == 1


def host_run(processes: int = 1) -> RunShape:
    """A run of Llama-70B with its base in main memory: 32.9 GiB of packed weights for each process."""
    return replace(RUN, setup=LLAMA_70B, placements=("host",), processes=processes, processes_here=processes)


def test_a_base_in_main_memory_is_forecast_on_a_machine_that_has_it() -> None:
    """The smallest has 16 GiB: the price is that of a larger one, of as many GPUs as the run has on a machine."""
    small = forecast_gpu(BY_NAME["L4"], RUN, REFERENCE)
    assert (small.machine, small.main_memory_needed, small.main_memory_enough) == ("g6.xlarge", 0, True)
    alone = forecast_gpu(BY_NAME["L4"], host_run(), LLAMA_70B)
    assert (alone.machine, alone.usd_per_hour, alone.main_memory_enough) == ("g6.4xlarge", 1.323, True)
    assert alone.main_memory_needed == pytest.approx(memory_model.packed_bytes(LLAMA_70B) / 0.8, rel=1e-6)
    two = forecast_gpu(BY_NAME["L4"], host_run(2), LLAMA_70B)
    assert (two.machine, two.main_memory_enough) == ("g6.12xlarge / 2", True)
    assert two.usd == pytest.approx((two.hours or 0) * 4.602 / 2)
    assert two.main_memory_needed == pytest.approx(2 * alone.main_memory_needed, rel=1e-6)
    assert forecast_gpu(BY_NAME["T4"], host_run(3), LLAMA_70B).machine == "g4dn.12xlarge x 3/4"  # 144 of its 192 GiB
    many = forecast_gpu(BY_NAME["H100"], host_run(16), LLAMA_70B)
    assert (many.machine, many.main_memory_enough) == ("none with 16 GPUs", False)


def test_a_machine_of_unknown_main_memory_is_not_known_to_have_enough() -> None:
    """That of the user's price is unknown too; where nothing is kept in main memory, it makes no difference."""
    unknown = replace(BY_NAME["L4"], machines=MACHINES)
    for gpu, run in ((unknown, host_run()), (BY_NAME["L4"], replace(host_run(), usd_per_hour=1.0))):
        found = forecast_gpu(gpu, run, LLAMA_70B)
        assert found.fits
        assert not found.main_memory_enough
    assert forecast_gpu(unknown, RUN, REFERENCE).main_memory_enough


def test_activations_of_long_rows_count_where_they_must_be_in_main_memory() -> None:
    """Not where they are put there only to save time, and would fit on the GPU as well."""
    work = Workload(10, 10, 600_000, 600_000, 10 * 60_000**2, 60_000, 60_000)
    run = replace(RUN, workload=work, fused=True, tiles=True, budget_by_gpu=True, questions=None)
    tight, ample = (
        forecast_gpu(replace(BY_NAME["L4"], memory_bytes=memory), run, REFERENCE) for memory in (22 << 30, 90 << 30)
    )
    assert (ample.fits, ample.main_memory_needed) == (True, 0)
    assert tight.fits
    assert tight.main_memory_needed > memory_model.long_row_host_bytes(REFERENCE, 60_000, kept_attention=False)


def test_loading_takes_longer_for_a_larger_base() -> None:
    """By the bytes of its files, apart from what else a run of Llama-70B takes longer for."""
    without = replace(RUN, trains=False, questions=TaskTokens(1, 1, 1))
    small, large = (
        forecast_gpu(BY_NAME["H200"], replace(without, setup=setup), setup).hours or 0
        for setup in (REFERENCE, LLAMA_70B)
    )
    more = LLAMA_70B.architecture.parameters - REFERENCE.architecture.parameters
    assert 3600 * (large - small) == pytest.approx(2 * more / LOADING_RATE, rel=1e-3)
    assert 3600 * large > 180


def test_a_machine_that_may_lack_main_memory_is_not_recommended() -> None:
    """It is the cheapest and the fastest in this table, and the one of a known machine is called so."""
    known = forecast_gpu(BY_NAME["L4"], host_run(), LLAMA_70B)
    unknown = replace(known, name="X", hours=0.01, usd=0.01, main_memory_enough=False)
    text = as_table(Plan("a run", CHECKED, (), (unknown, known), None, ()))
    assert "cheapest: L4," in text
    assert "fastest: L4," in text
    assert re.search(r"^X .* yes, with 41\.1 GiB of main memory ", text, re.MULTILINE)
    assert "cheapest" not in as_table(Plan("a run", CHECKED, (), (unknown,), None, ()))


def test_a_long_note_of_a_gpu_is_folded() -> None:
    """Under its beginning, like all other text of the plan, so that a terminal does not break it anywhere."""
    noted = replace(forecast_gpu(BY_NAME["L4"], RUN, REFERENCE), name="T4", note="slow " * 40)
    lines = as_table(Plan("a run", CHECKED, (), (noted,), None, ())).splitlines()
    first = lines.index(next(line for line in lines if line.startswith("T4: ")))
    assert lines[first + 1].startswith("    slow")
    assert max(map(len, lines[first : first + 2])) <= 118


def test_results_in_a_folder_take_disk() -> None:
    """Checkpoints, one more than are kept; or what follows training beside those that are kept. Nothing in a bucket."""

    def output(run: RunShape, *words: str) -> int | None:
        return plan_module._output_bytes(load_settings(list(words), {}), run)

    checkpoint, adapter = checkpoint_bytes(REFERENCE.adapter, REFERENCE.optimizer), 4 * REFERENCE.adapter
    assert output(RUN) == output(replace(RUN, workload=None)) == 3 * checkpoint + OTHER_OUTPUT_BYTES
    assert output(RUN, "--checkpoint.every_steps=50") == 2 * checkpoint + adapter + OTHER_OUTPUT_BYTES
    exports = 2 * REFERENCE.adapter + EXPORT.format_bytes("gguf:q8_0")
    assert output(EXPORT) == adapter + exports + OTHER_OUTPUT_BYTES
    assert output(EXPORT, "--export.formats=merged") == output(EXPORT) + EXPORT.format_bytes("merged")  # type: ignore[operator]
    assert output(replace(RUN, first_stage=RUN)) == output(RUN) + 2 * checkpoint + adapter  # type: ignore[operator]
    assert output(RUN, "--model.keep_quantized=store") == output(RUN) + memory_model.weight_bytes(REFERENCE)  # type: ignore[operator]
    assert output(RUN, "--run.output=s3://bucket/runs") is output(replace(RUN, setup=None)) is None


def test_the_disk_of_the_results_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its own has a line of its own; one that the temporary files share needs both sums."""
    large = DiskSpace(1, 1 << 40, 1 << 40, 1 << 40)
    spaces, needs, need = {"mine": large, "cache": replace(large, device=2)}, list[int](), 1000
    monkeypatch.setattr(plan_module, "disk_space", lambda folder: spaces[folder.name])

    def check(folder: Path, need: int) -> None:
        needs.append(need)
        if spaces[folder.name].free < need:
            raise Unreachable("too little; name another one by JOB_STORAGE__CACHE")

    monkeypatch.setattr(plan_module, "check_disk", check)
    settings = load_settings(["--run.output=/out", "--run.id=mine", "--storage.cache=/cache"], {})
    (disk,) = plan_module._disks(settings, RUN, None)
    assert "results" not in disk.what
    disk, results = plan_module._disks(settings, RUN, need)
    assert (disk.name, disk.state, results.name, results.state) == ("disk", "ok", "output disk", "ok")
    spaces["mine"] = replace(large, writable=need - 1)
    _, results = plan_module._disks(settings, RUN, need)
    assert (results.state, results.error) == ("note", None)
    assert all(words in results.what for words in ("JOB_RUN__OUTPUT: about", "/out/mine has 999 B", "KEEP=1"))
    spaces["cache"] = large
    (disk,) = plan_module._disks(settings, RUN, need)
    assert "1000 B of them for results in /out/mine" in disk.what
    assert needs == [disk_bytes(RUN)] * 3 + [disk_bytes(RUN) + need]
    spaces["mine"] = spaces["cache"] = replace(large, free=disk_bytes(RUN) + need - 1)
    (disk,) = plan_module._disks(settings, RUN, need)
    assert disk.state == "note"
    assert "JOB_STORAGE__CACHE, or by JOB_RUN__OUTPUT, 1000 B of them for results" in disk.what
