"""Every set of kernels computes what a dense float64 computation computes, and selects what it says it selects."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.errors import UnknownNameError
from sae_lens_gemma4.kernels import cpu, plain
from sae_lens_gemma4.kernels import product as products
from sae_lens_gemma4.kernels.dispatch import SWITCH, kernels_for
from sae_lens_gemma4.kernels.pattern import by_column, pattern

SETS = [plain, cpu]


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def filter_dtype(request, monkeypatch):
    """Both products, whatever this processor would take."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: request.param)


def batch(n=37, d=19, f=53, seed=0, scale=True, bias=0.1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d, generator=g, dtype=dtype), torch.randn(f, d, generator=g, dtype=dtype)
    b = bias * torch.randn(f, generator=g, dtype=dtype)
    return x, W, b, torch.rand(f, generator=g, dtype=dtype) + 0.5 if scale else None


def dense(x, W, b, scale):
    pre = x.double() @ W.double().T + b.double()
    return pre, pre if scale is None else pre * scale.double()


def expected(act, k_total):
    """By hand: sorted by (-activation, token, latent), positive ones only."""
    flat = act.flatten().tolist()
    order = sorted((i for i in range(len(flat)) if flat[i] > 0), key=lambda i: (-flat[i], i))[:k_total]
    return sorted(order)


def flat(selection, f):
    return (selection.token_e * f + selection.latent_e).tolist()


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bound", [None, 0.0, 1e-3, "right", "above", 1e30])
@pytest.mark.parametrize("k_total", [1, 37, 400, 37 * 53])
def test_the_selection_is_the_top_k_of_the_batch(kernels, scale, bound, k_total, filter_dtype):
    inputs = batch(scale=scale)
    pre, act = dense(*inputs)
    want = expected(act, k_total)
    smallest = act.flatten()[want].min()
    bound = {"right": smallest.item(), "above": 1.01 * smallest.item()}.get(bound, bound)
    got = kernels.batch_topk(*inputs, k_total, bound)
    assert flat(got, 53) == want
    torch.testing.assert_close(got.pre_e.double(), pre.flatten()[want], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.act_e.double(), act.flatten()[want], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.smallest.double(), smallest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("latents", [None, [0, 3, 4, 17, 52]])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_selection_is_the_top_k_of_each_row(kernels, latents, positive, k, filter_dtype):
    inputs = batch()
    pre, act = dense(*inputs)
    asked = list(range(53)) if latents is None else latents
    want = []
    for t in range(37):
        best = sorted(asked, key=lambda f: -act[t, f].item())[:k]
        want += sorted(t * 53 + f for f in best if act[t, f] > 0 or not positive)
    chosen = None if latents is None else torch.tensor(latents)
    got = kernels.row_topk(*inputs, k, chosen, positive=positive)
    assert flat(got, 53) == want
    torch.testing.assert_close(got.pre_e.double(), pre.flatten()[want], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", SETS)
def test_ties_go_to_the_first_token_s_first_latent(kernels, filter_dtype):
    x, W = torch.ones(3, 2), torch.ones(4, 2)
    W[1] = 2
    got = kernels.batch_topk(x, W, torch.zeros(4), None, 6)
    assert flat(got, 4) == [0, 1, 2, 3, 5, 9]  # three 4s, then the first three 2s
    rows = kernels.row_topk(x, W, torch.zeros(4), None, 2, positive=True)
    assert flat(rows, 4) == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize("kernels", SETS)
def test_nothing_positive_selects_nothing(kernels, filter_dtype):
    x, W, b, _ = batch(scale=False)
    for inputs in [(torch.zeros_like(x), W, torch.zeros_like(b), None), (x, W, b - 100, None), (x[:0], W, b, None)]:
        for bound in (None, 0.0, 1.0):
            got = kernels.batch_topk(*inputs, 20, bound)
            assert len(got.token_e) == len(got.act_e) == 0 and got.smallest == torch.inf
    assert len(kernels.row_topk(x, W, b - 100, None, 3, positive=True).act_e) == 0
    assert len(kernels.batch_topk(x, W, b, None, 0).act_e) == 0


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(kernels, which, value, filter_dtype):
    inputs = batch()
    inputs[which].view(-1)[3] = value
    assert kernels.batch_topk(*inputs, 40, 0.5).smallest.isnan()
    assert kernels.row_topk(*inputs, 3, positive=True).smallest.isnan()


@pytest.mark.parametrize("outlier", [1.0, 1e3])
@pytest.mark.parametrize("bias", [0.1, 30.0])
def test_the_filter_s_precision_changes_no_bit(outlier, bias, monkeypatch):
    """Outlier tokens, biases that dwarf the product, decoder norms of zero: the same entries and the same bits."""
    x, W, b, scale = batch(300, 64, 700, seed=3, bias=bias)
    x[5] *= outlier
    scale[9] = 0
    chosen = []
    for fast in (False, True):
        monkeypatch.setattr(products, "has_fast_bfloat16", lambda device, fast=fast: fast)
        for bound in (None, 1e-3, 1e6):
            chosen.append(cpu.batch_topk(x, W, b, scale, 2000, bound))
        chosen.append(chosen[-1])
        rows = cpu.row_topk(x, W, b, scale, 7, positive=False)
        assert len(rows.act_e) == 2100
    for other in chosen[1:]:
        for first, second in zip(chosen[0], other, strict=True):
            assert torch.equal(first, second)


def test_most_entries_never_become_candidates(monkeypatch):
    """The filter is worth its name: with a bound a little too low, few more candidates than are wanted."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: True)
    x, W, b, scale = batch(512, 256, 2048, seed=1)
    right = cpu.batch_topk(x, W, b, scale, 4096)
    encoder = cpu._Encoder(x, W, b, scale)
    computed = []
    exact = encoder._exact
    encoder._exact = lambda chunk, flat_a: computed.append(len(flat_a)) or exact(chunk, flat_a)
    encoder.above(0.96 * float(right.smallest), 4096)
    assert 4096 <= sum(computed) < 2 * 4096


@pytest.mark.parametrize("case", ["large biases", "no norms", "tiny"])
def test_no_bound_lets_whole_latents_through(case, monkeypatch):
    """Biases that undo a mean, decoder norms of 0, magnitudes below float32's: few candidates, and the right ones."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: True)
    x, W, b, scale = batch(256, 64, 1024, seed=2, dtype=torch.float64)
    if case == "large biases":
        x += 1
        b = b - W.sum(1)
    elif case == "no norms":
        scale[::2] = 0
    else:
        x, b = x * 1e-90, b * 1e-90
    right = plain.batch_topk(x, W, b, scale, 2048)
    computed = []
    exact = cpu._Encoder._exact
    monkeypatch.setattr(cpu._Encoder, "_exact", lambda self, *args: computed.append(len(args[1])) or exact(self, *args))
    got = cpu.batch_topk(x, W, b, scale, 2048, 0.96 * float(right.smallest))
    assert torch.equal(got.latent_e, right.latent_e) and torch.equal(got.token_e, right.token_e)
    assert case == "tiny" or sum(computed) < 4 * 2048


def test_a_guess_that_is_too_high_is_followed_by_a_sample_s(monkeypatch):
    x, W, b, scale = batch(512, 64, 1024, seed=1)
    right = cpu.batch_topk(x, W, b, scale, 4096)
    asked = []
    lower_bound = cpu._Encoder.lower_bound
    monkeypatch.setattr(
        cpu._Encoder, "lower_bound", lambda self, *args: asked.append(args[1:]) or lower_bound(self, *args)
    )
    got = cpu.batch_topk(x, W, b, scale, 4096, 1.05 * float(right.smallest))
    assert asked == [(cpu._SAMPLE,)] and all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
    monkeypatch.setattr(cpu, "_GUESS", 2.0)
    got = cpu.batch_topk(x, W, b, scale, 4096)
    assert asked[1:] == [(cpu._SAMPLE,), ()] and all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 5),
    f=st.integers(1, 11),
    k_total=st.integers(0, 60),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_whole_numbers_with_many_ties(n, d, f, k_total, seed, levels, dtype):
    """Small whole numbers: every product is exact in every dtype, and ties are everywhere."""
    g = torch.Generator().manual_seed(seed)
    x, W = (torch.randint(-levels, levels + 1, shape, generator=g).to(dtype) for shape in ((n, d), (f, d)))
    b = torch.randint(-1, 2, (f,), generator=g).to(dtype)
    want = expected(dense(x, W, b, None)[1], k_total)
    for kernels in SETS:
        got = kernels.batch_topk(x, W, b, None, k_total)
        assert flat(got, f) == want
        k = min(f, 3)
        rows = [kernels.row_topk(x, W, b, None, k, positive=False) for kernels in SETS]
        assert flat(rows[0], f) == flat(rows[1], f)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_entries", [0, 1, 60])
def test_sums_and_dots(kernels, dtype, n_entries):
    g = torch.Generator().manual_seed(1)
    entries = torch.randperm(13 * 7, generator=g)[:n_entries].sort().values
    rows, columns = entries // 7, entries % 7
    weight = torch.randn(n_entries, generator=g)
    table, left = torch.randn(7, 5, generator=g).to(dtype), torch.randn(13, 5, generator=g).to(dtype)
    want = torch.zeros(13, 5, dtype=torch.float64)
    for r, c, w in zip(rows.tolist(), columns.tolist(), weight.tolist(), strict=True):
        want[r] += w * table[c].double()
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    where = pattern(rows, columns, 13)
    assert where.row_e().tolist() == rows.tolist()
    out = kernels.sums(where, weight, table)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, **tolerance)
    dots = kernels.dots(where, left, table)
    assert dots.dtype == dtype
    torch.testing.assert_close(dots.double(), (left.double()[rows] * table.double()[columns]).sum(1), **tolerance)


