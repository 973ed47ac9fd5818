"""The files are written by hand in the layouts that the authors state: no repository is needed."""

import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lens_gemma4.catalogue import label_schemas, labels
from sae_lens_gemma4.catalogue.files import LocalFiles
from sae_lens_gemma4.catalogue.labels import Example, FeatureLabel, iter_feature_labels, load_feature_labels
from sae_lens_gemma4.catalogue.registry import parse_release
from sae_lens_gemma4.errors import DataError, SAEError, UnknownNameError

SHARED = {
    "repo_type": "dataset",
    "model": "google/gemma-4-31B",
    "architecture": "topk",
    "sources": {"default": "card"},
    "each": {"id": "layer_{layer}", "path": "l{layer}", "hook": "blocks.{layer}.hook_resid_post", "d_sae": 100},
}
CATALOGUE = {
    "adam": {
        "label_schema": "adam1010",
        "saes": [
            {"layers": "26-27", "labels": "features.json"},
            {"id": "embedding", "hook": "ln_final.hook_out", "path": "e", "labels": "features.json"},
        ],
    },
    "macar": {
        "label_schema": "title_description",
        "saes": [{"layer": 45, "labels": "layer_{layer}/feature_labels.json"}, {"layer": 47}],
    },
    "metta": {"label_schema": "feature_map", "saes": [{"layer": 29, "labels": "feature_map.json"}]},
    "loupe": {
        "label_schema": "max_activations",
        "saes": [
            {"layers": "1-10", "labels": r"search:max_activations/.*layers\.{layer}[._/]"},
            {"layer": 30, "id": "unbounded", "labels": "one.parquet", "d_sae": None},
        ],
    },
    "bare": {"saes": [{"layer": 0}]},
}

