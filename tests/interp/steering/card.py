"""The published steering experiment on Gemma 4 E4B: 50 GSM8K questions, a contrast vector at layer 27.

What the E4B layer-21 card states: how many of the baseline's 25 wrong answers each scale recovered, how many of its 25
right ones it broke (from the final accuracy), and two of the recovered sets. Scales are shares of the mean norm there.
"""

import numpy as np

from sae_lens_gemma4.interp.steering.conditions import Condition

N, N_RIGHT = 50, 25
TABLE = {0.021: (3, 4), 0.052: (3, 7), 0.105: (5, 5), 0.157: (3, 9), -0.052: (5, 4)}
"""Signed scale → recovered, broken."""
SETS = {0.105: [5, 11, 18, 26, 35], -0.052: [3, 5, 26, 35, 44]}
WRONG = sorted({item for items in SETS.values() for item in items})
BASELINE = Condition("baseline", "baseline", 0.0)


def condition(scale):
    return Condition(f"{scale:+}", "positive" if scale > 0 else "negative", scale)


def filled(rng):
    """Outcomes that agree with all that the card states, what it does not state drawn at random."""
    free = np.setdiff1d(np.arange(N), WRONG)
    right = np.zeros(N, dtype=bool)
    right[rng.choice(free, N_RIGHT, replace=False)] = True
    outcomes = {BASELINE: right}
    for scale, (recovered, broken) in TABLE.items():
        now = right.copy()
        now[SETS.get(scale, rng.choice(np.flatnonzero(~right), recovered, replace=False))] = True
        now[rng.choice(np.flatnonzero(right), broken, replace=False)] = False
        outcomes[condition(scale)] = now
    return outcomes
