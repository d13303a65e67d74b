"""The audit: planted problems are found with their place, and no output contains their text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from job.audit import detectors
from job.audit.audit import Audit, Finding, parse_findings
from job.audit.detectors import DETECTORS
from job.audit.overlap import MOST_ROWS, Questions, index_questions
from job.audit.rows import AuditedRow, AuditSetup, RowAudit, set_up
from job.common.findings import KINDS
from job.common.near_duplicates import words_of
from job.data.token_cache import Tokens, load_tokens, open_tokens
from job.errors import DataError
from job.records import AuditRecord
from tests.helpers import READING, write_jsonl
from tests.toy_tokenizer import toy_tokenizer

DATA = Path(__file__).parents[4] / "shared" / "data"
DEMO = Path(__file__).parents[3] / "job" / "demo"
NOUNS = [f"{head}{tail}" for head in ("ot", "bad", "fal", "her", "wea", "mar") for tail in ("ter", "ger", "con")]
QUESTIONS = [
    f"Which of these animals would a {NOUNS[n % 18]} number {n} perhaps meet near {NOUNS[(n * 7 + 3) % 18]} at dawn?"
    for n in range(40)
]
PLANTED = {
    "secret": "ghp_" + "a1B2c3D4e5F6g7H8i9J0" * 2,
    "email": "jo.miller@mail.acme-widgets.de",
    "phone": "+49 30 901820",
    "iban": "DE89 3704 0044 0532 0130 00",
    "card": "4539 1488 0343 6467",
}
ALL_INSTALLED = all(detector.version for detector in DETECTORS.values())
installed = pytest.mark.skipif(not ALL_INSTALLED, reason="a library of a detector is not installed")


def plain(number: int) -> dict[str, str]:
    """A row without any finding, another one for each number."""
    words = " ".join(f"{NOUNS[(number * k + k * k) % 18]}{number * k}" for k in range(1, 25))
    return {"instruction": f"Describe {words}.", "output": f"It is about {words[::-1]}."}


def planted_rows() -> tuple[list[dict[str, str]], dict[str, set[int]]]:
    """200 rows, and by kind the numbers (from 0) of those with a finding."""
    rows, where = [plain(n) for n in range(200)], {kind: set[int]() for kind in KINDS}
    for n in range(20):
        rows[5 + n] |= {"instruction": f"Please answer this now. {QUESTIONS[n].upper()} Give one word."}
        where["overlap"].add(5 + n)
    for place, (kind, text) in enumerate(PLANTED.items(), start=40):
        rows[place] |= {"output": f"Write to {text} and wait."}
        where[kind].add(place)
    rows[60] = {key: f" {value.upper()}" for key, value in plain(150).items()}
    where["duplicate"].add(150)
    near = plain(70)
    rows[170] = {**near, "output": near["output"].replace("about", "all about")}
    where["near_duplicate"].add(170)
    return rows, where


def read(
    folder: Path, rows: Sequence[Mapping[str, Any]], on_finding: Mapping[str, Any] | None = None, **how: Any
) -> Tokens:
    """The rows as a run reads them, with the audit."""
    path = folder / "rows.jsonl"
    if not path.exists():
        write_jsonl(path, rows)
    setup = set_up(index_questions({"quiz": [f"Question: {one}\nAnswer:" for one in QUESTIONS]}), on_finding or {})
    options = {**READING, "max_length": 4096, "tokenizer": toy_tokenizer(), "name": "rows.jsonl", "audit": setup, **how}
    return load_tokens(str(path), options.pop("validation", None), root=folder, keep=True, **options)


def findings(tokens: Tokens) -> list[Finding]:
    """The findings in the file."""
    assert tokens.findings is not None
    return parse_findings(tokens.findings.read_bytes())


def audit_of(tokens: Tokens) -> AuditRecord:
    """The record, which is there."""
    assert tokens.record.audit is not None
    return tokens.record.audit


@installed
def test_what_is_planted_is_found_and_told_nowhere(tmp_path: Path) -> None:
    """Each row with a finding, no other, with its place; no planted text in record, findings or log."""
    rows, where = planted_rows()
    with structlog.testing.capture_logs() as logs:
        tokens = read(tmp_path, rows)
    found = {kind: {one.row for one in findings(tokens) if one.kind == kind} for kind in KINDS}
    assert found == where
    assert all(one.where == f"rows.jsonl:{one.row + 1}" for one in findings(tokens))
    assert audit_of(tokens).overlap == {"quiz": list(range(20))}
    assert audit_of(tokens).checks["secret"].places == ["rows.jsonl:41"]
    told = json.dumps([asdict(tokens.record), logs], default=str) + str((tokens.findings or tmp_path).read_text())
    for text in (*PLANTED.values(), *QUESTIONS, "animals would"):
        assert text.casefold() not in told.casefold()


@installed
def test_rows_are_left_out_by_kind(tmp_path: Path) -> None:
    """`skip` leaves out the rows of its kinds, of duplicates all but the first; a second start finds the same."""
    rows, where = planted_rows()
    tokens = read(tmp_path, rows, {"secret": "skip", "duplicate": "skip"})
    assert len(tokens.examples) == tokens.record.rows == 198
    assert audit_of(tokens).left_out == 2
    plain_tokens = read(tmp_path, rows)
    gone = where["secret"] | where["duplicate"]
    kept = [example for n, example in enumerate(plain_tokens.examples) if n not in gone]
    assert list(tokens.examples) == kept
    assert tokens.record.sha256 != plain_tokens.record.sha256
    again = read(tmp_path, rows, {"secret": "skip", "duplicate": "skip"})
    assert (again.record, list(again.examples)) == (tokens.record, kept)
    assert open_tokens(again.folder).findings == again.folder / "findings.jsonl"


@installed
def test_rows_are_left_out_before_rows_are_held_out(tmp_path: Path) -> None:
    """No row that is left out is validated on."""
    tokens = read(tmp_path, planted_rows()[0], {"all": "skip"}, validation=20)
    assert tokens.validation is not None
    assert len(tokens.validation) == 20
    assert len(tokens.examples) == 200 - audit_of(tokens).left_out - 20


@installed
def test_a_finding_that_is_an_error_names_places_only(tmp_path: Path) -> None:
    """Exit code 65, with the place, the kind and the setting."""
    with pytest.raises(DataError, match=r"rows.jsonl:41.*JOB_DATA__ON_FINDING") as caught:
        read(tmp_path, planted_rows()[0], {"secret": "error"})
    assert caught.value.exit_code == 65
    assert PLANTED["secret"] not in str(caught.value)


def test_a_library_that_is_missing_is_no_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind is reported as not checked, and which package to install."""
    monkeypatch.setattr(detectors, "find_spec", lambda name: None if name == "stdnum" else find_spec(name))
    checks = audit_of(read(tmp_path, [plain(1), plain(2)])).checks
    assert checks["iban"].rows is None
    assert "python-stdnum is not installed" in checks["iban"].not_checked
    assert checks["email"].rows == 0


