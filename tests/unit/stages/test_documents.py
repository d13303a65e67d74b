"""Documents are published with the run, and a document that cannot be made does not fail the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from job.common.hashing import hash_file, sealed
from job.errors import Unreachable
from job.preemption.stop_flag import StopFlag
from job.results import signing
from job.results.manifest import validate
from job.runs.attempt import Attempt
from job.runs.layout import ADAPTER, BOM, CARD, REPORT
from job.stages import publish as stages_publish
from job.stages.publish import publish_report_and_card
from job.storage.local import LocalStore
from tests.example_run import answers, evidence, publish, results


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Attempt, dict[str, Any]]:
    """An attempt whose run has everything but its documents, and the manifest so far."""
    found = evidence(arc_easy=answers(3, 1, 20))
    made = publish(tmp_path / "run", found, results(found))
    attempt = Attempt(LocalStore(tmp_path / "run"), tmp_path / "work", 1, StopFlag(), lambda: None, None, [])  # type: ignore[arg-type]
    return attempt, made


def test_card_and_report_are_published(finished: tuple[Attempt, dict[str, Any]], tmp_path: Path) -> None:
    """Both lie in the store and in the manifest, with the right hash and in order; the manifest stays valid."""
    attempt, made = finished
    complete = publish_report_and_card(attempt, made)
    validate(complete)
    listed = {artifact["path"]: artifact for artifact in complete["artifacts"]}
    assert list(listed) == sorted(listed)
    assert listed.keys() - {artifact["path"] for artifact in made["artifacts"]} == {BOM, CARD, REPORT}
    for key in (CARD, REPORT):
        path = tmp_path / "run" / key
        assert (listed[key]["sha256"], listed[key]["bytes"]) == (hash_file(path), path.stat().st_size)
    assert listed[CARD]["sha256"].encode() in (tmp_path / "run" / REPORT).read_bytes()


@pytest.mark.parametrize(("broken", "left"), [("render_model_card", {BOM, REPORT}), ("render_report", {BOM, CARD})])
def test_a_document_that_cannot_be_made_is_left_out(
    finished: tuple[Attempt, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
    left: set[str],
) -> None:
    """The log has the error and its traceback; the manifest is complete without it."""
    attempt, made = finished
    module = stages_publish.report if broken == "render_report" else stages_publish.model_card
    monkeypatch.setattr(module, broken, lambda *_: 1 / 0)
    complete = publish_report_and_card(attempt, made)
    validate(complete)
    added = {artifact["path"] for artifact in complete["artifacts"]} - {a["path"] for a in made["artifacts"]}
    assert added == left
    told = capsys.readouterr()
    assert "report or model card cannot be written" in told.out + told.err


def test_a_store_that_fails_is_not_hidden(
    finished: tuple[Attempt, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer ends the attempt, whichever verb the document goes through."""
    attempt, made = finished

    def fail(*_: object, **__: object) -> None:
        raise Unreachable("no answer")

    for verb in ("upload", "write"):
        monkeypatch.setattr(attempt.store, verb, fail)
    with pytest.raises(Unreachable):
        publish_report_and_card(attempt, made)


def test_a_restart_signs_what_it_publishes(finished: tuple[Attempt, dict[str, Any]], tmp_path: Path) -> None:
    """An attempt killed right before the manifest leaves a signature; that of the next is valid, or it is gone."""
    attempt, made = finished
    key, store = ec.generate_private_key(ec.SECP256R1()), attempt.store
    pem = signing.public_key(key)
    for when in ("2026-01-05T10:00:00Z", "2026-01-05T11:00:00Z"):
        at = {**made, "run": {**made["run"], "finished": when}}
        complete = sealed(publish_report_and_card(attempt, at, key))
        stages_publish._sign_run(attempt, at, complete, key)
        signature = store.read("model.sig")
        assert signature is not None
        assert signing.signed_files(signature.data, pem) == signing.files_of_run(at, complete)
        validate(json.loads(complete))
    folder = store.read("artifacts/adapter/model.sig")
    assert folder is not None
    assert signing.signed_files(folder.data, pem) == signing.files_of(json.loads(complete), ADAPTER)
    unsigned = publish_report_and_card(attempt, made)
    stages_publish._sign_run(attempt, unsigned, sealed(unsigned), None)
    assert "signing" not in unsigned
    assert not list((tmp_path / "run").rglob("model.sig"))
