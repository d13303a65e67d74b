"""The export stage: what is made, scored and published, and what a restart does again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from job.common.hashing import hash_file
from job.data.batch_plan import epoch_order
from job.data.calibration import hash_rows
from job.errors import DataError, Preempted, SettingsError, TrainingFailed, Unreachable
from job.export import fp8
from job.export.formats import DERIVED, DerivedInputs
from job.export.merge_plan import Candidates
from job.export.quantizable import CannotMake
from job.model.adapter_files import load_adapter, save_adapter
from job.model.model_record import describe_model
from job.model.packed_attention import NAME, use
from job.model.published_names import PublishedNames
from job.model.quantized_cache.layout import CachedBase
from job.records import PEFT, Example, ExecutionPlan, Exported, Packing, QuantizationRecord, ScoringPrecision, Trained
from job.runs.attempt import Attempt
from job.settings.load import Settings, load_settings
from job.stages.export import export
from job.stages.export_check import check_export
from job.stages.handoff import Loaded, Sources
from job.storage.local import LocalStore
from job.storage.open import ObjectStore
from tests.attempts import opened_attempt
from tests.example_run import TRAINING
from tests.helpers import arc_rows, fill_adapter, make_base, make_model, read_jsonl, write_jsonl
from tests.unit.stages.example_sources import example_sources
from tests.wrapped_store import WrappedStore

FOLDER = "artifacts/export/merged/"


def check(attempt: Attempt, settings: Settings, original: Path, loaded: Loaded) -> Candidates:
    """`check_export` by the settings of a run."""
    return check_export(attempt, settings.export, settings.gate.on, original, loaded).merges


@dataclass(frozen=True)
class World:
    """A base in bf16, an adapter that was published, and the questions."""

    folder: Path

    def settings(self, *words: str) -> Settings:
        """Of a run that exports."""
        return load_settings(
            [f"--model.id={self.folder / 'base'}", "--export.formats=merged", "--eval.batch_tokens=512", *words], {}
        )

    def loaded(self) -> Loaded:
        """The quantized base with a new adapter, as an attempt has it in memory."""
        model = make_model(self.folder / "base", quantization="nf4")
        use(model.get_base_model(), NAME)
        record = describe_model(model, name="base", revision=None, sha256="0" * 64)
        plan = ExecutionPlan(kept_base=False, kept_activations=True, recorded=False, reason="a test", forward=PEFT)
        return Loaded(model, record, 512, plan, CachedBase(), Packing(packed=True, reason=""), PublishedNames(""))

    def sources(self, *, original: bool = True) -> Sources:
        """What was pulled, with the base's own files or without."""
        sources = example_sources(self.folder)
        return sources if original else replace(sources, original=None)

    def trained(self, store: ObjectStore) -> Trained:
        """Publishes an adapter into the store."""
        from job.records import Artifact

        files = []
        for path in sorted((self.folder / "adapter").glob("adapter_*")):
            key = f"artifacts/adapter/{path.name}"
            store.upload(path, key)
            files.append(Artifact(key, path.stat().st_size, hash_file(path)))
        return Trained(TRAINING, files)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Written once."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "base").mkdir()
    make_base(folder / "base")
    AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(folder / "base")
    write_jsonl(folder / "questions.jsonl", arc_rows(12))
    model = fill_adapter(make_model(folder / "base", quantization="nf4"), scale=0.1)
    save_adapter(model, folder / "adapter", base="org/base", revision=None)
    return World(folder)


