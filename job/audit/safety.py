"""Which labels of a safety classifier mean unsafe, and the texts of rows until it scores them.

The classifier itself is `job/model/text_classifier.py`: it runs once all rows are read, not in the processes that read.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256

from job.errors import Problem, SettingsError

SAFE_NAMES = frozenset(
    {
        *("safe", "benign", "clean", "harmless", "neutral", "normal", "none", "ok", "okay", "acceptable", "sfw"),
        *("nontoxic", "nottoxic", "nothate", "nonhate", "nothateful", "nonhateful", "nohate", "notoffensive"),
        *("nonoffensive", "notharmful", "nonharmful", "notunsafe", "notnsfw", "notabusive", "nonabusive"),
    }
)
"""Names of labels that mean safe, in lower case, letters only."""
_UNNAMED = re.compile(r"LABEL_\d+")
SETTING = "JOB_DATA__SAFETY_MODEL"
_LABELS = "JOB_DATA__UNSAFE_LABELS"
_SHOWN = 10
_BLOCK = 1 << 20
CHUNK = 256
"""Texts that are scored, and kept for a restart, together; they are batched by length within."""


def unsafe_labels(labels: Sequence[str], named: Sequence[str] | None, *, exclusive: bool) -> tuple[str, ...]:
    """The labels that mean unsafe, in the model's order.

    Args:
        labels: All labels of the model, in order.
        named: JOB_DATA__UNSAFE_LABELS; None: recognized by their names.
        exclusive: Whether a text has exactly one of the labels (softmax), so that one of them has to mean safe.

    Raises:
        SettingsError: The names do not say it, or are not the model's.
    """
    listed = ", ".join(labels[:_SHOWN]) + (", ..." if len(labels) > _SHOWN else "")
    if named is not None:
        if unknown := [name for name in named if name not in labels]:
            message = f"names {', '.join(unknown)}, and the labels of JOB_DATA__SAFETY_MODEL are {listed}"
            raise SettingsError([Problem(_LABELS, message)])
        unsafe = tuple(label for label in labels if label in named)
        if exclusive and len(unsafe) == len(labels):
            message = (
                "names all labels of JOB_DATA__SAFETY_MODEL, of which every text has one; leave out what means safe"
            )
            raise SettingsError([Problem(_LABELS, message)])
        return unsafe
    if any(map(_UNNAMED.fullmatch, labels)):
        message = (
            f"must be given: the labels of JOB_DATA__SAFETY_MODEL have no names ({listed}); its card says which of"
        )
        raise SettingsError([Problem(_LABELS, f"{message} them mean unsafe")])
    unsafe = tuple(label for label in labels if re.sub(r"[\W\d_]", "", label).casefold() not in SAFE_NAMES)
    if not unsafe or (exclusive and len(unsafe) == len(labels)):
        which = "unsafe" if not unsafe else "safe"
        message = (
            f"must be given: no label of JOB_DATA__SAFETY_MODEL ({listed}) has a name that is known to mean {which}"
        )
        raise SettingsError([Problem(_LABELS, message)])
    return unsafe


class Texts:
    """Texts in a temporary file without a name, so that those of a large data set take no memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when this object goes
        weakref.finalize(self, self._file.close)
        self._lengths = array("Q")

    def add(self, text: bytes) -> None:
        """Adds one, in UTF-8. Raises OSError if the disk is full or fails."""
        self._file.write(text)
        self._lengths.append(len(text))

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def sha256(self) -> str:
        """SHA-256 over all texts with their lengths, hexadecimal."""
        total = sha256(self._lengths.tobytes())
        self._file.seek(0)
        while data := self._file.read(_BLOCK):
            total.update(data)
        return total.hexdigest()

    @property
    def sizes(self) -> list[int]:
        """How many texts each of `chunks` has."""
        return [min(CHUNK, len(self) - start) for start in range(0, len(self), CHUNK)]

    def chunks(self) -> Iterator[list[str]]:
        """The texts in order, CHUNK of them at a time, fewer at the end."""
        self._file.seek(0)
        for start in range(0, len(self), CHUNK):
            yield [self._file.read(size).decode() for size in self._lengths[start : start + CHUNK]]


Screen = Callable[[Texts], list[float]]
"""Scores texts: the probability that each is unsafe."""
