"""From what a model wrote to the answer it gave, and whether that is the right one.

What counts as an answer decides an accuracy as much as the model does, so it has a name, is recorded, and an answer
that is not found is told apart from a wrong one (both count as not right).

`gsm8k` takes the first `#### N`, as GSM8K's own `extract_answer` does (github.com/openai/grade-school-math,
grade_school_math/dataset.py): a base model runs on and answers questions that it made up. `last_number` takes the last.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from sae_lens_gemma4.errors import ConfigError, check_name

Find = Callable[[str], "str | None"]
Same = Callable[[str, str], bool]

MAX_PATTERN, MAX_TEXT = 500, 20_000
"""Characters of a pattern, and of a text's end that it is tried on. One that backtracks without end is not caught."""
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_SIGNED = rf"([-−+]?)\s?\$?\s?([-−]?)({_DIGITS})"
_GSM8K = re.compile(rf"####\s*{_SIGNED}")
_NUMBER = re.compile(rf"(?<![\w.]){_SIGNED}")
_SAID = re.compile(r"(?i:\banswer\b(?:\s+is)?)\s*:?\s*[*(\[]*([A-E])(?![\w'])")
_ALONE = re.compile(r"(?:^|\n)\s*[*(\[]*([A-E])(?=[*)\].:]|\s*(?:\n|$))|[(\[]([A-E])[)\]]")


class Extractor(NamedTuple):
    """How answers are found and compared.

    Attributes:
        find: the answer in an output, in one normal form; None where there is none.
        normal: a bare right answer in that form, for those in which `find` finds nothing.
        same: whether what was found is the right answer.
    """

    name: str
    find: Find
    normal: Find
    same: Same

    def gold(self, answer: str) -> str | None:
        """The right answer in normal form: GSM8K's has its reasoning before the `####`, others are bare."""
        found = self.find(answer)
        return self.normal(answer) if found is None else found


def number(text: str) -> str | None:
    """A whole text that is one number, without `$`, commas and zeros that say nothing: "$1,250.50" is "1250.5"."""
    match = re.fullmatch(rf"\s*{_SIGNED}\s*\.?\s*", text)
    return None if match is None else _plain(match)


def normalised(text: str) -> str | None:
    """Lower case, one space between words, no punctuation at the ends; None if nothing is left."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip(" .,;:!?\"'`*()[]") or None


def gsm8k(text: str) -> str | None:
    """The number after the first `####`."""
    match = _GSM8K.search(text)
    return None if match is None else _plain(match)


def last_number(text: str) -> str | None:
    """The last number anywhere."""
    found = [*_NUMBER.finditer(text)]
    return _plain(found[-1]) if found else None


def choice(text: str) -> str | None:
    """One of A to E: the last that is called the answer, else the first that stands in brackets or opens a line."""
    if said := _SAID.findall(text):
        return str(said[-1])
    match = _ALONE.search(text)
    return None if match is None else match[1] or match[2]


def by_pattern(pattern: str) -> Find:
    """What the first match of a regular expression holds: its first group, or all of it.

    Raises:
        ConfigError: the pattern is too long, or is none.
    """
    if len(pattern) > MAX_PATTERN:
        raise ConfigError(f"The extractor's pattern has {len(pattern):,} characters; {MAX_PATTERN} are allowed.")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise ConfigError(f"The extractor's pattern {pattern!r} is not a regular expression: {e}.") from e

    def find(text: str) -> str | None:
        match = compiled.search(text[-MAX_TEXT:])
        return None if match is None else normalised(match[1 if compiled.groups else 0] or "")

    return find


def _plain(match: re.Match[str]) -> str:
    sign, inner, digits = match.groups()
    whole, _, fraction = digits.replace(",", "").partition(".")
    value = (whole.lstrip("0") or "0") + (f".{kept}" if (kept := fraction.rstrip("0")) else "")
    return f"-{value}" if {sign, inner} & {"-", "−"} and value != "0" else value


def _equal(found: str, gold: str) -> bool:
    return found == gold


def _within(found: str, gold: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", found) is not None


EXTRACTORS: dict[str, Extractor] = {}
"""By name. Beside these, `regex:<pattern>` makes one."""


def register_extractor(name: str, find: Find, *, normal: Find = normalised, same: Same = _equal) -> Extractor:
    """Make an extractor known by a name.

    Args:
        find: the answer in an output, or None.
        normal: a bare right answer in the form that `find` gives.
        same: whether what was found is the right answer; equal unless given.

    Raises:
        ConfigError: the name is empty, taken, or begins with `regex:`.
    """
    if not name or name in EXTRACTORS or name.startswith("regex:"):
        raise ConfigError(f"An extractor cannot be called {name!r}: the name is empty or taken.")
    EXTRACTORS[name] = Extractor(name, find, normal, same)
    return EXTRACTORS[name]


register_extractor("gsm8k", gsm8k, normal=number)
register_extractor("last_number", last_number, normal=number)
register_extractor("choice", choice, normal=lambda text: t if (t := text.strip().upper()) in set("ABCDE") else None)
register_extractor("exact", normalised)
register_extractor("contains", normalised, same=_within)


def extractor(name: str) -> Extractor:
    """The extractor of this name, or that of a `regex:<pattern>`.

    Raises:
        UnknownNameError: there is none.
        ConfigError: as `by_pattern`.
    """
    if name.startswith("regex:"):
        return Extractor(name, by_pattern(name.removeprefix("regex:")), normalised, _equal)
    return EXTRACTORS[check_name("answer extractor", name, EXTRACTORS, "Or regex:<pattern>.")]
