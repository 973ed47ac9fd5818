import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_gemma4.interp.contexts import histogram, intervals, strongest
from sae_lens_gemma4.interp.firings import Firing

SIZE = 8


def firing_of(z_bp):
    at = np.flatnonzero(z_bp)
    return Firing(at, z_bp.ravel()[at].astype(np.float32))


def some(seed, n_blocks=20, density=0.2, levels=None):
    rng = np.random.default_rng(seed)
    z_bp = np.where(rng.random((n_blocks, SIZE)) < density, rng.gamma(2, size=(n_blocks, SIZE)), 0)
    return z_bp if levels is None else np.ceil(z_bp * levels) / levels


@given(st.integers(0, 10_000), st.integers(1, 30))
def test_the_strongest_contexts_are_blocks_by_their_maximum(seed, n):
    z_bp = some(seed, levels=2 if seed % 2 else None)
    if not z_bp.any():
        return
    found = strongest(firing_of(z_bp), SIZE, n)
    maxima = z_bp.max(axis=1)
    order = sorted((b for b in range(len(z_bp)) if maxima[b] > 0), key=lambda b: (-np.float32(maxima[b]), b))[:n]
    assert [c.block for c in found] == order
    for context in found:
        assert context.position == z_bp[context.block].argmax()
        np.testing.assert_array_equal(context.value_p, z_bp[context.block].astype(np.float32))


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 4))
def test_intervals_hold_all_that_fires_and_draw_from_inside(seed, n_intervals, n_each):
    z_bp = some(seed)
    if not z_bp.any():
        return
    groups = list(intervals(firing_of(z_bp), SIZE, 123, n_intervals, n_each, np.random.default_rng(seed)))
    value = z_bp.astype(np.float32)
    assert groups[0].high == pytest.approx(float(value.max()))
    assert groups[-1].low == 0 and len(groups) == n_intervals
    assert sum(g.share for g in groups) == pytest.approx((z_bp > 0).sum() / 123)
    for group in groups:
        inside = (value > group.low) & (value <= group.high)
        blocks = set(np.flatnonzero(inside.any(axis=1)).tolist())
        assert group.share == pytest.approx(inside.sum() / 123, abs=1.1 / 123)  # one may lie on a rounded edge
        assert len(group.contexts) == min(n_each, len({c.block for c in group.contexts} | blocks))
        for context in group.contexts:
            assert group.low - 1e-6 < value[context.block, context.position] <= group.high + 1e-6
            np.testing.assert_array_equal(context.value_p, value[context.block])


def test_contexts_of_an_interval_are_drawn_evenly_among_its_tokens():
    z_bp = np.zeros((6, SIZE))
    z_bp[:, 0] = [1, 2, 3, 4, 5, 6]
    firing = firing_of(z_bp + 94 * (z_bp == 6))  # one at 100, five far below: the lowest interval of two
    counts = np.zeros(6)
    for seed in range(600):
        *_, lowest = intervals(firing, SIZE, 48, 2, 1, np.random.default_rng(seed))
        counts[lowest.contexts[0].block] += 1
    assert counts[5] == 0 and counts[:5].min() > 85 and counts[:5].max() < 160  # 120 ± 4 σ


def test_the_same_seed_draws_the_same():
    firing = firing_of(some(3))
    one, other = (list(intervals(firing, SIZE, 100, 3, 2, np.random.default_rng((0, 7)))) for _ in range(2))
    assert [[c.block for c in g.contexts] for g in one] == [[c.block for c in g.contexts] for g in other]


@given(st.integers(0, 10_000))
def test_a_histogram_is_torch_s(seed):
    values = torch.from_numpy(np.random.default_rng(seed).gamma(2, size=50).astype(np.float32))
    found, low, high = histogram(values.numpy()), float(values.min()), float(values.max())
    edges = torch.linspace(low, high, 51, dtype=torch.float64)
    np.testing.assert_allclose(found.centres, (edges[:-1] + edges[1:]) / 2, rtol=1e-9)
    assert abs(found.counts - torch.histc(values, 50).numpy()).sum() <= 2  # a value on a rounded edge
    assert found.counts.sum() == 50


def test_a_histogram_of_one_value_counts_from_nothing():
    found = histogram(np.array([3.0]))
    assert found.counts[-1] == 1 and found.counts.sum() == 1
    assert 0 < found.centres[0] < found.centres[-1] < 3
