import gc
import weakref
from dataclasses import replace

import pytest
import torch

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.activations.vocabulary import check_tokenizer, check_tokens, tokenizer_fingerprint
from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.testing import tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_a_fingerprint_is_of_tokens_ids_and_special_tokens(tokenizer):
    first = tokenizer_fingerprint(tokenizer)
    assert len(first) == 16 and int(first, 16) >= 0
    assert tokenizer_fingerprint(tiny_tokenizer()) == first
    longer = tiny_tokenizer()
    longer.add_tokens(["<new>"])
    special = tiny_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["import"]}, replace_extra_special_tokens=False)
    assert len(special) == len(tokenizer)
    assert len({first, tokenizer_fingerprint(longer), tokenizer_fingerprint(special)}) == 3


def test_a_fingerprint_is_made_once_and_again_where_tokens_were_added(tokenizer, monkeypatch):
    calls = []
    get_vocab = type(tokenizer).get_vocab
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: calls.append(1) or get_vocab(self))
    first = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tokenizer) == first and len(calls) == 1
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != first and len(calls) == 2


def test_fingerprints_keep_no_tokenizer_alive():
    tokenizer = tiny_tokenizer()
    tokenizer_fingerprint(tokenizer)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_a_corpus_is_held_against_the_model_s_tokenizer(tokenizer):
    corpus = build_corpus(["import os"], tokenizer, context_size=8)
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    check_tokenizer(corpus, tiny_tokenizer())
    check_tokenizer(corpus, None)
    check_tokenizer(replace(corpus, origin=None), other)
    mine, theirs = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(other)
    with pytest.raises(DataError, match=f"another tokenizer \\({mine}\\) than the model's \\({theirs}\\)"):
        check_tokenizer(corpus, other)


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_token_beyond_the_vocabulary_is_named(wrong):
    tokens = torch.tensor([[1, 9], [0, 3]])
    check_tokens(Corpus(tokens, tokens >= 0, tokens, "x"), 10)
    tokens[1, 1] = wrong
    with pytest.raises(DataError, match=rf"token id {wrong} \(block 1, position 1\); the model has 10 tokens"):
        check_tokens(Corpus(tokens, torch.ones_like(tokens).bool(), tokens, "x"), 10)
