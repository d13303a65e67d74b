"""What kind of text the rows are: the language of each, and how long the examples are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec

from job.common.findings import UNKNOWN_LANGUAGE

PACKAGE, MODULE = "pycld2", "pycld2"
_NOT_TEXT = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010fffd]")
"""What CLD2 refuses: control characters, surrogates and characters that Unicode reserves for no text."""
QUANTILES: Mapping[str, float] = {
    "min": 0,
    "p5": 0.05,
    "p25": 0.25,
    "median": 0.5,
    "p75": 0.75,
    "p95": 0.95,
    "p99": 0.99,
    "max": 1,
}


def language_checker() -> str | None:
    """What finds out languages, with its version; None where it is not installed."""
    return None if find_spec(MODULE) is None else f"{PACKAGE} {metadata.version(PACKAGE)}"


def language_finder() -> Callable[[str], str]:
    """From a text to the code of its language as CLD2 has it, mostly ISO 639-1, such as `en` or `zh-Hant`.

    CLD2 has its tables in the package, needs no network, and gives the same answer always. It says whether it is sure;
    a text of a few words, a list of names, code or numbers is UNKNOWN_LANGUAGE.
    """
    cld2 = import_module(MODULE)

    def find(text: str) -> str:
        try:
            sure, _, found = cld2.detect(_NOT_TEXT.sub(" ", text), isPlainText=True)
        except (cld2.error, UnicodeEncodeError):
            return UNKNOWN_LANGUAGE
        return str(found[0][1]) if sure and found[0][1] != "un" else UNKNOWN_LANGUAGE

    return find


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """The QUANTILES of the values, each one of them (nearest rank); none of no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {name: ordered[max(1, math.ceil(share * len(ordered))) - 1] for name, share in QUANTILES.items()}
