"""What is asked of the hub, which the tests cannot reach, and what is recorded of it."""

from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub import HfApi

from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.documents import read_documents
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.testing import tiny_tokenizer

TEXTS = ["import os", "def f(x): return x", "class A: pass", "import sys"]
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch):
    """A hub that is online and has one dataset; what is asked of it is kept in `asked`."""
    state = SimpleNamespace(asked=[], sha=SHA)

    def load_dataset(name, **options):
        state.asked.append({"name": name, **options})
        rows = Dataset.from_dict({"text": TEXTS})
        return rows.to_iterable_dataset() if options.get("streaming") else rows

    def dataset_info(self, name, *, revision=None, timeout=None):
        if state.sha is None:
            raise ConnectionError("no network")
        state.asked.append({"info": name, "revision": revision})
        return SimpleNamespace(sha=state.sha)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return state


def test_part_of_a_hub_dataset_is_streamed_skipped_and_pinned(hub):
    tokenizer = tiny_tokenizer()
    corpus = build_corpus(
        "some/text", tokenizer, context_size=16, split="test", max_tokens=5, skip_documents=2, revision="v1"
    )
    assert hub.asked == [
        {"info": "some/text", "revision": "v1"},
        {"name": "some/text", "split": "test", "revision": SHA, "streaming": True},
    ]
    assert corpus.hash == build_corpus(TEXTS[2:], tokenizer, context_size=16, max_tokens=5).hash
    facts = corpus.facts()
    assert (facts["source"], facts["split"], facts["revision"]) == ("some/text", "test", SHA)
    assert facts["first_document"] == 2
    assert corpus.name == "some/text [test]"


@pytest.mark.parametrize(
    ("options", "offline", "streams"),
    [
        ({"in_part": True}, False, True),
        ({"in_part": True}, True, False),
        ({"in_part": True, "split": "train[:1%]"}, False, False),
        ({"in_part": True, "split": "train+test"}, False, False),
        ({"in_part": True, "streaming": False}, False, False),
        ({}, False, False),
        ({"streaming": True}, True, True),
    ],
)
def test_when_a_hub_dataset_is_streamed(hub, monkeypatch, options, offline, streams):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    documents = read_documents("some/text", skip=1, **options)
    assert list(documents) == TEXTS[1:]
    assert documents.n_read == 3
    assert hub.asked[-1]["streaming"] is streams


def test_without_a_network_the_revision_is_what_was_asked_for(hub):
    hub.sha = None
    assert [read_documents("some/text", revision=r).revision for r in ("v1", None)] == ["v1", None]
    assert [asked["revision"] for asked in hub.asked] == ["v1", None]


def test_a_stream_that_breaks_off_is_one_of_our_errors(hub, monkeypatch):
    def rows():
        yield {"text": "import os"}
        raise OSError("connection reset\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: IterableDataset.from_generator(rows))
    with pytest.raises(DataError, match=r"'some/text' could not be read to the end: connection reset$"):
        list(read_documents("some/text"))


def test_only_the_hub_has_revisions(tmp_path):
    (tmp_path / "rows.txt").write_text("import os\nimport sys\n")
    for source in (str(tmp_path / "rows.txt"), "embedded:text", TEXTS):
        with pytest.raises(ConfigError, match="Only datasets on the hub have revisions"):
            read_documents(source, revision="main")
    local = read_documents(tmp_path / "rows.txt", skip=1)
    assert list(local) == ["import sys"]
    assert local.revision is None and local.split == "train"


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_splits_in_memory(kind):
    rows = Dataset.from_dict({"text": TEXTS})
    splits = kind(test=rows if kind is DatasetDict else rows.to_iterable_dataset())
    documents = read_documents(splits, split="test", skip=3)
    assert list(documents) == TEXTS[3:]
    assert (documents.source, documents.split) == (None, "test")
    with pytest.raises(UnknownNameError, match="'test'"):
        read_documents(splits, split="tset")


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"Cannot tell what .*notes\.doc holds"):
        read_documents(tmp_path / "notes.doc")
    for folder in ("empty", "broken"):
        with pytest.raises(DataError, match=f"{folder}.* cannot be read"):
            read_documents(tmp_path / folder)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (['{"text": "a"}', '{"text": null}', "null", '{"text": "b"}'], ["a", "", "", "b"]),
        (
            ['{"messages": null, "text": "a"}', '{"messages": [{"role": "user", "content": "b"}], "text": null}'],
            ["a", [{"role": "user", "content": "b"}]],
        ),
        (['{"messages": [], "text": "a"}'], ["a"]),
    ],
)
def test_of_each_row_the_column_that_holds_something(tmp_path, rows, expected):
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    documents = read_documents(tmp_path / "rows.jsonl")
    assert list(documents) == expected
    assert documents.n_read == len(expected)


def test_a_row_that_holds_nothing_keeps_its_number():
    corpus = build_corpus([None, "import os", None, "a"], tiny_tokenizer(), context_size=8, packed=False)
    assert corpus.document_bp[:, 0].tolist() == [1, 3] and corpus.origin.next_document == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", r"rows\.jsonl.* cannot be read: it has no rows$"),
        ('{"text": "a"}\n{"text": "b\n', r"rows\.jsonl.* cannot be read: JSON parse error.* in row 1"),
        ('{"words": "a"}', r"rows\.jsonl.* has the columns \['words'\]; a corpus needs 'text' or 'messages'"),
    ],
)
def test_files_that_are_broken_say_how(tmp_path, text, error):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=error):
        list(read_documents(tmp_path / "rows.jsonl"))
