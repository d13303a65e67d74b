"""Examples in an Arrow file: what is read equals what was written, for every way of access."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data import examples as module
from job.data.examples import Examples, ExampleWriter, lengths_of, target_counts_of, weights_of
from job.errors import Unreachable
from job.records import Example

EXAMPLES = st.lists(
    st.builds(
        lambda pairs, at, label: Example(
            tuple(token for token, _ in pairs), tuple(target for _, target in pairs), at, label
        ),
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9),
        st.none() | st.integers(1, 8),
        st.none() | st.booleans(),
    ),
    max_size=12,
)


def write(examples: list[Example], path: Path | None) -> Examples:
    """The examples, in a file or in memory."""
    with ExampleWriter(path) as writer:
        for example in examples:
            ids = struct.pack(f"<{len(example.input_ids)}i", *example.input_ids)
            writer.add(ids, bytes(example.targets), example.second_at, example.desirable)
    return writer.examples()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(examples=EXAMPLES, data=st.data())
def test_what_was_written_is_read(tmp_path: Path, examples: list[Example], data: st.DataObject) -> None:
    """By number, as a whole, as a slice, as a choice of rows; in a file of several batches, and in memory."""
    plain, module._BATCH_TOKENS = module._BATCH_TOKENS, 20
    try:
        found, held = write(examples, tmp_path / "x.arrow"), write(examples, None)
    finally:
        module._BATCH_TOKENS = plain
    assert found == examples
    assert list(held) == [found[index] for index in range(len(examples))] == examples
    assert Examples(tmp_path / "x.arrow") == found
    part = data.draw(st.slices(len(examples)))
    assert found[part] == examples[part]
    if examples:
        rows = data.draw(st.lists(st.integers(0, len(examples) - 1)))
        chosen = found.take(rows)
        assert chosen == [examples[row] for row in rows]
        assert chosen[part] == [examples[row] for row in rows][part]
        assert found[-1] == examples[-1]
        assert chosen.rows == rows
    for one in (found, held, examples):
        assert lengths_of(one) == [len(example.input_ids) for example in examples]
        assert target_counts_of(one) == [sum(example.targets) for example in examples]
        assert weights_of(one) == [example.weight for example in examples]
    with pytest.raises(IndexError):
        found[len(examples)]


def test_references_belong_to_their_examples(tmp_path: Path) -> None:
    """The reference's log-probabilities come with the example that they were computed of, in a view too."""
    examples = [Example((n, n + 1), (False, True)) for n in range(4)]
    found = write(examples, tmp_path / "x.arrow")
    known = found.with_references([(float(n),) for n in range(4)])
    assert [example.reference for example in known.take([3, 1])] == [(3.0,), (1.0,)]
    assert known[1:][0].reference == (1.0,)
    assert found == examples
    with pytest.raises(ValueError, match="3 references for 4 examples"):
        found.with_references([(0.0,)] * 3)


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"x" * 1000])
def test_another_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    """A file that was cut short, or holds something else, is refused, and not read as examples."""
    (tmp_path / "x.arrow").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.arrow"):
        Examples(tmp_path / "x.arrow")


def test_a_full_disk_is_worth_another_machine() -> None:
    """The error says that the disk is full, with the code for which a platform tries again."""
    with pytest.raises(Unreachable, match="the disk is full"), ExampleWriter(Path("/dev/full")) as writer:
        writer.add(struct.pack("<100000i", *range(100_000)), bytes(100_000))
