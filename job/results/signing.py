"""Signatures of published files in the format of OpenSSF Model Signing; its tool `model_signing` can verify them.

A signature is a file `model.sig`: a Sigstore bundle (v0.3) with a DSSE envelope, whose payload is an in-toto statement
of the SHA-256 of each file in a folder. The run has one at the top, over the manifest and all artifacts, and one in
each folder that is used alone: the adapter's and those of exports. Specifications:
https://github.com/ossf/model-signing-spec, https://github.com/secure-systems-lab/dsse,
https://docs.sigstore.dev/about/bundle/

    model_signing verify key RUN --signature RUN/model.sig --public_key PUB.pem

This module writes the format from the hashes in the manifest. The library model-signing would hash local copies, which
may be hundreds of gigabytes, and imports the client of Sigstore's online service. Tests verify published signatures
with that library.

The format allows only ECDSA keys on P-256, P-384 and P-521. Signatures are deterministic (RFC 6979): the same files and
the same key give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import Problem, SettingsError
from job.runs.layout import (
    ADAPTER,
    ATTEMPTS,
    CHECKPOINTS,
    EXPORT,
    FAULTS,
    FIRST_STAGE,
    LEASE,
    PUSHED,
    RESULTS,
    SCORES,
    SERVED,
    SETTINGS,
    SIGNATURE,
    STAGES,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

EXTRA = ".[sign]"
MAX_KEY_BYTES = 64 << 10
_PAYLOAD = "application/vnd.in-toto+json"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curve of the key -> hash algorithm of the signature, by the specification of Sigstore's bundles."""
_NOT_SIGNED = (
    ATTEMPTS,
    CHECKPOINTS,
    FAULTS,
    FIRST_STAGE,
    LEASE,
    PUSHED,
    SCORES,
    SERVED,
    SETTINGS,
    STAGES,
    ".store/",
)
"""Not covered by the signature of a run. The signed manifest has the SHA-256 of those among them that are final."""


def load_private_key(path: str, password: str | None) -> EllipticCurvePrivateKey:
    """The private key in a PEM file.

    Raises:
        SettingsError: There is no key, its kind is not supported, or the password is missing or wrong.
    """
    data = _read("JOB_SIGN__KEY", path)
    serialization = _cryptography("JOB_SIGN__KEY")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(data, None if password is None else password.encode())
    except TypeError:  # a superfluous or a missing password: the library tells them apart only in its message
        message = f"{path} is not encrypted; leave it out" if password else "is needed: the key is encrypted"
        raise SettingsError([Problem("JOB_SIGN__PASSWORD", message)]) from None
    except ValueError:
        message = f"{path} is not a private key in PEM format" + (
            ", or JOB_SIGN__PASSWORD is not its password" if password else ""
        )
        raise SettingsError([Problem("JOB_SIGN__KEY", message)]) from None
    except UnsupportedAlgorithm:  # another curve, or a cipher that this OpenSSL does not have
        message = f"{path} is a kind of key that is not supported; {_HOW_TO_MAKE}"
        raise SettingsError([Problem("JOB_SIGN__KEY", message)]) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
        raise SettingsError(
            [Problem("JOB_SIGN__KEY", f"{path} is a kind of key that is not supported; {_HOW_TO_MAKE}")]
        )
    return key


_HOW_TO_MAKE = "make one with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def load_public_key(path: str) -> str:
    """The public key in a PEM file, as normalized PEM, in which keys are compared.

    Raises:
        SettingsError: There is no key, or its kind is not supported.
    """
    data = _read("--key", path)
    try:
        return _pem(_parsed_key(data, "--key"))
    except ValueError:
        pass
    what = f"{path} is not a public key in PEM format for signatures of models; make it from the private one: "
    raise SettingsError([Problem("--key", what + "openssl ec -in key.pem -pubout -out pub.pem")])


