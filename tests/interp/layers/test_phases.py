"""Cuts against brute force over all of them, planted change points found, and none in a straight noisy line."""

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp.layers.phases import _chosen, best_cuts, find_phases


def by_brute_force(y, n_lines, shortest=3):
    """Every way to cut, each line by numpy's own least squares."""
    best = (np.inf, None)
    for cut in combinations(range(1, len(y)), n_lines - 1):
        edges = [0, *cut, len(y)]
        if min(np.diff(edges)) < shortest:
            continue
        sse = 0.0
        for low, high in pairwise(edges):
            design = np.stack([np.ones(high - low), np.arange(low, high)], axis=1)
            fitted = design @ np.linalg.lstsq(design, y[low:high], rcond=None)[0]
            sse += ((y[low:high] - fitted) ** 2).sum()
        if sse < best[0]:
            best = (sse, tuple(edges[:-1]))
    return best


@given(st.integers(0, 10_000), st.integers(6, 14))
def test_cuts_are_the_best_of_all(seed, n_layers):
    y_rl = np.random.default_rng(seed).normal(size=(2, n_layers)) + 5
    cuts = best_cuts(y_rl, 4)
    for row in range(2):
        for n_lines in range(1, 5):
            sse, starts = by_brute_force(y_rl[row], n_lines)
            if starts is None:
                assert cuts.sse_rk[row, n_lines - 1] == np.inf and cuts.starts[row][n_lines - 1] == ()
                continue
            assert cuts.sse_rk[row, n_lines - 1] == pytest.approx(sse, rel=1e-9, abs=1e-12)
            assert cuts.starts[row][n_lines - 1] == starts


def test_the_criterion_is_bic_with_three_coefficients_a_change_point():
    y = np.random.default_rng(0).normal(size=24)
    found = find_phases(y, shuffles=0)
    n_coefficients = [3, 8, 13]  # lines, change points at three each, the variance
    sse = [by_brute_force(y, n_lines)[0] for n_lines in (1, 2, 3)]
    by_hand = [24 * np.log(s / 24) + p * np.log(24) for s, p in zip(sse, n_coefficients, strict=True)]
    np.testing.assert_allclose(found.bic_k, by_hand, rtol=1e-10)


@pytest.mark.parametrize(("n_layers", "rate"), [(16, 0.06), (24, 0.03), (60, 0.01)])
def test_a_straight_noisy_line_is_one_phase_at_the_stated_rate(n_layers, rate):
    generator = np.random.default_rng(1)
    slopes = generator.normal(size=(2000, 1))
    lines = slopes * np.arange(n_layers) + generator.normal(size=(2000, n_layers))
    wrong = np.mean([len(starts) > 1 for starts in _chosen(lines)[0]])
    assert wrong < rate


def test_planted_change_points_are_found():
    """A jump of several standard deviations with a turn of slope: within a layer in 190 of 200 curves."""
    generator, hits = np.random.default_rng(2), 0
    layer = np.arange(48)
    truth = np.where(layer < 20, 0.9 - 0.03 * layer, 0.2 + 0.015 * (layer - 20))
    for _ in range(200):
        starts = [p.layer for p in find_phases(truth + generator.normal(0, 0.03, 48), shuffles=0).change_points]
        hits += len(starts) == 1 and abs(starts[0] - 20) <= 1
    assert hits >= 190


def card_curve(seed=0):
    """The figures of Adam Kruger's card, and a slow rise made up for the layers of which it says nothing."""
    curve = np.empty(60)
    curve[:23] = np.linspace(0.56, 0.25, 23)
    curve[23:28] = np.linspace(0.22, 0.178, 5)
    curve[28:57] = np.linspace(0.2, 0.4, 29)
    curve[57:] = 0.87, 0.9, 0.92
    return curve + np.random.default_rng(seed).normal(0, 0.005, 60)


def test_the_card_s_own_figures_change_at_the_jump_and_at_the_turn():
    curve = card_curve()
    resampled = np.stack([card_curve(seed) for seed in range(1, 101)])
    found = find_phases(curve, resampled)
    by_layer = {p.layer: p.support for p in found.change_points}
    assert by_layer[57] == 1.0
    assert any(abs(layer - 28) <= 1 and support > 0.9 for layer, support in by_layer.items())
    assert found.phases[-1].first == 57 and found.phases[-1].last == 59
    assert found.phases[-1].end == pytest.approx(0.92, abs=0.02)
    assert found.phases[0].start == pytest.approx(0.56, abs=0.02) and found.phases[0].slope < 0
    assert found.shuffled_found < 0.1 and found.shuffled_share < 0.1 and found.shuffles == 200


def test_support_counts_resamples_with_a_change_point_near():
    layer = np.arange(24.0)
    curve, there, two_off, straight = layer >= 12, layer >= 13, layer >= 14, layer
    resampled = np.stack([curve, there, two_off, straight, np.full(24, np.nan)]).astype(float)
    found = find_phases(curve.astype(float), resampled, shuffles=0)
    assert [tuple(p) for p in found.change_points] == [(12, 0.5)]  # of the four that are finite
    assert found.resamples == 4 and found.shuffled_found is None
    assert find_phases(curve.astype(float)).change_points[0].support is None


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6, 15])
def test_few_layers_are_one_phase_and_that_is_no_finding(n_layers):
    curve = np.random.default_rng(0).normal(size=n_layers) + 9 * (np.arange(n_layers) > n_layers / 2)
    found = find_phases(curve, curve[None])
    assert len(found.phases) == 1 and not found.change_points
    assert (found.shuffled_found, found.shuffled_share, found.shuffles, found.too_few_layers) == (None, None, 0, 16)
    assert found.to_dict()["too_few_layers"] == 16 and found.to_dict()["control"]["share_with_any"] is None
    assert (found.phases[0].first, found.phases[0].last) == (0, n_layers - 1)
    assert np.isfinite(found.rms)


def test_sixteen_layers_are_enough_for_a_change_point():
    found = find_phases(9.0 * (np.arange(16) >= 8), shuffles=20)
    assert [point.layer for point in found.change_points] == [8]
    assert found.too_few_layers is None and found.shuffles == 20 and found.shuffled_share is not None


@pytest.mark.parametrize("curve", [np.full(40, 0.3), 1.0 - 0.02 * np.arange(40), np.zeros(40)])
def test_what_is_exactly_straight_is_one_phase(curve):
    found = find_phases(curve, curve[None])
    assert len(found.phases) == 1 and found.rms < 1e-6
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["phases"][0]["last"] == 39


def test_a_phase_is_the_least_squares_line():
    y = np.random.default_rng(3).normal(size=10)
    phase = find_phases(y).phases[0]
    slope, intercept = np.polyfit(np.arange(10), y, 1)
    assert (phase.slope, phase.start, phase.end) == pytest.approx((slope, intercept, intercept + 9 * slope))


def test_the_control_is_seeded():
    curve = card_curve()
    once, again, other = (find_phases(curve, seed=s) for s in (4, 4, 5))
    assert once == again and other.seed == 5


@pytest.mark.parametrize("curve", [[], [0.1, np.nan], np.zeros((2, 3))])
def test_what_is_no_curve_is_named(curve):
    with pytest.raises(DataError, match="finite numbers, one a layer"):
        find_phases(np.array(curve))
    with pytest.raises(ConfigError, match="must not be negative"):
        find_phases(np.zeros(3), shuffles=-1)
