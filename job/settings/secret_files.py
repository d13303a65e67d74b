"""Credentials in files: HF_TOKEN_FILE=/run/secrets/hf stands for HF_TOKEN with the content of the file.

The image's entrypoint reads the same names (`secrets` in entrypoint.sh) before it asks for GPUs, so that the job finds
the variables themselves there. Names that end in _FILE and belong to a library, such as SSL_CERT_FILE, are its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from job.errors import Problem

NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "OCI_PASSWORD",
    "WANDB_API_KEY",
)
"""Variables that may be given as files."""
_LARGEST_BYTES = 1 << 16


def file_variable(name: str) -> str:
    """The variable that holds the path of a secret's file."""
    return f"{name}_FILE"


def read_secret_files(environ: Mapping[str, str]) -> tuple[dict[str, str], list[Problem]]:
    """The secrets that are given as files, by the names of their variables; and what is wrong with the others."""
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for name in NAMES:
        if path := environ.get(file_variable(name)):
            secret, what = _read(path)
            if environ.get(name):
                what = f"is given, and {name} as well; keep one of them"
            if what is None:
                found[name] = secret
            else:
                problems.append(Problem(f"{file_variable(name)} (environment)", what))
    return found, problems


def _read(location: str) -> tuple[str, str | None]:
    """(secret, None), or ("", what is wrong). No message has the content, which a wrong path may be as well."""
    path, named = Path(location), "the file"
    try:
        if path.is_absolute() and path.parent.is_dir() and location.isprintable():
            named = location
        if path.exists() and not path.is_file():  # a pipe would wait, and could be read only once
            return "", f"{named} is not a regular file; name the file that holds the secret"
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a path"
        return "", f"user {os.getuid()} cannot read {named} ({reason}); correct the path or its mode"
    try:
        secret = content.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return "", f"{named} is not text; put the secret alone into it"
    if not secret:
        return "", f"{named} is empty; put the secret into it"
    if len(content) > _LARGEST_BYTES or not secret.isprintable():
        return "", f"{named} has several lines or control characters; put the secret alone into it"
    return secret, None
