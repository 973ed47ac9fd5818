"""Calibration against functions written out by hand, and against shifts that are known because they were made."""

import math

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from sae_lens_gemma4.errors import ConfigError, DataError, SAEError
from sae_lens_gemma4.training.affine import Affine, fit_gains, fold
from sae_lens_gemma4.training.calibration import Calibration, calibrate
from sae_lens_gemma4.training.restore import inference_form
from sae_lens_gemma4.training.thresholds import set_threshold
from tests.support import D_IN, D_SAE, trained

D, K = 16, 3
ONLY = {"recentre": False, "scale": False, "gains": False, "threshold": False}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def planted(cls=BatchTopKTrainingSAE, **settings):
    """An SAE that reconstructs `source` exactly: an orthogonal dictionary, activations from 1 on, threshold 0.5."""
    config = {
        BatchTopKTrainingSAE: BatchTopKTrainingSAEConfig,
        TopKTrainingSAE: TopKTrainingSAEConfig,
        JumpReLUTrainingSAE: JumpReLUTrainingSAEConfig,
    }[cls]
    if cls is not JumpReLUTrainingSAE:
        settings = {"k": K, "rescale_acts_by_decoder_norm": True} | settings
    sae = cls(config(d_in=D, d_sae=D, apply_b_dec_to_input=True, **settings))
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    with torch.no_grad():
        sae.W_dec.copy_(rotation)
        sae.W_enc.copy_(rotation.T)
        sae.b_enc.fill_(0.2 * K / D - 0.2)
        sae.b_dec.copy_(0.2 * rotation.sum(0) * K / D)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.5)
        elif cls is JumpReLUTrainingSAE:
            sae.threshold.fill_(0.5)
    return sae


def source(n=2048):
    """Each token is three of the dictionary's directions, between 1 and 2 long."""
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    chosen = torch.rand(n, D, generator=generator).argsort(1)[:, :K]
    lengths = 1 + torch.rand(n, K, generator=generator)
    return torch.zeros(n, D).scatter(1, chosen, lengths) @ rotation


def gains_of(sae):
    """The gains in a planted SAE's weights: b_enc was 0.2·K/D − 0.2, W_dec the transpose of W_enc."""
    unit = sae.b_enc.detach().double() / (0.2 * K / D - 0.2)
    return ((sae.W_dec / sae.W_enc.T).detach().double().sqrt() * unit[:, None]).median(dim=0).values


@torch.no_grad()
def explained(sae, x):
    x_hat = inference_form(sae)(x)
    return float(1 - (x - x_hat).double().square().sum() / (x - x.mean(0)).double().square().sum())


def by_hand(weights, z, gain, *, rescale, apply_b_dec, choose):
    W_enc, b_enc, W_dec, b_dec = weights
    hidden = ((z - b_dec if apply_b_dec else z) @ W_enc + b_enc).relu()
    rank = hidden * (W_dec * gain).norm(dim=1) if rescale else hidden
    return (hidden * choose(rank)) @ W_dec + b_dec


def top_of_batch(rank):
    return rank >= rank.flatten().sort(descending=True).values[4 * len(rank) - 1]


def top_of_token(rank):
    return rank >= rank.sort(dim=1, descending=True).values[:, 3:4]


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("cls", [MatryoshkaBatchTopKTrainingSAE, BatchTopKTrainingSAE, TopKTrainingSAE])
def test_a_folded_sae_does_for_x_what_it_did_for_z(cls, rescale, apply_b_dec):
    sae = trained(cls, rescale, dtype="float64", apply_b_dec_to_input=apply_b_dec)
    weights = [p.detach().clone() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    gain, offset, z = torch.rand(D_IN).double() * 3 + 0.2, torch.randn(D_IN).double(), torch.randn(50, D_IN).double()
    fold(sae, Affine(gain, offset))
    choose = top_of_token if cls is TopKTrainingSAE else top_of_batch
    expected = by_hand(weights, z, gain, rescale=rescale, apply_b_dec=apply_b_dec, choose=choose)
    torch.testing.assert_close(sae(gain * z + offset), gain * expected + offset, atol=1e-12, rtol=1e-12)
    old, new = weights[2].norm(dim=1), sae.W_dec.detach().norm(dim=1)
    if rescale:
        torch.testing.assert_close(new, old)
    else:
        assert float((new / old).median()) == pytest.approx(1)


def test_under_one_scale_the_saved_form_does_the_same_too():
    sae = trained(threshold=0.7)
    z = torch.randn(100, D_IN)
    before = inference_form(sae)(z)
    fold(sae, Affine.of(6.0, torch.full((D_IN,), 2.0)))
    assert float(sae.topk_threshold) == pytest.approx(4.2)
    torch.testing.assert_close(inference_form(sae)(6 * z + 2), 6 * before + 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_thresholds_of_their_own_go_with_the_latents_units(apply_b_dec):
    cfg = JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=apply_b_dec)
    sae = JumpReLUTrainingSAE(cfg)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p))
        sae.threshold.abs_()
    W_enc, b_enc, W_dec, b_dec = (p.detach().clone() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    threshold, z = sae.threshold.detach().clone(), torch.randn(50, D_IN)
    gain, offset = torch.rand(D_IN) + 0.5, torch.randn(D_IN)
    hidden = (z - b_dec * apply_b_dec) @ W_enc + b_enc
    expected = (hidden * (hidden > threshold)) @ W_dec + b_dec
    fold(sae, Affine(gain, offset))
    torch.testing.assert_close(sae(gain * z + offset), gain * expected + offset, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), W_dec.norm(dim=1))


