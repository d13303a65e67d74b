"""Injected faults: their names, each fires once in a run, and there is no effect without them."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from job.checkpoints import checkpoint_store
from job.errors import SettingsError, Unreachable
from job.preemption.stop_flag import stop_on_signals
from job.runs import fault_injection
from job.runs.fault_injection import Fault, Faults, arm, faulty, parse
from job.runs.layout import Stage, fault_key
from job.storage.local import LocalStore
from tests.waiting import wait_for
from tests.wrapped_store import WrappedStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A run's store."""
    return LocalStore(tmp_path / "store")


def publish(store: LocalStore, folder: Path, step: int) -> None:
    """Publishes a small checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(b"weights" * 100)
    (folder / "progress.json").write_text(f'{{"step": {step}}}')
    checkpoint_store.commit(store, folder, step, checkpoint_store.MarkerFields(1, 1, {}))


class TestParse:
    """The language of `JOB_FAULT`."""

    def test_all_there_is(self) -> None:
        """Every documented form, with blanks where people put them."""
        text = "sigterm@step=37, kill@step=12,kill@upload=3,sigterm@stage=evaluate-base,kill@stage=train,"
        text += "s3_503@2,corrupt@checkpoint=latest,"
        assert [(f.action, f.event, f.when) for f in parse(text)] == [
            ("sigterm", "step", 37),
            ("kill", "step", 12),
            ("kill", "upload", 3),
            ("sigterm", "stage", "evaluate-base"),
            ("kill", "stage", "train"),
            ("s3_503", "request", 2),
            ("corrupt", "checkpoint", "latest"),
        ]
        assert [fault.text for fault in parse("kill@step=1")] == ["kill@step=1"]
        (fault,) = parse("sigterm@validation=8")
        assert (fault.action, fault.event, fault.when) == ("sigterm", "validation", 8)

    @pytest.mark.parametrize("text", ["", "  ", ",", " , "])
    def test_nothing(self, text: str) -> None:
        """Empty means none."""
        assert parse(text) == ()

    @pytest.mark.parametrize(
        "word",
        [
            *("kill", "kill@", "kill@step", "kill@step=0", "kill@step=-1", "kill@step=x", "kill@step=1e3", "kill@37"),
            *("kill@stage=lunch", "kill@stage=3", "hup@step=3", "s3_503@0", "s3_503@", "s3_503@step=2", "kill@step=٣"),
            *("corrupt@checkpoint=oldest", "Kill@step=1", "kill@step=1 kill@step=2", "kill@step=" + "9" * 400),
        ],
    )
    def test_what_is_unknown_is_named(self, word: str) -> None:
        """The error repeats the word and lists all that is known."""
        with pytest.raises(SettingsError) as raised:
            parse(f"kill@step=1,{word}")
        (problem,) = raised.value.problems
        assert problem.where == "JOB_FAULT"
        assert repr(word) in problem.what
        assert all(
            known in problem.what for known in ("sigterm@step=N", "s3_503@N", "corrupt@checkpoint=latest", *Stage)
        )

    def test_all_that_is_wrong_is_told_at_once(self) -> None:
        """Unknown ones and those named twice, in one error."""
        with pytest.raises(SettingsError) as raised:
            parse("a,kill@step=1,b,kill@step=1")
        assert [problem.what.split()[0] for problem in raised.value.problems] == ["'a'", "'b'", "'kill@step=1'"]


def test_without_faults_nothing_is_in_the_way(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off means off: no line, no request, and the store itself instead of a wrapper."""
    monkeypatch.setattr(store, "list", lambda prefix: pytest.fail("a request"))
    with capture_logs() as lines:
        faults = arm((), store)
        assert faulty(store, faults) is store
        faults.at("step", 1)
    assert lines == []