def run(world: World, folder: Path, *words: str, original: bool = True) -> Exported:
    """The stage, undisturbed."""
    with opened_attempt(folder) as attempt:
        trained = world.trained(attempt.store)
        found = export(attempt, world.settings(*words), world.sources(original=original), world.loaded(), trained)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """The folder of a run whose export nobody disturbed, and its record."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(world, folder)


def test_both_merges_are_scored_and_one_is_published(whole: tuple[Path, Exported]) -> None:
    """Each candidate has an answer to every question; the files in the store are those of one of them."""
    folder, found = whole
    (record,) = found.exports
    assert {name: one["arc_easy"].n for name, one in record.scores.items()} == {"original": 12, "dequantized": 12}
    assert (record.format, record.dtype, record.scored_in) == ("merged", "bf16", "bf16")
    assert record.candidate in record.scores
    published = {artifact.path: artifact.sha256 for artifact in found.artifacts}
    assert all(hash_file(folder / path) == sha256 for path, sha256 in published.items())
    assert {f"artifacts/evaluation/arc_easy.merged-{name}.jsonl" for name in record.scores} < published.keys()
    assert f"{FOLDER}model.safetensors" in published
    model = AutoModelForCausalLM.from_pretrained(folder / FOLDER)
    assert model.dtype == torch.bfloat16


def test_exports_are_scored_in_the_precision_of_the_base(
    world: World, in_8_bits: tuple[Path, Exported], tmp_path: Path
) -> None:
    """All of them in fp16, layers of another library within it in their own dtype; the record says so."""
    candidate = in_8_bits[1].exports[0].candidate
    words = ("--export.formats=adapter:bf16,merged,fp8", f"--export.merge_onto={candidate}")
    with opened_attempt(tmp_path / "run") as attempt:
        precision = ScoringPrecision("fp16", "fp32", "a test")
        given = (world.settings(*words), world.sources(), world.loaded(), world.trained(attempt.store))
        found = export(attempt, *given, precision=precision)
    assert found is not None
    scored_in = {"adapter:bf16": "fp16", "merged": "fp16", "fp8": "bf16"}
    assert {one.format: one.scored_in for one in found.exports} == scored_in
    assert found.exports[1].dtype == "bf16"
    for name in ("merged", "fp8"):
        file = f"artifacts/evaluation/arc_easy.{name}-{candidate}.jsonl"
        ours, trained = (
            torch.tensor([one for row in read_jsonl(folder / file) for one in row["log_likelihoods"]])
            for folder in (tmp_path / "run", in_8_bits[0])
        )
        assert not torch.equal(ours, trained)
        assert torch.allclose(ours, trained, rtol=0.02)


def test_an_attempt_without_the_original_fetches_it(world: World, whole: tuple[Path, Exported], tmp_path: Path) -> None:
    """One that began with the quantized base gets the base's own files again: the same bytes come out of it."""
    assert run(world, tmp_path / "run", original=False) == whole[1]


def test_a_base_that_changed_meanwhile_is_refused(world: World, tmp_path: Path) -> None:
    """Merging onto other weights than the run began with would be silently wrong."""
    shutil.copytree(world.folder, tmp_path / "world")
    other = World(tmp_path / "world")
    sources = other.sources(original=False)
    (other.folder / "base/generation_config.json").write_text("{}")
    with opened_attempt(tmp_path / "run") as attempt:
        trained = other.trained(attempt.store)
        with pytest.raises(DataError, match="has changed since this run began"):
            export(attempt, other.settings(), sources, other.loaded(), trained)


def test_a_restart_uploads_only_what_is_missing(world: World, whole: tuple[Path, Exported], tmp_path: Path) -> None:
    """Ended between two files: the next attempt scores nothing again, and uploads the files that are not there."""
    folder = tmp_path / "run"
    seen: list[str] = []

    def note(verb: str, key: str) -> None:
        if verb == "upload" and key.startswith(FOLDER):
            seen.append(key)

    def end(verb: str, key: str) -> None:
        note(verb, key)
        if len(seen) == 3:
            raise Preempted("in the middle")

    def attempted(through: ObjectStore) -> Exported | None:
        with opened_attempt(folder, through) as attempt:
            trained = world.trained(attempt.store)
            return export(attempt, world.settings(), world.sources(), world.loaded(), trained)

    with pytest.raises(Preempted):
        attempted(WrappedStore(LocalStore(folder), before=end))
    first = seen[:2]
    seen.clear()
    before = {path: path.stat().st_mtime_ns for path in (folder / "scores").rglob("*.jsonl")}
    found = attempted(WrappedStore(LocalStore(folder), before=note))
    assert found == whole[1]
    assert not set(first) & set(seen)
    assert {path: path.stat().st_mtime_ns for path in (folder / "scores").rglob("*.jsonl")} == before


