"""The target `oci`: an image without a program, for Kubernetes' `image` volumes, KServe's modelcars, and `docker cp`.

`oci_image` makes the image. The protocol is spoken by `oras`, which also reads credentials from Docker's config.json
(also that of DOCKER_CONFIG). OCI_USERNAME and OCI_PASSWORD come first where they are set. The tag is written last, when
the registry has all else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from job import log
from job.common.disk import disk_errors
from job.common.hashing import hash_file
from job.errors import AccessDenied, JobError, Problem, SettingsError, Unreachable
from job.push.files import PushContent, PushFile
from job.push.oci_image import FOLDER, INDEX, LAYER, MANIFEST, Blob, layer_blob, layers_of, make_image, write_layer
from job.settings.load import environment

SETTING = "JOB_EXPORT__OCI"
_CHUNK = 64 << 20
"""Bytes of one request: larger layers are uploaded in several, and so much of one is in memory."""
_TIMEOUT = (10.0, 300.0)
"""Seconds to connect, and to answer."""
_ANSWER_SECONDS = 10.0
"""The same where a person waits for the answer, and nothing is uploaded."""
_TRIES = 5
_LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_OCTET_STREAM = {"Content-Type": "application/octet-stream"}
_CHUNKS_REFUSED = {
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
        """Begins and cancels an upload, which shows that this registry accepts one; returns that in words.

        Raises:
            AccessDenied: The credentials do not suffice.
            SettingsError: The registry or repository does not exist.
            Unreachable: The registry does not answer.
        """
        with _registry_errors(self.reference):
            registry, container = self._registry()
            started = registry.do_request(f"{registry.prefix}://{container.upload_blob_url()}", "POST")
            location = registry._get_location(started, container)  # noqa: SLF001 - oras makes it absolute
            if location:
                registry.session.delete(location, timeout=_TIMEOUT, headers=_authorization(registry.auth))
        return f"{self.reference}: the registry accepts uploads"

    def require_answer(self) -> None:
        """Raises Unreachable after `_ANSWER_SECONDS` without an answer."""
        with _registry_errors(self.reference):
            self._registry(_ANSWER_SECONDS)

    def changes(self, content: PushContent) -> list[tuple[str, str, int]]:
        """(`new` or `same`, path, bytes) of every file: whether the registry has its layer."""
        changes = []
        with _registry_errors(self.reference):
            registry, container = self._registry()
            for group in layers_of(content.files):
                copies = {file.path: content.fetch(file, content.work) for file in group}
                exists = registry.blob_exists(layer_blob(group, copies).descriptor, container)
                changes += [("same" if exists else "new", f"{FOLDER}/{file.path}", file.bytes) for file in group]
        return sorted(changes, key=lambda row: row[1])

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
            if _digest_of_tag(registry, container) == image.index.digest:
                return image.index.digest
            for config in image.configs:
                _upload(registry, container, config, _write_blob(config, content.work))
            for manifest in image.manifests:
                _put_manifest(registry, container, manifest, manifest.digest)
            content.check_stop()
            _put_manifest(registry, container, image.index, str(container.tag))
            if (digest := _digest_of_tag(registry, container)) != image.index.digest:
                raise Unreachable(
                    f"{SETTING}: {self.reference} was moved to {digest} by another process during the "
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
        content.check_stop()
        _upload(registry, container, blob, path)
        path.unlink()
        content.check_stop()
        return blob

    def _registry(self, answer_seconds: float = _TIMEOUT[1]) -> tuple[Any, Any]:
        """The registry of oras, with credentials, and the parsed reference; it is asked once how to log in."""
        container = _parse(self.reference)
        plain = self.plain_http or _LOCAL.fullmatch(container.registry) is not None
        return _connect(container, plain=plain, answer_seconds=answer_seconds), container


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
        what = "needs the package oras, which the image has: run pip install '.[export]' in the repository"
        raise SettingsError([Problem(SETTING, what)]) from error


def _connect(container: Any, *, plain: bool, answer_seconds: float) -> Any:
    """A registry whose requests time out, are repeated, and raise the job's errors."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    address = f"{'http' if plain else 'https'}://{container.registry}/v2/"
    environ = environment()
    trust = _certificates(environ)
    timeout = (_TIMEOUT[0], answer_seconds)
    challenge = requests.get(address, timeout=timeout, verify=trust).headers.get("Www-Authenticate", "")
    kind = "basic" if challenge.lower().startswith("basic") else "token"
    client = _client_class(_host(address))(insecure=plain, auth_backend=kind, tls_verify=trust)
    client.session.verify = trust
    retry = Retry(
        _TRIES,
        backoff_factor=0.5,
        status_forcelist=(429, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        client.session.mount(scheme, HTTPAdapter(max_retries=retry))
    _set_credentials(client, container, environ)
    return client


def _client_class(registry_host: tuple[str, str, int]) -> Any:
    """The client of oras, except that denials are raised at once, and every request has a timeout.

    Args:
        registry_host: From `_host`: only requests to it get credentials.
    """
    from oras.provider import Registry

    class Client(Registry):  # type: ignore[misc]  # oras has no types
        def do_request(self, url: str, method: str = "GET", **options: Any) -> Any:
            """One request, with a second try once it is known how to log in."""
            own = _host(url) == registry_host  # an upload may be sent to another host
            headers = {**(options.pop("headers", None) or {}), **(_authorization(self.auth) if own else {})}
            request_options = {**options, "timeout": _TIMEOUT}
            response = self.session.request(method, url, headers=headers, **request_options)
            if own and response.status_code in _REFUSED:
                try:
                    headers, changed = self.auth.authenticate_request(response, headers, refresh=True)
                # oras has no credentials, or the registry names no realm
                except (AttributeError, TypeError, ValueError):
                    changed = False
                if changed:
                    if hasattr(options.get("data"), "seek"):
                        options["data"].seek(0)  # the refused request has read it
                    response = self.session.request(method, url, headers=headers, **request_options)
            if response.status_code >= HTTPStatus.BAD_REQUEST and method != "HEAD":
                response.raise_for_status()
            if response.status_code in _REFUSED or response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                response.raise_for_status()
            return response

    return Client


def _set_credentials(client: Any, container: Any, environ: Mapping[str, str]) -> None:
    """Gives a client OCI_USERNAME and OCI_PASSWORD, or else what Docker's configuration has for the registry."""
    user, password = environ.get("OCI_USERNAME"), environ.get("OCI_PASSWORD")
    if user and password:
        client.auth.set_basic_auth(user, password)
        return
    folder = environ.get("DOCKER_CONFIG")
    configs = [str(Path(folder, "config.json"))] if folder and Path(folder, "config.json").is_file() else []
    login = _parse(f"{container.registry}/x")
    login.registry = _DOCKER_LOGIN if container.registry in _DOCKER_HUB.values() else container.registry
    client.auth.load_configs(login, configs)


def _certificates(environ: Mapping[str, str]) -> str | bool:
    """The file or folder of certificates to trust, by the names of requests and of the job's other clients."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        if path := environ.get(name):
            if not Path(path).exists():
                raise SettingsError([Problem(name, f"names no certificates: there is no {path}")])
            return path
    return True


def _host(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: where one of them differs, it is another place."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443)


def _authorization(auth: Any) -> dict[str, str]:
    """The header, where there are credentials: oras fails without."""
    return dict(auth.get_auth_header()) if getattr(auth, "_basic_auth", None) or getattr(auth, "token", None) else {}


def _write_blob(blob: Blob, work: Path) -> Path:
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
            if answer.status_code not in _CHUNKS_REFUSED:
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

    started = registry.do_request(f"{registry.prefix}://{container.upload_blob_url()}", "POST", headers=_OCTET_STREAM)
    location = registry._get_location(started, container)  # noqa: SLF001 - it knows the ways in which registries tell it
    if not location:
        raise ValueError("the registry gives no address for the upload")
    with path.open("rb") as data:
        registry.do_request(
            append_url_params(location, {"digest": blob.digest}), "PUT", data=data, headers=_OCTET_STREAM
        )


def _put_manifest(registry: Any, container: Any, blob: Blob, reference: str) -> None:
    """The exact bytes of the digest."""
    url = f"{registry.prefix}://{container.manifest_url(reference)}"
    registry.do_request(url, "PUT", data=blob.data, headers={"Content-Type": blob.media_type})


def _digest_of_tag(registry: Any, container: Any) -> str | None:
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
        raise _error_of_answer(error.response, reference) from error
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        what = f"{reference}: {type(error).__name__}: is it a registry with TLS? See JOB_EXPORT__OCI_PLAIN_HTTP"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            what = f"{reference}: its certificate is not trusted; name the file with its authority's in SSL_CERT_FILE"
        raise SettingsError([Problem(SETTING, what)]) from error
    except (requests.RequestException, ValueError) as error:
        raise Unreachable(f"{SETTING}: {reference}: the registry cannot be reached ({type(error).__name__})") from error


def _error_of_answer(answer: Any, reference: str) -> JobError:
    status = answer.status_code
    if status in _REFUSED:
        return AccessDenied(
            f"{SETTING}: {reference}: these credentials may not push there (HTTP {status}); log in with docker login, "
            "or set OCI_USERNAME and OCI_PASSWORD"
        )
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Unreachable(f"{SETTING}: {reference}: the registry answered with HTTP {status}")
    try:
        codes = ", ".join(str(error.get("code")) for error in answer.json()["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        codes = ""
    advice = {HTTPStatus.NOT_FOUND: "; does the repository exist? some registries need it to be created first"}.get(
        status, ""
    )
    return SettingsError(
        [Problem(SETTING, f"{reference}: the registry refuses (HTTP {status}) {codes}{advice}".strip())]
    )
