"""Where the documents of a corpus lie, and which of three parts each belongs to.

A label that was made from a text and tested on the same text passes for what it remembers. So whole documents are
given to one part each, for all latents: contexts of one document resemble each other, and of two blocks that share one
the second is no new text. Blocks hold several documents; what is shown of one must not run over into the next, whose
part may be another. A segment is one document's tokens in one block, and everything shown lies in one segment.

Shapes: `s` segments, `k` documents, `n` places. A place is `block * context_size + position`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import DataError

PARTS = ("labelling", "held_out", "calibration")

Ints = npt.NDArray[np.integer]


class Pool(NamedTuple):
    """The places that count of one part, in the order of the text, and once more by token id."""

    place_n: Ints
    by_token_n: Ints
    token_n: Ints
    """Of `by_token_n`, ascending."""

    def of_token(self, token: int) -> Ints:
        """The places where a token id is, ascending."""
        low, high = np.searchsorted(self.token_n, [token, token + 1])
        return self.by_token_n[low:high]


class Segments:
    """One document's tokens in one block, again and again.

    Args:
        shares: of the documents, how many go to each of `PARTS`.
        seed: of the permutation that deals them out.

    Attributes:
        first_s: the place where each begins; with those of padding, they tile the corpus.
        start_s, end_s: what may be shown of it: without a first token that does not count, which is BOS.
        document_s: its document's number; -1 for padding.
        part_s: index into `PARTS`; -1 for padding, and for documents of which no token counts.
        part_of: the part of each document, by number.
        pools: of each part, what counts.

    Raises:
        DataError: fewer than three documents count.
    """

    def __init__(self, corpus: Corpus, shares: tuple[float, float, float], seed: int) -> None:
        self.context_size = corpus.context_size
        self.token_n, keep_n = corpus.tokens_bp.flatten().numpy(), corpus.keep_bp.flatten().numpy()
        self.keep_n, document_n = keep_n, corpus.document_bp.flatten().numpy()
        opens_n = np.diff(document_n, prepend=document_n[0] - 1) != 0
        opens_n[:: self.context_size] = True
        self.first_s = np.flatnonzero(opens_n)
        self.end_s = np.append(self.first_s[1:], len(document_n))
        self.start_s = self.first_s + ~keep_n[self.first_s]
        self.document_s = document_n[self.first_s]
        self.part_of = split_documents(document_n[keep_n & (document_n >= 0)], shares, seed, corpus.name)
        self.part_s = np.array([self.part_of.get(d, -1) for d in self.document_s.tolist()], dtype=np.int8)
        part_n = np.repeat(self.part_s, self.end_s - self.first_s)
        self.pools = [self._pool(np.flatnonzero(keep_n & (part_n == part))) for part in range(len(PARTS))]

    def of_places(self, place_n: Ints) -> Ints:
        """The segment of each place."""
        return np.searchsorted(self.first_s, place_n, side="right") - 1

    def windows(self, place_n: Ints, reach: int) -> tuple[Ints, Ints]:
        """From where to where (not included) so many tokens on each side go, cut at the segment's ends."""
        segment_n = self.of_places(place_n)
        low_n = np.maximum(place_n - reach, self.start_s[segment_n])
        return low_n, np.minimum(place_n + reach + 1, self.end_s[segment_n])

    def _pool(self, place_n: Ints) -> Pool:
        if len(self.token_n) <= np.iinfo(np.int32).max:
            place_n = place_n.astype(np.int32)
        token_n = self.token_n[place_n]
        order = np.argsort(token_n, kind="stable")
        return Pool(place_n, place_n[order], token_n[order])


def split_documents(document_n: Ints, shares: tuple[float, float, float], seed: int, name: str) -> dict[int, int]:
    """Each document's part, an index into `PARTS`: a seeded permutation cut by the shares, at least one to each.

    Raises:
        DataError: there are fewer documents than parts.
    """
    document_k = np.unique(document_n)
    n = len(document_k)
    if n < len(PARTS):
        raise DataError(
            f"Corpus {name!r} has {n} document{'s' * (n != 1)} that count{'s' * (n == 1)}; labelling, testing and "
            "calibration need one each at least. Read more text."
        )
    first = min(max(round(n * shares[0]), 1), n - 2)
    second = min(max(round(n * (shares[0] + shares[1])), first + 1), n - 1)
    order = np.random.default_rng(seed).permutation(document_k).tolist()
    return {document: (at >= first) + (at >= second) for at, document in enumerate(order)}
