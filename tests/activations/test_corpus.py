"""Corpora against tokens and masks worked out by hand, on a tokenizer whose ids are known."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict

from sae_lens_gemma4.activations.corpus import Corpus, Origin, build_corpus
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.testing import tiny_tokenizer

BOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


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


def test_the_hash_is_of_shape_tokens_and_mask():
    tokens = torch.tensor([[2, 5, 7], [2, 9, 0]])
    keep = torch.tensor([[False, True, True], [False, True, False]])
    corpus = Corpus(tokens, keep, torch.tensor([[0, 0, 0], [1, 1, -1]]), "x")
    data = b"(2, 3)" + b"".join(i.to_bytes(8, "little") for i in (2, 5, 7, 2, 9, 0)) + bytes([0, 1, 1, 0, 1, 0])
    assert corpus.hash == hashlib.sha256(data).hexdigest()[:16]


def test_batches_cover_each_block_once_in_a_seeded_order(tokenizer):
    corpus = build_corpus(["import os and sys " * 50], tokenizer, context_size=8)
    shuffled = [
        torch.cat([b.tokens_bp for b in corpus.batches(3, shuffle=torch.Generator().manual_seed(s))]) for s in (0, 0, 1)
    ]
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    assert sorted(map(tuple, shuffled[0].tolist())) == sorted(map(tuple, corpus.tokens_bp.tolist()))


def test_the_next_document_is_where_a_corpus_apart_from_this_one_begins(tokenizer):
    texts = [f"import os{i}" for i in range(12)]
    first = build_corpus(texts, tokenizer, context_size=16, max_tokens=10)
    at = first.origin.next_document
    rest = build_corpus(texts, tokenizer, context_size=16, skip_documents=at)
    assert 0 < at < 12 and rest.origin.first_document == at and rest.origin.next_document == 12
    assert torch.equal(rest.tokens_bp, build_corpus(texts[at:], tokenizer, context_size=16).tokens_bp)
    assert int(rest.document_bp.max()) == 11 - at
    assert torch.equal(first.tokens_bp, build_corpus(texts[:at], tokenizer, context_size=16).tokens_bp[:1])


def test_documents_without_tokens_are_counted_among_those_read(tokenizer):
    corpus = build_corpus(["", "import os", ""], tokenizer, context_size=16)
    assert corpus.origin.next_document == 3
    assert sorted(corpus.document_bp.unique().tolist()) == [-1, 1]


@pytest.mark.parametrize("wanted", [1, 29, 30, 31])
def test_exactly_so_many_tokens_count(tokenizer, wanted):
    """15 tokens a block count beside BOS."""
    corpus = build_corpus(
        ["import os and sys " * 100], tokenizer, context_size=16, max_tokens=wanted, exact_tokens=True
    )
    order = [(b, p) for b in range(corpus.n_blocks) for p in range(1, 16)]
    assert corpus.keep_bp.nonzero().tolist() == [list(at) for at in order[:wanted]]
    assert corpus.n_blocks == -(-wanted // 15)
    assert corpus.facts()["tokens"] == wanted
    with pytest.raises(DataError, match="has 3 tokens that count, fewer than 4"):
        build_corpus(["a a a"], tokenizer, context_size=16, max_tokens=4, exact_tokens=True)


def test_blocks_without_bos_and_of_single_documents(tokenizer):
    texts = ["import os", "a", "return x"]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    bare = build_corpus(texts, tokenizer, context_size=64, bos=False)
    assert bare.tokens_bp[bare.document_bp >= 0].tolist() == [t for tokens in ids for t in tokens]
    assert bare.origin.bos is False
    apart = build_corpus(texts, tokenizer, context_size=8, packed=False)
    for row, tokens, number in zip(apart.tokens_bp, ids, range(3), strict=True):
        assert row.tolist() == [BOS, *tokens] + [tokenizer.pad_token_id] * (7 - len(tokens))
        assert apart.document_bp[number].tolist() == [number] * (1 + len(tokens)) + [-1] * (7 - len(tokens))


def test_facts_say_where_the_text_came_from(tokenizer):
    facts = build_corpus("embedded:chat", tokenizer, context_size=64, split="heldout", skip_documents=7).facts()
    assert list(facts) == [
        "name", "tokens", "documents", "blocks", "context_size", "hash", "source", "split", "revision",
        "first_document", "next_document", "exclude_special_tokens", "bos", "packed", "roles", "exclude_turn_markers",
    ]  # fmt: skip
    assert (facts["source"], facts["split"], facts["revision"]) == ("embedded:chat", "heldout", None)
    assert facts["first_document"] == 7 and facts["next_document"] == 7 + facts["documents"]
    assert facts["exclude_special_tokens"] is True and facts["bos"] is True and facts["packed"] is True
    assert facts["roles"] is None and facts["exclude_turn_markers"] is False
    assert json.loads(json.dumps(facts)) == facts
    tokens = build_corpus(torch.full((2, 3), 40), tokenizer, context_size=3)
    assert tokens.origin is None and tokens.facts()["bos"] is None


def test_roles_stay_with_their_tokens(tokenizer):
    """In shuffled blocks, and in a join with a corpus of fewer roles in another order and one of none."""
    corpus = build_corpus("embedded:chat", tokenizer, context_size=32, split="heldout", max_tokens=2000)
    other = build_corpus(
        [[{"role": "assistant", "content": "import os"}], "import sys"], tokenizer, context_size=32, packed=False
    )
    plain = build_corpus(["class A: pass"], tokenizer, context_size=32)
    assert corpus.roles == ("user", "assistant", "system") and other.roles == ("assistant",)
    assert plain.role_bp is None and plain.roles == ()
    joined = Corpus.concat([other, plain, corpus])
    assert joined.roles == ("assistant", "user", "system") and joined.origin is None
    assert joined.role_bp.dtype == torch.int8
    assert set(joined.role_bp[1:3].unique().tolist()) == {-1}
    as_words = [[(*c.roles, None)[i] for i in row] for c in (other, corpus) for row in c.role_bp.tolist()]
    joined_words = [[(*joined.roles, None)[i] for i in row] for row in joined.role_bp.tolist()]
    assert joined_words == [*as_words[:2], [None] * 32, *as_words[2:]]
    for batch in corpus.batches(3, shuffle=torch.Generator().manual_seed(0)):
        assert batch.origin == corpus.origin
        for tokens, role in zip(batch.tokens_bp, batch.role_bp, strict=True):
            row = (corpus.tokens_bp == tokens).all(dim=1).nonzero()[0, 0]
            assert torch.equal(corpus.role_bp[row], role)


def test_an_origin_that_parts_share_is_kept():
    origin = Origin(None, None, None, 0, 1, True, True, "0" * 16)
    one = torch.ones(1, 2, dtype=torch.long)
    a, b = (Corpus(one, one.bool(), one, "x", origin=o) for o in (origin, replace(origin, first_document=1)))
    assert Corpus.concat([a, a]).origin == origin
    assert Corpus.concat([a, b]).origin is None
    with pytest.raises(DataError, match="roles"):
        Corpus(one, one.bool(), one, "x", role_bp=torch.zeros(2, 2), roles=("user",))


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
        (["a", "b \udc00"], DataError, r"Document 1 holds half a character \(U\+DC00, at 2\)"),
        (torch.zeros(3), DataError, r"\[block, pos\]"),
        (7, DataError, "int"),
    ],
)
def test_what_cannot_be_read_is_named(tokenizer, source, error, message):
    with pytest.raises(error, match=message):
        build_corpus(source, tokenizer, context_size=8)


def test_facts_are_enough_to_make_the_same_corpus_again(tokenizer):
    made = {"roles": ["assistant"], "exclude_turn_markers": True, "packed": False, "exclude_special_tokens": False}
    corpus = build_corpus(
        "embedded:chat", tokenizer, context_size=48, split="heldout", skip_documents=5, max_tokens=900, **made
    )
    facts = corpus.facts()
    again = build_corpus(
        facts["source"],
        tokenizer,
        skip_documents=facts["first_document"],
        max_tokens=facts["tokens"],
        **{k: facts[k] for k in ("context_size", "split", "revision", "bos", *made)},
    )
    assert again.facts() == facts
    assert facts["roles"] == ["assistant"] and facts["packed"] is False and facts["exclude_turn_markers"] is True


def test_a_document_of_a_join_is_found_in_the_text_it_came_from(tokenizer):
    texts = ["import os", "a", "return x"]
    a, b, c = (build_corpus(texts, tokenizer, context_size=8, name=n, skip_documents=k) for k, n in enumerate("abc"))
    joined = Corpus.concat([Corpus.concat([a, b]), c])
    assert [part[:2] for part in joined.parts] == [("a", 0), ("b", 3), ("c", 5)]
    assert [joined.locate(n) for n in range(6)] == [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("c", 2)]
    assert b.locate(1) == ("b", 2)
    tokens = build_corpus(torch.full((3, 3), 40), tokenizer, context_size=3)
    assert tokens.locate(2) == ("tokens", 2)


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
    for wrong, name in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"exact_tokens": True}, "exact_tokens needs max_tokens"),
        ({"skip_documents": -1}, "skip_documents"),
    ):
        with pytest.raises(ConfigError, match=name):
            build_corpus(["a"], tokenizer, context_size=8, **wrong)
    with pytest.raises(DataError, match="holds no text after its first 2 documents"):
        build_corpus(["a"], tokenizer, context_size=8, skip_documents=2)
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
