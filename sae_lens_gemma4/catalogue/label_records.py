"""What is said of a feature, and how a record that says it is read: the one schema that all parsers and writers share.

Values are checked as they are taken, so that an error names the file and the record; what a parser does not take
stays among the label's facts, unchanged.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sae_lens_gemma4.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text on which a feature fires. `tokens` and `activations`, where both are stated, are of one length."""

    text: str | None = None
    """What is around the token that fires most."""
    token: str | None = None
    activation: float | None = None
    """At that token, as the author's SAE computed it."""
    token_index: int | None = None
    """Where that token is, counted as the author counts."""
    tokens: tuple[str, ...] | None = None
    activations: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureLabel:
    """What a release states of one feature."""

    index: int
    label: str | None = None
    description: str | None = None
    category: str | None = None
    confidence: float | None = None
    """By the author's own measure: not comparable between releases."""
    source: str
    """Who or what stated the label, or the examples where there is none."""
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """Labels by others, by who stated them."""
    examples: tuple[Example, ...] = ()
    """In the author's order."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """All else that the record states, under the author's names, unchanged and unchecked."""


Piece = tuple[str, FeatureLabel]
"""What errors call a record, and what it states."""


@dataclass(frozen=True)
class Source:
    """One file of labels.

    Attributes:
        where: what errors call it.
        hook: whose labels are wanted, of a file with those of several; None where nobody says.
        features: lets a parser pass over others early; it need not.
    """

    path: Path
    where: str
    hook: str | None = None
    features: frozenset[int] | None = None


@dataclass(frozen=True)
class Schema:
    """A form in which labels are published."""

    parse: Callable[[Source], Iterator[Piece]]
    suffixes: tuple[str, ...]
    by_example: bool = False
    """Whether a record is one example, so that a feature has several."""


class Record:
    """One record of a file. Each value is checked as it is taken; what is left are its facts."""

    def __init__(self, where: str, values: Any) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise self.error(f"{reprlib.repr(values)} is not an object")
        self.facts: dict[str, Any] = dict(values)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.where}: {problem}.")

    def take(self, key: str, kind: Callable[[Any], T]) -> T | None:
        if (value := self.facts.pop(key, None)) is None:
            return None
        try:
            return kind(value)
        except (ValueError, RecursionError) as e:
            raise self.error(f"{key} is {reprlib.repr(value)}: {str(e).rstrip('.')}") from e

    def need(self, key: str, kind: Callable[[Any], T]) -> T:
        if (value := self.take(key, kind)) is None:
            raise self.error(f"it has no {key}")
        return value

    def label(self, **stated: Any) -> Piece:
        return self.where, FeatureLabel(**stated, facts=self.facts)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("not an integer")
    return value


def number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ValueError("not a finite number")
    return float(value)


def list_of(kind: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    """For a list, or the JSON of one."""

    def check(value: Any) -> tuple[T, ...]:
        values = json.loads(value) if isinstance(value, str) else value
        if not isinstance(values, list):
            raise ValueError("not a list")
        return tuple(kind(v) for v in values)

    return check


def read_json(source: Source, kind: type) -> Any:
    try:
        content = json.loads(source.path.read_bytes(), object_pairs_hook=unrepeated)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{source.where} is not JSON: {e}.") from e
    if not isinstance(content, kind):
        raise DataError(f"{source.where} holds a {type(content).__name__}, not a {kind.__name__}.")
    return content


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json by itself would drop all but the last of a repeated key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
    return values
