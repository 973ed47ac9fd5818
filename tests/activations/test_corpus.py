"""Packing and masking against blocks worked out by hand, on a tokenizer whose ids are known."""

import itertools
import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.activations.corpus import Corpus, _pack, build_corpus
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.testing import tiny_tokenizer

BOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_packing_by_hand():
    blocks = list(_pack([[10, 11, 12], [20, 21], [30]], BOS, 4))
    assert blocks == [
        ([BOS, 10, 11, 12], [0, 0, 0, 0]),
        ([BOS, 20, 21], [1, 1, 1]),
        ([BOS, 30], [2, 2]),
    ]


@given(st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=20), min_size=1, max_size=8), st.integers(3, 9))
@settings(max_examples=200, deadline=None)
def test_packing_loses_nothing_and_opens_every_block_and_document_with_one_bos(documents, context_size):
    blocks = list(_pack(documents, BOS, context_size))
    assert [t for block, _ in blocks for t in block if t != BOS] == [t for d in documents for t in d]
    for block, numbers in blocks:
        assert len(block) == len(numbers) <= context_size
        assert block[0] == BOS
        assert not any(a == b == BOS for a, b in itertools.pairwise(block))
        starts = [i for i in range(len(block)) if i == 0 or numbers[i] != numbers[i - 1]]
        assert [i for i, t in enumerate(block) if t == BOS] == starts


def test_texts_become_blocks_with_specials_and_padding_masked(tokenizer):
    corpus = build_corpus(["import os", "def f(x):\n    return x"], tokenizer, context_size=16)
    expected = [BOS, *tokenizer("import os", add_special_tokens=False)["input_ids"]]
    assert corpus.tokens_bp[0, : len(expected)].tolist() == expected
    assert corpus.keep_bp.sum() == sum(
        len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ("import os", "def f(x):\n    return x")
    )
    assert not corpus.keep_bp[corpus.document_bp < 0].any()
    assert not corpus.keep_bp[corpus.tokens_bp == BOS].any()
    assert corpus.n_documents == 2


def test_specials_stay_when_asked_but_padding_does_not(tokenizer):
    corpus = build_corpus(["import os"], tokenizer, context_size=16, exclude_special_tokens=False)
    assert corpus.keep_bp[0, 0]
    assert corpus.n_tokens == int((corpus.document_bp >= 0).sum())


def test_chats_go_through_the_template_and_their_markers_are_masked(tokenizer):
    chat = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "return x"}]
    corpus = build_corpus([chat], tokenizer, context_size=64)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<bos><|turn>user\nimport os<turn|>\n<|turn>model\nreturn x<turn|>\n"
    real = corpus.tokens_bp[corpus.document_bp >= 0]
    assert tokenizer.decode(real) == rendered
    marked = corpus.tokens_bp[~corpus.keep_bp & (corpus.document_bp >= 0)]
    assert tokenizer.convert_ids_to_tokens(marked) == ["<bos>", "<|turn>", "<turn|>", "<|turn>", "<turn|>"]


def test_max_tokens_stops_at_a_whole_block(tokenizer):
    text = "import os and sys " * 100
    whole = build_corpus([text], tokenizer, context_size=16)
    part = build_corpus([text], tokenizer, context_size=16, max_tokens=40)
    assert 40 <= part.n_tokens < 40 + 16
    assert torch.equal(part.tokens_bp, whole.tokens_bp[: part.n_blocks])


def test_every_kind_of_source_is_the_same_corpus(tokenizer, tmp_path):
    texts = ["import os and sys", "def f(x): return x", "class A: pass"]
    expected = build_corpus(texts, tokenizer, context_size=8).hash
    dataset = Dataset.from_dict({"text": texts})
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    dataset.to_parquet(tmp_path / "rows.parquet")
    sources = [
        dataset,
        tmp_path / "saved",
        str(tmp_path / "splits"),
        tmp_path / "rows.jsonl",
        tmp_path / "rows.parquet",
    ]
    for source in sources:
        assert build_corpus(source, tokenizer, context_size=8).hash == expected
    built = build_corpus(texts, tokenizer, context_size=8)
    assert build_corpus(built, tokenizer, context_size=999) is built
    assert build_corpus(built.tokens_bp, tokenizer, context_size=8).tokens_bp.equal(built.tokens_bp)


def test_messages_column_of_a_dataset(tokenizer):
    chat = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "return x"}]
    from_rows = build_corpus(Dataset.from_list([{"messages": chat}]), tokenizer, context_size=64)
    assert from_rows.hash == build_corpus([chat], tokenizer, context_size=64).hash


