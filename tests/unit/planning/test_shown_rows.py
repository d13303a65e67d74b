"""`plan --show N`: what is printed of the first rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.cli.main import main
from job.planning.shown_rows import CLOSE, OPEN, ShownRow, as_lines, show_row
from tests.helpers import encoded, write_jsonl
from tests.toy_tokenizer import toy_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None)
@given(TEXT, st.data())
def test_the_pieces_are_the_text(text: str, data: Any) -> None:
    """The pieces add up to the decoded tokens, and change where the targets do."""
    tokenizer = toy_tokenizer()
    ids = tuple(tokenizer(text)["input_ids"])
    targets = tuple(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    row = show_row(encoded(text, ids, targets, where="x:1 text"), tokenizer)
    assert (row.where, row.tokens, row.target_tokens) == ("x:1 text", len(ids), sum(targets))
    assert len("".join(piece for piece, _ in row.pieces)) == len(tokenizer.decode(ids))
    assert all(one[1] != other[1] for one, other in zip(row.pieces, row.pieces[1:], strict=False))


def test_control_characters_are_escaped() -> None:
    """Neither a row's text nor its place can move the cursor, or look like a marker; line breaks stay line breaks."""
    row = ShownRow("x\x1b.jsonl:1", 9, 4, (("a\x1b[2J\r", False), (f"b{OPEN}\nc\t\u202e", True)))
    assert as_lines([row], terminal=False) == [
        "x\\x1b.jsonl:1: 9 tokens, 4 of them in the loss",
        f"  a\\x1b[2J\\r{OPEN}b\\u27e6",
        f"  c\\t\\u202e{CLOSE}",
    ]
    assert as_lines([row], terminal=True)[1:] == [
        "  a\\x1b[2J\\r\x1b[7mb\\u27e6\x1b[0m",
        "  \x1b[7mc\\t\\u202e\x1b[0m",
    ]


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_plan_shows_rows(
    tmp_path: Path, base_folder: Path, loss_on: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rows are printed with what is learned between the markers, in the table and in JSON."""
    rows = [{"prompt": f"what is {number}?", "completion": f" it is {number}."} for number in range(9)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.setenv("JOB_EVAL__DATA", f"arc_easy={tmp_path / 'questions.jsonl'}")
    words = ["--model.id", str(base_folder), "--data.source", str(tmp_path / "rows.jsonl")]
    words += ["--train.loss_on", loss_on, "--run.output", str(tmp_path / "runs")]
    main(["plan", "--show", "2", *words])
    printed = capsys.readouterr().out
    assert printed.count("of them in the loss") == 2
    start = "" if loss_on == "completion" else "what is 1?"
    assert f"{start} it is 1." in printed.replace(OPEN, "").replace(CLOSE, "")
    assert (f"{OPEN} it is 1." in printed) == (loss_on == "completion")
    main(["plan", "--show=1", "--format=json", *words])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert "".join(text for text, target in row["pieces"] if target).startswith(
        " it is 0." if start == "" else "what is 0?"
    )
    assert main(["plan", "--show", "none", *words]) == 2
