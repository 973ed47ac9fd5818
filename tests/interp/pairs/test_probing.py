"""Paired effects of latents: p-values, rates, intervals, what is found in planted data and in none."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from scipy import stats

from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.pairs.paired_tests import ProbingWarning, standardised
from sae_lens_gemma4.interp.pairs.probing import ProbeSettings, effect_intervals, feature_labels, probe_pairs
from sae_lens_gemma4.interp.pairs.prompt_pairs import Category, Pair, PairMeans, pair_means, read_categories
from sae_lens_gemma4.interp.pairs.sign_flips import least_p, sign_flip_test
from tests.support import required_module

RECIPES = Path(__file__).parents[3] / "recipes"
PLAIN = ProbeSettings(scrambles=0, min_active=1)


def category(n_pairs, name="a"):
    return Category(name=name, label=f"label of {name}", pairs=tuple(Pair(f"{i}", f"-{i}") for i in range(n_pairs)))


def means(with_pf, without_pf, name="a", **lengths):
    with_pf, without_pf = np.asarray(with_pf), np.asarray(without_pf)
    return PairMeans(category(len(with_pf), name), with_pf, without_pf, **lengths)


def sparse(rng, n_pairs, n_latents):
    """Means like those of latents: silent on most prompts, skewed where not, and alike on both sides of a pair."""
    rate_f, scale_pf = rng.uniform(0.1, 0.9, n_latents), rng.lognormal(0, 1, (n_pairs, n_latents))
    sides = [(rng.random((n_pairs, n_latents)) < rate_f) * scale_pf * rng.lognormal(0, 0.5, (n_pairs, n_latents))]
    sides.append((rng.random((n_pairs, n_latents)) < rate_f) * scale_pf * rng.lognormal(0, 0.5, (n_pairs, n_latents)))
    return sides


@pytest.fixture
def difference_pf():
    """Ten pairs of seven latents, among them one with ties, one silent on most pairs, and one on all."""
    rng = np.random.default_rng(0)
    difference_pf = rng.normal(0.5, 1, (10, 7))
    difference_pf[:, 1] = rng.integers(-2, 4, 10)
    difference_pf[:7, 2] = 0
    difference_pf[:, 3] = 0
    difference_pf[:, 4] -= 1.2
    return difference_pf


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_exact_p_values_are_scipys(difference_pf, alternative):
    found = sign_flip_test(difference_pf, 1024, 0, alternative)
    for index, p in enumerate(found.p_f):
        x_p = difference_pf[:, index]
        expected = stats.permutation_test(
            (x_p,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=2000
        )
        assert p == pytest.approx(expected.pvalue, abs=1e-12)
    assert found.p_f.min() >= least_p(10, 1024, alternative)


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_drawn_p_values_are_near_the_exact_ones(difference_pf, alternative):
    exact, drawn = (sign_flip_test(difference_pf, n, 3, alternative) for n in (1024, 1023))
    error = 4 * np.sqrt(exact.p_f * (1 - exact.p_f) / 1023) + 2 / 1024
    assert (np.abs(drawn.p_f - exact.p_f) <= error).all()
    assert not np.array_equal(drawn.p_f, exact.p_f)
    assert np.array_equal(drawn.p_f, sign_flip_test(difference_pf, 1023, 3, alternative).p_f)
    none = sign_flip_test(np.ones((30, 2)), 200, 0)
    assert none.p_f == pytest.approx([1 / 201] * 2)  # never 0


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_family_wise_p_values_by_hand(difference_pf, alternative):
    """The largest t over latents under every assignment of signs, each by scipy."""
    some_pf = np.delete(difference_pf, 3, axis=1)[:8]

    def t(x_pf):
        t_f = np.nan_to_num(stats.ttest_1samp(x_pf, 0).statistic)
        return np.abs(t_f) if alternative == "two-sided" else t_f

    signs = [np.array(s)[:, None] for s in itertools.product([1, -1], repeat=8)]
    largest = np.array([t(s * some_pf).max() for s in signs])
    expected = [(largest >= one - 1e-9).mean() for one in t(some_pf)]
    found = sign_flip_test(some_pf, 256, 0, alternative)
    np.testing.assert_allclose(found.family_f, expected, atol=1e-12)
    assert (found.family_f >= found.p_f).all()


def test_many_latents_are_as_one():
    """More latents and flips than a chunk holds."""
    rng = np.random.default_rng(1)
    many_pf = rng.normal(size=(12, 600)).astype(np.float32)
    many = sign_flip_test(many_pf, 4096, 0)
    for index in (0, 255, 256, 599):
        assert sign_flip_test(many_pf[:, [index]], 4096, 0).p_f == many.p_f[index]


@pytest.mark.parametrize(("correction", "method"), [("bh", "fdr_bh"), ("by", "fdr_by")])
@pytest.mark.filterwarnings("ignore::sae_lens_gemma4.interp.pairs.paired_tests.ProbingWarning")
def test_rates_are_of_all_tests_together(correction, method):
    multitest = required_module("statsmodels") or pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(2)
    parts = [means(*sparse(rng, 10, 40), name=name) for name in "abc"]
    parts[1].with_pf[:, :5] += 3
    found = probe_pairs(parts, ProbeSettings(correction=correction, scrambles=0, q=0.2))
    p = np.concatenate([one.p_f for one in found.tests])
    q = np.concatenate([one.q_f for one in found.tests])
    tested = np.isfinite(p)
    np.testing.assert_allclose(q[tested], multitest.multipletests(p[tested], method=method)[1], rtol=1e-12)
    assert np.isnan(q[~tested]).all()
    assert found.n_tests == tested.sum() < 120
    assert found.n_passed == (q[tested] <= 0.2).sum() > 0


def test_what_is_tested_depends_on_no_side():
    """Active on so many prompts, whichever: swapping all sides tests the same latents."""
    rng = np.random.default_rng(3)
    with_pf, without_pf = sparse(rng, 8, 50)
    settings = ProbeSettings(min_active=6, scrambles=0, q=0.5)
    one, other = (probe_pairs([means(*sides)], settings) for sides in ((with_pf, without_pf), (without_pf, with_pf)))
    expected = np.flatnonzero((with_pf > 0).sum(0) + (without_pf > 0).sum(0) >= 6)
    assert 0 < len(expected) < 50
    assert np.array_equal(one.tests[0].tested, expected)
    assert np.array_equal(other.tests[0].tested, expected)


def test_effects(difference_pf):
    """d_z is t over the root of the number of pairs; its interval near scipy's BCa."""
    t_f = np.nan_to_num(stats.ttest_1samp(difference_pf, 0).statistic)
    np.testing.assert_allclose(standardised(difference_pf), t_f / np.sqrt(10), rtol=1e-12)
    assert standardised(np.ones((3, 1)))[0] == np.inf
    rng = np.random.default_rng(4)
    x_p = rng.normal(0.8, 1, 40)
    ((low, high),) = effect_intervals(x_p[:, None], Sampling(resamples=4000))
    expected = stats.bootstrap(
        (x_p,), lambda x, axis: x.mean(axis) / x.std(axis, ddof=1), n_resamples=4000, rng=rng
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=0.06)
    assert effect_intervals(x_p[:7, None], Sampling()) == [None]


