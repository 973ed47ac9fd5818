"""Labels dealt out anew, so that no latent has a text that it had before: what the floor of a test is made of.

Places alone do not do it. Many latents share a label ("punctuation"), and a latent that is dealt another's copy of its
own would be tested on its own label again, and lift the floor. So texts are dealt, compared without case and spaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

_SWAPS = 20
"""Tries to swap two, for each text."""


def dealt(texts: Sequence[str], rng: np.random.Generator) -> dict[int, int]:
    """By place, the place whose text it is dealt: another text, and each is dealt once.

    Where one text is more than half of all, places that have it are left out by `rng` until it is half; empty where
    there is one text only. Of distinct texts every derangement is equally likely, nearly.
    """
    keys = ["".join(text.casefold().split()) for text in texts]
    place_n = rng.permutation(len(keys)).tolist()
    counts = Counter(keys)
    most, n_most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    too_many = max(0, 2 * n_most - len(keys))
    left_out = {*[place for place in place_n if keys[place] == most][:too_many]}
    group = {key: number for number, key in enumerate(dict.fromkeys(keys[place] for place in place_n))}
    kept = sorted((place for place in place_n if place not in left_out), key=lambda place: group[keys[place]])
    if not kept:
        return {}
    # Side by side, a turn by the largest group takes every text out of its group. Swaps that keep this mix the rest.
    turn = min(n_most, len(kept) // 2)
    given = [*kept[turn:], *kept[:turn]]
    for i, j in rng.integers(len(kept), size=(_SWAPS * len(kept), 2)).tolist():
        if keys[kept[i]] != keys[given[j]] and keys[kept[j]] != keys[given[i]]:
            given[i], given[j] = given[j], given[i]
    return dict(sorted(zip(kept, given, strict=True)))
