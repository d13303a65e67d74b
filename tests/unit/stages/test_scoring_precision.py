"""The precision in which questions are scored: the choice for a GPU, tested on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from job.distributed.processes import ALONE, Alone
from job.distributed.ranks import Place
from job.errors import Preempted
from job.evaluation import scorer
from job.model.fused import precise_forward, scoring_decoder
from job.model.fused.scoring_decoder import HeadSizes, TorchOperations, checked_attention
from job.model.lora import add_adapter
from job.model.model_record import describe_model
from job.model.packed_attention import NAME, use
from job.model.published_names import PublishedNames
from job.model.quantized_cache.layout import CachedBase
from job.records import PEFT, Evaluated, ExecutionPlan, FullPrecision, Packing, ScoringPrecision
from job.settings.load import load_settings
from job.settings.schema import Eval
from job.stages import full_precision, scoring_precision
from job.stages.full_precision import evaluate_bases
from job.stages.handoff import Loaded
from job.stages.scoring_precision import agree_on_attention, choose_precision
from job.storage.local import LocalStore
from job.storage.open import ObjectStore
from tests.attempts import make_attempt, opened_attempt
from tests.helpers import (
    LINEAR,
    arc_rows,
    load_plain,
    make_base,
    make_examples,
    make_model,
    read_jsonl,
    write_jsonl,
)
from tests.unit.stages.example_sources import example_sources
from tests.wrapped_store import WrappedStore

PRECISE = ScoringPrecision("fp16", "fp32", "nearer to fp32 than bf16")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bf16, and questions."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "base").mkdir()
    make_base(folder / "base")
    AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(folder / "base")
    write_jsonl(folder / "questions.jsonl", arc_rows(12))
    return folder


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device alone does not keep questions from being scored in fp16."""
    monkeypatch.setattr(scoring_precision, "_on_gpu", lambda _model: True)


def loaded_base(
    world: Path, dtype: torch.dtype = torch.bfloat16, quantization: str = "nf4", factor: float = 1.0
) -> Loaded:
    """As an attempt has it in memory; `factor` makes what a layer computes so many times larger."""
    model = make_model(world / "base", quantization=quantization, dtype=dtype)
    if factor > 1:
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.mul_(factor)
    use(model.get_base_model(), NAME)
    record = describe_model(model, name="base", revision=None, sha256="0" * 64)
    plan = ExecutionPlan(kept_base=False, kept_activations=True, recorded=False, reason="a CPU", forward=PEFT)
    return Loaded(model, record, 512, plan, CachedBase(), Packing(packed=True, reason=""), PublishedNames(""))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_sharded_base_is_tried_too(world: Path, tmp_path: Path) -> None:
    """With all processes, which have its weights together."""
    base = load_plain(world / "base", quantization="nf4", dtype=torch.bfloat16, placement="sharded", group=ALONE)
    how: dict[str, Any] = {"rank": 16, "alpha": 16, "dropout": 0.0, "target_modules": LINEAR, "seed": 1}
    loaded = replace(loaded_base(world), model=add_adapter(base, **how))
    attempt = make_attempt(tmp_path)
    wanted = load_settings([f"--model.id={world / 'base'}", "--eval.batch_tokens=512"], {}).eval
    sources = replace(example_sources(world), examples=make_examples(6))  # type: ignore[arg-type]
    assert choose_precision(attempt, wanted, sources, loaded, None) == PRECISE


def run(
    world: Path,
    runs: Path,
    *words: str,
    through: ObjectStore | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str = "nf4",
    factor: float = 1.0,
) -> Evaluated:
    """The evaluation of the bases of one run."""
    own = [f"--model.id={world / 'base'}", "--eval.batch_tokens=512", f"--run.output={runs}", "--run.id=one"]
    settings = load_settings([*own, *words], {})
    loaded = loaded_base(world, dtype, quantization, factor)
    sources = replace(example_sources(world), examples=make_examples(6))  # type: ignore[arg-type]
    with opened_attempt(runs / "one", through) as attempt:
        found = evaluate_bases(attempt, settings, sources, loaded)
    assert found is not None
    return found


def likelihoods(runs: Path, sides: tuple[str, ...] = ("original", "base")) -> torch.Tensor:
    """All log-likelihoods of these bases."""
    files = [runs / f"one/artifacts/evaluation/arc_easy.{side}.jsonl" for side in sides]
    return torch.tensor([value for file in files for row in read_jsonl(file) for value in row["log_likelihoods"]])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_both_bases_are_scored_in_fp16_nearer_to_fp32(world: Path, tmp_path: Path) -> None:
    """And killed after the original base was scored, a restart writes the same bytes."""
    found = run(world, tmp_path / "auto")
    assert found.precision == PRECISE
    assert found.full_precision is not None
    assert found.full_precision.dtype == "fp16"
    as_trained = run(world, tmp_path / "model", "--eval.precision=model")
    assert as_trained.precision == ScoringPrecision("bf16", "bf16", "JOB_EVAL__PRECISION is model")
    assert run(world, tmp_path / "exact", dtype=torch.float32).precision == ScoringPrecision(
        "fp32", "fp32", "the model computes in fp32"
    )
    ours, trained, exact = (likelihoods(tmp_path / name) for name in ("auto", "model", "exact"))
    assert 0 < (ours - exact).abs().max() < 0.25 * (trained - exact).abs().max()

    def end(_verb: str, key: str) -> None:
        if key.endswith("arc_easy.base.jsonl"):
            raise Preempted("after the original")

    with pytest.raises(Preempted):
        run(world, tmp_path / "cut", through=WrappedStore(LocalStore(tmp_path / "cut/one"), before=end))
    assert run(world, tmp_path / "cut") == found
    assert torch.equal(likelihoods(tmp_path / "cut"), ours)
    # On a machine that scores in bf16, what an earlier attempt scored in fp16 is scored again.
    (tmp_path / "cut/one/stages/evaluate-base.json").unlink(missing_ok=True)
    assert run(world, tmp_path / "cut", "--eval.precision=model").full_precision == as_trained.full_precision


