from collections import Counter

import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.steering.conditions import Condition, SteeringSettings, plan
from sae_lens_gemma4.interp.steering.verdict import verdict
from tests.interp.steering.card import BASELINE, TABLE, N, condition, filled

CONDITIONS = plan(SteeringSettings(scales=[0.05, 0.1, 0.15], n_random=8))
SIGN = {"positive": 1, "negative": -1, "random": 0, "baseline": 0}


def simulated(rng, n, broken, recovered, planted=0.0, alike=0.0):
    """Outcomes of n items, half of them right at the baseline.

    Args:
        broken, recovered: of a scale's length, how likely a push breaks a right item and recovers a wrong one.
        planted: how much likelier the vector recovers and less likely it breaks, and the reverse when subtracted.
        alike: the share of items that every push changes or leaves alike.
    """
    before, common, shared = rng.random(n) < 0.5, rng.random(n), rng.random(n) < alike
    outcomes = {}
    for c in CONDITIONS:
        if c.kind == "baseline":
            outcomes[c] = before
            continue
        u = np.where(shared, common, rng.random(n))
        push = planted * SIGN[c.kind]
        outcomes[c] = np.where(before, u >= broken(abs(c.scale)) - push, u < recovered(abs(c.scale)) + push)
    return outcomes


def kinds(runs, *args, **kwargs):
    rng = np.random.default_rng(5)
    counts = Counter(verdict(simulated(rng, *args, **kwargs), permutations=300).kind for _ in range(runs))
    return {kind: counts[kind] / runs for kind in ("direction effect", "magnitude effect", "none")}


def test_the_cards_table_is_no_direction_effect_however_it_is_filled_in():
    """Adding and subtracting at 5.2 % differ by 5 items, whatever the sets: p is .0625 at the very least."""
    rng, opposite, found = np.random.default_rng(0), [], Counter()
    for seed in range(300):
        v = verdict(filled(rng), permutations=300, seed=seed)
        assert v.kind != "direction effect" and not v.controls
        assert "not established: no random control" in " ".join(v.notes)
        found[v.kind] += 1
        opposite.append(v.opposite)
        magnitude = {c.scale: c for c in v.magnitude}
        assert magnitude[0.157].p_value == pytest.approx(0.146, abs=5e-4)
    assert all(len(o) == 1 and o[0].difference == -0.1 and o[0].p_value >= 0.0625 for o in opposite)
    assert len({o[0].p_value for o in opposite}) > 3
    assert found["none"] / 300 > 0.99  # nor is its "monotone magnitude penalty" there


def test_the_cards_table_with_the_most_that_it_allows():
    """Sets nested so that the fewest items differ: 5 against 0."""
    least = min(binomtest(5 + more, 5 + 2 * more).pvalue for more in range(8))
    assert least == 0.0625
    outcomes = filled(np.random.default_rng(1))
    before, minus = outcomes[BASELINE], outcomes[condition(-0.052)].copy()
    plus = minus.copy()
    plus[np.flatnonzero(minus & ~before)[:2]] = False
    plus[np.flatnonzero(minus & before)[:3]] = False
    outcomes[condition(0.052)] = plus
    assert (int((plus & ~before).sum()), int((~plus & before).sum())) == TABLE[0.052]
    rng = np.random.default_rng(2)
    for draw in range(3):  # even with the random directions that it lacks
        outcomes[Condition(f"random {draw}", "random", 0.052, draw)] = rng.permutation(minus)
    v = verdict(outcomes, permutations=300)
    assert v.opposite[0].p_value == 0.0625 and v.kind != "direction effect"


def test_no_effect_is_called_one_in_at_most_five_of_a_hundred():
    for alike in (0.0, 0.9):
        rates = kinds(300, 60, lambda s: 0.2, lambda s: 0.2, alike=alike)
        assert rates["direction effect"] <= 0.05
        assert rates["direction effect"] + rates["magnitude effect"] <= 0.1 + 0.025


