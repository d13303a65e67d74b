"""Data sets of the hub, from a server on this machine with the hub's protocol."""

from __future__ import annotations

import errno
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import AccessDenied, DataError, JobError, SettingsError, Unreachable
from job.storage.hub import download_model, import_client
from job.storage.hub_errors import hub_errors
from tests import warm
from tests.dataset_hub import COMMIT, MODEL, OTHER, Hub, ask, serving

# The same for models: what is in the folder, or the error.
MODEL_CLIENT = """
import json, sys
from job.errors import JobError
from job.storage.hub import download_model

for source, revision in json.loads(sys.argv[1]):
    try:
        folder, commit = download_model(source, revision)
        print(json.dumps([commit, sorted(path.name for path in folder.iterdir())]))
    except JobError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """What the job makes of each case, by name; one process asks for all of them."""
    home = tmp_path_factory.mktemp("hub")
    questions = {
        "branch": ("some/good", "main", "train"),
        "commit": ("some/good", COMMIT, "train[1:]"),
        "no such split": ("some/good", COMMIT, "test"),
        "no such revision": ("some/good", "missing", "train"),
        "gated": ("some/gated", "main", "train"),
        "gated commit": ("some/gated", COMMIT, "train"),
        "private": ("some/private", "main", "train"),
        "missing": ("some/missing", "main", "train"),
        "missing commit": ("some/missing", COMMIT, "train"),
        "down": ("some/down", "main", "train"),
    }
    with serving() as endpoint:
        found = dict(zip(questions, ask(endpoint, home, *questions.values()), strict=True))
    offline = {
        "offline": ("some/good", "main", "train"),
        "offline, other commit": ("some/good", OTHER, "train"),
        "offline, unknown": ("some/other", "main", "train"),
    }
    return found | dict(zip(offline, ask("http://127.0.0.1:9", home, *offline.values(), offline=True), strict=True))


def test_a_revision_is_resolved_to_its_commit(answers: dict[str, list[object]]) -> None:
    """A branch gives the rows and the commit it stands for; a commit gives itself, and a slice of a split its rows."""
    rows = [["some/good:row 1", {"text": "cat"}], ["some/good:row 2", {"text": "mat"}]]
    assert answers["branch"] == [COMMIT, rows]
    assert answers["commit"] == [COMMIT, [["some/good:row 1", {"text": "mat"}]]]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("no such split", "DataError"),
        ("no such revision", "DataError"),
        ("gated", "AccessDenied"),
        ("gated commit", "AccessDenied"),
        ("private", "AccessDenied"),
        ("missing", "AccessDenied"),
        ("missing commit", "AccessDenied"),
        ("down", "Unreachable"),
        ("offline, unknown", "Unreachable"),
    ],
)
def test_the_hubs_errors_are_the_jobs(answers: dict[str, list[object]], case: str, error: str) -> None:
    """A refusal, a silence and wrong data are told apart, and each message names the data set."""
    kind, message = answers[case]
    assert kind == error
    assert "some/" in str(message)


def test_without_the_hub_the_cache_serves_the_same_commit_only(answers: dict[str, list[object]]) -> None:
    """Offline, a pinned data set comes from the cache; another revision of it never stands in."""
    assert answers["offline"] == answers["branch"]
    assert answers["offline, other commit"][0] == "Unreachable"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """What `download_model` makes of each case, by name."""
    home = tmp_path_factory.mktemp("models")
    with serving() as endpoint:
        found = ask(endpoint, home, ("some/model", "main"), ("some/huge", "main"), client=MODEL_CLIENT)
    offline = ask("http://127.0.0.1:9", home, ("some/model", COMMIT), client=MODEL_CLIENT, offline=True)
    huge = list(home.rglob("models--some--huge/blobs/*"))
    return {"model": found[0], "huge": found[1], "offline": offline[0], "blobs of huge": list(huge)}


def test_a_model_is_fetched_without_pickles_and_code(models: dict[str, list[object]]) -> None:
    """The folder has weights and configuration; pickled weights and a repository's code stay where they are."""
    assert models["model"] == [COMMIT, ["config.json", "model.safetensors"]]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "merges.txt"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """A pipe, a device or a link to nothing in a model's folder is named; other names there do not matter."""
    (tmp_path / "other").symlink_to("/nowhere/at/all")
    (tmp_path / f"{name}.txt").symlink_to(__file__)
    (tmp_path / "folder.json").mkdir()
    assert download_model(str(tmp_path), None) == (tmp_path, None)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        make(tmp_path / name)
        with pytest.raises(DataError, match=f"{name} is not a regular file"):
            download_model(str(tmp_path), None)
        (tmp_path / name).unlink()


