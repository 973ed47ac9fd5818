"""Labels from wherever they are written, and what is said of those that cannot be read."""

import json

import numpy as np
import pytest

from sae_lens_gemma4.catalogue import labels
from sae_lens_gemma4.catalogue.files import LocalFiles
from sae_lens_gemma4.catalogue.label_schemas import FeatureLabel
from sae_lens_gemma4.catalogue.registry import parse_release
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError, UnknownNameError
from sae_lens_gemma4.interp.labels.card import LabelCard
from sae_lens_gemma4.interp.labels.files import write_labels
from sae_lens_gemma4.neuronpedia import explanations
from sae_lens_gemma4.neuronpedia.explanations import Explanation, labels_of, read_explanations
from sae_lens_gemma4.neuronpedia.folder import Dashboards
from tests.neuronpedia import sample

D_SAE = 100
SHARED = {
    "repo_type": "dataset",
    "model": "google/gemma-4-31B",
    "architecture": "topk",
    "sources": {"default": "card"},
    "each": {"id": "layer_{layer}", "path": "l{layer}", "hook": "blocks.{layer}.hook_resid_post", "d_sae": D_SAE},
}
CATALOGUE = {
    "adam": {"label_schema": "adam1010", "saes": [{"layer": 27, "labels": "features.json"}, {"layer": 28}]},
    "macar": {"label_schema": "title_description", "saes": [{"layer": 45, "labels": "labels.json"}]},
    "metta": {"label_schema": "feature_map", "saes": [{"layer": 29, "labels": "map.json"}]},
    "loupe": {"label_schema": "max_activations", "saes": [{"layer": 1, "labels": "max.parquet"}]},
}


def read(source, d_sae=D_SAE, **stated):
    return read_explanations(source, d_sae=d_sae, **stated)


def texts(source, **stated):
    return {index: [one.text for one in found] for index, found in read(source, **stated).items()}


@pytest.fixture
def file(tmp_path):
    def write(content, name="labels.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return path

    return write


@pytest.fixture
def catalogue(tmp_path, monkeypatch):
    found = {name: parse_release(name, {**SHARED, "repo_id": f"x/{name}", **c}) for name, c in CATALOGUE.items()}
    for module in (labels, explanations):
        monkeypatch.setattr(module, "releases", lambda: found)
    monkeypatch.setattr(labels, "files_of", lambda release: LocalFiles(tmp_path))

    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))

    return write


# Tables


@pytest.mark.parametrize(
    "content",
    [
        "index,description\n3,cats\n10,dogs\n",
        "feature,explanation\n10,dogs\n3,cats",
        "Feature Index,Label\r\n3,cats\r\n10,dogs\r\n",
        '"latent","text"\n"3","cats"\n"10","dogs"\n',
        "index\tlabel\n3\tcats\n10\tdogs\n",
        "title;neuron\ncats;3\ndogs;10\n",
        "density,index,label,other\n0.1,3,cats,x\n,10,dogs,\n",
        ",other,index,label,other,\n0,1,3,cats,2,\n0,1,10,dogs,2,\n",
        "\n".join(["index,label", "3,  cats ", "", " 10 ,dogs", ",", ""]),
        "feature-id,label,description\n3,,cats\n10,dogs,\n",
    ],
)
def test_a_table_is_read_by_the_names_of_its_columns(content, file):
    assert texts(file(content)) == {3: ["cats"], 10: ["dogs"]}
    assert texts(file("\ufeff" + content)) == {3: ["cats"], 10: ["dogs"]}
    assert list(read(file(content))) == [3, 10]


def test_quotes_commas_and_line_breaks_are_a_label_s_own(file):
    content = 'index,label\n1,"a, b"\n2,"he said ""no"""\n3,"two\nlines"\n4,été 😀\n'
    assert texts(file(content)) == {1: ["a, b"], 2: ['he said "no"'], 3: ["two\nlines"], 4: ["été 😀"]}


def test_a_title_and_a_description_become_one_text(file):
    content = "index,title,description\n0,Cats,animals that purr\n1,Cats,Cats and lions\n2,,only this\n3,only that,\n"
    expected = ["Cats: animals that purr", "Cats and lions", "only this", "only that"]
    assert texts(file(content)) == {index: [text] for index, text in enumerate(expected)}
    assert texts({0: {"label": "Cats", "explanation": "they purr"}}) == {0: ["Cats: they purr"]}


