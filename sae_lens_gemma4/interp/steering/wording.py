"""A verdict in words: what was found by which tests, or which condition failed."""

from __future__ import annotations

from typing import Literal

from scipy.stats import t as student_t

from sae_lens_gemma4.interp.steering.comparisons import FEWEST_DIRECTIONS, Comparison, Stacks, Tests
from sae_lens_gemma4.interp.steering.conditions import percent
from sae_lens_gemma4.interp.steering.permuting import Detectable

Sign = Literal["helps", "hurts", "subtracting helps", "subtracting hurts"]

_ENOUGH = 8
"""Random directions with which their spread has the use that it can have."""


def direction(best: Comparison, made: Tests, alpha: float) -> tuple[Sign | None, str]:
    own = [c for c in made.alone if c.scale == best.scale]
    signs: dict[tuple[str, bool], Sign] = {
        ("+", True): "helps",
        ("+", False): "hurts",
        ("−", True): "subtracting helps",
        ("−", False): "subtracting hurts",
    }
    sign = next((signs[c.name[0], c.difference > 0] for c in own if c.adjusted <= alpha), None)
    each = ", ".join(
        f"{'adding' if c.name[0] == '+' else 'subtracting'} makes {_points(c.difference)} (p = {c.adjusted:.2g})"
        for c in own
    )
    words = (
        f"Direction effect: at {percent(best.scale or 0)} of the mean norm, adding the vector gives "
        f"{100 * abs(best.difference):.1f} points {'more' if best.difference > 0 else 'fewer'} right answers than "
        f"subtracting it (p = {best.adjusted:.2g}), and random directions of that length do not do so. Against the "
        f"baseline, {each}."
    )
    return sign, words


def _points(difference: float) -> str:
    return "no difference" if difference == 0 else f"{100 * difference:+.1f} points".replace("-", "−")


def magnitude(clear: Comparison, p: float) -> tuple[Sign, str]:
    how = "rises" if clear.difference > 0 else "falls"
    number = clear.name.partition(" ")[0]
    if clear.scale is None:
        what = f"accuracy {how} with the length of the push"
    else:
        what = f"at {percent(clear.scale)} of the mean norm accuracy {how} by {100 * abs(clear.difference):.1f} points"
    words = (
        f"Magnitude effect: {what}, on average over directions, of which {number} were run (p = {p:.2g}); no effect of "
        "this direction is established."
    )
    return "helps" if clear.difference > 0 else "hurts", words


def not_direction(by_kind: Stacks, made: Tests, alpha: float) -> str | None:
    """Which condition failed where the first holds."""
    differing = [o for o in made.opposite if o.adjusted <= alpha]
    if not differing:
        return None
    best = min(differing, key=lambda o: o.p_value)
    begin = f"the two signs differ at {percent(best.scale or 0)} (p = {best.adjusted:.2g}), but "
    random_nk = by_kind.get(("random", best.scale or 0.0))
    k = 0 if random_nk is None else random_nk.shape[1]
    if k < 2:
        return begin + ("no random direction was run there" if k == 0 else "one random direction has no spread")
    beyond = next(s for s in made.spread if s.scale == best.scale)
    if beyond.adjusted > alpha:
        times = float(student_t.isf(beyond.p_value / 2, k - 1))
        found = f"half the difference is {times:.1f} times their spread (p = {beyond.adjusted:.2g})"
        if k < _ENOUGH and 2 * student_t.sf(times, _ENOUGH - 1) <= alpha:
            return begin + f"{k} random directions are too few: {found}"
        return begin + f"{k} random directions of that length differ as well: {found}"
    near = min(c.adjusted for c in made.controls if c.scale == best.scale)
    return begin + f"neither is set apart from the mean of {k} random directions (least p = {near:.2g})"


def not_magnitude(made: Tests, alpha: float) -> str | None:
    """Which condition failed where d holds."""
    clear = min(made.magnitude, key=lambda c: c.adjusted)
    if clear.adjusted > alpha:
        return None
    what = "over scales all pushes together have a trend"
    if clear.scale is not None:
        what = f"all pushes of {percent(clear.scale)} together differ from the baseline"
    by_directions = next((c for c in made.directions if c.scale == clear.scale), None)
    if by_directions is None:
        return f"{what} (p = {clear.adjusted:.2g}), but fewer than {FEWEST_DIRECTIONS} directions were run so"
    return (
        f"{what} (p = {clear.adjusted:.2g}), but not the same way where directions count as drawn "
        f"({by_directions.name.partition(' ')[0]} of them, p = {by_directions.adjusted:.2g})"
    )


def power(able: Detectable, both_ways: bool) -> str:
    which = "adding against subtracting" if both_ways else "a push against the baseline"
    change = "no change of accuracy at all" if able.change is None else f"a change under {100 * able.change:.0f} points"
    return (
        f"The first test alone, {which}, of {able.n} items with {able.discordant} answers that differ would not have "
        f"shown {change} with {100 * able.power:.0f} % probability."
    )