@pytest.mark.parametrize("n_columns", [5, 70_000])
def test_the_order_by_column_is_stable(n_columns):
    columns = torch.randint(0, n_columns, (500,), generator=torch.Generator().manual_seed(0))
    want = sorted(range(500), key=lambda e: (columns[e].item(), e))
    assert by_column(columns).tolist() == want
    assert by_column(columns[:0]).tolist() == []


def test_the_error_bound_holds_and_is_not_idle():
    x, W, *_ = batch(64, 96, 80, seed=5)
    x[3] *= 200
    chunks = list(products.Product(x, W, fast=True).chunks())
    assert sorted(torch.cat([c.token_c for c in chunks]).tolist()) == list(range(64))
    for chunk in chunks:
        true = x[chunk.token_c].double() @ W.double().T
        off = (chunk.hidden_cf.double() - true).abs() - chunk.rounding * chunk.hidden_cf.double().abs()
        assert (off <= chunk.error_f).all()
    assert np.isclose(chunks[0].rounding, 2**-8)


def test_one_switch(monkeypatch):
    assert kernels_for(torch.device("cpu")) is cpu
    monkeypatch.setenv(SWITCH, "plain")
    assert kernels_for(torch.device("cpu")) is plain
    monkeypatch.setenv(SWITCH, "tritn")
    with pytest.raises(UnknownNameError, match="triton"):
        kernels_for(torch.device("cpu"))
