"""Finds the data files at a path: one file, a glob, the shards of a split, or what `save_to_disk` wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job.common.formatting import count
from job.data.formats import MAX_ROW_BYTES, SUFFIXES, reader_of
from job.errors import DataError, Problem

_SHOWN_FILES = 5
_NO_FILE = "is not a regular file, but a folder, a pipe or a broken link; narrow the pattern"
_FEWEST_SHARDS = 2
_WILDCARDS = "*?["
_NUMBERED = re.compile(r"(.*?)(\d{2,}|(?:(?<=[-_])|^)\d)(\.[a-z.]+)")
"""The name of a shard. A digit alone has a hyphen or underscore in front: rows_v1 and rows_v2 are two versions."""
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)

_FOREIGN = {
    **dict.fromkeys(
        (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar"), "is an archive; unpack it and name the file in it"
    ),
    **dict.fromkeys((".parquet.gz", ".parquet.zst", ".arrow.gz", ".arrow.zst"), "cannot be read compressed; unpack it"),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".lz4"), "has an unsupported compression; unpack it, or use gzip or zstd"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet; save it as CSV (UTF-8)"),
    **dict.fromkeys((".feather",), "is a Feather file; write it as Parquet, or as Arrow with the suffix .arrow"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".npy"), "could run code when it is read, so it is refused; convert it to JSON lines"
    ),
}
"""Suffixes of common files that the job does not read, and what to do about each."""


def find_file(source: str) -> Path:
    """The data file at a path: the path itself, or the only data file directly inside a directory.

    Raises:
        DataError: Nothing is there, or the directory holds none or several, or the format is not known.
    """
    try:
        return _find_file(Path(source), source)
    except OSError as error:
        raise DataError([Problem(source, f"cannot be read: {error.strerror}")]) from error


def find_files(source: str, split: str) -> tuple[list[Path], bool]:
    """The data files at a path, in the order of their rows, and whether they were chosen by the split.

    - A glob, such as `rows/*.jsonl`: all files of that name, sorted. `**` is any number of folders.
    - A directory in the layout of a data set on the hub (`data/train-00000-of-00002.parquet`), as a clone of its
      repository has it: the shards of the split.
    - A folder written by `Dataset.save_to_disk`: its Arrow files; of a `DatasetDict`, those of the split.
    - A directory of numbered shards (`rows-00000.jsonl`, `rows-00001.jsonl`, ...): all of them.
    - Else one file, as `find_file` finds it.

    Raises:
        DataError: As `find_file`; a glob that fits nothing; or a shard is missing.
    """
    folder = Path(source)
    try:
        if is_glob(source) and not folder.exists():
            return _find_glob(source), False
        if not folder.is_dir():
            return [find_file(source)], False
        if shards := _find_shards(folder, source, split):
            return shards, True
        if (folder / "dataset_dict.json").is_file():
            return _saved_files(_saved_split(folder, source, split), source), True
        if (folder / "state.json").is_file():
            return _saved_files(folder, source), False
        return _numbered(folder) or [find_file(source)], False
    except OSError as error:
        raise DataError([Problem(source, f"cannot be read: {error.strerror}")]) from error


def is_glob(source: str) -> bool:
    """Whether a source has the wildcards of a glob in it: `*`, `?` or `[`."""
    return any(mark in source for mark in _WILDCARDS)


def fixed_part(pattern: str) -> str:
    """The folder of a glob above its first part with a wildcard, with a slash behind; a pattern without one itself."""
    if not is_glob(pattern):
        return pattern
    first = min(pattern.index(mark) for mark in _WILDCARDS if mark in pattern)
    return pattern[: pattern.rfind("/", 0, first) + 1]


def _find_glob(pattern: str) -> list[Path]:
    base = fixed_part(pattern)
    paths = sorted(Path(base or ".").glob(pattern.removeprefix(base)))
    # folders that a pattern such as `rows/*` fits are not meant, unless they are called as data files are
    files = [file for file in paths if file.name[0] != "." and (not file.is_dir() or reader_of(file))]
    if not files:
        raise DataError([Problem(pattern, "matches no file; correct the name or the wildcards")])
    what = f"ends in none of {', '.join(SUFFIXES)}; narrow the pattern"
    problems = [
        Problem(str(file), _foreign(file.name) or (what if reader_of(file) is None else _NO_FILE))
        for file in files
        if reader_of(file) is None or not file.is_file()
    ]
    if problems:
        raise DataError(problems)
    return files


def _numbered(folder: Path) -> list[Path]:
    """The files of a folder if they are shards: one name except for numbers from 0 or 1 without gaps, in their order.

    The numbers have one width, or no leading zeros.

    Raises:
        DataError: The folder has a further shard that cannot be read: a broken link, another compression, or not yet
            complete.
    """
    inside = sorted(file for file in folder.iterdir() if file.name[0] != ".")
    files = [file for file in inside if reader_of(file) and file.is_file()]
    parts = [_NUMBERED.fullmatch(file.name) for file in files]
    numbered = [part for part in parts if part]
    if (
        len(numbered) < _FEWEST_SHARDS
        or len(numbered) < len(files)
        or len({(part[1], part[3]) for part in numbered}) > 1
    ):
        return []
    if len({len(part[2]) for part in numbered}) > 1 and any(str(int(part[2])) != part[2] for part in numbered):
        return []
    by_number = sorted((int(part[2]), file) for part, file in zip(numbered, files, strict=True))
    numbers, files = [number for number, _ in by_number], [file for _, file in by_number]
    if numbers not in (list(range(len(files))), list(range(1, len(files) + 1))):
        return []
    _check_all_read(files, inside)
    return files


def _check_all_read(files: Sequence[Path], inside: Sequence[Path]) -> None:
    """Refuses a folder in which a data file, or a shard of the name of those found, is there but cannot be read."""
    name, _, suffix = match.groups() if (match := _NUMBERED.fullmatch(files[0].name)) else ("", "", "")
    like = re.compile(rf"{re.escape(name)}\d+{re.escape(suffix)}(\..*)?", re.DOTALL)
    if more := [file for file in inside if match and file not in files and like.fullmatch(file.name)]:
        what = (
            f"is next to {count(len(files), 'shard')} of its name and cannot be read as one of them; "
            "complete or remove it"
        )
        raise DataError([Problem(str(file), what) for file in more])
    if odd := [file for file in inside if reader_of(file) and not file.is_file() and not file.is_dir()]:
        raise DataError([Problem(str(file), "is a pipe or a broken link; complete or remove it") for file in odd])


def _saved_split(folder: Path, source: str, split: str) -> Path:
    """The folder of a split in one that `DatasetDict.save_to_disk` wrote."""
    splits = _json_object(folder / "dataset_dict.json", source).get("splits")
    names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
    if split not in names or not _PLAIN_NAME.fullmatch(split):
        have = ", ".join(map(ascii, names[:_SHOWN_FILES])) or "none"
        raise DataError([Problem(source, f"has no split {split!r} (JOB_DATA__SPLIT); it has {have}")])
    return folder / split


def _saved_files(folder: Path, source: str) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote, in the order of its rows."""
    listed = _json_object(folder / "state.json", source).get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    files = [folder / name for name in names if isinstance(name, str) and _PLAIN_NAME.fullmatch(name)]
    if not files or len(files) < len(names):
        raise DataError(
            [Problem(source, "has a state.json that names no files of the folder; save the data set again")]
        )
    if missing := [file.name for file in files if not file.is_file() or file.suffix != ".arrow"]:
        raise DataError([Problem(source, f"lacks {', '.join(missing[:_SHOWN_FILES])}, which its state.json lists")])
    return files


