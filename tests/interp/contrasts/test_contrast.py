import json

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.contrasts.contrast import contrast, in_group
from sae_lens_gemma4.interp.contrasts.effect_sizes import (
    MOST_D,
    correlations,
    d_of,
    hedges,
    unit_columns,
    weighted_d,
)
from sae_lens_gemma4.interp.item_means import ItemMeans, Site
from sae_lens_gemma4.interp.items import Item, item_corpus, item_means
from tests.interp.conftest import HOOK

NO_INTERVALS = Sampling(resamples=0)


def means_of(*arrays, kind="activations", tokens_n=None):
    sites = tuple(Site(f"blocks.{i}.hook_resid_post", kind, a.astype(np.float32)) for i, a in enumerate(arrays))
    tokens_n = np.arange(len(arrays[0])) % 7 + 3 if tokens_n is None else tokens_n
    return ItemMeans(sites, tokens_n, "mean", {"model": "made up"})


def quick(means, in_group_n, **settings):
    return contrast(means, in_group_n, **({"sampling": NO_INTERVALS, "permutations": 199, "splits": 4} | settings))


def group(n_a, n_b):
    return np.arange(n_a + n_b) < n_a


def sparse(rng, n, f, share=0.3):
    """As SAEs' latents are: zero on most items, skewed on the others."""
    return np.where(rng.random((n, f)) < share, rng.exponential(size=(n, f)) ** 2, 0)


def test_d_is_t_by_the_group_sizes():
    rng = np.random.default_rng(0)
    x_nf = rng.normal(size=(23, 40)) * 10.0 ** rng.integers(-3, 4, size=40) + 5
    x_nf = x_nf.astype(np.float32).astype(np.float64)
    found = quick(means_of(x_nf), group(9, 14)).sites[0]
    compared = CompareMeans(DescrStatsW(x_nf[:9]), DescrStatsW(x_nf[9:]))
    t_f, _, _ = compared.ttest_ind(usevar="pooled")
    np.testing.assert_allclose(found.d_f, t_f * np.sqrt(1 / 9 + 1 / 14), rtol=1e-5, atol=1e-6)
    largest = np.sort(np.abs(found.d_f))[::-1][:10]
    assert found.curve == pytest.approx(largest.mean())
    assert [abs(feature.d) for feature in found.top] == pytest.approx(largest.tolist())
    assert found.top[0].length_r == pytest.approx(
        stats.pearsonr(x_nf[:, found.top[0].feature], np.arange(23) % 7).statistic, abs=1e-5
    )


def test_p_of_one_feature_is_that_of_a_permutation_test():
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.8, 1.6):
        x_n1 = rng.normal(size=(13, 1))
        x_n1[:6] += shift
        found = quick(means_of(x_n1), group(6, 7), permutations=20_000).sites[0]
        exact = stats.permutation_test(
            (x_n1[:6, 0], x_n1[6:, 0]),
            lambda a, b, axis: np.abs(a.mean(axis) - b.mean(axis)),
            alternative="greater",
            n_resamples=np.inf,
            vectorized=True,
        ).pvalue
        assert found.p_f[0] == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)
        assert found.p_value == found.p_f[0]  # with one feature the curve is its |d|


def test_family_wise_p_is_the_share_of_permutations_with_a_larger_maximum_over_all_sites():
    rng = np.random.default_rng(4)
    arrays, members = [rng.normal(size=(12, 5)), rng.normal(size=(12, 8))], group(5, 7)
    found = quick(means_of(*arrays), members, permutations=150, seed=9, top=3)
    drawn = np.random.default_rng(9).permuted(np.tile(members, (150, 1)), axis=1)

    def r_of(x_nf, inside_n):
        return np.array([abs(np.corrcoef(column, inside_n)[0, 1]) for column in x_nf.T])

    def curve(x_nf, inside_n):
        t_f = np.abs(stats.ttest_ind(x_nf[inside_n], x_nf[~inside_n]).statistic) * np.sqrt(1 / 5 + 1 / 7)
        return np.sort(t_f)[-3:].mean()

    maxima = np.array([max(r_of(x_nf, row).max() for x_nf in arrays) for row in drawn])
    curves = np.array([[curve(x_nf, row) for x_nf in arrays] for row in drawn])
    for at, (site, x_nf) in enumerate(zip(found.sites, arrays, strict=True)):
        expected = [(1 + (maxima >= r - 1e-6).sum()) / 151 for r in r_of(x_nf, members)]
        assert site.p_f.tolist() == pytest.approx(expected)
        assert site.null_median == pytest.approx(np.median(curves[:, at]), rel=1e-4)
        assert site.null_95 == pytest.approx(np.quantile(curves[:, at], 0.95), rel=1e-4)
        assert site.p_value == pytest.approx((1 + (curves.max(axis=1) >= curve(x_nf, members)).sum()) / 151)


