"""What a labeller is shown of a latent, and what labels are tested on: contexts in three parts, no document in two.

All of it comes from one pass over the text (`firings.py`); neither text nor model is read again. A context is a window
around the token where the latent is strongest in that document and block, so that one text comes once.

*Positives*: the strongest, and some from each of equal intervals of activation (`contexts.py`), because a label that
fits the top alone says little of what the latent mostly does. *Negatives*, on which the latent is silent: near-misses,
around tokens on which it fires elsewhere, and random windows. Without near-misses, a label that names the token passes
for one that names the meaning.

Shapes: `e` activations of a latent, `w` tokens of a window, `n` places (`block * context_size + position`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp.contexts import Context, intervals, strongest
from sae_lens_gemma4.interp.excerpts import (
    Activity,
    Excerpt,
    Kind,
    LatentExamples,
    Part,
    activity,
    example_of,
)
from sae_lens_gemma4.interp.firings import Firing, Firings
from sae_lens_gemma4.interp.segments import PARTS, Ints, Segments

__all__ = ["Activity", "ExampleSettings", "Examples", "Excerpt", "LatentExamples", "Part", "example_of"]

_NEAR_FROM, _NEAR_TOKENS, _NEAR_PLACES = 50, 5, 1000
"""Near-misses are looked for at the token ids that are the most frequent in the peaks of so many of the strongest
contexts: so many ids, and so many places of each, drawn where there are more."""
_RUN = 256
"""Latents that are read at once."""


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How many contexts of each kind, how wide, and how documents are dealt out.

    Attributes:
        n_top, n_quantile: for labelling, the strongest contexts, and those from as many equal intervals of `(0, max]`.
        n_positive: of each other part: the strongest for the larger half, the rest from as many intervals.
        n_negative: of each part: near-misses for the smaller half, the rest random.
        window: tokens shown on each side of the strongest.
        labelling, held_out, calibration: shares of the documents.
        seed: of what is drawn.

    Raises:
        ConfigError: a number that makes no examples.
    """

    n_top: int = 10
    n_quantile: int = 10
    n_positive: int = 20
    n_negative: int = 20
    window: int = 16
    labelling: float = 0.5
    held_out: float = 0.25
    calibration: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"n_top": 1, "n_positive": 1, "n_negative": 1}
        for name in (f.name for f in fields(self) if f.name not in PARTS):
            value = getattr(self, name)
            if type(value) is not int or value < least.get(name, 0):
                raise ConfigError(f"{name} must be an integer of at least {least.get(name, 0)}, not {value!r}.")
        if not all(share > 0 for share in self.shares) or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise ConfigError(f"The shares of {', '.join(PARTS)} must be positive and sum to 1, not {self.shares}.")

    @property
    def shares(self) -> tuple[float, float, float]:
        """In the order of `segments.PARTS`."""
        return self.labelling, self.held_out, self.calibration


