"""Widths, forms and drift against the same figures written out."""

import copy
import re

import numpy as np
import pytest
import torch
from sae_lens import BatchTopKTrainingSAE

from sae_lens_gemma4.errors import SAEError
from sae_lens_gemma4.evaluation import reading, structure
from sae_lens_gemma4.evaluation.structure import (
    WidthSums,
    batch_topk_acts,
    drift,
    forms,
    matryoshka_widths,
    training_facts,
)
from sae_lens_gemma4.training.restore import inference_form
from tests.evaluation.test_reading import built
from tests.support import D_IN, D_SAE, trained


def tokens(n=50, seed=3):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.3


def figures(x, x_hat):
    x, x_hat = x.double(), x_hat.double()
    sse = float((x - x_hat).square().sum())
    return 1 - sse / float((x - x.mean(0)).square().sum()), sse / float(x.square().sum())


@pytest.fixture(params=[7 * D_SAE, 2**25], ids=["chunks of 7", "one chunk"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_LATENTS", request.param)
    monkeypatch.setattr(structure, "CHUNK_LATENTS", request.param)


@torch.no_grad()
@pytest.mark.usefixtures("chunked")
def test_figures_of_each_width_are_those_of_the_first_latents_alone():
    sae, x = inference_form(trained()), tokens()
    widths = WidthSums(matryoshka_widths(sae))
    assert widths.widths == [8, D_SAE]
    for part in x.split(20):
        for one in reading.read(sae, part, widths.widths):
            widths.update(one)
    variance = float((x.double() - x.double().mean(0)).square().sum())
    rows = widths.to_list(variance, float(x.double().square().sum()))
    acts = sae.encode(x)
    for row, width in zip(rows, (8, D_SAE), strict=True):
        first = torch.where(torch.arange(D_SAE) < width, acts, 0)
        ve, nmse = figures(x, first @ sae.W_dec + sae.b_dec)
        l0 = float((first != 0).double().sum(1).mean())
        assert row == {
            "width": width,
            "ve": pytest.approx(ve, rel=1e-5),
            "nmse": pytest.approx(nmse, rel=1e-5),
            "l0": l0,
        }
    undefined = widths.to_list(float("nan"), 0.0)
    assert [(row["ve"], row["nmse"]) for row in undefined] == [(None, None)] * 2
    unread = WidthSums([8]).to_list(variance, 1.0)
    assert unread == [{"width": 8, "ve": None, "nmse": None, "l0": None}]


def test_widths_are_those_of_the_metadata():
    sae = inference_form(trained())
    sae.cfg.metadata.training_architecture_details["matryoshka_widths"] = [16, 8, 8, 32, 64]
    assert matryoshka_widths(sae) == [8, 16, 32]
    assert matryoshka_widths(inference_form(trained(BatchTopKTrainingSAE))) == []
    assert matryoshka_widths(built("standard")) == []
    assert training_facts(built("topk"))["k"] == 5
    assert "k" not in training_facts(built("standard"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", "sixteen"),
        ("k", True),
        ("k", float("nan")),
        ("matryoshka_widths", ["a"]),
        ("matryoshka_widths", [0.5, 1.0]),
        ("matryoshka_widths", 8),
    ],
)
def test_metadata_that_are_no_numbers_are_named(field, value):
    sae = inference_form(trained())
    sae.cfg.metadata.training_architecture_details[field] = value
    with pytest.raises(SAEError, match=f"{field} = {re.escape(repr(value))}"):
        matryoshka_widths(sae)


@torch.no_grad()
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("k", [0.1, 3, 4.5, 31, 40])
def test_batch_topk_is_the_flat_topk_of_the_batch(k):
    """At 31 and 40 of 32 latents, there are fewer positive ones than wanted."""
    sae, x = inference_form(trained()), tokens()
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    wanted = min(int(k * 50), pre.numel())
    values, places = pre.flatten().topk(wanted)
    expected = {int(p): float(v) for p, v in zip(places, values, strict=True) if v > 0}
    token, latent, value = batch_topk_acts(sae, x, k)
    ours = dict(zip((token * D_SAE + latent).tolist(), value.tolist(), strict=True))
    assert ours == pytest.approx(expected, rel=1e-5)
    assert len(value) == min(wanted, int((pre > 0).sum()))


@torch.no_grad()
@pytest.mark.usefixtures("chunked")
def test_the_trained_form_is_what_the_trainer_computes():
    """sae_lens's own batch top-k on the whole batch, and the saved JumpReLU, side by side."""
    training = trained(BatchTopKTrainingSAE, rescale=True)
    sae, x = inference_form(training), tokens()
    result = forms(sae, x)
    batch_acts = training.encode(x)
    batch_acts = batch_acts.to_dense() if batch_acts.is_sparse else batch_acts
    for name, x_hat, acts in (
        ("saved", sae(x), sae.encode(x)),
        ("batch_topk", training.decode(training.encode(x)), batch_acts),
    ):
        assert result[name]["ve"] == pytest.approx(figures(x, x_hat)[0], rel=1e-4), name
        assert result[name]["l0"] == pytest.approx(float((acts != 0).double().sum(1).mean()), rel=1e-6), name
    assert (result["k"], result["batch_tokens"]) == (4.0, 50)
    assert result["saved"]["ve"] != pytest.approx(result["batch_topk"]["ve"], rel=1e-3)


def test_other_saes_have_one_form_and_constant_tokens_no_variance():
    x = tokens()
    assert forms(built("standard"), x) is None
    assert forms(built("topk"), x) is None
    no_k = inference_form(trained())
    del no_k.cfg.metadata.training_architecture_details["k"]
    assert forms(no_k, x) is None
    constant = forms(inference_form(trained()), torch.ones(6, D_IN))
    assert constant["saved"]["ve"] is None and constant["batch_topk"]["ve"] is None


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def quantiles(values):
    return {f"{q:g}": pytest.approx(float(np.quantile(values, q)), rel=1e-9) for q in QUANTILES}


@torch.no_grad()
def test_drift_is_the_angle_and_growth_of_each_latent():
    old = inference_form(trained())
    new = copy.deepcopy(old)
    g = torch.Generator().manual_seed(0)
    for name in ("W_enc", "W_dec", "b_dec", "threshold"):
        p = getattr(new, name)
        p.add_(0.3 * torch.randn(p.shape, generator=g))
    result = drift(new, old, "before")
    assert result["reference"] == "before"
    for part, rows in {"encoder": ("W_enc", 0), "decoder": ("W_dec", 1)}.items():
        a, b = (getattr(s, rows[0]).double().numpy() for s in (new, old))
        a, b = (a.T, b.T) if rows[1] == 0 else (a, b)
        na, nb = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        assert result[f"{part}_cosine"] == quantiles((a * b).sum(1) / (na * nb))
        assert result[f"{part}_norm_ratio"] == quantiles(na / nb)
    moved = (new.b_dec.double() - old.b_dec.double()).norm()
    assert result["b_dec_distance"] == pytest.approx(float(moved), rel=1e-12)
    assert result["threshold_ratio"] == quantiles(new.threshold.double().numpy() / old.threshold.double().numpy())


@torch.no_grad()
def test_no_drift_is_none_at_all_and_latents_that_are_zero_have_no_angle():
    sae = built("standard")
    still = drift(sae, sae, "itself")
    for name in ("encoder_cosine", "decoder_norm_ratio"):
        assert list(still[name].values()) == pytest.approx([1.0] * len(QUANTILES))
    assert (still["b_dec_distance"], still["threshold_ratio"]) == (0.0, None)
    empty = copy.deepcopy(sae)
    empty.W_dec.zero_()
    assert set(drift(sae, empty, "nothing")["decoder_cosine"].values()) == {None}
    with pytest.raises(SAEError, match="12 × 64 and 8 × 32"):
        drift(sae, inference_form(trained()), "another")
