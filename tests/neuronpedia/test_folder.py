"""Reading dashboards: our own, sae-dashboard's, and what a kill or a hand has left."""

import json

import pytest

from sae_lens_gemma4.errors import DataError, SAEError
from sae_lens_gemma4.neuronpedia.folder import Dashboards
from tests.neuronpedia import sample


@pytest.fixture
def ours(tmp_path):
    return sample.write_dashboards(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path):
    """The same as sae-dashboard leaves it: its settings have no schema, and nothing lies beside its own files."""
    folder = sample.write_dashboards(tmp_path / "theirs")
    for name in ("latents.json", "nearest.json"):
        (folder / name).unlink()
    (folder / "run_settings.json").write_text(json.dumps({"sae_set": "x", "np_set_name": "y", "n_prompts_total": 5}))
    return folder


def content(folder, name):
    return json.loads((folder / name).read_text())


def settings_with(place, value):
    whole = sample.settings(20)
    *around, last = place.split(".")
    part = whole
    for key in around:
        part = part[key]
    part[last] = value
    return whole


def test_ours_are_read_whole(ours):
    found = Dashboards(ours)
    assert found.ours and found.header == sample.HEADER and found.dead == [3, 11]
    assert [f["feature_index"] for f in found.features()] == [i for i in range(20) if i not in (3, 11)]
    assert [len(batch) for batch in found.batches()] == [7, 7, 4]
    assert found.nearest["indices"][19] == [0, 1, 2]


@pytest.mark.parametrize("index", [0, 7, 8, 12, 19])
def test_a_latent_is_found_by_its_place_as_in_its_batch(index, ours, theirs):
    expected = next(f for f in content(ours, f"batch-{index // 8}.json")["features"] if f["feature_index"] == index)
    assert Dashboards(ours).feature(index) == expected == Dashboards(theirs).feature(index)


def test_a_latent_without_dashboard_says_why(ours):
    with pytest.raises(SAEError, match=r"Latent 3 has no dashboard in .*: it never fired on this text"):
        Dashboards(ours).feature(3)
    with pytest.raises(SAEError, match=r"Latent 20 has no dashboard in .*: there is no such latent"):
        Dashboards(ours).feature(20)


def test_what_a_list_shows_is_the_same_with_and_without_a_file_of_it(ours, theirs):
    here, there = Dashboards(ours).latents, Dashboards(theirs).latents
    for name in ("index", "density", "max", "token", "logit", "file"):
        assert here[name] == there[name], name
    first = content(ours, "batch-0.json")["features"][0]
    top = max(first["activations"], key=lambda a: max(a["values"]))
    assert (here["max"][0], here["logit"][0]) == (max(top["values"]), first["pos_str"][0])
    assert here["token"][0] == top["tokens"][top["values"].index(max(top["values"]))]


def test_sae_dashboard_s_have_its_header_and_no_neighbours(theirs):
    found = Dashboards(theirs)
    assert not found.ours and found.header == sample.HEADER and found.dead == [3, 11]
    assert found.nearest == {"indices": [], "cosine": []}
    assert len(list(found.features())) == 18
    (theirs / "skipped_indexes.json").unlink()
    (theirs / "run_settings.json").unlink()
    assert Dashboards(theirs).dead == [] and Dashboards(theirs).settings == {}


def test_batches_go_by_number_and_not_by_name(tmp_path):
    folder = sample.write_dashboards(tmp_path / "d", d_sae=36, dead=(), per_file=3)
    assert [p.name for p in Dashboards(folder).files] == [f"batch-{n}.json" for n in range(12)]
    assert [f["feature_index"] for f in Dashboards(folder).features()] == list(range(36))


def test_a_folder_of_dead_latents_alone_is_one(tmp_path):
    folder = sample.write_dashboards(tmp_path / "d", d_sae=4, dead=range(4))
    for file in folder.glob("batch-*.json"):
        file.unlink()
    assert Dashboards(folder).dead == [0, 1, 2, 3] and list(Dashboards(folder).features()) == []


def test_what_is_no_folder_of_dashboards_is_said_to_be_none(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("none", "file", "empty", "a\0b"):
        with pytest.raises(DataError, match=f"{name} is no folder of dashboards"):
            Dashboards(tmp_path / name)


def test_dashboards_that_are_not_finished_are_not_read(tmp_path):
    folder = sample.write_dashboards(tmp_path / "d", complete=False)
    with pytest.raises(DataError, match=r"are not finished\. The call that made them goes on"):
        Dashboards(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_batch_that_a_kill_cut_off_is_named(share, ours, theirs):
    for folder, reason in ((ours, "is gone, or shorter"), (theirs, "is not whole, or no JSON")):
        file = folder / "batch-1.json"
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=rf"batch-1\.json {reason}"):
            list(Dashboards(folder).features())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "does not hold an object"),
        ('{"model_id": "x"}', "has no list of features, each dict"),
        ('{"features": {}}', "has no list of features"),
        ("[" * 100_000, "is not whole, or no JSON"),
        ("\x00\x01", "is not whole, or no JSON"),
    ],
)
def test_a_file_that_is_no_batch_is_named(text, reason, theirs):
    (theirs / "batch-1.json").write_text(text)
    with pytest.raises(DataError, match=rf"batch-1\.json {reason}"):
        list(Dashboards(theirs).features())


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("offset"),
        lambda c: c.update(index=5),
        lambda c: c["index"].pop(),
        lambda c: c["length"].__setitem__(0, "7"),
        lambda c: c["file"].__setitem__(0, "../../x"),
        lambda c: c.clear(),
    ],
)
def test_an_index_that_is_not_as_it_was_written_is_named(change, ours):
    columns = json.loads((ours / "latents.json").read_text())
    change(columns)
    (ours / "latents.json").write_text(json.dumps(columns))
    with pytest.raises(DataError, match=r"latents\.json|/x is gone"):
        Dashboards(ours)
    (ours / "latents.json").unlink()
    with pytest.raises(DataError, match=r"has no latents\.json"):
        Dashboards(ours)


