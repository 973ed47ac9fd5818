"""What a latent does on a text: how often, how strongly, and in which contexts.

The contexts are the strongest ones, and some from each of equal intervals between nothing and the strongest, because a
latent's top says little of what it does most of the time. Each context comes once in a group, for its strongest token
(sae-dashboard takes the strongest tokens, so that one text fills several places), and zeros are in no interval
(sae-dashboard draws most of its lowest interval from texts on which the latent is silent).

Shapes: `e` activations of the latent, `p` positions of a block, `c` contexts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sae_lens_gemma4.interp.firings import Firing

N_BINS = 50

Floats = npt.NDArray[np.float32]


class Histogram(NamedTuple):
    """Values in equal bins from the least to the greatest: the middle of each bin, and how many lie in it."""

    centres: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


class Context(NamedTuple):
    """One block of the corpus, as a latent sees it.

    Attributes:
        block: its number.
        position: where the token is that it was chosen for.
        value_p: the latent's activation at each position; 0 where masked.
    """

    block: int
    position: int
    value_p: Floats


class Group(NamedTuple):
    """Contexts whose chosen tokens have activations in `(low, high]`; of the strongest ones `low` is None.

    Attributes:
        share: of the tokens that count, those in the interval; None for the strongest ones.
    """

    low: float | None
    high: float
    share: float | None
    contexts: list[Context]


def histogram(values: npt.NDArray[np.floating], n_bins: int = N_BINS) -> Histogram:
    """Of values that are not empty. One value alone counts from 0."""
    low, high = float(values.min()), float(values.max())
    low = low if low < high else min(0.0, low)
    counts, edges = np.histogram(values.astype(np.float64), bins=n_bins, range=(low, high))
    return Histogram((edges[:-1] + edges[1:]) / 2, counts)


def strongest(firing: Firing, context_size: int, n: int) -> list[Context]:
    """The `n` contexts in which the latent is strongest, in that order; equals in the order of the text."""
    at_c = _strongest_of_each_block(firing, context_size)
    order = np.argsort(-firing.value_e[at_c], kind="stable")[:n]
    return contexts(firing, at_c[order], context_size)


def intervals(
    firing: Firing, context_size: int, n_tokens: int, n_intervals: int, n_each: int, rng: np.random.Generator
) -> Iterator[Group]:
    """Contexts drawn evenly from equal intervals of `(0, max]`, the highest interval first.

    A token is drawn among all that lie in the interval, again where its context is there already.

    Args:
        n_tokens: tokens of the text that count.
        n_each: contexts an interval, or all where there are fewer.
    """
    edges = np.linspace(0, firing.value_e.max(), n_intervals + 1)
    interval_e = np.searchsorted(edges, firing.value_e, side="left") - 1  # (low, high]
    for interval in reversed(range(n_intervals)):
        inside = np.flatnonzero(interval_e == interval)
        drawn = rng.permutation(inside)
        _, first = np.unique(firing.token_e[drawn] // context_size, return_index=True)
        chosen = drawn[np.sort(first)[:n_each]]
        low, high = edges[interval : interval + 2].tolist()
        yield Group(low, high, len(inside) / n_tokens, contexts(firing, chosen, context_size))


def contexts(firing: Firing, at_c: npt.NDArray[np.int64], context_size: int) -> list[Context]:
    """The blocks around some of a latent's activations, given by their numbers."""
    block_c, position_c = np.divmod(firing.token_e[at_c], context_size)
    low_c = np.searchsorted(firing.token_e, block_c * context_size)
    high_c = np.searchsorted(firing.token_e, (block_c + 1) * context_size)
    found = []
    for block, position, low, high in zip(*map(np.ndarray.tolist, (block_c, position_c, low_c, high_c)), strict=True):
        value_p = np.zeros(context_size, dtype=np.float32)
        value_p[firing.token_e[low:high] - block * context_size] = firing.value_e[low:high]
        found.append(Context(block, position, value_p))
    return found


def _strongest_of_each_block(firing: Firing, context_size: int) -> npt.NDArray[np.int64]:
    """For each block in which the latent fires, the number of its strongest activation, the first of equals."""
    block_e = firing.token_e // context_size
    order = np.lexsort((-firing.value_e, block_e))
    first = np.flatnonzero(np.diff(block_e[order], prepend=-1))
    return order[first]
