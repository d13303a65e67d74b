"""An image without a program that holds the files of a run, as the target `oci` pushes it.

Its files are under `/models`: the adapter at the top, each exported format in a folder. It has the media types of plain
images, so that every registry and container runtime takes it: an index of two manifests, for amd64 and arm64, with the
same layers. A large file has its own layer; all small ones share one. Everything in it is determined by the files:
the same run has the same digest every time, and `verify` computes it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from job.push.files import PushFile

FOLDER = "models"
"""Where KServe looks for the model in a modelcar."""
ARCHITECTURES = ("amd64", "arm64")
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
OWN_LAYER = 16 << 20
"""Bytes from which a file has its own layer: files that change often are small, and large ones are uploaded once."""


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
        files: Files of the layer.
        copies: By path, the local copy of each.
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