def test_gains_are_least_squares_channel_by_channel():
    x_hat, x = torch.randn(200, 4), torch.randn(200, 4)
    x = 0.5 * x + x_hat * torch.tensor([1.0, 2.0, 0.5, 1.5]) + 3
    old = Affine(torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, -1.0]))
    new = fit_gains(x, x_hat, old)
    for i in range(4):
        design = torch.stack([x_hat[:, i], torch.ones(200)], dim=1)
        slope, intercept = torch.linalg.lstsq(design, x[:, i]).solution.tolist()
        assert float(new.gain_d[i]) == pytest.approx(slope * float(old.gain_d[i]), rel=1e-4)
        assert float(new.offset_d[i]) == pytest.approx(slope * float(old.offset_d[i]) + intercept, rel=1e-4)


def test_a_channel_that_is_never_reconstructed_keeps_its_gain():
    x_hat = torch.randn(100, 2)
    x_hat[:, 1] = 7.0
    new = fit_gains(torch.randn(100, 2), x_hat, Affine.of(2.0, torch.zeros(2)))
    assert float(new.gain_d[1]) == 2.0


@pytest.mark.parametrize("k", [0.3, 4, 9.5])
def test_thresholds_leave_just_so_many_latents_active(k, monkeypatch):
    monkeypatch.setattr("sae_lens_gemma4.training.thresholds._CHUNK", 7 * D_SAE)
    saved, x = inference_form(trained()), torch.randn(200, D_IN)
    hidden = (x - saved.b_dec) @ saved.W_enc + saved.b_enc
    set_threshold(saved, x, k)
    ordered = hidden.flatten().sort(descending=True).values.tolist()
    wanted = int(200 * k)
    assert ordered[wanted - 1] > float(saved.threshold[5].detach()) > ordered[wanted]
    assert int((saved.encode(x) > 0).sum()) == wanted


def test_unequal_thresholds_keep_their_proportions():
    saved, x = inference_form(trained()), torch.randn(200, D_IN)
    with torch.no_grad():
        saved.threshold.copy_(torch.rand(D_SAE) + 0.5)
    proportions = saved.threshold / saved.threshold[0]
    set_threshold(saved, x, 5)
    assert int((saved.encode(x) > 0).sum()) == 1000
    torch.testing.assert_close(saved.threshold / saved.threshold[0], proportions)


def test_where_too_few_latents_are_positive_all_of_them_are_active():
    saved, x = inference_form(trained()), torch.randn(100, D_IN)
    set_threshold(saved, x, D_SAE)
    assert torch.equal(saved.threshold, torch.zeros(D_SAE))


SPREAD = torch.exp(0.5 * torch.linspace(-1, 1, D))
SHIFTS = {
    "scale": lambda z: 6 * z,
    "mean": lambda z: z + torch.linspace(-5, 5, D),
    "gains": lambda z: z * SPREAD,
    "all": lambda z: 5 * z * SPREAD + 9,
}


@pytest.mark.parametrize("cls", [BatchTopKTrainingSAE, TopKTrainingSAE, JumpReLUTrainingSAE])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_is_undone(cls, shift):
    settings = {"target_l0": float(K)} if cls is JumpReLUTrainingSAE else {}
    sae, z = planted(cls, **settings), source()
    x, own = SHIFTS[shift](z), explained(sae, z)
    report = calibrate(sae, x, Calibration())
    assert own > 0.9
    assert explained(sae, x) > own - 0.03
    assert report.parts[-1].l0 == pytest.approx(K, abs=0.05)


