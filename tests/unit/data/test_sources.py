"""Several sources, renamed fields, and rows that are too long."""

from __future__ import annotations

from fractions import Fraction
from hashlib import sha256
from itertools import count, pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
import structlog

from job.common.source_list import Source, locate_sources, parse_sources
from job.data import sources
from job.data.notes import Notes
from job.data.sources import check_source, copies_named_as_given
from job.data.token_cache import load_tokens
from job.errors import DataError, Preempted, Problem, SettingsError
from tests.helpers import READING, encoded
from tests.toy_tokenizer import toy_tokenizer
from tests.unit.data.loaded_rows import lines, load, text_of


def test_a_relative_path_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A settings file may be in another folder than the one the job is started in."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"rows.jsonl: does not exist in {tmp_path}; correct the path"):
        read("rows.jsonl")


def texts(*names: str) -> list[dict[str, str]]:
    """Rows of plain text."""
    return [{"text": name} for name in names]


def read(text: str, **how: Any) -> Any:
    """`load_examples` on the value of JOB_DATA__SOURCE."""
    return load(locate_sources(text, lambda place, _: place), name=text, **how)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [Source("a.jsonl", "a.jsonl")]),
        ("s3://b/year=2024", [Source("s3://b/year=2024", "s3://b/year=2024")]),
        ("a.jsonl,s3://b/c.csv", [Source("a.jsonl", "a.jsonl"), Source("s3://b/c.csv", "s3://b/c.csv")]),
        ("a.jsonl=2x", [Source("a.jsonl", "a.jsonl", times=Fraction(2))]),
        (
            "a=0.5x, org/name@abc=10rows",
            [Source("a", "a", times=Fraction(1, 2)), Source("org/name", "org/name", "abc", rows=10)],
        ),
        ("rows/x=1/*.jsonl=1.5x", [Source("rows/x=1/*.jsonl", "rows/x=1/*.jsonl", times=Fraction(3, 2))]),
    ],
)
def test_the_spelling_of_sources(text: str, expected: list[Source]) -> None:
    """A source may have an amount, as times or as rows, and a hub id a revision."""
    assert parse_sources(text) == tuple(expected)


@pytest.mark.parametrize("text", ["a,", "a,,b", "a=2,b", "a=0.5,b", "a,b=0x", "a,b=0rows", "a=2x,a", "a@1,a@2"])
def test_what_is_ambiguous_is_refused(text: str) -> None:
    """An empty item, a number without its unit, nothing of a source, and a source named twice are errors."""
    with pytest.raises(ValueError, match=r"has an? |names the same"):
        parse_sources(text)


def test_a_path_that_exists_is_one_source(tmp_path: Path) -> None:
    """Commas, and what looks like an amount, in the name of a file that is there are part of the name."""
    path = lines(tmp_path / "a,b=2x", *texts("cat"))
    assert parse_sources(str(path)) == (Source(str(path), str(path)),)


def test_sources_follow_one_another(tmp_path: Path) -> None:
    """Examples come source by source, as often as asked; the record has rows and hash of each, as if it were alone."""
    one = lines(tmp_path / "one.jsonl", *texts("a", "b", "c", "d", "e"))
    two = lines(tmp_path / "two.jsonl", *texts("x", "y", "z"))
    three = lines(tmp_path / "three.jsonl", *texts("k", "l"))
    examples, record = read(f"{one}=0.5x,{two}=2rows,{three}=1.5x")
    assert [text_of(example) for example in examples] == ["b", "d", "x", "y", "k", "l", "l"]
    assert [(source.source, source.rows) for source in record.sources] == [
        (str(one), 2),
        (str(two), 2),
        (str(three), 3),
    ]
    alone = lines(tmp_path / "alone.jsonl", *texts("b", "d", "x", "y", "k", "l", "l"))
    assert record.sha256 == load(alone)[1].sha256
    assert record.sources[1].sha256 == load(two, limit=2)[1].sha256
    assert (record.rows, record.format, record.revision) == (7, "text", None)


