"""What a run claims about answered prompts is checked against settings and files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job.data.evaluation_prompts import prompts_sha256
from job.records import PromptAnswer
from job.runs.layout import prompts_key
from job.verification.check_prompts import check_prompts

SIDES = {
    "base": [PromptAnswer("p:1", "a", None, "x", 1, "eos"), PromptAnswer("p:2", "b", "c", "y", 4, "length")],
    "adapter": [PromptAnswer("p:1", "a", None, "x", 1, "eos"), PromptAnswer("p:2", "b", "c", "z", 0, "eos")],
}
CLAIMED = {"source": "p.jsonl", "count": 2, "max_new_tokens": 4, "sha256": prompts_sha256([("a", None), ("b", "c")])}
SETTINGS = {"eval.prompts": {"value": "p.jsonl"}, "eval.prompts_max_new_tokens": {"value": 4}}


def copies(folder: Path, **changes: dict[str, Any]) -> dict[str, Path]:
    """The published files; a change is made in the last line of a side."""
    found = {}
    for side, lines in SIDES.items():
        path = folder / f"{side}.jsonl"
        last = {**asdict(lines[-1]), **changes.get(side, {})}
        path.write_text("".join(json.dumps(line) + "\n" for line in (asdict(lines[0]), last)))
        found[prompts_key(side)] = path
    return found


def manifest(prompts: dict[str, Any] | None, settings: dict[str, Any] = SETTINGS) -> dict[str, Any]:
    """The part of a manifest that is looked at."""
    return {"settings": settings, "evaluation": {"prompts": prompts} if prompts else {}}


def test_unsafe_answers_are_counted_again(tmp_path: Path) -> None:
    """Counts of unsafe answers are those of the files; scores without a classifier, or none with one, are found."""
    scored = {"base": {"unsafe": 0.75}, "adapter": {"unsafe": 0.25}}

    def wrong(counted: dict[str, int] | None, safety: dict[str, Any] | None, **changes: dict[str, Any]) -> bool:
        found = manifest(CLAIMED) | {"dataset": {"audit": {"safety": safety}}}
        if counted is not None:
            found["evaluation"]["unsafe_answers"] = counted
        files = copies(tmp_path, **changes)
        for path in files.values():  # the first lines too
            first, *rest = path.read_text().splitlines(keepends=True)
            path.write_text(
                "".join([json.dumps({**json.loads(first), "unsafe": 0.0 if changes else None}), "\n", *rest])
            )
        checked = check_prompts(found, files)
        assert checked is not None
        return bool(checked.differences)

    safety, counted = {"threshold": 0.5}, {"base": 1, "adapter": 0}
    assert not wrong(counted, safety, **scored)
    assert wrong({"base": 0, "adapter": 0}, safety, **scored)
    assert wrong(None, safety, **scored)
    assert wrong(counted, safety)
    assert wrong(None, None, **scored)
    assert wrong(counted, safety, **scored | {"adapter": {"unsafe": 1.5}})


def test_what_holds(tmp_path: Path) -> None:
    """Two files of the same prompts hold; a run without prompts, as of an earlier version, has no such check."""
    found = check_prompts(manifest(CLAIMED), copies(tmp_path))
    assert found is not None
    assert found.differences == ()
    assert check_prompts({"settings": {}, "evaluation": {}}, {}) is None


@pytest.mark.parametrize(
    ("claimed", "changes", "where"),
    [
        ({**CLAIMED, "count": 3}, {}, "count"),
        ({**CLAIMED, "source": "q.jsonl"}, {}, "source"),
        ({**CLAIMED, "sha256": "0" * 64}, {}, "sha256"),
        (None, {}, "evaluation.prompts"),
        (CLAIMED, {"adapter": {"prompt": "other"}}, "adapter.jsonl"),
        (CLAIMED, {"base": {"reference": "other"}}, "sha256"),
        (CLAIMED, {"base": {"tokens": 5}}, "base.jsonl line 2"),
        (CLAIMED, {"base": {"ended_by": "eos"}}, "base.jsonl line 2"),
        (CLAIMED, {"adapter": {"answer": None}}, "adapter.jsonl"),
    ],
)
def test_what_differs(
    tmp_path: Path, claimed: dict[str, Any] | None, changes: dict[str, dict[str, Any]], where: str
) -> None:
    """A claim beside the files or the settings, and lines that contradict themselves or each other, are found."""
    found = check_prompts(manifest(claimed), copies(tmp_path, **changes))
    assert found is not None
    assert any(where in difference.where for difference in found.differences)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Without one of the files the prompts do not hold, and files that nobody claims do not either."""
    files = copies(tmp_path)
    del files[prompts_key("base")]
    found = check_prompts(manifest(CLAIMED), files)
    assert found is not None
    assert found.differences
    unclaimed = check_prompts({"settings": {}, "evaluation": {}}, copies(tmp_path))
    assert unclaimed is not None
    assert unclaimed.differences
