"""What a confidence of .8 means: how often labels with such a score are confirmed on contexts that nobody used.

The score is made of held-out contexts, so what it is worth shows only on others: the `calibration` part, whose
documents neither labellers nor tests nor probes have seen. Were the score the probability that a label holds, the share
confirmed in each bin would be the bin's mean score; the expected calibration error is how far off it is.

Each component has a table of its own. One that does not go with the confirmations adds nothing but a number to the
score, whatever its weight; a component without variation, as probe accuracies that are all near 1, cannot go with
anything, and is said to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp.labels.confidence import COMPONENTS, Confidence
from sae_lens_gemma4.interp.labels.detection import LabelTest
from sae_lens_gemma4.interp.labels.verification import Verification
from sae_lens_gemma4.interp.means import plain
from sae_lens_gemma4.interp.statistics import Share, share

_FEWEST = 3
"""With two latents a rank correlation is 1 or −1."""


class Bin(NamedTuple):
    """Scores in [low, high), of the last one in [low, high]; `mean_score` is None where there are none."""

    low: float
    high: float
    mean_score: float | None
    confirmed: Share


class Rank(NamedTuple):
    """Spearman's correlation of a score and F1 on the calibration contexts, two-sided."""

    rho: float
    p_value: float
    n: int


class Table(NamedTuple):
    """One score against the confirmations.

    Attributes:
        error: expected calibration error: |mean score − share confirmed| of the bins, weighed by their labels.
        rank: None where there is no correlation; `no_rank` says why.
    """

    bins: tuple[Bin, ...]
    n: int
    mean_score: float
    confirmed: Share
    error: float
    rank: Rank | None
    no_rank: str | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The score's table, and each component's that any label has.

    Attributes:
        left_out: labels without a score, or not tested on the calibration contexts.
    """

    score: Table
    components: Mapping[str, Table]
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "kind": "calibration",
            "score": plain(self.score),
            "components": plain(dict(self.components)),
            "left_out": self.left_out,
        }


def calibrate(scores: Mapping[int, Confidence], further: Verification, n_bins: int = 5) -> Calibration:
    """Hold scores against tests on further contexts: of the first judge's labels, which the scores are of.

    Args:
        further: `verify_labels(..., part="calibration")`.
        n_bins: of equal width, between 0 and 1.

    Raises:
        ConfigError: no bins; or the tests are on contexts that made the score.
        DataError: no label has both a score and a test.
    """
    if n_bins < 1:
        raise ConfigError(f"n_bins must be 1 or more, not {n_bins}.")
    if further.part != "calibration":
        raise ConfigError(
            f"The tests are on the {further.part} contexts, which made the score: verify on the calibration part."
        )
    tests = next(iter(further.by_judge.values())).tests
    both = [(scores[index], test) for index, test in tests.items() if index in scores]
    scored = [(s.score, test) for s, test in both if s.score is not None]
    if not scored:
        raise DataError(
            f"No label has both a score and a test on the calibration contexts: {len(scores)} labels, of which "
            f"{sum(s.score is not None for s in scores.values())} have a score and {len(tests)} a test."
        )
    components = {}
    for name in COMPONENTS:
        known = [(value, test) for s, test in both if (value := getattr(s.components, name)) is not None]
        if known:
            components[name] = table(known, n_bins)
    return Calibration(score=table(scored, n_bins), components=components, left_out=len(scores) - len(scored))


def table(pairs: Sequence[tuple[float, LabelTest]], n_bins: int) -> Table:
    """Of scores between 0 and 1, at least one, and the same labels' tests."""
    score_n = np.array([score for score, _ in pairs])
    confirmed_n = np.array([test.confirmed for _, test in pairs])
    f1_n = np.array([test.f1 for _, test in pairs])
    edges = np.round(np.linspace(0, 1, n_bins + 1), 9)  # as the scores are: .6000…01 of either is .6
    bin_n = np.clip(np.searchsorted(edges, np.round(score_n, 9), side="right") - 1, 0, n_bins - 1)
    bins, error = [], 0.0
    for number in range(n_bins):
        inside = bin_n == number
        n, k = int(inside.sum()), int(confirmed_n[inside].sum())
        mean = float(score_n[inside].mean()) if n else None
        bins.append(Bin(float(edges[number]), float(edges[number + 1]), mean, share(k, n)))
        error += 0.0 if mean is None else n / len(pairs) * abs(mean - k / n)
    rank, no_rank = None, None
    if len(pairs) < _FEWEST:
        no_rank = f"{len(pairs)} labels are too few"
    elif np.ptp(score_n) == 0:
        no_rank = f"it is {score_n[0]:g} for every label"
    elif np.ptp(f1_n) == 0:
        no_rank = f"F1 on the calibration contexts is {f1_n[0]:g} for every label"
    else:
        found = spearmanr(score_n, f1_n)
        rank = Rank(float(found.statistic), float(found.pvalue), len(pairs))
    whole = share(int(confirmed_n.sum()), len(pairs))
    return Table(tuple(bins), len(pairs), float(score_n.mean()), whole, error, rank, no_rank)
