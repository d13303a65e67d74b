"""The formats that are made from the merged model: one table.

How to add a format:

1. Write `job/export/<name>.py` with a function that makes it from the merged model's folder (`make`), and one that
   refuses before training what it cannot make (`check`).
2. Add it to `DERIVED`, and to `EXPORT_FORMATS` in `job/common/export_formats.py` (a test compares the two). A format
   with types, such as `gguf:q4_k_m`, has one entry in each; its functions get the type.
3. If transformers cannot load such a folder, write a `load` for it. What cannot be scored on a machine
   is named by `cannot_score`: the format is published as not scored, and the gate cannot judge it.

All else follows from the table: calibration rows, scoring, publication, manifest, report and `verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from job.common.export_formats import split_name
from job.export import fp8, gguf
from job.export.autoround import (
    AWQ,
    COMPRESSED,
    GPTQ,
    cannot_score_awq,
    check_four_bit,
    load_gptq,
    make_four_bit,
)
from job.export.exported_model import ExportedModel, ScoringOptions, load_exported, load_quantized
from job.records import QuantizationRecord


@dataclass(frozen=True)
class DerivedInputs:
    """What a format is made from.

    Attributes:
        merged: Folder of the merged model, as published or publishable, with tokenizer.
        kind: The requested type of the format, such as `q4_k_m`; empty if it has none.
        folder: To be made, for the files of the format and nothing else.
        work: To be made, for temporary files; it is removed by the caller.
        calibration: Token ids of the calibration rows, as in training.
        device: Where it may compute.
        seed: JOB_RUN__SEED.
        check_stop: Called often, at most seconds apart; may raise what ends the job. With `progress=False`, the caller
            only waits: nothing is reported to the watchdog.
        steps: JOB_EXPORT__QUANTIZATION_STEPS.
    """

    merged: Path
    kind: str
    folder: Path
    work: Path
    calibration: Sequence[Sequence[int]]
    device: torch.device
    seed: int
    check_stop: Callable[..., None]
    steps: int = 200


@dataclass(frozen=True)
class Format:
    """A format that is made from the merged model.

    Attributes:
        make: Writes the files; twice from the same inputs on the same machine, the same bytes. Returns what the
            manifest says of them. Raises CannotMake if it turns out to be impossible.
        check: (empty model of the base's architecture, type) -> why it cannot be made, in words, or nothing. Called
            before training; "empty" is on the device `meta`.
        cannot_score: Why it cannot be scored on such a device, in words; empty if it can.
        load: Loads it to be scored.
        check_files: (folder of the base's own files, `check_stop`) -> why it cannot be made of them; as `check`.
    """

    make: Callable[[DerivedInputs], QuantizationRecord]
    check: Callable[[Any, str], str]
    cannot_score: Callable[[torch.device], str] = lambda _device: ""
    load: Callable[[Path, ScoringOptions], ExportedModel] = load_exported
    check_files: Callable[[Path, Callable[..., None]], str] = lambda _source, _check_stop: ""


DERIVED: Mapping[str, Format] = {
    "fp8": Format(make=fp8.make_fp8, check=fp8.check_fp8, load=load_quantized),
    "w4a16": Format(make=partial(make_four_bit, COMPRESSED), check=check_four_bit, load=load_quantized),
    "gptq": Format(make=partial(make_four_bit, GPTQ), check=check_four_bit, load=load_gptq),
    "awq": Format(
        make=partial(make_four_bit, AWQ), check=check_four_bit, load=load_quantized, cannot_score=cannot_score_awq
    ),
    "gguf": Format(
        make=gguf.make_gguf, check=lambda _empty, _kind: "", load=gguf.load_scored, check_files=gguf.check_gguf
    ),
}
"""By the name before the colon."""


def derived_format(name: str) -> tuple[Format, str]:
    """The format of a name, and its type.

    Raises:
        ValueError, KeyError: There is none.
    """
    family, kind = split_name(name)
    return DERIVED[family], kind
