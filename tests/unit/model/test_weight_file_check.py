"""Truncated weight files, and git-lfs pointers, are named before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_every_file_of_a_model_in_parts_is_checked(base_folder: Path, tmp_path: Path) -> None:
    """All that are not whole are named in one error: each would be another download and another start."""
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    files = [Path(shutil.copy(base_folder / "model.safetensors", tmp_path / name)) for name in names]
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("abc", names, strict=True))})
    )
    assert check_weight_files(tmp_path) == files
    cut_end(files[1])
    pointer(files[2])
    with pytest.raises(DataError) as error:
        check_weight_files(tmp_path)
    cut, replaced = (problem.what for problem in error.value.problems)
    assert cut.startswith(f"{files[1]} is no whole safetensors file")
    assert replaced.startswith(f"{files[2]} is a git-lfs pointer")


def test_a_file_that_may_not_be_read(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named with the system's words, and not as one to fetch again (root reads any file: the answer is faked)."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read: Permission denied$"):
        check_weight_files(base_folder)
