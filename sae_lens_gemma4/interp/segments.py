"""Where the documents of a corpus lie, which of three parts each belongs to, and what of a part is no new text.

A label that was made from a text and tested on the same text passes for what it remembers. So whole documents are
given to one part each, for all latents: contexts of one document resemble each other, and of two blocks that share one
the second is no new text. Blocks hold several documents; what is shown of one must not run over into the next, whose
part may be another. A segment is one document's tokens in one block, and everything shown lies in one segment.

Documents repeat each other: licences, boilerplate, quotations. A token is repeated if it is in a run of so many tokens
that a document of an earlier part has too, in the order of `PARTS`; no context is chosen for it. Where a window has
fewer tokens than a run on each side of the one it was chosen for, it then shares no run with an earlier part. Text that
was changed every few words is not found.

Shapes: `s` segments, `k` documents, `n` places, `t` tokens of documents, `g` runs. A place is
`block * context_size + position`.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import CatalogueWarning, DataError, warn_caller

PARTS = ("labelling", "held_out", "calibration")

_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it loses bits of 64

Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


class SplitWarning(CatalogueWarning):
    """A part of the text has much less of it than its share."""


class Pool(NamedTuple):
    """The places of one part that a context may be chosen for, in the order of the text, and once more by token id."""

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
        shares: of the tokens, how many go to each of `PARTS`; documents are dealt whole, so nearly.
        seed: of the order in which documents are dealt out.
        run: so many tokens in a row are a repeat where an earlier part has them too.

    Attributes:
        segment_n: the segment of each place; with those of padding, they tile the corpus.
        start_s, end_s: what may be shown of it: without a first token that does not count, which is BOS.
        document_s: its document's number; -1 for padding.
        part_s: index into `PARTS`; -1 for padding, and for documents of which no token counts.
        part_of: the part of each document, by number.
        tokens: of each part, how many count.
        repeated: of each part, how many of these are repeated.
        open_n: whether a context may be chosen for the place: its token counts and is not repeated.
        pools: of each part, these places.

    Raises:
        DataError: fewer than three documents count.
    """

    def __init__(self, corpus: Corpus, shares: tuple[float, float, float], seed: int, run: int) -> None:
        self.token_n, keep_n = corpus.tokens_bp.flatten().numpy(), corpus.keep_bp.flatten().numpy()
        document_n = corpus.document_bp.flatten().numpy()
        opens_n = np.diff(document_n, prepend=document_n[0] - 1) != 0
        opens_n[:: corpus.context_size] = True
        first_s = np.flatnonzero(opens_n)
        self.segment_n = np.cumsum(opens_n, dtype=np.int32) - 1
        self.end_s = np.append(first_s[1:], len(document_n))
        self.start_s = first_s + ~keep_n[first_s]
        self.document_s = document_n[first_s]
        self.part_of = split_documents(document_n[keep_n & (document_n >= 0)], shares, seed, corpus.name)
        self.part_s = np.array([self.part_of.get(d, -1) for d in self.document_s.tolist()], dtype=np.int8)
        part_n = self.part_s[self.segment_n]
        shown_n = (part_n >= 0) & (~opens_n | keep_n)
        repeated_n = np.zeros(len(keep_n), dtype=bool)
        place_t = np.flatnonzero(shown_n)
        place_t = place_t[np.argsort(document_n[place_t], kind="stable")]
        repeated_n[place_t] = repeated(self.token_n[place_t], document_n[place_t], part_n[place_t], run)
        self.open_n = keep_n & (part_n >= 0) & ~repeated_n
        self.tokens = [int((keep_n & (part_n == part)).sum()) for part in range(len(PARTS))]
        self.pools = [self._pool(np.flatnonzero(self.open_n & (part_n == part))) for part in range(len(PARTS))]
        self.repeated = [n - len(pool.place_n) for n, pool in zip(self.tokens, self.pools, strict=True)]
        self._warn_of_small(shares, corpus.name)

    def windows(self, place_n: Ints, reach: int) -> tuple[Ints, Ints]:
        """From where to where (not included) so many tokens on each side go, cut at the segment's ends."""
        segment_n = self.segment_n[place_n]
        low_n = np.maximum(place_n - reach, self.start_s[segment_n])
        return low_n, np.minimum(place_n + reach + 1, self.end_s[segment_n])

    def apart(self, places: list[int], reach: int, n: int, taken: Iterable[int]) -> list[int]:
        """The first `n` places whose windows have no token in common with each other's or with those of `taken`."""

        def spread(places: list[int]) -> list[int]:
            """Places of two segments are further from each other than two windows reach."""
            place_n = np.array(places, dtype=np.int64)
            spread_n: list[int] = (place_n + 2 * reach * self.segment_n[place_n]).tolist()
            return spread_n

        found: list[int] = []
        there = sorted(spread(list(taken)))
        for place, at in zip(places, spread(places), strict=True):
            if len(found) == n:
                break
            i = bisect(there, at)
            if (i == 0 or at - there[i - 1] > 2 * reach) and (i == len(there) or there[i] - at > 2 * reach):
                there.insert(i, at)
                found.append(place)
        return found

    def _pool(self, place_n: Ints) -> Pool:
        if len(self.token_n) <= np.iinfo(np.int32).max:
            place_n = place_n.astype(np.int32)
        token_n = self.token_n[place_n]
        order = np.argsort(token_n, kind="stable")
        return Pool(place_n, place_n[order], token_n[order])

    def _warn_of_small(self, shares: tuple[float, float, float], name: str) -> None:
        total = sum(self.tokens)
        small = [
            f"{part} {n - again:,} tokens, not {share * total:,.0f}" + f" ({again:,} are repeats)" * (again > 0)
            for part, share, n, again in zip(PARTS, shares, self.tokens, self.repeated, strict=True)
            if n - again < share * total / 2
        ]
        if small:
            warn_caller(
                f"Of corpus {name!r}, less than half of a part's share is left for it: {'; '.join(small)}. Documents "
                "are dealt out whole, and what an earlier part has too is left out. Read more text, or shorter "
                "documents.",
                SplitWarning,
            )