@pytest.mark.filterwarnings("ignore::sae_lens_gemma4.interp.pairs.paired_tests.ProbingWarning")
def test_planted_latents_are_found_at_the_stated_rate():
    """20 of 2,000 latents get 1.5 standard deviations of their differences more on one side, in 50 data sets.

    Measured: mean false-discovery proportion .059 at q = .1, power .68.
    """
    rng = np.random.default_rng(5)
    settings = ProbeSettings(q=0.1, permutations=2**13, scrambles=0, sampling=Sampling(resamples=0))
    false, power = [], []
    for _ in range(50):
        with_pf, without_pf = sparse(rng, 13, 2000)
        planted = rng.choice(2000, 20, replace=False)
        with_pf[:, planted] += 1.5 * (with_pf - without_pf)[:, planted].std(axis=0)
        found = {one.index for one in probe_pairs([means(with_pf, without_pf)], settings).found}
        false.append(len(found - set(planted)) / max(len(found), 1))
        power.append(len(found & set(planted)) / 20)
    assert np.mean(false) <= 0.1 + 2 * np.std(false) / np.sqrt(50)
    assert np.mean(power) >= 0.65


def test_noise_has_discoveries_at_most_as_often_as_stated():
    """And not far less: the test is not idle. Of 200 data sets of 150 null latents, at q = .1, and family-wise.

    Measured: 8 and 21 of 200. Latents that are silent on most pairs have no small p-values, so the rate is not reached.
    """
    rng = np.random.default_rng(6)
    settings = ProbeSettings(q=0.1, permutations=2**12, scrambles=0, sampling=Sampling(resamples=0))
    any_found, any_family = 0, 0
    for _ in range(200):
        probing = probe_pairs([means(*sparse(rng, 12, 150))], settings)
        any_found += len(probing.found) > 0
        any_family += bool(np.nanmin(probing.tests[0].family_f) <= 0.1)
    highest = stats.binom.ppf(0.99, 200, 0.1)
    assert 4 <= any_found <= highest
    assert 4 <= any_family <= highest


