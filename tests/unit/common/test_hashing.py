"""Seals (a record's hash of itself) detect any changed byte, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from job.common import hashing
from job.common.hashing import hash_files, seal, sealed, unsealed

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
facts = st.dictionaries(st.text().filter(lambda key: key != "seal"), values, max_size=6)


@given(facts)
def test_what_is_sealed_reads_back(content: dict[str, Any]) -> None:
    """Any JSON comes back as it was, and sealing twice is sealing once."""
    data = sealed(content)
    assert unsealed(data) == content
    assert sealed(json.loads(data)) == data


@given(facts, st.data())
def test_every_changed_byte_is_noticed(content: dict[str, Any], data: st.DataObject) -> None:
    """Whatever byte is replaced by whatever other one, be it in the layout: the file is refused."""
    file = bytearray(sealed(content))
    position = data.draw(st.integers(0, len(file) - 1))
    file[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != file[position]))
    with pytest.raises(ValueError, match="seal"):
        unsealed(bytes(file))


@pytest.mark.parametrize("change", [b'{"a": 1e2}', b'{"a": 1E2}', b'{"a":1e2}', b'{"a": 100.0, "a": 100.0}'])
def test_another_spelling_is_not_the_same_file(change: bytes) -> None:
    """The seal is of the content; a file with the same content in another spelling is not what the job wrote."""
    content = json.loads(change)
    with pytest.raises(ValueError, match="altered"):
        unsealed(change[:-1] + f', "seal": "{seal(content)}"}}'.encode())


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"1", b"{}", b'{"seal": null}', b"[" * 100_000, b"1" * 5000, b'{"a": NaN}']
)
def test_what_has_no_seal_is_refused(data: bytes) -> None:
    """Neither garbage nor JSON without a seal is taken, however deep or long."""
    with pytest.raises(ValueError, match="seal"):
        unsealed(data)


def test_the_order_of_names_does_not_matter_to_a_seal() -> None:
    """It is of the facts, not of their layout; and it is no part of itself."""
    assert seal({"a": 1, "b": 2}) == seal({"b": 2, "a": 1}) == seal({"a": 1, "b": 2, "seal": "x"}) != seal({"a": 1})


def test_what_json_cannot_hold_is_not_sealed() -> None:
    """NaN would be written as something that is no JSON."""
    with pytest.raises(ValueError, match="JSON compliant"):
        sealed({"loss": float("nan")})


def test_a_slow_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for files that were read, with the rate and what to change; not where they were hashed before."""
    (tmp_path / "weights").write_bytes(bytes(1000))
    monkeypatch.setattr(hashing, "_MEASURED_BYTES", 1000)
    monkeypatch.setattr(hashing, "_SLOW_BYTES_PER_SECOND", 1e15)
    with capture_logs() as logs:
        assert hash_files([tmp_path / "weights"]) == hash_files([tmp_path / "weights"])
    (line,) = logs
    assert line["event"] == "files are read slowly"
    assert "JOB_STORAGE__CACHE" in line["change"]
    monkeypatch.setattr(hashing, "_SLOW_BYTES_PER_SECOND", 0.0)
    (tmp_path / "others").write_bytes(bytes(2000))
    with capture_logs() as logs:
        hash_files([tmp_path / "others"])
    assert not logs