def split_documents(document_n: Ints, shares: tuple[float, float, float], seed: int, name: str) -> dict[int, int]:
    """Each document's part, an index into `PARTS`: in a seeded order, each goes to the part that lacks most tokens.

    Which part lacks most goes by what it has as a share of what it is to have; the larger is served first where equals
    lack as much. So the first three documents go to three parts.

    Args:
        document_n: the document's number of each token that counts.

    Raises:
        DataError: there are fewer documents than parts.
    """
    document_k, size_k = np.unique(document_n, return_counts=True)
    n = len(document_k)
    if n < len(PARTS):
        raise DataError(
            f"Corpus {name!r} has {n} document{'s' * (n != 1)} that count{'s' * (n == 1)}; labelling, testing and "
            "calibration need one each at least. Read more text."
        )
    has, part_of = [0.0] * len(PARTS), {}
    for k in np.random.default_rng(seed).permutation(n):
        part = min(range(len(PARTS)), key=lambda part: (has[part], -shares[part]))
        has[part] += size_k[k] / shares[part]
        part_of[int(document_k[k])] = part
    return part_of


def repeated(token_t: Ints, document_t: Ints, part_t: Ints, run: int) -> Bools:
    """Whether each token is in a run of so many that a document of an earlier part has too.

    A document that is shorter is one run, which another has only if it is the same. Runs are compared by polynomial
    hashes of 64 bits, of random numbers for the tokens: of two that differ, about one pair in 10¹⁹ is taken for equal.

    Args:
        document_t: each document's tokens lie together, in the order of the text.
    """
    first_k = np.flatnonzero(np.diff(document_t, prepend=document_t[:1] - 1))
    size_k = np.diff(first_k, append=len(document_t))
    length_k = np.minimum(size_k, run)
    runs_k = size_k - length_k + 1
    start_g = np.arange(runs_k.sum()) + np.repeat(first_k - (np.cumsum(runs_k) - runs_k), runs_k)
    end_g = start_g + np.repeat(length_k, runs_k)
    part_g, hash_g = part_t[start_g], _hashes(token_t, start_g, end_g)
    order = np.argsort(hash_g)
    opens = np.flatnonzero(np.diff(hash_g[order], prepend=~hash_g[order[0]]))
    earliest = np.repeat(np.minimum.reduceat(part_g[order], opens), np.diff(opens, append=len(order)))
    again = order[earliest < part_g[order]]
    depth_t = np.bincount(start_g[again], minlength=len(token_t) + 1)
    depth_t -= np.bincount(end_g[again], minlength=len(token_t) + 1)
    return np.cumsum(depth_t)[:-1] > 0


def _hashes(token_t: Ints, start_g: Ints, end_g: Ints) -> npt.NDArray[np.uint64]:
    """Σ r(token) · base^(i - start + t - 1) mod 2⁶⁴ over the tokens i of each run, of t in all."""
    random_v = np.random.default_rng(0).integers(2**64, size=int(token_t.max()) + 1, dtype=np.uint64)
    power_t = np.full(len(token_t), _BASE, dtype=np.uint64)
    power_t[0] = 1
    np.cumprod(power_t, out=power_t)
    sum_t = np.zeros(len(token_t) + 1, dtype=np.uint64)
    np.cumsum(random_v[token_t] * power_t, out=sum_t[1:])
    hash_g: npt.NDArray[np.uint64] = (sum_t[end_g] - sum_t[start_g]) * power_t[len(token_t) - 1 - start_g]
    return hash_g
