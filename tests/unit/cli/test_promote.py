"""`promote` and `--rollback` from the command line, on folders and on S3, alone and in a race."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from job.cli import promote as promote_module
from job.cli.compare import compare_command
from job.cli.promote import promote_command
from job.cli.report import report_command
from job.cli.verify import verify_command
from job.common.hashing import sealed
from job.errors import GateError, JobError, Replaced, SettingsError, VerificationError
from job.results import promotion
from job.results.promotion import KIND, MOST, PointerMoved, Promoted, pointer_location, promote, read_pointer
from job.results.reader import open_run, read_published
from job.storage.base import MAX_READ_BYTES
from job.storage.local import LocalStore
from job.storage.location import StorageOptions
from job.verification.differences import CheckResult
from tests.published_run import forge, pairs, publish_run
from tests.s3_server import BUCKET, credentials, moto_server

GATED = ("--gate.min_delta=0.01",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `a` and `b` whose gate is met, `c` whose gate is not met, and `free` without one."""
    folder = tmp_path_factory.mktemp("runs")
    publish_run(folder / "a", {"quiz": pairs(60, improved=30)}, settings=GATED)
    publish_run(folder / "b", {"quiz": pairs(60, improved=25)}, settings=GATED)
    publish_run(folder / "c", {"quiz": pairs(60, regressed=30)}, settings=GATED)
    publish_run(folder / "free", {"quiz": pairs(60, improved=30)})
    return folder


@pytest.fixture(scope="module", params=["local", "s3"])
def places(request: pytest.FixtureRequest, made: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder or bucket with the runs, and the words that reach it."""
    if request.param == "local":
        yield str(made), []
        return
    with credentials(), moto_server() as url:
        client = boto3.client("s3", endpoint_url=url)
        files = [path for path in made.rglob("*") if path.is_file() and ".store" not in path.parts]
        for path in files:
            if path.relative_to(made).parts[0] in {"a", "b"}:
                client.upload_file(str(path), BUCKET, path.relative_to(made).as_posix())
        client.close()
        yield f"s3://{BUCKET}", [f"--storage.endpoint_url={url}"]


def options(words: list[str]) -> StorageOptions:
    """How to reach the store that the words name."""
    return StorageOptions(endpoint_url=words[0].partition("=")[2]) if words else StorageOptions()


def pointer(where: str, words: list[str]) -> promotion.Pointer:
    """The pointer that has to be there."""
    found, _ = read_pointer(pointer_location(where, options(words)))
    assert found is not None
    return found


def test_forwards_and_back(places: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """The pointer moves to a run and to the next one, back again, and commands read the run through it."""
    store, reach = places
    to = f"{store}/models/current"
    assert promote_command([f"{store}/a", "--to", to, *reach]) == 0
    assert promote_command([f"{store}/b", f"--to={to}", *reach]) == 0
    found = pointer(to, reach)
    assert (found.current.run, [one.run for one in found.previous]) == (f"{store}/b", [f"{store}/a"])
    capsys.readouterr()
    assert verify_command([to, *reach]) == 0
    assert 'run "b"' in capsys.readouterr().out
    assert promote_command(["--rollback", "--to", to, *reach]) == 0
    assert f"points to {store}/a " in capsys.readouterr().out
    found = pointer(to, reach)
    assert (found.current.run, found.previous) == (f"{store}/a", ())
    assert [one.run for one in found.rolled_back] == [f"{store}/b"]
    with pytest.raises(SettingsError, match="cannot be moved back"):
        promote_command(["--rollback", "--to", to, *reach])


def test_two_at_once(places: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read the same pointer: one wins, and the other is told which run it lost to."""
    store, reach = places
    place = pointer_location(f"{store}/current", options(reach))
    runs = [read_published(open_run(f"{store}/{name}", options(reach))) for name in ("a", "b")]
    together, read, outcomes = threading.Barrier(2, timeout=60), read_pointer, dict[str, Any]()
    waits = {0: set[int]()}

    def read_together(where: promotion.Place) -> Any:
        found = read(where)
        if threading.get_ident() not in waits[0]:
            waits[0].add(threading.get_ident())
            together.wait()
        return found

    def move(number: int) -> None:
        try:
            outcomes[runs[number].id] = promote(place, runs[number])
        except JobError as error:
            outcomes[runs[number].id] = error

    monkeypatch.setattr(promotion, "read_pointer", read_together)
    threads = [threading.Thread(target=move, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lost,) = [name for name, outcome in outcomes.items() if isinstance(outcome, PointerMoved)]
    (won,) = outcomes.keys() - {lost}
    assert f"to {store}/{won} " in str(outcomes[lost])
    assert outcomes[lost].exit_code == Replaced.exit_code
    assert pointer(f"{store}/current", reach).current.run == f"{store}/{won}"


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        (("c",), GateError, "quiz"),
        (("c", "--without-gate"), GateError, "quiz"),
        (("free",), GateError, "has no quality gate"),
        (("gone",), SettingsError, "is not a run"),
    ],
)
def test_runs_that_are_refused(
    made: Path, tmp_path: Path, words: tuple[str, ...], error: type[JobError], match: str
) -> None:
    """A run whose gate is not met or not set, and one that is not there: no pointer is written."""
    with pytest.raises(error, match=match):
        promote_command([str(made / words[0]), "--to", str(tmp_path / "current"), *words[1:]])
    assert not (tmp_path / "current").exists()