@pytest.mark.usefixtures("as_on_a_gpu")
def test_numbers_too_large_for_fp16(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that has them is scored as it is trained. If only questions bring them up, these are scored in fp32."""
    large: dict[str, Any] = {"quantization": "none", "factor": 2.0**15}
    trained = run(world, tmp_path / "trained", **large)
    assert trained.precision == ScoringPrecision("bf16", "bf16", "activations of the base are too large for fp16")
    weights = run(world, tmp_path / "weights", quantization="none", factor=1e8).precision
    assert weights == ScoringPrecision("bf16", "bf16", "weights of the base are too large for fp16")
    monkeypatch.setattr(scoring_precision, "_too_large", lambda *_: "")
    warnings: list[str] = []
    # Not what is printed: where the log goes, and from which level on, depends on the tests before.
    logger = SimpleNamespace(warning=lambda event, **_: warnings.append(event))
    monkeypatch.setattr(scorer, "get_logger", lambda: logger)
    assert run(world, tmp_path / "rescued", **large).precision == PRECISE
    assert any("scored in fp32" in warning for warning in warnings)
    run(world, tmp_path / "exact", **large, dtype=torch.float32)
    rescued, exact = (likelihoods(tmp_path / name, ("base",)) for name in ("rescued", "exact"))
    assert torch.allclose(rescued, exact, rtol=1e-4)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"packing": Packing(packed=False, reason="")}, "sequences are not packed"),
        ({"precision": "model"}, "JOB_EVAL__PRECISION is model"),
    ],
)
def test_a_base_that_was_scored_in_fp16_is_scored_again_where_the_adapter_cannot_be(
    world: Path, change: dict[str, Any], why: str
) -> None:
    """And only then."""
    wanted = Eval(**{"precision": "auto"} | {name: value for name, value in change.items() if name == "precision"})
    given = {name: value for name, value in change.items() if name == "packing"}
    loaded = loaded_base(world)
    base = Evaluated({}, [], precision=PRECISE)
    assert scoring_precision.other_precision(base, Eval(), loaded) == ""
    assert scoring_precision.other_precision(base, wanted, replace(loaded, **given)).endswith(why)
    for other in (None, ScoringPrecision("bf16", "bf16", "")):
        assert scoring_precision.other_precision(replace(base, precision=other), wanted, loaded) == ""


def test_what_a_machine_of_another_kind_scored_is_scored_again(world: Path) -> None:
    """The base by a CPU in fp32, and the original one on a GPU that has no bf16, all in fp16."""
    other = ScoringPrecision("fp32", "fp32", "fp16 is slow on a CPU")
    why = scoring_precision.other_precision(Evaluated({}, [], precision=other), Eval(), loaded_base(world))
    assert why == "the base was scored in fp32, and the adapter would be in bf16 here"
    scores: Any = {"arc_easy": None}
    for before in (None, ScoringPrecision("fp16", "fp16", "")):
        known = Evaluated({}, [], full_precision=FullPrecision("fp16", scores), precision=before)
        assert full_precision._scored_otherwise(known, PRECISE)
        assert not full_precision._scored_otherwise(known, ScoringPrecision("fp16", "fp16", "another reason"))


class Two(Alone):
    """One of two processes; whether Triton's attention fails its test in the other one."""

    place = Place(0, 2, 0, 2)

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def gather(self, what: str, value: Any) -> list[Any]:
        """Of both."""
        return [value, self.fails]


def test_attention_of_scoring_is_the_same_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's fails its test in one of them, all score by torch's: a score depends on no process."""
    heads, operations, cpu = HeadSizes(4, 2, 32, windowed=False), TorchOperations(1e4), torch.device("cpu")
    monkeypatch.setattr(scoring_decoder, "_TORCH_IN_ALL", set())
    monkeypatch.setattr(scoring_decoder, "attention_fails", lambda *_: False)
    monkeypatch.setattr(precise_forward, "tested_attention", lambda *_: (heads, False))
    monkeypatch.setattr(scoring_precision, "why_as_trained", lambda *_: "")
    monkeypatch.setattr(scoring_precision, "fast_kernels", lambda *_: (None, "triton"))
    loaded: Any = SimpleNamespace(model=SimpleNamespace(device=cpu))
    for fails in (False, True):
        with capture_logs() as lines:
            agree_on_attention(Two(fails=fails), Eval(), loaded)
        found: Any = checked_attention(operations, heads, cpu)
        assert (found.__self__ is operations, len(lines)) == (not fails, int(fails))
    agree_on_attention(ALONE, Eval(), loaded)
