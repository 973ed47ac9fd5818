"""What a steering run shows: an effect of the direction, of the push's length alone, or none.

The rule, at level α = .05, all tests paired by item and two-sided:

1. **Direction effect**: at some scale, all three, each at level α:
   a. adding and subtracting the vector differ (McNemar's exact test, Holm over scales);
   b. the better of the two beats the mean of random directions of the same length, or the worse falls behind it, item
      by item (`permuting.against`, Holm over the two);
   c. half the difference between adding and subtracting lies beyond the spread of the random directions' accuracies (t
      with one degree of freedom fewer than there are random directions, Holm over scales).
2. Else **magnitude effect**: at some scale, all directions together differ from the baseline (`permuting.against`), or
   accuracy has a trend over the length of the push, the baseline's being 0 (`permuting.trend`). Holm over all of these.
3. Else **none**, with the smallest effect that so many items could have shown.

c is there because any direction does a little of something. On the tiny model of the tests, in which every direction
moves the answers, a and b alone call most random vectors a direction effect. It needs two random directions
or more, and eight or so to be of use: with two, t must be beyond 12.7, with eight beyond 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.statistics import mcnemar
from sae_lens_gemma4.interp.steering.conditions import Condition, percent
from sae_lens_gemma4.interp.steering.effects import Bools, checked
from sae_lens_gemma4.interp.steering.permuting import Detectable, against, detectable, holm, trend

VerdictKind = Literal["direction effect", "magnitude effect", "none"]
_TESTS = ("opposite", "controls", "spread", "magnitude")


class Comparison(NamedTuple):
    """One test.

    Attributes:
        name: what is compared, "first against second".
        scale: the length of the push; None for the trend, which is over all.
        difference: of accuracies, first − second; of the trend, accuracy a unit of scale.
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


@dataclass(frozen=True)
class Verdict:
    """What a run shows, and every test behind it.

    Attributes:
        sign: "helps" or "hurts": of a direction effect, what adding does against subtracting; of a magnitude effect,
            what any push does; None of none.
        words: the verdict in a sentence or two.
        opposite: adding against subtracting, by scale.
        controls: each of the two against random directions, by scale.
        spread: half of adding against subtracting, beside the spread of random directions, by scale.
        magnitude: all directions against the baseline by scale, and the trend last.
        detectable: what the first kind of test could have shown; of the comparison with the baseline where no scale was
            run both ways.
    """

    kind: VerdictKind
    sign: Literal["helps", "hurts"] | None
    words: str
    opposite: tuple[Comparison, ...]
    controls: tuple[Comparison, ...]
    spread: tuple[Comparison, ...]
    magnitude: tuple[Comparison, ...]
    detectable: Detectable
    notes: tuple[str, ...]
    alpha: float
    permutations: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        tests = {name: [c._asdict() for c in getattr(self, name)] for name in _TESTS}
        return {
            "verdict": self.kind,
            "sign": self.sign,
            "words": self.words,
            **tests,
            "detectable": self.detectable._asdict(),
            "notes": list(self.notes),
            "alpha": self.alpha,
            "permutations": self.permutations,
            "seed": self.seed,
        }


def verdict(
    outcomes: Mapping[Condition, npt.ArrayLike], *, alpha: float = 0.05, permutations: int = 10_000, seed: int = 0
) -> Verdict:
    """Of right and wrong answers, bool `[n]` a condition, wherever they come from.

    Raises:
        DataError: as `effects.checked`.
        ConfigError: a level or a number of permutations that makes no sense.
    """
    if not 0 < alpha < 1 or permutations < 1 or seed < 0:
        raise ConfigError(
            f"alpha lies between 0 and 1, permutations from 1 and seed from 0; not {alpha}, {permutations}."
        )
    before_n, others = checked(outcomes)
    scales = sorted({abs(c.scale) for c in others})
    arrays: dict[tuple[str, float], list[Bools]] = {}
    for condition, right_n in others.items():
        arrays.setdefault((condition.kind, abs(condition.scale)), []).append(right_n)
    by_kind = {key: np.stack(found, axis=1) for key, found in arrays.items()}
    opposite = _opposite(by_kind, scales)
    controls = [c for o in opposite for c in _controls(by_kind, o.scale or 0.0)]
    spread = _spread(by_kind, opposite)
    magnitude = _magnitude(others, before_n, scales, permutations, seed)
    notes = _notes(by_kind, scales, opposite)
    passed = [o for o in opposite if o.adjusted <= alpha and _beaten(o, controls, spread, alpha)]
    able = _able(by_kind, before_n, others, opposite, alpha)
    kind: VerdictKind
    if passed:
        best = min(passed, key=lambda o: o.p_value)
        kind, sign = "direction effect", _sign(best.difference)
        if len({_sign(o.difference) for o in passed}) > 1:
            notes.append("The direction's effect changes sign over scales; the sign given is that of the clearest one.")
        words = (
            f"Direction effect: at {percent(best.scale or 0)} of the mean norm, adding the vector gives "
            f"{100 * abs(best.difference):.1f} points {'more' if sign == 'helps' else 'fewer'} right answers than "
            f"subtracting it (p = {best.adjusted:.2g}), and random directions of that length do not do so."
        )
    elif (clear := min(magnitude, key=lambda c: c.adjusted)).adjusted <= alpha:
        kind, sign = "magnitude effect", _sign(clear.difference)
        where = "over the length of the push" if clear.scale is None else f"at {percent(clear.scale)} of the mean norm"
        words = (
            f"Magnitude effect: accuracy {'rises' if sign == 'helps' else 'falls'} {where} whatever the direction "
            f"(p = {clear.adjusted:.2g}); no effect of this direction is established."
        )
    else:
        kind, sign = "none", None
        found = (
            "no change of accuracy at all" if able.change is None else f"a change under {100 * able.change:.0f} points"
        )
        words = (
            f"None: {able.n} items with {able.discordant} answers that differ would not have shown {found} "
            f"with {100 * able.power:.0f} % probability."
        )
    return Verdict(
        kind,
        sign,
        words,
        tuple(opposite),
        tuple(controls),
        tuple(spread),
        tuple(magnitude),
        able,
        tuple(notes),
        alpha,
        permutations,
        seed,
    )