def test_a_cached_model_needs_no_hub(models: dict[str, list[object]]) -> None:
    """What was fetched once is found again without a network, at the same commit."""
    assert models["offline"] == models["model"]


def test_a_model_that_does_not_fit_is_not_begun(models: dict[str, list[object]]) -> None:
    """The sizes are asked for first: a disk with too little room is an error before the first byte."""
    kind, message = models["huge"]
    assert kind == "Unreachable"
    assert "are needed" in str(message)
    assert models["blobs of huge"] == []


WEIGHTS_CLIENT = """
import sys
from pathlib import Path
from job import log
from job.errors import JobError
from job.storage.hub import download_model

log.configure("json", "info")

def fetch(source, before=lambda folder, missing: None):
    try:
        return (download_model(source, "main", before)[0] / "model.safetensors").read_bytes()
    except JobError as error:
        return type(error).__name__, str(error)

def before(folder, missing):
    print(sorted(path.name for path in folder.iterdir()), missing)

print(fetch("some/model", before))
(weights,) = Path(sys.argv[2]).rglob("model.safetensors")
weights.resolve().write_bytes(b"WEIGHTS")
print(fetch("some/model", before))
print(fetch("some/wrong"))
"""


def test_weights_are_held_against_the_hash_that_the_hub_names(tmp_path: Path) -> None:
    """A cached file with other bytes is fetched again; a hub that gives other bytes than it names is not believed.

    Configuration and tokenizer come first, and it is known then whether weights have to be fetched.
    """
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    with serving() as endpoint:
        done = warm.run(["", str(tmp_path)], env | {"HF_ENDPOINT": endpoint}, source=WEIGHTS_CLIENT)
    first, fetched, second, again, wrong = done.stdout.splitlines()
    assert (first, fetched) == ("['config.json'] True", "b'weights'")
    assert second == "['config.json', 'model.safetensors'] False"
    assert again == "b'weights'"
    assert "Unreachable" in wrong
    assert "SHA-256" in wrong
    assert not [path for path in tmp_path.rglob("blobs/*") if path.read_bytes() == b"Weights"]


def test_a_full_cache_is_no_bug() -> None:
    """A disk that fills up while a data set is prepared is an error of the machine, with what to do."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("Not enough disk space. Needed: 3 TB")):
        with pytest.raises(Unreachable, match="HF_HOME"), hub_errors("data set x"):
            raise error


PEEK_CLIENT = """
import json, sys
from job.errors import JobError
from job.storage.hub import cached_model, is_reachable, peek_dataset, peek_model

def say(work):
    try:
        print(json.dumps(work()))
    except JobError as error:
        print(json.dumps([type(error).__name__, str(error)]))

def model(source, revision):
    folder, sizes = peek_model(source, revision)
    return [sorted(path.name for path in folder.iterdir()), sizes]

say(is_reachable)
for source, revision, _ in json.loads(sys.argv[1]):
    say(lambda: model(source, revision))
    say(lambda: peek_dataset(source, revision))
    say(lambda: cached_model(source, revision) is not None)
"""


CARD_CLIENT = """
import json, sys, structlog
from job.data.licences import find_licence

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

for source, revision, kind in json.loads(sys.argv[1]):
    print(json.dumps([kind, source, find_licence(source, revision, kind)]))
