"""Numbers, durations, sizes and lists as text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

_MINUS = "\N{MINUS SIGN}"


_TIMES = "\N{MULTIPLICATION SIGN}"


_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def enumeration(names: Sequence[str]) -> str:
    """`a, b and c`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def count(number: int, thing: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def at_least(number: int, *, exact: bool) -> str:
    """`7`, `at least 7`, or `unknown` where none is known and there may be some."""
    if exact:
        return f"{number:,}"
    return f"at least {number:,}" if number else "unknown"


def percent(fraction: float, digits: int = 2) -> str:
    """0.798 -> `79.80 %`, with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, with its sign: `+1.39`."""
    return f"{100 * difference:+.2f}".replace("-", _MINUS)


def p_value(p: float) -> str:
    """Three digits as long as they say something, then powers of ten."""
    if p >= 0.001:  # noqa: PLR2004 - three digits
        return f"{p:.3f}"
    mantissa, exponent = f"{p:.1e}".split("e")
    return f"{mantissa} {_TIMES} 10{str(int(exponent)).translate(_SUPERSCRIPTS)}" if p else "0"


def duration(seconds: float) -> str:
    """`12.3 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 59.95:  # noqa: PLR2004 - what rounds to a minute is one
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(number: float, space: str = "\N{NO-BREAK SPACE}") -> str:
    """Bytes in binary units; for a terminal with an ordinary `space`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((power for power in range(len(units) - 1) if number < 1024 ** (power + 1)), len(units) - 1)
    return f"{number / 1024**power:.{0 if power == 0 else 1}f}{space}{units[power]}"


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's text, in at most `most` characters; the name of its class if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:most]


def dollars(amount: float | None) -> str:
    """To the cent; a dash if unknown."""
    if amount is None:
        return "\N{EN DASH}"
    return f"{'-' if amount < 0 else ''}${abs(amount):,.2f}".replace("-", _MINUS)


def figure(number: float) -> str:
    """A number of any size in four digits: `0.0002`, `1.028`, `4,354`."""
    if number and not 1e-4 <= abs(number) < 1e6:  # noqa: PLR2004 - what four digits write plainly
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{float(mantissa):g} {_TIMES} 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", _MINUS)
    text = f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"  # noqa: PLR2004 - four digits
    return text.replace("-", _MINUS)


def timestamp(time: datetime | None = None, *, to: str = "milliseconds") -> str:
    """RFC 3339 in UTC, such as `2026-11-28T09:30:00.000Z`.

    Args:
        time: Now where it is None.
        to: To what it is exact, as `datetime.isoformat` takes it.
    """
    return (time or datetime.now(UTC)).isoformat(timespec=to).replace("+00:00", "Z")


def moment(time: str) -> str:
    """RFC 3339 to the second, as people write it, in UTC."""
    return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def between(finished: str | None, started: str) -> float | None:
    """Seconds from the end of one attempt to the start of the next; None if the end is unknown."""
    if finished is None:
        return None
    return max(0.0, (datetime.fromisoformat(started) - datetime.fromisoformat(finished)).total_seconds())
