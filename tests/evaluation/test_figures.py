"""What a shift, a rotation and a scale may change; and figures on resamples against tokens that are really repeated."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.evaluation import accumulators
from sae_lens_gemma4.evaluation.intervals import Sampling
from tests.evaluation.test_accumulators import fed, plain, sample

VE = {"ve", "ve_centred", "ve_per_dimension", "ve_without_top_sse"}
BY_NORM = {"ve_without_top_norm", "ve_without_high_norm", "ve_without_both", "high_norm_share", "high_norm_sse_share"}
RELATIVE = {"nmse", "cosine", "relative_bias", "l2_ratio", "gamma", "error_quantiles"}
LATENTS = {"l0", "l1", "dead", "never_fired"}
NORMS = {"l2_norm_in", "l2_norm_out"}
ALL = VE | BY_NORM | RELATIVE | LATENTS | NORMS | {"n_tokens", "sse_share", "mse", "verdict"}


def flat(metrics):
    """Values by their path in the JSON form."""
    values = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk((*path, key), inner)
        else:
            values[path] = value

    walk((), metrics.to_dict())
    return values


def assert_change(before, after, factors, changed=frozenset()):
    """Every figure is as it was times its factor, 1 unless given, but those of `changed`.

    These are another number, except that a screen by norm may well choose the same tokens.
    """
    before, after = flat(before), flat(after)
    assert {path[0] for path in before} == ALL
    for path, value in before.items():
        factor = factors.get(path[0], 1)
        if path[0] in changed - BY_NORM:
            assert after[path] != pytest.approx(value, rel=1e-6), path
        elif path[0] not in changed and isinstance(value, float):
            assert after[path] == pytest.approx(value * factor, rel=1e-8, abs=1e-12 * factor), path
        elif path[0] not in changed:
            assert after[path] == value, path


cases = st.integers(0, 10_000)


@given(cases, st.floats(5, 500), st.sampled_from([-1, 1]))
@settings(max_examples=10, deadline=None)
def test_a_shift_of_both_changes_what_is_relative_to_zero_and_nothing_else(seed, size, sign):
    x, x_hat, acts = sample(n=300, seed=seed)
    shift = sign * size * torch.arange(1.0, 7, dtype=torch.float64)
    before, after = (fed(x + s, x_hat + s, acts).compute() for s in (0, shift))
    assert_change(before, after, {}, changed=BY_NORM | RELATIVE | NORMS)


@given(cases)
@settings(max_examples=10, deadline=None)
def test_a_rotation_changes_ve_by_dimension_and_nothing_else(seed):
    x, x_hat, acts = sample(n=300, seed=seed)
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    before, after = (fed(x @ r, x_hat @ r, acts).compute() for r in (torch.eye(6, dtype=torch.float64), q))
    assert_change(before, after, {}, changed={"ve_per_dimension"})


@given(cases, st.floats(-6, 6))
@settings(max_examples=10, deadline=None)
def test_a_scale_changes_what_has_a_unit_and_nothing_else(seed, exponent):
    x, x_hat, acts = sample(n=300, seed=seed)
    scale = 10**exponent
    before, after = (fed(x * s, x_hat * s, acts).compute() for s in (1, scale))
    assert_change(before, after, {"mse": scale**2, "l2_norm_in": scale, "l2_norm_out": scale})


def test_a_constant_error_costs_ve_what_it_should_and_centred_ve_nothing():
    x, x_hat, _ = sample()
    before, after = fed(x, x_hat, None).compute(), fed(x, x_hat + 2, None).compute()
    variance, error = float((x - x.mean(0)).pow(2).sum()), (x - x_hat).sum(0)
    assert after.ve_centred == pytest.approx(before.ve_centred, rel=1e-9)
    assert before.ve - after.ve == pytest.approx(float(3000 * 6 * 4 - 2 * 2 * error.sum()) / variance, rel=1e-9)


FRACTIONS, MULTIPLES = (0.05, 0.21), (0.8, 1.5)


@pytest.fixture(scope="module")
def documents():
    """Nine documents of very different length, one of which has most of the worst tokens."""
    documents = torch.tensor([0] * 40 + [1] * 3 + [2] * 25 + [3] + [4] * 17 + [5] * 30 + [6] * 4 + [7] * 9 + [8] * 11)
    x, x_hat, acts = sample(n=len(documents), seed=5, mean=2.0)
    x_hat[documents == 4] += 6
    return x, x_hat, acts, documents


def test_figures_on_resamples_are_those_of_tokens_really_repeated(documents):
    x, x_hat, acts, document = documents
    accumulator = fed(x, x_hat, acts, (31,), document, top_fractions=FRACTIONS, norm_multiples=MULTIPLES)
    replicates = accumulator.compute(resamples=100).replicates
    weights = torch.cat([Sampling(100).weights(9)[:25], Sampling(100).weights(9)[100:]])
    norm = x.norm(dim=1)
    high = {c: norm > c * np.median(norm) for c in MULTIPLES}  # the screen's median is not drawn again
    names = {"ve", "ve_centred", "mse", "nmse", "cosine", "relative_bias", "l2_norm_in", "l2_norm_out", "l2_ratio",
             "l0", "l1", "ve_without_top_sse", "sse_share"}  # fmt: skip
    assert {key if isinstance(key, str) else key[0] for key in replicates} == names | {
        "ve_without_high_norm", "high_norm_share", "high_norm_sse_share"}  # fmt: skip
    for b, weight in enumerate(weights):
        drawn = torch.cat([torch.tensor([i] * int(weight[document[i]]), dtype=torch.long) for i in range(len(x))])
        expected = plain(x[drawn], x_hat[drawn], acts[drawn], FRACTIONS, ())
        expected = {k: v for k, v in expected.items() if (k if isinstance(k, str) else k[0]) in names}
        sse = (x - x_hat).square().sum(1)[drawn]
        for c in MULTIPLES:
            above = high[c][drawn]
            stay = x[drawn][~above]
            variance = (stay - stay.mean(0)).square().sum()
            expected["ve_without_high_norm", c] = float(1 - sse[~above].sum() / variance)
            expected["high_norm_share", c] = float(above.double().mean())
            expected["high_norm_sse_share", c] = float(sse[above].sum() / sse.sum())
        for key, value in expected.items():
            row = b if b < 25 else b + 75
            assert float(replicates[key][row]) == pytest.approx(value, rel=1e-9, abs=1e-12), (b, key)


@pytest.mark.parametrize(("slack", "has_interval"), [(1, False), (None, True)])
def test_a_resample_that_needs_more_rows_than_were_kept_is_not_defined(documents, monkeypatch, slack, has_interval):
    """Never a figure on fewer tokens; and with more than one in twenty of them undefined there is no interval. Three
    times the rows that the tokens need are kept, and most draws can do with those."""
    monkeypatch.setattr(accumulators, "_MIN_KEPT", 1)
    if slack is not None:
        monkeypatch.setattr(accumulators, "_SLACK", slack)
    x, x_hat, acts, _ = documents
    document = torch.arange(len(x)) % 20
    metrics = fed(x, x_hat, acts, (200,), document, top_fractions=(0.05,)).compute(resamples=200)
    worst = sorted(range(len(x)), key=lambda i: -float((x - x_hat)[i].square().sum()))
    worst = worst[: (slack or 3) * math.ceil(0.05 * len(x))]
    short = []
    for weight in Sampling(200).weights(20):
        wanted = math.ceil(0.05 * float(weight[document].sum()))
        short.append(float(weight[document[worst]].sum()) < wanted)
    assert metrics.replicates["sse_share", 0.05].isnan().tolist() == short
    assert (np.mean(short[:200]) <= 0.05) == has_interval and np.mean(short) < 0.9
    assert metrics.sse_share[0.05] is not None and (metrics.sse_share[0.05].interval is not None) == has_interval
    assert metrics.ve.interval is not None
