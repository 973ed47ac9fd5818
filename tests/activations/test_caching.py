"""When a corpus is read from the cache, and when it is made again."""

import json
import os
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset
from huggingface_hub import HfApi

from sae_lens_gemma4.activations.blocks import CORPUS_FILENAME
from sae_lens_gemma4.activations.caching import cached_corpus
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.testing import tiny_tokenizer

TEXTS = ["import os", "def f(x): return x", "class A: pass"]
FORM = {"context_size": 8, "exclude_special_tokens": True}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def made(monkeypatch):
    """The sources of which a corpus was made, one entry each time."""
    made, to_corpus = [], Source.to_corpus

    def counted(self, *args, **kwargs):
        made.append(self)
        return to_corpus(self, *args, **kwargs)

    monkeypatch.setattr(Source, "to_corpus", counted)
    return made


def test_the_same_text_is_made_once(tokenizer, made, tmp_path):
    source = Source(texts=TEXTS, name="mine")
    first, second = (cached_corpus(source, tmp_path, tokenizer, **FORM) for _ in range(2))
    again = cached_corpus(Source(texts=list(TEXTS), name="mine"), tmp_path, tiny_tokenizer(), **FORM)
    assert len(made) == 1
    assert first.facts() == second.facts() == again.facts()
    assert second.hash == Source(texts=TEXTS).to_corpus(tokenizer, **FORM).hash


@pytest.mark.parametrize(
    ("of_source", "of_form"),
    [
        ({"texts": [*TEXTS[:2], "class A: pas"]}, {}),
        ({"skip_documents": 1}, {}),
        ({"tokens": 5}, {}),
        ({"name": "other"}, {}),
        ({"exclude_turn_markers": True}, {}),
        ({}, {"context_size": 9}),
        ({}, {"exclude_special_tokens": False}),
        ({}, {"bos": False}),
        ({}, {"packed": False}),
    ],
)
def test_whatever_differs_makes_another(tokenizer, made, tmp_path, of_source, of_form):
    cached_corpus(Source(texts=TEXTS), tmp_path, tokenizer, **FORM)
    source = Source(**{"texts": TEXTS} | of_source)
    corpus = cached_corpus(source, tmp_path, tokenizer, **FORM | of_form)
    assert len(made) == 2
    assert corpus.facts() == source.to_corpus(tokenizer, **FORM | of_form).facts()


def test_another_tokenizer_or_template_makes_another(tokenizer, made, tmp_path):
    source = Source(texts=TEXTS)
    cached_corpus(source, tmp_path, tokenizer, **FORM)
    tokenizer.chat_template += " "
    cached_corpus(source, tmp_path, tokenizer, **FORM)
    assert len(made) == 2
    tokenizer.add_tokens(["import os"])
    assert len(tokenizer("import os", add_special_tokens=False)["input_ids"]) == 1
    assert cached_corpus(source, tmp_path, tokenizer, **FORM).n_tokens < 20
    assert len(made) == 3


def test_a_file_that_was_changed_is_read_again(tokenizer, made, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    source = Source(dataset=str(file))
    a = cached_corpus(source, tmp_path / "cache", tokenizer, **FORM)
    assert cached_corpus(source, tmp_path / "cache", tokenizer, **FORM).hash == a.hash and len(made) == 1
    file.write_text(file.read_text().replace("os", "sy"))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    b = cached_corpus(source, tmp_path / "cache", tokenizer, **FORM)
    assert len(made) == 2 and b.hash != a.hash
    file.unlink()
    with pytest.raises(DataError, match="There is no file"):
        cached_corpus(source, tmp_path / "cache", tokenizer, **FORM)


def test_of_the_hub_the_commit_counts(tokenizer, made, tmp_path, monkeypatch):
    hub = SimpleNamespace(sha="a" * 40)

    def dataset_info(self, name, *, revision=None, timeout=None):
        if hub.sha is None:
            raise ConnectionError("no network")
        return SimpleNamespace(sha=hub.sha)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": TEXTS}))
    source = Source(dataset="some/text", tokens=4)
    for sha, times in (("a" * 40, 1), ("a" * 40, 1), (None, 1), ("b" * 40, 2), (None, 2)):
        hub.sha = sha
        corpus = cached_corpus(source, tmp_path, tokenizer, **FORM)
        assert len(made) == times
        assert corpus.origin.revision == ("a", "b")[times - 1] * 40


def test_what_is_broken_is_made_again(tokenizer, made, tmp_path):
    source = Source(texts=TEXTS)
    expected = cached_corpus(source, tmp_path, tokenizer, **FORM).hash
    (file,) = tmp_path.rglob(CORPUS_FILENAME)
    whole = file.read_bytes()
    for broken in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(broken)
        assert cached_corpus(source, tmp_path, tokenizer, **FORM).hash == expected
    assert len(made) == 4
    assert Corpus.load(file.parent).hash == expected


def test_a_place_that_cannot_be_written_is_an_error_in_words(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        cached_corpus(Source(texts=TEXTS), tmp_path / "file", tokenizer, **FORM)
