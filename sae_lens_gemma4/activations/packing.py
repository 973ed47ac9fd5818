"""Documents as token ids, and these packed into blocks.

Stock leaves a second BOS in mid-context on Gemma 4 (`load_model.py:236` looks for an attribute transformers no longer
sets). Here a document's own BOS is taken off first, and packing alone puts one where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.chat import tokenize_chat
from sae_lens_gemma4.activations.documents import Documents


class TokenDocument(NamedTuple):
    """One document without BOS: its number counted from the first one read, token ids, and each token's role."""

    number: int
    tokens: list[int]
    roles: list[str | None]


class Block(NamedTuple):
    """At most `context_size` tokens; of each its id, its document's number and its role."""

    tokens: list[int]
    documents: list[int]
    roles: list[str | None]


def tokenize(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenDocument]:
    """Documents as tokens; those without any are left out and keep their number."""
    for number, document in enumerate(documents):
        if isinstance(document, str):
            tokens = list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
            roles: list[str | None] = [None] * len(tokens)
        else:
            tokens, roles = tokenize_chat(document, tokenizer, documents.first + number)
        own_bos = int(bool(tokens) and tokens[0] == tokenizer.bos_token_id)
        if len(tokens) > own_bos:
            yield TokenDocument(number, tokens[own_bos:], roles[own_bos:])


def pack(documents: Iterable[TokenDocument], bos: int | None, context_size: int, *, packed: bool) -> Iterator[Block]:
    """Fill blocks of `context_size`; `bos`, if there is one, opens every block and every document.

    Documents stand end to end, or, if not `packed`, each in blocks of its own. What is not full is left short.
    """
    full = context_size - (bos is not None)  # a BOS with nothing after it would say nothing
    block = Block([], [], [])
    for number, tokens, roles in documents:
        start = 0
        while start < len(tokens):
            if bos is not None and (start == 0 or not block.tokens):
                block.tokens.append(bos)
                block.documents.append(number)
                block.roles.append(None)
            part = slice(start, start + context_size - len(block.tokens))
            block.tokens.extend(tokens[part])
            block.roles.extend(roles[part])
            block.documents.extend([number] * (len(block.tokens) - len(block.documents)))
            start = part.stop
            if len(block.tokens) >= full:
                yield block
                block = Block([], [], [])
        if block.tokens and not packed:
            yield block
            block = Block([], [], [])
    if block.tokens:
        yield block
