"""What the hub's client is kept from, which error of the job its errors are, and what is asked before a download."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from job.data import hub_dataset
from job.data.hub_dataset import check_hub_dataset, is_hub_id, open_dataset, resolve_dataset
from job.errors import AccessDenied, DataError, JobError, Preempted, SettingsError, Unreachable
from job.storage import hub
from job.storage.hub import MODEL_FILES, SMALL_FILES, cached_card, fetch_card, local_model, peek_dataset, peek_model
from job.storage.hub_errors import _check_answer, _HostileAnswer, hub_errors

TREE, FILE = "/api/models/some/good/tree/main", "/some/good/resolve/main/config.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def answer(
    path: str, headers: Mapping[str, str] | None = None, content: Any = None, *, method: str = "GET"
) -> SimpleNamespace:
    """An answer, as far as it is looked at; header names are as the client's library has them."""
    found = {"content-type": "application/json", **{name.lower(): value for name, value in (headers or {}).items()}}
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    names = SimpleNamespace(get=lambda name, default=None: found.get(name.lower(), default))
    request = SimpleNamespace(method=method, url=SimpleNamespace(path=path))
    return SimpleNamespace(headers=names, request=request, content=body, read=lambda: body)


@pytest.mark.parametrize(
    "harmless",
    [
        answer(TREE, {"X-Repo-Commit": COMMIT}, [{"path": "a..b/c.json", "lfs": {"oid": "ab12"}}, {"path": 5}, "x"]),
        answer(TREE, content={"sha": COMMIT}),
        answer(TREE, content={"sha": None}),
        answer(TREE, content=b"<html>"),
        answer(TREE, content="a text"),
        answer(TREE, {"ETag": '"of/the/hub"'}, []),
        answer(TREE, {"Content-Type": "text/plain"}, [{"path": "../x"}]),
        answer(TREE, {"Location": "/api/models/other/good/tree/main"}, []),
        answer(FILE, {"Location": "/other/good/resolve/main/config.json"}, []),
        answer(FILE, content=[{"path": "../a-list-in-a-file-of-the-model"}]),
        answer(FILE, {"ETag": 'W/"ab12"'}, method="HEAD"),
        answer(FILE, {"ETag": '"../x"', "X-Linked-Etag": '"ab12"'}, method="HEAD"),
        answer(FILE, {}, method="HEAD"),
    ],
)
def test_answers_of_a_hub_pass(harmless: SimpleNamespace) -> None:
    """What is no path, and what the client makes no path of."""
    _check_answer(harmless)


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (answer(TREE, {"X-Repo-Commit": "../x"}, []), "X-Repo-Commit '../x' is none of the hub's"),
        (answer(TREE, {"X-Repo-Commit": ".."}, []), "X-Repo-Commit"),
        (answer(TREE, {"X-Repo-Commit": ""}, []), "X-Repo-Commit ''"),
        (answer(TREE, {"X-Repo-Commit": "a\n"}, []), "X-Repo-Commit"),
        (answer(TREE, content={"sha": "."}), r"sha '\.'"),
        (answer(TREE, content={"sha": ["x"]}), "sha"),
        (answer(TREE, content=[{"lfs": {"oid": "ab"}}, {"path": "x", "lfs": {"oid": "a/b"}}]), "oid 1 'a/b'"),
        (answer(TREE, content=[{"path": "x"}, {"path": "/etc/passwd"}]), "'/etc/passwd' leads out of its folder"),
        (answer(TREE, content=[{"path": "a/../../b"}]), "leads out of its folder"),
        (answer(TREE, {"Location": f"http://elsewhere{FILE}"}), "a listing is redirected to a file"),
        (answer(FILE, {"ETag": '"a/b"'}, method="HEAD"), "ETag 'a/b'"),
        (answer(FILE, {"ETag": '"ab12"', "X-Linked-Etag": '"a/b"'}, method="HEAD"), "ETag 'a/b'"),
    ],
)
def test_answers_that_would_lead_out_of_the_cache(hostile: SimpleNamespace, words: str) -> None:
    """A commit, an ETag, a hash or a file name that is a path to elsewhere; said as an answer of another server."""
    with pytest.raises(_HostileAnswer, match=words):
        _check_answer(hostile)
    with (
        pytest.raises(Unreachable, match=r"model x: .*; check whether a proxy or a mirror answers"),
        hub_errors("model x"),
    ):
        _check_answer(hostile)


def test_the_client_of_the_hub_looks_at_every_answer() -> None:
    """With what its own client does beside it."""
    http = import_module("huggingface_hub.utils._http")
    with hub_errors("x"):
        pass
    own, checking = http.default_client_factory(), http._GLOBAL_CLIENT_FACTORY()
    assert checking.event_hooks["request"] == own.event_hooks["request"]
    assert checking.event_hooks["response"] == [*own.event_hooks["response"], _check_answer]