def test_what_a_table_says_of_a_label_s_origin_comes_along(file):
    content = "index,label,typeName,explanationModelName,notes\n0,a,np_max-act,gpt-4o,by hand\n1,b,,,\n"
    found = read(file(content), type_name="default", model_name="m")
    assert found[0] == [Explanation("a", "np_max-act", "gpt-4o", "by hand")]
    assert found[1] == [Explanation("b", "default", "m", None)]


def test_columns_that_merely_sound_like_foreign_keys_are_not_taken_for_them(file):
    found = read(file("index,label,model,method,type\n0,a,gemma-4-e4b,auto,feature\n"))
    assert found == {0: [Explanation("a")]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "The first line of .*labels.csv, '', names no columns"),
        ("a,b\n1,x\n", "The first line of .*, 'a,b', names no columns for index and text; .* index and label"),
        ("index,density\n1,0.5\n", "names no columns"),
        ("3,cats\n10,dogs\n", "The first line of .*, '3,cats'"),
        ("index,label\n1,a\nx,b\n", "labels.csv, line 3: 'x' is no latent's index, which is an integer"),
        ("index,label\n1.0,a\n", "line 2: '1.0' is no latent's index"),
        ("index,label\n,a\n", "line 2: '' is no latent's index"),
        ("index,label\n١,a\n", "line 2: '١' is no latent's index"),
        ("index,label\n-1,a\n", "line 2: there is no latent -1; they are 0 to 99"),
        ("index,label\n100,a\n", "line 2: there is no latent 100; they are 0 to 99"),
        ("index,label\n7,a\n8,b\n7,c\n", "line 4: latent 7 has been labelled before, by .*labels.csv, line 2"),
        ("index,label\n7,\n", "line 2: An explanation has no text"),
        ('index,label\n1,"two\nlines"\n7,  \n', "line 4: An explanation has no text"),
        ("index,label\n7,a,b\n", "line 2 has 3 columns, and the first line 2"),
        ("index,label\n7\n", "line 2 has 1 columns"),
        ('index,label\n7,"a\n', "line 2: unexpected end of data"),
        ('index,label\n7,"a"b\n', "line 2: ',' expected after '\"'"),
        ("index,feature,label\n0,7,a\n", "first line of .* several columns for index, index and feature; one of them"),
        ("label;Neuron;Feature ID\na;1;2\n", "several columns for index, Neuron and Feature ID; one of them is wanted"),
        ("index,index,label\n7,7,a\n", "several columns for index, index and index"),
        ("index,label,label\n7,a,b\n", "line 1: It has label twice, as 'label' and 'label', and one of them is wanted"),
        ("index, label,Label\n7,a,\n", "line 1: It has label twice, as 'label' and 'Label'"),
        ("index,label,notes,NOTES\n7,a,,\n", "line 1: It has notes twice, as 'notes' and 'NOTES'"),
        ("index,label,title\n7,a,b\n", "line 2: It has both label and title, and one of them is wanted"),
        (b"index,label\n7,caf\xe9\n", "are not in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_with_its_line(content, reason, file):
    with pytest.raises(DataError, match=reason):
        read(file(content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.csv cannot be read: No such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"Explanations 'a\\x00b' cannot be read: .*null"):
        read("a\0b")


# JSON


def test_json_is_an_object_of_texts_or_of_objects(file):
    content = {
        "10": {"title": "Dogs", "description": "they bark", "examples": [{"a": 1}], "Examples": [["a"]]},
        "3": "cats",
        "4": ["one", {"label": "two", "notes": "by me"}],
    }
    found = read(file(json.dumps(content), "labels.JSON"))
    assert list(found) == [3, 4, 10]
    assert found[4] == [Explanation("one"), Explanation("two", notes="by me")]
    assert found[10] == [Explanation("Dogs: they bark")]
    assert texts(file("\ufeff" + json.dumps(content), "labels.json"))[3] == ["cats"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "are no JSON: "),
        ("[" * 100_000, "are no JSON: "),
        ("[1]", "are no JSON object of texts by index"),
        ('"3"', "are no JSON object"),
        ('{"3": "a", "3": "b"}', r"labels\.json, key '3': latent 3 has been labelled before, by .*key '3'"),
        ('{"3": "a", "03": "b"}', "key '03': latent 3 has been labelled before"),
        ('{"a": "b"}', "key 'a': 'a' is no latent's index"),
        ('{"3": null}', "key '3': 'None' is no label: a text, or an object with label or description"),
        ('{"3": 4}', "key '3': '4' is no label"),
        ('{"3": {}}', "key '3': An explanation has no text"),
        ('{"3": {"category": "x"}}', "key '3': An explanation has no text"),
        ('{"3": {"label": 4}}', "key '3': Its label is 4, and no text"),
        ('{"3": {"label": "a", "notes": [1]}}', "key '3': Its notes is"),
        ('{"3": {"label": "a", "Label": "b"}}', "key '3': It has label twice, as 'label' and 'Label', and one of them"),
        ('{"3": {"label": "a", "label": "a"}}', "key '3': It has label twice, as 'label' and 'label'"),
        ('{"3": [{"type_name": "a", "type-name": "b", "text": "c"}]}', "key '3': It has type_name twice"),
        ('{"3": {"label": {"text": "a"}}}', "key '3': Its label is an object, and no text"),
        ('{"3": [["a"]]}', "key '3': .* is no label"),
        ('{"3": []}', "key '3': latent 3 has a label without text"),
        ('{"3": ""}', "key '3': An explanation has no text"),
        ('{"100": "a"}', "key '100': there is no latent 100"),
    ],
)
def test_what_is_wrong_with_json_is_named_with_its_key(content, reason, file):
    with pytest.raises(DataError, match=reason):
        read(file(content, "labels.json"))


