"""This package's own form of labels, as a release's file. `tests/interp/test_label_files.py` writes and reads it."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lens_gemma4.catalogue import label_schemas, labels
from sae_lens_gemma4.catalogue.files import LocalFiles
from sae_lens_gemma4.catalogue.label_records import Source
from sae_lens_gemma4.catalogue.label_schemas import SCHEMAS
from sae_lens_gemma4.catalogue.labels import Example, FeatureLabel, iter_feature_labels, load_feature_labels
from sae_lens_gemma4.catalogue.registry import parse_release
from sae_lens_gemma4.errors import DataError, SAEError
from sae_lens_gemma4.interp.labels.card import LabelCard
from sae_lens_gemma4.interp.labels.files import write_labels

LABELS = {
    index: FeatureLabel(
        index=index,
        label=f"label {index}",
        source="judge",
        alternatives={"other": "text"},
        examples=(Example(tokens=("a", "b"), activations=(0.0, 1.5), token_index=1),),
        facts={"f1": index / 10},
    )
    for index in range(9)
}


def release(name, **sae):
    shared = {
        "repo_type": "dataset",
        "repo_id": "a/b",
        "model": "google/gemma-4-31B",
        "architecture": "topk",
        "sources": {"default": "card"},
        "label_schema": "feature_labels",
    }
    return parse_release(
        name, {**shared, "saes": [{"layer": 3, "path": "l", "hook": "blocks.3.hook_resid_post", **sae}]}
    )


@pytest.fixture
def of_release(tmp_path, monkeypatch):
    def of_release(labels_file, d_sae=9, features=None, load=load_feature_labels):
        ours = release("ours", id="one", labels=labels_file, d_sae=d_sae)
        monkeypatch.setattr(labels, "releases", lambda: {"ours": ours})
        monkeypatch.setattr(labels, "files_of", lambda release: LocalFiles(tmp_path))
        return load("ours", "one", features)

    return of_release


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.parquet", r"search:^labels\.p"])
def test_a_release_may_have_labels_in_this_form(name, of_release, tmp_path, monkeypatch):
    monkeypatch.setattr(label_schemas, "_BATCH_ROWS", 2)
    write_labels(reversed(LABELS.values()), tmp_path, LabelCard(title="Labels"))
    assert of_release(name) == LABELS
    assert of_release(name, features=[2, 7]) == {2: LABELS[2], 7: LABELS[7]}
    assert {label.index for label in of_release(name, load=iter_feature_labels)} == set(range(9))
    with pytest.raises(DataError, match="one has no feature 8; its d_sae is 8"):
        of_release(name, d_sae=8)


def test_no_file_of_either_kind_is_said_so(of_release):
    with pytest.raises(SAEError, match=r"No \.jsonl or \.parquet file of .* matches 'x', of: none"):
        of_release("search:x")


def parsed(tmp_path, content):
    path = tmp_path / "labels.jsonl"
    path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    return [label for _, label in SCHEMAS["feature_labels"].parse(Source(path, "labels.jsonl"))]


def test_what_others_add_and_leave_out_is_taken(tmp_path):
    assert parsed(tmp_path, {"index": 3, "source": "me", "score": [1], "facts": {"a": 2}}) == [
        FeatureLabel(index=3, source="me", facts={"score": [1], "a": 2})
    ]
    assert parsed(tmp_path, "\n") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1]\n", "labels.jsonl, line 1: \\[1\\] is not an object"),
        ('{"index": 1, "source": "s"}\n{', "labels.jsonl, line 2, is not JSON: "),
        ('{"index": 1, "index": 2}', "line 1, is not JSON: an object has the key 'index' twice"),
        ("[" * 100_000, "line 1, is not JSON: "),
        (b"\xff".decode("latin-1"), "line 1, is not JSON"),
        ({"source": "s"}, "line 1: it has no index"),
        ({"index": 1}, "line 1: it has no source"),
        ({"index": 1.5, "source": "s"}, "index is 1.5: not an integer"),
        ({"index": 1, "source": "s", "confidence": True}, "confidence is True: not a finite number"),
        ({"index": 1, "source": "s", "label": ["a"]}, "label is .*: not a text"),
        ({"index": 1, "source": "s", "facts": "[1]"}, "facts is .*: not an object, nor the JSON of one"),
        ({"index": 1, "source": "s", "facts": "{"}, "facts is '{': "),
        ({"index": 1, "source": "s", "facts": '{"a": 1, "a": 2}'}, "the key 'a' twice"),
        ({"index": 1, "source": "s", "alternatives": [{"source": "a"}]}, "alternatives is .*: it has no text"),
        (
            {"index": 1, "source": "s", "alternatives": [{"source": "a", "text": "b"}] * 2},
            "alternatives is .*: an object has the key 'a' twice",
        ),
        (
            {"index": 1, "source": "s", "examples": [{"tokens": ["a"], "activations": [1.0, 2.0]}]},
            "examples is .*: 1 tokens have 2 activations",
        ),
        ({"index": 1, "source": "s", "examples": [3]}, "examples is .*: an example: 3 is not an object"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(content, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        parsed(tmp_path, content)


def test_parquet_of_another_shape_is_refused(tmp_path):
    def read(table):
        pq.write_table(pa.table(table), tmp_path / "labels.parquet")
        return list(SCHEMAS["feature_labels"].parse(Source(tmp_path / "labels.parquet", "labels.parquet")))

    with pytest.raises(DataError, match="has no column index, source, only: a"):
        read({"a": [1]})
    with pytest.raises(DataError, match="column index of type string, not of integers"):
        read({"index": ["1"], "source": ["s"]})
    with pytest.raises(DataError, match="row 1: it has no source"):
        read({"index": [1, 2], "source": ["s", None]})
    assert read({"index": [4], "source": ["s"], "extra": [2]}) == [
        ("labels.parquet, row 0", dataclasses.replace(FeatureLabel(index=4, source="s"), facts={"extra": 2}))
    ]
    (tmp_path / "labels.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        list(SCHEMAS["feature_labels"].parse(Source(tmp_path / "labels.parquet", "labels.parquet")))
