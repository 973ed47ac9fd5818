"""Every metric against one plain float64 computation on all tokens at once, however they were cut into pieces."""

import copy
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation import accumulators
from sae_lens_gemma4.evaluation.accumulators import ReconstructionAccumulator
from sae_lens_gemma4.evaluation.figures import top_count
from sae_lens_gemma4.evaluation.reading import ActiveLatents

FRACTIONS, MULTIPLES = (0.0001, 0.001, 0.01), (2.0, 5.0, 10.0, 100.0)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
NEVER_FIRES = 3


def sample(n=3000, d=6, f=11, seed=0, mean=0.0, dtype=torch.float64):
    """Sizes of tokens and of errors go over two decades, a few tokens are forty times as large."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = normal(n, d) * normal(n, 1).exp() * torch.where(torch.rand(n, 1, generator=g) < 0.01, 40.0, 1.0) + mean
    x_hat = 0.8 * x + 0.2 * mean + 0.3 * normal(n, d) * torch.rand(n, 1, generator=g).pow(4) * 9
    acts = torch.relu(normal(n, f) - 1)
    acts[:, NEVER_FIRES] = 0
    acts[: n // 2, NEVER_FIRES + 1] = 0
    return x.to(dtype), x_hat.to(dtype), acts.to(dtype)


def fed(x, x_hat, acts, sizes=(1000,), documents=None, max_tokens=None, **settings):
    """An accumulator that was given batches of these sizes, again and again."""
    d_sae = None if acts is None else acts.shape[1]
    accumulator = ReconstructionAccumulator(x.shape[1], max_tokens=max_tokens or len(x), d_sae=d_sae, **settings)
    start, i = 0, 0
    while start < len(x):
        part = slice(start, start + sizes[i % len(sizes)])
        accumulator.update(
            x[part],
            x_hat[part],
            None if acts is None else acts[part],
            documents_t=None if documents is None else documents[part],
        )
        start, i = part.stop, i + 1
    return accumulator


def plain(x, x_hat, acts=None, fractions=FRACTIONS, multiples=MULTIPLES):
    """The definitions of `ReconstructionMetrics`, written out; NaN where one is not defined."""
    x, x_hat = x.double().numpy(), x_hat.double().numpy()
    n, error = len(x), x - x_hat
    sse, squares, squares_hat = (error**2).sum(1), (x**2).sum(1), (x_hat**2).sum(1)
    norm, norm_hat, dot = np.sqrt(squares), np.sqrt(squares_hat), (x * x_hat).sum(1)
    both, nonzero = (norm > 0) & (norm_hat > 0), norm > 0

    def ve(left_out=()):
        stay = np.setdiff1d(np.arange(n), left_out)
        if len(stay) < 2:
            return math.nan
        return 1 - sse[stay].sum() / ((x[stay] - x[stay].mean(0)) ** 2).sum()

    def top(value, fraction):
        return sorted(range(n), key=lambda i: (-value[i], i))[: math.ceil(fraction * n)]

    def high(multiple):
        return np.flatnonzero(norm > multiple * np.median(norm))

    variance_d = ((x - x.mean(0)) ** 2).sum(0)
    out = {
        "n_tokens": n,
        "ve": ve(),
        "ve_centred": 1 - ((error - error.mean(0)) ** 2).sum() / variance_d.sum(),
        "ve_per_dimension": (1 - (error**2).sum(0) / variance_d).mean(),
        "mse": sse.sum() / n,
        "nmse": sse.sum() / squares.sum(),
        "cosine": (dot[both] / (norm[both] * norm_hat[both])).mean(),
        "relative_bias": squares_hat.sum() / dot.sum(),
        "l2_norm_in": norm.mean(),
        "l2_norm_out": norm_hat.mean(),
        "l2_ratio": (norm_hat[nonzero] / norm[nonzero]).mean(),
        "gamma": np.linalg.norm(x.mean(0)) / np.sqrt(variance_d.sum() / n),
    }
    for f in fractions:
        out["ve_without_top_sse", f] = ve(top(sse, f))
        out["ve_without_top_norm", f] = ve(top(norm, f))
        out["sse_share", f] = sse[top(sse, f)].sum() / sse.sum()
    for c in multiples:
        out["ve_without_high_norm", c] = ve(high(c))
        out["high_norm_share", c] = len(high(c)) / n
        out["high_norm_sse_share", c] = sse[high(c)].sum() / sse.sum()
        for f in fractions:
            out["ve_without_both", c, f] = ve(np.union1d(high(c), top(sse, f)))
    for q in QUANTILES:
        out["error_quantiles", q] = np.quantile(sse[nonzero] / squares[nonzero], q)
    if acts is not None:
        acts = acts.double().numpy()
        out |= {"l0": (acts != 0).sum(1).mean(), "l1": np.abs(acts).sum(1).mean()}
        out["dead"] = int((acts == 0).all(0).sum())
        for count in [n, *(c for c in (1024, 4096, 16384) if c < n)]:
            out["never_fired", count] = int((acts[:count] == 0).all(0).sum())
    return out


def value_of(metrics, key):
    name, *inner = key if isinstance(key, tuple) else (key,)
    value = getattr(metrics, name)
    for part in inner:
        value = value[part]
    return value


def assert_equal(metrics, expected, rel=1e-9):
    for key, value in expected.items():
        ours = value_of(metrics, key)
        assert (ours is None) == math.isnan(value), key
        assert ours is None or float(ours) == pytest.approx(value, rel=rel, abs=1e-12), key


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [(3000,), (7, 501, 1)])
def test_every_metric_equals_its_definition_for_any_batching(sizes, mean):
    x, x_hat, acts = sample(mean=mean)
    metrics, expected = fed(x, x_hat, acts, sizes).compute(), plain(x, x_hat, acts)
    assert_equal(metrics, expected)
    assert expected["dead"] == 1 and expected["never_fired", 1024] == 2
    shown = {name for name in metrics.to_dict() if name != "verdict"}
    assert shown == {key if isinstance(key, str) else key[0] for key in expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_keep_their_dtype_and_metrics_their_digits(dtype):
    x, x_hat, acts = sample(mean=3.0, dtype=dtype)
    accumulator = fed(x, x_hat, acts, (256,))
    assert_equal(accumulator.compute(), plain(x, x_hat, acts))
    assert accumulator.snapshot().worst.x_md.dtype == accumulator.snapshot().largest.x_md.dtype == dtype


def test_dense_and_active_latents_are_the_same():
    x, x_hat, acts = sample(n=200)
    acts[:, 5] *= -1  # abs-top-k latents may be negative
    token_a, latent_a = acts.nonzero(as_tuple=True)
    active = ActiveLatents(token_a, latent_a, acts[token_a, latent_a])
    accumulator = ReconstructionAccumulator(6, max_tokens=200, d_sae=11)
    accumulator.update(x, x_hat, active)
    assert accumulator.compute().to_dict() == fed(x, x_hat, acts, (200,)).compute().to_dict()
    assert_equal(accumulator.compute(), {k: v for k, v in plain(x, x_hat, acts).items() if k in ("l0", "l1", "dead")})
    sparse = ReconstructionAccumulator(6, max_tokens=200, d_sae=11)
    sparse.update(x, x_hat, acts.to_sparse())
    assert sparse.compute().to_dict() == accumulator.compute().to_dict()


def test_without_latents_theirs_are_not_defined():
    x, x_hat, _ = sample(n=200)
    metrics = fed(x, x_hat, None, documents=torch.arange(200) // 10).compute(resamples=100)
    assert (metrics.l0, metrics.l1, metrics.dead, metrics.never_fired) == (None, None, None, {})
    assert "l0" not in metrics.intervals() and "ve" in metrics.intervals()


@st.composite
def pieces(draw):
    """Tokens, their documents, cut into shards and those into batches."""
    n = draw(st.integers(30, 160))
    cuts = sorted({0, n, *draw(st.lists(st.integers(1, n - 1), max_size=4))})
    batches = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    documents = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 99))).integers(0, 14, n) * 5 - 3)
    return draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 200.0])), cuts, batches, documents


@given(pieces())
@settings(max_examples=40, deadline=None)
def test_shards_and_batches_change_nothing(case):
    """Each shard has its own reference vector and shares documents with others; few rows fit, so a second look is
    taken, at the joined accumulator."""
    seed, mean, cuts, batches, documents = case
    fractions, multiples = (0.02, 0.3), (0.9, 1.5)
    x, x_hat, acts = sample(n=cuts[-1], seed=seed, mean=mean)
    settings_ = {"max_tokens": len(x), "top_fractions": fractions, "norm_multiples": multiples}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulators, "_MIN_KEPT", 1)
        whole = fed(x, x_hat, acts, (len(x),), documents, **settings_)
        total = ReconstructionAccumulator(6, d_sae=11, **settings_)
        for start, stop in pairwise(cuts):
            part = slice(start, stop)
            total = total + fed(x[part], x_hat[part], acts[part], batches, documents[part], **settings_)
    missing = total.needs_second_pass()
    assert missing == whole.needs_second_pass()
    for c in multiples:
        assert (total.compute(resamples=0).ve_without_high_norm[c] is None) == (c in missing)
    for accumulator, sizes in ((total, batches), (whole, [len(x)])):
        start = 0
        while missing and start < len(x):
            accumulator.second_pass(x[start : start + sizes[0]])
            start += sizes[0]
        assert accumulator.needs_second_pass() == ()
    ours, theirs = total.compute(resamples=100), whole.compute(resamples=100)
    assert_equal(ours, plain(x, x_hat, acts, fractions, multiples))
    assert len(theirs.replicates) > 20
    for key, replicates in theirs.replicates.items():
        torch.testing.assert_close(ours.replicates[key], replicates, rtol=1e-8, atol=1e-10, equal_nan=True)


def test_latents_that_first_fired_in_a_later_shard_are_counted_there():
    x, x_hat, acts = sample()
    acts[:1100, 7] = 0  # fires soon after the second shard begins, beyond the first 1,024 tokens
    total = fed(x[:900], x_hat[:900], acts[:900], max_tokens=3000) + fed(
        x[900:], x_hat[900:], acts[900:], max_tokens=3000
    )
    assert_equal(total.compute(), plain(x, x_hat, acts))
    assert total.compute().never_fired == {1024: 3, 3000: 1}


@pytest.mark.parametrize(("kept", "missing"), [(3, ()), (2, (2.0,))])
def test_a_second_look_is_asked_for_from_one_token_too_many(kept, missing, monkeypatch):
    """Three of twenty tokens are above twice the median."""
    monkeypatch.setattr(accumulators, "_MIN_KEPT", kept)
    x = torch.ones(20, 2).double() + torch.arange(20)[:, None] / 100
    x[[3, 8, 9]] *= 5
    accumulator = fed(x, x + 0.1, None, top_fractions=(0.01,), norm_multiples=(2.0,))
    assert accumulator.needs_second_pass() == missing
    assert (accumulator.compute().ve_without_high_norm[2.0] is None) == bool(missing)


def test_documents_may_come_in_any_order():
    """Draws belong to document numbers, not to the order of arrival: else two SAEs would not be paired."""
    x, x_hat, acts = sample(n=120)
    documents = torch.tensor([9, 2, 5, 0, 7, 1, 4, 3]).repeat_interleave(15)
    order = torch.cat([torch.arange(60, 120), torch.arange(60)])
    one = fed(x, x_hat, acts, (120,), documents).compute(resamples=100)
    other = fed(x[order], x_hat[order], acts[order], (7,), documents[order]).compute(resamples=100)
    torch.testing.assert_close(one.replicates["ve"], other.replicates["ve"], rtol=1e-9, atol=0)


def test_what_a_second_look_completed_is_forgotten_when_tokens_follow(monkeypatch):
    monkeypatch.setattr(accumulators, "_MIN_KEPT", 1)
    x, x_hat, acts = sample(n=200)
    accumulator = fed(x[:150], x_hat[:150], acts[:150], max_tokens=200, norm_multiples=(1.5,))
    accumulator.second_pass(x[:150])
    assert_equal(accumulator.compute(), plain(x[:150], x_hat[:150], multiples=(1.5,)))
    accumulator.update(x[150:], x_hat[150:], acts[150:])
    assert accumulator.needs_second_pass() == (1.5,)
    assert accumulator.compute().ve_without_high_norm[1.5] is None
    accumulator.second_pass(x)
    assert_equal(accumulator.compute(), plain(x, x_hat, multiples=(1.5,)))


def test_a_second_look_at_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(accumulators, "_MIN_KEPT", 1)
    x, x_hat, acts = sample(n=60)
    accumulator = fed(x, x_hat, acts, norm_multiples=(1.1,))
    for other in (x + 1, x[:, :3], torch.cat([x, x]), x * math.nan):
        with pytest.raises(DataError, match="second pass"):
            accumulator.second_pass(other)
    accumulator.second_pass(x)
    assert_equal(accumulator.compute(), plain(x, x_hat, multiples=(1.1,)))


def test_group_sums_are_those_of_each_group_and_add_up_over_shards():
    x, x_hat, acts = sample(n=90)
    group_t = torch.arange(90) % 3 - 1
    shards = [ReconstructionAccumulator(6, max_tokens=90, d_sae=11) for _ in range(2)]
    for shard, part in zip(shards, (slice(0, 31), slice(31, 90)), strict=True):
        shard.update(x[part], x_hat[part], acts[part], groups={"position": group_t[part]})
    sums = (shards[0] + shards[1]).group_sums("position")
    assert list(sums) == [-1, 0, 1]
    for group, of_group in sums.items():
        inside = group_t == group
        centre = x[:31].median(0).values  # of the first tokens seen
        assert of_group.of("sse").item() == pytest.approx(float((x - x_hat)[inside].pow(2).sum()), rel=1e-12)
        assert of_group.of("n").item() == int(inside.sum())
        assert of_group.centred.item() == pytest.approx(float((x - centre)[inside].pow(2).sum()), rel=1e-12)
    assert shards[0].group_sums("role") == {}


def test_of_equal_errors_the_earlier_tokens_go_first():
    x = torch.arange(200.0, dtype=torch.float64)[:, None].repeat(1, 2)
    kept = x[2:]  # every token has the same SSE: tokens 0 and 1 are left out
    expected = 1 - 198 * 2.0 / float((kept - kept.mean(0)).pow(2).sum())
    whole = fed(x, x + 1, None, (7,), top_fractions=(0.01,))
    halves = [fed(part, part + 1, None, max_tokens=200, top_fractions=(0.01,)) for part in (x[:90], x[90:])]
    for accumulator in (whole, halves[0] + halves[1]):
        assert accumulator.compute().ve_without_top_sse[0.01] == pytest.approx(expected, rel=1e-12)


def test_constant_activations_have_no_variance_to_explain():
    tenths = torch.full((50, 4), 0.1)  # whose float64 mean is not exactly their value
    for constant, sizes in ((tenths, (50,)), (tenths.double() * 1e6, (7,)), (torch.ones(50, 4), (1,))):
        metrics = fed(constant, constant * 2, torch.zeros(50, 3), sizes).compute()
        assert (metrics.ve, metrics.ve_centred, metrics.ve_per_dimension, metrics.gamma) == (None, None, None, None)
        assert set(metrics.ve_without_top_sse.values()) == set(metrics.ve_without_high_norm.values()) == {None}
        assert (metrics.verdict, metrics.dead) == (None, 3)
        assert metrics.nmse == pytest.approx(1)
    halves = [fed(part, part * 2, None, max_tokens=50) for part in (tenths[:20], tenths[20:])]
    assert (halves[0] + halves[1]).compute().ve is None
    outlier = torch.full((300, 4), 0.1)
    outlier[7] = 1e4
    alone = fed(outlier, outlier * 1.01, torch.zeros(300, 3)).compute()
    assert alone.ve == pytest.approx(0.9999, abs=1e-3)
    assert alone.ve_without_top_sse[0.001] is None  # the 299 that stay are constant


def test_dimensions_without_variance_are_left_out_of_their_mean():
    x, x_hat, _ = sample(n=400)
    x[:, 2], x_hat[:, 2] = 0.1, 0.3
    expected = plain(x[:, [0, 1, 3, 4, 5]], x_hat[:, [0, 1, 3, 4, 5]])["ve_per_dimension"]
    assert fed(x, x_hat, None, (13,)).compute().ve_per_dimension == pytest.approx(expected, rel=1e-9)


def test_zero_tokens_have_no_direction_and_no_ratio():
    x, x_hat, acts = sample(n=300)
    x[::3], x_hat[::4] = 0, 0
    assert_equal(fed(x, x_hat, acts).compute(), plain(x, x_hat, acts))
    zeros = fed(torch.zeros(50, 4), torch.zeros(50, 4), torch.zeros(50, 3)).compute()
    assert (zeros.nmse, zeros.cosine, zeros.relative_bias, zeros.l2_ratio) == (None, None, None, None)
    assert set(zeros.sse_share.values()) == set(zeros.error_quantiles.values()) == {None}
    assert set(zeros.high_norm_sse_share.values()) == {None}


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_tokens_than_a_top_fraction_needs_is_not_defined(n):
    """⌈f·n⌉ = n leaves none, one that is left has no variance."""
    x, x_hat, _ = sample(n=n)
    metrics = fed(x, x_hat, None).compute()
    assert set(metrics.ve_without_top_sse.values()) == set(metrics.ve_without_top_norm.values()) == {None}
    assert metrics.verdict is None
    assert (metrics.ve is None) == (n == 1)


@pytest.mark.parametrize(("fraction", "n", "count"), [(0.07, 100, 7), (0.001, 3000, 3), (0.29, 100, 29), (0.1, 11, 2)])
def test_a_fraction_is_the_one_that_is_written(fraction, n, count):
    """.07 · 100 and .29 · 100 are a little off in floats."""
    assert top_count(fraction, n) == count
    x, x_hat, _ = sample(n=n)
    sse = (x - x_hat).square().sum(1).sort(descending=True).values
    ours = fed(x, x_hat, None, top_fractions=(fraction,), documents=torch.arange(n)).compute(resamples=100)
    assert ours.sse_share[fraction] == pytest.approx(float(sse[:count].sum() / sse.sum()), rel=1e-12)
    once = ours.replicates["sse_share", fraction][100:]  # all but one
    kept = math.ceil(Fraction(str(fraction)) * (n - 1))
    without = [torch.cat([sse[:i], sse[i + 1 :]]) for i in range(n)]
    expected = sorted(float(part[:kept].sum() / part.sum()) for part in without)
    assert sorted(once.tolist()) == pytest.approx(expected, rel=1e-9)


def test_a_norm_at_the_multiple_itself_is_not_above_it():
    x = torch.eye(6, dtype=torch.float64).repeat(2, 1) * torch.tensor([1.0, 1, 1, 1, 1, 2] * 2)[:, None].double()
    x[0, 0] = 3
    x_hat = x + 0.1 * torch.arange(12)[:, None]
    metrics = fed(x, x_hat, None, top_fractions=(0.3,), norm_multiples=(2.0,)).compute()
    assert_equal(metrics, plain(x, x_hat, fractions=(0.3,), multiples=(2.0,)))
    assert metrics.high_norm_share[2.0] == pytest.approx(1 / 12)


def test_a_latent_that_first_fires_after_a_count_never_fired_before_it():
    acts = torch.zeros(2000, 3)
    acts[1023, 0] = acts[1024, 1] = 1
    x, x_hat, _ = sample(n=2000)
    assert fed(x, x_hat, acts).compute().never_fired == {1024: 2, 2000: 1}


@pytest.mark.parametrize("fraction", [0.5, 0.89, 0.9, 0.91, 0.99])
def test_the_count_of_a_fraction_is_rounded_up(fraction):
    x, x_hat, _ = sample(n=10)
    ours = fed(x, x_hat, None, top_fractions=(fraction,)).compute()
    expected = plain(x, x_hat, fractions=(fraction,)) if fraction < 0.89 else None
    if expected is None:  # nine or all of ten
        assert ours.ve_without_top_sse[fraction] is None
    else:
        assert_equal(ours, expected)


OK = torch.zeros(2, 4)
ACTS = torch.zeros(2, 3)


def active(token, latent):
    return ActiveLatents(torch.tensor([token]), torch.tensor([latent]), torch.ones(1))


BAD = {
    "wide": ((torch.zeros(2, 5), OK, ACTS), {}, r"\[tokens, 4\]"),
    "two widths": ((OK, torch.zeros(2, 5), ACTS), {}, r"\[tokens, 4\]"),
    "two lengths": ((OK, torch.zeros(1, 4), ACTS), {}, r"\[tokens, 4\]"),
    "no rows": ((torch.zeros(4), torch.zeros(4), ACTS), {}, r"\[tokens, 4\]"),
    "latents": ((OK, OK, torch.zeros(2, 4)), {}, r"\(2, 3\)"),
    "latents' rows": ((OK, OK, torch.zeros(3, 3)), {}, r"\(2, 3\)"),
    "no latents": ((OK, OK, None), {}, "None"),
    "NaN": ((OK, OK * math.nan, ACTS), {}, "not finite"),
    "inf": ((OK + math.inf, OK, ACTS), {}, "not finite"),
    "latents NaN": ((OK, OK, ACTS * math.nan), {}, "not finite"),
    "many": ((torch.zeros(11, 4), torch.zeros(11, 4), torch.zeros(11, 3)), {}, "max_tokens=10"),
    "no documents": ((OK, OK, ACTS), {"documents_t": None}, "with all tokens or with none"),
    "documents": ((OK, OK, ACTS), {"documents_t": torch.zeros(3)}, r"Document numbers are \(3,\), not \(2,\)"),
    "groups": ((OK, OK, ACTS), {"groups": {"role": torch.zeros(2, 1)}}, r"Role numbers are \(2, 1\)"),
    "unknown latent": ((OK, OK, active(0, 3)), {}, "latent outside 0..2"),
    "unknown token": ((OK, OK, active(2, 0)), {}, "token outside 0..1"),
    "negative latent": ((OK, OK, active(0, -1)), {}, "latent outside 0..2"),
}


@pytest.mark.parametrize(("args", "more", "message"), BAD.values(), ids=BAD)
def test_a_refused_update_is_named_and_leaves_everything_as_it_was(args, more, message):
    x, x_hat, _ = sample(n=4, d=4)
    accumulator = ReconstructionAccumulator(4, max_tokens=10, d_sae=3)
    documents = torch.tensor([0, 1, 2, 3])
    accumulator.update(x, x_hat, torch.rand(4, 3), documents_t=documents, groups={"role": documents})
    before = copy.deepcopy(accumulator)
    with pytest.raises(DataError, match=message):
        accumulator.update(*args, **{"documents_t": torch.zeros(len(args[0]))} | more)
    for alike in (accumulator, before):  # and what follows finds the same
        alike.update(x, x, torch.ones(4, 3), documents_t=documents + 4, groups={"role": documents})
    ours, theirs = (alike.compute(resamples=100) for alike in (accumulator, before))
    assert ours.mse.interval is not None
    assert (ours.n_tokens, ours.to_dict(), ours.intervals()) == (8, theirs.to_dict(), theirs.intervals())
    for group, sums in accumulator.group_sums("role").items():
        assert torch.equal(sums.columns, before.group_sums("role")[group].columns)


def test_no_tokens_are_no_error_until_figures_are_asked_for():
    accumulator = ReconstructionAccumulator(4, max_tokens=10)
    accumulator.update(torch.zeros(0, 4), torch.zeros(0, 4))
    assert accumulator.needs_second_pass() == ()
    for both in (accumulator, accumulator + accumulator):
        with pytest.raises(DataError, match="No token"):
            both.compute()
    x, x_hat, _ = sample(n=5, d=4)
    alone = fed(x, x_hat, None, max_tokens=10)
    assert (accumulator + alone).compute().ve == (alone + accumulator).compute().ve == alone.compute().ve


def test_what_cannot_be_made_or_added_is_named():
    for settings_, message in [
        ({"top_fractions": (1.0,)}, "fractions"),
        ({"top_fractions": ()}, "fractions"),
        ({"norm_multiples": (0.0,)}, "positive"),
        ({"max_tokens": 0}, "max_tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ReconstructionAccumulator(4, **{"max_tokens": 10} | settings_)
    one = ReconstructionAccumulator(4, max_tokens=10)
    for other, message in [
        (ReconstructionAccumulator(5, max_tokens=10), "d_in is 4 and 5"),
        (ReconstructionAccumulator(4, max_tokens=20), "max_tokens is 10 and 20"),
        (ReconstructionAccumulator(4, max_tokens=10, d_sae=3), "d_sae is None and 3"),
    ]:
        with pytest.raises(ConfigError, match=message):
            _ = one + other
    x, x_hat, _ = sample(n=6, d=4)
    half = fed(x, x_hat, None, max_tokens=10)
    with pytest.raises(DataError, match="12 tokens"):
        _ = half + half
    with pytest.raises(ConfigError, match="documents"):
        _ = fed(x[:3], x_hat[:3], None, max_tokens=10) + fed(
            x[:3], x_hat[:3], None, max_tokens=10, documents=torch.zeros(3)
        )


def test_json_form_has_plain_keys_and_floats():
    data = fed(*sample()).compute().to_dict()
    assert set(data["sse_share"]) == {"0.0001", "0.001", "0.01"}
    assert set(data["ve_without_both"]) == {"2", "5", "10", "100"} and set(data["never_fired"]) == {"1024", "3000"}
    assert type(data["ve"]) is type(data["ve_without_both"]["2"]["0.01"]) is float


def test_concentration_curve_is_the_sorted_cumulative_error():
    x, x_hat, acts = sample()
    curve = fed(x, x_hat, acts).snapshot().concentration()
    sse = (x - x_hat).pow(2).sum(1).sort(descending=True).values
    for fraction, share in curve:
        assert share == pytest.approx(float(sse[: round(fraction * 3000)].sum() / sse.sum()), rel=1e-9)
    assert curve[0][0] == pytest.approx(1 / 3000)
    assert curve[-1] == (1.0, pytest.approx(1.0))
    assert fed(x, x, acts).snapshot().concentration() == []
