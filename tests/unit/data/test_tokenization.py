"""Tokens and targets of rendered rows."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from job.data.fields import Rendered
from job.data.formats import RowError
from job.data.text_tokenizer import text_tokenizer
from job.data.tokenization import Encoded, LossOn, encode
from job.errors import DataError
from job.records import Example
from tests.helpers import encoded
from tests.toy_tokenizer import toy_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def rendered(prompt: str, completion: str) -> Rendered:
    """A row of one prompt and one completion."""
    return Rendered("x", prompt + completion, ((len(prompt), len(prompt + completion)),))


def one(row: Rendered, loss_on: LossOn = "all", *, tokenizer: Any = None, templated: bool = False) -> Example:
    """The example that a row gives."""
    tokenizer = tokenizer or toy_tokenizer()
    ((item,),) = encode([row], text_tokenizer(tokenizer), templated=templated, loss_on=loss_on, max_length=1000)
    assert isinstance(item, Encoded)
    return item.example


@settings(deadline=None)
@given(TEXT, TEXT)
def test_tokens_are_those_of_plain_training_on_the_text(prompt: str, completion: str) -> None:
    """The tokens are those of the text with the end mark written behind it, as TRL makes them; all are learned."""
    example = one(rendered(prompt, completion))
    assert list(example.input_ids) == toy_tokenizer()(prompt + completion + "</s>")["input_ids"]
    assert example.targets == (False, *[True] * (len(example.input_ids) - 1))


@settings(deadline=None)
@given(TEXT, TEXT)
def test_completion_targets_are_the_tokens_that_end_behind_the_prompt(prompt: str, completion: str) -> None:
    """Counted in bytes: a token is a target when it ends behind the prompt's last byte, and the end mark always is."""
    example = one(rendered(prompt, completion), "completion")
    first, *tokens, last = toy_tokenizer().convert_ids_to_tokens(list(example.input_ids))
    assert (first, last) == ("<s>", "</s>")
    ends = accumulate(len(token) for token in tokens)  # a byte-level token has one character for each byte
    assert example.targets == (False, *(end > len(prompt.encode()) for end in ends), True)


def test_a_token_across_the_border_is_learned() -> None:
    """A token that holds the end of the prompt and the start of the completion is a target."""
    example = one(rendered("t", "he"), "completion")
    assert toy_tokenizer().convert_ids_to_tokens(list(example.input_ids)) == ["<s>", "the", "</s>"]
    assert example.targets == (False, True, True)


def test_the_first_token_is_never_learned() -> None:
    """Without a token in front of it, the first token of a completion is no target."""
    assert one(rendered("", "cat sat"), "completion", templated=True).targets[:2] == (False, True)
    assert one(rendered("", "cat sat"), "all", templated=True).targets[:2] == (False, True)


def test_an_end_that_is_there_is_not_doubled() -> None:
    """A text that ends with the end mark gets no second one, and it is learned."""
    example = one(Rendered("x", "cat</s>", ((0, 0),)), "completion")
    assert example == Example(one(rendered("cat", "")).input_ids, (*[False] * (len(example.targets) - 1), True))


def test_an_end_that_the_tokenizer_adds_is_not_doubled() -> None:
    """Nor by a tokenizer that puts the end mark behind each text, where the text ends with one."""
    tokenizer = toy_tokenizer.__wrapped__()
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[*ids.items()])
    given = [Rendered("x", text, ((0, len(text)),)) for text in ("cat</s>", "cat", "<s>cat</s>")]
    found = [
        item[0].example.input_ids
        for item in encode(given, text_tokenizer(tokenizer), templated=False, loss_on="completion", max_length=99)
        if isinstance(item[0], Encoded)
    ]
    assert found == [one(rendered("cat", "")).input_ids] * 3


def test_a_chat_template_writes_its_own_special_tokens() -> None:
    """Text from a chat template gets no special token besides its own."""
    example = one(rendered("<s>cat", "mat"), templated=True)
    tokenizer = toy_tokenizer()
    assert tokenizer.decode(example.input_ids) == "<s>catmat"
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_a_padding_token_in_the_text_is_learned_like_any_other() -> None:
    """Nothing is left out for its id: an end or padding token inside the text is a target."""
    example = one(rendered("", "a</s>b<pad>c"))
    assert all(example.targets[1:])
    assert len(example.targets) == 7


def test_several_turns_have_several_spans() -> None:
    """Each span's tokens are targets, and those between are not."""
    example = one(Rendered("x", "abcdef", ((1, 2), (4, 5))), "completion", templated=True)
    assert example.targets == (False, True, False, False, True, False)