def test_a_single_source_is_as_it_was(tmp_path: Path) -> None:
    """One source has no list of sources in its record, and the hash is over its examples alone."""
    path = lines(tmp_path / "x.jsonl", *texts("cat", "mat"))
    examples, record = read(str(path))
    assert (record.source, record.sources, record.long_rows) == (str(path), [], {})
    digest = sha256(b"examples 1\0")
    for example, text in zip(examples, ("cat", "mat"), strict=True):
        digest.update(encoded(text, example.input_ids, example.targets).canonical())
    assert record.sha256 == digest.hexdigest()


def test_a_source_of_another_schema_is_one_problem(tmp_path: Path) -> None:
    """It is named with both schemas, instead of two missing fields for each of its rows."""
    one = lines(tmp_path / "one.jsonl", *texts("a"))
    two = lines(tmp_path / "two.jsonl", *({"prompt": f"q{n}", "completion": "a"} for n in range(9)))
    with pytest.raises(DataError) as error:
        read(f"{one},{two}", on_bad_row="skip")
    (problem,) = error.value.problems
    assert (problem.where, error.value.total) == (str(two), 1)
    assert f"has rows of the schema prompt_completion, and {one} of text" in problem.what


def test_what_one_would_not_expect_is_told(tmp_path: Path) -> None:
    """Fewer rows than the limit, weights that are not used, labels of one kind, and a cut that leaves no target."""
    few = lines(tmp_path / "few.jsonl", *({"text": f"row {n}", "weight": 0.5} for n in range(3)))
    labels = lines(tmp_path / "k.jsonl", *({"prompt": f"q{n}", "completion": " a", "label": True} for n in range(3)))
    notes = Notes()
    load(few, limit=5, notes=notes)
    load(labels, method="kto", notes=notes)
    assert [what for level, what, _ in notes.kept if level == "warning"] == [
        "rows have weights that are not used; set JOB_DATA__ROW_WEIGHTS=true, or remove them",
        "there are fewer rows than JOB_DATA__LIMIT",
        "all answers have the same label, so training cannot learn a difference",
    ]
    long = lines(tmp_path / "long.jsonl", {"prompt": "p " * 90, "completion": "a"})
    with pytest.raises(DataError, match=r"the 32 tokens that it is cut to contain no token of the completion; raise"):
        load(long, loss_on="completion", max_length=32, on_long_row="truncate")


def test_bad_rows_of_all_sources_are_in_one_report(tmp_path: Path) -> None:
    """Each bad row is reported once, however often its source is used, and so is a source with too few rows."""
    one = lines(tmp_path / "one.jsonl", *texts("a", ""), {"prompt": "x"})
    two = lines(tmp_path / "two.jsonl", b"{", *texts("b"))
    with pytest.raises(DataError) as error:
        read(f"{one}=3x,{two}=5rows")
    assert [problem.where for problem in error.value.problems] == [
        f"{one}:2 text",
        f"{one}:3 text",
        f"{two}:1",
        str(two),
    ]
    assert "has 1 valid rows, and 5 were requested" in error.value.problems[-1].what
    _, record = read(f"{one}=3x,{two}", on_bad_row="skip")
    assert ([source.rows for source in record.sources], record.skipped) == (
        [3, 1],
        {"empty_target": 1, "invalid_json": 1, "missing_field": 1},
    )


def test_the_files_of_a_glob_are_named_by_the_pattern(tmp_path: Path) -> None:
    """A bad row in a file that a glob found is named by the user's own place for the folder."""
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.jsonl", *texts("cat", ""))
    with pytest.raises(DataError) as error:
        load(f"{tmp_path}/*.jsonl", name="s3://bucket/rows/*.jsonl")
    assert [problem.where for problem in error.value.problems] == [
        "s3://bucket/rows/a.jsonl:2 text",
        "s3://bucket/rows/b.jsonl:2 text",
    ]


def test_a_file_without_rows_among_others_is_told(tmp_path: Path) -> None:
    """An empty file among several is no error, since partitions may be empty, but the log names it."""
    lines(tmp_path / "rows-0.jsonl", {"text": "one"})
    (tmp_path / "rows-1.jsonl").touch()
    with structlog.testing.capture_logs() as logs:
        load(tmp_path / "*.jsonl")
    assert [entry["file"] for entry in logs if "no rows" in entry["event"]] == [f"{tmp_path}/rows-1.jsonl"]


