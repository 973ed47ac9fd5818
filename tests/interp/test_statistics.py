import math

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.statistics import mcnemar, share


@pytest.mark.parametrize(("k", "n", "level"), [(0, 7, 0.95), (25, 50, 0.95), (50, 50, 0.9), (1, 1000, 0.99)])
def test_a_share_has_wilsons_interval(k, n, level):
    found = share(k, n, level)
    low, high = proportion_confint(k, n, 1 - level, method="wilson")
    assert found[:3] == (k, n, k / n)
    assert found[3:] == pytest.approx((low, high), abs=1e-9)


def test_a_share_of_none_is_none():
    assert share(0, 0) == (0, 0, None, None, None)


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 9, 50), (5, 5, 50), (5, 4, 50), (0, 8, 40), (23, 0, 40)])
def test_mcnemar_is_statsmodels_and_its_interval_that_of_the_paper(gained, lost, n):
    found = mcnemar(gained, lost, n)
    table = [[0, gained], [lost, n - gained - lost]]
    assert found.p_value == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue, abs=1e-12)
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)  # Bonett and Price 2012, equation 3
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half), abs=1e-12)
    assert found.change == (gained - lost) / n


def test_the_interval_of_a_change_holds_the_truth_as_often_as_it_says():
    rng, n, truth = np.random.default_rng(0), 50, 0.2 - 0.1
    counts = rng.multinomial(n, [0.2, 0.1, 0.7], size=2000)
    inside = [found.low <= truth <= found.high for found in (mcnemar(int(g), int(lost), n) for g, lost, _ in counts)]
    assert 0.94 <= np.mean(inside) <= 0.975


def test_no_change_at_all_and_no_questions():
    assert mcnemar(0, 0, 10).p_value == 1 and mcnemar(0, 0, 10).change == 0
    with pytest.raises(DataError, match="no question was answered twice"):
        mcnemar(0, 0, 0)
