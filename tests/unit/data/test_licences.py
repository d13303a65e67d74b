"""The licence of a data set or model is what its card says, never a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.data import licences
from job.data.licences import find_licence, read_licence
from job.errors import Unreachable


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("license: mit", "mit"),
        ("language: en\nlicense: [apache-2.0, cc-by-4.0]", "apache-2.0, cc-by-4.0"),
        ("license: other\nlicense_name: gemma", "gemma"),
        ("license: other", "other"),
        ("license: 5", None),
        ("license: {a: b}", None),
        ("license: '<script>'", None),
        ("license: mit\nmore: [", None),
        ("license: mit\nmore: !!bool maybe", None),
        ("license: mit\nmore: !!int ''", None),
        ("license: mit\nmore: !!timestamp now", None),
        ("license: mit\nmore: " + "[" * 30_000, None),
        ("a: &a [mit]\nlicense: *a", None),
        ("- license: mit", None),
        ("title: x", None),
    ],
)
def test_the_metadata_of_a_card(tmp_path: Path, metadata: str, licence: str | None) -> None:
    """One name, several, or the name of another licence; what is no name, and broken YAML, is no licence."""
    card = tmp_path / "README.md"
    card.write_text(f"---\n{metadata}\n---\n# Title\nlicense: wrong\n", encoding="utf-8")
    assert read_licence(card) == licence


def test_a_card_without_metadata(tmp_path: Path) -> None:
    """A text, an empty file and bytes that are no text have no licence."""
    for data in (b"# license: mit", b"", b"\xff\xfe---", b"---\nlicense: mit\n"):
        (tmp_path / "README.md").write_bytes(data)
        assert read_licence(tmp_path / "README.md") is None


def test_a_card_beside_a_path(tmp_path: Path) -> None:
    """The card in a folder, or beside a file, counts; without one the licence is unknown."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    assert find_licence(str(rows), None, "dataset") is None
    (tmp_path / "README.md").write_text("---\r\nlicense: cc0-1.0\r\n---\r\n")
    assert find_licence(str(rows), None, "dataset") == "cc0-1.0"
    assert find_licence(str(tmp_path), None, "model") == "cc0-1.0"
    assert find_licence("s3://bucket/rows.jsonl", None, "dataset") is None


def test_a_card_in_the_hubs_cache_is_read_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `plan` does without a network; another revision, and what is not there, have no licence."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = Path(constants.HF_HUB_CACHE, "models--some--cached", "snapshots", commit)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    monkeypatch.setattr(licences, "fetch_card", lambda *_: pytest.fail("the hub is asked"))
    assert find_licence("some/cached", commit, "model", ask_hub=False) == "apache-2.0"
    assert find_licence("some/cached", "f" * 40, "model", ask_hub=False) is None
    assert find_licence("some/cached", commit, "dataset", ask_hub=False) is None
    assert find_licence("some/other", None, "model", ask_hub=False) is None


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what is known here by name counts, and the run goes on."""

    def fetch_card(*_: object) -> None:
        raise Unreachable("the hub")

    monkeypatch.setattr(licences, "fetch_card", fetch_card)
    assert find_licence("tatsu-lab/alpaca", None, "dataset") == "cc-by-nc-4.0"
    assert find_licence("some/other", None, "dataset") is None