def test_too_long_and_empty_rows_are_faults() -> None:
    """Special tokens count; a row of one token more than allowed is a fault, and so is one with nothing to learn."""
    rows = [rendered("", "a" * 8), rendered("", "a" * 9), [RowError("kind", "y", "what")], rendered("", "b" * 8)]
    tokenizer = text_tokenizer(toy_tokenizer())
    found = [item for (item,) in encode(rows, tokenizer, templated=False, loss_on="all", max_length=10)]
    assert [len(item.example.input_ids) if isinstance(item, Encoded) else item.kind for item in found] == [
        10,
        "too_long",
        "kind",
        10,
    ]
    ((fault,),) = encode([rendered("cat", "")], tokenizer, templated=True, loss_on="completion", max_length=9)
    assert isinstance(fault, RowError)
    assert fault.kind == "empty_target"


def test_a_row_longer_than_the_model_knows_warns_nobody() -> None:
    """The tokenizer's own length limit neither cuts a row nor warns: `max_length` is what counts."""
    tokenizer = toy_tokenizer()
    before, tokenizer.model_max_length = tokenizer.model_max_length, 4
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(one(rendered("", "a" * 20)).input_ids) == 22
    finally:
        tokenizer.model_max_length = before


@given(st.lists(st.tuples(TEXT, st.lists(st.booleans(), max_size=4)), max_size=3, unique_by=str))
def test_no_two_lists_of_examples_have_the_same_bytes(drafts: list[tuple[str, list[bool]]]) -> None:
    """Leaving out, swapping or changing an example changes the bytes that are hashed."""
    items = [encoded(text, range(len(mask)), mask) for text, mask in drafts]

    def canonical(some: list[Encoded]) -> bytes:
        return b"".join(item.canonical() for item in some)

    whole = canonical(items)
    if len(items) > 1:
        assert canonical(items[::-1]) != whole
    for index, item in enumerate(items):
        rest = items[:index], items[index + 1 :]
        assert canonical([*rest[0], *rest[1]]) != whole
        example = item.example
        longer = encoded(item.text, (*example.input_ids, 7), (*example.targets, True))
        for other in (replace(item, text=item.text + "a"), longer):
            assert canonical([*rest[0], other, *rest[1]]) != whole


def test_a_text_that_begins_with_the_begin_token_does_not_get_it_twice() -> None:
    """The token that the tokenizer puts in front stands there once, and what is learned is the same."""
    assert one(rendered("<s>cat", "mat"), "completion") == one(rendered("cat", "mat"), "completion")
    twice = one(rendered("<s><s>cat", "mat"))
    assert twice.input_ids == (0, *one(rendered("cat", "mat")).input_ids)


def test_ignored_spans_are_never_learned() -> None:
    """Where the loss is on all, the tokens of an ignored span are no targets; the end of the sequence still is."""
    row = Rendered("x", "abcdef", ((0, 6),), ignored=((2, 4),))
    assert one(row).targets == (False, True, True, False, False, True, True, True)
    assert one(row, "completion", templated=True).targets == (False, True, False, False, True, True)


def test_a_token_beyond_the_embedding_is_a_fault_of_its_row() -> None:
    """A token that the model has no embedding of is found here, by row, text and number."""
    last = max(one(rendered("", "zebra")).input_ids)
    options: dict[str, Any] = {"templated": False, "loss_on": "all", "max_length": 100}
    ((good,),) = encode([rendered("", "zebra")], text_tokenizer(toy_tokenizer()), vocabulary=last + 1, **options)
    assert isinstance(good, Encoded)
    ((fault,),) = encode([rendered("", "zebra")], text_tokenizer(toy_tokenizer()), vocabulary=last, **options)
    assert isinstance(fault, RowError)
    assert fault.kind == "unknown_token"
    assert f"(number {last})" in fault.what


def test_an_example_says_with_which_special_token_it_ends() -> None:
    """The end is the last special token among the last learned ones, a line break behind it aside; or there is none."""
    options: dict[str, Any] = {"templated": True, "max_length": 100}
    for text, spans, end in (
        ("<s>cat</s>\n", ((3, 11),), "</s>"),
        ("<s>cat mat", ((3, 10),), None),
        ("<s>cat</s>mat", ((3, 6),), None),
        ("<s>cat<pad>", ((3, 11),), "<pad>"),
    ):
        row = Rendered("x", text, spans)
        ((item,),) = encode([row], text_tokenizer(toy_tokenizer()), loss_on="completion", **options)
        assert isinstance(item, Encoded)
        assert item.end == (None if end is None else toy_tokenizer().convert_tokens_to_ids(end))


def test_a_tokenizer_that_breaks_down_is_an_error_of_the_data() -> None:
    """Some files make the tokenizers' library panic, which is no ordinary exception: told as a model's fault."""
    whole = json.loads(toy_tokenizer().backend_tokenizer.to_str())
    broken = {**whole, "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}}
    tokenizer = type(toy_tokenizer())(tokenizer_object=Tokenizer.from_str(json.dumps(broken)), eos_token="</s>")
    with pytest.raises(DataError, match=r"JOB_MODEL__ID.*fail on a text"):
        text_tokenizer(tokenizer).encode(["a cat sat"], special=True, offsets=True)
