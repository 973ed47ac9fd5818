"""Whether a held-out text is apart from the training text, by document.

A held-out figure on text that was trained on is not one. Offsets say that two parts of a dataset are apart only if
they are of one dataset; blocks differ as soon as a document begins at another place in them. So documents are
compared, wherever they lie: their tokens without BOS, all of their blocks in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import DataError

_CUT_TOKENS = 32  # a beginning must be so long to be taken for a document's own


def disjoint(train: Sequence[Corpus], heldout: Corpus) -> None:
    """Check that no document of `heldout` is in a corpus of `train`.

    Two documents are the same if their tokens are; and a corpus's last document, which its end may have cut, if it is
    what the other's begins with, by 32 tokens or more. Two parts of one split that overlap by their numbers are not
    apart either, whatever was kept of them.

    Raises:
        DataError: naming how many are, and one of them.
    """
    texts = _documents(heldout)
    for corpus in train:
        _check_numbers(corpus, heldout)
        both = _in_both(_documents(corpus), texts, corpus, heldout)
        if both:
            name, number = heldout.locate(both[0])
            raise DataError(
                f"{len(both):,} of {len(texts):,} documents of held-out corpus {heldout.name!r} are in training corpus "
                f"{corpus.name!r}, as document {number:,} of {name!r}. Let the held-out text begin where the training "
                "text ends, or leave these out."
            )


def _check_numbers(train: Corpus, heldout: Corpus) -> None:
    for a in (part.origin for part in train.parts):
        for b in (part.origin for part in heldout.parts):
            if a is None or b is None or a.source is None:
                continue
            if (a.source, a.split, a.revision) != (b.source, b.split, b.revision):
                continue
            first, end = max(a.first_document, b.first_document), min(a.next_document, b.next_document)
            if first < end:
                raise DataError(
                    f"Documents {first:,} to {end - 1:,} of {a.source} (split {a.split!r}) are read both for training "
                    f"corpus {train.name!r} and for held-out corpus {heldout.name!r}; skip_documents keeps them apart."
                )


def _documents(corpus: Corpus) -> dict[int, torch.Tensor]:
    """Of each document by its number its tokens in order, without the BOS that packing put in."""
    document_bp = corpus.document_bp
    real_bp = document_bp >= 0
    opens_bp = real_bp & (document_bp != document_bp.roll(1, dims=1))
    opens_bp[:, 0] = real_bp[:, 0]
    own_bp = real_bp & ~opens_bp if _opens_with_bos(corpus, corpus.tokens_bp[opens_bp]) else real_bp
    numbers_t, order_t = document_bp[own_bp].sort(stable=True)
    numbers, lengths = numbers_t.unique_consecutive(return_counts=True)
    tokens = corpus.tokens_bp[own_bp][order_t].split(lengths.tolist())
    return dict(zip(numbers.tolist(), tokens, strict=True))


def _opens_with_bos(corpus: Corpus, first_tokens: torch.Tensor) -> bool:
    """As the corpus says; where it does not know, whether all that opens a block or a document is one token."""
    said = {part.origin.bos for part in corpus.parts if part.origin}
    if len(said) == 1:
        return said.pop()
    return len(first_tokens) > 1 and len(first_tokens.unique()) == 1


def _in_both(
    train: dict[int, torch.Tensor], heldout: dict[int, torch.Tensor], train_corpus: Corpus, heldout_corpus: Corpus
) -> list[int]:
    """Numbers, among the held-out documents, of those that are training documents."""
    seen = {_hash(tokens) for tokens in train.values()}
    both = {number for number, tokens in heldout.items() if _hash(tokens) in seen}
    for cut in _last(train, train_corpus):
        both |= {number for number, tokens in heldout.items() if _begins(tokens, train[cut])}
    for cut in _last(heldout, heldout_corpus):
        if any(_begins(tokens, heldout[cut]) for tokens in train.values()):
            both.add(cut)
    return sorted(both)


def _hash(tokens: torch.Tensor) -> bytes:
    return hashlib.blake2b(tokens.numpy().data, digest_size=16).digest()


def _last(documents: dict[int, torch.Tensor], corpus: Corpus) -> list[int]:
    """The last document of each corpus that was joined, if long enough to be known by its beginning."""
    ends = [*(part.first_number for part in corpus.parts[1:]), max(documents) + 1]
    return [end - 1 for end in ends if end - 1 in documents and len(documents[end - 1]) >= _CUT_TOKENS]


def _begins(tokens: torch.Tensor, beginning: torch.Tensor) -> bool:
    return torch.equal(tokens[: len(beginning)], beginning)
