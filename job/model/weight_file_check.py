"""Whether the files of a model's weights are whole, by their first bytes and their size; no weight is read."""

from __future__ import annotations

from pathlib import Path

from job.errors import DataError, Problem
from job.model.files import weight_files

_GIT_LFS = b"version https://git-lfs"


def check_weight_files(folder: Path) -> list[Path]:
    """The files that the weights are loaded from, each of which is named if it is cut, or not the file itself.

    Raises:
        DataError: As `weight_files`, or some of them are no whole safetensors files.
    """
    files = weight_files(folder)
    if problems := [Problem("JOB_MODEL__ID", f"{file} {what}") for file in files if (what := _what_is_wrong(file))]:
        raise DataError(problems)
    return files


def _what_is_wrong(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            if opened.read(len(_GIT_LFS)) == _GIT_LFS:
                return "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        with safe_open(file, framework="numpy"):  # compares the sizes in the header with that of the file
            return None
    except PermissionError as error:
        return f"cannot be read: {error.strerror}"
    except SafetensorError as error:
        return f"is no whole safetensors file ({file.stat().st_size:,} bytes: {str(error)[:200]}); fetch it again"
