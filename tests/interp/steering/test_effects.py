import numpy as np
import pytest
from scipy.stats import fisher_exact

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.steering.conditions import Condition
from sae_lens_gemma4.interp.steering.effects import effects, opposite_sets, overlap
from tests.interp.steering.card import BASELINE, SETS, TABLE, condition, filled


def test_effects_of_the_cards_table():
    found = {e.condition: e for e in effects(filled(np.random.default_rng(0)))}
    assert (found[BASELINE].accuracy.k, found[BASELINE].change) == (25, None)
    for scale, (recovered, broken) in TABLE.items():
        effect = found[condition(scale)]
        assert (len(effect.recovered), len(effect.broken)) == (recovered, broken)
        assert effect.to_dict()["net"] == recovered - broken == effect.accuracy.k - 25
    strongest = found[condition(0.157)]
    assert strongest.change.p_value == pytest.approx(0.146, abs=5e-4)  # the card's "clean magnitude signal"
    assert strongest.accuracy.value == 0.38
    assert found[condition(0.105)].recovered == tuple(SETS[0.105])


def test_what_the_cards_sets_share_by_chance():
    shared = overlap(SETS[0.105], SETS[-0.052], 25)
    assert (shared.both, shared.first_only, shared.second_only) == ((5, 26, 35), (11, 18), (3, 44))
    assert shared.jaccard == 3 / 7 and shared.expected == 1.0
    reference = fisher_exact([[3, 2], [2, 18]], alternative="greater").pvalue
    assert shared.p_value == pytest.approx(reference)
    assert reference == pytest.approx(0.0377, abs=5e-5)


def test_sets_both_ways_by_scale():
    outcomes = {
        BASELINE: np.array([1, 1, 1, 0, 0, 0], dtype=bool),
        Condition("+5 %", "positive", 0.05): np.array([0, 1, 1, 1, 1, 0], dtype=bool),
        Condition("−5 %", "negative", -0.05): np.array([0, 0, 1, 0, 1, 0], dtype=bool),
        Condition("+9 %", "positive", 0.09): np.array([0, 0, 1, 0, 1, 0], dtype=bool),
        Condition("random 1, 9 %", "random", 0.09, 3): np.array([0, 0, 1, 0, 1, 0], dtype=bool),
    }
    recovered, broken = opposite_sets(effects(outcomes))
    assert (recovered.scale, recovered.what, broken.what) == (0.05, "recovered", "broken")
    assert (recovered.overlap.both, recovered.overlap.first_only, recovered.overlap.second_only) == ((4,), (3,), ())
    assert (broken.overlap.both, broken.overlap.second_only, broken.overlap.pool) == ((0,), (1,), 3)
    assert recovered.to_dict()["both"] == [4]


def test_empty_sets():
    nothing = overlap([], [], 0)
    assert (nothing.jaccard, nothing.expected, nothing.p_value) == (None, 0.0, 1.0)
    with pytest.raises(DataError, match="3 items cannot come out of 2"):
        overlap([1, 2], [3], 2)


def test_what_is_no_run():
    right = np.ones(3, dtype=bool)
    with pytest.raises(DataError, match="one baseline and something else"):
        effects({BASELINE: right})
    with pytest.raises(DataError, match=r"must be one true or false an item, \[3\], not bool \(2,\)"):
        effects({BASELINE: right, condition(0.1): right[:2]})
    with pytest.raises(DataError, match="int64"):
        effects({BASELINE: right, condition(0.1): np.array([1, 0, 2])})
