"""The export stage: what is made, scored and published, and what a restart does again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from job.common.hashing import hash_file
from job.errors import DataError, Preempted, SettingsError, Unreachable
from job.evaluation.tasks import load_tasks
from job.model.adapter_files import save_adapter
from job.model.base import describe_model, load_tokenizer
from job.model.packed_attention import NAME, use
from job.model.published_names import PublishedNames
from job.model.quantized_cache.layout import CachedBase
from job.preemption.stop_flag import Stop
from job.records import Exported, Packing, Pulled, Trained
from job.runs.attempt import Attempt, open_attempt
from job.runs.fault_injection import arm
from job.settings.load import Settings, load_settings
from job.stages.export import check_export, export
from job.stages.handoff import Loaded, Sources
from job.storage.local import LocalStore
from job.storage.open import ObjectStore
from tests.example_run import DATASET, TRAINING
from tests.helpers import arc_rows, fill_adapter, make_base, make_model, write_jsonl
from tests.wrapped_store import WrappedStore

FOLDER = "artifacts/export/merged/"


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
        return Loaded(
            model, record, 512, TRAINING.execution, CachedBase(), Packing(packed=True, reason=""), PublishedNames("")
        )  # type: ignore[arg-type]

    def sources(self, *, original: bool = True) -> Sources:
        """What was pulled, with the base's own files or without."""
        from job.model.files import fingerprint

        base, questions = self.folder / "base", self.folder / "questions.jsonl"
        tasks = load_tasks(["arc_easy"], {"arc_easy": questions}, {"arc_easy": str(questions)})
        pulled = Pulled(DATASET, fingerprint(base), None, tasks.fingerprints())
        own = base if original else None
        return Sources(
            pulled,
            base,
            quantized=False,
            tokenizer=load_tokenizer(base),
            examples=[],
            validation=[],
            start=None,
            original=own,
            tasks=tasks,
            baseline=None,
            cache_entry=None,
        )

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


@contextmanager
def attempt_at(folder: Path, through: ObjectStore | None = None) -> Iterator[Attempt]:
    """An attempt at the run in a folder."""
    store = LocalStore(folder)
    how = {"cache": str(folder.parent / "cache"), "stop": Stop(), "report_progress": lambda: None}
    with open_attempt(through or store, {}, faults=arm((), store), **how) as attempt:  # type: ignore[arg-type]
        attempt.run = "0" * 64
        yield attempt


def run(world: World, folder: Path, *words: str, original: bool = True) -> Exported:
    """The stage, undisturbed."""
    with attempt_at(folder) as attempt:
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


def test_an_attempt_without_the_original_fetches_it(world: World, whole: tuple[Path, Exported], tmp_path: Path) -> None:
    """One that began with the quantized base gets the base's own files again: the same bytes come out of it."""
    assert run(world, tmp_path / "run", original=False) == whole[1]


def test_a_base_that_changed_meanwhile_is_refused(world: World, tmp_path: Path) -> None:
    """Merging onto other weights than the run began with would be silently wrong."""
    shutil.copytree(world.folder, tmp_path / "world")
    other = World(tmp_path / "world")
    sources = other.sources(original=False)
    (other.folder / "base/generation_config.json").write_text("{}")
    with attempt_at(tmp_path / "run") as attempt:
        trained = other.trained(attempt.store)
        with pytest.raises(DataError, match="its files have changed"):
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
        with attempt_at(folder, through) as attempt:
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
    """An impossible merge and a disk that is too small are known when the model is loaded."""
    loaded, base = world.loaded(), world.folder / "base"
    with attempt_at(tmp_path / "run") as attempt:
        found = check_export(attempt, world.settings(), base, loaded)
        assert found.names == ("original", "dequantized")
        assert found.bytes_each == pytest.approx((base / "model.safetensors").stat().st_size, rel=0.02)
        monkeypatch.setattr("job.common.resources.MARGIN_BYTES", 1 << 60)
        with pytest.raises(Unreachable, match="of disk are free"):
            check_export(attempt, world.settings(), base, loaded)
        loaded.model.peft_config["default"].modules_to_save = ["lm_head"]
        with pytest.raises(SettingsError, match="JOB_EXPORT__FORMATS: the adapter has biases, whole modules or tokens"):
            check_export(attempt, world.settings(), base, loaded)
