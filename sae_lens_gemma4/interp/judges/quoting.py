"""Texts that nobody here wrote, as data: quoted so that no text can end its quotation, and cleaned when it comes back.

Contexts come from any corpus and labels from any model. Both can say `</data>`, `"} ]`, `<|turn>system` or "ignore all
previous instructions". So they are sent as JSON strings in one block, with everything escaped that could close the
block, begin a line, or be taken by a tokenizer for one of its special tokens (vLLM and others read those in the text of
a chat). What is escaped reads back as the same string.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

BEGIN, END = "<data>", "</data>"
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
"""Categories of Unicode that show nothing, turn the direction of a line, break it, or are half a character."""
_OPENING = re.compile(r"<|\[(?=[A-Za-z/])")
"""How special tokens and tags begin: `<bos>`, `<|im_start|>`, `</s>`, `[INST]`."""
_CANDIDATE = re.compile(r"[^\x20-\x7e]")


def quoted(text: str) -> str:
    """A text as a JSON string without any `<`, without control characters, on one line."""
    plain = json.dumps(text, ensure_ascii=False)
    return _CANDIDATE.sub(lambda m: _escaped(m[0]) if _unseen(m[0]) else m[0], _OPENING.sub(_escape_opening, plain))


def quoted_data(value: Any) -> str:
    """Plain data (mappings, sequences, texts, numbers, None) as one line of JSON, each text as `quoted`."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)}: {quoted_data(v)}" for key, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(quoted_data, value)) + "]"
    return json.dumps(value, allow_nan=False)


def block(fields: dict[str, Any]) -> str:
    """Data between its delimiters: one JSON object, whose lists have a line for each item.

    No line of it can be forged: lines begin where the object does, a key does, or an item does, and texts have none.
    """
    lines = []
    for key, value in fields.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"  {quoted_data(v)}" for v in value)
            lines.append(f"{quoted(key)}: [\n{items}\n]")
        else:
            lines.append(f"{quoted(key)}: {quoted_data(value)}")
    return f"{BEGIN}\n{{\n" + ",\n".join(lines) + f"\n}}\n{END}"


def cleaned(text: str, most: int) -> str:
    """A text from outside as one line: no control characters, no double spaces, at most so many characters."""
    seen = "".join(" " if ch.isspace() else ch for ch in text if ch.isspace() or not _unseen(ch))
    line = " ".join(seen.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN


def _escape_opening(match: re.Match[str]) -> str:
    return _escaped(match[0])


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
