"""Resampled latents in float64, against the rule written out.

Encoders are silenced, so that a reconstruction is b_dec and the residual of a token is known without an SAE's help.
"""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.forms import FORMS, new_training_sae
from sae_lens_gemma4.training.resampling import Resampling, resample

D, F = 6, 20
SETTINGS = {
    "matryoshka_batchtopk": {"k": 2, "matryoshka_widths": [8, F]},
    "batchtopk": {"k": 2},
    "topk": {"k": 2},
    "jumprelu": {"l0_coefficient": 1.0},
}
FREE = ["matryoshka_batchtopk", "batchtopk", "topk"]


@pytest.fixture
def x():
    return torch.randn(12, D, dtype=torch.float64)


@pytest.fixture
def dead():
    return torch.arange(F) >= 15


def silent(architecture, **settings):
    """An SAE whose latents have norms of their own, and never fire."""
    settings = SETTINGS[architecture] | settings
    sae = new_training_sae(architecture, D, F, settings=settings, seed=0, dtype="float64")
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(D, F) * torch.linspace(1, 3, F))
        sae.W_dec.copy_(torch.randn(F, D) * torch.linspace(0.5, 2, F)[:, None])
        sae.b_dec.copy_(torch.randn(D))
        sae.b_enc.fill_(-1e6)
        if architecture == "jumprelu":
            sae.threshold.copy_(torch.linspace(0.1, 0.5, F))
    return sae


def trained_once(sae, x):
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0)
    with torch.no_grad():
        for p in sae.parameters():
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def run(sae, x, dead, share=0.2, of="median", cap=None, seed=0, optimizer=None):
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or trained_once(sae, x)
    return resample(sae, optimizer, x, dead, share=share, of=of, cap=cap, generator=generator)


def typical(values, of):
    ordered = sorted(values.tolist())
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return median if of == "median" else sum(ordered) / len(ordered)


@pytest.mark.parametrize("of", ["median", "mean"])
@pytest.mark.parametrize(
    ("architecture", "rescale"), [*((name, r) for name in FREE for r in (True, False)), ("jumprelu", False)]
)
def test_new_latents_are_the_residuals_of_tokens_of_their_own(x, dead, architecture, rescale, of):
    sae = silent(architecture, **({} if architecture == "jumprelu" else {"rescale_acts_by_decoder_norm": rescale}))
    b_dec, old = sae.b_dec.detach().clone(), {n: p.detach().clone() for n, p in sae.named_parameters()}
    enc, dec = old["W_enc"].norm(dim=0)[:15], old["W_dec"].norm(dim=1)[:15]
    norm = 0.2 * typical(enc * dec if rescale else enc, of)
    dec_norm = typical(dec, of)
    done = run(sae, x, dead, of=of)
    assert done.latents.tolist() == [15, 16, 17, 18, 19]
    assert done.dead == 5
    assert done.norm == pytest.approx(norm, rel=1e-12)
    residual = x - b_dec
    unit = residual / residual.norm(dim=1, keepdim=True)
    tokens = []
    for i in done.latents.tolist():
        (token,) = ((sae.W_dec[i] / dec_norm - unit).abs().sum(dim=1) < 1e-9).nonzero().flatten().tolist()
        tokens.append(token)
        torch.testing.assert_close(sae.W_enc[:, i].detach(), unit[token] * norm / (dec_norm if rescale else 1))
        assert sae.b_enc[i] == 0
    assert len(set(tokens)) == 5
    if architecture == "jumprelu":
        expected = 0.2 * typical(old["threshold"][:15], of)
        torch.testing.assert_close(sae.threshold.detach()[15:], torch.full((5,), expected))
    for name, p in sae.named_parameters():
        alive = (..., slice(0, 15)) if name == "W_enc" else (slice(0, 15),)
        assert torch.equal(p[alive] if name != "b_dec" else p, old[name][alive] if name != "b_dec" else old[name])


@pytest.mark.parametrize("architecture", FORMS)
def test_only_the_new_latents_moments_are_forgotten(x, dead, architecture):
    sae = silent(architecture)
    optimizer = trained_once(sae, x)
    run(sae, x, dead, optimizer=optimizer)
    for name, p in sae.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[p][moment]
            if name == "b_dec":
                assert (value != 0).all()
                continue
            of_latents = value.T if name == "W_enc" else value
            assert (of_latents[:15] != 0).all()
            assert (of_latents[15:] == 0).all()
        assert float(optimizer.state[p]["step"]) == 1


