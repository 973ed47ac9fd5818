"""The rows kept are those that a sort of all tokens puts first."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_gemma4.evaluation.kept import TopRows


def rows(n):
    return torch.arange(n, dtype=torch.float32)[:, None] * torch.tensor([1.0, -2.0])


def offered(values, sizes, n_kept, dtypes=(torch.float32,)):
    top, start, i = TopRows(n_kept, 2), 0, 0
    while start < len(values):
        part = slice(start, min(start + sizes[i % len(sizes)], len(values)))
        top.add(values[part], torch.arange(part.start, part.stop), rows(len(values))[part].to(dtypes[i % len(dtypes)]))
        start, i = part.stop, i + 1
    return top


def assert_first(top, values, n_kept):
    """Of equal values the earlier token goes first."""
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:n_kept]
    assert top.index_m.tolist() == expected
    assert top.value_m.tolist() == [values[i] for i in expected]
    assert torch.equal(top.x_md.float(), rows(len(values))[expected])


lists = st.lists(st.integers(0, 6), min_size=1, max_size=60)  # few values: many are equal


@given(lists, st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 30))
def test_the_largest_are_kept_for_any_batching(values, sizes, n_kept):
    values = torch.tensor(values, dtype=torch.float64)
    assert_first(offered(values, sizes, n_kept), values.tolist(), n_kept)


@given(lists, lists, lists, st.integers(1, 30))
def test_merged_rows_are_those_of_all_tokens(first, second, third, n_kept):
    parts = [torch.tensor(part, dtype=torch.float64) for part in (first, second, third)]
    values = torch.cat(parts)
    starts = [0, len(first), len(first) + len(second)]
    shards = []
    for part, start in zip(parts, starts, strict=True):
        shard = TopRows(n_kept, 2)
        shard.add(part, torch.arange(len(part)), rows(len(values))[start : start + len(part)])
        shards.append(shard)
    total = shards[0].merged(shards[1], starts[1]).merged(shards[2], starts[2])
    assert_first(total, values.tolist(), n_kept)
    assert_first(shards[0], first, n_kept)  # left as it was


def test_rows_stay_in_their_dtype_and_mixed_ones_in_one_that_holds_both():
    values = torch.tensor([3.0, 1, 2, 5, 4, 0]).double()
    assert offered(values, (2,), 3, (torch.bfloat16,)).x_md.dtype == torch.bfloat16
    mixed = offered(values, (2,), 3, (torch.bfloat16, torch.float16))
    assert mixed.x_md.dtype == torch.float32
    assert_first(mixed, values.tolist(), 3)
    assert TopRows(3, 2).merged(offered(values, (6,), 2, (torch.bfloat16,)), 7).x_md.dtype == torch.bfloat16
