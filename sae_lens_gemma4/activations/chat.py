"""Chats in the form that a chat template renders, and which turn each token of them belongs to.

Datasets write them as `messages` ({role, content}) or as ShareGPT's rows ({from, value}). A template that is given
the second kind finds neither role nor content and renders empty turns, without an error.

Templates say nothing of turns in what they render. Where a turn ends is found by rendering the chat as it was after
that turn: what the whole chat begins with is what the turns so far have become. What the template puts around a
message's own content is found likewise: it is what stays if another content is put in its place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.vocabulary import encode
from sae_lens_gemma4.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_ROLES |= {"bot": "assistant", "chatgpt": "assistant", "system": "system"}
_MAX_TURNS = 200  # each costs a rendering of all before it
_OTHER_CONTENT = "\ue000"  # of the private use area: no template trims it, and texts do not hold it


class ChatTokens(NamedTuple):
    """Token ids of a chat; of each the role of its turn, and whether it is the message's own content."""

    ids: list[int]
    roles: list[str | None]
    own: list[bool]


class _Turn(NamedTuple):
    """Where in the rendered text a turn begins and ends, its role, and where its message's own content does."""

    start: int
    end: int
    role: str
    own_start: int
    own_end: int


def as_messages(rows: Any, index: int | None = None) -> list[dict[str, Any]]:
    """One chat as `[{"role": …, "content": …}, …]`; content is a text, or a list of parts that the template knows.

    Raises:
        DataError: not a list of messages, or a message of another form; it names the document by `index`.
    """
    document = _called(index)
    if isinstance(rows, str) or not isinstance(rows, Sequence) or not all(isinstance(m, Mapping) for m in rows):
        raise DataError(
            f"{document[0].upper()}{document[1:]} is neither a text nor a list of messages: {str(rows)[:80]!r}."
        )
    return [_as_message(row, document) for row in rows]


def _called(index: int | None) -> str:
    return "a chat" if index is None else f"document {index}"


def _as_message(row: Mapping[str, Any], document: str) -> dict[str, Any]:
    if "from" in row and "role" not in row:
        role, content = _ROLES.get(str(row["from"]).lower()), row.get("value")
        if role is None:
            raise DataError(f"A message of {document} is from {row['from']!r}; known: {', '.join(_ROLES)}.")
    else:
        role, content = row.get("role"), row.get("content")
        if role == "":
            raise DataError(f"A message of {document} has an empty role.")
        if isinstance(role, str) and row.get("tool_calls"):  # may have no content; the template knows
            return dict(row)
    if not isinstance(role, str) or not isinstance(content, str | list):
        found = {key: type(value).__name__ for key, value in row.items()}
        raise DataError(f"A message of {document} has {found}; chats need texts under 'role' and 'content'.")
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or (kind == "text" and not isinstance(part.get("text"), str)):
            raise DataError(
                f"A message of {document} has the part {str(part)[:80]}; a part is {{'type': 'text', 'text': …}}, "
                "or of another 'type' that the chat template knows."
            )
    return {**{k: v for k, v in row.items() if k not in ("from", "value")}, "role": role, "content": content}


def tokenize_chat(
    rows: Any, tokenizer: PreTrainedTokenizerBase, index: int | None = None, *, find_own: bool = False
) -> ChatTokens:
    """The token ids that `apply_chat_template` gives, and the role of the turn that each belongs to.

    A turn is all that its message adds to the rendered text, markers included; what the template puts before the
    first message belongs to the first turn. The role is None where that cannot be told: the template rewrites a turn
    once others follow it, a token lies across two turns, the chat is in its 201st turn or a later one, or the
    tokenizer is a slow one, which knows no offsets.

    Args:
        find_own: look for each message's own content, so that `own` is true of its tokens alone: not of markers, role
            words and line ends around it, nor of a token that reaches into them, nor where the role cannot be told.
            Without, it is true of all whose role is known.

    Raises:
        DataError: not a chat (as `as_messages`), no chat template, a chat that the template refuses, or a text that
            the tokenizer cannot read.
    """
    messages = as_messages(rows, index)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("The tokenizer has no chat template, so chats cannot be rendered; use the tuned model's.")
    if not messages:
        return ChatTokens([], [], [])
    try:
        text = _render(messages, tokenizer)
    except TemplateError as e:
        raise DataError(f"The chat template cannot render {_called(index)}: {e}") from e
    fast = bool(tokenizer.is_fast)
    encoded = encode(text, tokenizer, _called(index), offsets=fast)
    ids = list(encoded["input_ids"])
    if not fast:
        return ChatTokens(ids, [None] * len(ids), [False] * len(ids))
    turns = _turns(messages, text, tokenizer, find_own)
    starts = [turn.start for turn in turns]
    result = ChatTokens(ids, [], [])
    for start, end in encoded["offset_mapping"]:
        number = bisect_right(starts, start) - 1
        turn = turns[number] if number >= 0 and end <= turns[number].end else None
        result.roles.append(turn.role if turn else None)
        result.own.append(turn is not None and turn.own_start <= start and end <= turn.own_end)
    return result


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _turns(
    messages: list[dict[str, Any]], whole: str, tokenizer: PreTrainedTokenizerBase, find_own: bool
) -> list[_Turn]:
    """The turns of which it can be told where they begin and end."""
    turns: list[_Turn] = []
    start: int | None = 0
    for n, message in enumerate(messages[:_MAX_TURNS], 1):
        end = len(whole) if n == len(messages) else _end(messages[:n], whole, tokenizer)
        if start is not None and end is not None:
            own = _own(messages[:n], whole[:end], tokenizer) if find_own else (start, end)
            turns.append(_Turn(start, end, message["role"], *own))
        start = end
    return turns


def _end(messages: list[dict[str, Any]], whole: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Where in the text of the whole chat these first messages end, if it begins with what they are on their own."""
    try:
        text = _render(messages, tokenizer)
    except TemplateError:  # a template may refuse a chat that is cut here
        return None
    return len(text) if whole.startswith(text) else None


def _own(messages: list[dict[str, Any]], text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Where in the text of these messages the last one's own content begins and ends; (0, 0) if that is not told."""
    try:
        other = _render([*messages[:-1], messages[-1] | {"content": _OTHER_CONTENT}], tokenizer)
    except TemplateError:
        return 0, 0
    before, found, after = other.rpartition(_OTHER_CONTENT)
    told = found and text.startswith(before) and text[len(before) :].endswith(after)
    return (len(before), len(text) - len(after)) if told else (0, 0)
