"""The types of settings. Each reads text: different spellings of a value are accepted, ambiguous values are not.

Most settings arrive as text (environment, command line, SageMaker), so every type reads text. No message here repeats
the value: a secret that was put into the wrong variable must not get into logs and failure files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from job.common.export_formats import split_name
from job.common.findings import ALL, KINDS, Action
from job.common.secrets_in_text import secret_in
from job.common.source_list import is_single, parse_sources
from job.storage.location import mistyped, schemes, unusable_bucket

_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_FEWEST_ROWS = 2
_MOST_PROMPTS = 1000
LONGEST_RUN_ID = 128
"""Characters."""
_COUNT = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_MOST_PROCESSES = 1024
"""Of one machine: more than any has GPUs."""
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_MANY_PASSES = 1e6
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", re.ASCII)
_DEPTH = 2  # group and name; a deeper location is an item of a value
_WHOLE, _NUMERIC = "must be a whole number, such as 16", "must be a number, such as 0.5 or 2e-4"
_IN_WORDS: Mapping[tuple[str, object], str] = {
    **{(kind, None): _WHOLE for kind in ("int_parsing", "int_from_float", "int_type")},
    **{(kind, None): _NUMERIC for kind in ("float_parsing", "float_type")},
    ("less_than_equal", 1): "must be at most 1: it is a fraction, so 5 % is 0.05",
    ("string_too_short", 1): "must not be empty",
    ("string_pattern_mismatch", None): (
        f"must begin with a letter or digit and have at most {LONGEST_RUN_ID} letters, digits, '.', '_' and '-'"
    ),
}
"""pydantic's kind of an error, and where it matters the limit of its field -> the message."""
_ARCHIVES = {"GLACIER", "DEEP_ARCHIVE", "Archive"}  # of S3, and of Azure; Google's ARCHIVE can be read at once

T = TypeVar("T")


def new_run_id() -> str:
    """A run id made of the time (UTC) and a random part, `20261123-135600-9f3c`."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def _blank_is_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _flag(value: object) -> bool:
    truth = _TRUTH.get(str(value).strip().lower()) if isinstance(value, (bool, int, str)) else None
    if truth is None:
        raise ValueError("must be true or false (or 1/0, yes/no, on/off)")
    return truth


def _flag_or_auto(value: object) -> object:
    if str(value).strip().lower() == "auto":
        return "auto"
    try:
        return _flag(value)
    except ValueError:
        raise ValueError("must be auto, true or false") from None


def _no_flag(value: object) -> object:
    if value is True or value is False:
        raise ValueError("must be a number, not true or false")
    if isinstance(value, str) and value.rstrip().endswith("%"):
        raise ValueError("must be a number without a percent sign: 1 % is 0.01")
    return value


def _passes(value: object) -> object:
    """A whole number stays an `int`, so that the manifest writes 2 and not 2.0."""
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number < _MANY_PASSES:
        raise ValueError("must be a number of passes over the data greater than 0, such as 2 or 0.5")
    return int(number) if number.is_integer() else number


def _count_or_auto(value: object) -> object:
    text = "" if isinstance(value, bool) else str(value).strip().lower()
    if text == "auto":
        return text
    if _COUNT.fullmatch(text) and int(text) <= _MOST_PROCESSES:
        return int(text)
    raise ValueError(f"must be auto, or a whole number from 1 to {_MOST_PROCESSES:,}")


def _host_port(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if not (separator and _HOST.fullmatch(host) and _PORT.fullmatch(port) and int(port) < 1 << 16):
        raise ValueError("must be host:port, such as train-0.train:29400")
    return text


def _without_secret(text: str) -> str:
    if (secret := secret_in(text)) is not None:
        raise ValueError(secret)
    return text


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has line breaks or control characters in it; remove them")
    return _without_secret(text)


def split_items(value: object) -> object:
    """The items of a list that is written as text, with commas or as JSON; another value as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        return _parsed(value)
    return [item.strip() for item in value.split(",")] if value.strip() else []


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("has the same name twice; remove one")
    return values


