"""The tokenizer's files of a base, which are published with the adapter as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from job.errors import DataError, Problem

TOKENIZER_FILES = (
    *("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "*.model"),
)
"""Names of files that make a tokenizer. All are of kinds that the quantized cache keeps beside the weights: a restart
publishes the same ones."""


def copy_tokenizer(base: Path, folder: Path, tokenizer: Any) -> None:
    """Copies the tokenizer's files of the base, byte for byte.

    transformers would save the tokenizer in the format of its own release, for example with the class
    `TokenizersBackend`, which older releases refuse. It does so where the vocabulary is in none of these files: those
    bases are old, and not cached.

    Args:
        base: Folder of the base; that of a quantized one has the same files as its source.
        folder: Is made where it does not exist.
        tokenizer: What was loaded from the base.

    Raises:
        DataError: As `tokenizer_files`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(base)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    if not any(path.name in {"tokenizer.json", "vocab.json"} or path.suffix == ".model" for path in files):
        tokenizer.save_pretrained(folder)


def tokenizer_files(base: Path) -> list[Path]:
    """The files of a base's folder that make its tokenizer, as far as they exist.

    Raises:
        DataError: One of them is a link to something outside of the folder: it would be published with the adapter.
    """
    found = sorted({path for kind in TOKENIZER_FILES for path in base.glob(kind) if path.is_file()})
    if outside := [path for path in found if not _belongs(path.resolve(), base.resolve())]:
        what = "is a link out of its folder, and would be published with the adapter; put the file itself there"
        raise DataError([Problem("JOB_MODEL__ID", f"{path} {what}") for path in outside])
    return found


def _belongs(file: Path, base: Path) -> bool:
    """Whether a file lies in the base's folder, or is a blob of the hub's cache, to which its folders link."""
    blobs = file.parent
    return file.is_relative_to(base) or (blobs.name == "blobs" and blobs.parent.name.startswith("models--"))
