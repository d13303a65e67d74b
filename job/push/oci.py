"""The target `oci`: an image without a program, for Kubernetes' `image` volumes, KServe's modelcars, and `docker cp`.

Its files lie under `/models`: the adapter at the top, each exported format in a folder. It has the media types of plain
images, so that every registry and container runtime takes it: an index of two manifests, for amd64 and arm64, with the
same layers. A large file is a layer of its own; all small ones share one. Everything in it is determined by the files:
the same run has the same digest every time, and `verify` computes it again.

The protocol is spoken by `oras`, which also reads credentials from Docker's config.json (also that of DOCKER_CONFIG).
OCI_USERNAME and OCI_PASSWORD come first where they are set. The tag is written last, when the registry has all else.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from job import log
from job.common.hashing import hash_file
from job.errors import AccessDenied, JobError, Problem, SettingsError, Unreachable
from job.push.files import PushContent, PushFile
from job.settings.load import environment
from job.storage.base import disk_errors

SETTING = "JOB_EXPORT__OCI"
FOLDER = "models"
"""Where KServe looks for the model in a modelcar."""
ARCHITECTURES = ("amd64", "arm64")
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
OWN_LAYER = 16 << 20
"""Bytes from which a file is a layer of its own: what changes often is small, and what is large is uploaded once."""
_CHUNK = 64 << 20
"""Bytes of one request: larger layers are uploaded in several, and so much of one is in memory."""
_TIMEOUT = (10.0, 300.0)
_TRIES = 5
_LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_OCTETS = {"Content-Type": "application/octet-stream"}
_NO_CHUNKS = {
    HTTPStatus.NOT_FOUND,  # it has forgotten the upload between two chunks
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.LENGTH_REQUIRED,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    HTTPStatus.NOT_IMPLEMENTED,
}
_DOCKER_HUB = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_DOCKER_LOGIN = "https://index.docker.io/v1/"


@dataclass(frozen=True)
class Blob:
    """A part of the image: media type, SHA-256, size in bytes; `data` where it is small and made here."""

    media_type: str
    sha256: str
    size: int
    data: bytes = b""

    @property
    def digest(self) -> str:
        """As registries write it."""
        return f"sha256:{self.sha256}"

    @property
    def descriptor(self) -> dict[str, Any]:
        """As manifests refer to it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Image:
    """The image of a run: configurations and manifests by architecture, and the index."""

    configs: tuple[Blob, ...]
    manifests: tuple[Blob, ...]
    index: Blob


def layers_of(files: Sequence[PushFile]) -> list[list[PushFile]]:
    """The files of each layer: every large file alone, then all small ones together."""
    small = [file for file in files if file.bytes < OWN_LAYER]
    return [*([file] for file in files if file.bytes >= OWN_LAYER), *([small] if small else [])]


def write_layer(files: Sequence[PushFile], copies: Mapping[str, Path], target: IO[bytes]) -> None:
    """Writes a layer: a tar file whose bytes depend on names and contents alone.

    Args:
        files: Of the layer.
        copies: By path, where each of them lies.
        target: Written to from start to end, never sought in.
    """
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        paths = [PurePosixPath(FOLDER, file.path) for file in files]
        folders = {parent for path in paths for parent in path.parents if parent.name}
        for folder in sorted(folders):
            tar.addfile(_entry(str(folder), tarfile.DIRTYPE, 0o755, 0))
        for file, path in zip(files, paths, strict=True):
            with copies[file.path].open("rb") as content:
                tar.addfile(_entry(str(path), tarfile.REGTYPE, 0o644, file.bytes), content)


def _entry(name: str, kind: bytes, mode: int, size: int) -> tarfile.TarInfo:
    """No owner but root, and no time: they would change the digest."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size = kind, mode, size
    return entry


class _Hash(io.RawIOBase):
    """A file that only counts and hashes what is written to it."""

    def __init__(self) -> None:
        self.sha256, self.bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)


def layer_blob(files: Sequence[PushFile], copies: Mapping[str, Path]) -> Blob:
    """The layer's digest and size, without writing it."""
    total = _Hash()
    write_layer(files, copies, total)  # type: ignore[arg-type]
    return Blob(LAYER, total.sha256.hexdigest(), total.bytes)


