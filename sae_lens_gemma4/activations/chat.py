"""Chats in the form that a chat template renders.

Datasets write them as `messages` ({role, content}) or as ShareGPT's rows ({from, value}). A template that is given
the second kind finds neither role nor content and renders empty turns, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_gemma4.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_ROLES |= {"bot": "assistant", "chatgpt": "assistant", "system": "system"}


def as_messages(rows: Any, index: int | None = None) -> list[dict[str, Any]]:
    """One chat as `[{"role": …, "content": …}, …]`; content is a text, or a list of parts that the template knows.

    Raises:
        DataError: not a list of messages, or a message of another form; it names the document by `index`.
    """
    document = "a chat" if index is None else f"document {index}"
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not all(isinstance(m, Mapping) for m in rows):
        raise DataError(
            f"{document[0].upper()}{document[1:]} is neither a text nor a list of messages: {str(rows)[:80]!r}."
        )
    return [_as_message(row, document) for row in rows]


def _as_message(row: Mapping[str, Any], document: str) -> dict[str, Any]:
    if "from" in row and "role" not in row:
        role, content = _ROLES.get(str(row["from"]).lower()), row.get("value")
        if role is None:
            raise DataError(f"A message of {document} is from {row['from']!r}; known: {', '.join(_ROLES)}.")
    else:
        role, content = row.get("role"), row.get("content")
        if isinstance(role, str) and row.get("tool_calls"):  # may have no content; the template knows
            return dict(row)
    if not isinstance(role, str) or not isinstance(content, str | list):
        found = {key: type(value).__name__ for key, value in row.items()}
        raise DataError(f"A message of {document} has {found}; chats need texts under 'role' and 'content'.")
    return {**{k: v for k, v in row.items() if k not in ("from", "value")}, "role": role, "content": content}
