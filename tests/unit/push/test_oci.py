"""The image of a run: what its bytes depend on, and how a registry's refusals are reported."""

from __future__ import annotations

import hashlib
import io
import re
import ssl
import tarfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from job.errors import AccessDenied, JobError, SettingsError, Unreachable
from job.push import oci_image
from job.push.files import PushFile, files_sha256
from job.push.oci import OciTarget
from job.push.oci_image import image_digest, layers_of, write_layer
from job.records import Artifact
from job.settings.load import load_settings
from tests.dataset_hub import serving
from tests.unit.tracking.test_kubernetes_progress import files as certificate  # noqa: F401 - a fixture

CONTENT = {"README.md": b"# card\n", "adapter_model.safetensors": b"w" * 600, "merged/config.json": b"{}"}


def written(folder: Path) -> tuple[tuple[PushFile, ...], dict[str, Path]]:
    """The files of a push, and where they lie."""
    files, copies = [], {}
    for path, data in CONTENT.items():
        copies[path] = folder / path
        copies[path].parent.mkdir(parents=True, exist_ok=True)
        copies[path].write_bytes(data)
        files.append(PushFile(Artifact(f"artifacts/{path}", len(data), hashlib.sha256(data).hexdigest()), path))
    return tuple(files), copies


def test_the_digest_depends_on_the_files_alone(tmp_path: Path) -> None:
    """Another folder, another time, other permissions: the same bytes as ever, which this test names."""
    found = []
    for name in ("a", "b"):
        files, copies = written(tmp_path / name)
        copies["README.md"].chmod(0o600 if name == "a" else 0o644)
        found.append(image_digest(files, copies, "first", files_sha256(files)))
    assert found == ["sha256:0a68ffa64b6502de73f371d7144159bfb0db2077228fc10ff502026267475406"] * 2


def test_a_layer_holds_readable_files_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files have layers of their own; every layer names its folders first, owned by root and open to all."""
    monkeypatch.setattr(oci_image, "OWN_LAYER", 500)
    files, copies = written(tmp_path)
    groups = layers_of(files)
    assert [[file.path for file in group] for group in groups] == [
        ["adapter_model.safetensors"],
        ["README.md", "merged/config.json"],
    ]
    target = io.BytesIO()
    write_layer(groups[1], copies, target)
    with tarfile.open(fileobj=io.BytesIO(target.getvalue())) as tar:
        entries = [(entry.name, oct(entry.mode), entry.uid, entry.mtime) for entry in tar]
        assert entries == [
            ("models", "0o755", 0, 0),
            ("models/merged", "0o755", 0, 0),
            ("models/README.md", "0o644", 0, 0),
            ("models/merged/config.json", "0o644", 0, 0),
        ]
        extracted = tar.extractfile("models/README.md")
        assert extracted is not None
        assert extracted.read() == CONTENT["README.md"]


def test_which_files_share_a_layer() -> None:
    """Those below 16 MiB; the digests of images that were pushed depend on it, and `verify` computes them again."""

    def layers(*sizes: int) -> list[list[int]]:
        files = [PushFile(Artifact(str(at), size, "0" * 64), str(at)) for at, size in enumerate(sizes)]
        return [[file.bytes for file in group] for group in layers_of(files)]

    limit = 16 * 1024 * 1024
    assert layers(1, limit, limit - 1, limit + 1) == [[limit], [limit + 1], [1, limit - 1]]
    assert layers(limit) == [[limit]]
    assert layers() == []


def test_a_layer_names_every_folder(tmp_path: Path) -> None:
    """A runtime that makes missing ones itself may close them to all but root."""
    (tmp_path / "x").write_bytes(b"x")
    target = io.BytesIO()
    write_layer([PushFile(Artifact("x", 1, "0" * 64), "merged/of/x")], {"merged/of/x": tmp_path / "x"}, target)
    with tarfile.open(fileobj=io.BytesIO(target.getvalue())) as tar:
        assert tar.getnames() == ["models", "models/merged", "models/merged/of", "models/merged/of/x"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, AccessDenied), (403, AccessDenied), (404, SettingsError), (429, Unreachable), (503, Unreachable)],
)
def test_refusals_have_their_codes(status: int, kind: type[JobError], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a registry answers to the first upload decides the error."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200)

        def do_POST(self) -> None:
            self._answer(status)

        def _answer(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.send_header("Retry-After", "0")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            """Keeps quiet."""

    with serving(Registry) as address, pytest.raises(kind):
        OciTarget(f"{address.removeprefix('http://')}/lab/model:first").check()


class Registry(BaseHTTPRequestHandler):
    """Takes uploads."""

    def do_GET(self) -> None:
        """Is one; also takes back an upload."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Begins an upload."""
        self.send_response(202)
        self.send_header("Location", "/v2/lab/model/blobs/uploads/1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_an_authority_of_one_s_own_is_trusted_by_the_usual_variables(
    certificate: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As for stores and the hub; without one the message names the variable, and does not advise against TLS."""
    monkeypatch.setattr("job.push.oci._LOCAL", re.compile("nothing"))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "ca.crt", certificate / "key")
    with serving(Registry, context) as address:
        target = OciTarget(f"{address.removeprefix('http://')}/lab/model:first")
        with pytest.raises(SettingsError, match=r"certificate is not trusted.*SSL_CERT_FILE"):
            target.check()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "ca.crt"))
        assert "accepts uploads" in target.check()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
        with pytest.raises(SettingsError, match=r"SSL_CERT_FILE.*there is no"):
            target.check()


def test_nobody_listens() -> None:
    """An address without a registry is unreachable, within seconds."""
    with pytest.raises(Unreachable):
        OciTarget("127.0.0.1:9/lab/model:first").check()


@pytest.mark.parametrize(
    "reference",
    [
        "lab/model:first",
        "ghcr.io/lab/model",
        "ghcr.io/Lab/model:first",
        "http://ghcr.io/lab/model:1",
        "ghcr.io/a@sha256:0",
    ],
)
def test_names_that_are_none(reference: str) -> None:
    """Registry and tag have to be given, and the repository is in lower case."""
    with pytest.raises(SettingsError, match=r"JOB_EXPORT__OCI.*must be registry/repository:tag"):
        load_settings([f"--export.oci={reference}"], environ={})


@pytest.mark.parametrize("reference", ["localhost:5000/model:first", "ghcr.io/lab/a-b/c_d:v1.0", "10.0.0.1:5000/x:y"])
def test_names_of_images(reference: str) -> None:
    """A port, an address, several parts."""
    assert load_settings([f"--export.oci={reference}"], environ={}).export.oci == reference