def make_image(layers: Sequence[Blob], run: str, files_sha256: str) -> Image:
    """The image of these layers."""
    labels = {"org.opencontainers.image.title": f"qlora-job run {run}", "qlora-job.files.sha256": files_sha256}
    configs, manifests = [], []
    for architecture in ARCHITECTURES:
        config = _json_blob(
            CONFIG,
            {
                "architecture": architecture,
                "os": "linux",
                "config": {"Labels": labels},
                "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
                "history": [{"created_by": "qlora-job"} for _ in layers],
            },
        )
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor,
            "layers": [layer.descriptor for layer in layers],
            "annotations": labels,
        }
        configs.append(config)
        manifests.append(_json_blob(MANIFEST, manifest))
    entries = [
        {**manifest.descriptor, "platform": {"architecture": architecture, "os": "linux"}}
        for architecture, manifest in zip(ARCHITECTURES, manifests, strict=True)
    ]
    index = _json_blob(INDEX, {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries, "annotations": labels})
    return Image(tuple(configs), tuple(manifests), index)


def image_digest(files: Sequence[PushFile], copies: Mapping[str, Path], run: str, files_sha256: str) -> str:
    """The digest of a run's image, computed from its files; see `verify`."""
    return make_image([layer_blob(group, copies) for group in layers_of(files)], run, files_sha256).index.digest


def _json_blob(media_type: str, value: Mapping[str, Any]) -> Blob:
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return Blob(media_type, hashlib.sha256(data).hexdigest(), len(data), data)


@dataclass(frozen=True)
class OciTarget:
    """A tag in a registry.

    Attributes:
        reference: `registry/repository:tag`.
        plain_http: Without TLS, also where the registry is not this machine.
    """

    reference: str
    plain_http: bool = False
    kind = "oci"
    setting = SETTING

    @property
    def place(self) -> str:
        """The reference."""
        return self.reference

    def check(self) -> str:
        """Begins an upload and gives it up again, which shows that this registry takes one; returns that in words.

        Raises:
            AccessDenied: The credentials do not suffice.
            SettingsError: There is no such registry or repository.
            Unreachable: The registry does not answer.
        """
        with _registry_errors(self.reference):
            registry, container = self._registry()
            started = registry.do_request(f"{registry.prefix}://{container.upload_blob_url()}", "POST")
            location = registry._get_location(started, container)  # noqa: SLF001 - oras makes it absolute
            if location:
                registry.session.delete(location, timeout=_TIMEOUT, headers=_authorization(registry.auth))
        return f"{self.reference}: the registry accepts uploads"

    def changes(self, content: PushContent) -> list[tuple[str, str, int]]:
        """(`new` or `same`, path, bytes) of every file: whether the registry has its layer."""
        found = []
        with _registry_errors(self.reference):
            registry, container = self._registry()
            for group in layers_of(content.files):
                copies = {file.path: content.fetch(file, content.work) for file in group}
                there = registry.blob_exists(layer_blob(group, copies).descriptor, container)
                found += [("same" if there else "new", f"{FOLDER}/{file.path}", file.bytes) for file in group]
        return sorted(found, key=lambda row: row[1])

    def push(self, content: PushContent) -> str:
        """Uploads what the registry does not have, then sets the tag; returns the digest of the index.

        Raises:
            AccessDenied: The credentials do not suffice.
            SettingsError: The registry refuses the repository or the tag.
            DataError: A file is not what was published.
            Unreachable: The registry does not answer.
        """
        with _registry_errors(self.reference):
            registry, container = self._registry()
            layers = [self._push_layer(registry, container, content, group) for group in layers_of(content.files)]
            image = make_image(layers, content.run, content.sha256)
            if _tagged(registry, container) == image.index.digest:
                return image.index.digest
            for config in image.configs:
                _upload(registry, container, config, _written(config, content.work))
            for manifest in image.manifests:
                _put_manifest(registry, container, manifest, manifest.digest)
            content.alive()
            _put_manifest(registry, container, image.index, str(container.tag))
            if (found := _tagged(registry, container)) != image.index.digest:
                raise Unreachable(
                    f"{SETTING}: {self.reference} was moved to {found} by somebody else during the "
                    "push; push the run again"
                )
        return image.index.digest

    def _push_layer(self, registry: Any, container: Any, content: PushContent, group: Sequence[PushFile]) -> Blob:
        copies = {file.path: content.fetch(file, content.work) for file in group}
        path = content.work / "layer.tar"
        with disk_errors(f"cannot write {path}"):
            with path.open("wb") as target:
                write_layer(group, copies, target)
            for copy in copies.values():
                copy.unlink()
        blob = Blob(LAYER, hash_file(path), path.stat().st_size)
        content.alive()
        _upload(registry, container, blob, path)
        path.unlink()
        content.alive()
        return blob

    def _registry(self) -> tuple[Any, Any]:
        """The registry of oras, with credentials, and the parsed reference."""
        container = _parse(self.reference)
        plain = self.plain_http or _LOCAL.fullmatch(container.registry) is not None
        return _connect(container, plain=plain), container


