"""What may stand in a column of Neuronpedia's database: values as PostgreSQL takes them, or a reason why not.

One bad cell fails the whole file in the import, 10,000 rows or more, without saying which. So each is held to its
column's type before it is written. Nothing is guessed: what is no number is refused, and only texts that no database
can hold get stand-ins that are seen, those of `interp.pieces`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.pieces import safe_piece

Cell = Callable[[Any], Any]
"""From a value of a dashboard to one of a column; raises ValueError with the reason."""


def put(where: str, name: str, kind: Cell, value: Any) -> Any:
    """The value as its column takes it.

    Raises:
        DataError: it is none; names the place and the column.
    """
    try:
        return kind(value)
    except ValueError as e:
        raise DataError(f"{where}: {name} {e}.") from None


def line(row: dict[str, Any]) -> bytes:
    """A row as the import reads it.

    The import makes a space of each `\\u0000` in a file before it reads any JSON, so the six characters themselves,
    say in a label about escapes, would break the line: their backslash is written as an escape of its own.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("\\\\u0000", "\\u005cu0000").encode() + b"\n"


def tokens(value: Any) -> list[str]:
    """Of a column of texts: a list of tokens, none of them empty."""
    if value is None:
        return []
    if type(value) is not list or set(map(type, value)) - {str}:
        raise ValueError("is no list of texts")
    whole = "".join(value)
    if "" in value or "\0" in whole or not _is_unicode(whole):
        return [safe_piece(token) for token in value]
    return value


def floats(value: Any) -> list[float]:
    """Of a column of floats."""
    if value is None:
        return []
    if type(value) is not list:
        raise ValueError("is no list of numbers")
    if set(map(type, value)) - {int, float} or not _is_finite(value):
        for one in value:
            number(one, "holds")
    return value


def integers(value: Any) -> list[int]:
    """Of a column of 32-bit integers."""
    return [integer(one, "holds") for one in floats(value)]


def number(value: Any, verb: str = "is") -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{verb} {str(value)[:40]}, which is no finite number")
    found: float = value
    return found


def integer(value: Any, verb: str = "is") -> int:
    if number(value, verb) != (whole := int(value)) or abs(whole) >= 2**31:
        raise ValueError(f"{verb} {value}, which is no integer of 32 bits")
    return whole


def perhaps(kind: Cell) -> Cell:
    """Of a column that may be empty."""
    return lambda value: None if value is None else kind(value)


def text(value: Any) -> str:
    """Of a column of text; what is no text already is written as JSON."""
    written = value if isinstance(value, str) else json.dumps(value)
    return written.replace("\0", "<0x00>").encode("utf-8", "backslashreplace").decode()


def _is_finite(values: list[float]) -> bool:
    try:
        return math.isfinite(sum(values))
    except OverflowError:
        return False


def _is_unicode(whole: str) -> bool:
    try:
        whole.encode()
    except UnicodeEncodeError:
        return False
    return True
