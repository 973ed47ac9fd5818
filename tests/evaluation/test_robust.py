import pytest

from sae_lens_gemma4.evaluation.robust import VerdictRules, verdict


def decide(ve, without_01, without_1, share_01, rules=VerdictRules()):
    return verdict(ve, {0.001: without_01, 0.01: without_1}, {0.001: share_01}, rules)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((0.90, 0.905, 0.91, 0.01), "healthy"),
        ((0.194, 0.901, 0.92, 0.88), "outlier-dominated"),  # base SAE, E4B layer 7
        ((0.752, 0.899, 0.91, 0.59), "outlier-dominated"),  # layer 21
        ((0.790, 0.906, 0.91, 0.56), "outlier-dominated"),  # layer 35
        ((-1008.4, -1008.0, -1007.0, 0.004), "misfit"),  # the same on the tuned model
        ((0.49, 0.495, 0.499, 0.01), "misfit"),
        ((0.80, 0.86, 0.87, 0.19), "healthy"),  # gain without concentration
        ((0.86, 0.90, 0.91, 0.60), "healthy"),  # concentration without gain
        ((0.10, 0.20, 0.30, 0.90), "misfit"),  # misfit comes first
    ],
)
def test_verdicts_on_published_and_boundary_figures(figures, expected):
    assert decide(*figures) == expected


def test_an_undefined_figure_leaves_the_verdict_undefined():
    assert decide(None, 0.9, 0.9, 0.1) is None
    assert decide(0.9, 0.9, None, 0.1) is None


def test_thresholds_are_settings():
    assert decide(0.9, 0.91, 0.92, 0.01, VerdictRules(misfit_below=0.95)) == "misfit"
