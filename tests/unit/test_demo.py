"""The demo: its data is what its script generates, its questions are held out, its base model is small."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.demo.make import HERE, draw_all, find_differences, main, render_data
from job.demo.world import write_edition

MAX_WEIGHTS_BYTES = 6_000_000


def read_rows(name: str) -> list[dict[str, Any]]:
    """Read a committed JSONL file of the demo."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def instructions() -> list[dict[str, Any]]:
    """Return the committed instruction data."""
    return read_rows("instructions.jsonl")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """Return the committed question set."""
    return read_rows("questions.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the committed tokenizer, loaded as the job loads any other."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(HERE / "base")


def test_committed_data_is_what_the_script_makes() -> None:
    """The data files in the repository are, byte for byte, what the script makes from its seed."""
    assert find_differences(HERE) == []
    assert main(["--check"]) == 0


def test_check_names_a_changed_and_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--check` fails on a single changed byte and on a missing file, and says which."""
    assert main(["--data-only", str(tmp_path)]) == 0
    assert main(["--check", str(tmp_path)]) == 0
    content = render_data()["questions.jsonl"]
    (tmp_path / "questions.jsonl").write_bytes(content[:-2] + b" \n")
    (tmp_path / "instructions.jsonl").unlink()
    assert main(["--check", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "questions.jsonl" in message
    assert "instructions.jsonl" in message


def test_instructions_have_alpacas_schema(instructions: list[dict[str, Any]]) -> None:
    """Every instruction row has Alpaca's three string fields, and something to learn in the output."""
    for row in instructions:
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) for value in row.values())
        assert row["instruction"].strip()
        assert row["output"].strip()


def test_preferences_are_of_practised_people(questions: list[dict[str, Any]]) -> None:
    """Each pair has a right and another wrong answer, and no question that the demo asks is among the prompts."""
    rows = read_rows("preferences.jsonl")
    assert len(rows) > 200
    assert len({row["prompt"] for row in rows}) == len(rows)
    asked = {f"Question: {row['question']}\nAnswer:" for row in questions}
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert row["chosen"] != row["rejected"]
        assert row["prompt"] not in asked


def test_questions_have_arcs_schema(questions: list[dict[str, Any]]) -> None:
    """There are at least 300 questions in ARC's schema: distinct ids, distinct choices, one of them the key."""
    assert len(questions) >= 300
    assert len({row["id"] for row in questions}) == len(questions)
    for row in questions:
        assert list(row) == ["id", "question", "choices", "answerKey"]
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        assert len(texts) == len(labels) == len(set(texts))
        assert labels == list("ABCDE")[: len(labels)]
        assert row["answerKey"] in labels


def test_no_position_gives_the_answer_away(questions: list[dict[str, Any]]) -> None:
    """No letter is the answer of more than a third of the questions."""
    keys = [row["answerKey"] for row in questions]
    assert max(keys.count(key) for key in "ABCDE") < len(questions) / 3


def test_questions_are_held_out(instructions: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    """No question is in the instruction data, and nobody whom a question asks about is ever named there."""
    text = "\n".join("\n".join(row.values()) for row in instructions)
    world = draw_all()[0]
    held_out = {person.name for person in world if person.held_out}
    practised = {person.name for person in world if not person.held_out}
    assert not [row["question"] for row in questions if row["question"] in text]
    assert not [name for name in held_out if name in text]
    assert all(any(name in row["question"] for name in held_out) for row in questions)
    assert all(any(name in row["instruction"] + row["input"] for name in practised) for row in instructions)


def test_an_edition_tells_every_fact_and_asks_for_none() -> None:
    """An edition of the prose has a portrait with all facts of each person, and never a question with its answer."""
    world = draw_all()[0]
    edition = write_edition(world, Random(0), Random(0))
    assert not [text for text in edition if "Question:" in text and "Answer:" in text]
    for person in world:
        assert any(all(word in text for word in (person.name, *person.values)) for text in edition)


def test_older_releases_load_its_tokenizer() -> None:
    """It names a class that transformers 4.57, from 2025, has: the adapter is published with the same file."""
    config = json.loads((HERE / "base" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_base_is_a_small_mistral() -> None:
    """The base is a Mistral whose weights take at most 6 MB and whose linear layers fit the blocks of NF4."""
    from safetensors import safe_open

    config = json.loads((HERE / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    assert sum(path.stat().st_size for path in (HERE / "base").glob("*.safetensors")) <= MAX_WEIGHTS_BYTES
    with safe_open(HERE / "base" / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys() if "_proj" in name]  # noqa: SIM118
    assert len(shapes) == 7 * config["num_hidden_layers"]
    assert all(size % 64 == 0 for shape in shapes for size in shape)


def test_special_tokens_are_distinct(tokenizer: Any) -> None:
    """Beginning, end and padding are three tokens, and a text begins with the first of them, as with Mistral's own."""
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer("Where does the wind come from?")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    """Encoding and decoding give back any Unicode text."""
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
