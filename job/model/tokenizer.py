"""Loads the tokenizer, and compares it with the file that the model came with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from job import log
from job.errors import DataError, Problem, SettingsError
from job.model.files import (
    MAX_CONFIG_BYTES,
    check_numbers,
    check_sizes,
    read_json,
    readable,
)
from job.model.tokenizer_files import add_tokens

_PROBES = ("It's one of two words,  said 2023 men.\n", "\tx = 650841823", "un caf\u00e9 \u4e2d\u6587")
"""Texts on which tokenizers are compared: words, several spaces, digits, other scripts."""


def load_tokenizer(folder: Path, added_tokens: Sequence[str] | None = None) -> Any:
    """The tokenizer in the model's folder, with new tokens. It never runs code of the model's repository.

    Raises:
        DataError: It cannot be loaded, or the config.json next to it is broken.
        SettingsError: It has no end-of-sequence token, or a new token is none.
    """
    from transformers import AutoTokenizer

    if (folder / "config.json").is_file():  # it says which class the tokenizer is of, and transformers reads all of it
        check_numbers(folder, read_json(folder / "config.json", MAX_CONFIG_BYTES))
    check_sizes(folder)
    with readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _check_against_file(folder, tokenizer)
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            [
                Problem(
                    "JOB_MODEL__ID", "its tokenizer has no end-of-sequence token, so the model could not learn to stop"
                )
            ]
        )
    if _is_invented(folder, str(tokenizer.eos_token)):
        log.get_logger().warning(
            "the tokenizer's end-of-sequence token is not in its vocabulary: it was added with a new id, for which the"
            " model has no trained embedding; correct eos_token in tokenizer_config.json",
            token=tokenizer.eos_token,
            id=tokenizer.eos_token_id,
        )
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):  # tokens drawn again in every attempt would be other data each time
        log.get_logger().warning(
            "the tokenizer's dropout is switched off, so that a text always gives the same tokens", was=model.dropout
        )
        model.dropout = None
    add_tokens(tokenizer, added_tokens or ())
    return tokenizer


def _check_against_file(folder: Path, tokenizer: Any) -> None:
    """Compares the tokens of a few texts with those that the model's tokenizer.json gives.

    Transformers 5 rebuilds the tokenizers of some classes from the file's vocabulary, by the rules of the class. If
    the file has other rules, words are split otherwise than the model learned them, or spaces vanish
    (huggingface/transformers#45488 and #45920). tokenizer_config.json or the architecture names the class.

    Raises:
        DataError: Text that the file's tokenizer keeps is lost.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file, backend = folder / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is None or type(tokenizer) is PreTrainedTokenizerFast or not file.is_file()
    ):  # that class takes it as it is
        return
    from_file = Tokenizer.from_file(str(file))
    from_file.no_truncation()
    from_file.no_padding()
    kind = type(tokenizer).__name__
    for text in _PROBES:
        tokens, expected = (one.encode(text, add_special_tokens=False).ids for one in (backend, from_file))
        if tokens == expected:
            continue
        if from_file.decode(expected).strip() == text.strip() != backend.decode(tokens).strip():
            what = (
                f"is ignored by this version of transformers: its class {kind} gives {backend.decode(tokens)!r} of"
                f" {text!r}, and the model would learn that; give a base whose tokenizer fits its class"
            )
            raise DataError([Problem(str(file), what)])
        log.get_logger().warning(
            "the tokenizer splits text differently from the model's tokenizer.json: its class has additional rules",
            tokenizer_class=kind,
            text=text,
            tokens=tokens,
            tokens_of_file=expected,
        )
        return


def _is_invented(folder: Path, token: str) -> bool:
    """Whether none of the tokenizer's files but the name of the special token has this token; transformers adds it."""
    if not (folder / "tokenizer.json").is_file():
        return False
    files = [folder / name for name in ("tokenizer.json", "added_tokens.json")]
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    settings = folder / "tokenizer_config.json"
    added = read_json(settings, MAX_CONFIG_BYTES).get("added_tokens_decoder") if settings.is_file() else None
    text += json.dumps(added, ensure_ascii=False)
    return not any(json.dumps(token, ensure_ascii=escaped) in text for escaped in (True, False))
