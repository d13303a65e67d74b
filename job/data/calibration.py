"""The rows of the training data that weights are quantized with: the first ones of the batch plan, as trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from job.data.batch_plan import epoch_order
from job.records import CalibrationRecord, Example


def calibration_rows(seed: int, rows: int, count: int) -> tuple[int, ...]:
    """The positions of the first `count` examples that training sees; all of them if there are fewer."""
    return epoch_order(seed, rows, 0)[:count]


def hash_rows(rows: Sequence[int]) -> str:
    """SHA-256 of the positions, in their order."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def calibration_examples(
    examples: Sequence[Example], seed: int, count: int
) -> tuple[list[tuple[int, ...]], CalibrationRecord]:
    """Token ids of the calibration rows, and what the manifest says of them.

    Of an example of two sequences it is the first: the chosen answer of a pair, the answer that has a label.
    """
    rows = calibration_rows(seed, len(examples), count)
    tokens = [examples[row].sequences[0].input_ids for row in rows]
    total = hashlib.sha256()
    for one in tokens:
        total.update(json.dumps(list(one)).encode() + b"\n")
    return tokens, CalibrationRecord(len(rows), sum(map(len, tokens)), hash_rows(rows), total.hexdigest())
