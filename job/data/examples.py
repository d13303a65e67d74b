"""Tokenized examples in an Arrow file, which is mapped into memory: how many there are is not limited by memory.

| column | type | meaning |
|---|---|---|
| input_ids | list<int32> | the tokens |
| targets | list<uint8> | for each token 1 if it is a target, else 0 |
| second_at | int32, may be null | where the second sequence begins |
| desirable | bool, may be null | the label of an answer that has one |
| weight | double | what the loss of its target tokens is multiplied by |

The file is in Arrow's IPC file format, so other tools read it as well: `pyarrow.ipc.open_file`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from job.common.disk import disk_errors
from job.records import Example

if TYPE_CHECKING:
    import numpy as np

    Integers = np.ndarray[Any, np.dtype[np.int64]]

_BATCH_TOKENS = 1 << 20
"""Of a batch that is written at once, unless one example has more."""


@cache
def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "targets": pa.list_(pa.uint8()),
            "second_at": pa.int32(),
            "desirable": pa.bool_(),
            "weight": pa.float64(),
        }
    )


class ExampleWriter:
    """Writes examples to an Arrow file, or to memory without a path. The file is whole when the context ends.

    Raises:
        Unreachable: The disk is full or cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        import pyarrow as pa

        self._path = path
        self._stack = ExitStack()
        with disk_errors(f"cannot write {path}"):
            self._sink: Any = pa.BufferOutputStream() if path is None else self._stack.enter_context(path.open("wb"))
            self._file = pa.ipc.new_file(self._sink, _schema())
        self._ids: list[bytes] = []
        self._targets: list[bytes] = []
        self._counts: list[Integers] = []
        self._rest: list[tuple[int | None, bool | None, float]] = []
        self._waiting = 0
        self.lengths, self.target_counts = array("i"), array("i")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with disk_errors(f"cannot write {self._path}"), self._stack:
            if kind is None:
                self._flush()
                self._file.close()

    def add(
        self,
        ids: bytes,
        targets: bytes,
        second_at: int | None = None,
        desirable: bool | None = None,  # noqa: FBT001 - a value of the row, not a switch
        weight: float = 1.0,
    ) -> None:
        """Adds an example: its tokens as int32, little-endian, and a byte 0 or 1 for each of them."""
        import numpy as np

        self.lengths.append(len(targets))
        self.target_counts.append(targets.count(1))
        self._take(ids, targets, np.array([len(targets)]), [(second_at, desirable, weight)])

    def add_all(
        self, ids: bytes, targets: bytes, lengths: bytes, extras: Sequence[tuple[int | None, bool | None, float]]
    ) -> None:
        """Adds concatenated examples, as `add` would one by one: the file has the same bytes.

        Args:
            ids: Tokens of all of them.
            targets: Targets of all of them.
            lengths: Tokens of each, int32, little-endian.
            extras: Second sequence, label and weight of each.
        """
        import numpy as np

        counts = np.frombuffer(lengths, "<i4").astype(np.int64)
        ends = np.cumsum(counts)
        sums = np.concatenate([[0], np.cumsum(np.frombuffer(targets, np.uint8), dtype=np.int64)])
        self.lengths.extend(counts.tolist())
        self.target_counts.extend((sums[ends] - sums[ends - counts]).tolist())
        at = 0
        while at < len(counts):
            begin = int(ends[at] - counts[at])
            # Up to the example that fills the batch, which is written with it.
            stop = min(len(counts), int(ends.searchsorted(begin + _BATCH_TOKENS - self._waiting)) + 1)
            end = int(ends[stop - 1])
            self._take(ids[4 * begin : 4 * end], targets[begin:end], counts[at:stop], extras[at:stop])
            at = stop

    def _take(
        self,
        ids: bytes,
        targets: bytes,
        counts: Integers,
        extras: Sequence[tuple[int | None, bool | None, float]],
    ) -> None:
        self._ids.append(ids)
        self._targets.append(targets)
        self._counts.append(counts)
        self._rest.extend(extras)
        self._waiting += len(targets)
        if self._waiting >= _BATCH_TOKENS:
            with disk_errors(f"cannot write {self._path}"):
                self._flush()

    def _flush(self) -> None:
        import numpy as np
        import pyarrow as pa

        if not self._rest:
            return
        ends = np.concatenate([[0], np.cumsum(np.concatenate(self._counts))]).astype(np.int32)
        columns = []
        for kind, parts in ((pa.int32(), self._ids), (pa.uint8(), self._targets)):
            values = pa.Array.from_buffers(kind, int(ends[-1]), [None, pa.py_buffer(b"".join(parts))])
            columns.append(pa.ListArray.from_arrays(pa.array(ends), values))
        second, desirable, weight = zip(*self._rest, strict=True)
        columns += [pa.array(second, pa.int32()), pa.array(desirable, pa.bool_()), pa.array(weight, pa.float64())]
        self._file.write_batch(pa.record_batch(columns, schema=_schema()))
        self._ids, self._targets, self._counts, self._rest, self._waiting = [], [], [], [], 0

    def examples(self) -> Examples:
        """What was written, after the context has ended."""
        where = self._sink.getvalue() if self._path is None else self._path
        return Examples(where)


