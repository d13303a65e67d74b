"""A hub on this machine that accepts pushes: repositories, large-file storage and commits, by the hub's protocol.

It answers what `huggingface_hub` asks when it creates a repository, uploads files and commits them: preupload, LFS
batch with transfers in one part and in several, verification, and a commit as lines of JSON with the parent it names. A
commit that names a file whose bytes were not uploaded, or another parent than the head, is refused. It does not support
Xet, so clients need HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_that_may_write"
DATE = "2026-01-05T09:00:00.000Z"


@dataclass
class Repository:
    """A repository: each branch is a list of commits, the newest last."""

    private: bool
    branches: dict[str, list[dict[str, Any]]]


@dataclass
class Hub:
    """The hub's content, and how it answers.

    Attributes:
        repositories: By `namespace/name`.
        objects: Large files by SHA-256.
        parts: Parts of large files that are being uploaded.
        puts: SHA-256 of each upload of a large file, or of a part.
        requests: `METHOD path` of every request.
        role: Of the token.
        scoped: Permissions of a fine-grained token.
        orgs: Role by organization; None for an account of which the hub lists none, and nothing of its token.
        refuse: (method, path) -> the status to answer with; None to answer.
        before_commit: Called once before the next commit is made.
        ignored: Paths that a .gitignore excludes.
        altered: Paths that have other bytes in a commit than were sent.
        part: Bytes of a part; larger files are uploaded in several.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    role: str = "write"
    scoped: list[dict[str, Any]] | None = None
    orgs: dict[str, str] | None = field(default_factory=lambda: {"lab": "write", "guests": "read", "shut": "no_access"})
    refuse: Callable[[str, str], int | None] = lambda _method, _path: None
    before_commit: Callable[[], None] | None = None
    ignored: frozenset[str] = frozenset()
    altered: frozenset[str] = frozenset()
    part: int = 100

    def commit(self, repo: str, branch: str, files: dict[str, bytes], title: str = "by hand") -> str:
        """A commit of small files by another client."""
        commits = self.repositories[repo].branches[branch]
        tree = {**commits[-1]["tree"], **{path: _blob(data) for path, data in files.items()}}
        return self.add(commits, title, "", tree)

    def add(self, commits: list[dict[str, Any]], title: str, message: str, tree: dict[str, Any]) -> str:
        """Appends a commit; returns its id."""
        facts = json.dumps([title, message, len(commits), sorted(tree)]).encode()
        commits.append({"id": hashlib.sha1(facts).hexdigest(), "title": title, "message": message, "tree": tree})
        return str(commits[-1]["id"])

    def create(self, repo: str, *, private: bool = True) -> None:
        """A repository with the first commit that the hub itself makes."""
        self.repositories[repo] = Repository(private, {"main": []})
        self.add(self.repositories[repo].branches["main"], "initial commit", "", {".gitattributes": _blob(b"*\n")})

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Path -> bytes of every file at the head of a branch."""
        tree = self.repositories[repo].branches[branch][-1]["tree"]
        return {p: self.objects[e["lfs"]["oid"]] if "lfs" in e else e["data"] for p, e in tree.items()}

    def titles(self, repo: str, branch: str = "main") -> list[str]:
        """Titles of the commits of a branch, the oldest first."""
        return [commit["title"] for commit in self.repositories[repo].branches[branch]]


def _blob(data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"oid": oid, "size": len(data), "data": data}


@contextmanager
def hub_server(hub: Hub) -> Iterator[str]:
    """Runs the hub; yields its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: in two, the client's acknowledgement would be delayed by 40 ms
    hub: Hub

    def handle(self) -> None:
        """Answers requests until the client ends or is killed."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if (status := self.hub.refuse(self.command, path)) is not None:
            self._answer({"error": "refused"}, status)
            return
        if path.startswith("/lfs/"):
            self._store(path, body)
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials in Authorization header"}, 401)
            return
        for pattern, method in _ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                getattr(self, method)(json.loads(body) if body and method != "_commit" else body, *found.groups())
                return
        self._answer({"error": "not found"}, 404)

    def _whoami(self, _body: object) -> None:
        access: dict[str, Any] = {"role": self.hub.role}
        if self.hub.scoped is not None:
            access = {"role": "fineGrained", "fineGrained": {"scoped": self.hub.scoped}}
        account: dict[str, Any] = {"type": "user", "name": "me"}
        if self.hub.orgs is not None:
            orgs = [{"name": name, "roleInOrg": role} for name, role in self.hub.orgs.items()]
            account |= {"orgs": orgs, "auth": {"accessToken": access}}
        self._answer(account)

    def _create(self, body: dict[str, Any]) -> None:
        repo = f"{body['organization'] or 'me'}/{body['name']}"
        status = 409 if repo in self.hub.repositories else 200
        if status == 200:
            self.hub.create(repo, private=body.get("visibility") == "private")
        self._answer({"url": f"https://huggingface.co/{repo}"}, status)

    def _info(self, _body: object, repo: str, branch: str | None = None) -> None:
        if (found := self._repository(repo)) is None:
            return
        commits = self._commits(found, branch or "main")
        if commits is not None:
            self._answer({"id": repo, "sha": commits[-1]["id"], "private": found.private, "siblings": []})

    def _may_write(self, _body: object, repo: str) -> None:
        if self._repository(repo) is not None:
            self._answer({})

    def _branch(self, _body: object, repo: str, branch: str) -> None:
        if (found := self._repository(repo)) is None:
            return
        status = 409 if branch in found.branches else 200
        found.branches.setdefault(branch, [*found.branches["main"]])
        self._answer({}, status)

    def _yaml(self, _body: object) -> None:
        self._answer({"warnings": [{"message": "some metadata might be added"}]})

    def _preupload(self, body: dict[str, Any], repo: str, branch: str) -> None:
        if (found := self._repository(repo)) is None or (commits := self._commits(found, branch)) is None:
            return
        files = []
        for file in body["files"]:
            there = commits[-1]["tree"].get(file["path"], {})
            oid = there.get("lfs", there).get("oid")
            mode = "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"
            ignored = file["path"] in self.hub.ignored
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self._answer({"files": files})

    def _batch(self, body: dict[str, Any], _repo: str) -> None:
        host = f"http://{self.headers['Host']}"
        objects = []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            one: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{host}/lfs/{oid}"}
                if size > self.hub.part:
                    count = -(-size // self.hub.part)
                    parts = {str(n): f"{host}/lfs/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{host}/lfs/{oid}/complete",
                        "header": {"chunk_size": str(self.hub.part), **parts},
                    }
                one["actions"] = {"upload": upload, "verify": {"href": f"{host}/lfs/{oid}/verify"}}
            objects.append(one)
        self._answer({"transfer": "basic", "objects": objects})

    def _store(self, path: str, body: bytes) -> None:
        oid, _, what = path.removeprefix("/lfs/").partition("/")
        hub = self.hub
        if what == "verify":
            self._answer({}, 200 if oid in hub.objects else 404)
            return
        if what == "complete":
            numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
            body = b"".join(hub.parts.pop((oid, number)) for number in numbers)
        else:
            hub.puts.append(oid)
        if what.isdecimal():
            hub.parts[oid, int(what)] = body
            self._answer({}, headers={"ETag": f'"{what}"'})
            return
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer({"error": "other bytes"}, 422)
            return
        hub.objects[oid] = body
        self._answer({})

    def _commit(self, body: bytes, repo: str, branch: str) -> None:
        hub = self.hub
        if (found := self._repository(repo)) is None or (commits := self._commits(found, branch)) is None:
            return
        if (first := hub.before_commit) is not None:
            hub.before_commit = None
            first()
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in {None, commits[-1]["id"]}:
            self._answer({"error": "the branch has moved on"}, 412)
            return
        tree = dict(commits[-1]["tree"])
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del tree[value["path"]]
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.objects:
                    self._answer({"error": "the bytes are missing"}, 400)
                    return
                lfs = {"oid": value["oid"], "size": value["size"], "pointerSize": 130}
                tree[value["path"]] = {"oid": value["oid"][:40], "size": value["size"], "lfs": lfs}
            else:
                tree[value["path"]] = _blob(base64.b64decode(value["content"]))
        for path in hub.altered & tree.keys():
            facts = tree[path].get("lfs", tree[path])
            facts["oid"] = facts["oid"][::-1]
        commit = hub.add(commits, header["value"]["summary"], header["value"]["description"], tree)
        self._answer({"commitUrl": f"https://huggingface.co/{repo}/commit/{commit}", "commitOid": commit})

    def _list(self, _body: object, repo: str, branch: str) -> None:
        if (found := self._repository(repo)) is None or (commits := self._commits(found, branch)) is None:
            return
        self._answer(
            [
                {"id": c["id"], "title": c["title"], "message": c["message"], "date": DATE, "authors": [{"user": "me"}]}
                for c in reversed(commits)
            ]
        )

    def _tree(self, _body: object, repo: str, revision: str) -> None:
        if (found := self._repository(repo)) is None:
            return
        every = [commit for commits in found.branches.values() for commit in commits]
        commit = next((one for one in every if one["id"] == revision), None)
        if commit is None:
            commits = self._commits(found, revision)
            if commits is None:
                return
            commit = commits[-1]
        shown = [
            {"type": "file", "path": path, **{name: value for name, value in entry.items() if name != "data"}}
            for path, entry in commit["tree"].items()
        ]
        folders = {str(folder) for path in commit["tree"] for folder in PurePosixPath(path).parents if folder.name}
        listed = [*({"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)), *shown]
        if "recursive=true" not in self.path.lower():
            listed = [entry for entry in listed if "/" not in entry["path"]]
        self._answer(listed)

    def _repository(self, repo: str) -> Repository | None:
        if repo not in self.hub.repositories:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.hub.repositories.get(repo)

    def _commits(self, repository: Repository, branch: str) -> list[dict[str, Any]] | None:
        if branch not in repository.branches:
            self._answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return repository.branches.get(branch)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Retry-After": "0", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Keeps quiet."""


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    r"GET /api/whoami-v2": "_whoami",
    r"POST /api/repos/create": "_create",
    r"POST /api/validate-yaml": "_yaml",
    rf"GET /api/models/{_REPO}": "_info",
    rf"GET /api/models/{_REPO}/revision/(.+)": "_info",
    rf"GET /api/models/{_REPO}/auth-check/write": "_may_write",
    rf"POST /api/models/{_REPO}/branch/(.+)": "_branch",
    rf"POST /api/models/{_REPO}/preupload/(.+)": "_preupload",
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": "_batch",
    rf"POST /api/models/{_REPO}/commit/(.+)": "_commit",
    rf"GET /api/models/{_REPO}/commits/(.+)": "_list",
    rf"GET /api/models/{_REPO}/tree/(.+)": "_tree",
}
