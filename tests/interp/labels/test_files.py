"""Labels written, and read back by `datasets`, by ourselves and by the catalogue's parsers of other forms."""

import dataclasses
import json
import os

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sae_lens_gemma4.catalogue import labels as catalogue_labels
from sae_lens_gemma4.catalogue.files import LocalFiles
from sae_lens_gemma4.catalogue.labels import Example, FeatureLabel, load_feature_labels
from sae_lens_gemma4.catalogue.registry import parse_release
from sae_lens_gemma4.errors import ConfigError, DataError, HubError
from sae_lens_gemma4.interp.labels import files as label_files
from sae_lens_gemma4.interp.labels.card import LabelCard, Measured
from sae_lens_gemma4.interp.labels.files import COLUMNS, iter_labels, label_features, read_labels, write_labels
from sae_lens_gemma4.interp.labels.forms import to_adam1010, to_feature_map, to_title_description
from sae_lens_gemma4.interp.statistics import share

CARD = LabelCard(title="Labels", license="apache-2.0")
FULL = FeatureLabel(
    index=7,
    label='the word "the", | and <b>',
    description="two\nlines",
    category="syntax",
    confidence=1.0,
    source="judge one",
    alternatives={"judge two": "articles", "judge three": ""},
    examples=(
        Example(
            text="on the\r\nway",
            token=" the",
            activation=2.5,
            token_index=1,
            tokens=("on", " the", ""),
            activations=(0.0, 2.5, 1e-30),
        ),
        Example(tokens=(), activations=()),
        Example(text="\u2028 日本語 🙂 \x00"),
    ),
    facts={"cv_precision": 0.75, "probe_metrics": {"f1": 1, "n": [1, None, True]}, "cv_notes": "é", "bool": False},
)
BARE = FeatureLabel(index=0, source="nobody")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def loaded(tmp_path, *args, **kwargs):
    return datasets.load_dataset(*args, **kwargs, split="train", cache_dir=str(tmp_path / "cache"))


def by_index(rows):
    return sorted(rows, key=lambda row: row["index"])


def check_with_datasets(labels, tmp_path, types_seen=True):
    """Both files through `datasets`: the same rows, and the features of `COLUMNS`. Where every column's type is to be
    seen in some row, the JSON lines have these without being told."""
    folder = tmp_path / "labels"
    write_labels(labels, folder, CARD)
    lines = str(folder / "labels.jsonl")
    parquet = loaded(tmp_path, str(folder))
    told = loaded(tmp_path, "json", data_files=lines, features=label_features())
    untold = loaded(tmp_path, "json", data_files=lines)
    assert parquet.features == told.features == label_features()
    assert not types_seen or untold.features == label_features()
    assert [row["index"] for row in parquet] == [label.index for label in labels]
    for mine, theirs, guessed in zip(by_index(parquet), by_index(told), by_index(untold), strict=True):
        assert mine == theirs == guessed
    return parquet


# datasets


def test_a_full_and_a_bare_label_load_with_the_same_features_from_both_files(tmp_path):
    rows = check_with_datasets([BARE, FULL], tmp_path)
    assert rows[0] == {
        **dict.fromkeys(["label", "description", "category", "confidence"]),
        "index": 0,
        "source": "nobody",
        "alternatives": [],
        "examples": [],
        "facts": "{}",
    }
    assert rows[1]["examples"][0] == dataclasses.asdict(FULL.examples[0]) | {
        "tokens": ["on", " the", ""],
        "activations": [0.0, 2.5, 1e-30],
    }
    assert rows[1]["examples"][1]["tokens"] == [] and rows[1]["examples"][2]["tokens"] is None
    assert rows[1]["alternatives"] == [
        {"source": "judge two", "text": "articles"},
        {"source": "judge three", "text": ""},
    ]
    assert json.loads(rows[1]["facts"]) == FULL.facts