def test_swapped_sides_find_nothing():
    rng = np.random.default_rng(7)
    with_pf, without_pf = sparse(rng, 14, 300)
    with_pf[:, :30] += 8
    found = probe_pairs([means(with_pf, without_pf)], ProbeSettings(scrambles=20))
    assert found.n_passed >= 30
    assert len(found.scrambled) == 20
    assert np.mean(found.scrambled) < 1
    again = probe_pairs([means(with_pf, without_pf)], ProbeSettings(scrambles=20))
    assert again.scrambled == found.scrambled and again.to_dict() == found.to_dict()


def test_a_latent_goes_to_the_category_of_its_largest_effect():
    rng = np.random.default_rng(8)
    parts = [means(*sparse(rng, 16, 6), name=name) for name in "abc"]
    for part, effect in zip(parts, (3, 6, 0), strict=True):
        part.with_pf[:, 2] = part.without_pf[:, 2] + effect + rng.normal(size=16)
    found = {one.index: one for one in probe_pairs(parts, PLAIN).found}
    assert found[2].category == "b"
    assert list(found[2].also) == ["a"]
    d_p = parts[0].with_pf[:, 2] - parts[0].without_pf[:, 2]
    assert found[2].also["a"] == pytest.approx(d_p.mean() / d_p.std(ddof=1))
    assert found[2].p_family == pytest.approx(3 / 2**16)  # the least of one category, times three


def test_what_is_said_of_a_latent():
    rng = np.random.default_rng(9)
    without_pf = rng.random((16, 3))
    with_pf = without_pf + [[2, 0, -2]] + rng.normal(size=(16, 3)) * 0.3
    with_pf[3, 0] = without_pf[3, 0] - 0.5
    lengths = {"tokens_with_p": rng.integers(8, 12, 16), "tokens_without_p": rng.integers(8, 12, 16)}
    probing = probe_pairs([means(with_pf, without_pf, **lengths)], ProbeSettings(alternative="two-sided"))
    up, down = sorted(probing.found, key=lambda one: one.index)
    assert (up.index, down.index) == (0, 2)
    assert down.effect < 0 < up.effect
    document = probing.to_dict()
    assert (document["found"], document["labelled"], document["less_active"]) == (2, 1, 1)
    assert document["categories"][0]["less_active"] == 1
    assert not up.all_equal and [one["all_equal"] for one in document["categories"][0]["top"]] == [False, False]
    assert up.interval[0] < up.effect < up.interval[1]
    assert (up.mean_with, up.mean_without) == pytest.approx((with_pf[:, 0].mean(), without_pf[:, 0].mean()))
    assert up.difference == pytest.approx(up.mean_with - up.mean_without)
    assert up.fires_more[:2] == (15, 16)
    longer_p = lengths["tokens_with_p"] - lengths["tokens_without_p"]
    assert up.length_r == pytest.approx(stats.pearsonr((with_pf - without_pf)[:, 0], longer_p).statistic)
    (label,) = feature_labels(probing)  # what is less active does not fire on the property
    assert (label.index, label.label, label.category, label.source) == (0, "label of a", "a", "prompt pairs")
    assert label.confidence == 15 / 16
    assert label.facts["fires_more"]["low"] == pytest.approx(stats.binomtest(15, 16).proportion_ci(method="wilson").low)
    assert label.facts["q_value"] == up.q_value
    json.dumps(dict(label.facts), allow_nan=False)


