"""Pulling: errors that can be found without the weights are reported before the download, and a run keeps its date."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from tokenizers import AddedToken, Tokenizer

from job.data.training_and_validation import ValidationSource
from job.errors import DataError, SettingsError, Unreachable
from job.model.files import fingerprint
from job.records import (
    AttemptRecord,
    AuditRecord,
    CheckRecord,
    DatasetRecord,
    DataSourceRecord,
    GroupSpec,
    Pulled,
    ValidationRows,
)
from job.runs import stage_records
from job.runs.layout import Stage
from job.settings.load import Settings, load_settings
from job.settings.training_stages import split_stages
from job.stages import pull, pull_model
from job.stages.pull import _base_settings, _date, _groups, _row_settings, _with_licences
from job.stages.pull_audit import publish_findings, with_audit_of_before
from job.stages.pull_model import _fetch_small_files, fetch_original, find_base, vocabulary_of
from job.stages.pull_rows import fetch_rows
from job.storage.open import StorageOptions, open_store
from tests import warm
from tests.attempts import make_attempt
from tests.dataset_hub import COMMIT, Hub, serving
from tests.example_run import DATASET
from tests.helpers import arc_rows, write_jsonl
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server

DEMO = Path(__file__).parents[3] / "job" / "demo" / "base"
FETCHED: list[str] = []
SMALL_BYTES = 2 << 20


class DemoHub(Hub):
    """A hub that serves the demo's base as `some/demo`, and remembers whose weights it was asked for."""

    def do_GET(self) -> None:  # noqa: N802 - http.server calls it by this name
        """Answers for metadata, listings and files of the model; the rest as the hub of the other tests."""
        path = self.path.split("?")[0]
        file = DEMO / path.rpartition("/")[2]
        if path.startswith("/api/models/some/demo/tree/"):
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in DEMO.iterdir()]
            self._answer(200, json.dumps(files).encode())
        elif path.startswith("/some/demo/resolve/") and file.is_file():
            if self.command == "GET" and file.suffix == ".safetensors":
                FETCHED.append(self.headers.get("User-Agent", ""))
            self._answer(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/some/demo"):
            self._answer(200, json.dumps({"id": "some/demo", "sha": COMMIT}).encode())
        else:
            super().do_GET()


CASES: dict[str, tuple[dict[str, str], int, str]] = {
    "data file": ({"JOB_DATA__SOURCE": "/nope.jsonl"}, 65, "JOB_DATA__SOURCE: /nope.jsonl does not exist"),
    "revision": ({"JOB_DATA__SOURCE": "some/data"}, 2, "JOB_DATA__REVISION"),
    "data set": ({"JOB_DATA__SOURCE": "some/missing", "JOB_DATA__REVISION": "main"}, 77, "data set some/missing"),
    "questions": ({"JOB_EVAL__DATA": "arc_easy=/nope.json"}, 65, "JOB_EVAL__DATA: /nope.json does not exist"),
    "target module": ({"JOB_LORA__TARGET_MODULES": "q_prj"}, 2, "q_prj"),
    "experts": (
        {"JOB_LORA__EXPERTS": "true", "JOB_DATA__SOURCE": "some/missing", "JOB_DATA__REVISION": "main"},
        *(2, "JOB_LORA__EXPERTS: is on, and MistralForCausalLM has no experts"),
    ),
    "long question": ({"JOB_EVAL__DATA": "arc_easy={long}"}, 65, "tokens long with its longest choice"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool]]:
    """Exit code and log of a run of each case, and whether it left a folder; the model is on the hub, and not here."""
    folder = tmp_path_factory.mktemp("runs")
    rows = arc_rows(3)
    rows[1]["question"] += " and so on" * 3000
    long = write_jsonl(folder / "long.jsonl", rows)
    found = {}
    with serving(DemoHub) as endpoint:
        for name, (changes, _, _) in CASES.items():
            env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / name), "HF_ENDPOINT": endpoint}
            env |= {"JOB_PRESET": "demo", "JOB_MODEL__ID": "some/demo", "JOB_RUN__OUTPUT": str(folder / "out")}
            env |= {"JOB_RUN__ID": name.replace(" ", "-")}
            env |= {variable: value.format(long=long) for variable, value in changes.items()}
            done = warm.run([], env)
            left = (folder / "out" / name.replace(" ", "-")).exists()
            found[name] = (done.returncode, done.stderr, left)
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_known_without_the_weights_is_told_before_them(
    runs: dict[str, tuple[int, str, bool]], case: str
) -> None:
    """A missing file, revision, data set or module ends the run with its code before weights are asked for.

    What is known from the settings and this machine's files leaves no folder of a run behind.
    """
    code, log, left = runs[case]
    assert left == (case not in {"data file", "revision", "questions"})
    assert code == CASES[case][1], log[-2000:]
    assert CASES[case][2] in log.splitlines()[-1]
    assert FETCHED == []


