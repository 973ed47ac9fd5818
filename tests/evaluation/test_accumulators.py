"""Every metric against one plain float64 computation on all tokens at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.accumulators import ReconstructionAccumulator

FRACTIONS = (0.0001, 0.001, 0.01)


def sample(n=3000, d=6, f=11, seed=0, mean=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + mean
    x_hat = x + 0.3 * torch.randn(n, d, generator=g, dtype=torch.float64) * torch.rand(n, 1, generator=g).pow(4) * 9
    acts = torch.relu(torch.randn(n, f, generator=g, dtype=torch.float64) - 1)
    acts[:, 3] = 0
    return x, x_hat, acts


def accumulate(x, x_hat, acts, sizes=(1000,), max_tokens=None):
    accumulator = ReconstructionAccumulator(x.shape[1], max_tokens=max_tokens or len(x), d_sae=acts.shape[1])
    start = 0
    while start < len(x):
        for size in sizes:
            part = slice(start, start + size)
            accumulator.update(x[part], x_hat[part], acts[part])
            start += size
            if start >= len(x):
                break
    return accumulator


def plain(x, x_hat, acts):
    """The definitions, written out."""
    sse = (x - x_hat).pow(2).sum(1)
    order = sorted(range(len(x)), key=lambda i: (-sse[i].item(), i))
    out = {"ve": 1 - sse.sum() / (x - x.mean(0)).pow(2).sum(), "without": {}, "share": {}}
    for fraction in FRACTIONS:
        k = math.ceil(fraction * len(x))
        stay = sorted(order[k:])
        kept = x[stay]
        out["without"][fraction] = 1 - sse[stay].sum() / (kept - kept.mean(0)).pow(2).sum()
        out["share"][fraction] = sse[order[:k]].sum() / sse.sum()
    out["nmse"] = sse.sum() / x.pow(2).sum()
    out["cosine"] = torch.nn.functional.cosine_similarity(x, x_hat, dim=1).mean()
    out["l0"] = (acts > 0).double().sum(1).mean()
    out["l1"] = acts.sum(1).mean()
    out["dead"] = int((acts.sum(0) == 0).sum())
    return out


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [(3000,), (1000,), (7, 501, 1)])
def test_metrics_equal_their_definitions_for_any_batching(sizes, mean):
    x, x_hat, acts = sample(mean=mean)
    ours, theirs = accumulate(x, x_hat, acts, sizes).compute(), plain(x, x_hat, acts)
    for name in ("ve", "nmse", "cosine", "l0", "l1"):
        assert getattr(ours, name) == pytest.approx(float(theirs[name]), rel=1e-9), name
    for fraction in FRACTIONS:
        assert ours.ve_without_top_sse[fraction] == pytest.approx(float(theirs["without"][fraction]), rel=1e-9)
        assert ours.sse_share[fraction] == pytest.approx(float(theirs["share"][fraction]), rel=1e-9)
    assert ours.dead == theirs["dead"] == 1
    assert ours.n_tokens == 3000


def test_two_halves_add_up_to_the_whole():
    x, x_hat, acts = sample(mean=5)
    whole = accumulate(x, x_hat, acts).compute()
    parts = [accumulate(x[s], x_hat[s], acts[s], max_tokens=3000) for s in (slice(0, 1100), slice(1100, 3000))]
    joined = (parts[0] + parts[1]).compute()
    assert joined.ve == pytest.approx(whole.ve, rel=1e-12)
    for fraction in FRACTIONS:
        assert joined.ve_without_top_sse[fraction] == pytest.approx(whole.ve_without_top_sse[fraction], rel=1e-12)
    assert (joined.l0, joined.dead, joined.n_tokens) == (whole.l0, whole.dead, whole.n_tokens)


def test_of_equal_errors_the_earlier_tokens_go_first():
    x = torch.arange(200.0, dtype=torch.float64)[:, None].repeat(1, 2)
    accumulator = ReconstructionAccumulator(2, max_tokens=200, top_fractions=(0.01,))
    accumulator.update(x, x + 1)  # every token has the same SSE: tokens 0 and 1 are left out
    kept = x[2:]
    expected = 1 - 198 * 2.0 / float((kept - kept.mean(0)).pow(2).sum())
    assert accumulator.compute().ve_without_top_sse[0.01] == pytest.approx(expected, rel=1e-12)


def test_outlier_tokens_of_ordinary_norm_are_found():
    """The seed's case: one token in a thousand holds most of the error; no norm screen would see it."""
    x, _, acts = sample(n=10_000)
    x_hat = x + 0.1 * torch.randn_like(x)
    worst = torch.arange(0, 10_000, 1000)
    x_hat[worst] = -20 * x[worst] / x[worst].norm(dim=1, keepdim=True)
    metrics = accumulate(x, x_hat, acts).compute()
    assert metrics.ve < 0.93
    assert metrics.ve_without_top_sse[0.001] > 0.98
    assert metrics.sse_share[0.001] > 0.8
    assert metrics.verdict == "outlier-dominated"


