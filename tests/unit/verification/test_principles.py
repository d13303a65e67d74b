"""What a run claims about judgements is recomputed from the published lines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job.evaluation.principles import rules_sha256, summarize
from job.records import Judgement, JudgeRecord, PromptAnswer
from job.runs.layout import JUDGEMENTS, prompts_key
from job.verification.check_principles import check_principles

ANSWERS = {"base": ["x", "y", "z"], "adapter": ["a", "y", "c"]}
FOUND = [Judgement("p:1", False, "B", "A"), Judgement("p:2", True, None, None), Judgement("p:3", False, "A", None)]  # noqa: FBT003 - a record
RECORD = JudgeRecord("models/judge", None, None, "0" * 64, ["Be kind."], rules_sha256(["Be kind."]))


def wrong(folder: Path, line: dict[str, Any] | None = None, **claims: Any) -> bool:
    """Whether the check finds a difference, with a change in the last line of the file or in what is claimed."""
    lines = [asdict(one) for one in FOUND]
    lines[-1] |= line or {}
    files = {JUDGEMENTS: lines}
    for side, answers in ANSWERS.items():
        files[prompts_key(side)] = [
            {**asdict(PromptAnswer(f"p:{n}", "q", None, text, 1, "eos"))} for n, text in enumerate(answers, start=1)
        ]
    copies = {}
    for number, (key, rows) in enumerate(files.items()):
        copies[key] = folder / f"{number}.jsonl"
        copies[key].write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval.principles": {"value": "rules.txt"}, "eval.judge": {"value": "models/judge"}}
    claimed = {**asdict(RECORD), **summarize(FOUND), **claims}
    checked = check_principles({"settings": settings, "evaluation": {"principles": claimed}}, copies)
    assert checked is not None
    return bool(checked.differences)


def test_what_holds(tmp_path: Path) -> None:
    """The figures of the lines hold; a run without principles has no such check, and one half without is wrong."""
    assert not wrong(tmp_path)
    assert check_principles({"settings": {}, "evaluation": {}}, {}) is None
    half = check_principles({"settings": {"eval.principles": {"value": "x"}}, "evaluation": {}}, {})
    assert half is not None
    assert half.differences


@pytest.mark.parametrize(
    "claims", [{"adapter": 2}, {"p": 0.01}, {"model": "models/other"}, {"rules": ["Be rude."]}, {"ties": 0}]
)
def test_other_claims_are_noticed(tmp_path: Path, claims: dict[str, Any]) -> None:
    """Counts, the test, the judge and the rules follow from lines and settings."""
    assert wrong(tmp_path, **claims)


@pytest.mark.parametrize(
    "line",
    [{"adapter_first": "B"}, {"base_first": "C"}, {"same": True}, {"where": "p:4"}, {"adapter_first": 3}],
)
def test_a_changed_line_is_noticed(tmp_path: Path, line: dict[str, Any]) -> None:
    """Another choice, a letter that is none, another prompt, and pairs that are not the same text."""
    assert wrong(tmp_path, line)
