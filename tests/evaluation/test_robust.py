"""The verdict on published figures, at the borders of its rules, and on activations made to have a known answer."""

import math

import pytest
import torch

from sae_lens_gemma4.evaluation.robust import VerdictRules, norm_screen_sees, reason, verdict
from tests.evaluation.test_accumulators import fed


def decide(ve, without_01, without_1, share_01, share_1, rules=VerdictRules()):
    return verdict(ve, {0.001: without_01, 0.01: without_1}, {0.001: share_01, 0.01: share_1}, rules)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((0.90, 0.905, 0.91, 0.01, 0.05), "healthy"),
        ((0.194, 0.901, 0.92, 0.88, 0.90), "outlier-dominated"),  # base SAE, E4B layer 7
        ((0.752, 0.899, 0.91, 0.59, 0.64), "outlier-dominated"),  # layer 21
        ((0.790, 0.906, 0.91, 0.56, 0.58), "outlier-dominated"),  # layer 35
        ((-1008.4, -1008.0, -1007.0, 0.004, 0.02), "misfit"),  # the same on the tuned model
        ((0.49, 0.495, 0.499, 0.01, 0.03), "misfit"),
        ((0.49, 0.495, 0.5, 0.01, 0.03), "healthy"),  # the bar itself is no misfit
        ((0.80, 0.86, 0.87, 0.19, 0.20), "healthy"),  # gain without concentration
        ((0.86, 0.90, 0.905, 0.60, 0.65), "healthy"),  # concentration without gain
        ((0.10, 0.20, 0.30, 0.90, 0.95), "misfit"),  # misfit comes first
        ((-0.65, -0.50, 0.91, 0.09, 0.95), "outlier-dominated"),  # spread over the top 1 %, not the top .1 %
        ((0.52, 0.56, 0.91, 0.08, 0.80), "outlier-dominated"),  # and the same of an SAE above the misfit's bar
        ((0.52, 0.56, 0.91, 0.08, 0.19), "healthy"),
        ((0.88, 0.92, 0.925, 0.08, 0.80), "healthy"),
    ],
)
def test_verdicts_on_published_and_boundary_figures(figures, expected):
    assert decide(*figures) == expected


def test_an_undefined_figure_leaves_the_verdict_undefined():
    for gap in range(5):
        figures = [0.9, 0.9, 0.9, 0.1, 0.1]
        assert decide(*figures) == "healthy"
        figures[gap] = None
        assert decide(*figures) is None
    assert verdict(0.9, {0.05: 0.9}, {0.05: 0.1}) is None
    assert "not defined" in reason(None, 9, None, {}, {})


def test_thresholds_are_settings():
    assert decide(0.9, 0.91, 0.92, 0.01, 0.05, VerdictRules(misfit_below=0.95)) == "misfit"
    assert decide(0.8, 0.86, 0.87, 0.19, 0.2, VerdictRules(outlier_share=0.1)) == "outlier-dominated"
    assert decide(0.86, 0.90, 0.905, 0.60, 0.65, VerdictRules(outlier_gain=0.01)) == "outlier-dominated"


def test_the_reason_names_the_fraction_that_decided():
    shares = {0.001: 0.09, 0.01: 0.95}
    assert reason("outlier-dominated", 5000, -0.65, {0.001: -0.50, 0.01: 0.91}, shares) == (
        "VE is −0.650 and 0.910 without the worst 1 % of tokens, which hold 95.0 % of the squared error: "
        "more than 0.05 gained, more than 20 % held."
    )
    figures = {0.001: 0.90, 0.01: 0.91}
    assert reason("healthy", 5000, 0.89, figures, shares) == (
        "VE is 0.890 and 0.900 without the worst 0.1 % of tokens, which hold 9.0 % of the squared error."
    )


def test_of_fewer_tokens_than_a_fraction_has_parts_the_worst_one_is_named():
    assert reason("healthy", 40, 0.89, {0.001: 0.90, 0.01: 0.90}, {0.001: 0.09, 0.01: 0.09}) == (
        "VE is 0.890 and 0.900 without the worst token of 40 (2.5 %), which holds 9.0 % of the squared error."
    )
    misfit = {0.001: 0.1, 0.01: 0.1}, {0.001: 0.1, 0.01: 0.1}
    assert "without the worst token of 99 (1 %) is 0.100" in reason("misfit", 99, 0.1, *misfit)
    assert "without the worst 1 % of tokens is 0.100" in reason("misfit", 100, 0.1, *misfit)


@pytest.mark.parametrize(
    ("top_norm", "high_norm", "share", "seen"),
    [
        (0.2, {2.0: 0.21}, 0.0, False),
        (0.54, {2.0: 0.2}, 0.0, False),
        (0.56, {2.0: 0.2}, 0.0, True),  # half of the gain from .2 to .9
        (0.2, {2.0: 0.2, 5.0: 0.7}, 0.01, True),
        (0.2, {2.0: 0.2, 5.0: 0.7}, 0.011, False),  # which leaves out too many to be a screen
        (None, {5.0: None}, 0.0, False),
    ],
)
def test_a_norm_screen_sees_what_it_gains_half_of(top_norm, high_norm, share, seen):
    shares = dict.fromkeys(high_norm, share)
    assert norm_screen_sees(0.2, {0.001: 0.9}, {0.001: top_norm}, high_norm, shares) is seen