def test_a_run_without_a_gate_if_asked(made: Path, tmp_path: Path) -> None:
    """`--without-gate` says so."""
    assert promote_command([str(made / "free"), "--to", str(tmp_path / "current"), "--without-gate"]) == 0


def test_a_run_that_does_not_verify(made: Path, tmp_path: Path) -> None:
    """Forged figures under a valid seal are no reason to point to it."""
    run = Path(shutil.copytree(made / "a", tmp_path / "a"))
    forge(run, lambda results: results["training"].update(loss=0.5))
    with pytest.raises(VerificationError, match=r"training\.loss"):
        promote_command([str(run), "--to", str(tmp_path / "current")])
    assert not (tmp_path / "current").exists()


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("a/current", "folder of a run"),
        ("taken", "did not write"),
        ("folder/", "is a folder"),
        ("a", "is a folder"),
        ("taken/deeper", "both an object and a folder"),
    ],
)
def test_places_that_are_refused(made: Path, tmp_path: Path, where: str, match: str) -> None:
    """A pointer goes neither into a run nor in the place of something else."""
    shutil.copytree(made / "a", tmp_path / "a")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SettingsError, match=match):
        promote_command([str(made / "a"), "--to", f"{tmp_path}/{where}"])
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_store_without_conditional_writes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused in words: both of two promotions would seem to succeed there."""
    monkeypatch.setattr(LocalStore, "conditional_writes", lambda _: False)
    with pytest.raises(SettingsError, match="without conditional writes"):
        promote_command([str(made / "a"), "--to", str(tmp_path / "current")])


def test_the_same_run_again(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes nothing, so that a repeated command adds cannot be moved back."""
    to = tmp_path / "current"
    promote_command([str(made / "a"), "--to", str(to)])
    before = to.read_bytes()
    assert promote_command([str(made / "a"), "--to", str(to)]) == 0
    assert to.read_bytes() == before
    assert "already" in capsys.readouterr().out


def test_the_run_before_is_gone(made: Path, tmp_path: Path) -> None:
    """A pointer is not moved back to a run whose files are gone, or that is another one by now."""
    to, runs = tmp_path / "current", Path(shutil.copytree(made, tmp_path / "runs"))
    for name in ("a", "b"):
        promote_command([str(runs / name), "--to", str(to)])
    before = to.read_bytes()
    (runs / "a/artifacts/adapter/adapter_model.safetensors").unlink()
    with pytest.raises(VerificationError, match="not the run that was promoted"):
        promote_command(["--rollback", "--to", str(to)])
    assert to.read_bytes() == before


def test_another_run_in_the_place_of_the_promoted_one(made: Path, tmp_path: Path) -> None:
    """A reader does not take it for the promoted one."""
    to, run = tmp_path / "current", Path(shutil.copytree(made / "a", tmp_path / "a"))
    promote_command([str(run), "--to", str(to)])
    forge(run, lambda results: results["training"].update(loss=0.5))
    with pytest.raises(VerificationError, match="its manifest differs"):
        verify_command([str(to)])