def test_the_report_says_what_was_found():
    sae, x = planted(), SHIFTS["all"](source())
    before = explained(sae, x[1536:])
    report = calibrate(sae, x, Calibration())
    fit, held = x[:1536].double(), x[1536:]
    assert (report.tokens, report.held_back, report.outliers, report.k) == (2048, 512, 0, K)
    sigma = math.sqrt(float((fit - fit.mean(0)).square().sum()) / 1536)
    assert report.sigma == pytest.approx(sigma)
    assert report.gamma == pytest.approx(float(fit.mean(0).norm()) / sigma)
    gain = gains_of(sae)
    assert report.scale == pytest.approx(float(gain.log().mean().exp()), rel=1e-3)
    assert report.gain_spread == pytest.approx(float(SPREAD.log().std(correction=0)), abs=0.05)
    assert (report.gain_min, report.gain_max) == pytest.approx((float(gain.min()), float(gain.max())), rel=1e-3)
    parts = {part.name: part for part in report.parts}
    assert list(parts) == ["none", "threshold", "recentre", "scale", "gains", "calibrated"]
    assert parts["none"].ve == pytest.approx(before, rel=1e-5)
    assert parts["none"].threshold == pytest.approx(0.5)
    assert parts["calibrated"].ve == pytest.approx(explained(sae, held), rel=1e-5)
    assert parts["calibrated"].threshold == pytest.approx(float(sae.topk_threshold))
    assert int((inference_form(sae).encode(x) > 0).sum()) == K * 2048
    assert report.to_dict()["parts"][0]["name"] == "none"


@pytest.mark.parametrize("cls", [BatchTopKTrainingSAE, TopKTrainingSAE])
def test_what_does_not_help_is_undone(cls):
    sae = trained(cls)  # one that reconstructs nothing
    x = torch.randn(2000, D_IN) * 3 + 5
    report = calibrate(sae, x, Calibration())
    best = report.parts[0 if cls is TopKTrainingSAE else 1].ve
    for part in report.parts[2 if cls is BatchTopKTrainingSAE else 1 : -1]:
        assert part.kept == (part.ve > best + 1e-3)
        best = part.ve if part.kept else best
    assert explained(sae, x[1500:]) == pytest.approx(best, abs=0.02)


def test_an_sae_in_its_place_is_left_there():
    sae, z = planted(), source()
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    before = explained(sae, z)
    calibrate(sae, z, Calibration(threshold=False))
    assert explained(sae, z) >= before - 1e-6
    torch.testing.assert_close(sae.W_dec, state["W_dec"], atol=0.02, rtol=0.02)


def test_parts_can_be_left_out():
    sae, x = trained(), torch.randn(500, D_IN)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    report = calibrate(sae, x, Calibration(**ONLY))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert [part.name for part in report.parts] == ["none", "calibrated"]
    calibrate(sae, x, Calibration(**ONLY | {"threshold": True}))
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items() if name != "topk_threshold")
    assert int((inference_form(sae).encode(x) > 0).sum()) == 4 * 500
    calibrate(sae, x, Calibration(**ONLY | {"scale": True}))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), before["W_dec"].norm(dim=1))


def test_the_same_activations_give_the_same_bits():
    x = SHIFTS["all"](source())
    first, second = planted(), planted()
    torch.manual_seed(1)
    calibrate(first, x, Calibration())
    torch.manual_seed(2)
    calibrate(second, x, Calibration())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_few_enormous_tokens_decide_nothing():
    clean, dirty = planted(), planted()
    x = SHIFTS["all"](source())
    broken = x.clone()
    broken[[3, 700, 1900]] *= 1000
    calibrate(clean, x, Calibration())
    report = calibrate(dirty, broken, Calibration())
    assert report.outliers == 3
    assert explained(dirty, x) == pytest.approx(explained(clean, x), abs=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    sae = planted(dtype=dtype)
    x = SHIFTS["all"](source())
    report = calibrate(sae, x, Calibration())
    assert report.parts[-1].ve > 0.85
    assert sae.topk_threshold.dtype == torch.float64
    assert str(sae.W_enc.dtype) == f"torch.{dtype}"


def test_bad_input_is_named_and_the_sae_stays_as_it_was(monkeypatch):
    sae, x = trained(), torch.randn(200, D_IN)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with pytest.raises(DataError, match="at least 64 tokens; there are 63"):
        calibrate(sae, x[:63], Calibration())
    with pytest.raises(DataError, match="not all finite"):
        calibrate(sae, torch.where(x > 2, float("inf"), x), Calibration())
    with pytest.raises(DataError, match="do not vary"):
        calibrate(sae, torch.ones(200, D_IN), Calibration())
    with pytest.raises(SAEError, match=r"reads 8 channels; the activations are of shape \[200, 9\]"):
        calibrate(sae, torch.randn(200, 9), Calibration())
    with pytest.raises(ConfigError, match=r"calibration\.tokens"):
        Calibration(tokens=3)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_lens_gemma4.training.calibration.fit_gains", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(sae, x + 5, Calibration())
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
