"""Statistics of the rows: their languages, and quantiles of the examples' lengths."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec

from job.common.findings import UNKNOWN_LANGUAGE

PACKAGE, MODULE = "pycld2", "pycld2"
_NOT_TEXT = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010fffd]")
"""Characters that CLD2 refuses: control characters, surrogates and Unicode's noncharacters."""
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
    """Name and version of the language detector; None if it is not installed."""
    return None if find_spec(MODULE) is None else f"{PACKAGE} {metadata.version(PACKAGE)}"


def language_finder() -> Callable[[str], str]:
    """A function from a text to CLD2's code of its language, mostly ISO 639-1, such as `en` or `zh-Hant`.

    CLD2 needs no network and is deterministic. If it reports that it is not sure, as of a few words, lists of names,
    code or numbers, the language is UNKNOWN_LANGUAGE.
    """
    cld2 = import_module(MODULE)

    def find(text: str) -> str:
        try:
            sure, _, languages = cld2.detect(_NOT_TEXT.sub(" ", text), isPlainText=True)
        except (cld2.error, UnicodeEncodeError):
            return UNKNOWN_LANGUAGE
        return str(languages[0][1]) if sure and languages[0][1] != "un" else UNKNOWN_LANGUAGE

    return find


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """The QUANTILES of the values by nearest rank, so that each is one of the values; empty if there are none."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {name: ordered[max(1, math.ceil(share * len(ordered))) - 1] for name, share in QUANTILES.items()}