def test_fields_have_other_names(tmp_path: Path) -> None:
    """Rows whose fields are named otherwise, nested ones too, give the same examples as under the schema's names."""
    own = {"text": "no", "question": "cat?", "answers": [{"text": "mat"}], "a.b": "x"}
    names = {"prompt": "question", "completion": "answers.0.text"}
    found = load(lines(tmp_path / "x.jsonl", own), field_names=names)
    expected = load(lines(tmp_path / "y.jsonl", {"prompt": "cat?", "completion": "mat"}))
    assert (found[0], found[1].sha256) == (expected[0], expected[1].sha256)
    dotted = load(lines(tmp_path / "z.jsonl", own), field_names={"text": "a.b"})
    assert text_of(dotted[0][0]) == "x"
    with pytest.raises(DataError, match=r"x\.jsonl:1 completion \(answers\.1\.text, by JOB_DATA__FIELDS\): is missing"):
        load(tmp_path / "x.jsonl", field_names=names | {"completion": "answers.1.text"})


def test_long_rows_are_skipped(tmp_path: Path) -> None:
    """With skip a row that is too long is left out and counted, and other bad rows are errors still."""
    path = lines(tmp_path / "x.jsonl", *texts("0" * 30, "cat"))
    examples, record = load(path, max_length=10, on_long_row="skip")
    assert (len(examples), record.skipped, record.long_rows) == (1, {"too_long": 1}, {})
    lines(path, *texts("0" * 30, "cat", ""))
    with pytest.raises(DataError, match=r"x\.jsonl:3 text: is empty"):
        load(path, max_length=10, on_long_row="skip")
    with pytest.raises(DataError, match="tokens long"):
        load(path, max_length=10)


def test_long_rows_are_truncated(tmp_path: Path) -> None:
    """With truncate a row keeps its first tokens, and those that were cut are counted."""
    path = lines(tmp_path / "x.jsonl", *texts("0123456789", "cat"))
    (whole, other), _ = load(path)
    (cut, same), record = load(path, max_length=8, on_long_row="truncate")
    assert (cut.input_ids, cut.targets) == (whole.input_ids[:8], whole.targets[:8])
    assert same == other
    assert record.long_rows == {"truncated": 1, "tokens_cut": len(whole.input_ids) - 8}
    prompt = lines(tmp_path / "y.jsonl", {"prompt": "0123456789", "completion": "cat"})
    with pytest.raises(DataError, match="no token to learn"):
        load(prompt, max_length=8, on_long_row="truncate", loss_on="completion")


@pytest.mark.parametrize("length", range(2, 14))
def test_long_rows_are_split(tmp_path: Path, length: int) -> None:
    """With split every token of the row but the first is a target in exactly one piece, with the token before it."""
    path = lines(tmp_path / "x.jsonl", *texts("0123456789"))
    (whole,), _ = load(path)
    pieces, record = load(path, max_length=length, on_long_row="split")
    pairs = [
        (example.input_ids[index - 1], token)
        for example in pieces
        for index, (token, target) in enumerate(zip(example.input_ids, example.targets, strict=True))
        if target
    ]
    ids = whole.input_ids
    assert pairs == list(pairwise(ids))
    assert all(len(example.input_ids) <= length for example in pieces)
    expected = {"split": 1, "pieces": len(pieces)} if len(pieces) > 1 else {}
    assert (record.long_rows, record.rows) == (expected, len(pieces))
    assert len(load(path, max_length=length, on_long_row="split", limit=1)[0]) == 1


