"""Packing against blocks worked out by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.activations.packing import TokenDocument, pack

BOS = 2
DOCUMENTS = [[10, 11, 12], [20, 21], [30]]


def numbered(documents):
    return [
        TokenDocument(n, tokens, [f"role {n}"] * len(tokens), [t % 2 == 0 for t in tokens])
        for n, tokens in enumerate(documents)
    ]


@pytest.mark.parametrize(
    ("bos", "packed", "context_size", "expected"),
    [
        (BOS, True, 4, [[BOS, 10, 11, 12], [BOS, 20, 21], [BOS, 30]]),
        (BOS, True, 5, [[BOS, 10, 11, 12], [BOS, 20, 21, BOS, 30]]),
        (BOS, True, 6, [[BOS, 10, 11, 12, BOS, 20], [BOS, 21, BOS, 30]]),
        (BOS, False, 6, [[BOS, 10, 11, 12], [BOS, 20, 21], [BOS, 30]]),
        (BOS, False, 3, [[BOS, 10, 11], [BOS, 12], [BOS, 20, 21], [BOS, 30]]),
        (None, True, 4, [[10, 11, 12, 20], [21, 30]]),
        (None, True, 6, [[10, 11, 12, 20, 21, 30]]),
        (None, False, 2, [[10, 11], [12], [20, 21], [30]]),
    ],
)
def test_packing_by_hand(bos, packed, context_size, expected):
    blocks = list(pack(numbered(DOCUMENTS), bos, context_size, packed=packed))
    assert [block.tokens for block in blocks] == expected
    for block in blocks:
        number = [b if t == BOS else t // 10 - 1 for t, b in zip(block.tokens, block.documents, strict=True)]
        assert block.documents == number
        assert block.roles == [None if t == BOS else f"role {t // 10 - 1}" for t in block.tokens]


def test_a_bos_belongs_to_the_document_that_it_opens():
    (block,) = pack(numbered(DOCUMENTS), BOS, 9, packed=True)
    assert block.tokens == [BOS, 10, 11, 12, BOS, 20, 21, BOS, 30]
    assert block.documents == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert block.counts == [False, True, False, True, False, True, False, False, True]
    (counted,) = pack(numbered(DOCUMENTS), BOS, 9, packed=True, bos_counts=True)
    assert counted.counts == [True, True, False, True, True, True, False, True, True]


@given(st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=20), min_size=1, max_size=8), st.integers(3, 9))
@settings(max_examples=200, deadline=None)
def test_packing_loses_nothing_and_opens_every_block_and_document_with_one_bos(documents, context_size):
    blocks = list(pack(numbered(documents), BOS, context_size, packed=True))
    assert [t for block in blocks for t in block.tokens if t != BOS] == [t for d in documents for t in d]
    for tokens, numbers, roles, counts, _ in blocks:
        assert len(tokens) == len(numbers) == len(roles) == len(counts) <= context_size
        assert tokens[0] == BOS
        assert not any(a == b == BOS for a, b in itertools.pairwise(tokens))
        starts = [i for i in range(len(tokens)) if i == 0 or numbers[i] != numbers[i - 1]]
        assert [i for i, t in enumerate(tokens) if t == BOS] == starts


@given(
    st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=20), min_size=1, max_size=8),
    st.integers(3, 9),
    st.booleans(),
    st.sampled_from([BOS, None]),
)
def test_from_the_end_of_a_block_packing_goes_on_as_if_it_had_never_stopped(documents, context_size, packed, bos):
    whole = numbered(documents)
    blocks = list(pack(whole, bos, context_size, packed=packed))
    for at, block in enumerate(blocks):
        number, tokens = block.end
        rest = [TokenDocument(number, *(part[tokens:] for part in whole[number][1:])), *whole[number + 1 :]]
        following = list(pack(rest, bos, context_size, packed=packed))
        assert [b[:4] for b in following] == [b[:4] for b in blocks[at + 1 :]]