@pytest.mark.filterwarnings("ignore::sae_lens_gemma4.interp.pairs.paired_tests.ProbingWarning")
def test_the_document_is_plain_and_bounded():
    rng = np.random.default_rng(10)
    with_pf, without_pf = sparse(rng, 16, 5000)
    with_pf[:, :1500] += 5
    with_pf[:, 7], without_pf[:, 7] = 1.0, 0.0  # without any spread
    probing = probe_pairs([means(with_pf, without_pf)], ProbeSettings(permutations=2000, scrambles=1))
    document = probing.to_dict()
    assert (document["schema"], document["kind"]) == (1, "prompt_pairs")
    assert len(json.dumps(document, allow_nan=False)) < 300_000
    (one,) = document["categories"]
    points = one["points"]
    assert len(one["top"]) == 20 and len(points["index"]) == len(set(points["index"])) == 2000
    passed = np.array(points["q_value"]) <= 0.05
    assert passed.sum() == 1000
    assert one["found"] == one["passed"] == document["found"] == probing.n_passed >= 1500
    assert one["top"][0]["index"] == 7 and one["top"][0]["effect"] is None and one["top"][0]["interval"] is None
    assert [found["all_equal"] for found in one["top"]] == [found["effect"] is None for found in one["top"]]
    assert document["settings"]["seed"] == 0 and document["scrambled"]["passed"] == list(probing.scrambled)