def test_a_token_beyond_the_embedding_is_found_in_pull(tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has rows is found by the row that uses one: code 65."""
    shutil.copytree(DEMO, tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(tmp_path / "base/tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True)])
    tokenizer.save(str(tmp_path / "base/tokenizer.json"))
    rows = [{"prompt": f"<|begin|> {n}", "completion": " yes"} for n in range(3)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = os.environ | {"JOB_PRESET": "demo", "JOB_MODEL__ID": str(tmp_path / "base"), "JOB_RUN__OUTPUT": str(tmp_path)}
    env |= {"JOB_DATA__SOURCE": str(tmp_path / "x.jsonl"), "JOB_RUN__ID": "r"}
    done = warm.run([], env)
    assert done.returncode == 65, done.stderr[-2000:]
    assert "x.jsonl:1" in done.stderr
    assert "<|begin|>" in done.stderr.splitlines()[-1]


def test_a_run_keeps_the_day_of_its_first_attempt(tmp_path: Path) -> None:
    """A later attempt, on another day, has the date of the first one."""
    record = AttemptRecord(1, "2026-11-28T23:59:59.000Z", None, "killed", 1.0, {}, 0, 0, 0)
    earlier = [replace(record, number=2, started="2026-11-30T00:00:00.000Z"), record]
    first = make_attempt(tmp_path, started="2026-11-28T23:59:59.000Z")
    later = make_attempt(tmp_path, started="2026-12-01T00:00:01.000Z", earlier=earlier)
    assert _date(first) == _date(later) == "2026-11-28"


def test_a_run_of_an_earlier_version_goes_on_without_groups_in_its_record(tmp_path: Path) -> None:
    """What names a run stays the same: only a run that began with its groups in the record has them later."""
    spec = GroupSpec("1", ("one",), {"acc,none": True}, {"acc,none": True})
    tasks: Any = SimpleNamespace(groups={"own": spec})
    rows = DatasetRecord("x.jsonl", None, None, "alpaca", 8, {}, "00", 9, 8, 7)
    before, now = (Pulled(rows, "11", None, {"one": "22"}, groups=groups) for groups in (None, tasks.groups))
    for number, (earlier, expected) in enumerate(((None, {"own": spec}), (now, {"own": spec}), (before, None))):
        assert _groups(make_attempt(tmp_path / str(number), {Stage.PULL: earlier}), tasks) == expected
    assert stage_records.fingerprint({}, before) != stage_records.fingerprint({}, now)
    assert "groups" not in stage_records.identity(before)


def test_the_manifest_has_no_place_that_the_first_attempt_did_not_record(tmp_path: Path) -> None:
    """A run that an earlier version began verifies: its manifest agrees with the record of the pull."""
    rows = DatasetRecord("x.jsonl", None, None, "alpaca", 8, {}, "00", 9, 8, 7)
    attempt = make_attempt(tmp_path, {Stage.PULL: Pulled(rows, "11", None, {})})
    found, _ = _with_licences(attempt, load_settings([], {}), replace(rows, longest_at="x.jsonl:3"), None)
    assert found == rows


def audited(by: str, languages: dict[str, int], sha256: str) -> DatasetRecord:
    """The record of rows of which those with a secret are left out, as `by` finds them."""
    check = CheckRecord("skip", by, "" if by else "the package is not installed", 1 if by else None, [])
    audit = AuditRecord(9, 1, {"secret": check}, {}, 1, 40, "33", 9, languages=languages)
    return DatasetRecord("x.jsonl", None, None, "alpaca", 8, {}, sha256, 9, 8, 7, audit=audit)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (audited("detect-secrets 1.5", {}, "00"), audited("detect-secrets 1.5", {"en": 9}, "00")),
        (audited("detect-secrets 1.6", {}, "00"), audited("detect-secrets 1.5", {"en": 9}, "00")),
        (audited("detect-secrets 1.5", {}, "44"), audited("detect-secrets 1.5", {}, "44")),
        (
            audited("", {}, "44"),
            "kind secret were searched for by detect-secrets 1.5 when this run began, and by nothing",
        ),
    ],
)
def test_a_machine_without_the_audits_tools(
    tmp_path: Path, found: DatasetRecord, expected: DatasetRecord | str
) -> None:
    """Of the same rows the first attempt's audit stays; other rows for want of a package are refused, named by it."""
    before = Pulled(audited("detect-secrets 1.5", {"en": 9}, "00"), "11", None, {"one": "22"})
    attempt = make_attempt(tmp_path, {Stage.PULL: before})
    if isinstance(expected, str):
        with pytest.raises(SettingsError, match=expected):
            with_audit_of_before(attempt, found)
    else:
        assert with_audit_of_before(attempt, found) == expected


def test_findings_that_are_gone_are_not_replaced_by_others(tmp_path: Path) -> None:
    """What is published again has the hash in the record, and nothing else gets its place."""
    (tmp_path / "findings.jsonl").write_text("{}\n")
    record = Pulled(audited("detect-secrets 1.5", {}, "00"), "11", None, {"one": "22"})
    attempt = make_attempt(tmp_path)
    sources: Any = SimpleNamespace(record=record, findings=tmp_path / "findings.jsonl")
    with pytest.raises(DataError, match="is missing, and the audit's tools on this machine find other things"):
        publish_findings(attempt, sources)
    assert list(attempt.store.list("artifacts/")) == []


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ('{"vocab_size": 32000}', 32000),
        ('{"vocab_size": 7, "text_config": {"vocab_size": 9}}', 9),
        ("[]", None),
        ("{", None),
        ('{"vocab_size": null}', None),
    ],
)
def test_the_size_of_the_embedding_is_in_the_configuration(tmp_path: Path, config: str, rows: int | None) -> None:
    """It is the text part's; where the configuration does not say, loading the model will."""
    (tmp_path / "config.json").write_text(config)
    assert vocabulary_of(tmp_path) == rows


