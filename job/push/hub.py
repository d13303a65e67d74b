"""The target `hub`: one commit to a repository of the Hugging Face hub, by the hub's own client.

The commit's message names the run, and its description the hash of all pushed files. By these a later attempt finds the
commit that an earlier one made before it was killed. Two attempts at once cannot both commit: the commit names its
parent, and the hub refuses it if the branch has moved on.

Credentials are the hub's own (HF_TOKEN, a login). Large files are uploaded before the commit, one after the other, and
their copies removed, so that the disk need not hold all of them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from job import log
from job.errors import AccessDenied, DataError, JobError, Problem, SettingsError, Unreachable
from job.push.files import PushContent, PushFile
from job.storage.hub import PREVIEW_SECONDS, import_client, is_reachable
from job.storage.hub_errors import TRANSIENT_STATUS, causes, hub_errors

SETTING = "JOB_EXPORT__HUB"
MAIN = "main"
_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_MOVED = {HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED}
_READERS = {"read", "no_access"}
"""Roles in an organization that may not make a repository there."""
_TRIES = 4
_UPLOADED_TOGETHER = 1 << 30
"""Bytes of files whose copies are on disk at once, if no file is larger."""

Change = Literal["new", "changed", "same", "delete"]


class _Moved(JobError):
    """The branch has another head than the commit's parent."""