def test_one_candidate_where_one_is_asked_for(world: World, tmp_path: Path) -> None:
    """JOB_EXPORT__MERGE_ONTO=original makes and scores no other, and the record says why."""
    found = run(world, tmp_path / "run", "--export.merge_onto=original")
    (record,) = found.exports
    assert (list(record.scores), record.candidate) == (["original"], "original")
    assert record.reason == "JOB_EXPORT__MERGE_ONTO is original"


def test_what_cannot_be_exported_is_refused_before_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An impossible merge, and a disk or a memory that is too small, are known when the model is loaded."""
    loaded, base = world.loaded(), world.folder / "base"
    with opened_attempt(tmp_path / "run") as attempt:
        found = check(attempt, world.settings(), base, loaded)
        assert found.names == ("original", "dequantized")
        assert found.bytes_each == pytest.approx((base / "model.safetensors").stat().st_size, rel=0.02)
        with monkeypatch.context() as little:
            little.setattr("job.stages.export_check.available_bytes", lambda: -(1 << 40))
            with pytest.raises(Unreachable, match=r"JOB_EXPORT__FORMATS: merged takes .* of this machine's memory"):
                check(attempt, world.settings(), base, loaded)
        monkeypatch.setattr("job.common.resources.MARGIN_BYTES", 1 << 60)
        with pytest.raises(Unreachable, match="of disk are free"):
            check(attempt, world.settings(), base, loaded)
        loaded.model.peft_config["default"].bias = "all"
        with pytest.raises(SettingsError, match="JOB_EXPORT__FORMATS: the adapter has biases, which"):
            check(attempt, world.settings(), base, loaded)


def artifacts_below(found: Exported, folder: str) -> list[str]:
    """Paths of the artifacts in a folder of exports."""
    return [artifact.path for artifact in found.artifacts if artifact.path.startswith(f"artifacts/export/{folder}")]


@pytest.fixture(scope="module")
def in_8_bits(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """The folder and the record of a run that exports `fp8` and no merged model."""
    folder = tmp_path_factory.mktemp("fp8") / "run"
    return folder, run(world, folder, "--export.formats=fp8")


def test_a_format_is_made_from_the_better_merge(whole: tuple[Path, Exported], in_8_bits: tuple[Path, Exported]) -> None:
    """The merge is decided as if it were published, and is not; the other format is made from it, scored, published."""
    merged, made = in_8_bits[1].exports
    assert merged == replace(whole[1].exports[0], published=False)
    assert (made.format, made.candidate, list(made.scores)) == ("fp8", merged.candidate, [merged.candidate])
    assert made.scores[merged.candidate]["arc_easy"].n == 12
    assert made.quantization is not None
    assert (made.quantization.scheme, made.quantization.layers) == ("FP8_DYNAMIC", 14)
    assert not artifacts_below(in_8_bits[1], "merged/")
    published = {artifact.path: artifact for artifact in in_8_bits[1].artifacts}
    files = artifacts_below(in_8_bits[1], "fp8/")
    assert "artifacts/export/fp8/model.safetensors" in files
    assert made.bytes == sum(published[path].bytes for path in files)
    assert f"artifacts/evaluation/arc_easy.fp8-{merged.candidate}.jsonl" in published


@pytest.mark.long
def test_a_format_that_is_complete_is_not_made_again(
    world: World, in_8_bits: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart reads what an earlier attempt recorded of it; if a file is gone or altered, it is made again."""
    folder = tmp_path / "run"
    shutil.copytree(in_8_bits[0], folder)
    made = DERIVED["fp8"].make
    asked = list[DerivedInputs]()
    monkeypatch.setitem(
        DERIVED,  # type: ignore[misc]
        "fp8",
        replace(DERIVED["fp8"], make=lambda inputs: (asked.append(inputs), made(inputs))[1]),
    )
    assert run(world, folder, "--export.formats=fp8") == in_8_bits[1]
    assert not asked
    config = folder / "artifacts/export/fp8/config.json"
    published = config.read_bytes()
    config.unlink()
    assert run(world, folder, "--export.formats=fp8") == in_8_bits[1]
    assert len(asked) == 1
    config.write_bytes(published.replace(b"{", b"[", 1))
    assert run(world, folder, "--export.formats=fp8") == in_8_bits[1]
    assert config.read_bytes() == published