def test_a_screen_is_held_against_the_fraction_that_decided():
    low = {0.001: -5.1, 0.01: 0.91}
    assert norm_screen_sees(-6.3, low, {0.001: -5.6}, {2.0: -5.6}, {2.0: 0.001}) is False
    assert norm_screen_sees(-6.3, low, {0.001: -5.6, 0.01: 0.8}, {}, {}) is True
    assert norm_screen_sees(0.1, {0.001: 0.1, 0.01: 0.1}, {0.001: 0.1}, {}, {}) is False


def test_a_screen_is_held_against_a_robust_figure_of_zero_too():
    assert norm_screen_sees(-3.0, {0.001: 0.0}, {0.001: -2.9}, {}, {}) is False


N, D, OUTLIERS = 20_000, 16, 20


def synthetic():
    """Tokens with norms over one decade, an SAE that leaves 9.9 % of their squares unexplained, .1 % of them drawn."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g, dtype=torch.float64) * (0.5 * torch.randn(N, 1, generator=g).double()).exp()
    error = torch.randn(N, D, generator=g, dtype=torch.float64) * x.norm(dim=1, keepdim=True)
    error *= (0.099 * x.square().sum() / error.square().sum()).sqrt()
    return x, error, torch.randperm(N, generator=g)[:OUTLIERS]


def without(x, x_hat, left_out):
    stay = torch.ones(N, dtype=torch.bool)
    stay[left_out] = False
    x, x_hat = x[stay], x_hat[stay]
    return float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def judged(x, x_hat):
    metrics = fed(x, x_hat, None, (4096,)).compute()
    screen = norm_screen_sees(
        metrics.ve,
        metrics.ve_without_top_sse,
        metrics.ve_without_top_norm,
        metrics.ve_without_high_norm,
        metrics.high_norm_share,
    )
    return metrics, screen, reason(metrics.verdict, N, metrics.ve, metrics.ve_without_top_sse, metrics.sse_share)


def test_a_healthy_sae_is_healthy():
    x, error, _ = synthetic()
    metrics, _, sentence = judged(x, x - error)
    assert metrics.ve == pytest.approx(0.901, abs=1e-4)
    assert metrics.verdict == "healthy" and "0.901" in sentence


def test_the_public_finding_is_outliers_that_no_norm_screen_sees():
    """88 % of the squared error on .1 % of the tokens, whose norms are like the others'."""
    x, error, outliers = synthetic()
    rest = float(error.square().sum() - error[outliers].square().sum())
    error[outliers] *= (0.88 / 0.12 * rest / error[outliers].square().sum()).sqrt()
    metrics, screen, sentence = judged(x, x - error)
    assert metrics.sse_share[0.001] == pytest.approx(0.88, rel=1e-9)
    assert metrics.ve == pytest.approx(1 - 0.099 / 0.12, abs=2e-3)
    assert metrics.ve_without_top_sse[0.001] == pytest.approx(without(x, x - error, outliers), rel=1e-9)
    assert metrics.ve_without_top_sse[0.001] == pytest.approx(0.901, abs=1e-3)
    assert metrics.verdict == "outlier-dominated" and screen is False
    assert "88.0 %" in sentence and "0.901" in sentence


def test_outliers_of_large_norm_are_seen_by_a_norm_screen():
    x, error, outliers = synthetic()
    x[outliers] *= 100 / x[outliers].norm(dim=1, keepdim=True) * x.norm(dim=1).median()
    error[outliers] = 2 * x[outliers]  # x̂ = −x
    metrics, screen, _ = judged(x, x - error)
    assert metrics.ve < 0
    assert metrics.ve_without_top_norm[0.001] == pytest.approx(without(x, x - error, outliers), rel=1e-9)
    assert metrics.ve_without_high_norm[10.0] == pytest.approx(metrics.ve_without_top_norm[0.001], abs=0.01)
    assert metrics.high_norm_sse_share[10.0] > 0.9
    assert metrics.verdict == "outlier-dominated" and screen is True


def test_a_uniform_misfit_stays_one_whatever_is_left_out():
    x, _, _ = synthetic()
    metrics, _, sentence = judged(x, 5 * x)
    figures = [metrics.ve, *metrics.ve_without_top_sse.values(), *metrics.ve_without_top_norm.values()]
    figures += [metrics.ve_without_high_norm[c] for c in (2.0, 5.0, 10.0)]
    figures += [v for c in (2.0, 5.0) for v in metrics.ve_without_both[c].values()]
    assert figures == pytest.approx([-15] * len(figures), abs=0.02)  # 1 − 4², but for the mean
    assert metrics.verdict == "misfit" and "−15" in sentence and math.isfinite(metrics.ve)
