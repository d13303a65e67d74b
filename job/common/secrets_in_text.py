"""Finds secrets in texts that the job shows and records: in addresses, and keys in place of the name of their file."""

from __future__ import annotations

import re
from urllib.parse import unquote

# Of Azure's shared access signatures, and of addresses that were signed in advance for S3, Google and others.
_NAME = r"sig|(?:[\w-]+[-_])?signature|[\w-]*security-?token"
_SIGNATURE = re.compile(rf"[?&;#](?:{_NAME})=([^&\s\"']*)", re.IGNORECASE)
_QUERY = re.compile(r"[?&;#]|%(25)*(3F|26|3B|23)", re.IGNORECASE)
# s3://key:secret@bucket, as other programs take it. An address of http:// is never where a run, model or data is.
_LOGIN = re.compile(r"\b(?!https?:)[a-z][a-z0-9+.-]*://[^/\s@:,]*:[^\s]*@", re.IGNORECASE)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|\"private_key\"")
# JSON, also as base64, which a web token is, too; a key in DER as base64.
_ENCODED = re.compile(r"\s*(\{|(eyJ|ewo|ew0)[\w+/=.-]{20}|MII[\w+/=]{200})")
_LONGEST_PATH = 4096
_SIGNED = (
    "has a signature in it, which would be printed and published; leave out the ? and all behind it, and set "
    "credentials in the environment: for az:// AZURE_STORAGE_SAS_TOKEN; s3:// and gs:// take no signed addresses"
)


def secret_in(text: str) -> str | None:
    """What is wrong with a path, URI or other text that is going to be shown, if a secret is in it; else None.

    A `?` alone is none: it may be a wildcard, or a part of an object's name. The answer quotes nothing.
    """
    if _SIGNATURE.search(_decoded(text)):
        return _SIGNED
    if _LOGIN.search(text):
        return (
            "has a login in it, which would be printed and published; remove it, and set credentials in the environment"
        )
    if _PRIVATE_KEY.search(text):
        return "holds a private key, which would be printed and published; write it to a file, and give the file's path"
    return None


def shown(text: str) -> str:
    """What messages may show of an address that is refused: the part before its query, without a login."""
    before = _QUERY.split(text, maxsplit=1)[0]
    return re.sub(r"://.*@", "://", before)


def signatures_in(text: str) -> list[str]:
    """The signatures of the addresses in a text, as they are written there."""
    return [signature for signature in _SIGNATURE.findall(text) if signature]


def is_key(text: str) -> bool:
    """Whether the value of a variable that has to name a file is a key, token or file's content instead."""
    return (
        "\n" in text.strip()
        or len(text) > _LONGEST_PATH
        or _PRIVATE_KEY.search(text) is not None
        or _ENCODED.match(text) is not None
    )


def _decoded(text: str) -> str:
    """The text without percent-encoding, also where it was encoded more than once."""
    while (decoded := unquote(text)) != text:
        text = decoded
    return text