def _layers(value: object) -> object:
    """`0-15,20` -> each number; a list is returned unchanged."""
    if not isinstance(value, str) or value.lstrip().startswith("["):
        return split_items(value)
    numbers: list[int] = []
    for part in value.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError("must be numbers and ranges separated by commas, such as 0-15,20")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError("has a range whose end is before its start; swap them")
        numbers += range(first, last + 1)
    return numbers


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("has the same number twice; remove one")
    return tuple(sorted(values))


def _expressions(pattern: Mapping[str, int]) -> Mapping[str, int]:
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"has a name that is not a regular expression: {error}") from None
    return pattern


def _pairs(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _parsed(value)
    _without_secret(value)  # before it is divided
    pairs = [item.partition("=") for item in value.split(",")] if value.strip() else []
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("must be name=value pairs separated by commas, such as a=x,b=y, or a JSON object")
    if len({name.strip() for name, _, _ in pairs}) < len(pairs):
        raise ValueError("has the same name twice; remove one")
    return {name.strip(): item.strip() for name, _, item in pairs}


def _on_finding(value: object) -> object:
    """One action for all kinds, or pairs of kind and action."""
    if isinstance(value, str) and "=" not in value and not value.lstrip().startswith("{"):
        return {ALL: value.strip().lower()}
    return _pairs(value)


def _known_kinds(actions: Mapping[str, str]) -> Mapping[str, str]:
    if not actions:
        raise ValueError("must not be empty; remove it to use the default, record")
    if unknown := sorted(set(actions) - {ALL, *KINDS}):
        raise ValueError(
            f"has unknown kinds of findings in {len(unknown)} of its items; kinds are {', '.join((ALL, *KINDS))}"
        )
    return actions


def _json_object(value: object) -> object:
    if isinstance(value, str):
        value = _parsed(value) if value.lstrip().startswith("{") else {} if not value.strip() else value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise ValueError('must be a JSON object whose keys are names, such as {"enable_thinking": false}')
    value = dict(value)  # a value copied from other settings, which are frozen, is a MappingProxyType
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("must contain JSON values only: text, numbers, true, false, null, lists and objects") from None
    _without_secret(text)
    return value


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("begins like JSON, but is not valid JSON, with texts in double quotes; correct it") from None


_ONE_SLASH = re.compile(r"[a-z][a-z0-9]+:/")
"""`s3:/bucket`: read as a local path, it would put the results into a folder that is lost with the machine."""


def _not_shared(run_id: str) -> str:
    """Refuses the names of the folders beside the runs: whoever deletes what runs share would delete the run."""
    if run_id in {"bases", "scores"}:
        raise ValueError(f"{run_id} is the name of a folder that runs share; give the run another id")
    return run_id


def _location(text: str) -> str:
    """A path or hub id unchanged; a URI, such as `s3://bucket/key`, checked, and without a trailing slash."""
    if text.startswith("~"):
        raise ValueError("~ is not expanded; write the whole path")
    scheme, separator, remainder = text.partition("://")
    if not separator:
        if (problem := mistyped(text)) is not None:
            raise ValueError(problem)
        if _ONE_SLASH.match(text):
            raise ValueError("has one slash after the colon; write s3://bucket/key (or gs, az), or ./ before a path")
        return text
    if scheme not in schemes():
        known = ", ".join(f"{known}://bucket/key" for known in schemes())
        raise ValueError(f"is a URI of an unknown store; use {known}, a path, or for model and data a hub id")
    if (unusable := unusable_bucket(scheme, remainder)) is not None:
        raise ValueError(unusable)
    bucket, _, key = remainder.rstrip("/").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"after {scheme}:// there must be a bucket: 3 to 63 lower-case letters, digits, dots, "
            "hyphens and underscores"
        )
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError("the key after the bucket has an empty part, '.' or '..'; remove it")
    return f"{scheme}://{bucket}/{key}".rstrip("/")


def _sources(text: str) -> str:
    """One location, checked by `_location`, or several with amounts, each location checked."""
    sources = parse_sources(text)
    if is_single(sources) and sources[0].location == text:
        return _location(text)
    for source in sources:
        _location(source.location)
    return ",".join(item.strip() for item in text.split(","))


