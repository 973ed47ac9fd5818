"""Text that comes from anywhere, so that a reader sees all that is in it: what is invisible, would turn the text around
or would move a terminal's cursor is written out."""

from __future__ import annotations

import re
import unicodedata

_SEEN = {"\r\n": "↵", "\n": "↵", "\r": "↵", "\t": "⇥"}
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
_JOINERS = "\u200c\u200d"
"""Invisible, but what they stand between is not the same without them."""


def visible(text: str) -> str:
    """A token's text with nothing in it that cannot be seen: ↵ for a line break, · for a blank on its own."""
    if not text:
        return "∅"
    if not text.strip():
        text = text.replace(" ", "·")
    shown = re.sub(r"\r\n|[^ ]", lambda found: _seen(found[0], alone=text in _JOINERS), text, flags=re.DOTALL)
    return f"◌{shown}" if unicodedata.category(shown[0]).startswith("M") else shown


def visible_name(text: str) -> str:
    """A name, or a sentence with names in it: blanks of any width stay."""
    return "".join(c if unicodedata.category(c) == "Zs" else _seen(c, alone=False) for c in text)


def _seen(character: str, alone: bool) -> str:
    if character in _SEEN:
        return _SEEN[character]
    hidden = unicodedata.category(character) in _HIDDEN
    return f"⟨{ord(character):04X}⟩" if hidden and (alone or character not in _JOINERS) else character
