"""Uploads of checkpoints while training continues."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from job import log
from job.checkpoints import async_uploader
from job.checkpoints.async_uploader import AsyncUploader
from job.errors import Preempted, Unreachable


class Uploads:
    """A publish function that waits to be let go, and remembers what it did."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.done: list[tuple[str, int]] = []
        self.threads: list[threading.Thread] = []
        self.now = self.most = 0

    def __call__(self, folder: Path, step: int) -> None:
        """Uploads nothing."""
        self.threads.append(threading.current_thread())
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.release()
        assert self.go.acquire(timeout=60)
        self.now -= 1
        self.done.append((folder.name, step))


@pytest.fixture
def uploads() -> Iterator[Uploads]:
    """Uploads that are let go at the end, whatever happens."""
    made = Uploads()
    yield made
    made.go.release(1000)
    for thread in made.threads:
        thread.join(60)
        assert not thread.is_alive()


def checkpoint(tmp_path: Path, step: int) -> Path:
    """A finished checkpoint."""
    folder = tmp_path / f"step-{step}"
    folder.mkdir()
    (folder / "file").write_text("x")
    return folder


def soon(seconds: float) -> Callable[[], float]:
    """The time that is left until a deadline."""
    deadline = time.monotonic() + seconds
    return lambda: max(0.0, deadline - time.monotonic())


def end_with(error: BaseException, uploader: AsyncUploader, folder: Path) -> None:
    """A training that hands over one checkpoint and then ends with an exception."""
    with uploader:
        uploader.submit(folder, 1)
        raise error


def test_submit_does_not_wait_for_the_upload(tmp_path: Path, uploads: Uploads) -> None:
    """Training goes on while the upload runs, in another thread."""
    with AsyncUploader(uploads) as uploader:
        uploader.submit(checkpoint(tmp_path, 1), 1)
        assert uploads.begun.acquire(timeout=60)
        assert uploads.done == []
        assert uploader.finish(timeout=0.01) is False
        assert uploads.threads[0] is not threading.current_thread()
        uploads.go.release()
        assert uploader.finish(timeout=60) is True
        assert uploads.done[0] == ("step-1", 1)  # the second may have ended too by now


def test_never_more_than_one_behind(tmp_path: Path, uploads: Uploads) -> None:
    """A second checkpoint waits for the first: one upload at a time, in order, and the waiting is measured."""
    with AsyncUploader(uploads) as uploader:
        uploader.submit(checkpoint(tmp_path, 1), 1)
        assert uploader.waited_seconds == 0
        threading.Timer(0.2, uploads.go.release, (1000,)).start()
        before = time.monotonic()
        uploader.submit(checkpoint(tmp_path, 2), 2)
        assert uploads.done[0] == ("step-1", 1)  # the second may have ended too by now
        assert 0 < uploader.waited_seconds <= time.monotonic() - before
    assert uploads.done == [("step-1", 1), ("step-2", 2)]
    assert uploads.most == 1


def test_leaving_waits(tmp_path: Path, uploads: Uploads) -> None:
    """At the end of the `with` block everything that was submitted is published, and no thread is left."""
    threading.Timer(0.1, uploads.go.release).start()
    with AsyncUploader(uploads) as uploader:
        uploader.submit(checkpoint(tmp_path, 1), 1)
    assert uploads.done[0] == ("step-1", 1)  # the second may have ended too by now
    uploads.threads[0].join(60)
    assert not uploads.threads[0].is_alive()


def test_checkpoint_is_deleted_once_published(tmp_path: Path, uploads: Uploads) -> None:
    """The local folder lives as long as its upload needs it, and no longer."""
    folder = checkpoint(tmp_path, 1)
    with AsyncUploader(uploads) as uploader:
        uploader.submit(folder, 1)
        assert uploads.begun.acquire(timeout=60)
        assert folder.exists()
        uploads.go.release()
        uploader.finish()
        assert not folder.exists()