@dataclass(frozen=True)
class HubTarget:
    """A repository of the hub.

    Attributes:
        repo: `namespace/name`.
        branch: None for `main`.
        private: Whether a new repository is private, and whether a public one is refused.
    """

    repo: str
    branch: str | None = None
    private: bool = True
    kind = "hub"
    setting = SETTING

    @property
    def place(self) -> str:
        """Repository and branch."""
        return f"{self.repo}@{self.branch or MAIN}"

    def check(self) -> str:
        """Asks the hub whether a push would be allowed, and writes nothing; returns what was found, in words.

        Raises:
            AccessDenied: There is no token, or it may not write there.
            SettingsError: The repository is public, and the settings require a private one.
            Unreachable: The hub does not answer.
        """
        api = _api()
        with _push_errors(self.repo):
            account = api.whoami()
            if _role(account) == "read":
                raise AccessDenied(f"{SETTING}: HF_TOKEN may only read; give one that may write to {self.repo}")
            if (public := self._is_public(api)) is not None:
                self._refuse_public(public=public)
                api.auth_check(self.repo, write=True)
                return f"{self.repo} exists ({'public' if public else 'private'}), and this token may write to it"
        self._check_namespace(account)
        return f"{self.repo} does not exist, and will be created as {'private' if self.private else 'public'}"

    def require_answer(self) -> None:
        """Raises Unreachable after `PREVIEW_SECONDS` without an answer: other requests are repeated for minutes."""
        import_client()
        if not is_reachable():
            what = f"the hub did not answer within {PREVIEW_SECONDS:g} s, or HF_HUB_OFFLINE is set"
            raise Unreachable(f"{SETTING}: {self.repo}: {what}; check the network, HF_ENDPOINT and proxies")

    def changes(self, content: PushContent) -> list[tuple[Change, str, int]]:
        """What a push would change: (change, path in the repository, bytes), sorted by path."""
        api = _api()
        with _push_errors(self.repo):
            repo_files = _tree(api, self.repo, self.branch or MAIN) if self._is_public(api) is not None else {}
        changes: list[tuple[Change, str, int]] = [("delete", path, 0) for path in _stale(repo_files, content)]
        for file in content.files:
            entry = repo_files.get(file.path)
            change: Change = "new" if entry is None else "same" if _is_same(entry, file, content) else "changed"
            changes.append((change, file.path, file.bytes))
        return sorted(changes, key=lambda row: row[1])

    def push(self, content: PushContent) -> str:
        """Makes the commit, unless it has been made; returns its hash.

        Raises:
            AccessDenied: There is no token, or it may not write there.
            SettingsError: The repository is public, and the settings require a private one; or the hub refuses a name
                or file.
            DataError: A file is not what was published, or the commit does not hold the same files.
            Unreachable: The hub does not answer, or others commit all the time.
        """
        api = _api()
        with _push_errors(self.repo):
            public = self._is_public(api)
            if public is None:
                api.create_repo(self.repo, private=self.private, exist_ok=True)  # another attempt may have made it
            else:
                self._refuse_public(public=public)
            if self.branch is not None:
                api.create_branch(self.repo, branch=self.branch, exist_ok=True)
        for _ in range(_TRIES):
            try:
                with _push_errors(self.repo):
                    commit = self._find_commit(api, content) or self._commit(api, content)
                    self._require_same(api, commit, content)
                    return commit
            except _Moved:
                log.get_logger().info("the branch has a new commit: trying again", repo=self.repo, branch=self.branch)
        raise Unreachable(
            f"{SETTING}: others committed to {self.place} {_TRIES} times during the push; push the run again"
        )

    def _is_public(self, api: Any) -> bool | None:
        """None if the repository does not exist, or this token may not see it."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return not api.repo_info(self.repo).private
        except RepositoryNotFoundError as error:
            if error.response.status_code == HTTPStatus.UNAUTHORIZED:
                raise
            return None

    def _refuse_public(self, *, public: bool) -> None:
        if public and self.private:
            what = f"{self.repo} is public; make it private, or set JOB_EXPORT__HUB_PRIVATE=false"
            raise SettingsError([Problem(SETTING, what)])

    def _check_namespace(self, account: Mapping[str, Any]) -> None:
        """Refuses a repository that is not there, where this token could not make it."""
        namespace = self.repo.partition("/")[0]
        roles = {org.get("name"): org.get("roleInOrg") for org in account.get("orgs") or ()} | {
            account.get("name"): "admin"
        }
        if namespace not in roles or roles[namespace] in _READERS:
            what = f"{namespace} is neither the user of HF_TOKEN nor an organization that it may write to"
            raise AccessDenied(f"{SETTING}: {self.repo} does not exist, and cannot be created: {what}")
        scoped = _access(account).get("fineGrained", {}).get("scoped")
        if scoped is not None and not any(
            scope.get("entity", {}).get("name") == namespace and "repo.write" in scope.get("permissions", ())
            for scope in scoped
        ):
            raise AccessDenied(
                f"{SETTING}: HF_TOKEN is fine-grained and has no permission to write to repositories of {namespace}"
            )

    def _find_commit(self, api: Any, content: PushContent) -> str | None:
        """The commit of this content that an earlier attempt made."""
        title, description = _message(content)
        for commit in api.list_repo_commits(self.repo, revision=self.branch):
            if commit.title == title and description in commit.message:
                return str(commit.commit_id)
        return None

    def _commit(self, api: Any, content: PushContent) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = str(api.repo_info(self.repo, revision=self.branch).sha)
        stale = _stale(_tree(api, self.repo, head), content)
        operations: list[Any] = [CommitOperationDelete(path) for path in stale]
        for group in _groups(content.files):
            copies = [content.fetch(file, content.work) for file in group]
            added = [CommitOperationAdd(file.path, str(copy)) for file, copy in zip(group, copies, strict=True)]
            content.check_stop()
            # Uploads what goes to large-file storage, and forgets where it lay; small files go with the commit itself.
            api.preupload_lfs_files(self.repo, additions=added, revision=self.branch)
            for operation, copy in zip(added, copies, strict=True):
                if operation.path_or_fileobj == b"":
                    copy.unlink()
            operations += added
        content.check_stop()
        title, description = _message(content)
        commit = api.create_commit(
            self.repo,
            operations,
            commit_message=title,
            commit_description=description,
            revision=self.branch,
            parent_commit=head,
        )
        return str(commit.oid)

    def _require_same(self, api: Any, commit: str, content: PushContent) -> None:
        """Compares what the commit holds with the manifest."""
        repo_files = _tree(api, self.repo, commit)
        problems = [
            Problem(f"{self.repo}/{file.path}", f"is not in commit {commit[:12]}; does a .gitignore there exclude it?")
            if file.path not in repo_files
            else Problem(f"{self.repo}/{file.path}", f"has other bytes in commit {commit[:12]} than in the run")
            for file in content.files
            if file.path not in repo_files or not _is_same(repo_files[file.path], file, content)
        ]
        if problems:
            raise DataError(problems)


def _api() -> Any:
    import_client()
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # they would appear among the lines of the log
    return HfApi()


def _message(content: PushContent) -> tuple[str, str]:
    """Title and description of the commit."""
    return f"qlora-job: run {content.run}", f"SHA-256 of the list of all files: {content.sha256}"


def _access(account: Mapping[str, Any]) -> Mapping[str, Any]:
    token: Mapping[str, Any] = (account.get("auth") or {}).get("accessToken") or {}
    return token


def _role(account: Mapping[str, Any]) -> str:
    return str(_access(account).get("role", ""))


def _tree(api: Any, repo: str, revision: str) -> dict[str, Any]:
    """Path -> the hub's record of each file."""
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _is_same(entry: Any, file: PushFile, content: PushContent) -> bool:
    """Whether the hub's file has the bytes of the manifest: by SHA-256 in large-file storage, else by git's hash."""
    if entry.size != file.bytes:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == file.sha256)
    data = content.fetch(file, content.work).read_bytes()
    return bool(hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == entry.blob_id)


