"""Ranks, shares and contexts of outliers on a corpus small enough to be read."""

import numpy as np
import pytest
import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.evaluation import outliers
from sae_lens_gemma4.evaluation.outliers import TokenTraits, describe_outliers, norm_against_sse
from tests.evaluation.test_accumulators import fed

WORDS = ["<pad>", "<bos>", "the", " cat", ",", "\n\n", " sat", "।", "कि", "ि", "😀", "|", " 7", "…", ""]
PAD, BOS, THE, CAT, COMMA, BREAK, SAT, DANDA, KI, SIGN, SMILE, BAR, SEVEN, DOTS, NOTHING = range(len(WORDS))


class Tokenizer:
    """As much of one as is asked for."""

    all_special_ids = (PAD, BOS)

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)


@pytest.fixture
def corpus():
    """Document 4 runs over both blocks, 7 begins in the second; BOS is masked but the one in the middle."""
    tokens = torch.tensor([[BOS, THE, CAT, COMMA, THE, SAT], [BOS, THE, BOS, BAR, CAT, PAD]])
    document = torch.tensor([[4, 4, 4, 4, 4, 4], [4, 4, 7, 7, 7, -1]])
    keep = tokens != PAD
    keep[0, 0] = keep[1, 0] = False
    role = torch.tensor([[-1, 0, 0, 1, 1, 1], [-1, 1, -1, 0, 0, -1]], dtype=torch.int8)
    return Corpus(tokens, keep, document, "by hand", role_bp=role, roles=("user", "model"))


def snapshot_of(sse, norm):
    """An accumulator's, for tokens with these squared errors and norms."""
    x = torch.stack([torch.tensor(norm).double(), torch.zeros(len(norm)).double()], dim=1)
    x_hat = x + torch.stack([torch.zeros(len(sse)).double(), torch.tensor(sse).double().sqrt()], dim=1)
    return fed(x, x_hat, None).snapshot()


SSE = [1.0, 2, 8, 4, 32, 0, 8, 16, 1]
NORM = [3.0, 1, 9, 2, 4, 8, 5, 6, 7]


def test_traits_are_those_of_the_tokens_that_count(corpus):
    traits = dict(TokenTraits.of(corpus, Tokenizer()).items())
    assert {name: has.astype(int).tolist() for name, has in traits.items()} == {
        #           the cat  ,  the sat | the <bos> | cat
        "first":     [1, 0, 0, 0, 0,      0, 1, 0, 0],
        "delimiter": [0, 0, 1, 0, 0,      0, 0, 1, 0],
        "repeat":    [0, 0, 0, 1, 0,      0, 0, 0, 0],  # of the same document in the same block only
        "special":   [0, 0, 0, 0, 0,      0, 1, 0, 0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("token", "delimits"),
    [(THE, 0), (COMMA, 1), (BREAK, 1), (DANDA, 1), (KI, 0), (SIGN, 0), (SMILE, 0), (BAR, 1), (SEVEN, 0), (DOTS, 1),
     (NOTHING, 0), (BOS, 0)],
)  # fmt: skip
def test_delimiters_are_white_space_and_punctuation_of_any_script(token, delimits):
    tokens = torch.tensor([[token]])
    corpus = Corpus(tokens, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long), "one")
    assert TokenTraits.of(corpus, Tokenizer()).delimiter.tolist() == [bool(delimits)]


