"""Pushes to a server on this machine with the hub's protocol: what is pushed, only once, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from job.cli.push import push_command
from job.common.hashing import sealed
from job.errors import AccessDenied, DataError, GateError, JobError, SettingsError, Unreachable, VerificationError
from job.push.files import PushFile
from job.push.hub import HubTarget, _error_of_answer, _groups
from job.push.push import check_targets, content_of, push_run, recorded
from job.records import Artifact
from job.results.completed import read_complete
from job.results.delivery import model_path
from job.results.reader import read_published
from job.storage.local import LocalStore
from job.verification.verify import require_verified, verify
from tests.hub_server import TOKEN, Hub, hub_server
from tests.published_run import pairs, publish_run
from tests.s3_server import BUCKET, Request, credentials, server

REPO = "me/model"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter and a merged model."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return publish_run(folder, {"quiz": pairs(12, improved=6)}, exported={"original": [True] * 9 + [False] * 3})


@pytest.fixture
def run(original: Path, tmp_path: Path) -> LocalStore:
    """A copy of it, to which the pushes are recorded."""
    return LocalStore(Path(shutil.copytree(original, tmp_path / "first")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client of this process takes for its own."""
    hub = Hub()
    with hub_server(hub) as address:
        for name, value in {"ENDPOINT": address, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the client waits between its tries
        yield hub


def push(store: LocalStore, target: HubTarget | None = None, *, again: bool = False) -> str:
    """Pushes a run, and returns the commit."""
    (pushed,) = push_run(store, read_published(store).results, [target or HubTarget(REPO)], again=again)
    return pushed.id


def test_copies_of_files_are_made_in_the_cache_alone(
    hub: Hub, run: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's /tmp is small, or in memory, and exported models are not; nothing of them is left."""
    cache = tmp_path / "disk/cache"
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "no-such-folder"))
        results = read_published(run).results
        push_run(run, results, [HubTarget(REPO)], cache=str(cache))
        assert read_complete(run, str(cache)) == results
    assert not list(cache.iterdir())