def _read(where: str, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise SettingsError([Problem(where, f"{path} cannot be read: {error.strerror}")]) from error


def _cryptography(where: str) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        what = f"needs the package cryptography: run pip install '{EXTRA}' in the repository"
        raise SettingsError([Problem(where, what)]) from None
    return serialization


def _parsed_key(data: bytes, where: str) -> EllipticCurvePublicKey:
    """A public key in PEM. Raises ValueError if its kind or curve is not supported."""
    serialization = _cryptography(where)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(data)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise ValueError("it is a key of another kind")
    return key


def _pem(key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def public_key(key: EllipticCurvePrivateKey) -> str:
    """The public half in PEM."""
    return _pem(key.public_key())


def key_id(pem: str) -> str:
    """SHA-256 of a public key in PEM, by which a signature names its key."""
    return hashlib.sha256(pem.encode(errors="backslashreplace")).hexdigest()  # in a manifest it may be any text


def signed_folders(results: Mapping[str, Any]) -> list[str]:
    """The folders with their own signature: those of the adapter and of every exported format."""
    paths = [artifact["path"] for artifact in results["artifacts"]]
    folders = {"/".join(path.split("/")[:3]) + "/" for path in paths if path.startswith(EXPORT)}
    return [*([ADAPTER] if any(path.startswith(ADAPTER) for path in paths) else []), *sorted(folders)]


def files_of(results: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Path below a folder -> SHA-256 of its artifacts, without its signature; of the whole run for an empty folder."""
    files = {
        artifact["path"].removeprefix(folder): artifact["sha256"]
        for artifact in results["artifacts"]
        if artifact["path"].startswith(folder)
    }
    if folder:
        files.pop(SIGNATURE, None)
    return files


def files_of_run(results: Mapping[str, Any], manifest: bytes) -> dict[str, str]:
    """The files that the signature at the top of a run covers: all artifacts, and the manifest, given as bytes."""
    return {**files_of(results, ""), RESULTS: hashlib.sha256(manifest).hexdigest()}


def sign(key: EllipticCurvePrivateKey, name: str, files: Mapping[str, str], *, whole_run: bool = False) -> bytes:
    """A signature of files, as the content of `model.sig`.

    Args:
        key: The private key.
        name: Name of the folder.
        files: Path below the folder -> SHA-256.
        whole_run: Whether the folder is a run's, in which some files are not signed.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = json.dumps(_statement(name, files, whole_run=whole_run), sort_keys=True).encode()
    algorithm = ec.ECDSA(_hash_of(key.public_key()), deterministic_signing=True)
    return _bundle(payload, key.sign(_encoded(payload), algorithm), public_key(key))


def _bundle(payload: bytes, signature: bytes, pem: str) -> bytes:
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": key_id(pem)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle, indent=2).encode()


def _statement(name: str, files: Mapping[str, str], *, whole_run: bool) -> dict[str, Any]:
    ordered = sorted(files.items())
    total = hashlib.sha256(b"".join(bytes.fromhex(sha256) for _, sha256 in ordered)).hexdigest()
    ignored = [SIGNATURE, *(path.rstrip("/") for path in _NOT_SIGNED if whole_run)]
    return {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": total}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted(ignored),
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": sha256} for path, sha256 in ordered],
        },
    }


def _hash_of(key: EllipticCurvePublicKey) -> HashAlgorithm:
    from cryptography.hazmat.primitives import hashes

    algorithm: HashAlgorithm = getattr(hashes, _HASHES[key.curve.name])()
    return algorithm


def _encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding (PAE), which binds the payload to its type."""
    return f"DSSEv1 {len(_PAYLOAD)} {_PAYLOAD} {len(payload)} ".encode() + payload


def signed_files(signature: bytes, pem: str) -> dict[str, str]:
    """The files that a signature is over, path -> SHA-256, if the key with this public half made it.

    Raises:
        ValueError: It is no signature by this key, in words.
        SettingsError: The package that checks signatures is not installed.
    """
    key = _parsed_key(pem.encode(), "signature")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        bundle = json.loads(signature)
        envelope, hint = bundle["dsseEnvelope"], bundle["verificationMaterial"]["publicKey"]["hint"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        (entry,) = envelope["signatures"]
        signature_bytes = base64.b64decode(entry["sig"], validate=True)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("a file that is not a signature of a model") from None
    if hint != key_id(pem):
        raise ValueError(f"a signature by another key, {str(hint)[:12]}")
    if signature != _bundle(payload, signature_bytes, pem):
        raise ValueError("a signature that was altered, or that another program wrote")
    try:
        key.verify(signature_bytes, _encoded(payload), ec.ECDSA(_hash_of(key)))
    except InvalidSignature:
        raise ValueError("a signature that this key did not make") from None
    return dict(_resources(payload))


def _resources(payload: bytes) -> Iterator[tuple[str, str]]:
    """(path, SHA-256) of each file in a statement that was signed; raises ValueError if it is of another kind."""
    try:
        statement = json.loads(payload)
        kinds = statement["_type"], statement["predicateType"]
        listed = [
            (resource["name"], resource["algorithm"], resource["digest"])
            for resource in statement["predicate"]["resources"]
        ]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("a signed statement that is not about files") from None
    if kinds != (_STATEMENT, _PREDICATE) or not all(
        isinstance(name, str) and algorithm == "sha256" for name, algorithm, _ in listed
    ):
        raise ValueError("a signed statement of another kind")
    yield from ((name, digest) for name, _, digest in listed)
