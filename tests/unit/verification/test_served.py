"""The record of `serve-check --record`: `report` shows it, `verify` compares it with the run's own answers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from job.cli.report import report_command
from job.cli.serve_check import serve_check_command
from job.common.hashing import sealed
from job.evaluation import samples
from job.evaluation.samples import Sample
from job.records import Asked, Pushed, ServeCheck, margin
from job.results.after_run import read_after_run, write_serve_check
from job.runs.layout import pushed_key
from job.storage.local import LocalStore
from job.verification.verify import verify
from tests.published_run import pairs, publish_run
from tests.unit.serving.test_serve_check import SAMPLES, Transformers, listening

ANSWERS = "artifacts/evaluation/quiz.adapter.jsonl"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A run of twelve questions."""
    return LocalStore(publish_run(tmp_path / "run", {"quiz": pairs(12, improved=6)}))


def answers(store: LocalStore) -> list[Sample]:
    """What its adapter answered."""
    return samples.parse(Path(store.uri, ANSWERS).read_bytes())


def checked(store: LocalStore, wrong: int = 0) -> ServeCheck:
    """A server that answers like the adapter, except for the first questions."""
    asked = [
        Asked("quiz", one.id, one.prediction, one.prediction + (at < wrong), margin(one.log_likelihoods), 0.001)
        for at, one in enumerate(answers(store))
    ]
    return ServeCheck("vllm", "echo", "adapter", tuple(asked), 1.5, 0.021, 87.5, "2026-11-29T06:00:00.000000Z")


def differences(store: LocalStore, tmp_path: Path) -> list[str]:
    """What `verify` finds different, by the place."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return [found.where for check in verify(store, work) for found in check.differences]


def test_a_record_verifies(store: LocalStore, tmp_path: Path) -> None:
    """It is read back as it was written, is no unknown file, and `verify` says what it found."""
    write_serve_check(store, checked(store))
    assert read_after_run(store).served == (checked(store),)
    assert differences(store, tmp_path) == []
    (check,) = [one for one in verify(store, tmp_path / "work") if one.what == "served"]
    assert check.notes == ("adapter by vllm: holds, 12 of 12 predictions as recorded",)


def test_a_file_whose_name_is_no_key_is_no_record(store: LocalStore) -> None:
    """`status` and `report` read the records beside it; `verify` calls it an unknown file."""
    write_serve_check(store, checked(store))
    (Path(store.uri) / "served/we\\ird.json").write_text("{}")
    assert read_after_run(store).served == (checked(store),)


def test_a_record_that_quotes_other_answers_does_not_verify(store: LocalStore, tmp_path: Path) -> None:
    """Another prediction, a made-up near tie, a question that was not asked, another place, a changed byte."""
    found = checked(store)
    first = found.asked[0]
    key = "served/adapter-vllm.json"
    for change, place in (
        (replace(first, recorded=first.recorded + 1), "recorded"),
        (replace(first, margin=0.0), "margin"),
        (replace(first, id="none"), "none"),
    ):
        write_serve_check(store, replace(found, asked=(change, *found.asked[1:])))
        (where,) = differences(store, tmp_path)
        assert where.startswith(key)
        assert place in where
    store.write(key, sealed(asdict(replace(found, server="llama.cpp"))))
    assert differences(store, tmp_path) == [key]
    store.write(key, sealed(asdict(found)).replace(b'"first_token": 0.021', b'"first_token": 0.011'))
    assert differences(store, tmp_path) == [key]
    assert read_after_run(store).served == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", ["adapter"]),
        ("server", 1),
        ("seconds", 10**400),
        ("asked", [{}]),
        ("more", 1),
        ("task", ["quiz"]),
        ("id", {"quiz": 1}),
        ("recorded", "1"),
        ("difference", 10**400),
    ],
)
def test_values_of_other_types_are_no_record(store: LocalStore, tmp_path: Path, name: str, value: Any) -> None:
    """A sealed file in place of a record is a difference for `verify`, and passed over by `report`."""
    facts = asdict(checked(store))
    (facts["asked"][0] if name in facts["asked"][0] else facts)[name] = value
    store.write("served/adapter-vllm.json", sealed(facts))
    assert differences(store, tmp_path) == ["served/adapter-vllm.json"]
    assert read_after_run(store).served == ()


def test_answers_of_an_exported_format(tmp_path: Path) -> None:
    """They are compared with those of the candidate that ships; a format that the run does not have is a difference."""
    exported = {"original": [False] * 6 + [True] * 6}
    store = LocalStore(publish_run(tmp_path / "run", {"quiz": pairs(12, improved=6)}, exported=exported))
    answered = samples.parse(Path(store.uri, "artifacts/evaluation/quiz.merged-original.jsonl").read_bytes())
    assert [one.prediction for one in answered] != [one.prediction for one in answers(store)]
    asked = tuple(
        Asked("quiz", one.id, one.prediction, one.prediction, margin(one.log_likelihoods), None) for one in answered
    )
    merged = replace(checked(store), format="merged", asked=asked)
    write_serve_check(store, merged)
    assert differences(store, tmp_path) == []
    write_serve_check(store, replace(checked(store), format="merged"))
    assert {where.rpartition(" ")[2] for where in differences(store, tmp_path)} == {"recorded", "margin"}
    write_serve_check(store, merged)
    write_serve_check(store, replace(merged, format="gguf:q8_0"))
    assert differences(store, tmp_path) == ["served/gguf-q8_0-vllm.json format"]


def test_the_report_shows_where_a_run_went(store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Place and commit or digest of every push, and how servers answered; without any the page is the published one."""
    monkeypatch.chdir(tmp_path)
    report_command([store.uri])
    before = Path("report.html").read_text(encoding="utf-8")
    assert "delivered" not in before.lower()
    digest = f"sha256:{'a' * 64}"
    for pushed in (Pushed("hub", "lab/<model>@main", "c" * 40, "0" * 64), Pushed("oci", "r.io/lab/m:1", digest, "0")):
        store.write(pushed_key(pushed.target, pushed.place), sealed(asdict(pushed)))
    write_serve_check(store, checked(store, wrong=2))
    report_command([store.uri])
    page = Path("report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    section = page[page.index('<section id="delivered"') : page.index('<section id="questions"')]
    for shown in ("lab/&lt;model&gt;@main", "c" * 40, "r.io/lab/m:1", digest, "10 of 12", "differ", "21 ms", "87.5"):
        assert shown in section, shown
    assert "vllm predicts 10 as recorded, by its log-likelihoods" in section
    assert 'href="#delivered"' in page


def test_the_command_records_only_when_asked_to(
    store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve-check` writes nothing to a run; with --record the record is what it printed."""
    monkeypatch.setattr("job.cli.serve_check._records", lambda *_args: SAMPLES)  # this run's have no prompts
    said = {str(one.question): str((one.choices or [])[one.prediction]) for _, one in SAMPLES}
    with listening(Transformers, said=said) as served:
        words = [store.uri, "--served=adapter", f"--url={served.client.url}", "--format=json"]
        assert serve_check_command(words) == 0
        assert list(store.list("served/")) == []
        capsys.readouterr()
        assert serve_check_command([*words, "--record"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (found,) = read_after_run(store).served
    assert (found.server, found.alike, found.holds) == ("transformers", printed["alike"], printed["holds"])
    assert found.when == printed["when"]
