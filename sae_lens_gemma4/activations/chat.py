"""Chats in the form that a chat template renders, and which turn each token of them belongs to.

Datasets write them as `messages` ({role, content}) or as ShareGPT's rows ({from, value}). A template that is given
the second kind finds neither role nor content and renders empty turns, without an error.

Templates say nothing of turns in what they render. Where a turn ends is found by rendering the chat as it was after
that turn: what the whole chat begins with is what the turns so far have become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

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


def tokenize_chat(
    rows: Any, tokenizer: PreTrainedTokenizerBase, index: int | None = None
) -> tuple[list[int], list[str | None]]:
    """The token ids that `apply_chat_template` gives, and the role of the turn that each belongs to.

    A turn is all that its message adds to the rendered text, markers included; what the template puts before the
    first message belongs to the first turn. None where that cannot be told: the template rewrites a turn once others
    follow it, a token lies across two turns, or the tokenizer is a slow one, which knows no offsets.

    Raises:
        DataError: not a chat (as `as_messages`), no chat template, or a chat that the template refuses.
    """
    messages = as_messages(rows, index)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("The tokenizer has no chat template, so chats cannot be rendered; use the tuned model's.")
    if not messages:
        return [], []
    try:
        text = _render(messages, tokenizer)
    except TemplateError as e:
        document = "a chat" if index is None else f"document {index}"
        raise DataError(f"The chat template cannot render {document}: {e}") from e
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])
    if not fast:
        return ids, [None] * len(ids)
    ends = [0, *(_end(messages[:n], text, tokenizer) for n in range(1, len(messages))), len(text)]
    turns = list(zip(ends[:-1], ends[1:], (m["role"] for m in messages), strict=True))
    return ids, [_role_at(span, turns) for span in encoded["offset_mapping"]]


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _end(messages: list[dict[str, Any]], whole: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Where in the text of the whole chat these first messages end, if it begins with what they are on their own."""
    try:
        text = _render(messages, tokenizer)
    except TemplateError:  # a template may refuse a chat that is cut here
        return None
    return len(text) if whole.startswith(text) else None


def _role_at(span: tuple[int, int], turns: list[tuple[int | None, int | None, str]]) -> str | None:
    for start, end, role in turns:
        if start is not None and end is not None and start <= span[0] and span[1] <= end:
            return role
    return None