class Examples(Sequence[Example]):
    """Examples of an Arrow file, each read on access. A slice is a view of the same file.

    Args:
        where: The file, or a buffer with its content.
        rows: Which rows of it, in this order; None for all.

    Raises:
        ValueError: The file is not of this format.
    """

    def __init__(self, where: Path | Any, rows: Sequence[int] | None = None) -> None:
        import numpy as np
        import pyarrow as pa

        try:
            source = pa.memory_map(str(where)) if isinstance(where, Path) else pa.BufferReader(where)
            reader = pa.ipc.open_file(source)
            if reader.schema != _schema():
                raise ValueError(f"{where} holds other columns")
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{where} is no Arrow file: {error}") from error
        self._batches = [_Batch(batch) for batch in batches]
        self._starts = np.cumsum([0, *(batch.rows for batch in self._batches)], dtype=np.int64)
        self._rows = np.arange(self._starts[-1]) if rows is None else np.asarray(rows, dtype=np.int64)
        self._references: Sequence[tuple[float, ...]] | None = None

    @property
    def rows(self) -> list[int]:
        """Which rows of the file they are."""
        rows: list[int] = self._rows.tolist()
        return rows

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self._of_all(lambda batch: batch.lengths())

    @property
    def target_counts(self) -> list[int]:
        """Target tokens of each example."""
        return self._of_all(lambda batch: batch.target_counts())

    @property
    def weights(self) -> list[float]:
        """What the loss of each example's target tokens is multiplied by."""
        return self._of_all(lambda batch: batch.weights())

    def _of_all(self, numbers: Any) -> list[Any]:
        import numpy as np

        of_batches = [numbers(batch) for batch in self._batches]
        values: list[Any] = (np.concatenate(of_batches) if of_batches else np.zeros(0, np.int64))[self._rows].tolist()
        return values

    def take(self, rows: Sequence[int]) -> Examples:
        """A view of some of the examples."""
        import numpy as np

        view = object.__new__(Examples)
        indices = np.asarray(rows, dtype=np.int64)
        view._batches, view._starts, view._rows = self._batches, self._starts, self._rows[indices]
        known = self._references
        view._references = None if known is None else [known[index] for index in indices]
        return view

    def with_references(self, references: Sequence[tuple[float, ...]]) -> Examples:
        """The examples with the reference model's log-probabilities of each."""
        if len(references) != len(self):
            raise ValueError(f"{len(references)} references for {len(self)} examples")
        view = self.take(range(len(self)))
        view._references = references  # noqa: SLF001 - of a copy
        return view

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        """An example, or a view of several."""
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        index = range(len(self))[index]
        row = int(self._rows[index])
        number = int(self._starts.searchsorted(row, "right")) - 1
        reference = () if self._references is None else self._references[index]
        return self._batches[number].example(row - int(self._starts[number]), reference)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether another sequence has equal examples."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment] # how Python marks a class with `__eq__` as not hashable


def rewrite_examples(examples: Iterable[Example], file: Path | None) -> Examples:
    """Writes examples in the place of a file, or to memory without one.

    They may be made from those of the same file: the new file is written beside it, and takes its place when it is
    whole.

    Raises:
        Unreachable: The disk is full or cannot be written.
    """
    beside = None if file is None else file.with_name(f"new-{file.name}")
    with ExampleWriter(beside) as writer:
        for example in examples:
            ids = struct.pack(f"<{len(example.input_ids)}i", *example.input_ids)
            writer.add(ids, bytes(example.targets), example.second_at, example.desirable, example.weight)
    if beside is None or file is None:
        return writer.examples()
    with disk_errors(f"cannot write {file}"):
        beside.replace(file)
    return Examples(file)


class _Batch:
    """One record batch: its columns as views of the mapped file, nothing copied."""

    def __init__(self, batch: Any) -> None:
        self.rows = batch.num_rows
        ids, targets, self._second_at, self._desirable, self._weight = batch.columns
        self._ends = ids.offsets.to_numpy()
        self._ids, self._targets = ids.values.to_numpy(), targets.values.to_numpy()

    def lengths(self) -> Any:
        """(rows,) int64."""
        import numpy as np

        return np.diff(self._ends).astype(np.int64)

    def target_counts(self) -> Any:
        """(rows,) int64."""
        import numpy as np

        sums = np.concatenate([[0], np.cumsum(self._targets, dtype=np.int64)])
        return sums[self._ends[1:]] - sums[self._ends[:-1]]

    def weights(self) -> Any:
        """(rows,) float64."""
        return self._weight.to_numpy()

    def example(self, row: int, reference: tuple[float, ...]) -> Example:
        """One row."""
        span = slice(self._ends[row], self._ends[row + 1])
        return Example(
            tuple(self._ids[span].tolist()),
            tuple(self._targets[span].astype(bool).tolist()),
            self._second_at[row].as_py(),
            self._desirable[row].as_py(),
            reference,
            self._weight[row].as_py(),
        )


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, without reading the tokens of those in a file."""
    return examples.lengths if isinstance(examples, Examples) else [len(example.input_ids) for example in examples]


def target_counts_of(examples: Sequence[Example]) -> list[int]:
    """Target tokens of each example."""
    return examples.target_counts if isinstance(examples, Examples) else [sum(e.targets) for e in examples]


def weights_of(examples: Sequence[Example]) -> list[float]:
    """What the loss of each example's target tokens is multiplied by."""
    return examples.weights if isinstance(examples, Examples) else [example.weight for example in examples]
