"""A cause that was put there is found, and none where there is none: the embedded SAE on real activations."""

import copy

import pytest
import torch

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.evaluation.diagnosis import Trial, cause, misfit_trials
from sae_lens_gemma4.evaluation.robust import VerdictRules
from sae_lens_gemma4.training.restore import load_sae
from tests.evaluation.test_accumulators import fed
from tests.evaluation.test_reading import built, tokens
from tests.support import RELEASE, SAE_ID

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def sae():
    return load_sae(RELEASE, SAE_ID)


@pytest.fixture(scope="module")
def activations():
    model = g4.load_model("gemma-4-demo", "Gemma4ProxyLM")
    corpus = build_corpus("embedded:text", model.tokenizer, context_size=64, split="heldout", max_tokens=1500)
    _, cache = model.run_with_cache(corpus.tokens_bp, names_filter=[HOOK])
    return cache[HOOK][corpus.keep_bp].detach()


def with_threshold(sae, factor):
    changed = copy.deepcopy(sae)
    with torch.no_grad():
        changed.threshold.mul_(factor)
    return changed


@torch.no_grad()
def assert_misfit(sae, x):
    assert fed(x, sae(x), None).compute(resamples=0).verdict == "misfit"


def found(sae, x):
    trials = misfit_trials(sae, x)
    return trials, *cause(trials, VerdictRules())


@torch.no_grad()
def test_a_trial_is_the_figure_of_what_was_changed_and_changed_back(sae, activations):
    """On the tokens themselves: every second of 1,024 or more."""
    x = activations * 6
    trials = {trial.correction: trial for trial in misfit_trials(sae, x)}
    x = x[:: -(-len(x) // 1024)]
    variance = (x.double() - x.double().mean(0)).square().sum()

    def ve(x_hat):
        return pytest.approx(float(1 - (x.double() - x_hat.double()).square().sum() / variance), rel=1e-4)

    def l0(sae, x):
        return pytest.approx(float((sae.encode(x) > 0).double().sum(1).mean()), rel=1e-4)

    plain, scale, threshold = (trials[name] for name in ("none", "scale", "threshold"))
    assert (plain.factor, plain.ve, plain.l0) == (None, ve(sae(x)), l0(sae, x))
    assert scale.ve == ve(scale.factor * sae(x / scale.factor)) and scale.l0 == l0(sae, x / scale.factor)
    raised = with_threshold(sae, threshold.factor)
    assert threshold.ve == ve(raised(x)) and threshold.l0 == l0(raised, x)
    mean = x.double().mean(0)
    gamma = mean.norm() / ((x.double() - mean).square().sum(1).mean()).sqrt()
    assert trials["mean"].factor == pytest.approx(float(gamma), rel=1e-4)


@pytest.mark.parametrize("factor", [6.0, 1 / 6])
def test_activations_that_grew_or_shrank_are_a_matter_of_scale(sae, activations, factor):
    assert_misfit(sae, activations * factor)
    trials, named, sentence = found(sae, activations * factor)
    scale = next(trial for trial in trials if trial.correction == "scale")
    assert named == "scale" and f"divided by {scale.factor:.3g}" in sentence
    assert 0.7 < scale.factor / factor < 1.4
    assert scale.ve > 0.8


def test_a_constant_that_was_added_is_a_matter_of_the_mean(sae, activations):
    direction = torch.randn(activations.shape[1], generator=torch.Generator().manual_seed(0))
    x = activations + 6 * activations.norm(dim=1).mean() * direction / direction.norm()
    assert_misfit(sae, x)
    trials, named, sentence = found(sae, x)
    assert named == "mean" and "γ" in sentence
    assert next(t for t in trials if t.correction == "mean").ve > 0.8


@pytest.mark.parametrize(("factor", "cause_named"), [(1 / 6, "threshold"), (6.0, "scale")])
def test_a_threshold_that_is_off_is_found_or_ties_with_the_scale(sae, activations, factor, cause_named):
    """Biases aside, the two are one: six times too high a threshold ties, and the scale is named."""
    changed = with_threshold(sae, factor)
    assert_misfit(changed, activations)
    trials, named, _ = found(changed, activations)
    by_name = {trial.correction: trial for trial in trials}
    assert named == cause_named
    assert by_name["threshold"].factor * factor == pytest.approx(1, rel=0.35)
    assert by_name["threshold"].ve > 0.8
    assert (by_name["scale"].ve > by_name["threshold"].ve - 0.02) is (cause_named == "scale")


def test_random_weights_have_no_cause(activations):
    g = torch.Generator().manual_seed(0)
    sae = copy.deepcopy(load_sae(RELEASE, SAE_ID))
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            weight = getattr(sae, name)
            weight.copy_(torch.randn(weight.shape, generator=g) * weight.std())
    assert_misfit(sae, activations)
    _, named, sentence = found(sae, activations)
    assert named is None and "No single change" in sentence


def test_what_is_changed_for_a_trial_is_not_changed_in_the_sae(sae, activations):
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    misfit_trials(sae, activations[:200] * 6)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def trial(correction, ve, factor=2.0):
    return Trial(correction, None if correction == "none" else factor, ve, 1.0)


@pytest.mark.parametrize(
    ("ves", "expected"),
    [
        ({"none": -3, "scale": 0.8, "mean": 0.9, "threshold": 0.2}, "mean"),
        ({"none": -3, "scale": 0.8, "mean": 0.1, "threshold": 0.815}, "scale"),  # a tie
        ({"none": -3, "scale": 0.8, "mean": 0.1, "threshold": 0.83}, "threshold"),
        ({"none": -3, "scale": 0.49, "mean": 0.1, "threshold": 0.4}, None),
        ({"none": 0.6, "scale": 0.6, "mean": 0.6, "threshold": 0.6}, None),  # nothing was needed
        ({"none": None, "scale": None, "mean": None}, None),
    ],
)
def test_the_best_change_that_clears_the_bar_is_the_cause(ves, expected):
    named, sentence = cause([trial(name, ve) for name, ve in ves.items()], VerdictRules())
    assert named == expected
    assert (sentence is None) == (ves["none"] is None)


def test_without_a_threshold_or_variance_what_cannot_be_tried_is_not():
    names = [t.correction for t in misfit_trials(built("standard"), tokens())]
    assert names == ["none", "mean", "scale"]
    constant = misfit_trials(built("jumprelu"), torch.ones(5, 12))
    assert {t.ve for t in constant} == {None}
    assert cause(constant, VerdictRules()) == (None, None)