class Examples:
    """Contexts of any latents, from what a pass has left. What is drawn for a latent depends on the seed and its index
    alone, not on which others are asked for.

    Raises:
        DataError: the activations are not those of this corpus, or the pass did not come to its end, or there are
            fewer than three documents.
    """

    def __init__(self, firings: Firings, corpus: Corpus, settings: ExampleSettings) -> None:
        check_corpus(firings, corpus)
        self.firings, self.corpus, self.settings = firings, corpus, settings
        self.segments = Segments(corpus, settings.shares, settings.seed)
        self.n_tokens = corpus.n_tokens

    def of(self, indices: Iterable[int]) -> Iterator[LatentExamples]:
        """The contexts of these latents, in their order.

        Raises:
            ConfigError: there is no such latent, or one is asked for twice.
        """
        for index, firing in read_latents(self.firings, self.corpus, indices):
            labelling, held_out, calibration = (self._part(part, index, firing) for part in range(len(PARTS)))
            yield LatentExamples(index, labelling, held_out, calibration, activity(firing, self.n_tokens))

    def require(self, indices: Iterable[int]) -> list[int]:
        """Those of the latents that fire anywhere.

        Raises:
            ConfigError: as `of`.
            DataError: none of them does.
        """
        asked = list(indices)
        found = [index for index, firing in read_latents(self.firings, self.corpus, asked) if len(firing.token_e)]
        if not found:
            raise DataError(
                f"None of the {len(asked)} latents asked for fires on the {self.n_tokens:,} tokens that were read. "
                "Read more text, or ask for others."
            )
        return found

    def facts(self) -> dict[str, Any]:
        """The settings, and how documents and tokens were dealt out: for a report."""
        part_of = self.segments.part_of
        return {
            "settings": asdict(self.settings),
            "corpus": self.corpus.hash,
            "documents": {name: sum(p == part for p in part_of.values()) for part, name in enumerate(PARTS)},
            "tokens": {name: len(pool.place_n) for name, pool in zip(PARTS, self.segments.pools, strict=True)},
        }

    def _part(self, part: int, index: int, firing: Firing) -> Part:
        s, rng = self.settings, np.random.default_rng((self.settings.seed, index, part))
        segment_e = self.segments.of_places(firing.token_e)
        inside_e = self.segments.part_s[segment_e] == part
        peaks = strongest_of_each(Firing(firing.token_e[inside_e], firing.value_e[inside_e]), segment_e[inside_e])
        if not len(peaks.token_e):
            return Part([], [])
        n_quantile = s.n_quantile if PARTS[part] == "labelling" else s.n_positive // 2
        n_top = s.n_top if PARTS[part] == "labelling" else s.n_positive - n_quantile
        top, quantile = self._positives(peaks, n_top, n_quantile, rng)
        near, random = self._negatives(part, peaks, firing, rng)
        return Part(
            [*self._excerpts(top, firing, "top"), *self._excerpts(quantile, firing, "quantile")],
            [*self._excerpts(near, firing, "near_miss"), *self._excerpts(random, firing, "random")],
        )

    def _positives(
        self, peaks: Firing, n_top: int, n_quantile: int, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Of a part's peaks the strongest, and others dealt from equal intervals in turn, the highest first."""
        size, segments = self.corpus.context_size, self.segments
        segment_e = segments.of_places(peaks.token_e)
        numbered = Firing(segment_e * size + peaks.token_e % size, peaks.value_e)  # segments as blocks

        def place(context: Context) -> int:
            return int(segments.first_s[context.block]) // size * size + context.position

        top = [place(context) for context in strongest(numbered, size, n_top)]
        n_each = n_top + n_quantile  # some are among the strongest
        groups = intervals(numbered, size, self.n_tokens, n_quantile, n_each, rng) if n_quantile else ()
        dealt = dealt_in_turn([[place(context) for context in group.contexts] for group in groups])
        return top, [at for at in dealt if at not in top][:n_quantile]

    def _negatives(
        self, part: int, peaks: Firing, firing: Firing, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Near-misses and random ones. No chosen token lies in another's window."""
        n, pool = self.settings.n_negative, self.segments.pools[part]
        order = np.argsort(-peaks.value_e, kind="stable")[:_NEAR_FROM]
        ids, first, counts = np.unique(
            self.segments.token_n[peaks.token_e[order]], return_index=True, return_counts=True
        )
        likely = ids[np.lexsort((first, -counts))][:_NEAR_TOKENS].tolist()
        found = []
        for place_n in map(pool.of_token, likely):
            if len(place_n) > _NEAR_PLACES:
                place_n = np.sort(rng.choice(place_n, _NEAR_PLACES, replace=False))
            found.append(self._silent(place_n, n // 2, [], firing, rng))
        near = self._apart(dealt_in_turn(found), n // 2, [])
        return near, self._silent(pool.place_n, n - len(near), near, firing, rng)

    def _silent(self, place_n: Ints, n: int, taken: list[int], firing: Firing, rng: np.random.Generator) -> list[int]:
        """Up to `n` of the places, drawn evenly from those in whose window nothing fires: from a sample if that has
        enough of them, else from a larger one, else from all. `place_n` is ascending."""
        found: list[int] = []
        few = 4 * n + 16
        for sample in (few, 64 * few, None):
            if sample is not None and len(place_n) <= 4 * sample:
                continue
            candidate_n = place_n if sample is None else place_n[rng.integers(len(place_n), size=sample)]
            low_n, end_n = self.segments.windows(candidate_n, self.settings.window)
            silent_n = np.searchsorted(firing.token_e, low_n) == np.searchsorted(firing.token_e, end_n)
            silent = candidate_n[silent_n]
            found = self._apart((rng.permutation(silent) if sample is None else silent).tolist(), n, taken)
            if len(found) == n:
                break
        return found

    def _apart(self, places: Iterable[int], n: int, taken: list[int]) -> list[int]:
        found: list[int] = []
        for place in places:
            if len(found) == n:
                break
            if all(abs(place - other) > self.settings.window for other in chain(found, taken)):
                found.append(place)
        return found

    def _excerpts(self, places: list[int], firing: Firing, kind: Kind) -> Iterator[Excerpt]:
        place_n, size = np.array(places, dtype=np.int64), self.corpus.context_size
        low_n, end_n = self.segments.windows(place_n, self.settings.window)
        bounds_n = np.searchsorted(firing.token_e, low_n), np.searchsorted(firing.token_e, end_n)
        document_n = self.segments.document_s[self.segments.of_places(place_n)]
        for place, low, end, first, last, document in zip(
            places, low_n.tolist(), end_n.tolist(), *(b.tolist() for b in bounds_n), document_n.tolist(), strict=True
        ):
            value_w = np.zeros(end - low, dtype=np.float32)
            value_w[firing.token_e[first:last] - low] = firing.value_e[first:last]
            block, position = divmod(place, size)
            tokens_w = self.segments.token_n[low:end]
            yield Excerpt(block, position, low - block * size, document, tokens_w, value_w, kind)


def check_corpus(firings: Firings, corpus: Corpus) -> None:
    """Raise `DataError` if the activations are not those of this corpus, or of a part of it only."""
    there = firings.n_blocks, firings.context_size
    if there != (corpus.n_blocks, corpus.context_size):
        raise DataError(
            f"{firings.folder} holds the activations of {there[0]} blocks of {there[1]} tokens, and corpus "
            f"{corpus.name!r} has {corpus.n_blocks} of {corpus.context_size}. Finish the pass over this corpus first."
        )
    if (read := int(firings.sums.get("n", corpus.n_tokens))) != corpus.n_tokens:
        raise DataError(
            f"{firings.folder} was made of {read:,} tokens that count, and corpus {corpus.name!r} has "
            f"{corpus.n_tokens:,}. Take the corpus that the pass was over."
        )


def read_latents(firings: Firings, corpus: Corpus, indices: Iterable[int]) -> Iterator[tuple[int, Firing]]:
    """The activations of these latents on tokens that count, in their order; neighbours are read together.

    Raises:
        ConfigError: there is no such latent, or one is asked for twice.
    """
    asked = list(indices)
    for index in asked:
        if not 0 <= index < firings.d_sae:
            raise ConfigError(f"There is no latent {index}: the SAE has {firings.d_sae}, from 0 on.")
    if len(set(asked)) < len(asked):
        raise ConfigError(f"Latent {next(i for i in asked if asked.count(i) > 1)} is asked for twice.")
    keep_n = corpus.keep_bp.flatten().numpy()
    first = 0
    while first < len(asked):
        end = first + 1
        while end < min(len(asked), first + _RUN) and asked[end] == asked[end - 1] + 1:
            end += 1
        for index, firing in zip(asked[first:end], firings.latents(asked[first], asked[end - 1] + 1), strict=True):
            counts_e = keep_n[firing.token_e]
            yield index, firing if counts_e.all() else Firing(firing.token_e[counts_e], firing.value_e[counts_e])
        first = end


def strongest_of_each(firing: Firing, group_e: Ints) -> Firing:
    """Of each run of equal `group_e` the strongest activation, the first of equals."""
    opens = np.flatnonzero(np.diff(group_e, prepend=-1))
    if not len(opens):
        return firing
    highest_e = np.repeat(np.maximum.reduceat(firing.value_e, opens), np.diff(opens, append=len(group_e)))
    at = np.flatnonzero(firing.value_e == highest_e)
    at = at[np.flatnonzero(np.diff(group_e[at], prepend=-1))]
    return Firing(firing.token_e[at], firing.value_e[at])


def dealt_in_turn(hands: list[list[int]]) -> list[int]:
    """The first of each, then the second of each, and so on, without repeats."""
    rounds = chain.from_iterable(zip_longest(*hands))
    return list(dict.fromkeys(place for place in rounds if place is not None))