def test_workers_find_the_same(tmp_path: Path) -> None:
    """The setup and the findings survive the way to another process."""
    setup = set_up(index_questions({"quiz": QUESTIONS}), {"all": "record"})
    assert AuditSetup.from_json(json.loads(json.dumps(setup.as_json()))) == setup
    texts = [QUESTIONS[3], "ask jo@acme-widgets.de"]
    found = AuditedRow.from_bytes(RowAudit(setup)(texts))
    assert found.kinds == ("email",)
    assert found.overlap.exact == (3,)
    assert AuditedRow.from_bytes(found.to_bytes()) == found


def overlap(questions: Questions, rows: Sequence[str]) -> set[tuple[int, int | None]]:
    """(row, question) of the overlaps."""
    audit = Audit(AuditSetup(questions, {}, {}))
    row = RowAudit(audit.setup)
    for number, text in enumerate(rows):
        audit.add(f"rows:{number}", row([text]))
    return {(one.row, one.question) for one in audit.findings() if one.kind == "overlap"}


def test_what_many_rows_share_is_no_overlap() -> None:
    """A template in more than ten rows does not count; a whole question does, in any number of rows."""
    template = "Read the following story about the sea with care and choose the best answer:"
    questions = index_questions({"quiz": [f"{template} who swam?", f"{template} who sank?", QUESTIONS[0]]})
    rows = [f"{template} what is {word} like?" for word in NOUNS[: MOST_ROWS + 1]]
    assert overlap(questions, rows) == set()
    assert overlap(questions, [QUESTIONS[0]] * 15) == {(n, 2) for n in range(15)}


