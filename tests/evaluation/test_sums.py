"""Columns of tokens and sums by key, against loops over tokens."""

import math
from itertools import pairwise

import pytest
import torch

from sae_lens_gemma4.evaluation.sums import COLUMNS, KeyedSums, token_columns


def column_of(columns, name):
    return columns[:, COLUMNS.index(name)].tolist()


def test_columns_of_tokens_are_what_their_names_say():
    x, x_hat = torch.tensor([[3.0, 4], [0, 0], [1, 0]]).double(), torch.tensor([[0.0, 2], [1, 1], [0, 0]]).double()
    columns = token_columns(x, x_hat, torch.tensor([2, 0, 1]), torch.tensor([0.5, 0, 7]))
    expected = {
        "n": [1, 1, 1],
        "sse": [9 + 4, 2, 1],
        "squares": [25, 0, 1],
        "dot": [8, 0, 0],
        "squares_hat": [4, 2, 0],
        "cosine": [8 / (5 * 2), 0, 0],
        "cosine_n": [1, 0, 0],
        "norm": [5, 0, 1],
        "norm_hat": [2, math.sqrt(2), 0],
        "ratio": [2 / 5, 0, 0],
        "ratio_n": [1, 0, 1],
        "l0": [2, 0, 1],
        "l1": [0.5, 0, 7],
    }
    assert tuple(expected) == COLUMNS
    for name, values in expected.items():
        assert column_of(columns, name) == pytest.approx(values, rel=1e-15), name


def by_hand(keys, reference, x, error):
    """Sums by key of ‖x − reference‖², x − reference and the error, one token at a time."""
    sums = {}
    for key, x_d, error_d in zip(keys, x, error, strict=True):
        centred, at, of_error = sums.get(key, (0.0, 0.0, 0.0))
        sums[key] = centred + float((x_d - reference).square().sum()), at + x_d - reference, of_error + error_d
    return sums


def assert_sums(keyed, expected):
    _, centred, at, error = keyed.table()
    assert set(keyed.keys) == set(expected)
    for key, place in keyed.keys.items():
        assert centred[place].item() == pytest.approx(expected[key][0], rel=1e-12)
        torch.testing.assert_close(at[place], expected[key][1])
        torch.testing.assert_close(error[place], expected[key][2])


def test_sums_by_key_for_any_batching_and_merge():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64) + 50
    error = torch.randn(40, 3, generator=g, dtype=torch.float64)
    keys = torch.randint(-4, 9, (40,), generator=g)
    references = x[0], x[20]
    shards = []
    for reference, cuts in zip(references, ((0, 1, 2, 20), (20, 37, 40)), strict=True):
        shard = KeyedSums(3)
        for start, stop in pairwise(cuts):
            part = slice(start, stop)
            columns = token_columns(
                x[part], x[part] - error[part], torch.zeros(stop - start), torch.zeros(stop - start)
            )
            places = shard.add(keys[part], columns, x[part] - reference, error[part])
            assert [list(shard.keys)[place] for place in places] == keys[part].tolist()
        shards.append(shard)
    assert_sums(shards[0], by_hand(keys[:20].tolist(), x[0], x[:20], error[:20]))
    assert_sums(shards[1], by_hand(keys[20:].tolist(), x[20], x[20:], error[20:]))
    places = shards[0].merge(shards[1], x[20] - x[0])
    assert_sums(shards[0], by_hand(keys.tolist(), x[0], x, error))
    assert [list(shards[0].keys)[place] for place in places] == list(shards[1].keys)
    counts = column_of(shards[0].table()[0], "n")
    assert dict(zip(shards[0].keys, counts, strict=True)) == {
        int(k): int(n) for k, n in zip(*keys.unique(return_counts=True), strict=True)
    }