@pytest.mark.parametrize("name", ["run_settings.json", "skipped_indexes.json"])
def test_settings_that_cannot_be_read_are_named(name, ours):
    (ours / name).write_text("{")
    with pytest.raises(DataError, match=f"{name} is not whole"):
        Dashboards(ours)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("sae", [1], r"sae is \[1\], and no object"),
        ("sae", None, "sae is nothing, and no object"),
        ("model", "gemma", "model is 'gemma', and no object"),
        ("corpus", 5, "corpus is 5, and no object"),
        ("layer", "21", "layer is '21', and no integer"),
        ("layer", True, "layer is True, and no integer"),
        ("model_id", 5, "model_id is 5, and no text"),
        ("n_tokens", None, "n_tokens is nothing, and no integer"),
        ("n_prompts_total", 1.5, "n_prompts_total is 1.5, and no integer"),
        ("n_tokens_in_prompt", "32", "n_tokens_in_prompt is '32', and no integer"),
        ("sae.d_sae", None, "sae.d_sae is nothing, and no integer"),
        ("sae.d_in", "8", "sae.d_in is '8', and no integer"),
        ("sae.hook_name", None, "sae.hook_name is nothing, and no text"),
        ("sae.release", ["a"], r"sae.release is \['a'\], and no text"),
        ("sae.config", "topk", "sae.config is 'topk', and no object"),
        ("sae.config.metadata", [], r"sae.config.metadata is \[\], and no object"),
        ("model.name", 5, "model.name is 5, and no text"),
        ("model.n_layers", "42", "model.n_layers is '42', and no integer"),
    ],
)
def test_a_setting_of_another_kind_is_named(place, value, reason, ours):
    (ours / "run_settings.json").write_text(json.dumps(settings_with(place, value)))
    with pytest.raises(DataError, match=rf"run_settings\.json: {reason}\. Make the dashboards again"):
        Dashboards(ours)


@pytest.mark.parametrize(
    ("place", "value"), [("model.name", None), ("sae.config", None), ("sae.config.metadata", None), ("layer", None)]
)
def test_a_setting_that_may_be_empty_is_let_be(place, value, tmp_path):
    folder = sample.write_dashboards(tmp_path / "d", **settings_with(place, value))
    assert Dashboards(folder).ours


@pytest.mark.parametrize(
    "found", [{"indices": None}, {"indices": [1]}, {"cosine": {"a": []}}, {"cosine": "x"}, {"cosine": [[], None]}]
)
def test_neighbours_that_are_no_lists_of_lists_are_named(found, ours):
    (ours / "nearest.json").write_text(json.dumps({"indices": [], "cosine": []} | found))
    with pytest.raises(DataError, match=rf"nearest\.json has no list of {next(iter(found))}, each a list"):
        _ = Dashboards(ours).nearest


@pytest.mark.parametrize("skipped", ["null", "3", '["a"]', "[1.5]", "[true]"])
def test_a_list_of_dead_latents_that_is_none_is_named(skipped, ours):
    (ours / "skipped_indexes.json").write_text(f'{{"skipped_indexes": {skipped}}}')
    with pytest.raises(DataError, match=r"skipped_indexes\.json has no list of skipped_indexes"):
        Dashboards(ours)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("file", [1] * 18, "has a column file of something else than texts"),
        ("file", [[]] * 18, "has a column file of something else than texts"),
        ("offset", ["0"] * 18, "has a column offset of something else than integers"),
        ("length", [True] * 18, "has a column length of something else than integers"),
        ("index", [0] * 17, "has not the columns index, .*, as long as each other"),
        ("density", None, "has not the columns index"),
    ],
)
def test_places_of_dashboards_that_are_none_are_named(column, value, reason, ours):
    (ours / "latents.json").write_text(json.dumps(content(ours, "latents.json") | {column: value}))
    with pytest.raises(DataError, match=rf"latents\.json {reason}"):
        Dashboards(ours)


def test_our_dashboards_of_which_a_file_was_lost_are_not_read(ours):
    (ours / "batch-2.json").unlink()
    with pytest.raises(DataError, match=r"batch-2\.json is gone, or shorter than latents\.json says"):
        Dashboards(ours)
    (ours / "latents.json").unlink()
    with pytest.raises(DataError, match=r"ours has no latents\.json\. Make the folder again"):
        Dashboards(ours)