def test_the_ten_largest_of_noise_are_as_large_as_the_published_curve():
    """25 items against 25 in 2,560 independent dimensions: |d| of .95, where the card shows .896 at its peak."""
    rng = np.random.default_rng(0)
    found = quick(means_of(*(rng.normal(size=(50, 2560)) for _ in range(42))), group(25, 25), permutations=99)
    curve = np.array([site.curve for site in found.sites])
    quantiles = stats.t.isf((np.arange(10) + 0.5) / 2560 / 2, 48) * np.sqrt(2 / 25)
    assert curve.mean() == pytest.approx(quantiles.mean(), abs=0.02) == 0.95
    assert curve.min() > 0.8 and found.peak.curve > 0.98
    assert found.peak.null_median == pytest.approx(0.95, abs=0.02) and found.peak.p_value > 0.05
    assert abs(np.mean([site.split_half for site in found.sites])) < 0.05  # choosing on one half, there is nothing


@pytest.mark.parametrize("kind", ["activations", "latents"])
def test_noise_is_found_in_no_more_datasets_than_stated(kind):
    rng = np.random.default_rng(1)
    members, false, peaks = group(12, 20), 0, 0
    for seed in range(300):
        arrays = [rng.normal(size=(32, 40)) if kind == "activations" else sparse(rng, 32, 40) for _ in range(2)]
        found = quick(means_of(*arrays, kind=kind), members, permutations=99, splits=1, seed=seed)
        false += any(site.n_found for site in found.sites)
        peaks += found.peak.p_value <= 0.05
    low, high = stats.binom.ppf([0.0005, 0.9995], 300, 0.05)
    assert low <= false <= high and low <= peaks <= high


def test_planted_latents_are_found_and_alone():
    rng = np.random.default_rng(2)
    members, power, wrong = group(40, 40), 0, 0
    for seed in range(20):
        z_nf, other_nf = sparse(rng, 80, 400), sparse(rng, 80, 400)
        z_nf[:40, :5] += rng.exponential(size=(40, 5)) * 2 + 1.5
        found = quick(means_of(other_nf, z_nf, kind="latents"), members, seed=seed)
        site = found.sites[1]
        power += int((site.p_f[:5] <= 0.05).sum())
        wrong += int((site.p_f[5:] <= 0.05).any()) + int(found.sites[0].n_found > 0)
        assert found.peak is site and site.p_value <= 0.05
        assert {feature.feature for feature in site.top[:3]} <= set(range(5))
    assert power >= 85 and wrong <= 4  # of 100 latents, of 40 families


def test_what_one_half_chose_the_other_measures_without_bias():
    rng = np.random.default_rng(5)
    d, halves, curves = 1.5, [], []
    for seed in range(12):
        x_nf = rng.normal(size=(120, 300))
        x_nf[:60, :10] += d
        site = quick(means_of(x_nf), group(60, 60), splits=10, seed=seed).sites[0]
        halves.append(site.split_half)
        curves.append(site.curve)
    assert np.mean(halves) == pytest.approx(d, abs=0.1) and np.mean(curves) > np.mean(halves)


def test_the_sign_of_what_was_chosen_is_kept():
    rng = np.random.default_rng(6)
    x_nf = rng.normal(size=(80, 20))
    x_nf[:40, :10] -= 2
    found = quick(means_of(x_nf), group(40, 40)).sites[0]
    assert all(feature.d < -1 for feature in found.top) and found.split_half > 1.5


def test_intervals_hold_a_known_d_as_often_as_they_say():
    rng = np.random.default_rng(7)
    held, n = 0, 250
    sampling = Sampling(resamples=400)
    for _ in range(n):
        x_n1 = rng.normal(size=(55, 1))
        x_n1[:25] += 0.8
        (feature,) = contrast(means_of(x_n1), group(25, 30), sampling=sampling, permutations=99).sites[0].top
        held += feature.interval[0] <= 0.8 <= feature.interval[1]
    assert 0.90 <= held / n <= 0.985


def test_an_interval_is_scipys():
    rng = np.random.default_rng(8)
    x_n1 = rng.exponential(size=(60, 1))
    x_n1[:25] += 0.7
    (feature,) = contrast(means_of(x_n1), group(25, 35), sampling=Sampling(4000)).sites[0].top

    def d(a, b, axis):
        pooled = (24 * a.var(axis, ddof=1) + 34 * b.var(axis, ddof=1)) / 58
        return (a.mean(axis) - b.mean(axis)) / np.sqrt(pooled)

    expected = stats.bootstrap(
        (x_n1[:25, 0], x_n1[25:, 0]), d, n_resamples=4000, method="BCa", vectorized=True, rng=np.random.default_rng(0)
    ).confidence_interval
    assert feature.interval == pytest.approx((expected.low, expected.high), abs=0.05)