def test_conversations_are_not_split(tmp_path: Path) -> None:
    """Splitting what is no plain text, and cutting answers that are compared, are errors of the setting."""
    path = lines(tmp_path / "x.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(SettingsError, match=r"JOB_DATA__ON_LONG_ROW.*prompt_completion"):
        load(path, on_long_row="split")
    pair = lines(tmp_path / "y.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(SettingsError, match=r"JOB_DATA__ON_LONG_ROW.*compared"):
        load(pair, on_long_row="truncate", method="dpo")


def test_nested_json_is_read_from_every_format(tmp_path: Path) -> None:
    """Names of nested fields reach into objects of JSON lines and of Arrow alike."""
    import pyarrow as pa

    row = {"turn": {"question": "cat?", "answer": {"text": "mat"}}}
    names = {"prompt": "turn.question", "completion": "turn.answer.text"}
    json_lines = load(lines(tmp_path / "x.jsonl", row), field_names=names)
    table = pa.Table.from_pylist([row])
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert load(tmp_path / "x.arrow", field_names=names)[0] == json_lines[0]
    assert toy_tokenizer().decode(json_lines[0][0].input_ids) == "<s>cat?mat</s>"


@pytest.mark.parametrize("amount", ["-1rows", "1.5rows", "1e3rows", "10row", "-2x", "2X", "20000x"])
def test_an_amount_that_is_none_is_said_to_be_that(amount: str) -> None:
    """A number that is no amount is not taken for the end of a path that does not exist."""
    with pytest.raises(ValueError, match="has an invalid amount"):
        parse_sources(f"a.jsonl={amount}")


def test_reading_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While rows are read the caller is called again and again, bad rows or good ones; what it raises ends it."""
    monkeypatch.setattr(sources, "_ALIVE_SECONDS", 0.0)
    path = lines(tmp_path / "x.jsonl", *[{"text": "a"}, {"text": ""}] * 1000)
    calls: list[None] = []

    def check_stop() -> None:
        calls.append(None)
        if len(calls) == 1500:
            raise Preempted("asked to end")

    with pytest.raises(Preempted):
        load(path, on_bad_row="skip", check_stop=check_stop)
    assert len(calls) == 1500


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("/missing.jsonl", DataError, "JOB_DATA__SOURCE: /missing.jsonl does"),
        ("some/data", SettingsError, "JOB_DATA__REVISION"),
    ],
)
def test_a_source_is_checked_without_reading_it(source: str, error: type[Exception], words: str) -> None:
    """A path that is not there and a hub id without a revision are known before anything is fetched."""
    with pytest.raises(error, match=words):
        check_source(source, None, "train")
    check_source("some/data", "main", "train")


def test_reading_for_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ten seconds the number of rows so far; a source that is read at once says nothing."""
    for seconds, told in ((1, [5, 11, 17]), (0, [])):  # the clock is read twice for each row
        clock = count(0, seconds) if seconds else repeat(0)
        monkeypatch.setattr(sources.time, "monotonic", lambda clock=clock: float(next(clock)))
        with structlog.testing.capture_logs() as said:
            assert len(list(sources.watched(iter([{}] * 20), "a.jsonl", lambda: None))) == 20
        assert [(line["source"], line["rows"]) for line in said] == [("a.jsonl", rows) for rows in told]


@pytest.mark.parametrize(
    ("files", "given", "says"),
    [
        (["copy/train-00000-of-00002.jsonl"], "gs://b/copy", "gs://b/copy: has 1 of the 2 shards"),
        (["copy/a.jsonl", "copy/b.jsonl"], "gs://b/copy/", "such as gs://b/copy/*.jsonl"),
        (["copy"], "az://b/copy", "az://b/copy: has an unknown format"),
        (["copy/a.md"], "gs://b/*.md", "gs://b/a.md: ends in none of"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_copy_from_a_store_is_called_by_its_uri(
    tmp_path: Path, files: list[str], given: str, says: str, *, cached: bool
) -> None:
    """The folder of the copy, which is gone when the message is read, is not named."""
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "a"}\n')
    source = str(tmp_path / "copy" / (given.rpartition("/")[2] if "*" in given else "")).rstrip("/")
    tokens: dict[str, Any] = READING | {"name": given, "tokenizer": toy_tokenizer(), "root": tmp_path, "keep": True}
    with pytest.raises(DataError) as raised:
        load_tokens(source, None, **tokens) if cached else load(source, name=given)
    assert says in str(raised.value)
    assert str(tmp_path) not in str(raised.value)


def test_several_copies_are_called_by_their_uris() -> None:
    """Each by its own; what the user gave as a path is not rewritten."""
    given = {"/work/q/a": "gs://b/a", "c.jsonl": "./c.jsonl"}
    with pytest.raises(DataError) as raised, copies_named_as_given(given):
        raise DataError([Problem("/work/q/a", "is empty, like ./c.jsonl")])
    assert str(raised.value) == "gs://b/a: is empty, like ./c.jsonl"