"""


def test_the_licence_is_that_of_the_card(tmp_path: Path) -> None:
    """Of a model with a card the licence in it; of data without a card, and of what is refused, none and no error."""
    questions = [("some/good", "main", "model"), ("some/good", "main", "dataset"), ("some/gated", "main", "model")]
    with serving() as endpoint:
        found = ask(endpoint, tmp_path, *questions, client=CARD_CLIENT)
    assert [licence for _, _, licence in found] == ["mit", None, None]


def test_a_plan_looks_without_fetching_the_weights(tmp_path: Path) -> None:
    """Of a model the configuration, and the sizes of the rest, however large; of data its size; or who refuses."""
    questions = [(f"some/{name}", "main", "") for name in ("huge", "good", "gated", "down")]
    with serving() as endpoint:
        reachable, *found = ask(endpoint, tmp_path, *questions, client=PEEK_CLIENT)
    assert reachable is True
    small, sizes = found[0]
    assert small == ["config.json"]
    assert sizes == {"config.json": len(MODEL["config.json"]), "model.safetensors": 1 << 60}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 10**6]
    assert found[2] is True
    assert found[4] == [0, None]
    assert [answer[0] for answer in found[6:8]] == ["AccessDenied", "AccessDenied"]
    assert [answer[0] for answer in found[9:11]] == ["Unreachable", "Unreachable"]
    offline = ask("http://127.0.0.1:9", tmp_path, questions[0], ("some/other", "main", ""), client=PEEK_CLIENT)
    assert offline[0] is False
    assert [offline[1][0], offline[3]] == ["Unreachable", True]
    assert [offline[4][0], offline[6]] == ["Unreachable", False]


STRANGE: dict[str, tuple[str, int, bytes, int, str]] = {
    "page": ("", 200, b"<html>Sign in</html>", 69, "JSONDecodeError"),
    "nothing": ("", 200, b"", 69, "JSONDecodeError"),
    "no-encoding": ("", 200, b"\xff\xfe{", 69, "UnicodeDecodeError"),
    "null": ("", 200, b"null", 69, "TypeError"),
    "list": ("", 200, b"[]", 69, "TypeError"),
    "object": ("", 200, b"{}", 69, "KeyError"),
    "no-commit": ("", 200, b'{"id": "x", "sha": null}', 69, "AssertionError"),
    "deep": ("", 200, b"[" * 100_000, 69, "RecursionError"),
    "no-size": ("/tree/", 200, b'[{"type": "file", "path": "config.json"}]', 69, "KeyError"),
    "no-files": ("/tree/", 200, b"[]", 65, "none of the files that are loaded"),
    "proxy": ("", 407, b"<html>", 77, "HTTPS_PROXY"),
    "lawyers": ("", 451, b"{}", 77, "has no access"),
    "only-listed": ("/resolve/", 404, b"{}", 65, "lists a file"),
}
"""Answers that are none of the hub's: on which path, status and body; the exit code, and a part of the words."""


class Strange(Hub):
    """A hub behind something that answers in its place."""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        """Answers strangely where the model's name says so."""
        name = next((name for name in STRANGE if f"some/{name}" in self.path), "")
        if name and STRANGE[name][0] in self.path:
            status = STRANGE[name][1]
            self._answer(status, STRANGE[name][2], {"X-Error-Code": "EntryNotFound"} if status == 404 else {})
        else:
            super().do_GET()


def test_an_answer_that_is_none_of_the_hubs_is_no_bug(tmp_path: Path) -> None:
    """A login page, another shape of JSON, or a file that is only listed has its code and words that name the model."""
    with serving(Strange) as endpoint:
        found = ask(endpoint, tmp_path, *((f"some/{name}", "main") for name in STRANGE), client=MODEL_CLIENT)
    codes = {"Unreachable": 69, "DataError": 65, "AccessDenied": 77}
    for (name, (_, _, _, code, words)), (kind, message) in zip(STRANGE.items(), found, strict=True):
        assert codes.get(str(kind)) == code, (name, kind, message)
        assert words in str(message), (name, message)
        assert f"model some/{name}" in str(message)


_OUT = "../" * 5 + "outside"
HOSTILE: dict[str, dict[str, str]] = {
    "etag": {"ETag": f'"{_OUT}"'},
    "weak-etag": {"ETag": f'W/"{_OUT}"'},
    "absolute-etag": {"ETag": '"/nowhere/outside"'},
    "dots": {"ETag": 'W/".."'},
    "linked": {"X-Linked-Etag": _OUT},
    "commit": {"X-Repo-Commit": _OUT},
    "sha": {},
    "path": {},
}
"""Headers in place of the hub's, by repository; the last two are hostile in their JSON."""


class Hostile(Hub):
    """A mirror whose answers lead out of the cache, for models and data sets alike."""

    kind = ""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        """Answers as the hub does for `good`, with the hostile part put in."""
        self.kind = next((name for name in HOSTILE if f"some/{name}" in self.path), "")
        self.path = self.path.replace(f"some/{self.kind}", "some/good")
        if self.path.startswith("/api/models/some/good/revision"):
            self._answer(200, json.dumps({"id": "some/good", "sha": COMMIT}).encode())
        else:
            super().do_GET()

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self.kind == "sha":
            body = body.replace(COMMIT.encode(), _OUT.encode())
        elif self.kind == "path":
            body = body.replace(b'"config.json"', f'"{_OUT}.json"'.encode())
            body = body.replace(b'"data/train.jsonl"', f'"{_OUT}.jsonl"'.encode())
        elif "/resolve/" in self.path:
            headers = {**(headers or {}), **HOSTILE[self.kind]}
        super()._answer(status, body, headers)