# Memory


def test_a_mapping_may_hold_any_form_of_label():
    label = FeatureLabel(index=2, label="cats", description="they purr", source="A", alternatives={"B": "lions"})
    source = {np.int64(1): "a", "2": label, 3: [Explanation("x"), "y"], 4: ("p", "q")}
    assert texts(source) == {1: ["a"], 2: ["cats: they purr", "lions"], 3: ["x", "y"], 4: ["p", "q"]}
    assert [one.notes for one in read(source)[2]] == ["A", "B"]
    assert read({}) == {}
    assert texts({0: ["a", "a ", "b"]}) == {0: ["a", "b"]}


@pytest.mark.parametrize("source", [None, 5, [("a", "b")], {3}, b"labels.csv", np.zeros(3)])
def test_what_is_no_source_of_labels_is_said_to_be_none(source):
    with pytest.raises(DataError, match="Explanations are a file, 'catalogue' or a mapping, not "):
        read(source)


def test_an_object_in_memory_may_not_say_the_same_twice():
    with pytest.raises(DataError, match="key 3: It has label twice, as 'label' and 'LABEL'"):
        read({3: {"label": "a", "LABEL": "b"}})


def test_labels_for_a_folder_are_held_against_its_sae(tmp_path, catalogue):
    sae = sample.settings(20)["sae"] | {"release": "macar", "sae_id": "layer_45"}
    ours = Dashboards(sample.write_dashboards(tmp_path / "ours", sae=sae))
    assert labels_of(ours, {19: "a"}, type_name="t", model_name="m") == {19: [Explanation("a", "t", "m")]}
    with pytest.raises(DataError, match="there is no latent 20; they are 0 to 19"):
        labels_of(ours, {20: "a"})
    catalogue("labels.json", {"5": {"title": "Lists"}})
    assert labels_of(ours, "catalogue") == {5: [Explanation("Lists", notes="GPT-4 (macar)")]}
    sample.write_dashboards(tmp_path / "theirs", schema=None)
    theirs = Dashboards(tmp_path / "theirs")
    assert labels_of(theirs, {10**6: "a"}) == {10**6: [Explanation("a")]}
    with pytest.raises(ConfigError, match="state release and sae_id"):
        labels_of(theirs, "catalogue")


@pytest.mark.parametrize("key", [True, 1.0, None, "x", (1,)])
def test_a_key_that_is_no_index_is_named(key):
    with pytest.raises(DataError, match="is no latent's index"):
        read({key: "a"})