def test_upload_times_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds of the latest uploads can be asked for, oldest first; there are none before the first."""
    now = [0.0]
    monkeypatch.setattr(async_uploader, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def publish(_folder: Path, step: int) -> None:
        now[0] += step

    with AsyncUploader(publish) as uploader:
        assert uploader.seconds == ()
        for step in (1, 3):
            uploader.submit(checkpoint(tmp_path, step), step)
        uploader.finish()
        assert uploader.seconds == (1.0, 3.0)


@pytest.mark.parametrize("call", ["submit", "check", "finish", "exit"])
def test_a_failed_upload_ends_the_run(tmp_path: Path, call: str) -> None:
    """The error of an upload is raised in the training thread by whatever it calls next; its checkpoint is kept."""
    error = Unreachable("503")
    published: list[int] = []

    def fail(_folder: Path, step: int) -> None:
        published.append(step)
        raise error

    folder, later = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    uploader = AsyncUploader(fail)
    uploader.submit(folder, 1)
    while not uploader._upload or not uploader._upload.done():
        time.sleep(0.001)
    calls = {
        "submit": lambda: uploader.submit(later, 2),
        "check": uploader.check,
        "finish": uploader.finish,
        "exit": lambda: uploader.__exit__(None, None, None),
    }
    with pytest.raises(Unreachable) as caught:
        calls[call]()
    assert caught.value is error
    assert published == [1]
    assert folder.exists()


def test_an_error_is_raised_again_and_again(tmp_path: Path) -> None:
    """Nothing can be published after a failure, however often one tries."""

    def fail(_folder: Path, _step: int) -> None:
        raise Unreachable("503")

    uploader = AsyncUploader(fail)
    uploader.submit(checkpoint(tmp_path, 1), 1)
    for step in (2, 3):
        with pytest.raises(Unreachable):
            uploader.submit(checkpoint(tmp_path, step), step)
    with pytest.raises(Unreachable), uploader:
        pass


def test_even_an_exit_in_the_upload_is_an_error(tmp_path: Path) -> None:
    """Whatever the publish function raises arrives, be it no `Exception`."""

    def leave(_folder: Path, _step: int) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit), AsyncUploader(leave) as uploader:
        uploader.submit(checkpoint(tmp_path, 1), 1)


@pytest.mark.parametrize("error", [Preempted("SIGTERM"), KeyboardInterrupt(), ValueError("a bug")])
def test_an_exception_does_not_wait_for_ever(tmp_path: Path, uploads: Uploads, error: BaseException) -> None:
    """An exception leaves the `with` block after `seconds_left` at most, and says that an upload did not end."""
    began = time.monotonic()
    with capture_logs() as logs, pytest.raises(type(error)):
        end_with(error, AsyncUploader(uploads, seconds_left=soon(0.1)), checkpoint(tmp_path, 1))
    assert 0.1 <= time.monotonic() - began < 50
    assert ["did not end in time" in line["event"] for line in logs] == [True]


def test_an_exception_lets_the_upload_finish(tmp_path: Path, uploads: Uploads) -> None:
    """A checkpoint whose upload ends within `seconds_left` is published although the run ends with an exception."""
    threading.Timer(0.1, uploads.go.release).start()
    with capture_logs() as logs, pytest.raises(Preempted):
        end_with(Preempted("SIGTERM"), AsyncUploader(uploads, seconds_left=soon(60)), checkpoint(tmp_path, 1))
    assert uploads.done[0] == ("step-1", 1)  # the second may have ended too by now
    assert logs == []


def test_an_exception_comes_before_a_failed_upload(tmp_path: Path) -> None:
    """The run ends with its own error; that the last upload failed too is in the log."""

    def fail(_folder: Path, _step: int) -> None:
        raise Unreachable("503 Slow Down")

    with capture_logs() as logs, pytest.raises(ValueError, match="a bug"):
        end_with(ValueError("a bug"), AsyncUploader(fail), checkpoint(tmp_path, 1))
    assert [line.get("error") for line in logs] == ["503 Slow Down"]


def test_log_lines_of_the_thread_carry_the_run(tmp_path: Path) -> None:
    """What the uploading thread logs is bound to the run, the attempt and the stage as in the training thread."""
    seen: list[dict[str, object]] = []

    def publish(_folder: Path, _step: int) -> None:
        seen.append(log.context())

    log.bind(run="r1")
    with log.stage("train"), AsyncUploader(publish) as uploader:
        uploader.submit(checkpoint(tmp_path, 1), 1)
    assert seen == [{"run": "r1", "stage": "train"}]


def test_the_process_does_not_end_before_the_upload(tmp_path: Path) -> None:
    """A training that fails while a checkpoint is on its way: the process, which ends at once, has waited for it."""
    program = f"""
        import time
        from pathlib import Path
        from job.cli import main as cli
        from job.__main__ import run
        from job.checkpoints.async_uploader import AsyncUploader
        folder = Path({str(tmp_path)!r})

        def publish(checkpoint, step):
            time.sleep(1)
            (folder / "published").touch()

        def main():
            try:
                with AsyncUploader(publish) as uploader:
                    (folder / "checkpoint").mkdir()
                    uploader.submit(folder / "checkpoint", 1)
                    raise ValueError("the loss is nan")
            except ValueError:
                return 65

        cli.main = main
        run()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, timeout=60)
    assert done.returncode == 65
    assert (tmp_path / "published").exists()
    assert not (tmp_path / "checkpoint").exists()


def test_a_signal_shortens_the_wait(tmp_path: Path, uploads: Uploads) -> None:
    """Who waits for an upload without a deadline is given one, and leaves in time."""
    left = [math.inf] * 2
    began = time.monotonic()
    uploader = AsyncUploader(uploads, seconds_left=lambda: left.pop() if left else 0.0)
    with capture_logs() as logs, pytest.raises(ValueError, match="a bug"):
        end_with(ValueError("a bug"), uploader, checkpoint(tmp_path, 1))
    assert time.monotonic() - began < 50
    assert ["did not end in time" in line["event"] for line in logs] == [True]
