"""What a steering run shows: an effect of the direction, of the push's length alone, or none, by the rule `RULE`.

c is in it because any direction does a little of something. On the tiny model of the tests, in which every direction
moves the answers, a and b alone call most random vectors a direction effect. It needs two random directions or more,
and eight or so to be of use: with two, t must be beyond 12.7, with eight beyond 2.4. e is in it for the same reason:
directions that each do something have a mean that is not zero, which is no effect of their length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.steering import comparisons as tests
from sae_lens_gemma4.interp.steering import wording
from sae_lens_gemma4.interp.steering.comparisons import FEWEST_DIRECTIONS, Comparison, Stacks, Tests
from sae_lens_gemma4.interp.steering.conditions import Condition, percent
from sae_lens_gemma4.interp.steering.effects import Bools, checked
from sae_lens_gemma4.interp.steering.permuting import Detectable, detectable
from sae_lens_gemma4.interp.steering.wording import Sign

VerdictKind = Literal["direction effect", "magnitude effect", "none"]

RULE = (
    "A direction effect asks for three things at one scale: (a) adding and subtracting the vector differ (McNemar’s "
    "exact test); (b) the better of the two beats the mean of random directions of the same length, or the worse falls "
    "behind it, item by item (sign flips over items); (c) half the difference between adding and subtracting lies "
    "beyond the spread of the random directions’ accuracies (t). Else a magnitude effect asks for two things, both at "
    "one scale or both of the trend over scales: (d) all pushes together differ from the baseline (sign flips over "
    "items), and (e) they do so the same way where directions count as drawn as well as items (Clark’s min F′; three "
    "directions or more, the vector both ways being one). Else none. All tests are two-sided at the level {alpha:g}; "
    "p-values are corrected by Holm’s method, those of b over the two signs, the others over scales."
)
_TESTS = ("opposite", "controls", "spread", "magnitude", "directions", "alone")
_HARDLY = 2
"""Answers to gain or lose: with as few, nothing can be seen on that side."""


@dataclass(frozen=True)
class Verdict:
    """What a run shows, and every test behind it.

    Attributes:
        sign: of a direction effect, what adding does against the baseline at the clearest scale; "subtracting helps" or
            "subtracting hurts" where that alone differs from it, None where neither does. Of a magnitude effect, what
            pushes do on average. None of none.
        words: the verdict in a sentence or two.
        opposite: adding against subtracting, by scale (a of the rule).
        controls: each of the two against random directions, by scale (b).
        spread: half of adding against subtracting, beside the spread of random directions, by scale (c).
        magnitude: all pushes against the baseline by scale, and the trend last where there are several (d).
        directions: the same, directions drawn as well as items (e).
        alone: adding and subtracting against the baseline, by scale, corrected over the two; decides the sign alone.
        detectable: what a could have shown; of the comparison with the baseline where no scale was run both ways.
    """

    kind: VerdictKind
    sign: Sign | None
    words: str
    opposite: tuple[Comparison, ...]
    controls: tuple[Comparison, ...]
    spread: tuple[Comparison, ...]
    magnitude: tuple[Comparison, ...]
    directions: tuple[Comparison, ...]
    alone: tuple[Comparison, ...]
    detectable: Detectable
    notes: tuple[str, ...]
    alpha: float
    permutations: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        found = {name: [c._asdict() for c in getattr(self, name)] for name in _TESTS}
        return {
            "verdict": self.kind,
            "sign": self.sign,
            "words": self.words,
            "rule": RULE.format(alpha=self.alpha),
            **found,
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
    by_kind = tests.stacked(others)
    opposite = tests.opposite(by_kind, scales)
    made = Tests(
        opposite,
        [c for o in opposite for c in tests.controls(by_kind, o.scale or 0.0)],
        tests.spread(by_kind, opposite),
        tests.magnitude(others, before_n, scales, permutations, seed),
        tests.directions(others, before_n, scales),
        [c for scale in scales for c in tests.alone(by_kind, scale, before_n)],
    )
    notes = _notes(by_kind, scales, made, before_n)
    passed = [o for o in opposite if o.adjusted <= alpha and _beaten(o, made, alpha)]
    pushed = _both(made, alpha)
    able = _able(by_kind, before_n, others, opposite, alpha)
    not_direction = None if passed else wording.not_direction(by_kind, made, alpha)
    kind: VerdictKind
    sign: Sign | None
    if passed:
        best = min(passed, key=lambda o: o.p_value)
        kind, (sign, words) = "direction effect", wording.direction(best, made, alpha)
        if len({o.difference > 0 for o in passed}) > 1:
            notes.append("Which of adding and subtracting does better changes over scales; the clearest one is told.")
    elif pushed:
        kind, (sign, words) = "magnitude effect", wording.magnitude(*pushed)
        notes += [f"No direction effect: {not_direction}."] if not_direction else []
    else:
        kind, sign = "none", None
        missed = [why for why in (not_direction, wording.not_magnitude(made, alpha)) if why]
        words = (
            "None: " + "".join(f"{why[0].upper()}{why[1:]}. " for why in missed) + wording.power(able, bool(opposite))
        )
    return Verdict(
        kind=kind,
        sign=sign,
        words=words,
        opposite=tuple(made.opposite),
        controls=tuple(made.controls),
        spread=tuple(made.spread),
        magnitude=tuple(made.magnitude),
        directions=tuple(made.directions),
        alone=tuple(made.alone),
        detectable=able,
        notes=tuple(notes),
        alpha=alpha,
        permutations=permutations,
        seed=seed,
    )


def _beaten(opposite: Comparison, made: Tests, alpha: float) -> bool:
    """Whether at this scale the vector is no random direction: b and c of the rule."""
    if not any(s.scale == opposite.scale and s.adjusted <= alpha for s in made.spread):
        return False
    expected = {"+ against random": opposite.difference, "− against random": -opposite.difference}
    return any(
        c.scale == opposite.scale and c.adjusted <= alpha and c.difference * expected[c.name] > 0 for c in made.controls
    )


def _both(made: Tests, alpha: float) -> tuple[Comparison, float] | None:
    """The clearest that passes d and e of the rule, as e has it, and the greater p of the two."""
    by_scale = {c.scale: c for c in made.magnitude}
    found = [
        (c, max(c.adjusted, by_scale[c.scale].adjusted))
        for c in made.directions
        if c.difference * by_scale[c.scale].difference > 0
    ]
    return min((f for f in found if f[1] <= alpha), key=lambda f: f[1], default=None)


def _notes(by_kind: Stacks, scales: list[float], made: Tests, before_n: Bools) -> list[str]:
    notes = []
    right, n = int(before_n.sum()), len(before_n)
    for room, edge, what in ((n - right, "Ceiling", "gained"), (right, "Floor", "lost")):
        if room <= _HARDLY:
            notes.append(f"{edge}: the baseline is right about {right} of {n} items; hardly an answer can be {what}.")
    one_way = [s for s in scales if s not in [o.scale for o in made.opposite]]
    if one_way:
        listed = ", ".join(map(percent, one_way))
        notes.append(f"At {listed} the vector was not run both ways, so nothing can be said of its direction there.")
    randoms = {s: by_kind["random", s].shape[1] if ("random", s) in by_kind else 0 for s in scales}
    if not any(randoms.values()):
        notes.append("A direction effect is not established: no random control.")
    else:
        for few, what in ((0, "no random control"), (1, "a single random direction has no spread, take eight or so")):
            if bare := [o.scale for o in made.opposite if o.scale is not None and randoms[o.scale] == few]:
                notes.append(f"A direction effect is not established at {', '.join(map(percent, bare))}: {what}.")
    if not made.directions:
        notes.append(f"A magnitude effect is not established: it takes {FEWEST_DIRECTIONS} directions of one length.")
    return notes


def _able(
    by_kind: Stacks, before_n: Bools, others: Mapping[Condition, Bools], opposite: list[Comparison], alpha: float
) -> Detectable:
    scales = [o.scale for o in opposite if o.scale is not None]
    pairs = [(by_kind["positive", s][:, 0], by_kind["negative", s][:, 0]) for s in scales]
    pairs = pairs or [(before_n, a) for a in others.values()]
    discordant = round(float(np.mean([(a != b).sum() for a, b in pairs])))
    return detectable(len(before_n), discordant, alpha / len(pairs))
