"""Shards against the corpus that they are parts of, and against the run that was never stopped."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.activations.shards import CorpusStream
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.testing import tiny_tokenizer

TEXTS = [f"import a{n}\n" * (1 + n * 7 % 11) for n in range(30)]
CHATS = Source(dataset="embedded:chat", split="heldout", tokens=300, skip_documents=300)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def content(corpus):
    """All that a corpus is, to compare."""
    roles = [] if corpus.role_bp is None else corpus.role_bp.tolist()
    return (
        corpus.tokens_bp.tolist(), corpus.keep_bp.tolist(), corpus.document_bp.tolist(), roles, corpus.name,
        corpus.roles, corpus.origin, corpus.joined,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("shard_blocks", [1, 5, 1000])
def test_the_shards_of_one_source_are_its_corpus(tokenizer, packed, bos, shard_blocks):
    source, form = Source(texts=TEXTS, skip_documents=2), {"context_size": 16, "packed": packed, "bos": bos}
    whole = source.to_corpus(tokenizer, exclude_special_tokens=True, **form)
    shards = [c for c, _ in CorpusStream([source], tokenizer, shard_blocks=shard_blocks, passes=1, **form).shards()]
    assert torch.cat([c.tokens_bp for c in shards]).equal(whole.tokens_bp)
    assert torch.cat([c.keep_bp for c in shards]).equal(whole.keep_bp)
    assert all(c.n_blocks == shard_blocks for c in shards[:-1])
    numbers = [c.locate(n)[1] if n >= 0 else -1 for c in shards for n in c.document_bp.flatten().tolist()]
    assert numbers == [n + 2 if n >= 0 else -1 for n in whole.document_bp.flatten().tolist()]
    for c in shards:
        last = c.locate(int(c.document_bp.max()))[1]
        assert c.origin.first_document <= c.locate(int(c.document_bp[0, 0]))[1] and c.origin.next_document == last + 1


@given(st.integers(1, 7), st.integers(0, 40))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_killed_run_goes_on_with_the_same_shards(tokenizer, shard_blocks, at):
    """Over the end of a source and of a pass, with the place written to JSON and read by a new stream."""
    sources = [Source(texts=TEXTS[:9], tokens=200), CHATS]

    def stream():
        return CorpusStream(sources, tokenizer, context_size=24, shard_blocks=shard_blocks, passes=2)

    whole = list(stream().shards())
    at = min(at, len(whole) - 1)
    rest = list(stream().shards(json.loads(json.dumps(whole[at][1]))))
    assert [content(c) for c, _ in rest] == [content(c) for c, _ in whole[at + 1 :]]
    assert [place for _, place in rest] == [place for _, place in whole[at + 1 :]]


def test_every_pass_is_the_same_text_and_there_is_no_end(tokenizer):
    stream = CorpusStream(
        [Source(texts=TEXTS[:4]), Source(texts=TEXTS[4:7])], tokenizer, context_size=16, shard_blocks=3
    )
    shards, passes = [], []
    for corpus, place in stream.shards():
        if place["pass"] == 3:
            break
        shards.append(corpus.tokens_bp)
        passes.append(place["pass"])
    n = passes.count(0)
    assert passes == [0] * n + [1] * n + [2] * n
    assert torch.equal(torch.cat(shards[:n]), torch.cat(shards[n : 2 * n]))


def test_sources_are_mixed_in_proportion_to_their_tokens(tokenizer):
    """Until one ends, no source is further from its share than a block of each is long."""
    texts = [["import os and sys " * 300], ["return x " * 500], ["class A: pass " * 500]]
    sources = [Source(texts=t, tokens=n, name=str(n)) for t, n in zip(texts, (100, 300, 600), strict=True)]
    stream = CorpusStream(sources, tokenizer, context_size=16, shard_blocks=7, passes=1)
    totals, at_end = {}, 0
    for corpus, place in stream.shards():
        for part, after in zip(corpus.parts, [*[p.first_number for p in corpus.parts[1:]], 10**9], strict=True):
            inside = (corpus.document_bp >= part.first_number) & (corpus.document_bp < after)
            totals[part.name] = totals.get(part.name, 0) + int((inside & corpus.keep_bp).sum())
        assert {s.name: p["counted"] for s, p in zip(sources, place["sources"], strict=True) if p["counted"]} == totals
        if any(p["ended"] for p in place["sources"]):
            at_end += 1
            continue
        done = sum(totals.values())
        assert all(abs(totals.get(str(n), 0) - done * n / 1000) <= 2 * 15 for n in (100, 300, 600))
    assert done > 2000 and at_end > 0
    whole = [s.to_corpus(tokenizer, context_size=16, exclude_special_tokens=True) for s in sources]
    assert all(totals[c.name] >= c.n_tokens for c in whole)


def test_shares_are_of_tokens_that_count(tokenizer):
    """Assistant turns are a part of a chat: more of its blocks come."""
    chat = Source(dataset="embedded:chat", split="heldout", roles=["assistant"], exclude_turn_markers=True)
    stream = CorpusStream([Source(texts=["import os " * 3000]), chat], tokenizer, context_size=32, shard_blocks=100)
    corpus, place = next(stream.shards())
    a, b = (p["counted"] for p in place["sources"])
    assert abs(a - b) <= 32
    assert corpus.n_tokens == a + b
    assert corpus.roles and int((corpus.role_bp >= 0).any(dim=1).sum()) > 50


def test_the_commit_that_was_read_first_is_read_on(tokenizer, monkeypatch):
    hub = SimpleNamespace(sha="a" * 40, asked=[])

    def load_dataset(name, **options):
        hub.asked.append(options["revision"])
        return Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(
        HfApi,
        "dataset_info",
        lambda self, name, *, revision=None, timeout=None: SimpleNamespace(sha=revision or hub.sha),
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = CorpusStream([Source(dataset="some/text")], tokenizer, context_size=16, shard_blocks=30, passes=2)
    _, place = next(stream.shards())
    hub.sha = "b" * 40
    rest = list(stream.shards(place))
    assert len(hub.asked) == 3 and set(hub.asked) == {"a" * 40}
    assert {c.origin.revision for c, _ in rest} == {"a" * 40}


def test_shards_in_which_nothing_counts_are_left_out(tokenizer):
    source = Source(dataset="embedded:chat", split="heldout", roles=["assistant"], skip_documents=330)
    shards = [c for c, _ in CorpusStream([source], tokenizer, context_size=4, shard_blocks=1, passes=1).shards()]
    whole = source.to_corpus(tokenizer, context_size=4, exclude_special_tokens=True)
    kept = whole.keep_bp.any(dim=1)
    assert not kept.all()
    assert torch.cat([c.tokens_bp for c in shards]).equal(whole.tokens_bp[kept])


def test_what_makes_no_sense(tokenizer):
    form = {"context_size": 16}
    for sources, options, message in (
        ([], {}, "needs sources"),
        ([Source(texts=["a"], tokens=1), Source(texts=["b"])], {}, "of each of them or of none"),
        ([Source(texts=["a"])], {"shard_blocks": 0}, "shard_blocks must be at least 1"),
        ([Source(texts=["a"])], {"passes": 0}, "passes must be at least 1"),
        ([Source(texts=["a"])], {"context_size": 1}, "context_size must be at least 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            CorpusStream(sources, tokenizer, **form | options)
    empty = CorpusStream(
        [Source(texts=["", " "], skip_documents=2, name="none"), Source(texts=["a"])], tokenizer, **form
    )
    with pytest.raises(DataError, match="No token of 'none' counts"):
        list(empty.shards())


def test_a_place_of_another_stream_is_refused(tokenizer, tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("\n".join(t.strip().replace("\n", " ") for t in TEXTS))
    source = Source(dataset=str(file))
    stream = CorpusStream([source], tokenizer, context_size=16, shard_blocks=4)
    _, place = next(stream.shards())
    next(CorpusStream([source], tokenizer, context_size=16, shard_blocks=4, passes=9).shards(place))
    others = [
        CorpusStream([source], tokenizer, context_size=16, shard_blocks=5),
        CorpusStream([source], tokenizer, context_size=17, shard_blocks=4),
        CorpusStream([source, source], tokenizer, context_size=16, shard_blocks=4),
    ]
    file.write_text(file.read_text() + "\nmore")
    others.append(CorpusStream([source], tokenizer, context_size=16, shard_blocks=4))
    for other in others:
        with pytest.raises(ConfigError, match="of another stream"):
            next(other.shards(place))