def test_ten_thousand_rows_of_nothing_before_the_first_label_give_no_cast_error(tmp_path):
    """`datasets` guesses the types of a JSON file from its first block of 10 MB."""
    nothing = [
        FeatureLabel(index=i, source="nobody " * 150, examples=(Example(), Example(tokens=(), activations=())))
        for i in range(10_000)
    ]
    rows = check_with_datasets([*nothing, dataclasses.replace(FULL, index=10_000)], tmp_path)
    assert os.path.getsize(tmp_path / "labels" / "labels.jsonl") > 10 * 2**20
    assert rows[10_000]["confidence"] == 1.0
    assert rows[10_000]["examples"][0]["token"] == " the"


def test_a_text_larger_than_a_block_loads(tmp_path):
    rows = check_with_datasets([BARE, FeatureLabel(index=1, source="s", label="ab\n" * 4_000_000)], tmp_path, False)
    assert len(rows[1]["label"]) == 12_000_000


def test_numbers_that_look_like_integers_stay_floats(tmp_path):
    only = FeatureLabel(index=1, source="s", confidence=1, examples=(Example(activation=3, activations=(1, 2)),))
    rows = check_with_datasets([only], tmp_path, False)
    assert [type(rows[0]["confidence"]), type(rows[0]["examples"][0]["activations"][0])] == [float, float]


@given(labels=st.deferred(lambda: any_labels()))
@settings(max_examples=15)
def test_any_labels_load_with_or_without_being_told_the_types(labels, tmp_path_factory):
    check_with_datasets(labels, tmp_path_factory.mktemp("any"), types_seen=False)


# Our own reading


def test_both_files_are_read_back_to_the_same_labels(tmp_path):
    files = write_labels([FULL, BARE], tmp_path, CARD)
    assert files == (tmp_path / "labels.jsonl", tmp_path / "labels.parquet", tmp_path / "README.md", 2)
    for path in files[:2]:
        assert read_labels(path) == {0: BARE, 7: FULL}
        assert [label for _, label in iter_labels(path)] == [FULL, BARE]
        assert list(read_labels(path)) == [0, 7]
    assert pq.read_schema(files.parquet).remove_metadata().equals(COLUMNS)


