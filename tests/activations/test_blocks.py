"""A corpus on disk: all of it comes back, or an error does."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_lens_gemma4.activations.blocks import CORPUS_FILENAME, Corpus
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.testing import tiny_tokenizer

CHAT = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "return x"}]


@pytest.fixture(scope="module")
def corpora():
    tokenizer = tiny_tokenizer()
    chat = build_corpus([CHAT] * 3, tokenizer, context_size=16, roles=["user"], name="chat")
    text = build_corpus(["import os", "a"], tokenizer, context_size=16, skip_documents=1, name="text")
    tokens = build_corpus(torch.full((2, 3), 40), tokenizer, context_size=3)
    return {"roles": chat, "plain": text, "joined": Corpus.concat([chat, text]), "tensor": tokens}


@pytest.mark.parametrize("kind", ["roles", "plain", "joined", "tensor"])
def test_what_is_saved_is_what_is_loaded(corpora, kind, tmp_path):
    corpus = corpora[kind]
    loaded = Corpus.load(corpus.save(tmp_path / "a" / "b"))
    for name in ("tokens_bp", "keep_bp", "document_bp", "role_bp"):
        a, b = getattr(corpus, name), getattr(loaded, name)
        assert (a is b is None) or (a.dtype == b.dtype and torch.equal(a, b))
    for name in ("name", "roles", "origin", "joined", "hash"):
        assert getattr(loaded, name) == getattr(corpus, name)
    assert loaded.facts() == corpus.facts()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [CORPUS_FILENAME]


def test_another_corpus_takes_the_place_of_the_one_that_is_there(corpora, tmp_path):
    corpora["roles"].save(tmp_path)
    kept = Corpus.load(tmp_path)
    corpora["plain"].save(tmp_path)
    assert Corpus.load(tmp_path).hash == corpora["plain"].hash
    assert kept.hash == corpora["roles"].hash


def test_a_corpus_that_is_not_all_there_is_not_loaded(corpora, tmp_path):
    with pytest.raises(DataError, match="no corpus that can be read"):
        Corpus.load(tmp_path)
    file = corpora["roles"].save(tmp_path) / CORPUS_FILENAME
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], b"", b"x" * 100):
        file.write_bytes(broken)
        with pytest.raises(DataError, match="no corpus that can be read"):
            Corpus.load(tmp_path)
    for at in range(len(whole) - 9, len(whole)):  # within the last tensor
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="not those that were written"):
            Corpus.load(tmp_path)


def test_a_disk_that_is_full_leaves_what_was_there(corpora, tmp_path, monkeypatch):
    corpora["plain"].save(tmp_path)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match=r"Corpus 'chat' cannot be written to .*No space left"):
        corpora["roles"].save(tmp_path)
    assert os.listdir(tmp_path) == [CORPUS_FILENAME]
    assert Corpus.load(tmp_path).hash == corpora["plain"].hash
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        corpora["roles"].save(tmp_path / "file")


def test_a_renamed_corpus_is_located_by_its_name(corpora):
    assert replace(corpora["plain"], name="other").locate(0) == ("other", 1)
