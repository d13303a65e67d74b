"""Truncated weight files, and git-lfs pointers, are named before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import DataError
from job.model.weight_file_check import check_weight_files


def cut_header(file: Path) -> None:
    """An unfinished download: less than the header."""
    file.write_bytes(file.read_bytes()[:100])


def cut_end(file: Path) -> None:
    """An unfinished download: the header is there, its weights are not."""
    file.write_bytes(file.read_bytes()[:-1])


def pointer(file: Path) -> None:
    """What git leaves without git-lfs."""
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (cut_header, r"is no whole safetensors file \(100 bytes: .*\); fetch it again"),
        (cut_end, r"is no whole safetensors file .*; fetch it again"),
        (pointer, "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"),
    ],
)
def test_a_file_that_is_not_whole_is_named(
    base_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], what: str
) -> None:
    """With the setting, the file and what to do."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    assert check_weight_files(folder) == [folder / "model.safetensors"]
    spoil(folder / "model.safetensors")
    with pytest.raises(DataError, match=f"JOB_MODEL__ID: {folder}/model.safetensors {what}"):
        check_weight_files(folder)