@pytest.fixture(scope="module")
def bucket() -> Iterator[StorageOptions]:
    """A bucket with the demo's base below `base/`: its weights are none, and there is more beside it."""
    with credentials(), moto_server() as endpoint:
        options = StorageOptions(endpoint_url=endpoint)
        store = open_store(f"s3://{BUCKET}/base", options)
        for file in DEMO.iterdir():
            store.write(file.name, b"no weights" if file.suffix == ".safetensors" else file.read_bytes())
        store.write("original/params.json", b"{}")
        store.write("optimizer.pt", bytes(SMALL_BYTES + 1))
        yield options


def test_of_a_model_in_a_bucket_small_files_come_first(
    bucket: StorageOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configuration and tokenizer, no weights, no folders, nothing large; None where nothing lies."""
    monkeypatch.setattr(pull_model, "MAX_SMALL_BYTES", SMALL_BYTES)
    folder = _fetch_small_files(f"s3://{BUCKET}/base", tmp_path / "small", bucket)
    assert folder is not None
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {file.name: file.read_bytes() for file in DEMO.iterdir() if file.suffix != ".safetensors"}
    assert _fetch_small_files(f"s3://{BUCKET}/elsewhere", tmp_path / "none", bucket) is None


def test_a_model_in_a_bucket_is_refused_before_its_weights_are_fetched(bucket: StorageOptions, tmp_path: Path) -> None:
    """A target module that it does not have ends the job, although its weights could not even be read."""
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JOB_")},
        **CREDENTIALS,
        "JOB_PRESET": "demo",
        "JOB_MODEL__ID": f"s3://{BUCKET}/base",
        "JOB_STORAGE__ENDPOINT_URL": str(bucket.endpoint_url),
        "JOB_RUN__OUTPUT": str(tmp_path),
        "JOB_LORA__TARGET_MODULES": "q_prj",
        "JOB_LOG__FORMAT": "json",
    }
    done = warm.run([], environ)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "q_prj" in done.stderr


def test_a_later_attempt_fetches_the_original_model_from_its_bucket(bucket: StorageOptions, tmp_path: Path) -> None:
    """It lies where the settings say, and has to be what the run began with."""
    attempt = make_attempt(tmp_path)
    place = f"s3://{BUCKET}/base"
    shutil.copytree(DEMO, tmp_path / "base")
    (tmp_path / "base/model.safetensors").write_bytes(b"no weights")
    record = Pulled(DATASET, fingerprint(tmp_path / "base"), None, {})
    folder = fetch_original(attempt, place, bucket, record)
    assert fingerprint(folder) == record.model_sha256
    with pytest.raises(DataError, match=r"JOB_MODEL__ID: .* has changed since this run began"):
        fetch_original(attempt, place, bucket, replace(record, model_sha256="0" * 64))


@pytest.mark.parametrize("given", [None, "main"])
def test_a_later_attempt_asks_for_the_commit_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    """The repository of the base may have a newer commit meanwhile, or the branch that is set."""
    earlier = Pulled(DATASET, "0" * 64, "c" * 40, {})
    attempt = make_attempt(tmp_path, {Stage.PULL: earlier})
    words = ["--model.id=org/base", *([f"--model.revision={given}"] if given else [])]
    seen: list[tuple[str, str | None]] = []

    def download(place: str, revision: str | None, _before: object) -> None:
        seen.append((place, revision))
        raise Unreachable("the hub is away")

    monkeypatch.setattr(pull_model, "download_model", download)
    with pytest.raises(Unreachable):
        find_base(attempt, _base_settings(load_settings(words, {})), StorageOptions(), lambda *_: None)
    assert seen == [("org/base", "c" * 40)]


def test_a_later_attempt_reads_rows_at_the_commit_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a branch may have moved: of one source, of each of several, and of the validation rows' own source."""
    first, second, third = ("c" * 40, "d" * 40, "e" * 40)
    counts = {"rows": 1, "skipped": {}, "sha256": "0" * 64, "tokens": 1, "target_tokens": 1, "longest": 1}
    found = {"held_out": False, "duplicates": 0, "near_duplicates": 0}
    validation = ValidationRows(source="org/val", revision=third, split="test", format="text", **counts, **found)
    one = replace(DATASET, source="org/data", revision=first, validation=validation)
    several = replace(DATASET, revision=None, sources=[DataSourceRecord("org/data", second, 1, "0" * 64)])

    def asked(source: str, dataset: DatasetRecord | None) -> tuple[Any, ...]:
        earlier = None if dataset is None else Pulled(dataset, "0" * 64, None, {})
        attempt = make_attempt(Path(tempfile.mkdtemp(dir=tmp_path)), {Stage.PULL: earlier})
        revisions = ["--data.revision=main", "--data.validation=org/val", "--data.validation_revision=main"]
        seen: list[tuple[Any, ...]] = []

        def stop(attempt: Any, settings: Settings, storage: StorageOptions, *_: object) -> None:
            rows, own = fetch_rows(attempt, _row_settings(settings), storage)
            parts = [settings.data.revision] if isinstance(rows, str) else [part.revision for part in rows]
            seen.append((*parts, own.revision if isinstance(own, ValidationSource) else own))
            raise Unreachable("the hub is away")

        monkeypatch.setattr(pull, "_pull", stop)
        with pytest.raises(Unreachable):
            pull.pull(attempt, load_settings([f"--data.source={source}", *revisions], {}), StorageOptions())
        return seen[0]

    assert asked("org/data", None) == ("main", "main")
    assert asked("org/data", one) == (first, third)
    assert asked("org/data@dev=2x,rows.jsonl", None) == ("dev", None, "main")
    assert asked("org/data@dev=2x,rows.jsonl", several) == (second, None, "main")


@pytest.mark.parametrize("words", [["--export.formats=merged"], ["--gate.metric=exact_match", "--gate.min_delta=0"]])
def test_the_first_stage_refuses_tasks_that_the_last_one_could_not_judge(words: list[str], tmp_path: Path) -> None:
    """Exports and the gate belong to the last stage of `sft,dpo`; what they need of the tasks is known before both."""
    both = ["--train.method=sft,dpo", "--data.sft_source=rows.jsonl", "--eval.tasks=forgetting", *words]
    first, second = split_stages(load_settings(["--preset=demo", *both], {}))
    attempt = make_attempt(tmp_path, {})
    known = {"policy": None, "baseline": None}
    assert pull._load_tasks(attempt, first, StorageOptions(), **known).loaded["tasks"].keys() == {"forgetting"}
    with pytest.raises(SettingsError, match=r"JOB_(EXPORT__FORMATS|GATE__METRIC): is "):
        pull._load_tasks(attempt, first, StorageOptions(), **known, later=[second])


def test_rows_of_later_stages_are_read_by_the_first_attempt_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with them, or with exports, is known then; the next stage reads them when it begins."""
    read, exported = MagicMock(), MagicMock()
    monkeypatch.setattr(pull, "read_rows", read)
    monkeypatch.setattr(pull, "check_files_of_exports", exported)
    base = MagicMock(small_files=lambda: (tmp_path, False))
    monkeypatch.setattr(pull, "base_in_background", lambda *_: nullcontext(base))
    steps = ("_load_tasks", "fetch_rows", "load_tokenizer", "rows_with", "_check_lengths")
    for name in (*steps, "import_libraries", "check_model", "check_rows"):
        monkeypatch.setattr(pull, name, MagicMock())
    for name, value in {
        "_auditing": {},
        "known_scores": {},
        "known_audit": None,
        "find_prompt_rows": [],
        "_with_licences": (DATASET, None),
        "pull_judge": None,
    }.items():
        monkeypatch.setattr(pull, name, lambda *_, value=value, **__: value)
    first, second = load_settings(["--model.id=org/base"], {}), load_settings(["--model.id=org/base"], {})
    for earlier, stages in ((None, [first, second]), (Pulled(DATASET, "0" * 64, None, {}), [first])):
        read.reset_mock()
        exported.reset_mock()
        attempt = make_attempt(tmp_path, {Stage.PULL: earlier})
        pull._pull(attempt, first, StorageOptions(), "2026-01-01", [second])
        assert [call.args[1] for call in read.call_args_list] == [_row_settings(stage) for stage in stages]
        assert [call.args[2] for call in exported.call_args_list] == [second.export] * (earlier is None)