Stacks = Mapping[tuple[str, float], Bools]


def _adjusted(tests: list[Comparison]) -> list[Comparison]:
    return [t._replace(adjusted=p) for t, p in zip(tests, holm([t.p_value for t in tests]), strict=True)]


def _opposite(by_kind: Stacks, scales: list[float]) -> list[Comparison]:
    tests = []
    for scale in scales:
        if ("positive", scale) in by_kind and ("negative", scale) in by_kind:
            plus_n, minus_n = by_kind["positive", scale][:, 0], by_kind["negative", scale][:, 0]
            change = mcnemar(int((plus_n & ~minus_n).sum()), int((minus_n & ~plus_n).sum()), len(plus_n))
            tests.append(Comparison("+ against −", scale, change.change, change.p_value, 1.0))
    return _adjusted(tests)


def _controls(by_kind: Stacks, scale: float) -> list[Comparison]:
    """Both signs of the vector against the random directions at a scale; none without these."""
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


def _spread(by_kind: Stacks, opposite: list[Comparison]) -> list[Comparison]:
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


def _beaten(opposite: Comparison, controls: list[Comparison], spread: list[Comparison], alpha: float) -> bool:
    """Whether at this scale the vector is no random direction: b and c of the rule."""
    if not any(s.scale == opposite.scale and s.adjusted <= alpha for s in spread):
        return False
    expected = {"+ against random": opposite.difference, "− against random": -opposite.difference}
    return any(
        c.scale == opposite.scale and c.adjusted <= alpha and c.difference * expected[c.name] > 0 for c in controls
    )


def _magnitude(
    others: Mapping[Condition, Bools], before_n: Bools, scales: list[float], permutations: int, seed: int
) -> list[Comparison]:
    tests = []
    for scale in scales:
        pushed_nk = np.stack([a for c, a in others.items() if abs(c.scale) == scale], axis=1)
        difference = float(pushed_nk.mean() - before_n.mean())
        tests.append(Comparison("any direction against baseline", scale, difference, against(before_n, pushed_nk), 1.0))
    right_nc = np.stack([before_n, *others.values()], axis=1)
    dose_c = np.array([0.0, *(abs(c.scale) for c in others)])
    slope, p = trend(right_nc, dose_c, permutations, seed)
    return _adjusted([*tests, Comparison("trend over scale", None, slope, p, 1.0)])


def _notes(by_kind: Stacks, scales: list[float], opposite: list[Comparison]) -> list[str]:
    notes = []
    one_way = [s for s in scales if s not in [o.scale for o in opposite]]
    if one_way:
        listed = ", ".join(map(percent, one_way))
        notes.append(f"At {listed} the vector was not run both ways, so nothing can be said of its direction there.")
    randoms = {s: by_kind["random", s].shape[1] if ("random", s) in by_kind else 0 for s in scales}
    if not any(randoms.values()):
        notes.append("A direction effect is not established: no random control.")
        return notes
    for few, what in ((0, "no random control"), (1, "a single random direction has no spread, take eight or so")):
        if bare := [o.scale for o in opposite if o.scale is not None and randoms[o.scale] == few]:
            notes.append(f"A direction effect is not established at {', '.join(map(percent, bare))}: {what}.")
    return notes


def _able(
    by_kind: Stacks, before_n: Bools, others: Mapping[Condition, Bools], opposite: list[Comparison], alpha: float
) -> Detectable:
    scales = [o.scale for o in opposite if o.scale is not None]
    pairs = [(by_kind["positive", s][:, 0], by_kind["negative", s][:, 0]) for s in scales]
    pairs = pairs or [(before_n, a) for a in others.values()]
    discordant = round(float(np.mean([(a != b).sum() for a, b in pairs])))
    return detectable(len(before_n), discordant, alpha / len(pairs))


def _sign(difference: float) -> Literal["helps", "hurts"]:
    return "helps" if difference > 0 else "hurts"
