"""The base's tokenizer files, which are published with the adapter, unchanged except for new tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.errors import DataError, Problem, SettingsError

TOKENIZER_FILES = (
    *("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "*.model"),
)
"""Names of files that make a tokenizer. All are of kinds that the quantized cache keeps next to the weights: a restart
publishes the same ones."""


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Adds new tokens to a tokenizer, in place: each is matched in a text exactly as spelled, and becomes one id.

    Raises:
        SettingsError: It has one of them already, or cuts one apart nevertheless.
    """
    from tokenizers import AddedToken

    where, vocabulary = "JOB_MODEL__ADD_TOKENS", tokenizer.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        raise SettingsError([Problem(where, f"{', '.join(known)}: the model's tokenizer has it already; remove it")])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in tokens}
    if cut := [token for token, encoded in ids.items() if encoded != [tokenizer.convert_tokens_to_ids(token)]]:
        what = f"{', '.join(cut)}: the tokenizer splits it into several tokens, like text; choose another spelling"
        raise SettingsError([Problem(where, what)])


def rows_with(vocabulary: int | None, tokenizer: Any, added_tokens: Sequence[str] | None) -> int | None:
    """Rows of the embedding once there is room for the new tokens.

    Those of a tokenizer that has more tokens than the base anyway, which is another model's, are unchanged: its rows
    of data are refused.

    Args:
        vocabulary: Rows in the base; None if that is not known.
        tokenizer: With the new tokens; None if it is not known.
        added_tokens: The new tokens.
    """
    if vocabulary is None or tokenizer is None or not added_tokens:
        return vocabulary
    fits = len(tokenizer) - len(added_tokens) <= vocabulary
    return max(vocabulary, len(tokenizer)) if fits else vocabulary


def copy_tokenizer(base: Path, folder: Path, tokenizer: Any, added_tokens: Sequence[str] | None = None) -> None:
    """Copies the tokenizer's files of the base, byte for byte; new tokens are written into the copies.

    transformers would save the tokenizer in the format of its own release, for example with the class
    `TokenizersBackend`, which older releases refuse. It does so where the vocabulary is in none of these files: those
    bases are old, and not cached.

    Args:
        base: Folder of the base; that of a quantized one has the same files as its source.
        folder: Is made where it does not exist.
        tokenizer: What was loaded from the base, with the new tokens.
        added_tokens: The new tokens.

    Raises:
        DataError: As `tokenizer_files`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(base)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    if not any(path.name in {"tokenizer.json", "vocab.json"} or path.suffix == ".model" for path in files):
        tokenizer.save_pretrained(folder)
    elif added_tokens:
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in added_tokens}
        if not _write_tokens(folder, ids):
            tokenizer.save_pretrained(folder)


def _write_tokens(folder: Path, ids: Mapping[str, int]) -> bool:
    """Writes new tokens into a tokenizer's files; whether they are found where it is loaded again."""
    from transformers import AutoTokenizer

    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer_file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not tokenizer_file.is_file():
        return False
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    tokenizer["added_tokens"] += [{"id": number, "content": token, **flags} for token, number in ids.items()]
    tokenizer_file.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if config.is_file() and "added_tokens_decoder" in (said := json.loads(config.read_text(encoding="utf-8"))):
        said["added_tokens_decoder"] |= {str(number): {"content": token, **flags} for token, number in ids.items()}
        config.write_text(json.dumps(said, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return all(loaded.encode(token, add_special_tokens=False) == [number] for token, number in ids.items())


def tokenizer_files(base: Path) -> list[Path]:
    """The files of a base's folder that make its tokenizer, as far as they exist.

    Raises:
        DataError: One of them is a link to something outside of the folder: it would be published with the adapter.
    """
    paths = sorted({path for kind in TOKENIZER_FILES for path in base.glob(kind) if path.is_file()})
    if outside := [path for path in paths if not _belongs(path.resolve(), base.resolve())]:
        what = "is a link out of its folder, and would be published with the adapter; replace it by the file itself"
        raise DataError([Problem("JOB_MODEL__ID", f"{path} {what}") for path in outside])
    return paths


def _belongs(file: Path, base: Path) -> bool:
    """Whether a file is in the base's folder, or is a blob of the hub's cache, to which its folders link."""
    blobs = file.parent
    return file.is_relative_to(base) or (blobs.name == "blobs" and blobs.parent.name.startswith("models--"))