def test_a_new_latent_is_as_much_smaller_than_an_alive_one_in_the_selection_itself(x, dead):
    """With rescaling, hidden activations of a token along their own encoder: share × those of a median alive latent."""
    sae = silent("batchtopk", rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    run(sae, x, dead, share=0.5)
    with torch.no_grad():
        sae.b_enc.zero_()
        unit = sae.W_enc / sae.W_enc.norm(dim=0)
        _, hidden = sae.encode_with_hidden_pre(unit.T)
    strength = hidden.diagonal()
    assert float(strength[15:].max()) == pytest.approx(0.5 * typical(strength[:15], "median"))


def test_no_more_than_the_cap_nor_than_tokens_with_an_error(x, dead):
    some = [tuple(run(silent("topk"), x, dead, cap=2, seed=seed).latents.tolist()) for seed in range(20)]
    assert all(len(latents) == 2 and min(latents) >= 15 for latents in some)
    assert len(set(some)) > 1
    sae = silent("topk")
    with torch.no_grad():
        x[2:] = sae.b_dec
    done = run(sae, x, dead)
    assert (len(done.latents), done.dead) == (2, 5)


def test_tokens_are_drawn_by_their_squared_error():
    sae = silent("topk")
    x = sae.b_dec.detach() + torch.eye(2, D, dtype=torch.float64) * torch.tensor([[1.0], [3.0]])
    dead = torch.arange(F) == 4
    n, larger = 400, 0
    for seed in range(n):
        sae.b_enc.data.fill_(-1e6)
        run(sae, x, dead, seed=seed)
        larger += int(sae.W_dec[4, 1].abs() > sae.W_dec[4, 0].abs())
    assert abs(larger / n - 0.9) < 4 * (0.9 * 0.1 / n) ** 0.5  # by error it would be 0.75, by its fourth power 0.99


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tokens_without_a_finite_error_are_never_drawn(x, dead, bad):
    x[:9, 0] = bad
    sae = silent("jumprelu")
    assert len(run(sae, x, dead).latents) == 3
    assert all(torch.isfinite(p).all() for p in sae.parameters())


def test_nothing_happens_without_dead_latents(x):
    sae = silent("topk")
    before = sae.W_dec.detach().clone()
    done = run(sae, x, torch.zeros(F, dtype=torch.bool))
    assert (done.latents.tolist(), done.dead, done.norm) == ([], 0, None)
    assert torch.equal(sae.W_dec, before)


def test_an_sae_all_dead_is_measured_by_itself(x):
    sae = silent("topk", rescale_acts_by_decoder_norm=False)
    norm = 0.2 * typical(sae.W_enc.detach().norm(dim=0), "median")
    assert run(sae, x, torch.ones(F, dtype=torch.bool)).norm == pytest.approx(norm)


def test_the_same_generator_gives_the_same_bits_and_no_other_is_touched(x, dead):
    before = torch.random.get_rng_state()
    first, second, third = (silent_copy(x, dead, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def silent_copy(x, dead, seed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = silent("batchtopk")
    run(sae, x, dead, seed=seed)
    return sae.W_enc.detach().clone()


@pytest.mark.parametrize("architecture", FORMS)
def test_training_goes_on(x, dead, architecture):
    """The new latents learn: their gradient is there and finite."""
    sae = silent(architecture)
    run(sae, x, dead)
    if architecture == "jumprelu":
        sae.threshold.data.fill_(0)
    sae.training_forward_pass(TrainStepInput(x, {"l0": 0.0}, None, 0, False)).loss.backward()
    assert torch.isfinite(sae.W_dec.grad).all()
    assert sae.W_dec.grad[15:].abs().sum() > 0


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": float("nan")}, {"cap": 0}, {"every_steps": 0}])
def test_settings_that_cannot_be_used_are_named(settings):
    with pytest.raises(ConfigError, match=f"resampling.{next(iter(settings))} must be"):
        Resampling(**settings)
