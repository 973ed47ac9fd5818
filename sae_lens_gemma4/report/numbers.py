"""How a number is written, in one place, so that a table, a sentence and a plot never show one value in two ways.

Decimals shrink as a value grows, the minus sign is a true one, and `None` is said in words: a value that is not
defined must not read as a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

NOT_DEFINED = "not defined"
MINUS = "\u2212"
NBSP = "\u00a0"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float | None, places: int) -> str:
    """`value` with `places` decimals and thousands set apart; what rounds to zero has no sign."""
    if value is None:
        return NOT_DEFINED
    text = f"{value:,.{places}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", MINUS)


def real(value: float | None) -> str:
    """VE, loss and the like: 0.812, −1.470, −21.88, −1,008.4; below a thousandth, 3.1 × 10⁻⁷."""
    if value is None or value == 0:
        return fixed(value, 3)
    if abs(value) < 0.001:
        return scientific(value)
    return fixed(value, 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1)


def fixed3(value: float | None) -> str:
    """A cosine and the like: three decimals whatever its size."""
    return fixed(value, 3)


def ve(value: float | None) -> str:
    """Variance explained, as `real` but never in powers of ten: near zero it reads 0.000."""
    return fixed(value, 3) if value is not None and abs(value) < 1 else real(value)


def per_token(value: float | None) -> str:
    """A mean count per token, such as L0: one decimal."""
    return fixed(value, 1)


def count(value: int | None) -> str:
    return fixed(value, 0)


def percent(fraction: float | None) -> str:
    """A share as a percentage: 34.2 %, 0.25 %."""
    if fraction is None:
        return NOT_DEFINED
    return f"{fixed(100 * fraction, 1 if abs(fraction) >= 0.01 else 2)}{NBSP}%"


def top_percent(fraction: str) -> str:
    """The name of a top fraction, as it stands in a report's keys: "0.001" → "0.1 %"."""
    return f"{100 * float(fraction):g}{NBSP}%"


def top(fraction: str, n_tokens: int) -> str:
    """The name of a top fraction of so many tokens; where it is less than one, also what it then is:
    "0.1 % (1 token of 40)"."""
    name = top_percent(fraction)
    return name if float(fraction) * n_tokens >= 1 else f"{name} (1 token of {count(n_tokens)})"


def times(factor: str) -> str:
    """The name of a multiple of the median, as it stands in a report's keys: "5" → "5×"."""
    return f"{float(factor):g}×"


def ascending(keys: Iterable[str]) -> list[str]:
    """A report's number keys in the order of the numbers."""
    return sorted(keys, key=float)


def interval(bounds: Sequence[float | None] | None, write: Callable[[Any], str]) -> str:
    """Both ends as `write` writes them: [0.801, 0.823]."""
    return "[" + (NOT_DEFINED if bounds is None else ", ".join(write(end) for end in bounds)) + "]"


def signed(value: float | None, write: Callable[[Any], str]) -> str:
    """A difference: +0.012, −0.012; one that reads as zero has no sign."""
    text = write(value)
    return f"+{text}" if value is not None and value > 0 and any(c in text for c in "123456789") else text


def both(written: Sequence[tuple[str, str]]) -> str:
    """Values by state in a sentence: "0.194 before and 0.812 after"; of a state that stands alone, the value."""
    return " and ".join(f"{text} {state}" if state in ("before", "after") else text for state, text in written)


def scientific(value: float | None) -> str:
    """3.1 × 10⁻⁷; an exact zero is 0."""
    if value is None or value == 0:
        return NOT_DEFINED if value is None else "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.replace('-', MINUS)}{NBSP}×{NBSP}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def duration(seconds: float | None) -> str:
    """4.2 s, 150 s, 12 min 30 s."""
    if seconds is None:
        return NOT_DEFINED
    if seconds < 600:
        return f"{fixed(seconds, 1 if seconds < 100 else 0)}{NBSP}s"
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    return f"{minutes}{NBSP}min {rest}{NBSP}s"