def test_short_questions_count_as_whole_lines() -> None:
    """A label before it is no matter; the words within another sentence, or a single word, are no overlap."""
    questions = index_questions({"quiz": ["What do plants breathe in?", "Who?", QUESTIONS[0]]})
    assert overlap(questions, ["Question: what do plants breathe in\nAnswer: air"]) == {(0, 0)}
    assert overlap(questions, ["I asked him what do plants breathe in the dark", "Who?"]) == set()
    assert questions.too_short == 1


def test_what_all_questions_begin_with_is_a_part_of_them_in_a_row() -> None:
    """Questions that differ in a word only count where a row has one word for word, and not where it has its like."""
    begin = "In a far away land by the sea, which of these colours has the flag of"
    questions = index_questions({"quiz": [f"Question: {begin} {noun}?\nAnswer:" for noun in NOUNS[:5]]})
    assert overlap(questions, [f"Tell me: {begin} {NOUNS[2]}? Blue.", f"{begin} {NOUNS[9]}?"]) == {(0, 2)}


def test_the_better_part_of_a_question_is_an_overlap() -> None:
    """70 % of its runs of eight words are enough, and half of them are not."""
    words = " ".join(f"w{n}" for n in range(27)).split()  # 20 runs
    questions = index_questions({"quiz": [" ".join(words), QUESTIONS[0]]})
    assert overlap(questions, [" ".join(words[:22])]) == {(0, 0)}
    assert overlap(questions, [" ".join(words[:17])]) == set()


@installed
def test_what_only_looks_like_a_finding_is_none() -> None:
    """Addresses and numbers that belong to nobody, wrong checksums, years, and code are no findings."""
    row = RowAudit(set_up(None, {}))
    for text in (
        "write to jo.miller@example.com, jo.miller@mail.example.co.uk, jo@some.test or x@localhost",
        "login('my_gmail_address@gmail.com'), user123@gmail.com, JDoe@email.com, abc@somecompany.com, a@d.co",
        "call (415) 555-1234, +1 214 555 8444, (234) 567-8901, +44 1632 960123 or +61 2 5550 1234",
        "DE89 3704 0044 0532 0130 01",
        "4539 1488 0343 6468",
        "from 1914-1918 to 1939-1945, 3.1415926535 and 1,000,000,000",
        "password = input()",
    ):
        assert AuditedRow.from_bytes(row([text])).kinds == (), text


@installed
def test_what_somebody_may_own_is_a_finding() -> None:
    """Names and numbers that only begin or end like an example are findings."""
    row = RowAudit(set_up(None, {}))
    for text, kind in (
        ("write to jo@counterexample.de", "email"),
        ("write to jo@testing.acme-widgets.de", "email"),
        ("write to username.miller@acme-widgets.de", "email"),
        ("write to a@acme-widgets.de", "email"),
        ("call (212) 684-4700", "phone"),
        ("call (415) 556-1234", "phone"),
        ("call +44 20 7947 0123", "phone"),
    ):
        assert AuditedRow.from_bytes(row([text])).kinds == (kind,), text


def test_every_kind_has_a_way_to_be_found() -> None:
    """The names that settings know are those of the detectors, the comparisons between rows, and the classifier."""
    assert set(KINDS) == {"overlap", "duplicate", "near_duplicate", *DETECTORS, "unsafe"}


