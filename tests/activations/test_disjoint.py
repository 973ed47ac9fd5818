"""Texts that have documents in common, whatever blocks these lie in."""

import pytest
import torch

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.activations.disjoint import disjoint
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.testing import tiny_tokenizer

TEXTS = [f"import a{n}\n" * (n + 1) + "return" for n in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def corpus(texts, tokenizer, name, context_size=16, **options):
    return build_corpus(texts, tokenizer, context_size=context_size, name=name, **options)


def test_documents_apart_pass(tokenizer):
    train = [corpus(TEXTS[:8], tokenizer, "a"), corpus(TEXTS[8:12], tokenizer, "b")]
    disjoint(train, corpus(TEXTS[12:], tokenizer, "heldout"))
    disjoint([], train[0])


@pytest.mark.parametrize(
    "options", [{}, {"context_size": 48}, {"packed": False}, {"bos": False}, {"exclude_special_tokens": False}]
)
def test_a_document_is_known_in_other_blocks(tokenizer, options):
    train = [corpus(["x = 1", *TEXTS[:8]], tokenizer, "a"), corpus(TEXTS[8:12], tokenizer, "b")]
    heldout = corpus([*TEXTS[12:], TEXTS[10], TEXTS[9]], tokenizer, "heldout", **options)
    message = r"2 of 10 documents of held-out corpus 'heldout' are in training corpus 'b', as document 8 of 'heldout'"
    with pytest.raises(DataError, match=message):
        disjoint(train, heldout)
    with pytest.raises(DataError, match=r"2 of 10 documents .* training corpus 'a \+ b', as document 8 of 'heldout'"):
        disjoint([Corpus.concat(train)], heldout)


def test_the_number_is_that_in_its_own_text(tokenizer):
    heldout = Corpus.concat([corpus(TEXTS[:3], tokenizer, "x"), corpus(TEXTS, tokenizer, "y", skip_documents=5)])
    with pytest.raises(DataError, match=r"1 of 18 documents .* as document 7 of 'y'"):
        disjoint([corpus(TEXTS[7:8], tokenizer, "a")], heldout)


def test_a_document_that_was_cut_is_known_by_its_beginning(tokenizer):
    long = "import os and sys " * 40
    other = "import os and sys " * 8 + "import re " * 80
    tokens = len(tokenizer(long, add_special_tokens=False)["input_ids"])
    cut = corpus(["a", long], tokenizer, "cut", max_tokens=60)
    assert 60 <= cut.n_tokens < tokens
    whole = corpus([other, "b", long], tokenizer, "whole")
    with pytest.raises(DataError, match=r"1 of 3 documents .* as document 2 of 'whole'"):
        disjoint([cut], whole)
    with pytest.raises(DataError, match=r"1 of 2 documents .* as document 1 of 'cut'"):
        disjoint([whole], cut)
    with pytest.raises(DataError, match="as document 1 of 'cut'"):
        disjoint([whole], Corpus.concat([cut, corpus(["c"], tokenizer, "last")]))
    disjoint([cut], corpus(["b", "import re " * 80], tokenizer, "apart"))
    disjoint([corpus([other, "b"], tokenizer, "cut late", max_tokens=150)], corpus([long], tokenizer, "long"))


def test_a_short_beginning_is_nobody_s(tokenizer):
    """31 tokens are too few to know a document by; the same 31 as all of both are one document."""
    (ids,) = tokenizer(["import os and sys " * 20], add_special_tokens=False)["input_ids"]
    for n, same in ((31, False), (32, True)):
        short = build_corpus([tokenizer.decode(ids[:n])], tokenizer, context_size=64, name="short")
        assert short.n_tokens == n
        whole = corpus([tokenizer.decode(ids[:40])], tokenizer, "whole")
        if same:
            with pytest.raises(DataError, match="1 of 1"):
                disjoint([short], whole)
        else:
            disjoint([short], whole)
        with pytest.raises(DataError, match="1 of 1"):
            disjoint([short], short)


def test_parts_of_one_split_that_overlap_by_number(tokenizer):
    a, b = (
        build_corpus("embedded:chat", tokenizer, context_size=32, split="heldout", max_tokens=300, skip_documents=n)
        for n in (0, 1)
    )
    with pytest.raises(DataError, match=r"Documents 1 to \d of embedded:chat \(split 'heldout'\) are read both"):
        disjoint([a], b)
    after = build_corpus(
        "embedded:chat", tokenizer, context_size=32, split="heldout", max_tokens=300,
        skip_documents=a.origin.next_document,
    )  # fmt: skip
    disjoint([a], after)


def test_bos_is_told_where_nobody_says(tokenizer):
    """A tensor of tokens says nothing of BOS: it is what opens every block."""
    built = corpus(TEXTS[:3], tokenizer, "a", packed=False, context_size=48)
    first = built.tokens_bp[:2]
    tensor = Corpus(first, torch.ones_like(first, dtype=torch.bool), built.document_bp[:2], "tensor")
    with pytest.raises(DataError, match="2 of 3"):
        disjoint([tensor], built)