texts = st.text(st.characters(), max_size=8)  # surrogates among them
valid = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | valid,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(valid, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def any_labels(draw):
    def example():
        n = draw(st.none() | st.integers(0, 3))
        return Example(
            text=draw(st.none() | valid),
            token=draw(st.none() | valid),
            activation=draw(st.none() | floats),
            token_index=draw(st.none() | st.integers(0, 2**63 - 1)),
            tokens=None if n is None else tuple(draw(valid) for _ in range(n)),
            activations=None if n is None else tuple(draw(floats) for _ in range(n)),
        )

    return [
        FeatureLabel(
            index=index,
            label=draw(st.none() | valid),
            description=draw(st.none() | valid),
            category=draw(st.none() | valid),
            confidence=draw(st.none() | floats),
            source=draw(valid),
            alternatives=draw(st.dictionaries(valid, valid, max_size=2)),
            examples=tuple(example() for _ in range(draw(st.integers(0, 2)))),
            facts=draw(st.dictionaries(valid, json_values, max_size=3)),
        )
        for index in sorted(draw(st.sets(st.integers(0, 2**63 - 1), min_size=1, max_size=4)))
    ]


@given(labels=any_labels())
@settings(max_examples=50)
def test_whatever_a_label_holds_comes_back_from_both_files(labels, tmp_path_factory):
    files = write_labels(labels, tmp_path_factory.mktemp("labels"), CARD)
    assert list(read_labels(files.jsonl).values()) == list(read_labels(files.parquet).values()) == labels


@given(text=texts)
@settings(max_examples=30)
def test_half_a_surrogate_pair_becomes_a_replacement_character_in_both_files(text, tmp_path_factory):
    label = FeatureLabel(index=1, label=text, source=text, examples=(Example(tokens=(text,)),), facts={text: [text]})
    files = write_labels([label], tmp_path_factory.mktemp("labels"), CARD)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    for path in files[:2]:
        back = read_labels(path)[1]
        assert [back.label, back.source, back.examples[0].tokens, back.facts] == [
            whole,
            whole,
            (whole,),
            {whole: [whole]},
        ]
    assert text != "\ud800" or whole == "\ufffd"


def test_numpy_s_numbers_are_written_as_numbers(tmp_path):
    facts = {"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True), "d": (np.float64(1.5),)}
    label = FeatureLabel(index=np.int64(4), source="s", confidence=np.float64(0.25), facts=facts)
    files = write_labels([label], tmp_path, CARD)
    assert read_labels(files.parquet)[4].facts == {"a": 3, "b": 0.5, "c": True, "d": [1.5]}
    assert read_labels(files.jsonl)[4].confidence == 0.25


def test_batches_are_bounded_and_nothing_is_lost_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(label_files, "_BATCH_ROWS", 3)
    labels = [FeatureLabel(index=i, source="s", label=str(i)) for i in range(8)]
    files = write_labels(iter(labels), tmp_path, CARD)
    assert pq.ParquetFile(files.parquet).num_row_groups == 3
    assert list(read_labels(files.parquet).values()) == list(read_labels(files.jsonl).values()) == labels
    monkeypatch.setattr(label_files, "_BATCH_BYTES", 1)
    write_labels(iter(labels), tmp_path, CARD)
    assert pq.ParquetFile(files.parquet).num_row_groups == 8


# What cannot be written


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"confidence": float("nan")}, "latent 7: confidence is nan. State None"),
        ({"confidence": np.float32("inf")}, "confidence is inf"),
        ({"confidence": True}, "confidence is 'True', and no number"),
        ({"confidence": "0.5"}, "confidence is '0.5', and no number"),
        ({"index": -1}, "index of a label is '-1', and no integer from 0"),
        ({"index": 2**63}, "no integer from 0"),
        ({"index": 1.0}, "no integer from 0"),
        ({"label": 3}, "latent 7: label is '3', and no text"),
        ({"source": None}, "source is 'None', and no text"),
        ({"alternatives": {"b": None}}, "b's is 'None', and no text"),
        ({"facts": {"a": {"b": [1, float("nan")]}}}, r"latent 7: facts\.a\.b\[1\] is nan"),
        ({"facts": {1: 2}}, "facts has the key 1, which is no text"),
        ({"facts": {"a": {3}}}, r"facts\.a is a set, which JSON does not have"),
        ({"examples": (Example(activation=float("-inf")),)}, "example 0, activation is -inf"),
        ({"examples": (Example(), Example(tokens=("a", 3)))}, "example 1, token 1 is '3', and no text"),
        ({"examples": (Example(activations=(1.0, None)),)}, "example 0, activation 1 is 'None', and no number"),
        ({"examples": (Example(tokens=("a",), activations=()),)}, "example 0: 1 tokens have 0 activations"),
        ({"examples": (Example(token_index=-1),)}, "example 0, token_index is '-1'"),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_written(changed, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        write_labels([BARE, dataclasses.replace(FULL, **changed)], tmp_path / "new", CARD)
    assert list((tmp_path / "new").iterdir()) == []


def test_facts_without_end_are_refused(tmp_path):
    facts: dict = {}
    facts["a"] = facts
    with pytest.raises(DataError, match="nested too deeply"):
        write_labels([FeatureLabel(index=0, source="s", facts=facts)], tmp_path, CARD)


def test_what_was_there_stays_when_writing_fails(tmp_path):
    def labels(error):
        yield FULL
        raise error

    files = write_labels([BARE], tmp_path, CARD)
    (tmp_path / "other.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for error in (KeyboardInterrupt(), HubError("gone"), OSError(28, "No space left on device")):
        kind, reason = type(error), "gone" if isinstance(error, HubError) else None
        if kind is OSError:
            kind, reason = ConfigError, "Labels cannot be written to .*: No space left on device"
        with pytest.raises(kind, match=reason):
            write_labels(labels(error), tmp_path, CARD)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_labels([FULL], tmp_path, CARD)
    assert list(read_labels(files.parquet)) == list(read_labels(files.jsonl)) == [7]
    assert sorted(os.listdir(tmp_path)) == ["README.md", "labels.jsonl", "labels.parquet", "other.txt"]


def test_no_labels_two_of_one_latent_and_a_file_for_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="There are no labels to write"):
        write_labels([], tmp_path, CARD)
    with pytest.raises(DataError, match="two labels of latent 7"):
        write_labels([FULL, BARE, FULL], tmp_path, CARD)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Labels cannot be written to .*file: File exists"):
        write_labels([FULL], tmp_path / "file", CARD)


def test_files_that_are_none_of_labels_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"end neither in .jsonl nor in .parquet"):
        read_labels(tmp_path / "labels.json")
    with pytest.raises(ConfigError, match="there is no such file"):
        read_labels(tmp_path / "labels.jsonl")
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"index": 1, "source": "s"}\n\n{"index": 1, "source": "s"}\n')
    with pytest.raises(DataError, match=r"twice\.jsonl, line 3: latent 1 has been labelled before"):
        read_labels(twice)
    twice.write_text('{"index": -1, "source": "s"}\n')
    with pytest.raises(DataError, match="line 1: there is no latent -1"):
        read_labels(twice)