@installed
def test_zero_findings_on_the_demo() -> None:
    """In its instructions and its preferences nothing is found: no scored question, repeated row, key or address."""
    questions, instructions, preferences = (
        [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]
        for name in ("questions", "instructions", "preferences")
    )
    prompts = [f"Question: {one['question']}\nAnswer:" for one in questions]
    for rows in (instructions, preferences):
        audit = Audit(set_up(index_questions({"arc_easy": prompts}), {}))
        row = RowAudit(audit.setup)
        for number, one in enumerate(rows, start=1):
            audit.add(f"row {number}", row(list(one.values())))
        assert audit.findings() == []


EMAIL_ROWS = {3653, 4178, 11379, 12447, 12767, 19685, 38867, 41165, 43924, 44386, 44685, 51998}
PHONE_ROWS = {6911, 21052, 27424, 30939, 33585, 34690, 39526}
EXAMPLE_ROWS = {1404, 7314, 21009, 21158, 24436, 26676, 29345, 37442, 39353, 42638, 44649}
"""Rows of Alpaca, from 1, that were read by a person: addresses and numbers that somebody may own, and examples."""


@installed
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
def test_alpaca_has_twelve_rows_with_addresses_and_seven_with_phone_numbers() -> None:
    """In the rows in question, what was judged to be an address or a number is found, and no example is."""
    row = RowAudit(set_up(None, {}))
    found: dict[str, set[int]] = {kind: set() for kind in DETECTORS}
    with gzip.open(DATA / "alpaca.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if number in EMAIL_ROWS | PHONE_ROWS | EXAMPLE_ROWS:
                texts = [text for name in ("input", "instruction", "output") if (text := json.loads(line)[name])]
                for kind in AuditedRow.from_bytes(row(texts)).kinds:
                    found[kind].add(number)
    assert found == {"secret": set(), "email": EMAIL_ROWS, "phone": PHONE_ROWS, "iban": set(), "card": set()}


@pytest.mark.long
@installed
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
def test_alpaca_has_no_more_personal_data_than_was_judged() -> None:
    """In all 52,002 rows, no kind that one row can show has another finding; the four near-duplicates are true ones."""
    audit = Audit(set_up(None, {}))
    row = RowAudit(audit.setup)
    with gzip.open(DATA / "alpaca.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = json.loads(line)
            if fields["output"]:
                texts = [text for name in ("input", "instruction", "output") if (text := fields[name])]
                audit.add(f"alpaca:{number}", row(texts))
    found: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for one in audit.findings():
        found[one.kind].add(int(one.where.removeprefix("alpaca:")))
    assert {kind: rows for kind, rows in found.items() if rows} == {
        "near_duplicate": {5815, 27355, 33964, 48504},
        "email": EMAIL_ROWS,
        "phone": PHONE_ROWS,
    }


@pytest.mark.long
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")
def test_alpaca_has_one_question_of_arc_easy() -> None:
    """Of 52,002 rows one has a question of ARC-Easy's test set: on water, word for word, with the answer."""
    asked = [json.loads(line)["question"] for line in (DATA / "arc_easy_test.jsonl").read_text().splitlines()]
    questions = index_questions({"arc_easy": [f"Question: {one}\nAnswer:" for one in asked]})
    audit = Audit(AuditSetup(questions, {}, {}))
    empty = RowAudit(AuditSetup(None, {}, {}))([""])
    with gzip.open(DATA / "alpaca.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            texts = [text for name in ("input", "instruction", "output") if (text := json.loads(line)[name])]
            found = questions.look_for(texts, words_of("\n".join(texts)))
            if found.exact or found.runs:
                row = AuditedRow.from_bytes(empty)
                audit.add(f"alpaca:{number}", type(row)(number, row.hashed, (), found).to_bytes())
    assert [one.where for one in audit.findings() if one.kind == "overlap"] == ["alpaca:36445"]