def refused(status: int, kind: type[errors.HfHubHTTPError] = errors.HfHubHTTPError) -> Exception:
    """What the hub's client raises for an answer."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None, url="http://hub/file")
    return kind(f"HTTP {status}", response=response)


def of_library(module: str, name: str, base: type[Exception] = Exception, **attributes: Any) -> Exception:
    """An error of a library, by name."""
    return type(name, (base,), {"__module__": module, **attributes})("it says so")


ERRORS: list[tuple[Exception, type[Exception], str]] = [
    *((refused(status), AccessDenied, "has no access to it") for status in (401, 403, 451)),
    (refused(404, errors.RepositoryNotFoundError), AccessDenied, "does not exist, or HF_TOKEN has no access"),
    (refused(410, errors.DisabledRepoError), AccessDenied, "has no access"),
    (refused(407), AccessDenied, r"refuses \(HTTP 407\); give its credentials in HTTPS_PROXY"),
    *((refused(status), Unreachable, f"answered with HTTP {status}") for status in (408, 425, 429, 500, 502, 599)),
    *((refused(status), DataError, rf"at this revision \(HTTP {status}\)") for status in (400, 404, 416, 499)),
    (refused(404, errors.RemoteEntryNotFoundError), DataError, "lists a file that it does not have: http://hub/file"),
    (ConnectionResetError("reset"), Unreachable, r"cannot be reached \(ConnectionResetError\)"),
    (TimeoutError(), Unreachable, "cannot be reached"),
    (FileNotFoundError("gone"), Unreachable, "cannot be reached"),
    (errors.LocalEntryNotFoundError("no"), Unreachable, "cannot be reached"),
    (of_library("huggingface_hub.errors", "RevisionResolutionError"), Unreachable, "cannot be reached"),
    *(
        (of_library(module, "ReadTimeout"), Unreachable, "cannot be reached")
        for module in ("httpx", "httpx2._exceptions", "httpcore", "requests.exceptions", "urllib3.x", "aiohttp")
    ),
    *(
        (of_library("requests.exceptions", name, ValueError), SettingsError, "HF_ENDPOINT: or a proxy variable")
        for name in ("InvalidProxyURL", "InvalidSchema", "InvalidURL", "MissingSchema", "UnsupportedProtocol")
    ),
    (of_library("datasets.exceptions", "DatasetNotFoundError"), DataError, "not found on the hub"),
    (
        type("DatasetNotFoundError", (Exception,), {"__module__": "datasets.exceptions"})("x cannot be accessed"),
        AccessDenied,
        "has no access",
    ),
    (of_library("datasets.exceptions", "DatasetsError"), DataError, "cannot be read: it says so"),
    (ValueError("no such split\nand more"), DataError, "cannot be read: no such split$"),
    (RuntimeError("a script"), DataError, "cannot be read: a script"),
    *(
        (OSError(number, "says the disk", "/cache"), SettingsError, "HF_HOME: x: /cache cannot be read or written")
        for number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)
    ),
    (OSError(errno.EDQUOT, "quota"), Unreachable, "the disk of the cache is full"),
    # These are none of the hub's.
    (of_library("mine", "InvalidURL"), Exception, "it says so"),
    (of_library("mine", "LocalEntryNotFoundError"), Exception, "it says so"),
    (of_library("mine", "DatasetsError"), Exception, "it says so"),
    (of_library("requests.exceptions", "HTTPError", response=5), Exception, "it says so"),
    (ImportError("no module named x"), ImportError, "no module"),
    (TypeError("of this program"), TypeError, "of this program"),
    (KeyError("of this program"), KeyError, "of this program"),
    (OSError(errno.EIO, "the disk fails"), OSError, "the disk fails"),
    (Preempted("stop"), Preempted, "stop"),
]


@pytest.mark.parametrize(
    ("error", "kind", "words"), ERRORS, ids=lambda value: getattr(value, "__name__", str(value)[:30])
)
def test_errors_of_the_hub_and_others(error: Exception, kind: type[Exception], words: str) -> None:
    """Each by its kind, also as the cause of another; what is not about the hub passes unchanged."""
    with pytest.raises(kind, match=words) as caught, hub_errors("x"):
        raise error
    if isinstance(error, kind):
        assert caught.value is error
        return
    assert caught.value.__cause__ is error
    if not words.startswith(("cannot be read", "lists a file")):  # of the outer error alone, as the data that it names
        with pytest.raises(kind, match=words), hub_errors("x"):
            raise RuntimeError("the outer error") from error


@pytest.mark.parametrize(
    ("error", "cause", "kind", "words"),
    [
        (errors.LocalEntryNotFoundError("no"), refused(403), AccessDenied, "has no access"),
        (
            errors.LocalEntryNotFoundError("no"),
            OSError(errno.ENOSPC, "full"),
            Unreachable,
            "the disk of the cache is full",
        ),
        (refused(503), of_library("httpx", "UnsupportedProtocol"), SettingsError, "HF_ENDPOINT"),
        (Preempted("stop"), ConnectionError("reset"), Preempted, "stop"),
    ],
)
def test_which_error_of_several_it_is(error: Exception, cause: Exception, kind: type[JobError], words: str) -> None:
    """The cause says more than its wrapper, a full disk more than a missing file; errors of the job pass."""
    with pytest.raises(kind, match=words), hub_errors("x"):
        raise error from cause


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./x", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("~/x", "does not exist"),
        ("a/b/c", "does not exist"),
        (__file__, "is not a folder"),
    ],
)
def test_a_path_that_is_no_model(source: str, words: str) -> None:
    """It is named as the path that it is; the hub is not asked for it."""
    with pytest.raises(DataError, match=f"JOB_MODEL__ID: {source} {words}; give the folder of a model, or a hub id"):
        local_model(source)


def test_a_hub_id_is_no_path() -> None:
    """With a namespace and without."""
    assert (local_model("gpt2"), local_model("some/model")) == (None, None)


def listed(**sizes: int | None) -> list[SimpleNamespace]:
    """What a listing gives."""
    return [SimpleNamespace(filename=name.replace("_", "."), file_size=size) for name, size in sizes.items()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub's client is asked for; its answer is the last entry's `answer`, put in by a test."""
    found: list[dict[str, Any]] = []

    def snapshot_download(source: str, **options: Any) -> Any:
        given = found[0]["answer"]
        found.append({"source": source, **options})
        if isinstance(given, Exception) and options.get("dry_run"):
            raise given
        return given if options.get("dry_run") else found[0]["folder"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


def test_small_files_of_a_model_that_are_too_large_are_not_fetched(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All small files together count, and no weights; exactly the limit is fetched."""
    monkeypatch.setattr(hub, "MAX_SMALL_BYTES", 100)
    asked.append({"answer": listed(config_json=60, tokenizer_json=40, model_safetensors=10**9), "folder": "/cache"})
    assert peek_model("some/model", "main") == (
        Path("/cache"),
        {"config.json": 60, "tokenizer.json": 40, "model.safetensors": 10**9},
    )
    same = {"source": "some/model", "revision": "main"}
    assert asked[1:] == [
        {**same, "allow_patterns": list(MODEL_FILES), "dry_run": True},
        {**same, "allow_patterns": list(SMALL_FILES)},
    ]
    asked[:] = [{"answer": listed(config_json=60, tokenizer_json=41, other_json=None), "folder": "/cache"}]
    with pytest.raises(Unreachable, match="its configuration and tokenizer are too large to be checked"):
        peek_model("some/model", None)
    assert len(asked) == 2


def test_a_card_is_fetched_if_it_is_one(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its size is asked for first; without the hub the cache counts; and a repository may have none."""
    monkeypatch.setattr(hub, "_MAX_CARD_BYTES", 10)
    (tmp_path / "README.md").touch()
    asked.append({"answer": listed(README_md=10), "folder": str(tmp_path)})
    assert fetch_card("some/data", "main", "dataset") == tmp_path / "README.md"
    same = {"source": "some/data", "repo_type": "dataset", "revision": "main", "allow_patterns": ["README.md"]}
    assert asked[1:] == [{**same, "dry_run": True}, same]
    for nothing in (listed(README_md=11), []):
        asked[:] = [{"answer": nothing, "folder": str(tmp_path)}]
        assert fetch_card("some/data", "main", "dataset") is None
        assert len(asked) == 2
    asked[:] = [{"answer": errors.DryRunError("offline"), "folder": str(tmp_path)}]
    assert fetch_card("some/data", "main", "dataset") == tmp_path / "README.md"
    asked[0]["folder"] = str(tmp_path / "empty")
    assert fetch_card("some/data", "main", "dataset") is None
    asked[0]["answer"] = refused(403)
    for kind, name in (("model", "model"), ("dataset", "data set")):
        with pytest.raises(AccessDenied, match=f"^{name} some/data: "):
            fetch_card("some/data", "main", kind)  # type: ignore[arg-type]


def test_a_card_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the right kind and revision; that there is none may be known, too."""
    asked = list[Any]()
    found: Any = None

    def look(*words: Any, **options: Any) -> Any:
        asked.append((words, options))
        return found

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    for found in ("/cache/README.md", None, object()):
        path = Path(found) if isinstance(found, str) else None
        assert cached_card("some/data", "main", "dataset") == path
    assert asked[0] == (("some/data", "README.md"), {"revision": "main", "repo_type": "dataset"})


@pytest.mark.parametrize(
    ("named", "licence"),
    [("mit", "mit"), (["mit", "apache-2.0"], "mit, apache-2.0"), ([], None), ("", None), (None, None)],
)
def test_what_a_plan_asks_about_a_data_set(monkeypatch: pytest.MonkeyPatch, named: Any, licence: str | None) -> None:
    """The size of all its files, and the licences of its card; it waits for the answer for seconds only."""
    siblings, options = [SimpleNamespace(size=size) for size in (5, None, 7)], dict[str, Any]()
    card: Any = None if named is None else SimpleNamespace(license=named)

    def dataset_info(_self: object, source: str, **given: Any) -> SimpleNamespace:
        options.update(source=source, **given)
        return SimpleNamespace(card_data=card, siblings=siblings)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    assert peek_dataset("some/data", "main") == (12, licence)
    assert options == {"source": "some/data", "revision": "main", "files_metadata": True, "timeout": 10}


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("squad", True),
        ("lab/a-b_c.d", True),
        ("9/9", True),
        ("n" * 96, True),
        ("n" * 97, False),
        ("n" * 97 + "/x", False),
        ("lab/", False),
        ("-lab/x", False),
        ("lab/.x", False),
        ("lab/x\n", False),
        ("läb/x", False),
        ("lab/x.jsonl", False),
        ("a/b/c", False),
    ],
)
def test_ids_of_the_hub(source: str, *, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub takes as a name, and is no file of data; only such a data set is asked for before a run."""
    assert is_hub_id(source) is known
    looked = list[tuple[str, str | None]]()
    monkeypatch.setattr(hub_dataset, "resolve_dataset", lambda source, revision: looked.append((source, revision)))
    check_hub_dataset(source, "main")
    assert looked == ([(source, "main")] if known else [])


def test_the_commit_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the data set, not of a model of the same name; a refusal names it."""
    asked = list[dict[str, Any]]()

    def resolve(_self: object, source: str, **options: Any) -> SimpleNamespace:
        asked.append({"source": source, **options})
        if source == "lab/gated":
            raise refused(403)
        return SimpleNamespace(resolved=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", resolve)
    assert resolve_dataset("lab/x", "main") == COMMIT
    assert asked == [{"source": "lab/x", "repo_type": "dataset", "revision": "main"}]
    with pytest.raises(AccessDenied, match=r"^data set lab/gated: "):
        resolve_dataset("lab/gated", "main")


def test_a_stop_is_seen_while_a_data_set_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one takes minutes; an error of the thread that fetches it is that of the call."""
    monkeypatch.setattr(hub_dataset, "_LOOK_SECONDS", 0.01)
    looks = list[int]()

    def stop() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise Preempted("stop")

    with pytest.raises(Preempted):
        hub_dataset._wait(Future(), stop)
    failed: Future[None] = Future()
    failed.set_exception(ConnectionError("reset"))
    with pytest.raises(ConnectionError):
        hub_dataset._wait(failed, stop)
    assert len(looks) == 2
    done: Future[None] = Future()
    done.set_result(None)
    hub_dataset._wait(done, stop)


def test_another_revision_in_the_cache_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that was asked for is the one that is read, by the split that was asked for, and rows count from 1."""
    builder = SimpleNamespace(
        hash=COMMIT,
        download_and_prepare=lambda: None,
        as_dataset=lambda split: [{"split": split}, {"split": split}],
    )
    asked = list[tuple[str, str]]()

    def resolve(_self: object, source: str, *, repo_type: str, revision: str) -> SimpleNamespace:
        asked.append((source, f"{repo_type} at {revision}"))
        return SimpleNamespace(resolved=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", resolve)

    def load_dataset_builder(source: str, revision: str) -> SimpleNamespace:
        asked.append((source, revision))
        return builder

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset_builder=load_dataset_builder))
    commit, rows = open_dataset("lab/x", "main", "test", "my data")
    assert (commit, asked) == (COMMIT, [("lab/x", "dataset at main"), ("lab/x", COMMIT)])
    assert [(row.where, row.fields) for row in rows] == [
        ("my data:row 1", {"split": "test"}),
        ("my data:row 2", {"split": "test"}),
    ]
    builder.hash = "f" * 40
    with pytest.raises(Unreachable, match=r"data set my data: .* the cache holds another revision"):
        open_dataset("lab/x", "main", "test", "my data")