def _json_object(path: Path, source: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MAX_ROW_BYTES))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError([Problem(source, f"has a {path.name} that is not a JSON object; save the data set again")])
    return value


def _find_shards(folder: Path, source: str, split: str) -> list[Path]:
    """All shards of a split in the folder or its folder `data`; none where there are no files of such names."""
    shard = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})(-[0-9a-f]{{16}})?(\.[a-z.]+)")
    for shard_folder in (folder, folder / "data"):
        names = (
            [file.name for file in shard_folder.iterdir() if file.is_file() and reader_of(file)]
            if shard_folder.is_dir()
            else []
        )
        shards = sorted(filter(None, map(shard.fullmatch, names)), key=lambda match: match[1])
        if not shards:
            continue
        count = int(shards[0][2])
        if [int(match[1]) for match in shards] != list(range(count)) or any(int(match[2]) != count for match in shards):
            have = ", ".join(match[0] for match in shards[:_SHOWN_FILES])
            message = (
                f"has {len(shards)} of the {count} shards of split {split!r} ({have}); complete it, or name one file"
            )
            raise DataError([Problem(source, message)])
        return [shard_folder / match[0] for match in shards]
    return []


def _find_file(path: Path, source: str) -> Path:
    if path.is_dir():
        return _only_file(path, source)
    if not path.exists():
        below = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError([Problem(source, f"does not exist{below}; correct the path")])
    if not path.is_file():  # opening a FIFO would block forever
        raise DataError([Problem(source, "is not a regular file; name a file on the disk")])
    if (what := _foreign(path.name)) is not None:
        raise DataError([Problem(source, what)])
    if reader_of(path) is None:
        raise DataError([Problem(source, f"has an unknown format: its name must end in one of {', '.join(SUFFIXES)}")])
    return path


def _only_file(folder: Path, source: str) -> Path:
    inside = sorted(folder.iterdir())
    files = [file for file in inside if reader_of(file) and file.is_file() and file.name[0] != "."]
    if len(files) == 1:
        _check_all_read(files, [file for file in inside if file.name[0] != "."])
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:_SHOWN_FILES]) + ", ..." * (len(files) > _SHOWN_FILES)
        pattern = f"{source.rstrip('/')}/*{files[0].suffix}"
        content = f"{len(files)} data files, name one, or several by a glob such as {pattern}: {names}"
    else:
        content = f"no data file ({', '.join(SUFFIXES)})"
        deeper = (file for below in inside if below.is_dir() for file in sorted(below.iterdir()) if reader_of(file))
        other = (f"{file.name} {words}" for file in inside if (words := _foreign(file.name)))
        if (hint := next(deeper, None)) is not None:
            content += f"; {hint.relative_to(folder)} is one; name it"
        elif (unread := next(other, None)) is not None:
            content += f"; {unread}"
    raise DataError([Problem(source, f"is a directory that holds {content}")])


def _foreign(name: str) -> str | None:
    """What to do about a file that is not read here, by its name."""
    if reader_of(Path(name)) is not None:
        return None
    return next((what for suffix, what in _FOREIGN.items() if name.lower().endswith(suffix)), None)


def has_known_suffix(source: str) -> bool:
    """Whether the name is that of a data file, also of a format that is not supported."""
    return reader_of(Path(source)) is not None or _foreign(source) is not None