RECORD = {
    "feature_id": 7,
    "layer": 27,
    "freq": 0.01,
    "mean_activation": 1.5,
    "max_activation": 9.25,
    "n_active": 120,
    "claude_label": "French towns",
    "claude_category": "semantic",
    "gpt_label": "places in France",
    "gpt_category": "geography",
    "agreement": 0.8,
    "examples": [
        {"activation": 9.25, "token_idx": 4, "context": "on the way to Lyon we"},
        {"activation": 3, "token_idx": 0, "context": "Nantes"},
    ],
    "cv_validated": True,
    "cv_precision": 0.75,
    "cv_matches": 3,
    "cv_mismatches": 1,
    "cv_assessment": "confirmed",
    "cv_notes": "",
    "probe_accuracy": 0.99,
    "probe_metrics": {"accuracy": 0.99, "precision": 1.0, "n_train": 80},
    "probe_status": "ok",
    "confidence": 0.83,
    "confidence_scores": {"agreement": 0.8, "cv": 0.75, "probe": 0.99, "activation": 1.0},
    "confidence_tier": "high",
}
MAPPING = {"sae_index": 9, "dict_index": 41, "label": "Elated", "category": "emotion:positivehigh", "confidence": 0.427}
ROW = {
    "feature": 3,
    "activation": 2.5,
    "token": " cat",
    "context": "the cat",
    "context_tokens": '["the", " cat"]',
    "token_activations": "[0.0, 2.5]",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    catalogue = {name: parse_release(name, {**SHARED, "repo_id": f"x/{name}", **c}) for name, c in CATALOGUE.items()}
    monkeypatch.setattr(labels, "releases", lambda: catalogue)
    monkeypatch.setattr(labels, "files_of", lambda release: LocalFiles(tmp_path))
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_rows(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def rows_of(*features):
    return [{**ROW, "feature": f, "activation": float(n), "context": f"text {n}"} for n, f in enumerate(features)]


def texts(label):
    return [example.text for example in label.examples]


# One form each


def test_adam1010(folder):
    elsewhere = {**RECORD, "layer": 26, "claude_label": "layer 26"}
    write(folder / "features.json", [elsewhere, RECORD, {"feature_id": 2, "layer": 27, "gpt_label": None}])
    found = load_feature_labels("adam", "layer_27")
    taken = ("feature_id", "layer", "claude_label", "claude_category", "gpt_label", "confidence", "examples")
    assert found == {
        2: FeatureLabel(index=2, source="claude"),
        7: FeatureLabel(
            index=7,
            label="French towns",
            category="semantic",
            confidence=0.83,
            source="claude",
            alternatives={"gpt": "places in France"},
            examples=(
                Example(text="on the way to Lyon we", activation=9.25, token_index=4),
                Example(text="Nantes", activation=3.0, token_index=0),
            ),
            facts={k: v for k, v in RECORD.items() if k not in taken},
        ),
    }
    assert list(found) == [2, 7]
    assert load_feature_labels("adam", "layer_26")[7].label == "layer 26"


def test_title_description(folder):
    tokens = ["▁in", "▁Lyon"]
    write(
        folder / "layer_45/feature_labels.json",
        {
            "12": {"title": "Towns", "description": "Names of towns.", "examples": ["in Lyon", "Nantes"], "score": 3},
            "13": {"title": "Towns too", "examples": [tokens]},
            "14": {"title": "Of a form nobody stated", "examples": [{"t": "Lyon"}]},
            "0": {},
        },
    )
    assert load_feature_labels("macar", "layer_45") == {
        0: FeatureLabel(index=0, source="GPT-4"),
        12: FeatureLabel(
            index=12,
            label="Towns",
            description="Names of towns.",
            source="GPT-4",
            examples=(Example(text="in Lyon"), Example(text="Nantes")),
            facts={"score": 3},
        ),
        13: FeatureLabel(index=13, label="Towns too", source="GPT-4", examples=(Example(tokens=tuple(tokens)),)),
        14: FeatureLabel(
            index=14, label="Of a form nobody stated", source="GPT-4", facts={"examples": [{"t": "Lyon"}]}
        ),
    }


def test_feature_map_counts_by_the_index_of_the_sae(folder):
    head = {"version": 1, "sae_path": "s.safetensors", "total_sae_features": 100, "mapped_count": 1}
    write(folder / "feature_map.json", {**head, "mappings": {"any": MAPPING}})
    assert load_feature_labels("metta", "layer_29") == {
        9: FeatureLabel(
            index=9,
            label="Elated",
            category="emotion:positivehigh",
            confidence=0.427,
            source="automated probing",
            facts={"dict_index": 41},
        )
    }


def test_max_activations(folder):
    rows = [
        ROW,
        {**ROW, "activation": 1.0, "token": None, "context_tokens": None, "token_activations": None},
        {**ROW, "feature": 1},
    ]
    write_rows(folder / "max_activations/language_model.layers.5.parquet", rows)
    of_three = (
        Example(text="the cat", token=" cat", activation=2.5, tokens=("the", " cat"), activations=(0.0, 2.5)),
        Example(text="the cat", activation=1.0),
    )
    found = load_feature_labels("loupe", "layer_5")
    assert found[3] == FeatureLabel(index=3, source="max activations", examples=of_three)
    assert list(found) == [1, 3]
    assert list(iter_feature_labels("loupe", "layer_5")) == [found[3], found[1]]


def test_tokens_may_be_lists_as_well_as_json(folder):
    write_rows(folder / "one.parquet", [{**ROW, "context_tokens": ["a", "b"], "token_activations": [1, 2]}])
    (example,) = load_feature_labels("loupe", "unbounded")[3].examples
    assert (example.tokens, example.activations) == (("a", "b"), (1.0, 2.0))


# Files and features


def test_all_files_that_a_search_finds_are_read_in_the_order_of_their_names(folder):
    for layer, shard, features in ((1, 1, (2, 5)), (1, 0, (1, 2)), (10, 0, (8,))):
        write_rows(folder / f"max_activations/layers.{layer}/{shard}.parquet", rows_of(*features))
    (folder / "max_activations/layers.1/README.md").write_text("not parquet")
    found = list(iter_feature_labels("loupe", "layer_1"))
    assert [(label.index, texts(label)) for label in found] == [
        (1, ["text 0"]),
        (2, ["text 1", "text 0"]),
        (5, ["text 1"]),
    ]
    assert list(load_feature_labels("loupe", "layer_10")) == [8]


def test_scattered_rows_are_gathered_and_streaming_says_so(folder):
    write_rows(folder / "one.parquet", rows_of(4, 4, 2, 4), row_group_size=2)
    assert texts(load_feature_labels("loupe", "unbounded")[4]) == ["text 0", "text 1", "text 3"]
    found = iter_feature_labels("loupe", "unbounded")
    assert texts(next(found)) == ["text 0", "text 1"]
    next(found)
    with pytest.raises(DataError, match=r"one\.parquet, row 3: feature 4 comes back.*load_feature_labels"):
        list(found)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("kind", [pa.int32(), pa.uint16(), pa.int64()])
def test_only_the_features_asked_for(folder, kind, statistics):
    draw = random.Random(0)
    rows = rows_of(*(draw.randrange(100) for _ in range(200)))
    table = pa.Table.from_pylist(rows)
    column = table.column_names.index("feature")
    table = table.set_column(column, "feature", table["feature"].cast(kind))
    pq.write_table(table, folder / "one.parquet", row_group_size=7, write_statistics=statistics)
    everything = load_feature_labels("loupe", "unbounded")
    assert sum(len(label.examples) for label in everything.values()) == 200
    wanted = iter([5, 50, 2**40, *list(everything)[:3]])
    found = load_feature_labels("loupe", "unbounded", features=wanted)
    assert found == {i: everything[i] for i in sorted({5, 50, *list(everything)[:3]}) if i in everything}
    assert load_feature_labels("loupe", "unbounded", features=[]) == {}


def test_features_of_json_files_too(folder):
    write(folder / "layer_45/feature_labels.json", {str(i): {"title": f"t{i}"} for i in range(9)})
    assert list(load_feature_labels("macar", "layer_45", features=(4, 2, 99))) == [2, 4]
    assert [label.index for label in iter_feature_labels("macar", "layer_45", features={4, 2})] == [2, 4]


def test_row_groups_without_the_features_are_not_read(folder, monkeypatch):
    write_rows(folder / "one.parquet", rows_of(*(i // 4 for i in range(80))), row_group_size=8)
    read = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self, *args, row_groups, **kwargs):
        read.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert texts(load_feature_labels("loupe", "unbounded", [7])[7]) == [f"text {n}" for n in range(28, 32)]
    assert read == [3]


def test_a_stream_holds_one_batch_of_a_row_group_however_long(folder, monkeypatch):
    write_rows(folder / "one.parquet", rows_of(*(i // 4 for i in range(400))), row_group_size=400)
    monkeypatch.setattr(label_schemas, "_BATCH_ROWS", 8)
    read = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(*args, **kwargs):
        for batch in iter_batches(*args, **kwargs):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    for n, label in enumerate(iter_feature_labels("loupe", "unbounded")):
        assert label.index == n
        # A feature ends where the next one's first row is read.
        assert len(read) == min((4 * n + 4) // 8 + 1, 50)
    assert read == [8] * 50


# Errors


def test_unknown_names_are_answered_with_the_nearest(folder):
    with pytest.raises(UnknownNameError, match="'loupe'"):
        load_feature_labels("loup", "layer_5")
    with pytest.raises(UnknownNameError, match="'layer_5'"):
        iter_feature_labels("loupe", "layer5")


def test_a_release_without_labels_names_those_that_have_them(folder):
    with pytest.raises(SAEError, match=r"bare has no labels of layer_0\. Releases .*: adam, macar, metta, loupe"):
        load_feature_labels("bare", "layer_0")
    with pytest.raises(SAEError, match="SAEs of macar that have some: layer_45"):
        iter_feature_labels("macar", "layer_47")


def test_a_feature_that_the_sae_has_not(folder):
    for wrong in (-1, 100):
        with pytest.raises(SAEError, match=f"layer_5 of loupe has no feature {wrong}; its d_sae is 100"):
            iter_feature_labels("loupe", "layer_5", features=[1, wrong])


def test_files_that_are_not_there(folder):
    write_rows(folder / "other.parquet", [ROW])
    with pytest.raises(SAEError, match=r"No \.parquet file .* matches .*layers.*of: other\.parquet"):
        load_feature_labels("loupe", "layer_5")
    with pytest.raises(SAEError, match=r"feature_map\.json"):
        load_feature_labels("metta", "layer_29")


def test_labels_by_layer_of_an_sae_that_is_in_none(folder):
    write(folder / "features.json", [RECORD])
    with pytest.raises(SAEError, match="ln_final"):
        load_feature_labels("adam", "embedding")


ADAM = ("adam", "layer_27", "features.json")
MACAR = ("macar", "layer_45", "layer_45/feature_labels.json")
METTA = ("metta", "layer_29", "feature_map.json")


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (ADAM, "", "features.json is not JSON"),
        (ADAM, '[{"feature_id": 7,', "features.json is not JSON"),
        (ADAM, "[" * 100_000, "features.json is not JSON"),
        (ADAM, RECORD, "holds a dict, not a list"),
        (ADAM, [RECORD, 3], "features.json, record 1: 3 is not an object"),
        (ADAM, [{**RECORD, "layer": None}], "record 0: it has no layer"),
        (ADAM, [{"layer": 27}], "record 0: it has no feature_id"),
        (ADAM, [{**RECORD, "feature_id": "7"}], "record 0: feature_id is '7': not an integer"),
        (ADAM, [{**RECORD, "feature_id": True}], "feature_id is True: not an integer"),
        (ADAM, [{**RECORD, "feature_id": 100}], "record 0: layer_27 has no feature 100; its d_sae is 100"),
        (ADAM, [{**RECORD, "feature_id": -1}], "no feature -1"),
        (ADAM, [RECORD, {**RECORD, "layer": 26}, RECORD], "record 2: feature 7 has been labelled before"),
        (ADAM, [{**RECORD, "claude_label": 4}], "claude_label is 4: not a text"),
        (ADAM, [{**RECORD, "confidence": math.nan}], "record 0: confidence is nan: not a finite number"),
        (ADAM, [{**RECORD, "examples": {}}], "examples is {}: not a list"),
        (ADAM, [{**RECORD, "examples": [{"activation": "high"}]}], "record 0: .*activation is 'high': not a finite"),
        (ADAM, [{**RECORD, "examples": [{"activation": math.inf}]}], "record 0: .*activation is inf: not a finite"),
        (ADAM, [{**RECORD, "examples": [{"activation": 10**400}]}], "record 0: .*not a finite"),
        (ADAM, [{**RECORD, "examples": [{"token_idx": 1.5}]}], "record 0: .*token_idx is 1.5: not an integer"),
        (MACAR, [], "holds a list, not a dict"),
        (MACAR, {"Lyon": {}}, "record 'Lyon': its key is not a feature's index"),
        (MACAR, {"-1": {}}, "record '-1': its key"),
        (MACAR, {"1": {}, "01": {}}, "record '01': feature 1 has been labelled before"),
        (MACAR, '{"1": {"title": "a"}, "1": {"title": "b"}}', "has the key '1' twice"),
        (MACAR, {"100": {}}, "no feature 100"),
        (MACAR, {"1": "Towns"}, "record '1': 'Towns' is not an object"),
        (METTA, {"version": 1}, "feature_map.json has no object of mappings"),
        (METTA, {"mappings": [MAPPING]}, "no object of mappings"),
        (METTA, {"mappings": {"9": {**MAPPING, "sae_index": None}}}, "mapping '9': it has no sae_index"),
        (METTA, {"mappings": {"a": MAPPING, "b": MAPPING}}, "mapping 'b': feature 9 has been labelled before"),
        (METTA, {"mappings": {"a": {**MAPPING, "confidence": "high"}}}, "confidence is 'high'"),
    ],
)
def test_a_json_file_that_is_wrong_is_named_with_its_record(folder, place, content, message):
    release, sae_id, name = place
    write(folder / name, content)
    for read in (load_feature_labels, lambda *a: list(iter_feature_labels(*a))):
        with pytest.raises(DataError, match=message) as e:
            read(release, sae_id)
        assert name in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature": None}, "row 1: it has no feature"),
        ({"feature": -1}, "row 1: unbounded has no feature -1"),
        ({"activation": None}, "row 1: it has no activation"),
        ({"activation": math.nan}, "row 1: activation is nan: not a finite number"),
        ({"context_tokens": '["the"'}, "row 1: context_tokens is .*: Expecting"),
        ({"context_tokens": '"the cat"'}, "row 1: context_tokens is .*: not a list"),
        ({"context_tokens": "[1, 2]"}, "row 1: context_tokens is .*: not a text"),
        ({"token_activations": "[0.0, NaN]"}, "row 1: token_activations is .*: not a finite number"),
        ({"token_activations": '[0.0, "2.5"]'}, "row 1: token_activations is .*: not a finite number"),
        ({"token_activations": "[0.0]"}, "row 1: 2 tokens have 1 activations"),
    ],
)
def test_a_row_that_is_wrong_is_named(folder, change, message):
    write_rows(folder / "one.parquet", [ROW, {**ROW, **change}])
    with pytest.raises(DataError, match=r"one\.parquet, " + message):
        list(iter_feature_labels("loupe", "unbounded"))


def test_a_wrong_row_has_the_number_that_it_has_in_the_file(folder):
    rows = [*rows_of(*range(20)), {**ROW, "feature": 19, "activation": math.nan}]
    write_rows(folder / "one.parquet", rows, row_group_size=6)
    assert list(load_feature_labels("loupe", "unbounded", [18])) == [18]
    with pytest.raises(DataError, match="row 20: activation is nan"):
        load_feature_labels("loupe", "unbounded", [19])


def test_what_is_not_such_a_parquet_file(folder):
    path = folder / "one.parquet"
    for content in (b"", b"PAR1 and no more", b"{}" * 1000):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"one\.parquet cannot be read as parquet"):
            load_feature_labels("loupe", "unbounded")

    write_rows(path, [{k: v for k, v in ROW.items() if k not in ("token", "activation")}])
    with pytest.raises(DataError, match=r"one\.parquet has no column activation, token, only: feature, context"):
        load_feature_labels("loupe", "unbounded")

    for wrong in ("seven", 7.5):
        write_rows(path, [{**ROW, "feature": wrong}])
        for features in (None, [7]):
            with pytest.raises(DataError, match=r"one\.parquet has a column feature of type .*, not of integers"):
                load_feature_labels("loupe", "unbounded", features)

    write_rows(path, [{**ROW, "activation": "high"}])
    with pytest.raises(DataError, match=r"row 0: activation is 'high': not a finite number"):
        load_feature_labels("loupe", "unbounded")

    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.Table.from_pylist([ROW]).drop_columns("token").append_column("token", text), path)
    with pytest.raises(DataError, match=r"one\.parquet cannot be read as parquet"):
        load_feature_labels("loupe", "unbounded")


def test_a_damaged_file_is_named(folder):
    path = folder / "one.parquet"
    write_rows(path, rows_of(*range(1000)))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(1500) + whole[1600:])
    with pytest.raises(DataError, match=r"one\.parquet cannot be read as parquet"):
        load_feature_labels("loupe", "unbounded")