def _https_address(secret: SecretStr) -> SecretStr:
    """Refuses anything but an https:// address with a host; the message does not quote it."""
    try:
        parts = urlsplit(secret.get_secret_value())
        valid = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not secret.get_secret_value().isascii() or " " in secret.get_secret_value():
        raise ValueError("must be an https:// address")
    return secret


def _one_line(secret: SecretStr) -> SecretStr:
    if not secret.get_secret_value().isprintable():
        raise ValueError("must be one line of text")
    return secret


def _local(text: str) -> str:
    if "://" in text:
        raise ValueError("must be a local path, not a URI")
    return _location(text)


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # malformed brackets or port
        valid = False
    if not valid or "@" in text or "?" in text or "#" in text:
        raise ValueError("must be http(s)://host[:port], without user, password, query or fragment")
    return text


def is_server(text: str) -> bool:
    """Whether JOB_EVAL__JUDGE is the address of a server, and not a model."""
    return text.startswith(("http://", "https://"))


def _location_or_server(text: str) -> str:
    return _endpoint(text) if is_server(text) else _location(text)


def _digest(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise ValueError("must be sha256: and 64 hexadecimal digits in lower case")
    return text


def _day(text: str) -> str:
    try:
        date = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise ValueError("must be a day as YYYY-MM-DD, such as 2026-01-31") from None
    return f"{date:%Y-%m-%d}"


def _held_out(value: object) -> object:
    """A share, a number of rows, or a source."""
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text.removesuffix("%").rstrip()) and text.endswith("%"):
            raise ValueError("must be a share without a percent sign, such as 0.05 for 5 %")
        if not _NUMBER.fullmatch(text):
            return _location(_printable(text))
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if type(value) is int and _FEWEST_ROWS <= value < 1 << 32:
        return value
    if type(value) is float and 0 < value < 1:
        return value
    raise ValueError(
        "must be a share between 0 and 1, such as 0.05, a whole number of rows of at least 2, or a separate source"
    )


def _prompts(value: object) -> object:
    """A number of prompts, or the location of a file."""
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return _location(_printable(text))
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if type(value) is int and 0 < value <= _MOST_PROMPTS:
        return value
    raise ValueError(f"must be a whole number of validation rows from 1 to {_MOST_PROMPTS:,}, or a file of prompts")


def _export_format(text: str) -> str:
    split_name(text)
    return text


def _gate_format(text: str) -> str:
    try:
        return text if text == "adapter" else _export_format(text)
    except ValueError as error:
        raise ValueError(f"must be adapter, or an exported format; a format {error}") from None


def _public_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text, re.ASCII):
        raise ValueError("must be a name such as org/model: letters, digits, '.', '_', '-', and one slash at most")
    return text


def _hub_repository(text: str) -> str:
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
    if not re.fullmatch(rf"{part}/{part}", text, re.ASCII) or "--" in text or ".." in text or text.endswith(".git"):
        raise ValueError(
            "must be namespace/name: letters, digits, '-', '_' and '.', without '--', '..', or .git at the end"
        )
    return text


def _image_reference(text: str) -> str:
    registry = r"(localhost|[a-zA-Z0-9-]+(\.[a-zA-Z0-9-]+)+|[a-zA-Z0-9.-]+(?=:)|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?"
    part = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
    if not re.fullmatch(rf"{registry}/{part}(/{part})*:[A-Za-z0-9_][\w.-]{{0,127}}", text, re.ASCII):
        raise ValueError(
            "must be registry/repository:tag, such as ghcr.io/lab/model:first: all in lower case but the tag"
        )
    return text


def _branch_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w./-]{0,199}", text, re.ASCII) or ".." in text or text.endswith(("/", ".lock")):
        raise ValueError("must be the name of a branch: letters, digits, '.', '_', '-' and '/', such as runs/first")
    return text


def _readable_class(text: str) -> str:
    if text in _ARCHIVES:
        raise ValueError("archived objects cannot be read immediately, so no checkpoint could be resumed")
    return text