def test_armed_faults_are_loud(store: LocalStore) -> None:
    """One warning for each at the start, and one when it fires."""
    with stop_on_signals() as stop, capture_logs() as lines:
        faults = arm(parse("sigterm@step=2,kill@step=99"), store)
        faults.at("step", 1)
        assert (len(lines), stop()) == (2, False)
        faults.at("step", 2)
        assert stop.reason == "SIGTERM"
    assert [(line["log_level"], line["fault"]) for line in lines] == [
        ("warning", "sigterm@step=2"),
        ("warning", "kill@step=99"),
        ("warning", "sigterm@step=2"),
    ]


def test_a_fault_fires_once_in_a_run(store: LocalStore) -> None:
    """Neither the same attempt nor a later one, that comes to the same step again, finds it armed."""
    faults = parse("sigterm@stage=train")
    with stop_on_signals() as stop:
        first = arm(faults, store)
        first.at("stage", "train")
        assert stop()
    with stop_on_signals() as stop:
        first.at("stage", "train")
        second = arm(faults, store)
        second.at("stage", "train")
        assert not stop()
    assert not second
    assert faulty(store, second) is store


@pytest.mark.parametrize(("fault", "event"), [("kill@step=3", "'step', 3"), ("kill@stage=pull", "'stage', 'pull'")])
def test_a_killed_attempt_is_followed_by_one_that_gets_on(store: LocalStore, fault: str, event: str) -> None:
    """An attempt is killed by SIGKILL, and the next attempt passes the same point."""
    program = (
        "from pathlib import Path\n"
        "from job.runs.fault_injection import arm, faulty, parse\n"
        "from job.storage.local import LocalStore\n"
        f"store = LocalStore(Path({store.uri!r}))\n"
        f"faults = arm(parse({fault!r}), store)\n"
        "try:\n"
        f"    faults.at({event})\n"
        "    print('passed')\n"
        "finally:\n"
        "    print('an orderly end')\n"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True) for _ in "12"
    )
    assert first.returncode == -signal.SIGKILL
    assert "JOB_FAULT fires" in first.stdout
    assert not any(word in first.stdout for word in ("passed", "orderly"))
    assert second.returncode == 0
    assert "passed" in second.stdout