@pytest.mark.parametrize(
    "change", [lambda data: data.replace(b'"a"', b'"b"'), lambda data: data[:-9]], ids=("byte", "cut")
)
def test_an_altered_pointer(made: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Is neither followed nor overwritten."""
    to = tmp_path / "current"
    promote_command([str(made / "a"), "--to", str(to)])
    to.write_bytes(change(to.read_bytes()))
    for command in (lambda: verify_command([str(to)]), lambda: promote_command([str(made / "b"), "--to", str(to)])):
        with pytest.raises(VerificationError, match="not a pointer that `promote` wrote"):
            command()


@pytest.mark.parametrize(
    "changes",
    [
        {"previous": 3},
        {"rolled_back": None},
        {"previous": [{}]},
        {"kind": [KIND]},
        {"kind": f"{KIND}0"},
        {"write": 3},
        {"more": "x"},
        {"run": None},
    ],
)
def test_a_pointer_of_another_form(made: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Anybody can write a seal: what is sealed may still be no pointer."""
    to = tmp_path / "current"
    promote_command([str(made / "a"), "--to", str(to)])
    to.write_bytes(sealed({**json.loads(to.read_bytes()), **changes}))
    with pytest.raises(VerificationError, match="not a pointer that `promote` wrote"):
        verify_command([str(to)])


def test_commands_take_a_pointer(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`compare` and `report` read the run that it points to."""
    to = str(tmp_path / "current")
    promote_command([str(made / "a"), "--to", to])
    assert compare_command([to, str(made / "b"), "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])["a"]["run"] == "a"
    assert report_command([to, "--output", str(tmp_path / "report.html")]) == 0


def test_history_is_bounded(tmp_path: Path) -> None:
    """The newest hundred entries of both lists are kept: the file stays small however often it is moved."""
    place = pointer_location(str(tmp_path / "current"), StorageOptions())
    runs = tuple(Promoted("/runs/a", f"run-{n}", "0" * 64, "1" * 64, "2026-01-01T00:00:00Z") for n in range(MOST + 5))
    promotion._write(place, promotion.Pointer(runs[0], runs, runs[::-1]), None)
    found, _ = read_pointer(place)
    assert found is not None
    assert [run.run_id for run in found.previous] == [f"run-{n}" for n in range(5, MOST + 5)]
    assert [run.run_id for run in found.rolled_back] == [f"run-{n}" for n in range(MOST - 1, -1, -1)]


def test_the_adapter_in_the_pointer_is_the_published_one(made: Path, tmp_path: Path) -> None:
    """Its hash is that of the weights, so that a server can compare it; a run without weights is refused."""
    to = str(tmp_path / "current")
    promote_command([str(made / "a"), "--to", to])
    weights = (made / "a/artifacts/adapter/adapter_model.safetensors").read_bytes()
    assert pointer(to, []).current.adapter_sha256 == hashlib.sha256(weights).hexdigest()
    run = read_published(open_run(str(made / "a")))
    others = [artifact for artifact in run.results["artifacts"] if "adapter_model" not in artifact["path"]]
    with pytest.raises(VerificationError, match=r"lists no artifacts/adapter/adapter_model\.safetensors"):
        promote(
            pointer_location(f"{to}-2", StorageOptions()), replace(run, results=run.results | {"artifacts": others})
        )
    assert not Path(f"{to}-2").exists()


def repeat(run: Path) -> None:
    """Changes what another attempt at the same run might: the manifest differs, and the run still verifies."""
    forge(run, lambda results: results["hardware"].update(cpu="another"))


def test_each_move_is_remembered(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every target before, also the same folder with another run in it, or the same run in another folder."""
    runs, to = Path(shutil.copytree(made, tmp_path / "runs")), str(tmp_path / "current")
    shutil.copytree(runs / "a", runs / "copy")
    for name in ("a", "copy", "b"):
        promote_command([str(runs / name), "--to", to])
    assert f"before it pointed to {runs / 'copy'} (adapter " in capsys.readouterr().out
    old = pointer(to, []).current.manifest_seal
    repeat(runs / "b")
    promote_command([str(runs / "b"), "--to", to])
    found = pointer(to, [])
    assert [Path(one.run).name for one in found.previous] == ["a", "copy", "b"]
    assert found.previous[-1].manifest_seal == old != found.current.manifest_seal
    with pytest.raises(VerificationError, match="replaced by another run"):  # the one before is overwritten
        promote_command(["--rollback", "--to", to])


def test_rolled_back_runs_are_remembered(made: Path, tmp_path: Path) -> None:
    """In their order, and also after the next promotion."""
    to = str(tmp_path / "current")
    runs = Path(shutil.copytree(made, tmp_path / "runs"))
    shutil.copytree(runs / "a", runs / "first")
    for name in ("first", "a", "b"):
        promote_command([str(runs / name), "--to", to])
    for _ in range(2):
        promote_command(["--rollback", "--to", to])
    promote_command([str(runs / "a"), "--to", to])
    found = pointer(to, [])
    assert Path(found.current.run).name == "a"
    assert [Path(one.run).name for one in found.previous] == ["first"]
    assert [Path(one.run).name for one in found.rolled_back] == ["b", "a"]


@pytest.mark.parametrize("back", [False, True])
def test_a_pointer_that_moved_meanwhile(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, back: bool
) -> None:
    """Neither a promotion nor a step back overwrites what another process wrote after it was read."""
    to = str(tmp_path / "current")
    place = pointer_location(to, StorageOptions())
    runs = {name: read_published(open_run(str(made / name))) for name in ("a", "b", "free")}
    for name in ("a", "b"):
        promote(place, runs[name])
    stale = read_pointer(place)
    promote(place, runs["free"])
    answers = iter([stale])
    monkeypatch.setattr(promotion, "read_pointer", lambda where: next(answers, None) or read_pointer(where))
    with pytest.raises(PointerMoved, match=rf"to {made / 'free'} "):
        promotion.roll_back(place, StorageOptions()) if back else promote(place, runs["a"])
    assert pointer(to, []).current.run_id == "free"


def test_a_run_that_is_replaced_while_it_is_verified(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was verified is what the pointer names."""
    run = Path(shutil.copytree(made / "a", tmp_path / "a"))

    def verified(*_args: object, **_options: object) -> list[CheckResult]:
        repeat(run)
        return []

    monkeypatch.setattr(promote_module, "verify", verified)
    with pytest.raises(VerificationError, match="was replaced while it was verified"):
        promote_command([str(run), "--to", str(tmp_path / "current")])
    assert not (tmp_path / "current").exists()


def test_a_folder_of_this_machine_in_a_shared_place_is_told(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other machines that follow the pointer may not reach it."""
    said = "other machines may not reach"
    promote_command([str(made / "a"), "--to", str(tmp_path / "current")])
    assert said not in capsys.readouterr().err
    monkeypatch.setattr(promote_module, "is_remote", lambda uri: uri == str(tmp_path))
    promote_command([str(made / "b"), "--to", str(tmp_path / "current")])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("where", ["s3://bucket", "s3://bucket/", "folder/", "s3://bucket/a\nb"])
def test_pointers_that_have_no_place(where: str) -> None:
    """The root of a bucket, a folder, and a name that no store takes; found without a request."""
    with pytest.raises(SettingsError, match=r"is a folder|key"):
        pointer_location(where, StorageOptions())


def test_what_is_no_pointer_and_no_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that neither is, by whatever size; the manifest of a run is taken for the run, also by its name alone."""
    (tmp_path / "file").write_text("mine")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(MAX_READ_BYTES + 1)
    for name in ("file", "huge"):
        with pytest.raises(SettingsError, match=r"neither results\.json nor a pointer"):
            verify_command([str(tmp_path / name)])
    with pytest.raises(SettingsError, match="too large for a pointer"):
        promote_command([str(made / "a"), "--to", str(tmp_path / "huge")])
    monkeypatch.chdir(made / "a")
    assert verify_command(["results.json"]) == 0
    assert verify_command([str(made / "a/results.json")]) == 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["a"], "--to: is missing; give the path or URI of the pointer"),
        (["a", "--rollback", "--to=x"], "a: is one argument too many: --rollback takes no run; remove it$"),
        (["--to=x"], "RUN: is missing"),
        (["--rollback", "--to=x", "--key=pub.pem"], "--key: has no effect with --rollback"),
        (["--rollback", "--to=x", "--without-gate"], "--without-gate: has no effect with --rollback"),
    ],
)
def test_words_that_make_no_sense(words: list[str], match: str) -> None:
    """Told before anything is read."""
    with pytest.raises(SettingsError, match=match):
        promote_command(words)
