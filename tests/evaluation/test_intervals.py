"""Intervals against scipy's BCa, against each other, and against the truth they ought to hold."""

import pickle
from statistics import NormalDist

import numpy as np
import pytest
import torch

from recipes.interval_cover import FIGURES, cover
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.intervals import Estimate, Sampling, clusters, paired_difference
from tests.evaluation.test_accumulators import fed, sample
from tests.support import required_module

RESAMPLES = 10_000
MONTE_CARLO = 0.04
"""Of an interval's width: what 10,000 draws leave open at its ends, with room."""


def skewed(n_documents=60, tokens=5, seed=0):
    """Errors of documents go over three decades, so that BCa and plain percentiles differ."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n_documents * tokens, 3, generator=g, dtype=torch.float64)
    size = torch.randn(n_documents, generator=g, dtype=torch.float64).exp().repeat_interleave(tokens)[:, None]
    x_hat = x + 0.2 * size * torch.randn(n_documents * tokens, 3, generator=g, dtype=torch.float64)
    return x, x_hat, torch.arange(n_documents).repeat_interleave(tokens)


def by_document(value_t, document_t):
    return torch.zeros(int(document_t.max()) + 1).double().index_add_(0, document_t, value_t).numpy()


def scipys(parts, method):
    required_module("scipy")
    from scipy.stats import bootstrap

    def ratio(part, whole, axis):
        return part.sum(axis) / whole.sum(axis)

    result = bootstrap(parts, ratio, paired=True, vectorized=True, method=method, n_resamples=RESAMPLES, rng=1)
    return np.array(result.confidence_interval)


def test_intervals_are_scipys_bca():
    x, x_hat, document = skewed()
    intervals = fed(x, x_hat, None, documents=document).compute(resamples=RESAMPLES)
    sse, n = by_document((x - x_hat).square().sum(1), document), by_document(torch.ones(len(x)).double(), document)
    for name, parts in {"mse": (sse, n), "nmse": (sse, by_document(x.square().sum(1), document))}.items():
        ours = np.array(getattr(intervals, name).interval)
        bca, percentile = scipys(parts, "BCa"), scipys(parts, "percentile")
        allowed = MONTE_CARLO * (bca[1] - bca[0])
        assert np.abs(ours - bca).max() < allowed, name
        assert np.abs(percentile - bca).max() > 3 * allowed, name


def test_a_paired_difference_is_scipys_and_narrower_than_an_unpaired_one():
    x, x_hat, document = skewed()
    better = x + 0.9 * (x_hat - x) + 0.01
    sampling = Sampling(RESAMPLES)
    before = fed(x, x_hat, None, documents=document).compute(resamples=RESAMPLES)
    after, apart = (fed(x, better, None, documents=document).compute(resamples=RESAMPLES, seed=s) for s in (0, 1))
    points = [{"mse": m.mse, "l0": m.l0} for m in (before, after)]
    paired, unpaired = (
        paired_difference(*points, before.replicates, m.replicates, sampling)["mse"] for m in (after, apart)
    )
    difference = (x - better).square().sum(1) - (x - x_hat).square().sum(1)
    parts = by_document(difference, document), by_document(torch.ones(len(x)).double(), document)
    bca = scipys(parts, "BCa")
    assert paired == pytest.approx(float(difference.mean()), rel=1e-9)
    assert np.abs(np.array(paired.interval) - bca).max() < MONTE_CARLO * (bca[1] - bca[0])
    assert np.ptp(unpaired.interval) > 3 * np.ptp(paired.interval)


def test_a_difference_of_what_is_not_defined_is_not_defined():
    before, after = {"ve": None, "l0": 3.0, "l1": 1.0, "gone": 1.0}, {"ve": 0.5, "l0": 5.0, "l1": None}
    differences = paired_difference(before, after, {}, {}, Sampling())
    assert differences == {"ve": None, "l0": 2.0, "l1": None, "gone": None}
    assert differences["l0"].interval is None


def test_intervals_of_256_documents_hold_the_truth_as_often_as_they_say():
    """The same 200 trials always; `recipes/interval_cover.py` runs a thousand."""
    shares = cover(None, 200, tokens=10, resamples=500, n_truth=30_000)
    assert set(shares) == set(FIGURES)
    for name, share in shares.items():
        assert 0.93 <= share <= 0.97, (name, share)


def test_with_heavy_tails_intervals_hold_less_and_leaving_out_the_worst_tokens_helps():
    """Measured, no target: errors without a variance cannot be told from 256 documents."""
    shares = cover(2.0, 60, tokens=10, resamples=300, n_truth=30_000)
    print(shares)
    assert 0.3 < shares["ve"] < 0.7
    assert shares["ve_without_top_sse"] > 0.9


def test_weights_are_draws_of_documents_and_then_all_but_one():
    weights = Sampling(4000, seed=3).weights(8)
    assert weights.shape == (4008, 8) and weights.dtype == torch.float64
    drawn, without = weights[:4000], weights[4000:]
    assert torch.equal(drawn, drawn.round()) and (drawn.sum(1) == 8).all()
    assert torch.equal(without, 1 - torch.eye(8).double())
    # of a multinomial with 8 draws: mean 1, variance 7/8, covariance −1/8
    cov = torch.cov(drawn.T)
    assert drawn.mean(0).tolist() == pytest.approx([1] * 8, abs=0.05)
    torch.testing.assert_close(cov, torch.eye(8).double() - 1 / 8, atol=0.07, rtol=0)


def test_the_seed_decides_and_nothing_else():
    assert torch.equal(Sampling(100, seed=1).weights(9), Sampling(100, seed=1).weights(9))
    assert not torch.equal(Sampling(100, seed=1).weights(9), Sampling(100, seed=2).weights(9))
    x, x_hat, document = skewed()
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    one, again, other = (fed(x, x_hat, None, documents=document).compute(seed=s).intervals() for s in (0, 0, 1))
    assert one == again and one["ve"] != other["ve"]
    assert torch.equal(state[0], torch.random.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_a_level_is_the_share_that_an_interval_holds_of_its_draws():
    """Of replicates without bias or skew the interval is their quantiles."""
    value = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    jackknife = torch.tensor([-1.0, 0, 1]).double()
    for level in (0.5, 0.9, 0.95):
        low, high = Sampling(2001, level=level).interval(0.0, torch.cat([value, jackknife]))
        assert (low, high) == pytest.approx((-level, level), abs=1e-3)


@pytest.mark.parametrize("below", [0.3, 0.5, 0.8])
def test_a_value_off_the_median_of_its_draws_moves_its_interval_twice_as_far(below):
    """Of uniform draws without skew: Φ(2·Φ⁻¹(share below) ± 1.96), which are their own quantiles."""
    normal = NormalDist()
    draws, jackknife = torch.linspace(0, 1, 100_001, dtype=torch.float64), torch.tensor([-1.0, 0, 1]).double()
    low, high = Sampling(100_001).interval(below, torch.cat([draws, jackknife]))
    expected = [normal.cdf(2 * normal.inv_cdf(below) + z) for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975))]
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-4)


def test_skew_moves_both_ends_by_a_sixth_of_it():
    """Without one of three documents the figure is −2, 1 or 1: spreads 2, −1, −1 have cubes 6 and squares 6, so that
    the acceleration is 6 / (6 · 6^1.5)."""
    normal, a = NormalDist(), 6**-1.5
    draws, jackknife = torch.linspace(0, 1, 100_001, dtype=torch.float64), torch.tensor([-2.0, 1, 1]).double()
    interval = Sampling(100_001).interval(0.5, torch.cat([draws, jackknife]))
    expected = [normal.cdf(z / (1 - a * z)) for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975))]
    assert interval == pytest.approx(tuple(expected), abs=1e-4)


def test_beyond_1024_documents_neighbours_go_together():
    assert clusters(1024).tolist() == list(range(1024))
    assert clusters(2048).tolist() == [i // 2 for i in range(2048)]
    group_k = clusters(3000)
    assert (group_k.diff() >= 0).all() and set(group_k.tolist()) == set(range(1024))
    assert set(group_k.bincount().tolist()) == {2, 3}
    assert clusters(0).tolist() == []


def test_with_few_documents_or_draws_there_is_no_interval():
    """Of 8 documents 95 % intervals hold the truth in some .8 of the trials, of 3 in .3 of them."""
    x, x_hat, document = skewed()
    assert Sampling(100).weights(8).shape == (108, 8) and Sampling(99).weights(8) is Sampling(100).weights(7) is None
    for documents, resamples in ((None, 100), (document % 7, 100), (document, 99), (document, 0)):
        metrics = fed(x, x_hat, None, documents=documents).compute(resamples=resamples)
        assert metrics.ve.interval is None and metrics.intervals() == {} and metrics.verdict_share is None


@pytest.mark.parametrize(("undefined", "has_interval"), [(0, True), (40, True), (60, False)])
def test_more_than_one_undefined_draw_in_twenty_leaves_no_interval(undefined, has_interval):
    replicates = torch.randn(1000 + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    replicates[:undefined] = torch.nan
    interval = Sampling(1000).interval(0.0, replicates)
    assert (interval is not None) == has_interval
    assert Sampling(1000).interval(float("nan"), replicates) is None


def test_a_figure_that_never_varies_has_a_point_for_an_interval():
    assert Sampling(20).interval(2.0, torch.full((25,), 2.0, dtype=torch.float64)) == (2.0, 2.0)


def test_the_verdicts_share_is_that_of_the_draws_that_agree():
    """One document in four is badly reconstructed: some draws are a misfit, some are not."""
    x, _, _ = sample(n=2000)
    document = torch.arange(2000) // 250
    x_hat = x + 0.1
    x_hat[document < 2] = -0.5 * x[document < 2]
    metrics = fed(x, x_hat, None, documents=document).compute(resamples=300)
    ve, without = metrics.replicates["ve"][:300], metrics.replicates["ve_without_top_sse", 0.01][:300]
    dominated = torch.zeros(300, dtype=torch.bool)
    for f in (0.001, 0.01):
        gain = metrics.replicates["ve_without_top_sse", f][:300] - ve > 0.05
        dominated |= gain & (metrics.replicates["sse_share", f][:300] > 0.2)
    share = {
        "misfit": without < 0.5,
        "outlier-dominated": ~(without < 0.5) & dominated,
        "healthy": ~(without < 0.5) & ~dominated,
    }[metrics.verdict]
    assert metrics.verdict_share == pytest.approx(float(share.double().mean()))
    assert 0 < metrics.verdict_share < 1


def test_an_estimate_is_a_float_that_keeps_its_interval():
    estimate = pickle.loads(pickle.dumps(Estimate(0.5, (0.4, 0.6))))
    assert (estimate, estimate.interval) == (0.5, (0.4, 0.6))
    assert Estimate(0.5).interval is None


@pytest.mark.parametrize("settings", [{"resamples": -1}, {"seed": -1}, {"level": 0.0}, {"level": 1.0}])
def test_impossible_sampling_is_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)