def test_too_few_pairs_for_any_latent_are_told():
    rng = np.random.default_rng(11)
    parts = [means(*sparse(rng, 8, 400))]
    with pytest.warns(
        ProbingWarning, match=r"found in category 'a': 8 pairs .* p-value below 0.0039.* Have 12 pairs, "
    ):
        found = probe_pairs(parts, ProbeSettings(scrambles=0))
    # What is asked for is enough, and one pair less is not.
    assert least_p(12, 100_000) * found.n_tests <= 0.05 < least_p(11, 100_000) * found.n_tests
    rates = ProbeSettings(scrambles=0, alternative="two-sided", correction="by", permutations=1000)
    with pytest.warns(ProbingWarning, match="Have permutations=") as caught:
        found = probe_pairs([means(*sparse(rng, 30, 400))], rates)
    permutations = int(str(caught[0].message).split("permutations=")[-1].split(",")[0])
    harmonic = sum(1 / n for n in range(1, found.n_tests + 1))
    assert least_p(30, permutations) * found.n_tests * harmonic <= 0.05
    assert least_p(30, permutations // 4) * found.n_tests * harmonic > 0.05
    with pytest.warns(ProbingWarning, match="Have 9 pairs and permutations=512, "):
        probe_pairs([means(np.ones((6, 20)), np.zeros((6, 20)))], ProbeSettings(permutations=100, min_active=6))


def test_uneven_lengths_are_told(recwarn):
    rng = np.random.default_rng(12)
    sides = sparse(rng, 16, 20)
    uneven = {"tokens_with_p": np.full(16, 13), "tokens_without_p": np.full(16, 10)}
    with pytest.warns(ProbingWarning, match="26% longer"):
        found = probe_pairs([means(*sides, **uneven)], PLAIN)
    assert found.longer == (pytest.approx(3 / 11.5),)
    recwarn.clear()
    even = {"tokens_with_p": np.full(16, 11), "tokens_without_p": np.full(16, 10)}
    assert probe_pairs([means(*sides, **even)], PLAIN).longer == (pytest.approx(1 / 10.5),)
    assert probe_pairs([means(*sides)], PLAIN).longer == (None,)
    assert not [w for w in recwarn if issubclass(w.category, ProbingWarning)]


def test_data_that_cannot_be_tested():
    ones = np.ones((9, 4))
    for parts, message in [
        ([], "no category"),
        ([means(ones, ones), means(ones, ones)], "its own name; these are a, a"),
        ([means(ones, ones[:, :3])], r"needs activations of \(9, 4\) on either side, not \(9, 4\) and \(9, 3\)"),
        ([means(ones, ones), means(ones[:, :2], ones[:, :2], "b")], r"Category 'b' needs activations of \(9, 4\)"),
        ([means(ones[:1], ones[:1])], "has 1 pairs"),
        ([means(ones, ones * np.nan)], "category 'a' are not all finite"),
        ([means(ones * [1, 0, 0, 0], ones * 0)], "active on 10 prompts of a category; the most is 9"),
    ]:
        with pytest.raises(DataError, match=message):
            probe_pairs(parts, ProbeSettings(min_active=10))


def test_settings_are_checked():
    for setting, message in [
        ({"q": 0.0}, "q must be between"), ({"q": 1.0}, "q must be between"), ({"permutations": 99}, "permutations"),
        ({"min_active": 0}, "min_active"), ({"scrambles": -1}, "scrambles"), ({"seed": -1}, "seed"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            ProbeSettings(**setting)
    with pytest.raises(UnknownNameError, match="two-sided"):
        ProbeSettings(alternative="two_sided")


def test_a_planted_latent_of_a_model_is_found(model):
    """One latent reads the embedding of a word that stands in every prompt of one category's sides."""
    hook, planted = "blocks.0.hook_resid_pre", 7
    sae = StandardSAE(StandardSAEConfig(d_in=96, d_sae=64))
    sae.cfg.metadata.hook_name = hook
    (token,) = model.tokenizer("use a file", add_special_tokens=False)["input_ids"][-1:]
    _, cache = model.run_with_cache(torch.tensor([[token]]), names_filter=[hook], prepend_bos=False)
    read_d = cache[hook][0, 0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(96, 64, generator=generator) / read_d.norm())
        sae.b_enc.fill_(-1.0)
        sae.b_dec.zero_()
        sae.W_enc[:, planted] = read_d / read_d.norm() ** 2
        sae.b_enc[planted] = -0.9  # only the token itself
    nouns = ["list", "name", "object", "string", "value", "key", "type", "class", "set", "line", "byte", "path"]
    files = tuple(Pair(f"use a file of the {noun}", f"use a loop of the {noun}") for noun in nouns)
    questions = tuple(Pair(f"is the {noun} in a file", f"the {noun} is in a file") for noun in nouns)
    categories = [
        Category(name="files", label="the word file", pairs=files),
        Category(name="order", label="questions", pairs=questions),
    ]
    probing = probe_pairs(pair_means(model, sae, categories), ProbeSettings(q=0.05))
    found = {one.index: one for one in probing.found}
    assert found[planted].category == "files" and not found[planted].also
    assert found[planted].mean_without == 0 < found[planted].mean_with
    assert found[planted].fires_more.value == 1 and found[planted].p_value == 2**-12
    (label,) = (label for label in feature_labels(probing) if label.index == planted)
    assert label.label == "the word file"


def test_the_demo_recipe_runs(model, sae):
    """Its questions turn on latents that are silent on statements; swapped sides turn on almost none."""
    probing = probe_pairs(pair_means(model, sae, read_categories(RECIPES / "interp" / "demo-pairs.yaml")))
    document = probing.to_dict()
    by_name = {one["name"]: one for one in document["categories"]}
    assert by_name["questions"]["found"] >= 5
    assert by_name["questions"]["top"][0]["fires_more"]["k"] == 16
    assert np.mean(probing.scrambled) <= 0.1 * probing.n_passed
    assert [label.index for label in feature_labels(probing)] == sorted(one.index for one in probing.found)
