"""The training data as a whole: read, checked, selected, hashed."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.common.source_list import Source
from job.data import sources
from job.data.formats import SUFFIXES, Row
from job.errors import DataError, SettingsError
from tests.toy_tokenizer import CHATML, toy_tokenizer
from tests.unit.data.loaded_rows import ALPACA, lines, load, text_of
from tests.unit.data.test_formats import write_rows

per_example = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
FULL = PLAIN.filter(str.strip)
ALPACA_ROWS = st.lists(
    st.fixed_dictionaries({"instruction": PLAIN, "input": PLAIN, "output": FULL, "text": PLAIN}), min_size=1, max_size=6
)


def test_the_record_says_what_was_read(tmp_path: Path) -> None:
    """The record counts rows, tokens, targets and the longest example, and keeps the user's name for the source."""
    path = lines(tmp_path / "x.jsonl", {"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "wxyz"})
    examples, record = load(path, name="s3://bucket/x.jsonl", loss_on="completion", revision="main")
    assert [len(example.input_ids) for example in examples] == [5, 6]
    assert (record.source, record.revision, record.split) == ("s3://bucket/x.jsonl", None, None)
    assert (record.format, record.rows, record.skipped) == ("prompt_completion", 2, {})
    assert (record.tokens, record.target_tokens, record.longest) == (11, 7, 6)
    assert record.longest_at == "s3://bucket/x.jsonl:2"
    lines(path, {"text": "the longest"}, {"text": "ab"})  # of which half the rows is the second one
    _, record = load((Source(str(path), "x.jsonl", times=Fraction(1, 2)),))
    assert (record.rows, record.longest_at) == (1, "x.jsonl:2")


@per_example
@given(rows=ALPACA_ROWS)
def test_the_fingerprint_does_not_depend_on_the_format(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    """The same rows give the same examples and the same hash from every file format."""
    loaded = [load(write_rows(tmp_path / f"x{suffix}", rows)) for suffix in SUFFIXES]
    assert len({record.sha256 for _, record in loaded}) == 1
    assert all(examples == loaded[0][0] for examples, _ in loaded)
    assert len(loaded[0][0]) == len(rows)


@per_example
@given(rows=ALPACA_ROWS, data=st.data())
def test_the_fingerprint_changes_with_any_example(tmp_path: Path, rows: list[dict[str, str]], data: Any) -> None:
    """Another instruction, input or output in any row, or a row more or less, gives another hash."""
    before = load(lines(tmp_path / "x.jsonl", *rows))[1].sha256
    index = data.draw(st.integers(0, len(rows) - 1))
    field = data.draw(st.sampled_from(["instruction", "input", "output"]))
    changed = [*rows[:index], rows[index] | {field: rows[index][field] + "!"}, *rows[index + 1 :]]
    for other in (changed, [*rows, rows[0]]):
        assert load(lines(tmp_path / "x.jsonl", *other))[1].sha256 != before


def test_the_fingerprint_covers_the_targets_and_not_the_name(tmp_path: Path) -> None:
    """What is learned is part of the hash; what the file is called, and fields that are not rendered, are not."""
    row = {"prompt": "cat", "completion": "mat"}
    hashes = [
        load(lines(tmp_path / "x.jsonl", row))[1].sha256,
        load(lines(tmp_path / "y.jsonl", row | {"id": 3}))[1].sha256,
        load(lines(tmp_path / "x.jsonl", row), loss_on="completion")[1].sha256,
    ]
    assert hashes[0] == hashes[1] != hashes[2]


BAD_LINES = {
    "invalid_json": [b"{", b'{"text": "a"', b"\x00"],
    "broken_utf8": [b'{"text": "\xff"}', b"\xc3\x28", b'{"text": "a", "more": "\xe2\x82"}', b'{"text": "\\ud800"}'],
    "not_an_object": [b"[]", b"3", b"null", b'"text"'],
    "missing_field": [b"{}", b'{"text": null}', b'{"txt": "a"}'],
    "wrong_type": [b'{"text": 3}', b'{"text": ["a"]}'],
    "empty_target": [b'{"text": ""}', b'{"text": " \\n"}'],
    "too_long": [json.dumps({"text": "0" * 40}).encode()],
}
LINES = st.lists(
    st.one_of(
        st.sampled_from([(kind, line) for kind, some in BAD_LINES.items() for line in some]),
        FULL.map(lambda text: ("good", json.dumps({"text": text}).encode())),
    ),
    max_size=30,
)


@settings(per_example, max_examples=60)
@given(content=LINES, limit=st.none() | st.integers(1, 10))
def test_good_rows_are_selected_in_order(tmp_path: Path, content: list[tuple[str, bytes]], limit: int | None) -> None:
    """The first `limit` good rows come out in file order; exactly the bad rows before the last of them are counted."""
    path = lines(tmp_path / "x.jsonl", *(line for _, line in content))
    options: dict[str, Any] = {"limit": limit, "schema": "text", "max_length": 41}
    good = [index for index, (kind, _) in enumerate(content) if kind == "good"]
    read = content if limit is None or len(good) < limit else content[: good[limit - 1] + 1]
    bad = [(line, kind) for line, (kind, _) in enumerate(read, 1) if kind != "good"]
    if good:
        examples, record = load(path, on_bad_row="skip", **options)
        assert [text_of(example) for example in examples] == [json.loads(content[i][1])["text"] for i in good[:limit]]
        assert record.skipped == {kind: sum(kind == other for _, other in bad) for _, kind in bad}
    else:
        with pytest.raises(DataError, match="has no"):
            load(path, on_bad_row="skip", **options)
    if bad:
        with pytest.raises(DataError) as caught:
            load(path, **options)
        assert caught.value.total == len(bad)
        places = [problem.where.split(" ")[0] for problem in caught.value.problems]
        assert places == [f"{path}:{line}" for line, _ in bad[:20]]


FRAGMENTS = [
    b'{"text": "',
    b'{"output":',
    b'"',
    b"}",
    b"\n",
    b"[",
    b"\\u",
    b"d800",
    b"\xff",
    b"\xef\xbb\xbf",
    b"1e999",
    b"cat",
]
CONTENT = st.binary(max_size=200) | st.lists(st.sampled_from(FRAGMENTS), max_size=20).map(b"".join)


@settings(per_example, max_examples=50)
@given(content=CONTENT, on_bad_row=st.sampled_from(["error", "skip"]))
def test_arbitrary_bytes_are_an_error_of_the_data(tmp_path: Path, content: bytes, on_bad_row: str) -> None:
    """Whatever a JSONL file holds, it gives examples or a DataError that can be printed."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    problem = None
    try:
        examples, record = load(path, on_bad_row=on_bad_row)
    except DataError as error:
        problem = str(error).encode()
    assert problem if problem is not None else len(examples) == record.rows > 0


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]"])
def test_no_rows_are_an_error(tmp_path: Path, content: bytes) -> None:
    """A file without a row is an error, in every format that can be empty."""
    path = tmp_path / ("x.json" if content == b"[]" else "x.jsonl")
    path.write_bytes(content)
    for schema in (None, "text"):
        with pytest.raises(DataError, match="has no rows"):
            load(path, schema=schema)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    """Messages are rendered by the tokenizer's chat template, and without one they are an error that says so."""
    talk = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "mat"}]
    path = lines(tmp_path / "x.jsonl", {"messages": talk})
    with pytest.raises(DataError, match="no chat template"):
        load(path)
    (example,), record = load(path, toy_tokenizer(CHATML), loss_on="completion")
    learned = [token for token, target in zip(example.input_ids, example.targets, strict=True) if target]
    assert toy_tokenizer().decode(example.input_ids) == "<|user|>cat?</s><|assistant|>mat</s>"
    assert toy_tokenizer().decode(learned) == "mat</s>"
    assert (record.format, record.target_tokens) == ("messages", len(learned))


def test_a_tokenizer_without_an_end_cannot_be_used(tmp_path: Path) -> None:
    """Without an end-of-sequence token a text cannot be ended, which is an error and not a silent omission."""
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=toy_tokenizer().backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load(lines(tmp_path / "x.jsonl", {"text": "a"}), endless)


def test_a_directory_is_named_with_its_file(tmp_path: Path) -> None:
    """A fault in a file found in a directory names the file, under the user's name for the directory."""
    lines(tmp_path / "x.jsonl", {"text": ""})
    with pytest.raises(DataError, match=r"^s3://bucket/data/x.jsonl:1 text: is empty"):
        load(tmp_path, name="s3://bucket/data/")


@pytest.mark.parametrize(
    "source", ["./missing", "/missing", "missing.jsonl", "a/b/c", "~/x", "s3://b/x.csv", "x" * 300]
)
def test_a_path_that_is_not_there_is_no_hub_id(source: str) -> None:
    """What looks like a path and is none is an error that names it; the hub is not asked."""
    with pytest.raises(DataError) as caught:
        load(source, revision="main")
    assert caught.value.problems[0].where == source


@pytest.mark.parametrize("source", ["squad", "tatsu-lab/alpaca", "a/b.c_d-1"])
def test_a_hub_id_needs_a_revision(source: str) -> None:
    """A hub id without a revision is an error of the settings."""
    with pytest.raises(SettingsError, match="JOB_DATA__REVISION"):
        load(source)


def test_hub_rows_are_checked_like_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the hub give examples and faults as those of a file do; the record holds the commit and the split."""

    def fake(source: str, revision: str, split: str, name: str, check_stop: Any) -> Any:
        assert callable(check_stop)
        assert (source, revision, split) == ("tatsu-lab/alpaca", "main", "test")
        return "c0ffee", iter([Row(f"{name}:row 1", {"text": ""}), Row(f"{name}:row 2", {"text": "cat"})])

    monkeypatch.setattr(sources, "open_dataset", fake)
    with pytest.raises(DataError, match="tatsu-lab/alpaca:row 1 text: is empty"):
        load("tatsu-lab/alpaca", revision="main", split="test")
    examples, record = load("tatsu-lab/alpaca", revision="main", split="test", on_bad_row="skip")
    assert [text_of(example) for example in examples] == ["cat"]
    assert (record.revision, record.split, record.skipped) == ("c0ffee", "test", {"empty_target": 1})


def test_a_path_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is named like a hub id is read as a directory."""
    monkeypatch.chdir(tmp_path)
    Path("tatsu-lab/alpaca").mkdir(parents=True)
    lines(Path("tatsu-lab/alpaca/x.jsonl"), {"text": "cat"})
    assert load("tatsu-lab/alpaca")[1].rows == 1


@pytest.mark.skipif(not ALPACA.exists(), reason="needs the shared data")
def test_real_alpaca_is_selected() -> None:
    """The first 1,500 good rows of Alpaca are selected, and the empty outputs on the way to them counted."""
    examples, record = load(ALPACA, limit=1500, on_bad_row="skip", max_length=4096)
    assert (len(examples), record.rows, record.format) == (1500, 1500, "alpaca")
    assert record.skipped == {"empty_target": 3}
    with pytest.raises(DataError, match=r"alpaca.jsonl.gz:285 output: is empty") as caught:
        load(ALPACA, limit=1500, max_length=4096)
    assert caught.value.total == 3


def conversation(*answers: str) -> dict[str, Any]:
    """A row of messages in which each answer follows a question."""
    turns = [({"role": "user", "content": "cat?"}, {"role": "assistant", "content": answer}) for answer in answers]
    return {"messages": [message for turn in turns for message in turn]}


def test_a_template_that_never_ends_an_answer_is_refused(tmp_path: Path) -> None:
    """A run in which no example teaches the model to stop does not begin; any special token at the end will do."""
    path = lines(tmp_path / "x.jsonl", conversation("mat"), conversation("sat"))
    no_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for loss_on in ("all", "completion"):
        with pytest.raises(DataError, match=r"never to stop.*'</s>'"):
            load(path, toy_tokenizer(no_end), loss_on=loss_on)
    assert load(path, toy_tokenizer(CHATML))[1].rows == 2
    with structlog.testing.capture_logs() as logs:
        assert load(path, toy_tokenizer(no_end.replace("\n", "<pad>\n")))[1].rows == 2
    (warning,) = [line for line in logs if line["log_level"] == "warning"]
    assert (warning["ends_with"], warning["end_of_sequence"]) == ("<pad>", "</s>")


def test_settings_that_choose_nothing_are_warned_of(tmp_path: Path) -> None:
    """A split of a file that has none, so that all rows are learned; weights where no row has one, by that name."""

    def warned(path: Path, **how: Any) -> list[str]:
        with structlog.testing.capture_logs() as logs:
            load(path, **how)
        return [line["event"] for line in logs if line["log_level"] == "warning"]

    path = lines(tmp_path / "x.jsonl", {"text": "cat", "weights": 0}, {"text": "dog"})
    (split,) = warned(path, split="test")
    assert split == "the split test has no effect: the source has no splits, and all its rows are used"
    assert warned(path) == warned(path, split="validation") == []
    (weights,) = warned(path, row_weights=True)
    assert weights.startswith("JOB_DATA__ROW_WEIGHTS has no effect")
    assert warned(lines(tmp_path / "y.jsonl", {"text": "cat", "weight": 2}, {"text": "dog"}), row_weights=True) == []


def test_control_tokens_in_text_are_counted(tmp_path: Path) -> None:
    """Special tokens that stand in the texts of rows are one warning with counts; those at the borders are none."""
    plain = lines(
        tmp_path / "x.jsonl", {"text": "<s>cat</s>"}, {"text": "a</s>b<pad>"}, {"text": "</s>c"}, {"text": "dog"}
    )
    chat = lines(tmp_path / "y.jsonl", conversation("mat"), conversation("the token </s>"))
    found = []
    for path in (plain, chat):
        with structlog.testing.capture_logs() as logs:
            load(path, toy_tokenizer(CHATML))
        found += [(line["tokens"], line["rows"], line["first"]) for line in logs if line["log_level"] == "warning"]
    assert found == [({"</s>": 2, "<pad>": 1}, 2, f"{plain}:2"), ({"</s>": 1}, 1, f"{chat}:2")]


def remarked(path: Path, **how: Any) -> list[dict[str, Any]]:
    """What loading the rows says of them, but for fields that are not used."""
    with structlog.testing.capture_logs() as logs:
        load(path, **how)
    return [{name: line.get(name) for name in ("log_level", "rows", "first", "words", "fields")} for line in logs]


def test_words_for_missing_values_are_counted(tmp_path: Path) -> None:
    """What a table has for a missing value is trained on as text, and said; few of many may be answers, as None is."""
    path = tmp_path / "x.csv"
    rows = [f"do {n},,it {n}" for n in range(1100)]
    rows[3], rows[7] = "do 3,nan,NaN", "do 7,,None"
    path.write_text("\n".join(["instruction,input,output", *rows]), encoding="utf-8")
    first = {"first": f"{path}:row 4 input", "fields": None}
    assert remarked(path) == [
        {"log_level": "warning", "rows": 2, "words": {"NaN": 1, "nan": 1, "None": 1}, **first},
    ]
    assert load(path)[1].rows == 1100
    path.write_text("\n".join(["instruction,input,output", *rows[:7], *rows[8:], "x,,y"]), encoding="utf-8")
    assert remarked(path) == [{"log_level": "info", "rows": 1, "words": {"NaN": 1, "nan": 1}, **first}]


def test_completions_that_repeat_the_prompt_are_counted(tmp_path: Path) -> None:
    """If most completions begin with their prompts the data has them twice; a few may say the question again."""
    twice = {"prompt": "where is the cat", "completion": "where is the cat on the mat"}
    once = {"prompt": "where is the cat", "completion": " on the mat"}
    for rows, level in (([twice, twice, once], "warning"), ([once, once, twice], "info")):
        (found,) = remarked(lines(tmp_path / "x.jsonl", *rows))
        assert (found["log_level"], found["rows"]) == (level, rows.count(twice))
        assert found["first"].endswith(f"x.jsonl:{rows.index(twice) + 1} completion")
    pair: dict[str, Any] = {"prompt": twice["prompt"], "chosen": twice["completion"], "rejected": once["completion"]}
    (found,) = remarked(lines(tmp_path / "x.jsonl", pair), method="dpo")
    assert found["first"].endswith("x.jsonl:1 chosen")


def test_scores_that_contradict_the_preference_are_counted(tmp_path: Path) -> None:
    """Where the chosen answer has the lower score, the columns may be mixed up; equal scores say nothing."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": n, "score_rejected": 4.0} for n in (3, 4)]
    warning = remarked(lines(tmp_path / "x.jsonl", *rows), method="dpo")[0]
    assert (warning["log_level"], warning["rows"]) == ("warning", 1)
    assert warning["first"].endswith("x.jsonl:1 score_chosen")


def test_fields_that_are_not_used_are_listed_once(tmp_path: Path) -> None:
    """What rows hold and the schema does not use is one line of the log, with the number of rows of each field."""
    path = lines(tmp_path / "x.jsonl", {"text": "a", "id": 1}, {"text": "b", "id": 2, "url": "c"}, {"text": ""})
    with structlog.testing.capture_logs() as logs:
        load(path, on_bad_row="skip")
    assert [line["rows"] for line in logs] == [{"id": 2, "url": 1}]


def test_a_template_sees_the_day_it_is_given(tmp_path: Path) -> None:
    """Two loads with the same date give the same examples, whatever the clock says; another date gives others."""
    path = lines(tmp_path / "x.jsonl", conversation("mat"))
    dated = toy_tokenizer("{{ strftime_now('%d.%m.%Y') }}" + CHATML)
    hashes = [load(path, dated, date=date)[1].sha256 for date in ("2020-02-29", "2020-02-29", "2020-03-01")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_shards_of_the_split_are_one_source(tmp_path: Path) -> None:
    """A folder in the hub's layout is read by split, each row named by its shard, and the record has the split."""
    for number, text in enumerate(("cat", "mat")):
        write_rows(tmp_path / f"train-0000{number}-of-00002.parquet", [{"text": text}])
    examples, record = load(tmp_path, name="s3://bucket/data")
    assert [text_of(example) for example in examples] == ["cat", "mat"]
    assert (record.source, record.split, record.revision) == ("s3://bucket/data", "train", None)
    write_rows(tmp_path / "train-00001-of-00002.parquet", [{"text": ""}])
    with pytest.raises(DataError, match=r"s3://bucket/data/train-00001-of-00002.parquet:row 1 text"):
        load(tmp_path, name="s3://bucket/data")