def test_calibration_rows_are_those_of_the_batch_plan(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibrated format gets the first rows that training saw, as trained on, and the record names them."""
    examples = [Example((5, 6, row), (False, True, True)) for row in range(20)]
    seen: list[DerivedInputs] = []

    def make(inputs: DerivedInputs) -> QuantizationRecord:
        seen.append(inputs)
        return fp8.make_fp8(inputs)

    monkeypatch.setitem(DERIVED, "w4a16", replace(DERIVED["fp8"], make=make))  # type: ignore[misc]
    sources = replace(world.sources(), examples=examples)
    words = ("--export.formats=w4a16", "--export.calibration_rows=5", "--export.merge_onto=original", "--run.seed=3")
    with opened_attempt(tmp_path / "run") as attempt:
        trained = world.trained(attempt.store)
        found = export(attempt, world.settings(*words), sources, world.loaded(), trained)
    assert found is not None
    order = epoch_order(3, 20, 0)[:5]
    assert seen[0].calibration == [(5, 6, row) for row in order]
    assert found.exports[1].quantization is not None
    calibration = found.exports[1].quantization.calibration
    assert calibration is not None
    assert (calibration.rows, calibration.tokens, calibration.rows_sha256) == (5, 15, hash_rows(order))


def _raise(error: Exception) -> QuantizationRecord:
    raise error


def test_what_cannot_be_made_does_not_lose_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that gives up after training is told in the record; all else is published."""

    def make(_inputs: DerivedInputs) -> QuantizationRecord:
        raise CannotMake("the library does not know this family")

    monkeypatch.setitem(DERIVED, "fp8", replace(DERIVED["fp8"], make=make))  # type: ignore[misc]
    found = run(world, tmp_path / "run", "--export.formats=merged,fp8", "--export.merge_onto=original")
    full = replace(DERIVED["fp8"], make=lambda _inputs: _raise(CannotMake("it ended: No space left on device")))
    monkeypatch.setitem(DERIVED, "fp8", full)  # type: ignore[misc]
    with pytest.raises(Unreachable, match="fp8 cannot be written, since the disk is full"):
        run(world, tmp_path / "full", "--export.formats=fp8", "--export.merge_onto=original")
    short = replace(
        full, make=lambda _inputs: _raise(CannotMake("it ended: torch.OutOfMemoryError: CUDA out of memory"))
    )
    monkeypatch.setitem(DERIVED, "fp8", short)  # type: ignore[misc]
    with pytest.raises(TrainingFailed, match=r"memory ran out while fp8 was made.*JOB_EXPORT__FORMATS"):
        run(world, tmp_path / "short", "--export.formats=fp8", "--export.merge_onto=original")
    merged, failed = found.exports
    assert merged.published
    assert artifacts_below(found, "merged/")
    assert (failed.published, failed.not_made) == (False, "the library does not know this family")
    assert failed.scores == {"original": {}}
    assert not artifacts_below(found, "fp8/")


@pytest.mark.long
def test_what_cannot_be_scored_is_published_as_such(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no scores and says why; a gate on it is refused before training."""
    cannot = replace(DERIVED["fp8"], cannot_score=lambda _device: "no reader is installed")
    monkeypatch.setitem(DERIVED, "fp8", cannot)  # type: ignore[misc]
    found = run(world, tmp_path / "run", "--export.formats=fp8", "--export.merge_onto=original")
    assert found.exports[1].not_scored == "no reader is installed"
    assert found.exports[1].scores == {"original": {}}
    assert found.exports[1].published
    assert artifacts_below(found, "fp8/")
    with opened_attempt(tmp_path / "other") as attempt:
        gated = world.settings("--export.formats=fp8", "--gate.on=fp8", "--gate.min_delta=0")
        with pytest.raises(SettingsError, match="JOB_GATE__ON: fp8 cannot be scored here: no reader is installed"):
            check(attempt, gated, world.folder / "base", world.loaded())
        monkeypatch.setitem(DERIVED, "fp8", replace(cannot, check=lambda _empty, _kind: "unknown family"))  # type: ignore[misc]
        with pytest.raises(SettingsError, match="JOB_EXPORT__FORMATS: fp8 cannot be made: unknown family"):
            check(attempt, world.settings("--export.formats=fp8"), world.folder / "base", world.loaded())


GGUF = ("--export.formats=gguf:q8_0", "--export.merge_onto=original")


@pytest.fixture
def _scores_are_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are kept after every question."""
    monkeypatch.setattr("job.evaluation.score_cache.SAVE_SECONDS", 0.0)


@pytest.mark.long
@pytest.mark.usefixtures("_scores_are_kept_at_once")
def test_gguf_is_scored_on_the_same_questions_and_resumes_by_its_scores(world: World, tmp_path: Path) -> None:
    """Ended in the middle of scoring and before the upload: the kept scores are taken up, all bytes are the same."""
    undisturbed = run(world, tmp_path / "undisturbed", *GGUF)
    merged, record = undisturbed.exports
    assert (merged.format, merged.published, record.format, record.candidate) == (
        "merged",
        False,
        "gguf:q8_0",
        "original",
    )
    scores, others = record.scores["original"]["arc_easy"], merged.scores["original"]["arc_easy"]
    assert scores.n == others.n == 12
    assert abs(scores.acc - others.acc) <= 3 / 12
    assert record.quantization is not None
    assert record.quantization.scheme == "Q8_0"
    paths = [artifact.path for artifact in undisturbed.artifacts if "/export/" in artifact.path]
    assert [path.rpartition("/")[2] for path in paths] == ["model-q8_0.gguf"]

    folder, kept = tmp_path / "run", list[str]()

    def end_in_scoring(verb: str, key: str) -> None:
        if verb == "write" and key.startswith("scores/"):
            kept.append(key)
            if len(kept) == 8:  # the merge's questions are one sequence or two
                raise Preempted("in the middle")

    def end_before_upload(verb: str, key: str) -> None:
        if verb == "write" and key.startswith("scores/"):
            kept.append(key)
        if verb == "upload" and key.endswith(".gguf"):
            raise Preempted("before the upload")

    def attempted(through: ObjectStore) -> Exported | None:
        with opened_attempt(folder, through) as attempt:
            trained = world.trained(attempt.store)
            return export(attempt, world.settings(*GGUF), world.sources(), world.loaded(), trained)

    for end in (end_in_scoring, end_before_upload):
        with pytest.raises(Preempted):
            attempted(WrappedStore(LocalStore(folder), before=end))
    assert attempted(LocalStore(folder)) == undisturbed
    assert len(set(kept)) == len(kept) - 1  # the one that was ended in the middle is scored again, and no other
    for artifact in undisturbed.artifacts:
        assert hash_file(folder / artifact.path) == artifact.sha256


@pytest.fixture(scope="module")
def copied(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """The folder of a run that exported both copies of the adapter, and its record."""
    folder = tmp_path_factory.mktemp("copied") / "run"
    return folder, run(world, folder, "--export.formats=adapter:bf16,adapter:fp16", original=False)


def test_a_copy_of_the_adapter_is_scored_on_the_run_s_base(
    world: World, copied: tuple[Path, Exported], tmp_path: Path
) -> None:
    """Each copy is PEFT's folder in its dtype, which PEFT reads as the job does; nothing is merged."""
    folder, found = copied
    assert [(one.format, one.candidate, one.dtype) for one in found.exports] == [
        ("adapter:bf16", "base", "bf16"),
        ("adapter:fp16", "base", "fp16"),
    ]
    assert not any("merged" in artifact.path for artifact in found.artifacts)
    whole = load_file(world.folder / "adapter/adapter_model.safetensors")
    for record, dtype in zip(found.exports, (torch.bfloat16, torch.float16), strict=True):
        place = folder / f"artifacts/export/adapter-{record.dtype}"
        copy = load_file(place / "adapter_model.safetensors")
        assert copy.keys() == whole.keys()
        assert all(torch.equal(copy[name], tensor.to(dtype)) for name, tensor in whole.items())
        config = (world.folder / "adapter/adapter_config.json").read_bytes()
        assert (place / "adapter_config.json").read_bytes() == config
        assert record.bytes == sum(path.stat().st_size for path in place.iterdir())
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.folder / "base"), place)
        assert {p.dtype for n, p in peft.named_parameters() if "lora_" in n} == {torch.float32}
        other = world.loaded()
        load_adapter(other.model, place, other.names)
        mine = {name: p for name, p in peft.named_parameters() if "lora_" in name}
        for name, parameter in other.model.named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, mine[name])