def _parse(reference: str) -> Any:
    _import_oras()
    from oras.container import Container

    container = Container(reference)
    container.registry = _DOCKER_HUB.get(container.registry, container.registry)
    return container


def _import_oras() -> None:
    try:
        import oras.provider  # noqa: F401
    except ImportError as error:
        what = "needs the package oras: pip install 'qlora-job[export]'; it is in the image"
        raise SettingsError([Problem(SETTING, what)]) from error


def _connect(container: Any, *, plain: bool) -> Any:
    """A registry whose requests time out, are repeated, and raise the job's errors."""
    import requests
    from oras.provider import Registry
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    class Client(Registry):  # type: ignore[misc]  # oras has no types
        """The client of oras, but denials are told at once, and no request waits for ever."""

        def do_request(self, url: str, method: str = "GET", **given: Any) -> Any:
            """One request, with a second try once it is known how to log in."""
            own = _host(url) == home  # an upload may be sent to another host, which gets no credentials
            headers = {**(given.pop("headers", None) or {}), **(_authorization(self.auth) if own else {})}
            how = {**given, "timeout": _TIMEOUT}
            response = self.session.request(method, url, headers=headers, **how)
            if own and response.status_code in _REFUSED:
                try:
                    headers, changed = self.auth.authenticate_request(response, headers, refresh=True)
                except (
                    AttributeError,
                    TypeError,
                    ValueError,
                ):  # oras has no credentials, or the registry names no realm
                    changed = False
                if changed:
                    if hasattr(given.get("data"), "seek"):
                        given["data"].seek(0)  # the refused request has read it
                    response = self.session.request(method, url, headers=headers, **how)
            if response.status_code >= HTTPStatus.BAD_REQUEST and method != "HEAD":
                response.raise_for_status()
            if response.status_code in _REFUSED or response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                response.raise_for_status()
            return response

    address = f"{'http' if plain else 'https'}://{container.registry}/v2/"
    home = _host(address)
    challenge = requests.get(address, timeout=_TIMEOUT).headers.get("Www-Authenticate", "")
    client = Client(insecure=plain, auth_backend="basic" if challenge.lower().startswith("basic") else "token")
    again = Retry(
        _TRIES,
        backoff_factor=0.5,
        status_forcelist=(429, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        client.session.mount(scheme, HTTPAdapter(max_retries=again))
    environ = environment()
    user, password = environ.get("OCI_USERNAME"), environ.get("OCI_PASSWORD")
    if user and password:
        client.auth.set_basic_auth(user, password)
    else:
        folder = environ.get("DOCKER_CONFIG")
        configs = [str(Path(folder, "config.json"))] if folder and Path(folder, "config.json").is_file() else []
        login = _parse(f"{container.registry}/x")
        login.registry = _DOCKER_LOGIN if container.registry in _DOCKER_HUB.values() else container.registry
        client.auth.load_configs(login, configs)
    return client


def _host(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: where one of them differs, it is another place."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)


def _authorization(auth: Any) -> dict[str, str]:
    """The header, where there are credentials: oras fails without."""
    return dict(auth.get_auth_header()) if getattr(auth, "_basic_auth", None) or getattr(auth, "token", None) else {}


def _written(blob: Blob, work: Path) -> Path:
    path = work / f"{blob.sha256}.json"
    with disk_errors(f"cannot write {path}"):
        path.write_bytes(blob.data)
    return path


def _upload(registry: Any, container: Any, blob: Blob, path: Path) -> None:
    """Uploads a blob unless it is there; the registry compares its digest.

    A registry that takes no chunks, as many proxies do, gets the blob in one request.
    """
    import requests

    if blob.size > _CHUNK:
        try:
            registry.upload_blob(str(path), container, blob.descriptor, do_chunked=True, chunk_size=_CHUNK)
        except requests.HTTPError as error:
            answer: Any = error.response
            if answer.status_code not in _NO_CHUNKS:
                raise
            log.get_logger().info(
                "the registry does not accept chunks: uploading each file whole", status=answer.status_code
            )
            _upload_whole(registry, container, blob, path)
    else:
        registry.upload_blob(str(path), container, blob.descriptor, do_chunked=False)


def _upload_whole(registry: Any, container: Any, blob: Blob, path: Path) -> None:
    """One request, streamed from the disk: oras would read the whole blob into memory."""
    from oras.utils import append_url_params

    begun = registry.do_request(f"{registry.prefix}://{container.upload_blob_url()}", "POST", headers=_OCTETS)
    location = registry._get_location(begun, container)  # noqa: SLF001 - it knows the ways in which registries tell it
    if not location:
        raise ValueError("the registry gives no address for the upload")
    with path.open("rb") as data:
        registry.do_request(append_url_params(location, {"digest": blob.digest}), "PUT", data=data, headers=_OCTETS)


def _put_manifest(registry: Any, container: Any, blob: Blob, reference: str) -> None:
    """As the very bytes that the digest is of."""
    url = f"{registry.prefix}://{container.manifest_url(reference)}"
    registry.do_request(url, "PUT", data=blob.data, headers={"Content-Type": blob.media_type})


def _tagged(registry: Any, container: Any) -> str | None:
    """The digest that the tag points to."""
    url = f"{registry.prefix}://{container.manifest_url()}"
    answer = registry.do_request(url, "HEAD", headers={"Accept": f"{INDEX}, {MANIFEST}"})
    return answer.headers.get("Docker-Content-Digest") if answer.status_code == HTTPStatus.OK else None


@contextmanager
def _registry_errors(reference: str) -> Iterator[None]:
    """Turns errors of the registry's client into the job's."""
    import requests

    try:
        yield
    except JobError:
        raise
    except requests.HTTPError as error:
        raise _translated(error.response, reference) from error
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        what = f"{reference}: {type(error).__name__}: is it a registry with TLS? See JOB_EXPORT__OCI_PLAIN_HTTP"
        raise SettingsError([Problem(SETTING, what)]) from error
    except (requests.RequestException, ValueError) as error:
        raise Unreachable(f"{SETTING}: {reference}: the registry cannot be reached ({type(error).__name__})") from error


def _translated(answer: Any, reference: str) -> JobError:
    status = answer.status_code
    if status in _REFUSED:
        return AccessDenied(
            f"{SETTING}: {reference}: these credentials may not push there (HTTP {status}); log in with docker login, "
            "or set OCI_USERNAME and OCI_PASSWORD"
        )
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Unreachable(f"{SETTING}: {reference}: the registry answered with HTTP {status}")
    try:
        codes = ", ".join(str(one.get("code")) for one in answer.json()["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        codes = ""
    known = {HTTPStatus.NOT_FOUND: "; is there such a repository? some registries need it to be created first"}.get(
        status, ""
    )
    return SettingsError(
        [Problem(SETTING, f"{reference}: the registry refuses (HTTP {status}) {codes}{known}".strip())]
    )