def test_the_hash_follows_the_text(tokenizer):
    hashes = {build_corpus([t], tokenizer, context_size=8).hash for t in ("import os", "import sys", "import os ")}
    assert len(hashes) == 3


def test_batches_cover_each_block_once_in_a_seeded_order(tokenizer):
    corpus = build_corpus(["import os and sys " * 50], tokenizer, context_size=8)
    shuffled = [
        torch.cat([b.tokens_bp for b in corpus.batches(3, shuffle=torch.Generator().manual_seed(s))]) for s in (0, 0, 1)
    ]
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    assert sorted(map(tuple, shuffled[0].tolist())) == sorted(map(tuple, corpus.tokens_bp.tolist()))


def test_joined_corpora_keep_documents_apart(tokenizer):
    a, b = (build_corpus([t, t], tokenizer, context_size=8) for t in ("import os", "class A: pass"))
    joined = Corpus.concat([a, b])
    assert joined.n_documents == 4
    assert joined.n_tokens == a.n_tokens + b.n_tokens
    with pytest.raises(DataError, match="context sizes"):
        Corpus.concat([a, build_corpus(["x"], tokenizer, context_size=9)])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], DataError, "holds no text"),
        (["", ""], DataError, "holds no text"),
        (["<bos>"], DataError, "masked|holds no text"),
        ([["not a message"]], DataError, "Document 0"),
        ([[{"speaker": "human", "value": "hi"}]], DataError, "'role' and 'content'"),
        ([[{"from": "narrator", "value": "hi"}]], DataError, "is from 'narrator'; known: human, user"),
        ([[{"from": "human", "value": None}]], DataError, "'value': 'NoneType'"),
        ([[{"role": "user", "content": None}]], DataError, "'content': 'NoneType'"),
        ({"text": ["a"]}, DataError, "dict"),
        ("embedded:txt", UnknownNameError, "embedded:text"),
        ("./no/such/file.jsonl", DataError, "There is no file"),
        (Dataset.from_dict({"words": ["a"]}), DataError, "needs 'text' or 'messages'"),
        (torch.zeros(3), DataError, r"\[block, pos\]"),
        (7, DataError, "int"),
    ],
)
def test_what_cannot_be_read_is_named(tokenizer, source, error, message):
    with pytest.raises(error, match=message):
        build_corpus(source, tokenizer, context_size=8)


def test_share_gpt_s_rows_are_the_same_chats(tokenizer):
    turns = [("human", "user", "hi"), ("gpt", "assistant", "yes"), ("human", "user", "so")]
    theirs = [[{"from": who, "value": text} for who, _, text in turns]]
    ours = [[{"role": role, "content": text} for _, role, text in turns]]
    a, b = (build_corpus(rows, tokenizer, context_size=24) for rows in (theirs, ours))
    assert torch.equal(a.tokens_bp, b.tokens_bp)
    assert "yes" in tokenizer.decode(a.tokens_bp.flatten())


def test_a_dataset_that_cannot_be_reached_is_one_of_our_errors(tokenizer):
    with pytest.raises(DataError, match="no-such/dataset"):
        build_corpus("no-such/dataset", tokenizer, context_size=8)


def test_an_unknown_split_names_those_there_are(tokenizer):
    splits = DatasetDict(train=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(UnknownNameError, match="train"):
        build_corpus(splits, tokenizer, context_size=8, split="trian")
    with pytest.raises(UnknownNameError, match="heldout"):
        build_corpus("embedded:text", tokenizer, context_size=8, split="held-out")


def test_sizes_that_make_no_sense_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="max_tokens"):
        build_corpus(["a"], tokenizer, context_size=8, max_tokens=0)
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(DataError, match="differ in shape"):
        Corpus(tokens, torch.ones(2, 2, dtype=torch.bool), tokens, "x")


def test_the_split_is_in_the_name(tokenizer):
    built = build_corpus("embedded:text", tokenizer, context_size=64, split="heldout", max_tokens=100)
    assert built.facts()["name"] == "embedded:text [heldout]"
    assert build_corpus("embedded:text", tokenizer, context_size=64, max_tokens=9, name="mine").name == "mine"


def test_a_context_without_room_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="context_size"):
        build_corpus(["a"], tokenizer, context_size=1)


def test_chats_without_a_template_are_refused(tokenizer):
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        build_corpus([[{"role": "user", "content": "hi"}]], bare, context_size=8)