def test_with_few_items_there_is_no_interval_and_no_half():
    x_nf = np.random.default_rng(9).normal(size=(10, 4))
    site = contrast(means_of(x_nf), group(3, 7)).sites[0]
    assert site.interval is None and site.split_half is None and site.top[0].interval is None
    assert contrast(means_of(x_nf), group(3, 7)).peak_share is None


def test_latents_active_in_few_items_are_left_out_and_counted():
    rng = np.random.default_rng(10)
    z_nf = sparse(rng, 40, 30)
    z_nf[:, 3] = 0
    z_nf[:, 4] = 0
    z_nf[:4, 4] = 100.0  # would be the largest d
    z_nf[:, 5] = 2.5
    found = quick(means_of(z_nf, np.zeros((40, 2)), kind="latents"), group(4, 36))
    assert not found.sites[0].admitted_f[[3, 4, 5]].any()
    assert found.sites[0].p_f[4] == 1 and found.sites[0].d_f[4] == 0
    assert found.to_dict()["sites"][0]["left_out"] == int(((z_nf != 0).sum(axis=0) < 5).sum() + 1)
    assert found.sites[1].curve is None and found.peak is found.sites[0]
    assert quick(means_of(z_nf, kind="latents"), group(4, 36), min_active=4).sites[0].top[0].feature == 4


@pytest.mark.parametrize("kind", ["activations", "latents"])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_one_feature_that_separates_the_groups_is_flagged_and_does_not_make_the_curve(kind, noise):
    """A latent that is 1 in one group and 0 in the other, or nearly, among 49 of noise."""
    rng = np.random.default_rng(11)
    x_nf = rng.normal(size=(32, 50))
    x_nf[:, 17] = group(16, 16) + rng.normal(size=32) * noise
    found = contrast(means_of(x_nf, rng.normal(size=(32, 50)), kind=kind), group(16, 16), permutations=199)
    site, other = found.sites
    first, *rest = site.top
    assert (first.feature, first.d, first.interval, first.separates) == (17, MOST_D, None, True)
    assert first.p_value == 1 / 200
    assert not any(feature.separates or abs(feature.d) > 3 or feature.interval is None for feature in rest)
    assert site.curve == pytest.approx((MOST_D + sum(abs(feature.d) for feature in rest)) / 10)
    assert site.curve < 2.2
    assert site.interval[0] < site.curve < site.interval[1] and site.interval[1] - site.interval[0] < 1
    assert other.interval[0] < other.curve < other.interval[1]
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["most_d"] == MOST_D and [s["separate"] for s in document["sites"]] == [1, 0]


def test_a_negative_separator_has_the_same_limit_on_all_ways():
    x_nf = np.random.default_rng(12).normal(size=(32, 5)).astype(np.float32)
    members = group(16, 16)
    x_nf[:, 0] = ~members
    by_weights = weighted_d(x_nf, torch.ones(1, 32, dtype=torch.float64), members)[0]
    by_r = d_of(torch.from_numpy(correlations(unit_columns(x_nf), members)), members)
    assert by_weights[0] == by_r[0] == -MOST_D
    np.testing.assert_allclose(by_weights, by_r, rtol=1e-5)


def test_hedges_factor_is_the_one_of_gamma_functions():
    from scipy.special import gamma

    for freedom in (2, 3, 14, 60):
        exact = gamma(freedom / 2) / np.sqrt(freedom / 2) / gamma((freedom - 1) / 2)
        assert hedges(freedom) == pytest.approx(exact)
    assert hedges(14) == pytest.approx(1 - 3 / (4 * 14 - 1), abs=1e-3)  # the approximation that is often printed


def test_few_items_do_not_make_the_split_half_larger():
    """All features are chosen, so nothing but smallness is left; without the correction it would be 1.59."""
    x_nf = np.random.default_rng(13).normal(size=(32, 3000))
    x_nf[:16] += 1.5
    site = quick(means_of(x_nf), group(16, 16), top=3000, splits=6).sites[0]
    assert site.split_half == pytest.approx(1.5, abs=0.03)


def test_a_group_of_fewer_than_eight_is_not_halved():
    x_nf = np.random.default_rng(14).normal(size=(24, 20))
    assert quick(means_of(x_nf), group(7, 17)).sites[0].split_half is None
    found = quick(means_of(x_nf), group(8, 16))
    assert found.sites[0].split_half is not None and found.to_dict()["least_split"] == 8


