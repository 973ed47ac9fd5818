"""How sure a figure is: bootstrap over documents.

Tokens of one document go together, so documents are what is drawn. Every figure of a set of tokens is computed on the
same draws, and so are the figures of another SAE on the same tokens: their differences are paired.

Intervals are bias-corrected and accelerated (BCa; Efron 1987): resamples hold fewer different documents than there are,
which shrinks variances and with them VE, and BCa takes that out. They assume that documents were drawn independently,
and enough of them to show the tails: with most of the error on a token in a million, no interval made of these
documents tells of the next million. `recipes/interval_cover.py` measures how often they hold the truth.

Shapes: `b` draws, `k` documents, `r` = b + k rows of weights: the draws, then all documents but one, for each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from sae_lens_gemma4.errors import ConfigError

Interval = tuple[float, float]
Key = Hashable
MAX_CLUSTERS = 1024
"""Documents beyond so many are drawn in groups of neighbours: memory stays bounded, intervals stay valid."""
MIN_DOCUMENTS, MIN_RESAMPLES = 8, 100
"""With fewer there is no interval: it would hold much less than it says, and of fewer draws each end is one or two."""
_NORMAL = NormalDist()
_SMALLEST = 1e-6
_DEFINED = 0.95
"""Where a figure is undefined on more resamples than this leaves, it has no interval."""


class Estimate(float):
    """A float that may know its interval.

    Attributes:
        interval: (low, high), or None where there were too few documents or draws for one.
    """

    interval: Interval | None

    def __new__(cls, value: float, interval: Interval | None = None) -> Estimate:
        new = super().__new__(cls, value)
        new.interval = interval
        return new

    def __reduce__(self) -> tuple[type[Estimate], tuple[float, Interval | None]]:
        return Estimate, (float(self), self.interval)


@dataclass(frozen=True)
class Sampling:
    """How intervals are made: `resamples` draws of documents by `seed`, at `level`; none below `MIN_RESAMPLES`."""

    resamples: int = 1000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 0 or self.seed < 0 or not 0 < self.level < 1:
            raise ConfigError(f"resamples and seed must not be negative, level between 0 and 1, unlike {self}.")

    def weights(self, n_documents: int) -> torch.Tensor | None:
        """How often each document is taken, float64 `[r, k]`; None where there are too few documents or draws.

        `resamples` rows of one multinomial, by `seed`, and one row for each document, with all but that one.
        """
        if n_documents < MIN_DOCUMENTS or self.resamples < MIN_RESAMPLES:
            return None
        generator = np.random.default_rng(self.seed)
        drawn = generator.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=self.resamples)
        return torch.from_numpy(np.concatenate([drawn, 1 - np.eye(n_documents)])).double()

    def interval(self, value: float, replicates_r: torch.Tensor) -> Interval | None:
        """The interval of a figure from its values on the rows of `weights`; None where too few are defined."""
        drawn, without = replicates_r[: self.resamples].cpu().numpy(), replicates_r[self.resamples :].cpu().numpy()
        drawn, defined_share = drawn[np.isfinite(drawn)], np.isfinite(drawn).mean()
        if not math.isfinite(value) or defined_share < _DEFINED:
            return None
        below = (drawn < value).sum() + 0.5 * (drawn == value).sum()
        bias = _NORMAL.inv_cdf(float((below + 0.5) / (len(drawn) + 1)))
        without = without[np.isfinite(without)]
        spread = without.mean() - without if len(without) else np.zeros(1)
        variance = float((spread**2).sum())
        acceleration = float((spread**3).sum()) / (6 * variance**1.5) if variance > 0 else 0.0
        ends = []
        for tail in ((1 - self.level) / 2, (1 + self.level) / 2):
            z = bias + _NORMAL.inv_cdf(tail)
            ends.append(_NORMAL.cdf(bias + z / max(1 - acceleration * z, _SMALLEST)))
        low, high = np.quantile(drawn, ends)
        return float(low), float(high)


def clusters(n_documents: int) -> torch.Tensor:
    """The group of each of so many documents `[k]`: one of its own, or, beyond `MAX_CLUSTERS`, with its neighbours."""
    return torch.arange(n_documents) * min(n_documents, MAX_CLUSTERS) // max(n_documents, 1)


def paired_difference(
    before: Mapping[Key, float | None],
    after: Mapping[Key, float | None],
    replicates_before: Mapping[Key, torch.Tensor],
    replicates_after: Mapping[Key, torch.Tensor],
    sampling: Sampling,
) -> dict[Key, Estimate | None]:
    """after − before for every figure that both have; both sets of replicates come from the same weights."""
    differences: dict[Key, Estimate | None] = {}
    for key in before:
        old, new = before[key], after.get(key)
        if old is None or new is None or not math.isfinite(new - old):
            differences[key] = None
            continue
        interval = None
        if key in replicates_before and key in replicates_after:
            paired_r = replicates_after[key] - replicates_before[key]
            interval = sampling.interval(new - old, paired_r)
        differences[key] = Estimate(new - old, interval)
    return differences