def test_the_worst_are_listed_with_both_ranks_and_what_stands_around_them(corpus, monkeypatch):
    monkeypatch.setattr(outliers, "FRACTION", 0.4)  # ⌈.4 · 9⌉ = 4 of the tokens
    monkeypatch.setattr(outliers, "_AROUND", 2)
    result = describe_outliers(snapshot_of(SSE, NORM), corpus, Tokenizer())
    assert (result["fraction"], result["count"]) == (0.4, 4)
    rows = result["tokens"]
    assert [row["text"] for row in rows] == [" sat", "|", ",", "<bos>"]  # of equal errors the earlier first
    assert [row["token_id"] for row in rows] == [SAT, BAR, COMMA, BOS]
    assert [(row["block"], row["position"], row["document"]) for row in rows] == [
        (0, 5, 4), (1, 3, 7), (0, 3, 4), (1, 2, 7)]  # fmt: skip
    assert [row["sse"] for row in rows] == pytest.approx([32, 16, 8, 8])
    assert [row["sse_share"] for row in rows] == pytest.approx([32 / 72, 16 / 72, 8 / 72, 8 / 72])
    assert [row["sse_rank"] for row in rows] == [1, 2, 3, 4]
    assert [row["norm"] for row in rows] == [4, 6, 9, 5]
    assert [row["norm_rank"] for row in rows] == [6, 4, 1, 5]
    assert [row["role"] for row in rows] == ["model", "user", "model", None]
    assert [row["delimiter"] for row in rows] == [False, True, True, False]
    assert rows[3]["first"] is True and rows[3]["special"] is True and rows[0]["repeat"] is False
    assert [text for text, _ in rows[1]["context"]] == ["the", "<bos>", "|", " cat"]  # padding is no context
    assert [error for _, error in rows[1]["context"]] == pytest.approx([0 / 8**2, 8 / 5**2, 16 / 6**2, 1 / 7**2])
    assert [error for _, error in rows[2]["context"]] == pytest.approx([1 / 3**2, 2 / 1, 8 / 9**2, 4 / 2**2, 32 / 4**2])
    assert all(row["context"][row["at"]][0] == row["text"] for row in rows)
    assert result["shares"] == {
        "first": {"top": 1 / 4, "all": 2 / 9},
        "delimiter": {"top": 2 / 4, "all": 2 / 9},
        "repeat": {"top": 0, "all": 1 / 9},
        "special": {"top": 1 / 4, "all": 1 / 9},
    }


def test_what_was_not_measured_is_painted_none(corpus, monkeypatch):
    monkeypatch.setattr(outliers, "FRACTION", 0.1)
    norm = [0.0, *NORM[1:]]
    sse = [64.0, *SSE[1:]]
    [row] = describe_outliers(snapshot_of(sse, norm), corpus, Tokenizer())["tokens"]
    assert row["context"][:3] == [["<bos>", None], ["the", None], [" cat", pytest.approx(2.0)]]  # masked, of norm 0
    assert row["norm_rank"] == 9
    perfect = describe_outliers(snapshot_of([0.0] * 9, NORM), corpus, Tokenizer())["tokens"]
    assert [row["sse_share"] for row in perfect] == [None]


def test_the_scatter_has_all_of_the_worst_and_a_sample_of_the_others():
    g = torch.Generator().manual_seed(0)
    sse, norm = torch.rand(5000, generator=g).double(), torch.rand(5000, generator=g).double() + 0.5
    snapshot = snapshot_of(sse.tolist(), norm.tolist())
    points = norm_against_sse(snapshot, seed=1)
    top = sse.argsort(descending=True)[:5]
    expected = torch.stack([norm / np.median(norm), sse / np.median(sse)], dim=1)
    assert len(points) == 1005 and [is_top for *_, is_top in points] == [False] * 1000 + [True] * 5
    for i, (x, y, _) in zip(top.tolist(), points[1000:], strict=True):
        assert (x, y) == pytest.approx(expected[i].tolist(), rel=1e-6)
    known = {round(y, 9) for y in expected[:, 1].tolist()}
    others = [round(y, 9) for _, y, _ in points[:1000]]
    assert set(others) <= known and len(set(others)) == 1000 and max(others) < points[-1][1]
    assert norm_against_sse(snapshot, seed=1) == points != norm_against_sse(snapshot, seed=2)
    assert norm_against_sse(snapshot_of([0.0, 0, 1], [1.0, 1, 1])) == []
