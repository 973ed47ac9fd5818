"""Documents as token ids, and these packed into blocks.

Stock leaves a second BOS in mid-context on Gemma 4 (`load_model.py:236` looks for an attribute transformers no longer
sets). Here a document's own BOS is taken off first, and packing alone puts one where it belongs.

A block says where the text goes on after it, and packing can begin there: so a text that is too long to hold can be
read in parts, and the parts are the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.activations.chat import tokenize_chat
from sae_lens_gemma4.activations.documents import Documents
from sae_lens_gemma4.activations.vocabulary import encode


class TokenDocument(NamedTuple):
    """One document without BOS: its number counted from the first one read, and of each token its id, its role and
    whether it counts."""

    number: int
    tokens: list[int]
    roles: list[str | None]
    counts: list[bool]


class Block(NamedTuple):
    """At most `context_size` tokens; of each its id, its document's number, its role and whether it counts.

    `end` is where the text goes on: a document's number and how many of its tokens are in this block and those before.
    """

    tokens: list[int]
    documents: list[int]
    roles: list[str | None]
    counts: list[bool]
    end: tuple[int, int]


@dataclass(frozen=True)
class Counting:
    """Which tokens count.

    Attributes:
        special: ids that do not.
        roles: that alone do; None for all, and for what has no role.
        turn_markers: whether what the chat template puts around messages does.
    """

    special: frozenset[int] = frozenset()
    roles: frozenset[str] | None = None
    turn_markers: bool = True

    def of(self, tokens: list[int], roles: list[str | None], own: list[bool]) -> list[bool]:
        if self.roles is None and self.turn_markers:
            return [token not in self.special for token in tokens]
        return [
            token not in self.special and (self.roles is None or role in self.roles) and (self.turn_markers or mine)
            for token, role, mine in zip(tokens, roles, own, strict=True)
        ]


def tokenize(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, counting: Counting, *, skip_tokens: int = 0
) -> Iterator[TokenDocument]:
    """Documents as tokens, without the first `skip_tokens` of the first; those without any keep their number."""
    for number, document in enumerate(documents):
        at = documents.first + number
        if isinstance(document, str):
            tokens = list(encode(document, tokenizer, f"document {at}")["input_ids"])
            roles: list[str | None] = [None] * len(tokens)
            own = [True] * len(tokens)
        else:
            tokens, roles, own = tokenize_chat(document, tokenizer, at, find_own=not counting.turn_markers)
        own_bos = int(bool(tokens) and tokens[0] == tokenizer.bos_token_id)
        part = slice(own_bos + (skip_tokens if number == 0 else 0), None)
        if tokens[part]:
            counts = counting.of(tokens[part], roles[part], own[part])
            yield TokenDocument(number, tokens[part], roles[part], counts)


def pack(
    documents: Iterable[TokenDocument], bos: int | None, context_size: int, *, packed: bool, bos_counts: bool = False
) -> Iterator[Block]:
    """Fill blocks of `context_size`; `bos`, if there is one, opens every block and every document.

    Documents stand end to end, or, if not `packed`, each in blocks of its own. What is not full is left short.
    """
    full = context_size - (bos is not None)  # a BOS with nothing after it would say nothing
    block = Block([], [], [], [], (0, 0))
    for number, tokens, roles, counts in documents:
        start = 0
        while start < len(tokens):
            if bos is not None and (start == 0 or not block.tokens):
                block.tokens.append(bos)
                block.documents.append(number)
                block.roles.append(None)
                block.counts.append(bos_counts)
            part = slice(start, start + context_size - len(block.tokens))
            block.tokens.extend(tokens[part])
            block.roles.extend(roles[part])
            block.counts.extend(counts[part])
            block.documents.extend([number] * (len(block.tokens) - len(block.documents)))
            start = min(part.stop, len(tokens))
            block = block._replace(end=(number, start))
            if len(block.tokens) >= full or (start == len(tokens) and not packed):
                yield block
                block = Block([], [], [], [], (0, 0))
    if block.tokens:
        yield block