def test_a_uniform_misfit_stays_one_whatever_is_left_out():
    x, _, acts = sample(n=5000)
    metrics = accumulate(x, 5 * x, acts).compute()
    assert metrics.ve == pytest.approx(-15, abs=0.01)
    assert metrics.verdict == "misfit"


@given(st.integers(0, 10_000), st.floats(-50, 50), st.floats(0.1, 30))
@settings(max_examples=30, deadline=None)
def test_ve_ignores_a_shift_and_a_scale_and_a_rotation(seed, shift, scale):
    x, x_hat, acts = sample(n=300, seed=seed)
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    before = accumulate(x, x_hat, acts).compute()
    after = accumulate(x @ q * scale + shift, x_hat @ q * scale + shift, acts).compute()
    assert after.ve == pytest.approx(before.ve, rel=1e-7)
    assert after.ve_without_top_sse[0.01] == pytest.approx(before.ve_without_top_sse[0.01], rel=1e-7)


def test_a_constant_bias_costs_what_it_should():
    """Variance of the residual is blind to one; this is not."""
    x, _, acts = sample()
    metrics = accumulate(x, x + 1, acts).compute()
    expected = 1 - 3000 * 6 / float((x - x.mean(0)).pow(2).sum())
    assert metrics.ve == pytest.approx(expected, rel=1e-9)


def test_what_is_not_defined_is_none():
    tenths = torch.full((50, 4), 0.1)  # whose float64 mean is not exactly their value
    assert accumulate(tenths, tenths * 2, torch.zeros(50, 3)).compute().ve is None
    outlier = torch.full((300, 4), 0.1)
    outlier[7] = 1e4
    alone = accumulate(outlier, outlier * 1.01, torch.zeros(300, 3)).compute()
    assert alone.ve == pytest.approx(0.9999, abs=1e-3)
    assert alone.ve_without_top_sse[0.001] is None  # the 299 that stay are constant
    ones = torch.ones(50, 4)
    metrics = accumulate(ones, ones * 2, torch.zeros(50, 3)).compute()
    assert metrics.ve is None
    assert metrics.verdict is None
    assert metrics.dead == 3
    zeros = accumulate(torch.zeros(50, 4), torch.zeros(50, 4), torch.zeros(50, 3)).compute()
    assert (zeros.nmse, zeros.cosine, zeros.sse_share[0.01]) == (None, None, None)
    one = accumulate(torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 3)).compute()
    assert one.ve_without_top_sse[0.01] is None


def test_concentration_curve_is_the_sorted_cumulative_error():
    x, x_hat, acts = sample()
    curve = accumulate(x, x_hat, acts).sse_concentration()
    sse = (x - x_hat).pow(2).sum(1).sort(descending=True).values
    for fraction, share in curve:
        k = round(fraction * 3000)
        assert share == pytest.approx(float(sse[:k].sum() / sse.sum()), rel=1e-9)
    assert curve[0][0] == pytest.approx(1 / 3000)
    assert curve[-1] == (1.0, pytest.approx(1.0))


def test_bad_input_is_named():
    accumulator = ReconstructionAccumulator(4, max_tokens=10, d_sae=3)
    ok = torch.zeros(2, 4)
    for args, message in [
        ((torch.zeros(2, 5), ok, torch.zeros(2, 3)), r"\[tokens, 4\]"),
        ((ok, ok, torch.zeros(2, 4)), r"\(2, 3\)"),
        ((ok, ok, None), "None"),
        ((ok, ok * float("nan"), torch.zeros(2, 3)), "not finite"),
        ((torch.zeros(11, 4), torch.zeros(11, 4), torch.zeros(11, 3)), "max_tokens=10"),
    ]:
        with pytest.raises(DataError, match=message):
            accumulator.update(*args)
    with pytest.raises(DataError, match="No token"):
        accumulator.compute()
    with pytest.raises(ConfigError, match="fractions"):
        ReconstructionAccumulator(4, max_tokens=10, top_fractions=(1.0,))
    with pytest.raises(ConfigError, match="d_in is 4 and 5"):
        _ = accumulator + ReconstructionAccumulator(5, max_tokens=10, d_sae=3)
    with pytest.raises(ConfigError, match="max_tokens is 10 and 20"):
        _ = accumulator + ReconstructionAccumulator(4, max_tokens=20, d_sae=3)
    half = ReconstructionAccumulator(4, max_tokens=10, d_sae=3)
    half.update(torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(6, 3))
    with pytest.raises(DataError, match="12 tokens"):
        _ = half + half


def test_json_form_has_plain_keys():
    data = accumulate(*sample()).compute().to_dict()
    assert set(data["sse_share"]) == {"0.0001", "0.001", "0.01"}
