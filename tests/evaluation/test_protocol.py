import copy
import json

import datasets
import pytest
import yaml
from datasets import Dataset

from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.evaluation.protocol import Protocol, load_protocol, protocols, require_same_protocol
from sae_lens_gemma4.testing import tiny_tokenizer

BOS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def written(tmp_path, **changes):
    facts = {
        "name": "mine",
        "description": "d",
        "sources": [
            {"name": "web", "dataset": "some/text", "split": "validation", "tokens": 40, "revision": "v1"},
            {"name": "own", "texts": ["import os"] * 9, "tokens": 7},
        ],
        "context_size": 16,
        "exact_tokens": True,
    } | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(facts))
    return path


def test_there_are_three():
    assert set(protocols()) == {"seed-262k", "short-clean", "quick"}
    assert all(load_protocol(name).name == name and protocol.description for name, protocol in protocols().items())
    assert (load_protocol("quick").bootstrap_resamples, load_protocol("quick").bootstrap_seed) == (1000, 0)


def test_the_public_table_s_conditions():
    protocol = load_protocol("seed-262k")
    assert {s.name: (s.dataset, s.split, s.tokens, s.skip_documents) for s in protocol.sources} == {
        "it_pile": ("monology/pile-uncopyrighted", "validation", 262_144, 0),
        "it_chat": ("HuggingFaceH4/ultrachat_200k", "test_sft", 262_144, 0),
    }
    assert protocol.context_size == 1024
    assert protocol.exclude_special_tokens and protocol.bos and protocol.packed and protocol.exact_tokens


