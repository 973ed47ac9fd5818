"""Ranks by partition and sample, against sorting."""

import numpy as np
import pytest

from sae_lens_gemma4.kernels import ranking


@pytest.mark.parametrize("kind", ["normal", "few values", "sample too high", "sample too low", "constant"])
@pytest.mark.parametrize("k", [1, 20, 300])
def test_the_kth_of_each_row(kind, k):
    values = np.random.default_rng(0).normal(size=(9, 400)).astype(np.float32)
    if kind == "few values":
        values = np.round(values)
    elif kind == "sample too high":
        values[::2, :: ranking._STRIDE] += 10
    elif kind == "sample too low":
        values[:, :: ranking._STRIDE] -= 10
    elif kind == "constant":
        values[:] = 3
    want = np.sort(values, axis=1)[:, -k]
    assert (ranking.kth_of_each(values, k) == want).all()


def test_a_sample_s_mistake_is_seen(monkeypatch):
    """Rows of which the sample says too much are counted and done again."""
    values = np.random.default_rng(0).normal(size=(6, 400)).astype(np.float32)
    values[1, :: ranking._STRIDE] += 10
    again = []
    kth = ranking._kth
    monkeypatch.setattr(ranking, "_kth", lambda rows, k: again.append(len(rows)) or kth(rows, k))
    assert (ranking.kth_of_each(values, 40) == np.sort(values, axis=1)[:, -40]).all()
    assert again == [6, 6, 1]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_first_of_equals(k):
    rows = np.array([0, 0, 0, 0, 2, 2, 2, 5])
    values = np.array([1.0, 3, 3, 3, 2, 2, 2, 7])
    want = []
    for row in (0, 2, 5):
        places = np.flatnonzero(rows == row)
        want += sorted(sorted(places, key=lambda a: (-values[a], a))[:k])
    assert np.flatnonzero(ranking.first_of_each(values, rows, k)).tolist() == want
    best = np.sort(values)[-k]
    least = values >= best
    want = sorted(sorted(np.flatnonzero(least), key=lambda a: (-values[a], a))[:k])
    assert np.flatnonzero(least)[ranking.first_of_all(values[least], best, k)].tolist() == want
    assert ranking.first_of_each(values[:0], rows[:0], k).tolist() == []
