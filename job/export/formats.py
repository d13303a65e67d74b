"""The formats that a run can export: one table.

How to add a format:

1. Write `job/export/<name>.py` with a function that takes `ExportInputs` and writes one folder for each candidate (a
   way to make the format, such as the weights that the adapter is merged onto), and a function that names the
   candidates, which is called before training and refuses what cannot be exported, by a SettingsError.
2. Add it to `FORMATS`, and its name to `ExportFormats` in `job/settings/field_types.py` (a test compares the two), and
   to `JOB_GATE__ON` in `job/settings/schema.py`.
3. If transformers does not load such a folder by itself, say in `job/stages/export.py` how it is scored. What cannot be
   scored here must not be published as if it had been.

All else follows from the table: scoring, choice among the candidates, publication, manifest, report and `verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.export import merge


@dataclass(frozen=True)
class ExportInputs:
    """What formats are made from.

    Attributes:
        model: The PEFT model, with the published adapter loaded into it; it may be quantized.
        source: Folder of the base's own files.
        tokenizer: As it was loaded from there.
        candidates: Which to make, from `Format.candidates`.
        folder: Where each candidate gets a folder of its name.
        alive: Called before each tensor; may raise what ends the job.
    """

    model: Any
    source: Path
    tokenizer: Any
    candidates: tuple[str, ...]
    folder: Path
    alive: Callable[[], None]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        title: In words, for the report.
        candidates: (model, source, JOB_EXPORT__MERGE_ONTO) -> the candidates to make.
        make: Writes the candidates; returns their folders.
    """

    title: str
    candidates: Callable[[Any, Path, str], merge.Candidates]
    make: Callable[[ExportInputs], dict[str, Path]]


def _make_merged(inputs: ExportInputs) -> dict[str, Path]:
    plan = merge.plan_merge(inputs.model, inputs.source)
    folders = {name: inputs.folder / name for name in inputs.candidates}
    for name, folder in folders.items():
        merge.write_merged(inputs.model, plan, name, folder, tokenizer=inputs.tokenizer, alive=inputs.alive)
    return folders


FORMATS: Mapping[str, Format] = {
    "merged": Format(
        title="merged model",
        candidates=merge.candidates,
        make=_make_merged,
    ),
}