def test_length_is_told_beside_what_may_be_nothing_else():
    rng = np.random.default_rng(12)
    members = group(30, 30)
    tokens_n = np.where(members, 20, 30) + rng.integers(0, 6, 60)
    x_nf = rng.normal(size=(60, 5))
    x_nf[:, 2] = tokens_n + rng.normal(size=60)
    found = quick(means_of(x_nf, tokens_n=tokens_n), members)
    a, b = tokens_n[members], tokens_n[~members]
    pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert found.length["d"] == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-4)
    assert found.length["mean_tokens"] == [a.mean(), b.mean()] and found.length["p_value"] == 1 / 200
    assert found.peak.top[0].feature == 2 and found.peak.top[0].length_r > 0.9


def test_the_steering_direction_is_the_difference_of_means():
    rng = np.random.default_rng(13)
    x_nf, members = rng.normal(size=(30, 6)), rng.random(30) < 0.4
    found = quick(means_of(x_nf), members)
    difference = x_nf[members].mean(axis=0) - x_nf[~members].mean(axis=0)
    unit = found.difference_of_means("blocks.0.hook_resid_post")
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, difference / np.linalg.norm(difference), atol=1e-6)
    with pytest.raises(UnknownNameError, match=r"blocks\.0"):
        found.difference_of_means("blocks.1.hook_resid_post")


def test_the_same_seed_gives_the_same_and_another_does_not():
    x_nf = np.random.default_rng(14).normal(size=(40, 50))
    one, same, other = (contrast(means_of(x_nf), group(20, 20), seed=seed).to_dict() for seed in (1, 1, 2))
    assert one == same and one["sites"][0]["null_95"] != other["sites"][0]["null_95"]
    assert one["schema"] == 1 and one["kind"] == "contrast" and one["settings"]["seed"] == 1
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_groups_of_items():
    items = [Item("a", group="wrong"), Item("b", group="right"), Item("c", group="wrong")]
    members, names = in_group(items, "right")
    assert members.tolist() == [False, True, False] and names == ("right", "wrong")
    assert in_group(items)[1] == ("wrong", "right")
    three = [*items, Item("d", group="none")]
    assert in_group(three, "right")[1] == ("right", "others")
    with pytest.raises(DataError, match="name the one"):
        in_group(three)
    with pytest.raises(UnknownNameError, match="Did you mean 'right'"):
        in_group(items, "rigth")
    with pytest.raises(DataError, match="all 2 items are in 'wrong'"):
        in_group([items[0], items[2]])
    with pytest.raises(DataError, match="Item 1 is in no group"):
        in_group([items[0], Item("x")])


def test_bad_contrasts_are_named():
    x_nf = np.random.default_rng(15).normal(size=(20, 3))
    with pytest.raises(DataError, match="'right' has 1 and 'wrong' 19"):
        quick(means_of(x_nf), group(1, 19), names=("right", "wrong"))
    with pytest.raises(DataError, match="'group' has 0"):
        quick(means_of(x_nf), group(0, 20))
    with pytest.raises(DataError, match="one entry for each of 20"):
        quick(means_of(x_nf), group(10, 11))
    with pytest.raises(DataError, match="the groups are the same items"):
        quick(means_of(np.concatenate([x_nf, x_nf])), group(20, 20))
    with pytest.raises(DataError, match="varies"):
        quick(means_of(np.ones((20, 3))), group(10, 10))
    x_nf[4, 1] = np.nan
    with pytest.raises(DataError, match=r"blocks\.0\.hook_resid_post are not finite, first of item 4"):
        quick(means_of(x_nf), group(10, 10))
    for setting in ({"permutations": 50}, {"splits": 0}, {"top": 0}, {"min_active": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            quick(means_of(x_nf), group(10, 10), **setting)


def test_from_items_to_a_contrast_on_the_embedded_model(model, sae):
    """Texts on files against texts on numbers: of 16 items each, the model's layers tell them apart."""
    files = ["open the file", "read a line of the file", "close the file", "write to a file in text mode"]
    numbers = ["add two integers", "the square root of a float", "round a decimal number", "divide by zero"]
    ends = [" first.", " and return the result.", " if it is possible.", " in the example below."]
    items = [Item(f"You can {what}{end}", group=name)
             for name, list_ in (("files", files), ("numbers", numbers)) for what in list_ for end in ends]  # fmt: skip
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
    means = item_means(model, item_corpus(items, model.tokenizer), hooks, {HOOK: sae})
    members, names = in_group(items)
    layers = quick(means.only("activations"), members, names=names)
    latents = quick(means.only("latents"), members, names=names)
    assert layers.peak.p_value <= 0.05 and layers.peak.split_half > 1
    assert latents.sites[0].n_found and latents.names == ("files", "numbers")
    scrambled = np.random.default_rng(0).permutation(members)
    assert quick(means.only("latents"), scrambled).sites[0].n_found == 0
