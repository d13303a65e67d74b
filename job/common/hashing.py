"""SHA-256 of files, and seals: a JSON file that contains the hash of its other fields.

A seal detects damage in a file whose hash is stored nowhere else. It is no signature: whoever can write the file can
also write the seal.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from job.log import get_logger

_HASH_THREADS = 8
_MEASURED_BYTES, _SLOW_BYTES_PER_SECOND = 256 << 20, 100e6
"""Of fewer bytes the rate says little. A local SSD reads ten times as fast, and this hash is faster than that, too."""
_hashed: dict[tuple[int, ...], str] = {}


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, in the order of `paths`; several are read at once, so that the disk is the limit.

    A file that did not change since this process hashed it here is not read again: a model's weights are hashed for
    the hub's word about them, and for the model's own fingerprint.
    """
    began, bytes_read = time.monotonic(), sum(path.stat().st_size for path in paths if _key(path.stat()) not in _hashed)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = list(pool.map(_hash_once, paths))
    seconds = time.monotonic() - began
    if bytes_read >= _MEASURED_BYTES and bytes_read < _SLOW_BYTES_PER_SECOND * seconds:
        change = "a faster disk for it, such as a local one: JOB_STORAGE__CACHE, HF_HOME, or the path that is set"
        get_logger().warning(
            "files are read slowly",
            folder=str(paths[0].parent),
            megabytes=bytes_read // 10**6,
            megabytes_per_second=round(bytes_read / seconds / 1e6, 1),
            change=change,
        )
    return digests


def _hash_once(path: Path) -> str:
    key = _key(path.stat())
    if (known := _hashed.get(key)) is None:
        known = _hashed[key] = hash_file(path)
    return known


def _key(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def code_hashes(*modules: str) -> list[str]:
    """SHA-256 of each module's source file, found by the module's full name, without importing it.

    Raises:
        ModuleNotFoundError: There is no such module.
    """
    hashes = []
    for name in modules:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(name)
        hashes.append(hash_file(Path(spec.origin)))
    return hashes


def hash_facts(path: Path) -> str:
    """SHA-256 of a file of JSON lines without their `measured` parts, which differ from run to run.

    Raises:
        ValueError: A line is not a JSON object.
    """
    total = hashlib.sha256()
    for line in path.read_text(encoding="utf-8").splitlines():
        facts = facts_of_line(line)
        total.update(json.dumps(facts, sort_keys=True).encode() + b"\n")
    return total.hexdigest()


def facts_of_line(line: str | bytes) -> dict[str, Any]:
    """A line of metrics without its `measured` part: times, memory, energy.

    Raises:
        ValueError: It is not a JSON object.
    """
    try:
        facts = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(facts, dict):
        raise ValueError("the line is no JSON object")  # noqa: TRY004 - it is what a file holds, not what a caller gave
    facts.pop("measured", None)
    return facts


def seal(facts: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-able facts, independent of the order of keys; an entry `seal` is left out."""
    content = {key: value for key, value in facts.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(facts: Mapping[str, Any]) -> bytes:
    """The facts as a JSON file that ends with their seal; an older seal is replaced."""
    content = {key: value for key, value in facts.items() if key != "seal"}
    return json.dumps({**content, "seal": seal(content)}, indent=2, allow_nan=False).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """The facts that `sealed` wrote, without the seal.

    Raises:
        ValueError: The bytes are not exactly what `sealed` wrote.
    """
    try:
        facts = json.loads(data)
        whole = isinstance(facts, dict) and "seal" in facts and sealed(facts) == data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no sealed JSON: {str(error)[:200]}") from None
    if not whole:
        raise ValueError("was altered: its seal does not match its content")
    facts.pop("seal")
    return dict(facts)
