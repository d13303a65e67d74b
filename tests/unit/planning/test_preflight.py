"""Checks before a GPU is paid for: each finds what would fail in the job, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import AccessDenied, DataError, JobError, Preempted, SettingsError, Unreachable
from job.model.adapter_files import save_adapter
from job.model.published_names import PublishedNames
from job.planning import preflight_models
from job.planning.other_input_checks import check_other_inputs
from job.planning.preflight import NotChecked, PreflightResult, run_check
from job.planning.preflight_models import ModelFacts, preview_judge, preview_safety_model
from job.planning.preflight_store import local_round_trip, round_trip
from job.settings.load import load_settings
from job.stages.pull_other_models import pull_start_adapter
from job.storage.local import LocalStore
from job.storage.open import StorageOptions, open_store
from tests.gcs_server import gcs_server
from tests.helpers import make_model
from tests.s3_server import BUCKET
from tests.toy_classifier import make_classifier
from tests.wrapped_store import WrappedStore


def raising(error: Exception) -> Callable[[], Any]:
    """Work that ends so."""

    def work() -> Any:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (AccessDenied("no"), "wrong"),
        (Unreachable("silence"), "not checked"),
        (NotChecked("too large"), "not checked"),
        (Preempted("x"), "wrong"),
    ],
)
def test_a_check_catches_what_it_ends_with(error: Exception, state: str) -> None:
    """What is wrong is kept with its error; who does not answer is no error, unless the check says that it is one."""
    found, value = run_check("it", raising(error))
    assert (found.state, found.what, value) == (state, str(error), None)
    assert (found.error is error) is (state == "wrong")
    found, _ = run_check("it", raising(error), unreachable="wrong")
    assert (found.error is error) is isinstance(error, JobError)
    assert run_check("it", lambda: ("note", "fine", 3)) == (PreflightResult("it", "note", "fine"), 3)


def test_a_bug_in_a_check_is_a_bug() -> None:
    """Only the job's own errors are findings."""
    with pytest.raises(ZeroDivisionError):
        run_check("it", raising(ZeroDivisionError()))


def test_a_good_disk_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    """Written, read, listed, deleted, with conditions; no file and no folder stays, and nobody else's goes."""
    state, what, seconds = local_round_trip(tmp_path / "new/runs", "it")
    assert state == "ok"
    assert what == "it: wrote, read, listed and deleted; conditional writes work"
    assert seconds > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs/a-run").mkdir(parents=True)
    local_round_trip(tmp_path / "runs", "it")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a-run"]
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="both an object and a folder"):
        local_round_trip(tmp_path / "file/runs", "it")


def test_a_store_that_refuses_is_told_by_its_verb(tmp_path: Path) -> None:
    """Whichever verb is denied, the check says so, and still deletes what it wrote."""
    for verb in ("write", "read", "upload", "download", "list", "delete"):

        def refuse(asked: str, _key: str, verb: str = verb) -> None:
            if asked == verb:
                raise AccessDenied(f"no {verb}")

        store = LocalStore(tmp_path / verb)
        with pytest.raises(AccessDenied, match=f"no {verb}"):
            round_trip(WrappedStore(store, before=refuse), "it")
        assert len(list(store.list())) == (0 if verb != "delete" else 3)


def test_a_store_that_refuses_everything_is_told_by_the_first_verb(tmp_path: Path) -> None:
    """No bucket, no credentials: the error is that of the write, not of the cleaning up after it."""

    def refuse(asked: str, _key: str) -> None:
        raise AccessDenied(f"no {asked}")

    with pytest.raises(AccessDenied, match="no write"):
        round_trip(WrappedStore(LocalStore(tmp_path), before=refuse), "it")


def test_a_store_that_loses_what_it_took_is_found_out(tmp_path: Path) -> None:
    """A write that was answered and is not there, or not what was written."""
    store = LocalStore(tmp_path)

    def lose(verb: str, key: str) -> None:
        if verb == "write":
            store.delete(key)

    with pytest.raises(Unreachable, match="could not be read, listed and deleted unchanged"):
        round_trip(WrappedStore(store, after=lose), "it")


