"""What the report says about the audit."""

from __future__ import annotations

from job.report import audit_wording


def test_places_of_the_same_file_name_it_once() -> None:
    """Findings in a file are its name and their rows; places without a number stay as they are."""
    found = audit_wording._by_file(["a.jsonl:3", "a.jsonl:9", "org/rows:7", "whole"])
    assert found == [("a.jsonl", ["3", "9"]), ("org/rows", ["7"]), ("whole", [""])]
