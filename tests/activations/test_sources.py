import pytest

from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.mapping import from_mapping
from sae_lens_gemma4.testing import tiny_tokenizer


def test_a_source_is_the_corpus_that_it_says():
    tokenizer = tiny_tokenizer()
    source = Source(dataset="embedded:chat", split="heldout", tokens=500, name="chats", skip_documents=3)
    corpus = source.to_corpus(tokenizer, context_size=32, exclude_special_tokens=False, bos=False, exact_tokens=True)
    expected = build_corpus(
        "embedded:chat", tokenizer, context_size=32, split="heldout", max_tokens=500, skip_documents=3, bos=False,
        exclude_special_tokens=False, exact_tokens=True,
    )  # fmt: skip
    assert corpus.hash == expected.hash and corpus.origin == expected.origin
    assert corpus.name == "chats" and corpus.n_tokens == 500


def test_texts_as_they_are():
    source = from_mapping(Source, {"texts": ["import os", "a"], "name": "mine"}, "source")
    corpus = source.to_corpus(tiny_tokenizer(), context_size=16, exclude_special_tokens=True, packed=False)
    assert corpus.n_blocks == 2 and corpus.name == "mine"
    assert corpus.origin.source is None


def test_roles_and_turn_markers_are_those_of_build_corpus():
    tokenizer = tiny_tokenizer()
    asked = {"roles": ["assistant"], "exclude_turn_markers": True}
    source = from_mapping(Source, {"dataset": "embedded:chat", "split": "heldout", "tokens": 300, **asked}, "source")
    corpus = source.to_corpus(tokenizer, context_size=32, exclude_special_tokens=True)
    expected = build_corpus("embedded:chat", tokenizer, context_size=32, split="heldout", max_tokens=300, **asked)
    assert corpus.hash == expected.hash and corpus.origin == expected.origin
    assert corpus.origin.roles == ("assistant",) and corpus.origin.exclude_turn_markers


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "either `dataset` or `texts`"),
        ({"dataset": "a", "texts": ["b"]}, "either `dataset` or `texts`"),
        ({"dataset": "a", "tokens": 0}, r"tokens of a \[train\] must be at least 1"),
        ({"texts": ["b"], "skip_documents": -1}, "skip_documents of texts must not be negative"),
        ({"dataset": "a", "name": ""}, "must not be empty"),
        ({"dataset": ""}, "must not be empty"),
        ({"texts": ["b"], "roles": ["user"]}, "has `texts`, which have no roles"),
        ({"dataset": "a", "roles": []}, r"roles of a \[train\] must be names"),
        ({"dataset": "a", "roles": [""]}, r"roles of a \[train\] must be names"),
        ({"texts": [1]}, r"source\.texts\[0\] must be str, not int"),
        ({"texts": []}, "`texts` of a source must be at least one"),
    ],
)
def test_sources_that_make_no_sense(facts, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Source, facts, "source")
