"""Numbers as a person reads them: units, three significant digits, and NaN and infinity by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

SPACE: Final = "\u00a0"
"""Between a number and its unit: they stay on one line."""
MINUS: Final = "\u2212"
DIGEST_CHARACTERS: Final = 12
_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BYTE_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS: Final = ("", "K", "M", "B", "T")


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits; powers of ten below a thousandth and from a million on."""
    if not math.isfinite(value):
        return _named(value)
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if not -3 <= power < 6:
        return f"{mantissa}{SPACE}×{SPACE}10{str(power).translate(_SUPERSCRIPTS)}".replace("-", MINUS)
    return f"{value:,.{max(digits - 1 - power, 0)}f}".replace("-", MINUS)


def percent(share: float, decimals: int = 1) -> str:
    """A share as a percentage."""
    return f"{share * 100:.{decimals}f}{SPACE}%".replace("-", MINUS) if math.isfinite(share) else _named(share)


def change(before: float, after: float) -> str:
    """By how much `after` differs from `before`, signed, as a percentage."""
    share = after / before - 1 if before else math.nan
    if not math.isfinite(share):
        return _named(share)
    text = f"{share * 100:+.1f}{SPACE}%".replace("-", MINUS)
    return text if text[1:] != f"0.0{SPACE}%" else f"±0.0{SPACE}%"


def times(factor: float) -> str:
    """A factor such as a speedup."""
    return f"{factor:.2f}×" if math.isfinite(factor) else _named(factor)


def milliseconds(value: float) -> str:
    """A time given in ms."""
    return f"{number(value / 1000)}{SPACE}s" if 10_000 <= value < math.inf else f"{number(value)}{SPACE}ms"


def byte_size(value: float) -> str:
    """Bytes in decimal units."""
    return _scaled(value, _BYTE_UNITS)


def compact(value: float) -> str:
    """A large count: 10.2 M, 70.6 B."""
    return _scaled(value, _COUNT_UNITS).rstrip()


def count(value: int) -> str:
    """Every digit of a count."""
    return f"{value:,}"


def short_digest(digest: str) -> str:
    """The beginning of a digest."""
    return digest[:DIGEST_CHARACTERS] + "…" if len(digest) > DIGEST_CHARACTERS else digest


def _scaled(value: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return _named(value)
    position = 0
    # 999.5 would be rounded to four digits: it belongs to the next unit.
    while abs(value) >= 999.5 and position < len(units) - 1:
        value, position = value / 1000, position + 1
    return f"{number(value) if position else format(value, 'g')}{SPACE}{units[position]}"


def _named(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "∞" if value > 0 else f"{MINUS}∞"


def altered(names: Sequence[str]) -> str | None:
    """The warning that records were changed after they were written; None where none were."""
    if not names:
        return None
    verb = "is" if len(names) == 1 else "are"
    return (
        f"{', '.join(names)} {verb} not what was written with the rest: what this page takes from there was changed "
        "or put there afterwards. Run the stage again."
    )