def _stale(repo_files: Mapping[str, Any], content: PushContent) -> list[str]:
    """Files in the folder of a pushed format that are not part of it, such as shards of an earlier run."""
    folders = {file.path.partition("/")[0] for file in content.files if "/" in file.path}
    pushed = {file.path for file in content.files}
    return sorted(
        path for path in repo_files if "/" in path and path.partition("/")[0] in folders and path not in pushed
    )


def _groups(files: tuple[PushFile, ...]) -> Iterator[list[PushFile]]:
    """Files in groups of at most `_UPLOADED_TOGETHER` bytes, or of one file."""
    group, total = list[PushFile](), 0
    for file in files:
        if group and total + file.bytes > _UPLOADED_TOGETHER:
            yield group
            group, total = [], 0
        group.append(file)
        total += file.bytes
    if group:
        yield group


@contextmanager
def _push_errors(repo: str) -> Iterator[None]:
    """Turns errors of the hub's client into the job's, with what they mean for a push."""
    try:
        with hub_errors(repo), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that a card might have: lines of text in a log of JSON
            yield
    except Exception as error:
        chain = list(causes(error))
        kinds = {type(cause).__name__ for cause in chain}
        if "LocalTokenNotFoundError" in kinds:
            raise AccessDenied(f"{SETTING}: there is no token; set HF_TOKEN to one that may write to {repo}") from error
        if (answer := next((c.response for c in chain if hasattr(c, "response")), None)) is not None:
            raise _error_of_answer(answer, repo) from error
        if "JSONDecodeError" in kinds:  # a page of a proxy, or of a hub that is down
            raise Unreachable(
                f"{SETTING}: {repo}: the answer is not one of a hub; check HF_ENDPOINT and proxies"
            ) from error
        raise


def _error_of_answer(answer: Any, repo: str) -> JobError:
    status = answer.status_code
    if status in _REFUSED or status == HTTPStatus.NOT_FOUND:
        return AccessDenied(f"{SETTING}: HF_TOKEN may not write to {repo} (HTTP {status})")
    if status in _MOVED:
        return _Moved(repo)
    if status in TRANSIENT_STATUS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Unreachable(f"{SETTING}: {repo}: the hub answered with HTTP {status}")
    message = answer.headers.get("X-Error-Message") or ""
    return SettingsError([Problem(SETTING, f"{repo}: the hub refuses (HTTP {status}) {message[:200]}".rstrip())])