Maybe = Annotated[T | None, BeforeValidator(_blank_is_none)]
"""An optional value; empty text means none."""
Flag = Annotated[bool, BeforeValidator(_flag)]
FlagOrAuto = Annotated[bool | Literal["auto"], BeforeValidator(_flag_or_auto)]
Whole = Annotated[int, BeforeValidator(_no_flag), Field(ge=0, lt=2**32)]
Count = Annotated[int, BeforeValidator(_no_flag), Field(gt=0, lt=2**32)]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
_MOST = 1e18
"""Largest number in a manifest: the reader of manifests refuses larger ones."""
Passes = Annotated[int | float, BeforeValidator(_passes), Field(gt=0)]
Real = Annotated[float, BeforeValidator(_no_flag), Field(ge=-_MOST, le=_MOST)]
Share = Annotated[Real, Field(ge=0, le=1)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Seconds = Annotated[Real, Field(gt=0, le=30 * 86400)]
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_printable)]
RunId = Annotated[
    str, Field(pattern=rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_RUN_ID - 1}}}$"), AfterValidator(_not_shared)
]
Location = Annotated[Text, AfterValidator(_location)]
LocationOrServer = Annotated[Text, AfterValidator(_location_or_server)]
DataSources = Annotated[Text, AfterValidator(_sources)]
"""One source, or several with how much of each is used; the syntax is in `common.source_list`."""
Secret = Annotated[SecretStr, AfterValidator(_one_line)]
SecretAddress = Annotated[Secret, AfterValidator(_https_address)]
"""Never printed or logged; in the manifest it is written as asterisks."""
LocalPath = Annotated[Text, AfterValidator(_local)]
HeldOut = Annotated[int | float | Text, BeforeValidator(_held_out)]
"""What to validate on: a share of the rows, a number of rows, or a separate source."""
Prompts = Annotated[int | Text, BeforeValidator(_prompts)]
"""A file of prompts, or a number of validation rows."""
PublicName = Annotated[Text, AfterValidator(_public_name)]
HubRepository = Annotated[Text, AfterValidator(_hub_repository)]
ImageReference = Annotated[Text, AfterValidator(_image_reference)]
BranchName = Annotated[Text, AfterValidator(_branch_name)]
Endpoint = Annotated[Text, AfterValidator(_endpoint)]
HostPort = Annotated[Text, AfterValidator(_host_port)]
Digest = Annotated[Text, AfterValidator(_digest)]
Day = Annotated[Text, AfterValidator(_day)]
StorageClass = Annotated[Text, AfterValidator(_readable_class)]
Names = Annotated[tuple[Text, ...], BeforeValidator(split_items), Field(min_length=1), AfterValidator(_unique)]
ExportName = Annotated[Text, AfterValidator(_export_format)]
"""A name in `common.export_formats`, with its type if the format has types (`gguf:q8_0`)."""
ExportFormats = Annotated[tuple[ExportName, ...], BeforeValidator(split_items), AfterValidator(_unique)]
GateFormat = Annotated[Text, AfterValidator(_gate_format)]
"""`adapter`, or the name of an exported format."""
FieldNames = Annotated[Mapping[Text, Text], BeforeValidator(_pairs)]
JsonObject = Annotated[Mapping[Text, Any], BeforeValidator(_json_object)]
Layers = Annotated[tuple[Whole, ...], BeforeValidator(_layers), Field(min_length=1), AfterValidator(_ascending)]
Pattern = Annotated[Mapping[Text, Count], BeforeValidator(_pairs), AfterValidator(_expressions)]
OnFinding = Annotated[Mapping[Text, Action], BeforeValidator(_on_finding), AfterValidator(_known_kinds)]
"""Kind of finding, or `all` for the kinds that are not named -> what is done with rows that have it."""
Locations = Annotated[Mapping[Text, Location], BeforeValidator(_pairs)]


def explain(error: Mapping[str, Any]) -> str:
    """What is wrong and how to correct it, from one of pydantic's error records; never the value itself."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected']}"
    what = _IN_WORDS.get((kind, context.get("min_length", context.get("le")))) or _IN_WORDS.get((kind, None))
    if what is None:
        what = re.sub(r"^\w+ should|, unable to parse.*| after validation.*", "", error["msg"]).strip()
        what = f"must {what}" if " should " in error["msg"] else f"is wrong: {what}"
    return what if len(error["loc"]) <= _DEPTH else f"has an item that {what}"
