"""The two statistics that readings of latents share: a share, and a paired change of shares.

Each comes with its interval, because twenty-five questions answered of fifty say less than "50 %" does. Exact tests and
score intervals are scipy's; what scipy has not is written with its formula and source.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.stats import binomtest, norm

from sae_lens_gemma4.errors import DataError


class Share(NamedTuple):
    """`k` of `n`, with an interval; `value` is None of none."""

    k: int
    n: int
    value: float | None
    low: float | None
    high: float | None


class PairedChange(NamedTuple):
    """How answers to the same questions changed.

    Attributes:
        gained, lost: wrong before and right after, and the reverse.
        n: questions.
        change: (gained − lost) / n.
        low, high: its interval.
        p_value: McNemar's exact test, two-sided: whether gained and lost are equally likely.
    """

    gained: int
    lost: int
    n: int
    change: float
    low: float
    high: float
    p_value: float


def share(k: int, n: int, level: float = 0.95) -> Share:
    """A share with Wilson's score interval (Wilson 1927; scipy's `proportion_ci`)."""
    if n == 0:
        return Share(0, 0, None, None, None)
    interval = binomtest(k, n).proportion_ci(level, method="wilson")
    return Share(k, n, k / n, float(interval.low), float(interval.high))


def mcnemar(gained: int, lost: int, n: int, level: float = 0.95) -> PairedChange:
    """McNemar's exact test, and the interval of a paired difference by Bonett and Price (2012, "Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data"): one is added to both kinds of
    change, which makes it hold at samples of tens.

    Raises:
        DataError: there are no questions.
    """
    if n < 1:
        raise DataError("There is nothing to compare: no question was answered twice.")
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedChange(
        gained, lost, n, (gained - lost) / n, max(up - down - half, -1.0), min(up - down + half, 1.0), p_value
    )