def test_no_conditional_writes_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job can do without, and says what that costs."""
    store = LocalStore(tmp_path)
    monkeypatch.setattr(store, "conditional_writes", lambda: False)
    state, what, _ = round_trip(store, "it")
    assert state == "note"
    assert "no conditional writes" in what


def test_a_safety_model_is_looked_at_without_its_weights(tmp_path: Path) -> None:
    """The plan names the labels that count as unsafe; a hub that cannot be reached leaves it unchecked."""
    folder = make_classifier(tmp_path / "classifier")
    how: dict[str, Any] = {"online": lambda: False, "folder": tmp_path, "storage": StorageOptions()}
    state, what, _ = preview_safety_model(str(folder), None, None, 0.5, **how)
    assert state == "ok"
    assert f"{folder}: unsafe is a probability of at least 0.5 for unsafe;" in what
    with pytest.raises(NotChecked):
        preview_safety_model("org/kettles", None, None, 0.5, **how)
    with pytest.raises(SettingsError, match="JOB_DATA__UNSAFE_LABELS"):
        preview_safety_model(str(folder), None, ["rude"], 0.5, **how)


def test_a_judge_without_weights_is_refused(tmp_path: Path) -> None:
    """The plan says ok only to a judge that is there, with weights in safetensors; also in a store."""
    (tmp_path / "rules.txt").write_text("Be kind.")
    how: dict[str, Any] = {"online": lambda: False, "folder": tmp_path, "storage": StorageOptions()}

    def preview(place: str) -> str:
        return preview_judge(str(tmp_path / "rules.txt"), place, None, **how)[0]

    assert preview("https://judge.example") == "ok"
    assert preview(str(make_classifier(tmp_path / "there"))) == "ok"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="JOB_EVAL__JUDGE"):
        preview(str(tmp_path / "empty"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight_models, "open_store", lambda *_: LocalStore(tmp_path / "empty"))
        with pytest.raises(SettingsError, match=r"JOB_EVAL__JUDGE.*nothing"):
            preview("s3://b/j")


def test_an_adapter_to_start_from_is_compared_with_the_model(base_folder: Path, tmp_path: Path) -> None:
    """Without the base's weights, as a run does: by names and shapes."""
    save_adapter(make_model(base_folder, rank=4), tmp_path, base="base", revision=None, names=PublishedNames(""))
    words = [f"--lora.start={tmp_path}", "--lora.rank=4"]
    model = ModelFacts(base_folder, None, None)
    for more, state in (([], "ok"), (["--lora.layers=1"], "wrong")):
        (found,) = check_other_inputs(load_settings([*words, *more], {}), StorageOptions(), None, model)
        assert (found.name, found.state) == ("start", state)


def test_an_adapter_to_start_from_is_looked_at_in_a_store(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched if it is small; if it is not there, a run says so too, both with the setting and the URI."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(make_model(base_folder, rank=4), folder, base="base", revision=None, names=PublishedNames(""))
    model, there, nowhere = ModelFacts(base_folder, None, None), f"gs://{BUCKET}/a/adapter", f"gs://{BUCKET}/nope"

    def start(uri: str, *more: str) -> PreflightResult:
        given = load_settings([f"--lora.start={uri}", "--lora.rank=4", *more], {})
        return next(iter(check_other_inputs(given, StorageOptions(), None, model)))

    with gcs_server():
        store = open_store(there)
        for path in folder.iterdir():
            store.upload(path, path.name)
        assert start(there).state == "ok"
        found = start(there, "--lora.layers=1")
        assert (found.state, "/qlora-job-plan-" in found.what, there in found.what) == ("wrong", False, True)
        assert start(nowhere).what.startswith(f"JOB_LORA__START: {nowhere}: there is no such object")
        assert start(f"gs://{BUCKET}/a").what.startswith(f"JOB_LORA__START: gs://{BUCKET}/a has no adapter_config.json")
        monkeypatch.setattr(preflight_models, "MAX_START_BYTES", 10)
        assert start(there).state == "not checked"
        attempt: Any = SimpleNamespace(work=tmp_path / "work", check_stop=lambda: None, recorded=lambda *_: None)
        lora = load_settings(["--lora.rank=4"], {}).lora
        assert pull_start_adapter(attempt, there, lora, StorageOptions())
        with pytest.raises(SettingsError, match=f"JOB_LORA__START: {nowhere}/: there is no such object"):
            pull_start_adapter(attempt, nowhere, lora, StorageOptions())
        store.delete("adapter_config.json")
        attempt.work = tmp_path / "new work"
        with pytest.raises(DataError, match=f"JOB_LORA__START: {there} has no adapter_config.json"):
            pull_start_adapter(attempt, there, lora, StorageOptions())
