"""What of the export's settings a model excludes, by its configuration alone: before its weights are fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from job.common.export_formats import derived, needs_merge
from job.errors import Problem
from job.export.formats import derived_format
from job.export.merge_plan import why_not_onto
from job.model.experts import can_quantize
from job.model.files import in_eight_bits


def export_problems(
    config: Any, empty: Any, *, formats: Sequence[str], onto: str, gate_format: str, nf4: bool, device: Any | None
) -> Iterator[Problem]:
    """Yields what cannot be exported as asked; the loaded model may show more, in `stages.export_check`.

    Args:
        config: The model's configuration, of transformers.
        empty: The model on the meta device.
        formats: `JOB_EXPORT__FORMATS`.
        onto: `JOB_EXPORT__MERGE_ONTO`.
        gate_format: `JOB_GATE__ON`.
        nf4: Whether `JOB_MODEL__QUANTIZATION` is `nf4`.
        device: Where the formats will be scored; None where that is not known.
    """
    if not needs_merge(formats):
        return
    published = getattr(config, "quantization_config", None) or {}
    if in_eight_bits(published):
        what = "cannot be made: the base is published in 8 bits; only 4-bit bases and unquantized ones can be merged"
        yield Problem("JOB_EXPORT__FORMATS", what)
    experts = nf4 and not published and can_quantize(empty)
    if why := why_not_onto(
        onto, published_quantized=bool(published), quantized=nf4 or bool(published), experts=experts
    ):
        yield Problem("JOB_EXPORT__MERGE_ONTO", why)
    yield from format_problems(empty, derived(formats), gate_format, device)


def file_problems(formats: Sequence[str], original: Path, check_stop: Callable[..., None]) -> Iterator[Problem]:
    """Yields which formats cannot be made of the base's own files, such as a tokenizer that llama.cpp does not know.

    Args:
        formats: `JOB_EXPORT__FORMATS`.
        original: Folder of the base's own files, with its weights.
        check_stop: Called while waiting; may raise what ends the job.

    Raises:
        DataError: The tokenizer cannot be loaded.
    """
    # Once for all types of a format.
    name_by_check = {derived_format(name)[0].check_files: name for name in derived(formats)}
    for check_files, name in name_by_check.items():
        if why := check_files(original, check_stop):
            yield Problem("JOB_EXPORT__FORMATS", f"{name} cannot be made: {why}; remove it")


def format_problems(empty: Any, names: Sequence[str], gate_format: str, device: Any | None) -> Iterator[Problem]:
    """Yields which of these formats cannot be made of a model without weights, or not judged on this device."""
    for name in names:
        export_format, kind = derived_format(name)
        if why := export_format.check(empty, kind):
            yield Problem("JOB_EXPORT__FORMATS", f"{name} cannot be made: {why}; leave it out")
        why = "" if device is None else export_format.cannot_score(device)
        if why and gate_format == name:
            yield Problem("JOB_GATE__ON", f"{name} cannot be scored here: {why}; set it to another format")
