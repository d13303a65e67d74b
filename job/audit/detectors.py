"""How secrets and personal data are found in the text of one row. Says only whether a row has any, never what it is.

To add a kind: name it in `job/common/findings.py` and enter a `Detector` in `DETECTORS` here. Its `make` returns a
function from text to whether the text has a finding, and may import a library that `needs` names: where the library is
not installed, the kind is reported as not checked. Test it with a planted text in tests/unit/audit/.

Names of people are not looked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

Detect = Callable[[str], bool]


@dataclass(frozen=True)
class Detector:
    """One kind of finding: `make` builds the test, with the distribution `needs` and its `module`, if it needs one."""

    make: Callable[[], Detect]
    needs: str | None = None
    module: str | None = None

    @property
    def version(self) -> str | None:
        """What checks, with its version, such as `python-stdnum 2.2`; None where it is not installed."""
        if self.needs is None:
            return "this project"
        if self.module is None or find_spec(self.module) is None:
            return None
        return f"{self.needs} {metadata.version(self.needs)}"


_NO_SECRETS = {"Public IP (ipv4)"}
"""Detectors of detect-secrets that find no secrets."""


def _secrets() -> Detect:
    """The patterns of detect-secrets for keys and tokens of known services, private keys and passwords in URLs.

    Without its entropy and keyword detectors, which are for source code: in prose they find mostly what is no secret.
    """
    plugins = import_module("detect_secrets.plugins")
    base = import_module("detect_secrets.plugins.base").RegexBasedDetector
    searches = []
    for module in iter_modules(plugins.__path__):
        for kind in vars(import_module(f"detect_secrets.plugins.{module.name}")).values():
            concrete = isinstance(kind, type) and issubclass(kind, base) and not getattr(kind, "__abstractmethods__", 0)
            if concrete and kind.secret_type not in _NO_SECRETS:
                searches += [pattern.search for pattern in kind.denylist]

    def test(text: str) -> bool:
        return any(search(text) for search in searches)

    return test


_EMAIL = re.compile(
    r"([\w.+-]{1,64})@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24})(?![\w-])"
)
_NOBODYS_DOMAIN = re.compile(
    r"(?:.*\.)?(?:example|test|invalid|localhost)"
    r"|(?:.*\.)?(?:example|(?:your|my|some)-?(?:company|domain|site|website|provider))\.(?:[a-z]{2,3}\.)?[a-z]{2,24}",
    re.IGNORECASE,
)
"""Domains that are examples: what RFC 2606 and 6761 reserve, `example` below any suffix, `yourcompany.com`."""
_NOBODYS_NAME = re.compile(
    r"(?:example|user(?:[._-]?name)?|e?mail|someone|somebody|nobody|first[._-]?name[._-]last[._-]?name|foo|bar)\d{0,3}"
    r"|(?:your|my|some)(?:[._-]?(?:e?mail|gmail|name|user(?:[._-]?name)?|address|account|id))+\d{0,3}"
    r"|(?:j|john|jane)[._-]?doe\d{0,3}",
    re.IGNORECASE,
)
"""Local parts (before the @) of placeholder addresses: `username`, `your_email`, `user123`, John and Jane Doe."""
_ONE_CHARACTER = re.compile(r".@[A-Za-z0-9]\.[A-Za-z]{2,24}")


def _emails() -> Detect:
    """Addresses that may belong to a person.

    Not those whose domain is an example, whose local part is a placeholder, or whose name and domain are one
    character each (`a@b.co`). Whether the person behind another address is an invented one cannot be seen.
    """

    def owned(match: re.Match[str]) -> bool:
        nobody = _NOBODYS_DOMAIN.fullmatch(match[2]) or _NOBODYS_NAME.fullmatch(match[1])
        return not (nobody or _ONE_CHARACTER.fullmatch(match[0]))

    return lambda text: "@" in text and any(map(owned, _EMAIL.finditer(text)))


_DIGITS = re.compile(r"\d[\d\s()./-]{6,}\d")
"""What any phone number has in it, to ask the library about few texts."""
_NOBODYS_NUMBER = re.compile(
    # United States and Canada: lines of exchange 555 belong to no subscriber (NANPA).
    r"1\d{3}555\d{4}"
    # United Kingdom: Ofcom's numbers for drama.
    r"|44(?:11[3-8]4960|1[2-6]14960|1914980|2079460|2896496|2920180|1632960|7700900|8081570|9098790|3069990)\d{3}"
    # Australia: ACMA's numbers for fiction.
    r"|61(?:[2378](?:5550|7010)\d{4}|491570(?:006|156|157|158|159|110|313|737))"
)
"""Country code and number of what is reserved for examples and fiction."""
_COUNTING = "1234567890" * 2


def _phones() -> Detect:
    """Valid numbers in international form, and of North America in national form, where the text has punctuation.

    Not those that are reserved for fiction, nor ten digits that count upwards: (234) 567-8901.
    """
    phones = import_module("phonenumbers")
    strict = phones.Leniency.STRICT_GROUPING

    def owned(match: Any) -> bool:
        digits = phones.national_significant_number(match.number)
        return not (_NOBODYS_NUMBER.fullmatch(f"{match.number.country_code}{digits}") or digits in _COUNTING)

    def test(text: str) -> bool:
        if _DIGITS.search(text) is None:
            return False
        return any(
            ("+" in match.raw_string or not match.raw_string.isdigit()) and owned(match)
            for match in phones.PhoneNumberMatcher(text, "US", leniency=strict)
        )

    return test


_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")


def _ibans() -> Detect:
    valid = import_module("stdnum.iban").is_valid

    def test(text: str) -> bool:
        return any(valid(part) for match in _IBAN.finditer(text) for part in _shorter(match[0]))

    return test


def _shorter(text: str) -> list[str]:
    """The text, and the text without its last words in capitals, which may follow a number."""
    words = text.split(" ")
    return [" ".join(words[:count]) for count in range(len(words), 0, -1)]


_CARD = re.compile(r"(?<![\w.,-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3\d{3}([ -]?)\d{6}\2\d{5})(?![\w-]|[.,]\d)")
"""16 digits in fours, or 15 as American Express writes them."""
_ISSUERS = re.compile(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|5|4[4-9]|2)")
_FEWEST_DIGITS = 3


def _cards() -> Detect:
    valid = import_module("stdnum.luhn").is_valid

    def test(text: str) -> bool:
        for match in _CARD.finditer(text):
            digits = re.sub(r"\D", "", match[0])
            if _ISSUERS.match(digits) and len(set(digits)) >= _FEWEST_DIGITS and valid(digits):
                return True
        return False

    return test


DETECTORS: Mapping[str, Detector] = {
    "secret": Detector(_secrets, "detect-secrets", "detect_secrets"),
    "email": Detector(_emails),
    "phone": Detector(_phones, "phonenumberslite", "phonenumbers"),
    "iban": Detector(_ibans, "python-stdnum", "stdnum"),
    "card": Detector(_cards, "python-stdnum", "stdnum"),
}
"""Kinds that are found in one row alone -> how. The order is that of the table in the report."""