def test_an_answer_that_leads_out_of_the_cache_is_refused(tmp_path: Path) -> None:
    """A commit, ETag or file name with a path in it ends as unreachable, and nothing is written beside the cache."""
    home = tmp_path / "a" / "b" / "home"
    with serving(Hostile) as endpoint:
        models = ask(endpoint, home, *((f"some/{name}", "main") for name in HOSTILE), client=MODEL_CLIENT)
        data = ask(endpoint, home, *((f"some/{name}", "main", "train") for name in HOSTILE))
    for subject, found in (("model", models), ("data set", data)):
        for name, (kind, message) in zip(HOSTILE, found, strict=True):
            assert kind == "Unreachable", (subject, name, message)
            assert f"{subject} some/{name}: " in str(message)
            assert "answers instead of the hub" in str(message), (subject, name, message)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(home)] == []
    assert not list(tmp_path.rglob("*outside*"))


RUN_CODES = {"gated": 77, "private": 77, "missing": 77, "busy": 69, "away": 69}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and log of whole runs, by the way in which the hub refuses the model."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, model: str, **changes: str) -> tuple[int, str]:
        env = {key: value for key, value in os.environ.items() if key not in {"HF_TOKEN", "HF_HUB_CACHE"}}
        env |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / name), "JOB_PRESET": "demo", "JOB_MODEL__ID": model}
        env |= {"JOB_RUN__OUTPUT": str(folder / "out"), "JOB_RUN__ID": name, **changes}
        done = warm.run([], env)
        return done.returncode, done.stderr

    with serving() as endpoint:
        found = {name: run(name, f"some/{name}", HF_ENDPOINT=endpoint) for name in RUN_CODES}
        found["offline"] = run("offline", "some/model", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
        found["nobody"] = run("nobody", "some/model", HF_ENDPOINT="http://127.0.0.1:9")
    return found


@pytest.mark.parametrize(("case", "code"), [*RUN_CODES.items(), ("offline", 69), ("nobody", 69)])
def test_a_refusal_has_its_exit_code(runs: dict[str, tuple[int, str]], case: str, code: int) -> None:
    """A run whose model the hub refuses ends with the code of the table and names the model, never with a traceback."""
    found, log = runs[case]
    assert found == code, log[-2000:]
    assert "Traceback" not in log
    assert '"exception"' not in log
    assert "model some/" in log.splitlines()[-1]


REFUSAL_CLIENT = """
import json, sys, threading
from importlib.machinery import PathFinder
from job.errors import JobError
from job.stages.preload import import_libraries
from job.storage.hub import download_model, import_client

moment, *questions = json.loads(sys.argv[1])
answered = threading.Event()

class Waiting:
    # The main thread stays in the import of `datasets`, whose lock it holds, until the hub has given all its answers.
    def find_spec(self, name, path=None, target=None):
        if name != "datasets":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module  # waits there: within `find_spec` all imports of all threads would wait
        def wait(module):
            if not answered.wait(90):
                raise SystemExit("the download waits for an import of the main thread")
            load(module)
        spec.loader.exec_module = wait
        return spec

def ask():
    for source, revision in questions:
        try:
            download_model(source, revision)
        except JobError as error:
            found.append([error.exit_code, str(error)])
        except BaseException as error:
            found.append([1, repr(error)])
    answered.set()

found = []
import_client()
if moment == "after":
    import_libraries()
else:
    assert "datasets" not in sys.modules
    sys.meta_path.insert(0, Waiting())
thread = threading.Thread(target=ask, daemon=True)
thread.start()
import datasets
thread.join()
for answer in found:
    print(json.dumps(answer))
"""
HUB_CODES = {"gated": 77, "private": 77, "missing": 77, "down": 69, "busy": 69, "away": 69}


@pytest.mark.long
@pytest.mark.parametrize("moment", ["during", "after"])
def test_a_refusal_has_its_code_while_libraries_are_imported_and_after(tmp_path: Path, moment: str) -> None:
    """The download thread's errors have the table's codes, and need no module that the main thread is importing."""
    questions = [(f"some/{name}", "main") for name in HUB_CODES] + [("some/mo del", "main")]
    with serving() as endpoint:
        found = ask(endpoint, tmp_path, moment, *questions, client=REFUSAL_CLIENT, cold=True)
    assert [code for code, _ in found] == [*HUB_CODES.values(), 65], found
    assert all(source in str(message) for (source, _), (_, message) in zip(questions, found, strict=True))
    for name, endpoint, offline in (("offline", "http://127.0.0.1:9", True), ("nobody", "http://127.0.0.1:9", False)):
        question, how = ("some/model", "main"), {"client": REFUSAL_CLIENT, "offline": offline, "cold": True}
        (answer,) = ask(endpoint, tmp_path / name, moment, question, **how)  # type: ignore[arg-type]
        assert answer[0] == 69, answer


IMPORTS_CLIENT = """
import sys
from job.errors import JobError
from job.storage.hub import import_client
from job.storage.hub_errors import hub_errors

import_client()
from huggingface_hub import errors
from huggingface_hub.errors import LocalEntryNotFoundError
before = set(sys.modules)
for error in (
    LocalEntryNotFoundError("x"), ConnectionError(), ValueError("x"), RuntimeError(), PermissionError(13, "x")
):
    try:
        with hub_errors("model x"):
            raise error
    except JobError:
        pass
print(sorted(set(sys.modules) - before))
"""


def test_translating_an_error_imports_nothing() -> None:
    """The thread that downloads a model imports nothing when something goes wrong while the main thread imports."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_CLIENT], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def bad_certificates(path: str) -> None:
    """What a client does whose file of certificates is none."""
    ssl.create_default_context(cafile=path)


def no_address() -> None:
    """What a client does with an address that is none."""
    raise type("UnsupportedProtocol", (Exception,), {"__module__": "httpx"})("not an http://")


def no_package() -> None:
    """What a client does with a proxy for which its package is not installed."""
    raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")


NONSENSE: dict[str, tuple[Callable[[], object], type[JobError], str]] = {
    "certificates missing": (lambda: bad_certificates("/nowhere.pem"), SettingsError, "SSL_CERT_FILE"),
    "certificates that are none": (lambda: bad_certificates(__file__), SettingsError, "SSL_CERT_FILE"),
    "endpoint that is no address": (no_address, SettingsError, "HF_ENDPOINT"),
    "SOCKS proxy": (no_package, SettingsError, "ALL_PROXY"),
    "token in no encoding": (lambda: "hf_ä".encode("ascii"), AccessDenied, "HF_TOKEN"),
    "cache below a file": (lambda: Path(__file__, "token").read_text(encoding="utf-8"), SettingsError, "HF_HOME"),
    "token file that is a folder": (lambda: Path("/").read_text(encoding="utf-8"), SettingsError, "HF_HOME"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_of_the_environment_is_told_as_what_it_is(case: str) -> None:
    """Addresses, certificates and tokens that are none are never a bug, nor an answer of the hub that is awaited."""
    act, error, words = NONSENSE[case]
    with pytest.raises(error, match=words), hub_errors("model some/model"):
        act()


def test_a_hub_that_is_silent_says_what_to_check() -> None:
    """The message has the fix beside the place."""
    with pytest.raises(Unreachable, match=r"model x: .*; check the network, HF_ENDPOINT"), hub_errors("model x"):
        raise ConnectionError


def test_variables_that_make_no_sense_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library reads some of its variables when it is imported, and fails on them: code 2, with the words."""

    def read_variables(_name: str) -> None:
        int("ten seconds")

    monkeypatch.setattr("job.storage.hub.import_module", read_variables)
    with pytest.raises(SettingsError, match=r"HF_ variable: is invalid: .*ten seconds"):
        import_client()


def test_a_cache_that_cannot_be_written_is_a_setting(tmp_path: Path) -> None:
    """A folder of the hub's cache that this user may not write is code 2, with HF_HOME in the words."""
    with pytest.raises(SettingsError, match="HF_HOME") as caught, hub_errors("model x"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_errors_of_datasets_are_told_by_name() -> None:
    """What `datasets` raises is translated by the names of its classes, wherever these were imported."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    for error, kind in (
        (DatasetNotFoundError("gated"), AccessDenied),
        (DatasetNotFoundError("no"), DataError),
        (DataFilesNotFoundError("none"), DataError),
    ):
        with pytest.raises(kind), hub_errors("data set x"):
            raise error
