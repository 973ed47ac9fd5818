"""Whose tokens a corpus holds: token ids mean nothing without the tokenizer that made them.

A corpus is a tensor of numbers, and every model whose vocabulary is large enough runs on it. Another tokenizer's ids
give figures that look like a bad SAE's, so a corpus remembers whose they are, and is held against the model.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from transformers import BatchEncoding, PreTrainedTokenizerBase

from sae_lens_gemma4.errors import DataError

if TYPE_CHECKING:
    from sae_lens_gemma4.activations.blocks import Corpus

_FINGERPRINTS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that two tokenizers share if they have the same tokens, ids and special tokens.

    Kept for each tokenizer for as long as it lives, and made again where tokens were added.
    """
    size, fingerprint = _FINGERPRINTS.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        facts = [sorted(tokenizer.get_vocab().items()), sorted(set(tokenizer.all_special_ids))]
        fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        _FINGERPRINTS[tokenizer] = (len(tokenizer), fingerprint)
    return fingerprint


def encode(text: str, tokenizer: PreTrainedTokenizerBase, document: str, *, offsets: bool = False) -> BatchEncoding:
    """The tokens of a text, without special tokens added; with `offsets`, where in it each begins and ends.

    Raises:
        DataError: half of a surrogate pair, which is no character, naming the `document`.
    """
    try:
        encoded: BatchEncoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False
        )
        return encoded
    except (TypeError, UnicodeEncodeError) as e:
        at, half = next(((i, c) for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), (None, ""))
        if at is None:
            raise
        raise DataError(
            f"{document[0].upper()}{document[1:]} holds half a character (U+{ord(half):04X}, at {at}), which no "
            "tokenizer can read: it was cut or decoded wrongly."
        ) from e


def check_tokenizer(corpus: Corpus, model_tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise `DataError` if the corpus was made with another tokenizer than the model's, as far as both are known."""
    made_with = corpus.origin.tokenizer if corpus.origin else None
    if made_with is None or model_tokenizer is None:
        return
    models = tokenizer_fingerprint(model_tokenizer)
    if made_with != models:
        raise DataError(
            f"Corpus {corpus.name!r} was made with another tokenizer ({made_with}) than the model's ({models}): "
            "its token ids mean other tokens here. Build it with the model's tokenizer."
        )


def check_tokens(corpus: Corpus, vocab_size: int) -> None:
    """Raise `DataError` if the corpus holds a token id that is not in `0..vocab_size - 1`, naming the first."""
    outside_bp = (corpus.tokens_bp < 0) | (corpus.tokens_bp >= vocab_size)
    if outside_bp.any():
        block, position = outside_bp.nonzero()[0].tolist()
        raise DataError(
            f"Corpus {corpus.name!r} holds token id {int(corpus.tokens_bp[block, position])} (block {block}, position "
            f"{position}); the model has {vocab_size} tokens. Build it with the model's tokenizer."
        )