@pytest.mark.long
def test_what_is_merged_after_a_copy_is_the_adapter_itself(
    world: World, whole: tuple[Path, Exported], tmp_path: Path
) -> None:
    """The rounded numbers that were scored are not those that are merged: the same merged bytes as without a copy."""
    found = run(world, tmp_path / "run", "--export.formats=adapter:fp16,merged")
    assert found.exports[1:] == whole[1].exports
    assert found.artifacts[-len(whole[1].artifacts) :] == whole[1].artifacts


def test_a_copy_that_overflows_is_not_made(world: World, tmp_path: Path) -> None:
    """fp16 ends at 65,504: the run goes on, and says which number is too large; bf16 holds it."""
    shutil.copytree(world.folder, tmp_path / "world")
    other = World(tmp_path / "world")
    file = other.folder / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    tensors[first][0, 0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    found = run(other, tmp_path / "run", "--export.formats=adapter:bf16,adapter:fp16")
    made, lost = found.exports
    assert (made.published, lost.published, lost.candidate) == (True, False, "base")
    assert lost.not_made == f"{first} has numbers above 65504, the largest of fp16"


@pytest.mark.long
def test_a_restart_scores_no_copy_again(world: World, copied: tuple[Path, Exported], tmp_path: Path) -> None:
    """Ended as the second copy is uploaded: the next attempt takes up the scores, and uploads what is missing."""
    folder, seen, ended = tmp_path / "run", list[str](), list[str]()

    def before(verb: str, key: str) -> None:
        if verb == "upload" and key.startswith("artifacts/export/"):
            seen.append(key)
            if key.startswith("artifacts/export/adapter-fp16/") and not ended:
                ended.append(key)
                raise Preempted("in the middle")

    def attempted() -> Exported | None:
        with opened_attempt(folder, WrappedStore(LocalStore(folder), before=before)) as attempt:
            trained = world.trained(attempt.store)
            words = ("--export.formats=adapter:bf16,adapter:fp16",)
            return export(attempt, world.settings(*words), world.sources(), world.loaded(), trained)

    with pytest.raises(Preempted):
        attempted()
    seen.clear()
    scores = {path: path.stat().st_mtime_ns for path in (folder / "scores").rglob("*.jsonl")}
    assert attempted() == copied[1]
    assert all(key.startswith("artifacts/export/adapter-fp16/") for key in seen)
    assert {path: path.stat().st_mtime_ns for path in (folder / "scores").rglob("*.jsonl")} == scores
