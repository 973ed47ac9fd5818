import numpy as np
import pytest
from scipy import stats
from scipy.stats import binomtest, permutation_test

from sae_lens_gemma4.interp.steering.permuting import against, crossed, detectable, holm, trend
from tests.support import required_module


@pytest.mark.parametrize("k", [1, 2, 5])
def test_sign_flips_are_scipys(k):
    rng = np.random.default_rng(k)
    for _ in range(5):
        chosen, others = rng.random(11) < 0.6, rng.random((11, k)) < 0.4
        difference = k * chosen - others.sum(axis=1)
        reference = permutation_test((difference,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert against(chosen, others) == pytest.approx(reference.pvalue)


def test_one_other_is_mcnemars_exact_test():
    rng = np.random.default_rng(0)
    a, b = rng.random(60) < 0.7, rng.random(60) < 0.5
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    assert against(a, b[:, None]) == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert against(a, a[:, None]) == 1.0


def test_trend_is_scipys():
    rng = np.random.default_rng(1)
    dose = np.array([0.0, 0.1, 0.1, 0.3])
    right = rng.random((12, 4)) < 0.5 + dose
    slopes = np.array([np.polyfit(dose, row, 1)[0] for row in right.astype(float)])
    reference = permutation_test((slopes,), np.sum, permutation_type="samples", n_resamples=np.inf)
    slope, p = trend(right, dose, 40_000, 0)
    assert slope == pytest.approx(slopes.mean())
    assert p == pytest.approx(reference.pvalue, abs=0.01)
    assert trend(right, dose, 500, 3) == trend(right, dose, 500, 3)
    assert trend(np.ones((5, 4), dtype=bool), dose, 100, 0) == (pytest.approx(0), 1.0)
    assert trend(right, np.zeros(4), 100, 0) == (0.0, 1.0)


def test_crossed_is_clarks_min_f():
    """F by items and F by directions from scipy's t, min F′ = F1 F2 / (F1 + F2), its degrees of freedom as Clark's."""
    change = np.random.default_rng(2).normal(0.3, 1, (12, 5)) + np.random.default_rng(3).normal(0, 0.4, 5)
    f1 = stats.ttest_1samp(change.mean(axis=1), 0).statistic ** 2
    f2 = stats.ttest_1samp(change.mean(axis=0), 0).statistic ** 2
    freedom = (f1 + f2) ** 2 / (f1**2 / 4 + f2**2 / 11)
    mean, p = crossed(change)
    assert mean == pytest.approx(change.mean())
    assert p == pytest.approx(stats.f.sf(f1 * f2 / (f1 + f2), 1, freedom))
    assert p > max(stats.ttest_1samp(change.mean(axis=axis), 0).pvalue for axis in (0, 1))
    assert crossed(np.zeros((4, 3))) == (0.0, 1.0)
    assert 0 < crossed(np.ones((20, 3)))[1] < 1e-6


def test_holm_is_statsmodels():
    required_module("statsmodels")
    from statsmodels.stats.multitest import multipletests

    for seed in range(5):
        p = np.random.default_rng(seed).random(6) ** 3
        np.testing.assert_allclose(holm(p.tolist()), multipletests(p, method="holm")[1])
    assert holm([]) == []


def within_items(chosen_n, others_nk, rng, draws=300):
    """The test that is not used: each item's answers permuted over the conditions."""
    all_nc = np.concatenate([chosen_n[:, None], others_nk], axis=1)
    drawn = rng.permuted(np.broadcast_to(all_nc, (draws, *all_nc.shape)).copy(), axis=2)[:, :, 0].sum(axis=1)
    centre = all_nc.mean(axis=1).sum()
    return (1 + (np.abs(drawn - centre) >= abs(chosen_n.sum() - centre) - 1e-9).sum()) / (1 + draws)


def test_items_that_change_under_any_push_fool_permutation_within_items_and_not_sign_flips():
    """Gains and losses balance, and five directions change the same items."""
    rng, found, runs = np.random.default_rng(2), np.zeros(2), 300
    for _ in range(runs):
        before = np.arange(60) < 30
        pushed = np.where(rng.random(60) < 0.25, ~before, before)
        others = np.repeat(pushed[:, None], 5, axis=1)
        found += (against(before, others) <= 0.05, within_items(before, others, rng) <= 0.05)
    assert found[0] / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert 0.25 <= found[1] / runs <= 0.5


def test_what_could_have_been_found():
    able = detectable(50, 10, 0.05)
    assert able.fewest == 6  # 2 · 2^-6 is .031 and 2 · 2^-5 is .063
    net = able.net
    assert binomtest((10 + net) // 2, 10).pvalue <= 0.05 < binomtest((10 + net) // 2 - 1, 10).pvalue
    assert detectable(50, 5, 0.05).net is None
    assert detectable(4, 2, 0.05).change is None
    assert detectable(50, 9, 0.05 / 4).fewest == 8


def test_the_power_it_states_is_the_power_there_is():
    able = detectable(80, 16, 0.05)
    rng, runs = np.random.default_rng(4), 4000
    for change, low, high in ((able.change, 0.8, 0.87), (able.change - 2 / 80, 0.6, 0.8)):
        n_changed = rng.binomial(80, 0.2, runs)
        gained = rng.binomial(n_changed, (1 + change / 0.2) / 2)
        found = np.mean(
            [binomtest(g, d).pvalue <= 0.05 if d else False for g, d in zip(gained, n_changed, strict=True)]
        )
        assert low - 0.02 <= found <= high + 0.02
