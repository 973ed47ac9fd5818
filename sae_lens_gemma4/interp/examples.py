"""What a labeller is shown of a latent, and what labels are tested on: contexts in three parts, no document in two.

All of it comes from one pass over the text (`firings.py`); neither text nor model is read again. A context is a window
around the token where the latent is strongest in that document and block, so that one text comes once. Text that an
earlier part has too is passed over (`segments.py`).

*Positives*: the strongest, and some from each of equal intervals of activation, because a label that fits the top alone
says little of what the latent mostly does. *Negatives*, on which the latent is silent: near-misses, around tokens on
which it fires elsewhere, and random windows. Without near-misses, a label that names the token passes for one that
names the meaning. No two windows of a latent have a token in common: where there is no room, there are fewer negatives.

Shapes: `e` activations of a latent, `w` tokens of a window, `n` places (`block * context_size + position`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, DataError
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
from sae_lens_gemma4.interp.segments import PARTS, Ints, Segments, SplitWarning

__all__ = ["Activity", "ExampleSettings", "Examples", "Excerpt", "LatentExamples", "Part", "SplitWarning", "example_of"]

_NEAR_FROM, _NEAR_TOKENS, _NEAR_PLACES = 50, 5, 1000
"""Near-misses are looked for at the token ids that are the most frequent in the peaks of so many of the strongest
contexts: so many ids, and so many places of each, drawn where there are more."""
_LEAST_RUN = 8
"""Fewer tokens in a row are a phrase of any text."""
_CHUNK, _GAP = 256, 8
"""Latents that are held at once; and those between two that are read, which cost less than another reading."""


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How many contexts of each kind, how wide, and how documents are dealt out.

    Attributes:
        n_top, n_quantile: for labelling, the strongest contexts, and those from as many equal intervals of `(0, max]`.
        n_positive: of each other part: the strongest for the larger half, the rest from as many intervals.
        n_negative: of each part: near-misses for the smaller half, the rest random.
        window: tokens shown on each side of the strongest.
        labelling, held_out, calibration: shares of the tokens; documents are dealt out whole.
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

    @property
    def run(self) -> int:
        """So many tokens in a row are a repeat: more than a window has on one side, and 8 at least."""
        return max(self.window + 1, _LEAST_RUN)


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
        self.segments = Segments(corpus, settings.shares, settings.seed, settings.run)

    def of(self, indices: Iterable[int]) -> Iterator[LatentExamples]:
        """The contexts of these latents, in their order.

        Raises:
            ConfigError: there is no such latent, or one is asked for twice.
        """
        for index, firing in read_latents(self.firings, self.corpus, indices):
            yield self._latent(index, firing)

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
                f"None of the {len(asked)} latents asked for fires on the {self.corpus.n_tokens:,} tokens that were "
                "read. Read more text, or ask for others."
            )
        return found

    def facts(self) -> dict[str, Any]:
        """The settings, and how documents and tokens were dealt out: for a report.

        `repeated` tokens are among the `tokens` of their part, and no context was chosen for them; `run` says how many
        in a row make a repeat.
        """
        segments = self.segments
        dealt = list(segments.part_of.values())
        return {
            "settings": asdict(self.settings),
            "corpus": self.corpus.hash,
            "documents": {name: dealt.count(part) for part, name in enumerate(PARTS)},
            "tokens": dict(zip(PARTS, segments.tokens, strict=True)),
            "repeated": dict(zip(PARTS, segments.repeated, strict=True)),
            "run": self.settings.run,
        }

    def _latent(self, index: int, firing: Firing) -> LatentExamples:
        segments = self.segments
        segment_e = segments.segment_n[firing.token_e]
        scored_e = segments.part_s[segment_e] != PARTS.index("calibration")
        does = activity(firing.value_e[scored_e], sum(segments.tokens[:-1]))
        open_e = segments.open_n[firing.token_e]
        peaks = strongest_of_each(Firing(firing.token_e[open_e], firing.value_e[open_e]), segment_e[open_e])
        part_e = segments.part_s[segments.segment_n[peaks.token_e]]
        mine = (Firing(*(array_e[part_e == part] for array_e in peaks)) for part in range(len(PARTS)))
        labelling, held_out, calibration = (self._part(part, index, peak, firing) for part, peak in enumerate(mine))
        return LatentExamples(index, labelling, held_out, calibration, does)

    def _part(self, part: int, index: int, peaks: Firing, firing: Firing) -> Part:
        if not len(peaks.token_e):
            return Part([], [])
        s, rng = self.settings, np.random.default_rng((self.settings.seed, index, part))
        n_quantile = s.n_quantile if PARTS[part] == "labelling" else s.n_positive // 2
        n_top = s.n_top if PARTS[part] == "labelling" else s.n_positive - n_quantile
        order = np.argsort(-peaks.value_e, kind="stable")
        top, quantile = _positives(peaks, order, n_top, n_quantile, rng)
        # The strongest have the token ids that near-misses are looked for at.
        ids, first, counts = np.unique(
            self.segments.token_n[peaks.token_e[order[:_NEAR_FROM]]], return_index=True, return_counts=True
        )
        likely = ids[np.lexsort((first, -counts))][:_NEAR_TOKENS].tolist()
        pool, n = self.segments.pools[part], s.n_negative
        near = self._silent([*map(pool.of_token, likely)], n // 2, top + quantile, firing, rng, _NEAR_PLACES)
        random = self._silent([pool.place_n], n - len(near), top + quantile + near, firing, rng)
        kinds: dict[Kind, list[int]] = {"top": top, "quantile": quantile, "near_miss": near, "random": random}
        shown = list(self._excerpts(kinds, firing))
        n_positive = len(top) + len(quantile)
        return Part(shown[:n_positive], shown[n_positive:])

    def _silent(
        self,
        hands: Sequence[Ints],
        n: int,
        taken: Iterable[int],
        firing: Firing,
        rng: np.random.Generator,
        most: int | None = None,
    ) -> list[int]:
        """Up to `n` places in whose windows nothing fires, and of which none has a token of another's or of `taken`'s.

        They are drawn evenly from each hand, and dealt from the hands in turn: from a sample of so many places if that
        has enough of them, else from a larger one, at last from all or `most` of each hand.
        """
        found: list[int] = []
        few, reach = 4 * n + 16, self.settings.window
        for size in (few, most or 64 * few, *([] if most else [None])):
            drawn = [_sample(hand, size, rng) for hand in hands]
            low_n, end_n = self.segments.windows(np.concatenate(drawn), reach)
            silent_n = np.searchsorted(firing.token_e, low_n) == np.searchsorted(firing.token_e, end_n)
            ends = np.cumsum([len(hand) for hand in drawn])[:-1]
            silent = [rng.permutation(hand[kept]) for hand, kept in zip(drawn, np.split(silent_n, ends), strict=True)]
            found = self.segments.apart(dealt_in_turn([hand.tolist() for hand in silent]), reach, n, taken)
            if len(found) == n or (size is not None and all(len(hand) <= size for hand in hands)):
                break
        return found

    def _excerpts(self, kinds: dict[Kind, list[int]], firing: Firing) -> Iterator[Excerpt]:
        place_n, size = np.array([*chain(*kinds.values())], dtype=np.int64), self.corpus.context_size
        low_n, end_n = self.segments.windows(place_n, self.settings.window)
        bounds_n = np.searchsorted(firing.token_e, low_n), np.searchsorted(firing.token_e, end_n)
        document_n = self.segments.document_s[self.segments.segment_n[place_n]]
        columns = (low_n, end_n, *bounds_n, document_n, *np.divmod(place_n, size))
        kind_n = [kind for kind, places in kinds.items() for _ in places]
        for kind, low, end, first, last, document, block, position in zip(
            kind_n, *(column.tolist() for column in columns), strict=True
        ):
            value_w = np.zeros(end - low, dtype=np.float32)
            value_w[firing.token_e[first:last] - low] = firing.value_e[first:last]
            tokens_w = self.segments.token_n[low:end]
            yield Excerpt(block, position, low - block * size, document, tokens_w, value_w, kind)


def _positives(
    peaks: Firing, order: Ints, n_top: int, n_quantile: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Of a part's peaks the strongest, and others dealt from equal intervals of `(0, max]` in turn, the highest first.

    Args:
        order: of the peaks, the strongest first.
    """
    if not n_quantile:
        return peaks.token_e[order[:n_top]].tolist(), []
    edges = np.linspace(0, peaks.value_e[order[0]], n_quantile + 1)
    rest = rng.permutation(order[n_top:])
    interval_r = np.searchsorted(edges, peaks.value_e[rest], side="left")
    hands = [peaks.token_e[rest[interval_r == i][:n_quantile]].tolist() for i in range(n_quantile, 0, -1)]
    return peaks.token_e[order[:n_top]].tolist(), dealt_in_turn(hands)[:n_quantile]


def _sample(place_n: Ints, size: int | None, rng: np.random.Generator) -> Ints:
    """So many of them, drawn with replacement, or all where there are no more; ascending, for faster look-ups."""
    if size is None or len(place_n) <= size:
        return place_n
    return np.sort(place_n[rng.integers(len(place_n), size=size)])


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
    for first in range(0, len(asked), _CHUNK):
        chunk = asked[first : first + _CHUNK]
        found = dict(_near_each_other(firings, sorted(chunk)))
        for index in chunk:
            firing = found.pop(index)
            counts_e = keep_n[firing.token_e]
            yield index, firing if counts_e.all() else Firing(firing.token_e[counts_e], firing.value_e[counts_e])


def _near_each_other(firings: Firings, indices: list[int]) -> Iterator[tuple[int, Firing]]:
    """As `read_latents`, of ascending latents; those with few between them are read together."""
    breaks = np.flatnonzero(np.diff(indices) > _GAP) + 1
    for run in np.split(np.array(indices), breaks):
        read = firings.latents(int(run[0]), int(run[-1]) + 1)
        yield from ((index, read[index - int(run[0])]) for index in run.tolist())


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
