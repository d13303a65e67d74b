"""Checks the clouds' own variables, which the client libraries read themselves, before a client quotes them."""

from __future__ import annotations

import os
import re

from job.common.secrets_in_text import is_key, secret_in
from job.errors import Problem, raise_problems

# Scheme -> variables that name a file with credentials.
_FILES = {
    "s3": (
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_CONFIG_FILE",
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
    "az": ("AZURE_FEDERATED_TOKEN_FILE",),
}
GOOGLE_KEYS = (*_FILES["gs"], "GOOGLE_SERVICE_ACCOUNT_KEY")
"""Variables from which the client of Google's store takes a key."""
_ADDRESSES = {"gs": ("GOOGLE_BASE_URL",), "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_AUTHORITY_HOST")}
_HOLDS = "holds the key itself, but has to name its file; write it to a file, and give the file's path"


def check_variables(scheme: str) -> None:
    """Refuses variables of a cloud whose values the client would repeat in its errors, though they hold a secret.

    Raises:
        SettingsError: A variable for a file holds the file's content, or one for a name or an address a secret.
    """
    fix = ", or put the key of a service account into GOOGLE_SERVICE_ACCOUNT_KEY" if scheme == "gs" else ""
    problems = [Problem(name, _HOLDS + fix) for name in _FILES.get(scheme, ()) if is_key(os.environ.get(name, ""))]
    problems += [
        Problem(name, what)
        for name in _ADDRESSES.get(scheme, ())
        if (what := secret_in(os.environ.get(name, ""))) is not None
    ]
    if scheme == "az" and re.search(r"[;=/\s]", os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "").strip()):
        what = "is no name of a storage account; a connection string belongs into AZURE_STORAGE_CONNECTION_STRING"
        problems.append(Problem("AZURE_STORAGE_ACCOUNT_NAME", what))
    raise_problems(problems)


def is_given(name: str) -> bool:
    """Whether a variable is set, and not empty."""
    return bool(os.environ.get(name))


def given(*names: str) -> str:
    """Those of these variables that are set, for messages; all of them if none is."""
    return " or ".join([name for name in names if is_given(name)] or names)