def test_a_magnitude_effect_is_not_called_a_direction():
    for alike, found in ((0.0, 0.95), (0.9, 0.65)):  # five directions that do the same are one
        rates = kinds(300, 100, lambda s: 3 * s, lambda s: s, alike=alike)
        assert rates["direction effect"] <= 0.05
        assert rates["magnitude effect"] >= found


def test_a_planted_direction_is_called_one():
    """15 points more recovered and fewer broken by adding, 15 the other way by subtracting, 100 items."""
    rates = kinds(200, 100, lambda s: 0.2, lambda s: 0.2, planted=0.15)
    assert rates["direction effect"] >= 0.9


def test_its_sign_and_its_words():
    rng = np.random.default_rng(3)
    for planted, sign, word in ((0.2, "helps", "more"), (-0.2, "hurts", "fewer")):
        v = verdict(simulated(rng, 150, lambda s: 0.25, lambda s: 0.25, planted=planted))
        assert (v.kind, v.sign) == ("direction effect", sign)
        assert f"points {word} right answers than subtracting it" in v.words
        assert v.to_dict()["verdict"] == v.kind and len(v.to_dict()["controls"]) == 6 and len(v.spread) == 3


def test_without_random_directions_a_direction_effect_is_not_established():
    outcomes = simulated(np.random.default_rng(3), 150, lambda s: 0.25, lambda s: 0.25, planted=0.2)
    bare = {c: a for c, a in outcomes.items() if c.kind != "random"}
    v = verdict(bare)
    assert v.kind != "direction effect" and min(o.adjusted for o in v.opposite) < 0.001
    assert v.notes == ("A direction effect is not established: no random control.",)
    partly = {c: a for c, a in outcomes.items() if c.kind != "random" or c.scale == 0.1}
    assert verdict(partly).notes == ("A direction effect is not established at 5 %, 15 %: no random control.",)
    assert verdict(partly).kind == "direction effect"


def test_random_directions_that_do_the_same_undo_a_direction():
    """Adding keeps what the baseline has, subtracting breaks 15 items of 80."""
    n, before = 80, np.arange(80) < 40
    worse = before & (np.arange(n) >= 15)
    base = {BASELINE: before, condition(0.1): before, condition(-0.1): worse}
    kept, some_break = [before] * 8, [before] * 5 + [worse] * 3
    for randoms, direction, rank in ((kept, True, 0.0), (some_break, False, 3 / 8)):
        v = verdict(base | {Condition(f"r{i}", "random", 0.1, i): r for i, r in enumerate(randoms)})
        minus = next(c for c in v.controls if c.name == "− against random")
        assert v.opposite[0].p_value < 1e-3 and minus.adjusted < 0.01
        assert (minus.rank, v.kind == "direction effect") == (rank, direction)
    accuracies = [r.mean() for r in some_break]
    reference = 2 * stats.t.sf((15 / 80 / 2) / np.std(accuracies, ddof=1), 7)
    assert v.spread[0].p_value == pytest.approx(reference)


def test_a_single_random_direction_has_no_spread():
    outcomes = simulated(np.random.default_rng(3), 150, lambda s: 0.25, lambda s: 0.25, planted=0.2)
    v = verdict({c: a for c, a in outcomes.items() if c.kind != "random" or c.seed == 0})
    assert v.kind != "direction effect" and not v.spread
    assert v.notes[0].startswith("A direction effect is not established at 5 %, 10 %, 15 %: a single random direction")


def test_none_says_what_could_have_been_seen():
    v = verdict(filled(np.random.default_rng(0)))
    assert v.kind == "none" and v.sign is None
    assert v.detectable.n == N and v.detectable.fewest == 6
    assert f"a change under {100 * v.detectable.change:.0f} points" in v.words


def test_a_run_of_one_sign_only():
    outcomes = filled(np.random.default_rng(0))
    v = verdict({c: a for c, a in outcomes.items() if c.scale >= 0})
    assert not v.opposite and v.kind == "none"
    assert "was not run both ways" in v.notes[0]


def test_numbers_that_make_no_sense():
    with pytest.raises(ConfigError, match="alpha lies between 0 and 1"):
        verdict(filled(np.random.default_rng(0)), alpha=1.0)