def test_of_an_sae_whose_width_nobody_knows_only_negative_indices_are_wrong():
    assert texts({10**9: "a"}, d_sae=None) == {10**9: ["a"]}
    with pytest.raises(DataError, match=r"there is no latent -1\.$"):
        read({-1: "a"}, d_sae=None)


def test_text_is_such_that_a_database_holds_it():
    assert Explanation(" a\0b \n").text == "a b"
    assert Explanation("a\ud83db\ude00").text == "a\ufffdb\ufffd"
    assert Explanation("\ud83d\ude00").text == "😀"
    assert Explanation("a", type_name=" ", notes="\ud83d").type_name is None
    for empty in ("", " \n", "\0"):
        with pytest.raises(DataError, match="no text"):
            Explanation(empty)
    with pytest.raises(DataError, match="text is '7', and no text"):
        Explanation(7)


# The catalogue


def test_labels_of_two_labellers_come_along_with_who_they_are(catalogue):
    record = {"feature_id": 7, "layer": 27, "claude_label": "French towns", "gpt_label": "places in France"}
    bare = {"feature_id": 2, "layer": 27, "claude_label": None, "gpt_label": None}
    only = {"feature_id": 3, "layer": 27, "claude_label": "", "gpt_label": "x"}
    other = {"feature_id": 9, "layer": 28, "claude_label": "not of this layer"}
    catalogue("features.json", [record, bare, only, other])
    assert read("catalogue", release="adam", sae_id="layer_27") == {
        3: [Explanation("x", notes="gpt (adam)")],
        7: [Explanation("French towns", notes="claude (adam)"), Explanation("places in France", notes="gpt (adam)")],
    }


def test_titles_and_descriptions_of_a_release_come_along(catalogue):
    catalogue(
        "labels.json", {"5": {"title": "Lists", "description": "items of lists", "examples": []}, "1": {"title": "T"}}
    )
    found = read("catalogue", release="macar", sae_id="layer_45", type_name="np_max-act")
    assert found == {
        1: [Explanation("T", "np_max-act", notes="GPT-4 (macar)")],
        5: [Explanation("Lists: items of lists", "np_max-act", notes="GPT-4 (macar)")],
    }
    catalogue("map.json", {"mappings": {"a": {"sae_index": 9, "dict_index": 41, "label": "Elated"}}})
    assert read("catalogue", release="metta", sae_id="layer_29") == {
        9: [Explanation("Elated", notes="automated probing (metta)")]
    }


def test_a_release_without_labels_says_so(catalogue):
    with pytest.raises(SAEError, match=r"adam has no labels of layer_28\. SAEs of adam that have some: layer_27"):
        read("catalogue", release="adam", sae_id="layer_28")
    with pytest.raises(SAEError, match="loupe states examples of its features and no labels"):
        read("catalogue", release="loupe", sae_id="layer_1")
    with pytest.raises(UnknownNameError, match="Did you mean 'adam'"):
        read("catalogue", release="adams", sae_id="layer_1")
    with pytest.raises(ConfigError, match="state release and sae_id"):
        read("catalogue")


# Files of interp.label_files


def test_files_of_labels_are_read_with_who_stated_what(tmp_path):
    label = FeatureLabel(index=7, label="cats", description="they purr", source="A", alternatives={"B": "lions"})
    bare = FeatureLabel(index=3, source="nobody", facts={"freq": 0.1})
    files = write_labels([label, bare], tmp_path, LabelCard(title="Labels"))
    for path in (files.jsonl, str(files.parquet)):
        found = read(path, type_name="t")
        assert found == {7: [Explanation("cats: they purr", "t", notes="A"), Explanation("lions", "t", notes="B")]}
    with pytest.raises(DataError, match=r"labels\.jsonl, line 1: there is no latent 7; they are 0 to 6"):
        read(files.jsonl, d_sae=7)
    files.jsonl.write_text('{"index": 1, "source": "s", "label": "a"}\n' * 2)
    with pytest.raises(DataError, match=r"line 2: latent 1 has been labelled before, by .*line 1"):
        read(files.jsonl)
    with pytest.raises(ConfigError, match="there is no such file"):
        read(tmp_path / "none.parquet")