def test_copies_of_uploaded_files_are_removed(hub: Hub, run: LocalStore, tmp_path: Path) -> None:
    """When the commit is made, only the small files that go with it are on the disk."""
    left: set[str] = set()

    def look() -> None:
        left.update(path.name for path in (tmp_path / "cache").rglob("[!.]*") if path.is_file())

    hub.before_commit = look
    push_run(run, read_published(run).results, [HubTarget(REPO)], cache=str(tmp_path / "cache"))
    assert left == {"config.json"}


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([4, 6, 1], [[4, 6], [1]]),  # exactly the limit is one group
        ([5, 6], [[5], [6]]),
        ([1, 11, 2, 3], [[1], [11], [2, 3]]),  # one that is larger is alone
        ([11, 12], [[11], [12]]),
        ([10, 1, 9, 1], [[10], [1, 9], [1]]),
    ],
)
def test_files_that_are_on_the_disk_at_once(
    sizes: list[int], groups: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, as many as fit into the limit, which is 10 bytes here."""
    monkeypatch.setattr("job.push.hub._UPLOADED_TOGETHER", 10)
    files = tuple(PushFile(Artifact(str(at), size, "0" * 64), str(at)) for at, size in enumerate(sizes))
    assert [[file.bytes for file in group] for group in _groups(files)] == groups


def expected(store: LocalStore) -> dict[str, bytes]:
    """Path on the hub -> bytes."""
    paths = [artifact["path"] for artifact in read_published(store).results["artifacts"]]
    return {path: Path(store.uri, key).read_bytes() for key in paths if (path := model_path(key)) is not None}


def held(hub: Hub, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    """What the hub has, without the file that it makes itself."""
    return {path: data for path, data in hub.files(repo, branch).items() if path != ".gitattributes"}


def test_a_run_becomes_one_private_commit_of_the_same_bytes(hub: Hub, run: LocalStore, tmp_path: Path) -> None:
    """Adapter at the top, merged model in its folder; the store records the commit, and the run still verifies."""
    commit = push(run)
    assert held(hub) == expected(run)
    assert {"adapter_model.safetensors", "merged/config.json", "merged/model.safetensors"} <= held(hub).keys()
    assert hub.titles(REPO) == ["initial commit", "qlora-job: run first"]
    assert hub.repositories[REPO].private
    known = recorded(run, "hub", f"{REPO}@main")
    assert known is not None
    assert known.id == commit == hub.repositories[REPO].branches["main"][-1]["id"]
    checks = verify(run, tmp_path)
    require_verified(checks)
    (pushes,) = [check for check in checks if check.what == "pushes"]
    assert commit in pushes.notes[0]


def test_a_second_push_changes_nothing(hub: Hub, run: LocalStore) -> None:
    """A restart trusts the record of the store; the command asks the hub, and finds the commit, even a buried one."""
    commit = push(run)
    asked = len(hub.requests)
    assert push(run) == commit
    assert len(hub.requests) == asked
    hub.commit(REPO, "main", {"README.md": b"better words"})
    uploads = len(hub.puts)
    assert push(run, again=True) == commit
    assert hub.titles(REPO) == ["initial commit", "qlora-job: run first", "by hand"]
    assert len(hub.puts) == uploads


class Kill(BaseException):
    """Stands for the end of the process: nothing handles it."""


@contextmanager
def killed_at(request: int) -> Iterator[None]:
    """Ends the process before its n-th request is sent."""
    count = 0

    def hook(_event: Any) -> None:
        nonlocal count
        count += 1
        if count == request:
            raise Kill

    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "request": [*before["request"], hook]}
    try:
        yield
    finally:
        session.event_hooks = before


def test_killed_anywhere_it_is_one_commit_of_the_same_bytes(hub: Hub, run: LocalStore) -> None:
    """Before every single request, which is after the one before it: the next attempt ends with one commit."""
    for at in range(1, 100):
        repo = f"me/killed-{at}"
        target = HubTarget(repo)
        hub.objects.clear()
        try:
            with killed_at(at):
                push(run, target)
        except Kill:
            pass
        else:
            break
        push(run, target)
        assert held(hub, repo) == expected(run)
        assert hub.titles(repo) == ["initial commit", "qlora-job: run first"]
    assert at > 10, "the hook did not count"


def test_two_attempts_at_once_make_one_commit(hub: Hub, run: LocalStore) -> None:
    """While one is about to commit, another one does: the hub refuses the first, which then finds the other's."""
    results = read_published(run).results

    def other() -> None:
        push_run(run, results, [HubTarget(REPO)])

    hub.before_commit = other
    push(run)
    assert hub.titles(REPO) == ["initial commit", "qlora-job: run first"]


def test_a_later_run_replaces_what_an_earlier_one_left(hub: Hub, run: LocalStore) -> None:
    """Files of a pushed format that are not part of it go with the same commit; others stay as they are."""
    hub.create(REPO)
    old = {"merged/model-00002-of-00002.safetensors": b"old", "merged/of/old.json": b"old"}
    hub.commit(REPO, "main", {**old, "notes/mine.txt": b"mine"})
    push(run)
    assert held(hub) == {**expected(run), "notes/mine.txt": b"mine"}


def test_a_branch_is_made_and_main_stays(hub: Hub, run: LocalStore) -> None:
    """JOB_EXPORT__HUB_REVISION names a branch, slash and all."""
    push(run, HubTarget(REPO, "runs/first"))
    assert held(hub, branch="runs/first") == expected(run)
    assert held(hub) == {}


def test_a_branch_that_has_moved_away_from_main(hub: Hub, run: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    """What is replaced, compared, shown and found again is that of the branch."""
    hub.create(REPO)
    hub.repositories[REPO].branches["runs"] = [*hub.repositories[REPO].branches["main"]]
    hub.commit(REPO, "runs", {"merged/old.safetensors": b"old"})
    hub.commit(REPO, "main", {"merged/of-main.safetensors": b"mine"})
    assert push_command([run.uri, f"--hub={REPO}", "--hub-revision=runs", "--dry-run"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if re.match("  +(new|delete|same|ch)", line)]
    assert [(words[0], words[-1]) for words in shown if words[0] != "new"] == [("delete", "merged/old.safetensors")]
    assert [words[-1] for words in shown] == sorted(words[-1] for words in shown)
    commit = push(run, HubTarget(REPO, "runs"))
    assert held(hub, branch="runs") == expected(run)
    assert held(hub) == {"merged/of-main.safetensors": b"mine"}
    hub.commit(REPO, "runs", {"merged/config.json": b"by hand, after the push"})
    assert push(run, HubTarget(REPO, "runs"), again=True) == commit
    assert hub.titles(REPO, "runs")[-2:] == ["qlora-job: run first", "by hand"]


def test_a_commit_of_other_content_is_not_taken_for_this_one(hub: Hub, run: LocalStore, tmp_path: Path) -> None:
    """Neither of a run of the same name with other files, nor of another run with the same ones."""
    whole = content_of(run, read_published(run).results, tmp_path)
    part = replace(whole, files=whole.files[:1])
    commits = [HubTarget(REPO).push(content) for content in (part, whole, part)]
    assert commits[0] == commits[2] != commits[1]
    hub.commit(REPO, "main", {"merged/config.json": b"by hand"})
    HubTarget(REPO).push(replace(whole, run="second"))
    assert hub.titles(REPO)[1:] == ["qlora-job: run first"] * 2 + ["by hand", "qlora-job: run second"]
    assert held(hub) == expected(run)


def test_another_attempt_makes_the_repository_first(hub: Hub, run: LocalStore) -> None:
    """Between the question whether it is there and its creation: it is taken as it is."""

    def created(method: str, path: str) -> None:
        if path.endswith("/repos/create") and REPO not in hub.repositories:
            hub.create(REPO)

    hub.refuse = created
    push(run)
    assert held(hub) == expected(run)


def test_a_file_that_arrives_with_other_bytes_is_an_error(hub: Hub, run: LocalStore) -> None:
    """Of a small file as of a large one: the commit is compared with the run, and not believed."""
    for path in ("merged/config.json", "merged/model.safetensors"):
        hub.altered = frozenset({path})
        repo = f"me/{path.partition('/')[2]}"
        with pytest.raises(DataError, match=f"{repo}/{path}: has other bytes in commit"):
            push(run, HubTarget(repo))


def test_a_branch_that_others_commit_to_all_the_time(hub: Hub, run: LocalStore) -> None:
    """The commit is tried four times, each time on the new head."""
    hub.refuse = lambda _method, path: 412 if "/commit/" in path else None
    with pytest.raises(Unreachable, match=f"others committed to {REPO}@main 4 times during the push"):
        push(run)
    assert [request for request in hub.requests if "/commit/" in request] == [
        f"POST /api/models/{REPO}/commit/main"
    ] * 4


class Stop(BaseException):
    """What the job ends with."""


@pytest.mark.parametrize("copies", [3, 1])
def test_a_stop_is_seen_before_an_upload_and_before_the_commit(
    hub: Hub, run: LocalStore, tmp_path: Path, copies: int
) -> None:
    """When files have been copied, and when the large ones have been uploaded: the hub gets nothing more."""
    content = content_of(run, read_published(run).results, tmp_path / "work")
    large = len([file for file in content.files if file.path.endswith(".safetensors")])

    def stop() -> None:
        copied = [entry for entry in (tmp_path / "work").rglob("[!.]*") if entry.is_file()]
        if len(copied) == (len(content.files) if copies > 1 else len(content.files) - large):
            raise Stop

    (tmp_path / "work").mkdir()
    with pytest.raises(Stop):
        HubTarget(REPO).push(replace(content, check_stop=stop))
    assert len(hub.objects) == (0 if copies > 1 else large)
    assert hub.titles(REPO) == ["initial commit"]


def test_the_words_of_a_hub_that_refuses() -> None:
    """They are passed on, as far as they are short."""
    for words, shown in (("this name is taken", "this name is taken"), ("x" * 300, "x" * 200), (None, "")):
        headers = {} if words is None else {"X-Error-Message": words}
        error = _error_of_answer(SimpleNamespace(status_code=400, headers=headers), REPO)
        assert str(error).strip().endswith(f"{REPO}: the hub refuses (HTTP 400) {shown}".strip())


def test_a_public_repository_is_refused_unless_asked_for(hub: Hub, run: LocalStore) -> None:
    """Private by default: what exists and is public takes nothing, at the check and at the push."""
    hub.create(REPO, private=False)
    for act in (lambda: check_targets([HubTarget(REPO)]), lambda: push(run)):
        with pytest.raises(SettingsError, match="is public; make it private, or set JOB_EXPORT__HUB_PRIVATE=false"):
            act()
    assert hub.titles(REPO) == ["initial commit"]
    push(run, HubTarget(REPO, private=False))
    push(run, HubTarget("me/other", private=False))
    assert not hub.repositories["me/other"].private


def test_a_file_that_is_not_what_was_published_is_not_pushed(hub: Hub, run: LocalStore) -> None:
    """Only verified bytes go: one byte of the adapter is another, and the hub gets no commit."""
    path = Path(run.uri, "artifacts/adapter/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="is damaged: its SHA-256"):
        push(run)
    assert hub.titles(REPO) == ["initial commit"]
    with pytest.raises(VerificationError):
        push_command([run.uri, f"--hub={REPO}"])


def test_a_commit_without_a_file_is_an_error(hub: Hub, run: LocalStore) -> None:
    """A .gitignore of the repository excludes a file, which the hub's client only mentions in its log."""
    hub.ignored = frozenset({"merged/config.json"})
    with pytest.raises(DataError, match=r"merged/config.json: is not in commit .* \.gitignore"):
        push(run)


REFUSALS: list[tuple[str, int, type[JobError], str]] = [
    ("/commit/", 401, AccessDenied, "HF_TOKEN may not write"),
    ("/repos/create", 403, AccessDenied, "HF_TOKEN may not write"),
    ("/commit/", 404, AccessDenied, "HF_TOKEN may not write"),
    ("/commit/", 409, Unreachable, "others committed"),
    ("/commit/", 408, Unreachable, "HTTP 408"),
    ("/commit/", 429, Unreachable, "HTTP 429"),
    ("/preupload/", 500, Unreachable, "HTTP 500"),
    ("/lfs/", 503, Unreachable, "HTTP 503"),
    ("/objects/batch", 403, AccessDenied, "HF_TOKEN may not write"),
    ("/commit/", 400, SettingsError, "the hub refuses"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal[0]} {refusal[1]}")
def test_refusals_have_their_codes(hub: Hub, run: LocalStore, refusal: tuple[str, int, type[JobError], str]) -> None:
    """Wherever the hub refuses, the error is that of the table, and the token is not in it."""
    at, status, kind, words = refusal
    hub.refuse = lambda _method, path: status if at in path else None
    with pytest.raises(kind, match=words) as error:
        push(run)
    assert TOKEN not in str(error.value)


def test_tokens_that_may_not_write_are_refused_before_training(
    hub: Hub, run: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read token, a foreign namespace, an organization that only reads, a fine-grained token, a wrong one, none."""
    assert "will be created as private" in check_targets([HubTarget(REPO)])["JOB_EXPORT__HUB"]
    assert "will be created as private" in check_targets([HubTarget("lab/model")])["JOB_EXPORT__HUB"]
    for repo in ("others/model", "guests/model", "shut/model"):
        with pytest.raises(AccessDenied, match="neither the user of HF_TOKEN nor an organization"):
            check_targets([HubTarget(repo)])
    hub.scoped = [{"entity": {"name": "lab"}, "permissions": ["repo.write"]}]
    check_targets([HubTarget("lab/model")])
    none = list[dict[str, Any]]()
    for scoped in (hub.scoped, none, [{"entity": {"name": "me"}, "permissions": ["repo.content.read"]}], [{}]):
        hub.scoped = scoped
        with pytest.raises(AccessDenied, match="fine-grained"):
            check_targets([HubTarget(REPO)])
    hub.scoped, orgs, hub.orgs = None, hub.orgs, None
    assert "will be created as private" in check_targets([HubTarget(REPO)])["JOB_EXPORT__HUB"]
    hub.orgs, hub.role = orgs, "read"
    with pytest.raises(AccessDenied, match="may only read"):
        check_targets([HubTarget(REPO)])
    hub.role = "write"
    hub.create(REPO)
    for private, words in ((True, "private"), (False, "public")):
        hub.repositories[REPO].private = private
        found = check_targets([HubTarget(REPO, private=False)])["JOB_EXPORT__HUB"]
        assert found == f"{REPO} exists ({words}), and this token may write to it"
    hub.repositories[REPO].private = True
    hub.refuse = lambda _method, path: 403 if path.endswith("/auth-check/write") else None
    with pytest.raises(AccessDenied, match="may not write"):
        check_targets([HubTarget(REPO)])
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_yesterday")
    for act in (lambda: check_targets([HubTarget(REPO)]), lambda: push(run)):
        with pytest.raises(AccessDenied) as error:
            act()
        assert "yesterday" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessDenied, match="there is no token"):
        check_targets([HubTarget(REPO)])
    assert not any("commit" in request for request in hub.requests)


def test_a_hub_that_is_away_is_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that nobody listens at, and a proxy that answers with a page."""
    hub.refuse = lambda _method, _path: 502
    with pytest.raises(Unreachable):
        check_targets([HubTarget(REPO)])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable):
        check_targets([HubTarget(REPO)])


def test_a_dry_run_gives_up_soon(run: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub and registry take a connection and never answer: each is asked once, and both are named in one error."""
    monkeypatch.setattr("job.storage.hub.PREVIEW_SECONDS", 0.1)
    monkeypatch.setattr("job.push.oci._ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        targets = [f"--hub={REPO}", f"--oci=127.0.0.1:{port}/me/model:1"]
        with pytest.raises(Unreachable, match=r"(?s)HUB: me/model: the hub did not answer.*/me/model:1: the registry"):
            push_command([run.uri, *targets, "--dry-run"])
        silent.settimeout(0)
        for _ in range(2):
            silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_a_dry_run_asks_a_store_that_fails_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tries of a run, whose pauses outlast an outage of a minute."""
    monkeypatch.setattr("job.storage.s3_client.pause_seconds", lambda _tries: 0)
    asked = list[str]()

    def answer(request: Request) -> None:
        asked.append(request.path)
        request.refuse(503, "ServiceUnavailable")

    with credentials(), server(answer) as address:
        monkeypatch.setenv("JOB_STORAGE__ENDPOINT_URL", address)
        with pytest.raises(Unreachable):
            push_command([f"s3://{BUCKET}/runs/first", f"--hub={REPO}", "--dry-run"])
    assert len(asked) == 4


def test_a_dry_run_shows_and_writes_nothing(hub: Hub, run: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file with what would happen to it: new, the same, changed, deleted."""
    assert push_command([run.uri, f"--hub={REPO}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "me/model does not exist, and will be created as private" in shown
    assert all(f"  {path}" in shown for path in expected(run))
    assert hub.repositories == {}
    hub.create(REPO)
    config, adapter = (expected(run)[path] for path in ("merged/config.json", "adapter_model.safetensors"))
    others = {"merged/config.json": config, "merged/old.safetensors": b"old"}
    others["adapter_model.safetensors"] = adapter[:-1] + bytes([adapter[-1] ^ 1])
    hub.commit(REPO, "main", others)
    assert push_command([run.uri, f"--hub={REPO}", "--dry-run"]) == 0
    found = {
        line.split()[-1]: line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")
    }
    assert (found["merged/config.json"], found["adapter_model.safetensors"]) == ("same", "changed")
    assert (found["merged/old.safetensors"], found["merged/model.safetensors"]) == ("delete", "new")
    assert not any(request.startswith(("PUT", "POST")) for request in hub.requests)
    assert list(run.list("pushed/")) == []


def test_the_command_pushes_where_the_run_was_told_to(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --hub the run's own settings name the place; with none of both it says what is missing."""
    told = publish_run(tmp_path / "told", {"quiz": pairs(12)}, settings=["--export.hub=lab/told"])
    assert push_command([str(told)]) == 0
    assert f"hub: lab/told@main holds the run as {hub.repositories['lab/told'].branches['main'][-1]['id']}" in (
        capsys.readouterr().out
    )
    untold = publish_run(tmp_path / "untold", {"quiz": pairs(12)})
    with pytest.raises(SettingsError, match="--hub or --oci: must be given"):
        push_command([str(untold)])
    with pytest.raises(SettingsError, match="--hub: must be namespace/name"):
        push_command([str(untold), "--hub=no-namespace"])


def test_a_run_whose_gate_is_not_met_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    """Exit code 3, unless --despite-gate says so."""
    gate = ["--gate.min_delta=0.5"]
    worse = publish_run(tmp_path / "worse", {"quiz": pairs(12, regressed=6)}, settings=gate)
    with pytest.raises(GateError):
        push_command([str(worse), f"--hub={REPO}"])
    assert hub.repositories == {}
    assert push_command([str(worse), f"--hub={REPO}", "--despite-gate"]) == 0
    assert hub.titles(REPO)[-1] == "qlora-job: run worse"


def test_a_record_of_other_files_does_not_verify(hub: Hub, run: LocalStore, tmp_path: Path) -> None:
    """A record that names other content than the manifest, or that was altered, is a difference."""
    push(run)
    (record,) = Path(run.uri, "pushed").iterdir()
    whole = record.read_bytes()
    record.write_bytes(whole.replace(b'"hub"', b'"hut"'))
    with pytest.raises(VerificationError, match="the record of a push"):
        require_verified(verify(run, tmp_path))
    record.write_bytes(sealed({**json.loads(whole), "files_sha256": "0" * 64}))
    with pytest.raises(VerificationError, match="files_sha256"):
        require_verified(verify(run, tmp_path))