# The card


def test_the_card_says_what_is_there_what_was_measured_and_what_is_missing(tmp_path):
    card = LabelCard(
        title="Labels of *demo* | <script>",
        facts={"model": "gemma-4-demo", "latents": 2048, "judges": ["a_b", "c"], "hook": None, "share": 0.12345},
        measured=[
            Measured.of_shares("labels confirmed", share(36, 100), share(4, 100), "labels dealt out anew"),
            Measured("mean F1", 0.51234),
        ],
        not_stated=["Whether the text is the model's own."],
        tags=["gemma-4"],
    )
    files = write_labels([FULL, BARE], tmp_path, card)
    content = files.card.read_text()
    front = yaml.safe_load(content.split("---\n")[1])
    assert "license" not in front and front["tags"][-1] == "gemma-4" and front["size_categories"] == ["n<1K"]
    html = MarkdownIt("commonmark").enable("table").render(content.split("---\n", 2)[2])
    assert "<h1>Labels of *demo* | &lt;script&gt;</h1>" in html
    low, high = share(36, 100)[3:]
    assert f"<td>0.36 [{low:.3g}, {high:.3g}]</td>\n<td>0.04 [" in html and "<td>labels dealt out anew</td>" in html
    for cell in ("gemma-4-demo", "2,048", "a_b, c", "not stated", "0.1235", "0.512", "–"):
        assert f"<td>{cell}</td>" in html
    assert "2 rows, one a latent: 1 with a label" in html and "judge one (1), nobody (1)" in html
    for line in ("licence these labels may be used", "A control for: mean F1", "model&#x27;s own", "for 1 of the 2"):
        assert line in html.replace("'", "&#x27;")
    assert "have not been tested" not in html
    assert "these labels have not been tested" in write_labels([BARE], tmp_path, CARD).card.read_text()


def test_a_card_without_a_name_or_with_an_empty_licence_is_refused():
    with pytest.raises(ConfigError, match="needs a title"):
        LabelCard(title=" ")
    with pytest.raises(ConfigError, match="A licence needs a name"):
        LabelCard(title="a", license=" ")


# Other people's forms, through the catalogue


@pytest.fixture
def through(tmp_path, monkeypatch):
    def through(schema, content):
        shared = {
            "repo_type": "dataset",
            "model": "google/gemma-4-31B",
            "architecture": "topk",
            "sources": {"default": "card"},
            "each": {"id": "layer_{layer}", "path": "l", "hook": "blocks.{layer}.hook_resid_post", "d_sae": 100},
        }
        release = {"repo_id": "a/b", "label_schema": schema, "saes": [{"layer": 27, "labels": "labels.json"}]}
        monkeypatch.setattr(
            catalogue_labels, "releases", lambda: {"them": parse_release("them", {**shared, **release})}
        )
        monkeypatch.setattr(catalogue_labels, "files_of", lambda release: LocalFiles(tmp_path))
        (tmp_path / "labels.json").write_text(json.dumps(content, allow_nan=False))
        return load_feature_labels("them", "layer_27")

    return through


