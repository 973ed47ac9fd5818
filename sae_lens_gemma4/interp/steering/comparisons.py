"""The tests that a verdict is made of: the vector's two signs against each other, random directions and the baseline,
and all pushes against the baseline.

Shapes: `n` items, `k` random directions of a scale, `u` directions, the vector among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from sae_lens_gemma4.interp.statistics import mcnemar
from sae_lens_gemma4.interp.steering.conditions import Condition
from sae_lens_gemma4.interp.steering.effects import Bools
from sae_lens_gemma4.interp.steering.permuting import Floats, against, crossed, holm, trend

FEWEST_DIRECTIONS = 3
"""Directions below which nothing is said of directions at large."""

Stacks = Mapping[tuple[str, float], Bools]
"""Kind and length → bool `[n, conditions]`."""


class Comparison(NamedTuple):
    """One test.

    Attributes:
        name: what is compared, "first against second".
        scale: the length of the push; None for a trend, which is over all.
        difference: of accuracies, first − second; of a trend, accuracy a unit of scale.
        p_value, adjusted: before and after Holm's correction.
        rank: of a comparison with random directions, the share of these that are on the vector's side of their mean and
            as far out; else None.
    """

    name: str
    scale: float | None
    difference: float
    p_value: float
    adjusted: float
    rank: float | None = None


class Tests(NamedTuple):
    """All of a run; see `Verdict`."""

    opposite: list[Comparison]
    controls: list[Comparison]
    spread: list[Comparison]
    magnitude: list[Comparison]
    directions: list[Comparison]
    alone: list[Comparison]


def stacked(pushed: Mapping[Condition, Bools]) -> dict[tuple[str, float], Bools]:
    arrays: dict[tuple[str, float], list[Bools]] = {}
    for condition, right_n in pushed.items():
        arrays.setdefault((condition.kind, abs(condition.scale)), []).append(right_n)
    return {key: np.stack(found, axis=1) for key, found in arrays.items()}


def opposite(by_kind: Stacks, scales: list[float]) -> list[Comparison]:
    """Adding against subtracting, where both were run."""
    tests = []
    for scale in scales:
        if ("positive", scale) in by_kind and ("negative", scale) in by_kind:
            tests.append(_mcnemar("+ against −", scale, by_kind["positive", scale], by_kind["negative", scale]))
    return _adjusted(tests)


def alone(by_kind: Stacks, scale: float, before_n: Bools) -> list[Comparison]:
    """Each sign at a scale against the baseline; corrected over the two."""
    found = [(sign, by_kind.get((kind, scale))) for sign, kind in (("+", "positive"), ("−", "negative"))]
    tests = [_mcnemar(f"{s} against baseline", scale, a, before_n[:, None]) for s, a in found if a is not None]
    return _adjusted(tests)


def controls(by_kind: Stacks, scale: float) -> list[Comparison]:
    """Both signs of the vector against the random directions at a scale; none without these. Corrected over the two."""
    random_nk = by_kind.get(("random", scale))
    if random_nk is None:
        return []
    tests, accuracy_k = [], random_nk.mean(axis=0)
    for sign, kind in (("+", "positive"), ("−", "negative")):
        mine_n = by_kind[kind, scale][:, 0]
        difference = float(mine_n.mean() - random_nk.mean())
        further_k = (accuracy_k - mine_n.mean()) * (1 if difference >= 0 else -1)
        rank = float((further_k >= -1e-12).mean())
        tests.append(Comparison(f"{sign} against random", scale, difference, against(mine_n, random_nk), 1.0, rank))
    return _adjusted(tests)


def spread(by_kind: Stacks, opposite: list[Comparison]) -> list[Comparison]:
    """A random direction adds some e to the mean accuracy and its opposite takes it away; so half of + against − is the
    vector's e, and the random ones' scatter is that of theirs (and of the items drawn, which makes it wider)."""
    tests = []
    for test in opposite:
        random_nk = by_kind.get(("random", test.scale or 0.0))
        if random_nk is not None and random_nk.shape[1] > 1:
            n, k = random_nk.shape
            deviation = max(float(random_nk.mean(axis=0).std(ddof=1)), 1 / n)  # one item is the least there is
            p = 2 * float(student_t.sf(abs(test.difference) / 2 / deviation, k - 1))
            tests.append(Comparison("half of + against − beyond random", test.scale, test.difference / 2, p, 1.0))
    return _adjusted(tests)


def magnitude(
    pushed: Mapping[Condition, Bools], before_n: Bools, scales: list[float], permutations: int, seed: int
) -> list[Comparison]:
    """All pushes of a length against the baseline, and the trend over lengths where there are several; by items."""
    tests = []
    for scale in scales:
        right_nk = np.stack([a for c, a in pushed.items() if abs(c.scale) == scale], axis=1)
        difference = float(right_nk.mean() - before_n.mean())
        tests.append(Comparison("all pushes against baseline", scale, difference, against(before_n, right_nk), 1.0))
    if len(scales) > 1:
        right_nc = np.stack([before_n, *pushed.values()], axis=1)
        dose_c = np.array([0.0, *(abs(c.scale) for c in pushed)])
        slope, p = trend(right_nc, dose_c, permutations, seed)
        tests.append(Comparison("trend over scale", None, slope, p, 1.0))
    return _adjusted(tests)


def directions(pushed: Mapping[Condition, Bools], before_n: Bools, scales: list[float]) -> list[Comparison]:
    """The same, by items and directions (`crossed`); only where three directions or more were run. The vector both ways
    is one of them, the mean of the two, in which what its sign does cancels."""
    by_direction: dict[int | str, dict[float, list[Bools]]] = {}
    for c, right_n in pushed.items():
        which = "vector" if c.kind != "random" else c.name if c.seed is None else c.seed
        by_direction.setdefault(which, {}).setdefault(abs(c.scale), []).append(right_n)
    before: Floats = before_n.astype(np.float64)
    changes = [{s: np.mean(a, axis=0) - before for s, a in found.items()} for found in by_direction.values()]
    tests = [_crossed("against baseline", s, [found[s] for found in changes if s in found]) for s in scales]
    slopes = [_slope(found) for found in changes if len(found) > 1]
    tests.append(_crossed("trend over scale", None, slopes))
    return _adjusted([test for test in tests if test is not None])


def _crossed(what: str, scale: float | None, change_un: list[Floats]) -> Comparison | None:
    if len(change_un) < FEWEST_DIRECTIONS or len(change_un[0]) < 2:
        return None
    difference, p = crossed(np.stack(change_un, axis=1))
    joint = " " if scale is not None else ", "
    return Comparison(f"{len(change_un)} directions{joint}{what}", scale, difference, p, 1.0)


def _slope(changes: Mapping[float, Floats]) -> Floats:
    """Of each item, over a direction's lengths and 0, where nothing changes: `[n]`."""
    dose = np.array([0.0, *changes])
    weight = (dose - dose.mean())[1:] / ((dose - dose.mean()) ** 2).sum()
    return np.tensordot(weight, np.stack(list(changes.values())), axes=1)


def _mcnemar(name: str, scale: float, first_n1: Bools, second_n1: Bools) -> Comparison:
    first_n, second_n = first_n1[:, 0], second_n1[:, 0]
    change = mcnemar(int((first_n & ~second_n).sum()), int((second_n & ~first_n).sum()), len(first_n))
    return Comparison(name, scale, change.change, change.p_value, 1.0)


def _adjusted(tests: list[Comparison]) -> list[Comparison]:
    return [t._replace(adjusted=p) for t, p in zip(tests, holm([t.p_value for t in tests]), strict=True)]
