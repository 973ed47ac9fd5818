"""Tokens as the texts that dashboards show: raw pieces of the vocabulary, none of which can break what reads them.

Neuronpedia and sae-dashboard show pieces (`▁the`, `<0xE2>`), not decoded text, in which a token that is a part of a
character is nothing. Its schema refuses empty texts and PostgreSQL refuses NUL, so these get stand-ins.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

EMPTY, UNKNOWN = "<empty>", "<|outofrange|>"


def pieces_of(tokenizer: PreTrainedTokenizerBase, n_vocab: int) -> list[str]:
    """The piece of each token id below `n_vocab`; sae-dashboard's `<|outofrange|>` where the tokenizer has none."""
    known = min(n_vocab, len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    return [UNKNOWN if piece is None else safe_piece(piece) for piece in pieces] + [UNKNOWN] * (n_vocab - known)


def safe_text(text: str) -> str:
    """A sentence without what databases refuse: NUL becomes a space, half a surrogate pair U+FFFD."""
    return text.replace("\0", " ").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def safe_piece(text: str) -> str:
    """A token's text, with stand-ins for what is refused: nothing at all, NUL, half a surrogate pair."""
    if not text:
        return EMPTY
    return text.replace("\0", "<0x00>").encode("utf-8", "backslashreplace").decode("utf-8")
