"""Interactive commands soon give up on a store that never answers, and ask it only once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from job.cli.arguments import COMMANDS, parse_arguments
from job.cli.main import main
from job.cli.reading import reading
from job.errors import AccessDenied, Unreachable
from job.planning.other_input_checks import check_other_inputs
from job.settings.load import load_settings
from job.storage import first_answer
from job.storage.first_answer import answers_once, require_answers
from job.storage.location import Location
from job.storage.open import StorageOptions
from tests.gcs_server import TOKEN, gcs_server
from tests.s3_server import BUCKET


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """A server in place of Google's that accepts connections, and answers none; a list of those that it got."""
    monkeypatch.setattr(first_answer, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(first_answer, "ANSWER_TRIES", 2)
    connections: list[socket.socket] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def accept() -> None:
            while True:
                try:
                    connections.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
        yield connections
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("words", [["status"], ["report"], ["compare", f"gs://{BUCKET}/other"], ["verify"]])
def test_commands_that_read_give_up_soon(
    silent: list[socket.socket], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """With the limits of the first request, and not with the 60 s and more of the settings; the place is named."""
    began = time.monotonic()
    assert main([*words, f"gs://{BUCKET}/run"]) == Unreachable.exit_code
    assert time.monotonic() - began < 10
    assert "the store does not answer" in capsys.readouterr().err


def test_a_store_is_asked_once(silent: list[socket.socket]) -> None:
    """Another place in it is not waited for; paths are passed over."""
    require = answers_once(StorageOptions())
    for key in ("a", "b"):
        with pytest.raises(Unreachable, match=f"gs://{BUCKET}/{key}: the store does not answer: .*HEAD"):
            require(f"gs://{BUCKET}/{key}")
    assert len(silent) == 2
    require_answers(["a/path"], StorageOptions())
    assert len(silent) == 2


def test_which_stores_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bucket of each cloud once, however many places are in it; no limit is higher than that of the settings."""
    asked = list[tuple[str, str, float, int]]()

    def open_store(location: Location, options: StorageOptions) -> SimpleNamespace:
        asked.append((location.scheme, location.bucket, options.timeout_seconds, options.retries))

        def tag(_key: str) -> None:
            if location.bucket == "silent":
                raise Unreachable("it says nothing of reading")
            if location.bucket == "denied":
                raise AccessDenied("not this one")

        return SimpleNamespace(tag=tag)

    monkeypatch.setattr(first_answer, "open_store", open_store)
    places = [
        "s3://one/x",
        "s3://one/y",
        "s3://two/x",
        "gs://one/x",
        "s3://denied/x",
        "s3://denied/y",
        "a/path",
        "/a/path",
    ]
    require_answers([*places, "s3://"], StorageOptions())
    assert [(scheme, bucket) for scheme, bucket, _, _ in asked] == [
        ("s3", "one"),
        ("s3", "two"),
        ("gs", "one"),
        ("s3", "denied"),
    ]
    assert {(seconds, tries) for _, _, seconds, tries in asked} == {(6.0, 4)}
    require = answers_once(replace(StorageOptions(), timeout_seconds=2.5, retries=1))
    for key in ("x", "y"):
        with pytest.raises(Unreachable, match=f"^s3://silent/{key}: the store does not answer: it says nothing of re"):
            require(f"s3://silent/{key}")
    assert asked[4:] == [("s3", "silent", 2.5, 1)]


def test_the_checks_of_a_plan_wait_once(silent: list[socket.socket]) -> None:
    """What is in a store that has not answered is not checked; what a plan says of each names its place."""
    given = load_settings(
        [f"--lora.start=gs://{BUCKET}/a", f"--gate.baseline=gs://{BUCKET}/b", "--gate.min_delta=0"], {}
    )
    found = list(check_other_inputs(given, StorageOptions(), None))
    assert [(check.name, check.state) for check in found] == [("start", "not checked"), ("baseline", "not checked")]
    assert [check.what.partition(": ")[0] for check in found] == [f"gs://{BUCKET}/a", f"gs://{BUCKET}/b"]
    assert len(silent) == 2


def test_the_limit_is_that_of_the_first_request_alone() -> None:
    """Bodies keep that of the settings; a store that answers that there is nothing has answered."""
    with gcs_server() as bucket:
        storage, _ = reading(parse_arguments([f"gs://{BUCKET}/run"], COMMANDS["status"].arguments), quick=True)
    assert storage.timeout_seconds == StorageOptions().timeout_seconds > 6
    assert bucket.requests
