"""Tests on right and wrong answers of the same items under several conditions, and what they could have shown.

Items are what was drawn, so an item has one say: its mean difference between what is compared. Under the null the
difference is as likely to be turned round, and the test flips signs over items. Permuting an item's answers over the
conditions would be wrong here: all pushes change the same borderline items, so an item's answers under five of them are
no five answers, and where gains and losses balance such a test with five directions finds an effect in a third of runs
(the tests have the figure).

Directions are drawn too, where something is said of pushes whatever their direction: `crossed` has both as drawn. By
items alone, eight directions that each do something, 7.6 points of standard deviation about a mean of nothing, are an
effect of "any push" in a fifth of runs and more (the tests have these figures as well).

Shapes: `n` items, `k` other conditions, `c` all conditions, `u` directions, `r` draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binom
from scipy.stats import t as student_t

from sae_lens_gemma4.interp.steering.effects import Bools

Floats = npt.NDArray[np.float64]
_TIE = 1e-9
_CELLS = 2**20


class Detectable(NamedTuple):
    """What a paired comparison of `n` items could have shown.

    Attributes:
        discordant: items answered differently under the two conditions, as observed (rounded).
        alpha: the level of the strictest step.
        fewest: changed answers, all of them one way, below which nothing could be found.
        net: the smallest net change that is found at `discordant`; None if there is none.
        change: the smallest true change of accuracy that is found with probability `power` when as many answers (or
            as many as the change itself needs) differ; None if even the largest is not.
    """

    n: int
    discordant: int
    alpha: float
    fewest: int
    net: int | None
    change: float | None
    power: float


def against(chosen_n: Bools, others_nk: Bools) -> float:
    """Two-sided p that the chosen condition has as many right answers as the others on average.

    Sign flips over items of chosen − mean of others, all 2^n of them: the differences are whole numbers of 1 / k, so
    the distribution of their sum is a product of two-point ones. With one other this is McNemar's exact test.
    """
    k = others_nk.shape[1]
    step_n = k * chosen_n.astype(np.int64) - others_nk.sum(axis=1)
    pmf: Floats = np.ones(1)  # of the sum of ±step, at every other whole number from −reach to reach
    for step in np.abs(step_n[step_n != 0]).tolist():
        wider = np.zeros(len(pmf) + step)
        wider[: len(pmf)] += pmf / 2
        wider[step:] += pmf / 2
        pmf = wider
    sums = 2 * np.arange(len(pmf)) - (len(pmf) - 1)
    return float(min(pmf[np.abs(sums) >= abs(int(step_n.sum()))].sum(), 1.0))


def trend(right_nc: Bools, dose_c: Floats, permutations: int, seed: int) -> tuple[float, float]:
    """The slope of accuracy over dose, and its two-sided p by drawn sign flips of the items' own slopes.

    p is (1 + as extreme) / (1 + draws).
    """
    weight_c = dose_c - dose_c.mean()
    squares = float((weight_c**2).sum())
    if squares == 0:
        return 0.0, 1.0
    slope_n: Floats = right_nc @ weight_c / squares
    observed = abs(float(slope_n.sum())) - _TIE
    changing_m = slope_n[np.abs(slope_n) > _TIE]
    rng = np.random.default_rng(seed)
    extreme, size = 0, max(1, _CELLS // max(len(changing_m), 1))
    for first in range(0, permutations, size):
        signs_rm = rng.integers(0, 2, (min(size, permutations - first), len(changing_m)), dtype=np.int8)
        extreme += int((np.abs((2.0 * signs_rm - 1) @ changing_m) >= observed).sum())
    return float(slope_n.mean()), (1 + extreme) / (1 + permutations)


def crossed(change_nu: Floats) -> tuple[float, float]:
    """The mean change, and its two-sided p where both the items and the directions are a sample.

    Clark's min F′ (1973, "The language-as-fixed-effect fallacy", J. Verbal Learning and Verbal Behavior 12, 335–359),
    as a t: the mean's variance is that over items and that over directions together, its degrees of freedom are
    Satterthwaite's. What is neither's is counted twice, which errs on the side of no effect.
    """
    n, u = change_nu.shape
    mean = float(change_nu.mean())
    of_items = max(float(change_nu.mean(axis=1).var(ddof=1)) / n, 1 / n**2)  # one item is the least there is
    of_directions = float(change_nu.mean(axis=0).var(ddof=1)) / u
    variance = of_items + of_directions
    freedom = variance**2 / (of_items**2 / (n - 1) + of_directions**2 / (u - 1))
    return mean, float(2 * student_t.sf(abs(mean) / math.sqrt(variance), freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for as many tests as there are (Holm 1979), in the order given."""
    adjusted, running = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(np.argsort(p_values, kind="stable").tolist()):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = running
    return adjusted


def detectable(n: int, discordant: int, alpha: float, power: float = 0.8) -> Detectable:
    """For McNemar's exact test at level `alpha`."""
    fewest = math.ceil(1 - math.log2(alpha) - _TIE)
    critical = binom.isf(alpha / 2, np.arange(n + 1), 0.5) + 1  # fewest of d changed answers on one side
    net = int(2 * critical[discordant] - discordant)
    low, high = 0, n + 1  # the change in items: not found at low, found at high
    while high - low > 1:
        middle = (low + high) // 2
        found = _power(n, middle, max(discordant, middle), critical) >= power
        low, high = (low, middle) if found else (middle, high)
    return Detectable(
        n, discordant, alpha, fewest, net if net <= discordant else None, high / n if high <= n else None, power
    )


def _power(n: int, change: int, discordant: int, critical: Floats) -> float:
    """Of a true change of so many items, where so many of n are answered differently on average."""
    d = np.arange(n + 1)
    up = (1 + change / discordant) / 2 if discordant else 0.5
    found = binom.sf(critical - 1, d, up) + binom.cdf(d - critical, d, up)
    return float((binom.pmf(d, n, discordant / n) * found).sum())