def test_short_clean_is_seven_texts_each_in_its_block_without_bos(tokenizer):
    (corpus,) = load_protocol("short-clean").corpora(tokenizer).values()
    texts = load_protocol("short-clean").sources[0].texts
    assert len(texts) == corpus.n_blocks == corpus.n_documents == 7
    for row, text in zip(corpus.tokens_bp.tolist(), texts, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row == ids + [tokenizer.pad_token_id] * (corpus.context_size - len(ids))
        assert BOS not in row
        assert 35 <= len(text.split()) <= 39


def test_quick_has_its_tokens_to_the_token_and_the_chats_their_roles(tokenizer):
    corpora = load_protocol("quick").corpora(tokenizer)
    assert {name: c.n_tokens for name, c in corpora.items()} == {"text": 16_384, "chat": 16_384}
    for name, corpus in corpora.items():
        facts = corpus.facts()
        assert (facts["source"], facts["split"], facts["name"]) == (f"embedded:{name}", "heldout", name)
        assert corpus.context_size == 256 and (corpus.tokens_bp[:, 0] == BOS).all()
    assert corpora["text"].roles == () and set(corpora["chat"].roles) == {"user", "assistant", "system"}


def test_a_split_is_read_from_the_hub_or_from_a_file_of_it(tokenizer, tmp_path, monkeypatch):
    rows = [{"text": "import os and sys " * 9}] * 3
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return Dataset.from_list(rows)

    protocol = load_protocol(written(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub = protocol.corpora(tokenizer)
    monkeypatch.undo()
    assert asked == [("some/text", {"split": "validation", "revision": "v1", "streaming": False})]
    assert {name: c.n_tokens for name, c in from_hub.items()} == {"web": 40, "own": 7}
    assert from_hub["web"].facts()["revision"] == "v1"

    path = tmp_path / "pile.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = protocol.corpora(tokenizer, {"web": str(path)})
    assert local["web"].hash == from_hub["web"].hash
    assert (local["web"].facts()["source"], local["web"].facts()["revision"]) == (str(path), None)
    folder = datasets.DatasetDict(validation=Dataset.from_list(rows))
    folder.save_to_disk(tmp_path / "saved")
    assert protocol.corpora(tokenizer, {"web": str(tmp_path / "saved")})["web"].hash == from_hub["web"].hash

    with pytest.raises(UnknownNameError, match=r"split of protocol mine 'wep'\. Did you mean 'web'"):
        protocol.corpora(tokenizer, {"wep": str(path)})
    has = sum(len(tokenizer(row["text"], add_special_tokens=False)["input_ids"]) for row in rows)
    with pytest.raises(DataError, match=f"'it_pile' has {has} tokens that count, fewer than 262,144"):
        load_protocol("seed-262k").corpora(tokenizer, {"it_pile": str(path)})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"contextsize": 3}, UnknownNameError, "key in protocol 'contextsize'. Did you mean 'context_size'"),
        ({"bos": "yes please"}, ConfigError, r"protocol\.bos must be bool"),
        ({"sources": [{"texts": ["a"]}]}, ConfigError, "need names, each its own"),
        ({"sources": [{"name": "", "texts": ["a"]}]}, ConfigError, "need names, each its own|must not be empty"),
        ({"sources": [{"name": "a", "texts": ["a"], "tokens": 1}] * 2}, ConfigError, "need names, each its own"),
        ({"sources": [{"name": "a", "texts": ["a"]}]}, ConfigError, "exact_tokens and a source without tokens"),
        ({"context_size": 1}, ConfigError, "context_size of protocol 'mine' must be at least 2"),
        ({"downstream_tokens": -1}, ConfigError, "downstream_tokens"),
        ({"bootstrap_resamples": 0}, ConfigError, "bootstrap_resamples"),
        ({"name": "quick"}, ConfigError, "calls itself 'quick' and is not this package's"),
    ],
)
def test_protocols_that_cannot_be_used(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load_protocol(written(tmp_path, **changes))


def test_protocols_that_are_not_there(tmp_path):
    with pytest.raises(UnknownNameError, match=r"Unknown protocol 'seed262k'\. Did you mean 'seed-262k'"):
        load_protocol("seed262k")
    with pytest.raises(ConfigError, match=r"Protocol .*none\.yaml cannot be read"):
        load_protocol(tmp_path / "none.yaml")
    assert isinstance(load_protocol(written(tmp_path)), Protocol)


def result(tokenizer):
    corpus = load_protocol("short-clean").corpora(tokenizer)["short_clean"]
    return {
        "protocol": "short-clean",
        "model": {"name": "gemma-4-demo", "fingerprint": "0" * 16},
        "corpus": {**corpus.facts(), "isolate_documents": False},
        "metrics": {"n_tokens": corpus.n_tokens, "ve": 0.9},
    }


@pytest.mark.parametrize(
    ("part", "key", "other"),
    [
        (None, "protocol", "quick"),
        ("corpus", "name", "x"),
        ("corpus", "hash", "f" * 16),
        ("corpus", "source", "pile.jsonl"),
        ("corpus", "split", "train"),
        ("corpus", "first_document", 4),
        ("corpus", "next_document", 5),
        ("corpus", "context_size", 64),
        ("corpus", "exclude_special_tokens", None),
        ("corpus", "bos", True),
        ("corpus", "isolate_documents", True),
        ("metrics", "n_tokens", 3),
        ("model", "name", "gemma-4-demo-it"),
        ("model", "fingerprint", "1" * 16),
    ],
)
def test_results_of_other_conditions_are_not_compared(tokenizer, part, key, other):
    a = result(tokenizer)
    b = copy.deepcopy(a)
    b["metrics"]["ve"] = 0.1
    require_same_protocol(a, b)
    (b if part is None else b[part])[key] = other
    name = f"{part}.{key}" if part else key
    first = (a if part is None else a[part])[key]
    if part == "model":
        require_same_protocol(a, b, same_model=False)
    with pytest.raises(ConfigError) as error:
        require_same_protocol(a, b)
    assert str(error.value) == f"These two results cannot be compared: {name} is {first!r} and {other!r}."


def test_all_that_differs_is_listed_and_an_unknown_revision_is_no_difference(tokenizer):
    a, b = result(tokenizer), result(tokenizer)
    a["corpus"]["revision"] = "abc"
    require_same_protocol(a, b)
    b["corpus"].update(revision="abd", bos=True)
    with pytest.raises(ConfigError, match=r"corpus\.revision is 'abc' and 'abd'; corpus\.bos is False and True\."):
        require_same_protocol(a, b)