def test_a_containers_first_process_is_killed_too(store: LocalStore) -> None:
    """The kernel shields it from its own SIGKILL; it ends as abruptly, with the exit code that a container shows."""
    program = (
        "import os; os.kill = lambda *_: None\n"
        "from pathlib import Path\n"
        "from job.runs.fault_injection import arm, parse\n"
        "from job.storage.local import LocalStore\n"
        "import atexit; atexit.register(print, 'an orderly end')\n"
        f"arm(parse('kill@step=1'), LocalStore(Path({store.uri!r}))).at('step', 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("orderly")) == (137, 0)


def test_the_nth_upload_does_not_happen(store: LocalStore, tmp_path: Path) -> None:
    """The signal comes before the upload, also from the thread that publishes."""
    (tmp_path / "file").write_bytes(b"x")
    with stop_on_signals() as stop:
        wrapped = faulty(store, arm(parse("sigterm@upload=2"), store))
        wrapped.write("small", b"x")
        wrapped.upload(tmp_path / "file", "a")
        assert not stop()
        thread = threading.Thread(target=wrapped.upload, args=(tmp_path / "file", "b"))
        thread.start()
        thread.join()
        assert stop()


def test_faults_of_two_threads_fire_one_after_the_other(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 ends while the fifth upload begins: of two kills the second is recorded by the next attempt."""
    order: list[str] = []
    recording = threading.Event()

    def before(_verb: str, key: str) -> None:
        order.append(key)
        recording.set()
        time.sleep(0.1)  # the other thread is on its way

    monkeypatch.setattr(fault_injection, "_fire", lambda fault, _store: order.append(fault.text))
    armed = Faults(parse("kill@step=4,kill@upload=5"), WrappedStore(store, before=before))
    other = threading.Thread(target=armed.at, args=("upload", 5))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(armed.at, "step", 4)
        wait_for(recording.is_set)
        other.start()
        first.result()
    other.join()
    kills = ["kill@step=4", "kill@upload=5"]
    assert order == [text for kill in kills for text in (fault_key(kill), kill)]


def test_the_nth_request_fails_as_if_the_store_were_down(store: LocalStore, tmp_path: Path) -> None:
    """Every verb counts as a request; the one after it works again, and so do all in the next attempt."""
    store.write("a", b"1")
    verbs = [
        lambda s: s.read("a"),
        lambda s: s.write("b", b"2"),
        lambda s: s.upload(tmp_path / "c", "c"),
        lambda s: s.download("a", tmp_path / "copy"),
        lambda s: list(s.list()),
        lambda s: s.delete("b"),
        lambda s: s.conditional_writes(),
    ]
    (tmp_path / "c").write_bytes(b"3")
    for number, verb in enumerate(verbs, start=1):
        wrapped = faulty(store, arm(parse(f"s3_503@{number}"), store))
        for earlier in verbs[: number - 1]:
            earlier(wrapped)
        with pytest.raises(Unreachable, match=f"503.*s3_503@{number}"):
            verb(wrapped)
        verb(wrapped)
        assert not arm(parse(f"s3_503@{number}"), store)


def test_the_wrapper_is_a_whole_store(store: LocalStore, tmp_path: Path) -> None:
    """With a fault that never fires everything goes through as it is."""
    wrapped = faulty(store, arm((Fault("s3_503@999", "s3_503", "request", 999),), store))
    assert wrapped is not store
    tag = wrapped.write("a", b"1", if_absent=True)
    wrapped.write("a", b"2", if_tag=tag)
    (tmp_path / "file").write_bytes(b"3")
    wrapped.upload(tmp_path / "file", "b")
    wrapped.download("b", tmp_path / "copy", max_bytes=1)
    wrapped.delete("b")
    read = wrapped.read("a", max_bytes=1)
    assert (read.data if read else None, (tmp_path / "copy").read_bytes()) == (b"2", b"3")
    assert [info.key for info in wrapped.list()] == ["a"]
    assert wrapped.conditional_writes()
    assert wrapped.uri == store.uri


def test_the_newest_checkpoint_is_corrupted_before_it_is_restored(store: LocalStore, tmp_path: Path) -> None:
    """The attempt that finds a checkpoint finds a bad one and walks back; the attempt after that does no harm."""
    faults = parse("corrupt@checkpoint=latest")
    first = faulty(store, arm(faults, store))
    assert first is not store
    for step in (10, 20):
        publish(store, tmp_path / "state", step)
    # What an attempt left that was killed in the middle of an upload: nobody restores it.
    store.write("checkpoints/step-00000020/0002/a", b"x")
    store.write("checkpoints/step-00000030/0002/a", b"x")
    with capture_logs() as lines:
        second = faulty(store, arm(faults, store))
    assert "step-00000020/0001/progress.json" in lines[-1]["object"]
    restored = checkpoint_store.restore(second, tmp_path / "restored", {})
    assert (restored.step, [skipped.step for skipped in restored.skipped]) == (10, [20])
    publish(store, tmp_path / "state", 40)
    third = faulty(store, arm(faults, store))
    assert checkpoint_store.restore(third, tmp_path / "restored", {}).step == 40


def test_a_checkpoint_that_is_damaged_already_is_left_alone(store: LocalStore, tmp_path: Path) -> None:
    """The newest one that could be restored is meant; without one the fault stays armed."""
    faults = parse("corrupt@checkpoint=latest")
    store.write("checkpoints/step-00000020/COMMITTED.json", b"{")
    faulty(store, arm(faults, store))
    assert arm(faults, store)
    publish(store, tmp_path / "state", 10)
    faulty(store, arm(faults, store))
    assert checkpoint_store.restore(store, tmp_path / "restored", {}).folder is None