FACTS = {
    "freq": 0.01,
    "agreement": 0.8,
    "cv_precision": 0.75,
    "probe_accuracy": 0.99,
    "probe_metrics": {"f1": 0.9},
    "confidence_scores": {"agreement": 0.8, "cv": 0.75, "probe": 0.99, "activation": 1.0},
    "confidence_tier": "high",
}


def labels_for(source, other):
    example = Example(text="on the way to Lyon we", activation=9.25, token_index=4)
    whole = FeatureLabel(
        index=7,
        label="towns",
        category="semantic",
        confidence=0.83,
        source=source,
        alternatives={other: "places"},
        examples=(example,),
        facts=FACTS,
    )
    return {3: FeatureLabel(index=3, source=source), 7: whole}


@pytest.mark.parametrize(("source", "other"), [("claude", "gpt"), ("token statistics", "gpt-4o"), ("gpt", "claude")])
def test_adam_kruger_s_form_comes_back_as_it_was(source, other, through):
    labels = labels_for(source, other)
    records = to_adam1010(labels.values(), 27)
    assert through("adam1010", [*records, {"feature_id": 9, "layer": 28}]) == labels
    assert records[1]["claude_label"] == "towns" and records[1]["gpt_label"] == "places" and records[1]["layer"] == 27
    assert records[1]["examples"] == [{"activation": 9.25, "token_idx": 4, "context": "on the way to Lyon we"}]
    assert ("claude_label_source" in records[1]) == (source != "claude")
    assert ("gpt_label_source" in records[1]) == (other != "gpt")
    assert FACTS.items() <= records[1].items()


@pytest.mark.parametrize("source", ["GPT-4", "token statistics"])
def test_titles_and_descriptions_come_back_as_they_were(source, through):
    labels = {
        5: FeatureLabel(index=5, source=source),
        7: FeatureLabel(
            index=7,
            label="towns",
            description="of France",
            source=source,
            examples=(Example(text="Lyon"), Example(tokens=("L", "yon"))),
            facts=FACTS,
        ),
    }
    content = to_title_description(labels.values())
    assert through("title_description", content) == labels
    assert content["7"]["title"] == "towns" and content["7"]["examples"] == ["Lyon", ["L", "yon"]]


@pytest.mark.parametrize("source", ["automated probing", "prompt pairs"])
def test_a_feature_map_comes_back_as_it_was(source, through):
    stated = {"source": source, "category": "emotion", "confidence": 0.5}
    labels = {
        9: FeatureLabel(index=9, label="Elated", facts={"dict_index": 41}, **stated),
        7: FeatureLabel(index=7, label="Sad", facts={"q": 0.1, "dict_index": 1}, **stated),
    }
    content = to_feature_map(labels.values(), d_sae=100, sae_path="sae.safetensors")
    assert through("feature_map", content) == labels
    assert {k: v for k, v in content.items() if k != "mappings"} == {
        "version": 1,
        "sae_path": "sae.safetensors",
        "total_sae_features": 100,
        "mapped_count": 2,
    }
    assert {type(m[k]) for m in content["mappings"].values() for k in ("sae_index", "dict_index")} == {int}
    without = to_feature_map([dataclasses.replace(label, facts={}) for label in labels.values()], d_sae=100)
    assert [m["dict_index"] for m in without["mappings"].values()] == [0, 1]


def test_a_form_says_what_it_cannot_hold():
    with pytest.raises(DataError, match="Latent 7 has a fact 'layer', a key that means another thing"):
        to_adam1010([dataclasses.replace(FULL, facts={"layer": 3})], 27)
    with pytest.raises(DataError, match="Latent 0 has a fact 'gpt_label'"):
        to_adam1010([dataclasses.replace(BARE, facts={"gpt_label": "x"})], 27)
    with pytest.raises(DataError, match="two labels of latent 7"):
        to_title_description([FULL, FULL])
    with pytest.raises(DataError, match="Latent 0 has no label, which a feature map must state"):
        to_feature_map([BARE], d_sae=3)
    with pytest.raises(DataError, match="no latent 7 in an SAE of 7"):
        to_feature_map([FULL], d_sae=7)
