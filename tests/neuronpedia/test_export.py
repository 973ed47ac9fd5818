"""The import folder: a real PostgreSQL takes it, with the site's own rules for what goes in."""

import copy
import gzip
import inspect
import json
import os
import warnings
from contextlib import suppress
from datetime import datetime, timedelta, timezone

import pytest
import yaml
from sae_lens.loading import pretrained_saes_directory

from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.errors import ConfigError, DataError, Gemma4SAEError, MismatchWarning, UnknownNameError
from sae_lens_gemma4.neuronpedia import cells, row_files
from sae_lens_gemma4.neuronpedia.export import export_neuronpedia
from sae_lens_gemma4.neuronpedia.folder import Dashboards
from sae_lens_gemma4.neuronpedia.listing import place_of
from sae_lens_gemma4.neuronpedia.names import UnknownModelWarning
from sae_lens_gemma4.neuronpedia.row_files import RowFiles, latents_per_file
from tests.neuronpedia import postgres, sample
from tests.support import required_module

DECODERESEARCH = "gemma-4-e4b-res-matryoshka-decoderesearch"
EMBEDDED, EMBEDDED_ID = "gemma-4-demo-res-matryoshka-embedded", "layer_3_width_2k_l0_16"
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678_000, timezone.utc)
LOCAL = {
    "release": "my-saes", "sae_id": "layer_5_width_20_l0_4", "hf_repo_id": "me/saes", "hf_folder_id": "runs/a/layer_5",
    "release_title": "My SAEs", "creator_name": "Me", "set_name": "me-topk-res-20",
}  # fmt: skip


@pytest.fixture(scope="module")
def uri():
    required_module("pgserver")
    required_module("psycopg")
    with postgres.server() as found:
        yield found


@pytest.fixture
def db(uri, request):
    with postgres.database(uri, request.node.name[:60]) as connection:
        yield connection


@pytest.fixture
def dashboards(tmp_path):
    return sample.write_dashboards(tmp_path / "dashboards")


def export(folder, out, **facts):
    return export_neuronpedia(folder, out, **{"created_at": MOMENT, "progress": False} | facts)


def settings(**changed):
    """The sample's, with parts of its own parts changed."""
    found = sample.settings(20)
    for part, values in changed.items():
        found[part] = found[part] | values
    return {part: found[part] for part in changed}


def local(path, layer=5, **sae):
    """A folder whose SAE nobody knows."""
    sae = {"release": None, "sae_id": None, "hook_name": "blocks.5.hook_resid_post"} | sae
    return sample.write_dashboards(path, sae_set="", layer=layer, **settings(sae=sae))


def lines(folder, kind):
    found = []
    for path in sorted((folder / kind).glob("*"), key=lambda p: int(p.name.split("-")[1].split(".")[0])):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found += [json.loads(line) for line in file.read().split("\n") if line]
    return found


def row(folder, name):
    return json.loads((folder / f"{name}.jsonl").read_text())


def edit(folder, change, file="batch-1.json", **dumps):
    """Change a batch as its JSON; it stays as long as `latents.json` says."""
    text = (folder / file).read_text()
    content = json.loads(text)
    change(content["features"])
    (folder / file).write_text(json.dumps(content, **dumps).ljust(len(text.encode())))


def foreign(path, change=lambda features: None, stated=None, **header):
    """The same dashboards as sae-dashboard leaves them: other settings, and nothing beside its own files."""
    folder = sample.write_dashboards(path, **header)
    for name in ("latents.json", "nearest.json"):
        (folder / name).unlink()
    theirs = {"sae_set": "x", "sae_path": "y", "n_prompts_total": 24576, "n_tokens_in_prompt": 128, **(stated or {})}
    (folder / "run_settings.json").write_text(json.dumps(theirs | {"huggingface_dataset_path": "monology/pile"}))
    for file in folder.glob("batch-*.json"):
        edit(folder, change, file.name)
    return folder


MODEL = {
    "model_name": "google/gemma-4-E4B", "n_layers": 42, "d_model": 2560, "d_mlp": 10240,
    "sae_config": {"architecture": "topk"},
}  # fmt: skip
OF_FOREIGN = {"release": DECODERESEARCH, "sae_id": "layer_21_width_65k_l0_100", **MODEL}


def test_postgresql_takes_every_row_and_holds_what_the_dashboards_say(dashboards, tmp_path, db):
    labels = {0: "first", 3: "of a dead one", 19: {"title": "Last", "description": "of them"}}
    done = export(dashboards, tmp_path / "out", explanations=labels)
    postgres.import_folder(db, done)

    features = {f["feature_index"]: f for f in Dashboards(dashboards).features()}
    examples = sum(len(f["activations"]) for f in features.values())
    assert (done.features, done.dead, done.absent, done.activations, done.explanations) == (18, 2, 0, examples, 3)
    assert postgres.counts(db) == {
        "SourceRelease": 1, "Model": 1, "SourceSet": 1, "Source": 1,
        "Neuron": 20, "Activation": examples, "Explanation": 3,
    }  # fmt: skip
    (model,) = postgres.rows(db, "Model", "id")
    assert (model["layers"], model["neuronsPerLayer"], model["dimension"]) == (42, 10240, 2560)
    assert (model["id"], model["owner"], model["instruct"]) == ("gemma-4-e4b", "Google", False)
    (source,) = postgres.rows(db, "Source", "id")
    assert (source["hfRepoId"], source["hfFolderId"]) == (
        "decoderesearch/gemma-4-saes",
        "gemma-4-e4b/btk-mat-layer-21-k-100",
    )
    assert (source["saelensRelease"], source["saelensSaeId"]) == (DECODERESEARCH, "layer_21_width_65k_l0_100")
    assert source["saelensConfig"] == {"architecture": "jumprelu", "d_in": 8, "d_sae": 20}
    assert (source["num_prompts"], source["num_tokens_in_prompt"], source["dataset"]) == (64, 32, "embedded:text")
    neurons = {int(n["index"]): n for n in postgres.rows(db, "Neuron", "index")}
    for index, feature in features.items():
        neuron = neurons[index]
        for name in feature.keys() & neuron.keys() - {"vector"}:
            assert neuron[name] == feature[name], name
        shown = postgres.rows(db, "Activation", "id", index=str(index))
        most = max(max(a["values"]) for a in feature["activations"])
        assert (
            neuron["maxActApprox"] == neuron["vectorDefaultSteerStrength"] == most == max(a["maxValue"] for a in shown)
        )
        assert (neuron["hookName"], neuron["sourceSetName"]) == ("blocks.21.hook_resid_post", "matryoshka-res-65k")
        assert neuron["topkCosSimIndices"] == [(index + step) % 20 for step in (1, 2, 3)]
        assert neuron["topkCosSimValues"] == [0.5, 0.25, 0.125]
        assert (neuron["hasVector"], neuron["vector"]) == (False, [])

        def key(tokens, values, low, high, contains, at):
            return (tokens, values, low, high, contains, at)

        theirs = sorted(
            key(a["tokens"], a["values"], a["binMin"], a["binMax"], a["binContains"], a["qualifyingTokenIndex"])
            for a in shown
        )
        assert theirs == sorted(
            key(a["tokens"], a["values"], a["bin_min"], a["bin_max"], a["bin_contains"], a["qualifying_token_index"])
            for a in feature["activations"]
        )
        for a in shown:
            assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
            assert a["minValue"] == min(a["values"])
    texts = {e["index"]: e["description"] for e in postgres.rows(db, "Explanation", "index")}
    assert texts == {"0": "first", "3": "of a dead one", "19": "Last: of them"}
    assert neurons[3]["createdAt"] == source["createdAt"] == MOMENT.replace(tzinfo=None)


def test_a_dead_latent_has_a_row_that_says_nothing_but_its_neighbours(dashboards, tmp_path, db):
    postgres.import_folder(db, export(dashboards, tmp_path / "out"))
    for index in (3, 11):
        (neuron,) = postgres.rows(db, "Neuron", "index", index=str(index))
        assert (neuron["frac_nonzero"], neuron["maxActApprox"]) == (0, 0)
        assert neuron["topkCosSimIndices"] == [index + 1, index + 2, index + 3]
        lists = [name for name, value in neuron.items() if isinstance(value, list) and value]
        assert lists == ["topkCosSimIndices", "topkCosSimValues"]
        assert postgres.rows(db, "Activation", "id", index=str(index)) == []


def test_importing_twice_changes_nothing(dashboards, tmp_path, db):
    done = export(dashboards, tmp_path / "out", explanations={0: ["one", "two"]})
    postgres.import_folder(db, done)
    before = {table: postgres.rows(db, table, "createdAt") for table in postgres.IMPORTED}
    postgres.import_folder(db, done)
    after = {table: postgres.rows(db, table, "createdAt") for table in postgres.IMPORTED}
    assert before == after and len(after["Explanation"]) == 2


def test_two_saes_of_a_release_share_its_rows_and_no_ids(tmp_path, db):
    one = sample.write_dashboards(tmp_path / "a")
    two = sample.write_dashboards(
        tmp_path / "b",
        layer=7,
        **settings(sae={"sae_id": "layer_7_width_65k_l0_100", "hook_name": "blocks.7.hook_resid_post"}),
    )
    for folder in (one, two):
        postgres.import_folder(db, export(folder, tmp_path / "out", explanations={0: "same"}))
    found = postgres.counts(db)
    assert [found[t] for t in ("SourceRelease", "Model", "SourceSet", "Source")] == [1, 1, 1, 2]
    assert (found["Neuron"], found["Activation"], found["Explanation"]) == (40, 2 * 144, 2)
    assert {s["id"] for s in postgres.rows(db, "Source", "id")} == {"7-matryoshka-res-65k", "21-matryoshka-res-65k"}


def test_every_line_has_the_columns_of_the_first_and_all_are_columns(dashboards, tmp_path):
    done = export(dashboards, tmp_path / "out", explanations={0: "a", 3: {"label": "b", "notes": "c"}})
    for kind, table in postgres.BATCHES.items():
        found = lines(done.folder, kind)
        assert {tuple(line) for line in found} == {tuple(found[0])}
        assert set(found[0]) <= set(postgres.TABLES["tables"][table]["columns"])
    assert len({line["id"] for line in lines(done.folder, "activations")}) == done.activations
    assert all(len(line["id"]) == 25 and line["id"][0] == "c" for line in lines(done.folder, "activations"))


def test_the_tables_refuse_what_the_site_would_refuse(dashboards, tmp_path, db):
    psycopg = pytest.importorskip("psycopg")
    done = export(dashboards, tmp_path / "out")
    for name, changed, reason in (
        ("release", {"hugged": 1}, "Unknown argument 'hugged' of SourceRelease"),
        ("model", {"layers": None}, "Model.layers is integer not null and not None"),
        ("sourceset", {"urls": None}, "SourceSet.urls"),
        ("source", {"visibility": "SECRET"}, "Source.visibility"),
    ):
        broken = tmp_path / name / "x"
        broken.mkdir(parents=True)
        for file in done.folder.glob("*.jsonl"):
            text = json.loads(file.read_text()) | (changed if file.stem == name else {})
            (broken / file.name).write_text(json.dumps(text))
        with pytest.raises(postgres.RefusedError, match=reason):
            postgres.import_folder(db, broken)
    postgres.import_folder(db, done)
    label = {"id": "c1", "modelId": "gemma-4-e4b", "layer": "21-matryoshka-res-65k", "description": "x"}
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        postgres.insert_lines(db, "Explanation", json.dumps(label | {"index": "20", "authorId": postgres.CREATOR}))
    unknown = label | {"index": "3", "authorId": postgres.CREATOR, "typeName": "unheard-of"}
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        postgres.insert_lines(db, "Explanation", json.dumps(unknown))


@pytest.mark.parametrize(
    "name", [sae.neuronpedia for r in releases().values() for sae in r.saes if sae.neuronpedia is not None]
)
def test_ids_in_use_are_written_as_they_are(name, tmp_path):
    ((release, entry),) = [(r, s) for r in releases().values() for s in r.saes if s.neuronpedia == name]
    model_id, source_id = name.split("/")
    layer, set_name = source_id.split("-", 1)
    facts = {"release": release.name, "sae_id": entry.id, "hook_name": entry.hook, "d_sae": entry.d_sae or 65_536}
    header = {"model_id": model_id, "layer": int(layer), "sae_set": set_name}
    folder = sample.write_dashboards(
        tmp_path / "d", **header, **settings(sae=facts, model={"name": release.model, "n_layers": 60})
    )
    stated = {"release": release.name, "sae_id": entry.id}
    theirs = foreign(tmp_path / "f", **header | {"sae_set": release.name})  # without a set name, the release's is there
    given = MODEL | {"model_name": release.model, "n_layers": 60, "sae_config": {"d_sae": 65_536}} | stated
    for n, (dashboards, facts) in enumerate([(folder, {}), (folder, stated), (theirs, given)]):
        done = export(dashboards, tmp_path / f"out{n}", **facts).folder
        assert done == tmp_path / f"out{n}" / model_id / source_id
        assert (
            row(done, "model")["id"] == row(done, "sourceset")["modelId"] == row(done, "source")["modelId"] == model_id
        )
        assert row(done, "sourceset")["name"] == row(done, "source")["setName"] == set_name
        assert row(done, "source")["id"] == source_id
        for kind in ("features", "activations"):
            assert {(line["modelId"], line["layer"]) for line in lines(done, kind)} == {(model_id, source_id)}


def found_by_the_inference_server(text, tmp_path, monkeypatch, model, source):
    """What its config.py looks for in sae_lens's list: rows of this model whose id ends with this source."""
    (tmp_path / "pretrained_saes.yaml").write_text(text)
    monkeypatch.setattr(pretrained_saes_directory, "files", lambda package: tmp_path)
    known = inspect.unwrap(pretrained_saes_directory.get_pretrained_saes_directory)()
    return [
        (r.release, sae_id, r.repo_id, r.saes_map[sae_id], r.conversion_func)
        for r in known.values()
        for sae_id, name in r.neuronpedia_id.items()
        if r.model == model and name is not None and name.endswith(f"/{source}")
    ]


def test_the_inference_server_finds_just_one_sae_by_the_upstream_row(dashboards, tmp_path, monkeypatch):
    done = export(dashboards, tmp_path / "out").folder
    text = (done / "pretrained_saes.yaml").read_text()
    found = found_by_the_inference_server(text, tmp_path, monkeypatch, "google/gemma-4-E4B", "21-matryoshka-res-65k")
    assert found == [
        (
            DECODERESEARCH,
            "layer_21_width_65k_l0_100",
            "decoderesearch/gemma-4-saes",
            "gemma-4-e4b/btk-mat-layer-21-k-100",
            None,
        )
    ]


def test_a_local_sae_is_asked_about_by_name_and_all_at_once(tmp_path, monkeypatch, db):
    folder = local(tmp_path / "d")
    with pytest.raises(ConfigError) as e:
        export(folder, tmp_path / "out")
    asked = [name for name in LOCAL if f" {name} (" in str(e.value)]
    assert asked == list(LOCAL) and "n_layers" not in str(e.value) and not (tmp_path / "out").exists()
    for name in LOCAL:
        with pytest.raises(ConfigError, match=rf"State {name} \([^;]*\)\. From the command line: --set"):
            export(folder, tmp_path / "out", **{k: v for k, v in LOCAL.items() if k != name})

    done = export(folder, tmp_path / "out", **LOCAL).folder
    postgres.import_folder(db, done)
    source = row(done, "source")
    assert (source["saelensRelease"], source["hfRepoId"], source["hfFolderId"]) == (
        "my-saes",
        "me/saes",
        "runs/a/layer_5",
    )
    assert (source["id"], row(done, "sourceset")["description"]) == ("5-me-topk-res-20", "Residual Stream - 20")
    assert row(done, "release")["name"] == row(done, "sourceset")["releaseName"] == "my-saes"
    assert row(done, "release")["urls"] == ["https://huggingface.co/me/saes"]
    text = (done / "pretrained_saes.yaml").read_text()
    assert list(yaml.safe_load(text)["my-saes"]) == ["model", "repo_id", "saes"]
    found = found_by_the_inference_server(text, tmp_path, monkeypatch, "google/gemma-4-E4B", "5-me-topk-res-20")
    assert found == [("my-saes", "layer_5_width_20_l0_4", "me/saes", "runs/a/layer_5", None)]


def test_an_sae_after_the_final_norm_is_the_last_layer_s(tmp_path):
    done = export(local(tmp_path / "d", 41, hook_name="ln_final.hook_out"), tmp_path / "out", **LOCAL)
    assert done.name == "gemma-4-e4b/41-me-topk-res-20"
    assert row(done.folder, "sourceset")["description"] == "After the Final Norm - 20"
    assert lines(done.folder, "features")[0]["hookName"] == "ln_final.hook_out"


def test_what_is_given_wins(dashboards, tmp_path):
    done = export(
        dashboards, tmp_path / "out", set_name="other-res-65k", suffix="l0-34", layer=20, creator_name="A",
        creator_email="a@b", urls=["https://c"], hf_folder_id="else/where", release_name="R-1", release_title="T",
        description="D", visibility="UNLISTED", notes="N", creator_id="clkht01d40000jv08hvalcvlx", owner="O", d_mlp=7,
    )  # fmt: skip
    assert done.name == "gemma-4-e4b/20-other-res-65k__l0-34"
    release, model, sourceset, source = (row(done.folder, n) for n in ("release", "model", "sourceset", "source"))
    assert release | {"name": "R-1", "description": "T", "creatorEmail": "a@b", "urls": ["https://c"]} == release
    assert model | {"owner": "O", "neuronsPerLayer": 7, "visibility": "UNLISTED"} == model
    assert (
        sourceset | {"name": "other-res-65k", "description": "D", "creatorName": "A", "releaseName": "R-1"} == sourceset
    )
    assert source | {"hfFolderId": "else/where", "notes": "N", "id": "20-other-res-65k__l0-34"} == source
    everyones = {line["creatorId"] for kind in ("features", "activations") for line in lines(done.folder, kind)}
    assert everyones == {"clkht01d40000jv08hvalcvlx"}


def test_what_this_package_carries_lies_on_no_hub(tmp_path, db):
    facts = {"release": EMBEDDED, "sae_id": EMBEDDED_ID, "hook_name": "blocks.3.hook_resid_post", "d_sae": 20}
    folder = sample.write_dashboards(
        tmp_path / "d", model_id="gemma-4-demo", layer=3, sae_set="embedded-matryoshka-res-2k",
        **settings(sae=facts, model={"name": "gemma-4-demo", "n_layers": 6, "d_mlp": 192}),
    )  # fmt: skip
    with pytest.warns(UnknownModelWarning, match="gemma-4-demo.*support@neuronpedia.org"):
        done = export(folder, tmp_path / "out").folder
    postgres.import_folder(db, done)
    source = row(done, "source")
    assert (source["hfRepoId"], source["hfFolderId"], source["saelensRelease"]) == (None, None, EMBEDDED)
    assert row(done, "model")["owner"] == row(done, "release")["creatorName"] == "sae-lens-gemma4"
    assert not (done / "pretrained_saes.yaml").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownModelWarning)
        done = export(folder, tmp_path / "out", hf_repo_id="me/x", hf_folder_id="y").folder
    assert row(done, "source")["hfRepoId"] == "me/x"
    assert yaml.safe_load((done / "pretrained_saes.yaml").read_text())[EMBEDDED]["repo_id"] == "me/x"


def test_an_sae_whose_path_nobody_states_asks_for_it(tmp_path):
    facts = {
        "release": "gemma-4-31b-res-topk-adam1010",
        "sae_id": releases()["gemma-4-31b-res-topk-adam1010"].sae_ids[26],
    }
    folder = sample.write_dashboards(
        tmp_path / "d",
        model_id="gemma-4-31b",
        layer=26,
        sae_set="",
        **settings(sae=facts | {"hook_name": "blocks.26.hook_resid_post"}),
    )
    with pytest.raises(
        ConfigError, match=r"State hf_folder_id \(the folder of that repository, '' for its root\)\. From the"
    ):
        export(folder, tmp_path / "out")
    done = export(folder, tmp_path / "out", hf_folder_id="saes/l26")
    assert done.name == "gemma-4-31b/26-adam1010-topk-res-0k".replace("0k", "20")
    assert "path: saes/l26" in (done.folder / "pretrained_saes.yaml").read_text()


@pytest.mark.parametrize(
    ("repo_id", "expected"), [("Adam1010/gemma-4-31b-sae-features", "saes/l26/ae.pt"), ("a/b", None)]
)
def test_an_sae_that_was_searched_for_is_where_it_was_found(repo_id, expected, tmp_path):
    release = releases()["gemma-4-31b-res-topk-adam1010"]
    metadata = {"release": release.name, "repo_id": repo_id, "hf_path": "saes/l26/ae.pt"}
    sae = {"release": release.name, "sae_id": release.sae_ids[26], "hook_name": "blocks.26.hook_resid_post"}
    folder = sample.write_dashboards(
        tmp_path / "d", model_id="gemma-4-31b", layer=26, sae_set="a-topk-res-20",
        **settings(sae=sae | {"config": {"architecture": "topk", "metadata": metadata}}),
    )  # fmt: skip
    if expected is None:
        with pytest.raises(ConfigError, match=r"State hf_folder_id \([^;]*\)\. From"):
            export(folder, tmp_path / "out")
        return
    done = export(folder, tmp_path / "out").folder
    assert row(done, "source")["hfFolderId"] == expected
    assert f"path: {expected}" in (done / "pretrained_saes.yaml").read_text()
    assert row(done, "release")["description"] == "TopK SAEs on gemma-4-31B"
    assert row(export(folder, tmp_path / "out", hf_folder_id="x").folder, "source")["hfFolderId"] == "x"


def test_where_the_catalogue_states_a_path_that_of_the_file_yields(tmp_path):
    metadata = {"repo_id": "decoderesearch/gemma-4-saes", "hf_path": "found/sae_weights.safetensors"}
    folder = sample.write_dashboards(tmp_path / "d", **settings(sae={"config": {"d_sae": 20, "metadata": metadata}}))
    done = export(folder, tmp_path / "out").folder
    assert row(done, "source")["hfFolderId"] == "gemma-4-e4b/btk-mat-layer-21-k-100"
    assert row(done, "release")["description"] == "Matryoshka SAEs on gemma-4-E4B"


@pytest.mark.parametrize(
    ("stated", "written"), [("", ""), (".", ""), ("./", ""), ("/", ""), ("./a//b/", "a/b"), ("/a", "a")]
)
def test_a_folder_of_a_repository_may_be_its_root(stated, written, tmp_path):
    done = export(local(tmp_path / "d"), tmp_path / "out", **LOCAL | {"hf_folder_id": stated}).folder
    assert row(done, "source")["hfFolderId"] == written
    (sae,) = yaml.safe_load((done / "pretrained_saes.yaml").read_text())["my-saes"]["saes"]
    assert sae["path"] == (written or ".")


PARTS = {"model_id": "gemma-5", "layer": 2, "set_name": "s-65k", "suffix": "l0-9"}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("stated", [{}, *({key: value} for key, value in PARTS.items()), PARTS, {"suffix": ""}])
def test_what_an_export_is_called_is_what_the_folder_is_called(ours, stated, tmp_path):
    if ours:
        folder, given = sample.write_dashboards(tmp_path / "d", sae_id_suffix="l0-1"), {}
    else:
        folder = foreign(tmp_path / "d", stated={"np_set_name": "np-65k", "np_sae_id_suffix": "np"}, sae_id_suffix="l0")
        given = OF_FOREIGN
    named = {"model_id": "gemma-4-e4b", "layer": 21, "set_name": "matryoshka-res-65k", "suffix": "l0-1"}
    named |= {} if ours else {"set_name": "np-65k", "suffix": "np"}
    named |= stated
    end = f"__{named['suffix']}" if named["suffix"] else ""
    expected = f"{named['model_id']}/{named['layer']}-{named['set_name']}{end}"
    assert str(place_of(Dashboards(folder), stated)) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownModelWarning)
        assert export(folder, tmp_path / "out", **given, **stated).name == expected


def test_what_neither_the_caller_nor_the_folder_says_of_a_name_is_asked_for(tmp_path):
    ours = Dashboards(sample.write_dashboards(tmp_path / "a", sae_set="", layer=None))
    with pytest.raises(ConfigError, match="a does not say layer and set_name; state it"):
        place_of(ours, {"set_name": None})
    assert str(place_of(ours, {"set_name": "x", "layer": 0})) == "gemma-4-e4b/0-x"
    theirs = Dashboards(foreign(tmp_path / "b", sae_set=DECODERESEARCH, layer="7"))
    with pytest.raises(ConfigError, match="b does not say set_name; state it"):
        place_of(theirs, {})
    assert str(place_of(theirs, {"set_name": "x"})) == "gemma-4-e4b/7-x"
    for bad in ({"layer": "7"}, {"layer": True}, {"model_id": 5}, {"suffix": "a__b"}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))}|suffix 'a__b'"):
            place_of(theirs, {"set_name": "x", **bad})
    for header, reason in (
        ({"sae_set": 5}, "A set name is a text, and 5 is none"),
        ({"layer": [1]}, "Layers are integ"),
    ):
        with pytest.raises(ConfigError, match=reason):
            place_of(Dashboards(foreign(tmp_path / "c", **header)), {})


WRONG_KINDS = {
    "release": 5, "sae_id": 5, "hf_repo_id": ["a"], "hf_folder_id": 5, "explanation_type": 5, "explanation_model": b"m",
    "model_id": 5, "layer": True, "set_name": {}, "suffix": 5, "description": 5, "release_name": 5, "release_title": 5,
    "creator_name": 5, "creator_email": 5, "creator_id": 5, "urls": 5, "visibility": 5, "notes": 5, "model_name": 5,
    "owner": 5, "n_layers": 42.0, "d_model": "2560", "d_mlp": True, "hook_name": 5, "sae_config": [1],
    "created_at": "2026",
}  # fmt: skip


def test_an_argument_of_the_wrong_kind_is_named_before_anything_is_read(tmp_path):
    keywords = {p.name for p in inspect.signature(export_neuronpedia).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords - set(WRONG_KINDS) == {"explanations", "progress"}
    for name, value in WRONG_KINDS.items():
        with pytest.raises(ConfigError, match=f"^{name} must be "):
            export(tmp_path / "none", tmp_path / "out", **{name: value})
    for config, reason in (
        ({"metadata": 5}, "metadata must be an object"),
        ({"d_sae": "20"}, "d_sae must be an integ"),
    ):
        with pytest.raises(ConfigError, match=f"sae_config's {reason}"):
            export(tmp_path / "none", tmp_path / "out", sae_config=config)
    for places, name in (((5, "out"), "dashboards_dir"), (("a\0b", "out"), "dashboards_dir"), (("a", None), "out_dir")):
        with pytest.raises(ConfigError, match=f"{name} must be a path"):
            export(*places)


DAMAGED = [None, 5, -1, 1.5, "x", "", [], [1], {}, {"a": 1}, True]
KEYS = [
    *((key,) for key in sample.settings(20)),
    *((part, key) for part in ("sae", "model", "corpus") for key in sample.settings(20)[part]),
    ("sae", "config", "metadata"), ("sae", "config", "d_sae"),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_one_damaged_setting_is_an_error_in_words_or_none(key, tmp_path):
    folder = sample.write_dashboards(tmp_path / "d", d_sae=4, dead=(3,), per_file=4)
    whole = json.loads((folder / "run_settings.json").read_text())
    for value in [*DAMAGED, "gone"]:
        damaged = copy.deepcopy(whole)
        around = damaged
        for part in key[:-1]:
            around = around[part]
        around.pop(key[-1], None) if value == "gone" else around.update({key[-1]: value})
        (folder / "run_settings.json").write_text(json.dumps(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(Gemma4SAEError):  # and nothing else
                export(folder, tmp_path / "out", explanations={0: "a"})


@pytest.mark.parametrize("value", DAMAGED)
@pytest.mark.parametrize("name", ["indices", "cosine"])
def test_damaged_neighbours_are_an_error_in_words_or_none(name, value, dashboards, tmp_path):
    whole = json.loads((dashboards / "nearest.json").read_text())
    for damaged in (whole | {name: value}, whole | {name: [value] * 20}, whole | {name: [[value]] * 20}):
        (dashboards / "nearest.json").write_text(json.dumps(damaged))
        with suppress(DataError):  # and nothing else
            export(dashboards, tmp_path / "out")


def test_a_base_model_s_sae_read_on_the_tuned_model_is_listed_with_the_tuned(tmp_path):
    folder = sample.write_dashboards(
        tmp_path / "d", model_id="gemma-4-e4b-it", **settings(model={"name": "google/gemma-4-E4B-it"})
    )
    with pytest.warns(UnknownModelWarning):
        done = export(folder, tmp_path / "out")
    assert done.name == "gemma-4-e4b-it/21-matryoshka-res-65k"
    assert row(done.folder, "model")["instruct"] is True
    assert "model: google/gemma-4-E4B-it" in (done.folder / "pretrained_saes.yaml").read_text()


def test_another_sae_than_that_of_the_dashboards_is_refused(dashboards, tmp_path):
    facts = OF_FOREIGN | {"sae_id": "layer_7_width_65k_l0_100", "hook_name": "blocks.21.hook_resid_post"}
    with pytest.raises(
        ConfigError, match=r"blocks\.7\.hook_resid_post, and these dashboards are of an SAE with blocks\.21"
    ):
        export(foreign(tmp_path / "f"), tmp_path / "out", **facts)
    with pytest.raises(ConfigError, match="d_sae 65536, and these dashboards are of an SAE with 20"):
        export(dashboards, tmp_path / "out", sae_id="layer_7_width_65k_l0_100")
    with pytest.raises(UnknownNameError, match=f"Did you mean '{DECODERESEARCH}'"):
        export(dashboards, tmp_path / "out", release=DECODERESEARCH[:-1])
    with pytest.raises(UnknownNameError, match="layer_21_width_65k_l0_100"):
        export(dashboards, tmp_path / "out", sae_id="layer_21_width_65k_l0_10")
    with pytest.raises(ConfigError, match=r"State sae_id, one of .*: layer_7_width_65k_l0_100, layer_21"):
        export(foreign(tmp_path / "g"), tmp_path / "out", release=DECODERESEARCH)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"set_name": "Mine__65k"}, "refuses the set name 'Mine__65k'.*'mine-65k' would do"),
        ({"set_name": "neurons"}, "keeps that name"),
        ({"model_id": "Gemma 4"}, "refuses the model id"),
        ({"suffix": "l0 34"}, "refuses the suffix"),
        ({"release_name": "my.release_V1"}, r"release_name 'my\.release_V1' is .*; 'my-release-V1' would do"),
        ({"release_name": "_"}, "release_name '_' is a part of an address, which has letters, digits and '-'\\.$"),
        ({"hook_name": "blocks.7.hook_resid_post"}, "blocks.7.*these dashboards are of layer 21; state layer if both"),
        ({"layer": 42}, "has 42 layers, so there is no layer 42"),
        ({"layer": "21"}, "layer must be an integer of at least 0, not '21'"),
        ({"n_layers": 0}, "n_layers must be an integer of at least 1, not 0"),
        ({"urls": "https://a"}, "urls must be a list of addresses, not 'https://a'"),
        ({"urls": [1]}, "urls must be a list of addresses"),
        ({"creator_name": 5}, "creator_name must be a text, not 5"),
        ({"set_name": 5}, "set_name must be a text, not 5"),
        ({"visibility": "public"}, "Unknown visibility 'public'. Did you mean 'PUBLIC'"),
    ],
)
def test_what_neuronpedia_would_refuse_is_refused_before_anything_is_written(facts, reason, dashboards, tmp_path):
    with pytest.raises((ConfigError, UnknownNameError), match=reason):
        export(dashboards, tmp_path / "out", **facts)
    assert not (tmp_path / "out").exists()


def test_a_repeated_export_takes_the_place_of_the_first_when_it_is_complete(dashboards, tmp_path):
    first = export(dashboards, tmp_path / "out", notes="first").folder
    (first / "left_over.txt").touch()
    edit(dashboards, lambda features: features[-1].update(frac_nonzero=float("nan")), "batch-2.json")
    with pytest.raises(DataError, match="Latent 19: frac_nonzero is nan, which is no finite number"):
        export(dashboards, tmp_path / "out", notes="second")
    assert row(first, "source")["notes"] == "first"
    edit(dashboards, lambda features: features[-1].update(frac_nonzero=0.5), "batch-2.json")
    export(dashboards, tmp_path / "out", notes="third")
    assert row(first, "source")["notes"] == "third" and not (first / "left_over.txt").exists()
    assert [p.name for p in first.parent.iterdir()] == [first.name]


def test_a_folder_that_is_no_export_is_left_alone(dashboards, tmp_path):
    place = tmp_path / "out" / "gemma-4-e4b" / "21-matryoshka-res-65k"
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match="is there and is no export"):
        export(dashboards, tmp_path / "out")
    assert [p.name for p in place.parent.rglob("*")] == [place.name, "thesis.tex"]


def test_an_export_that_cannot_be_put_in_place_leaves_the_older_one(dashboards, tmp_path, monkeypatch):
    first = export(dashboards, tmp_path / "out", notes="first").folder
    rename = type(first).rename

    def full(path, target):
        if ".partial-" in path.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(type(first), "rename", full)
    with pytest.raises(ConfigError, match=r"cannot be written: No space left.*What was there before is kept"):
        export(dashboards, tmp_path / "out", notes="second")
    assert row(first, "source")["notes"] == "first" and len(list(first.parent.iterdir())) == 1


def test_the_same_dashboards_make_the_same_bytes(dashboards, tmp_path):
    one = export(dashboards, tmp_path / "a", explanations={0: "x"}).folder
    two = export(dashboards, tmp_path / "b", explanations={0: "x"}).folder
    files = [p.relative_to(one) for p in one.rglob("*") if p.is_file()]
    assert len(files) == 8 and all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    assert {p.read_bytes()[4:8] for p in one.rglob("*.gz")} == {bytes(4)}  # gzip's own time


@pytest.mark.parametrize("d_sae", [1, 127, 2048, 16_384, 65_536, 65_537, 131_072, 262_144, 1_048_576, 4_194_304])
def test_no_width_needs_more_files_than_the_import_lists(d_sae):
    assert latents_per_file(d_sae) >= 128 and -(-d_sae // latents_per_file(d_sae)) <= 512


def test_files_hold_few_latents_and_few_bytes(tmp_path, monkeypatch):
    folder = sample.write_dashboards(tmp_path / "d", d_sae=300, dead=range(128, 256), per_file=100)
    done = export(folder, tmp_path / "out", explanations={299: "x"}).folder
    assert sorted(p.name for p in (done / "features").iterdir()) == [f"batch-{n}.jsonl.gz" for n in range(3)]
    assert sorted(p.name for p in (done / "activations").iterdir()) == ["batch-0.jsonl.gz", "batch-1.jsonl.gz"]
    assert [p.name for p in (done / "explanations").iterdir()] == ["batch-0.jsonl.gz"]
    assert [int(line["index"]) for line in lines(done, "features")] == list(range(300))
    whole = lines(done, "activations")
    monkeypatch.setattr(row_files, "MAX_BYTES", 20_000)
    done = export(folder, tmp_path / "out").folder
    assert lines(done, "activations") == whole and len(list((done / "activations").iterdir())) > 50
    assert all(len(gzip.decompress(p.read_bytes())) <= 20_000 for p in done.rglob("*.gz"))
    monkeypatch.setattr(row_files, "MAX_FILES", 9)
    with pytest.raises(DataError, match="activations would need more than the 9 files"):
        export(folder, tmp_path / "out")
    with RowFiles(tmp_path / "none", 5) as none:
        none.write([])
    assert not (tmp_path / "none").exists()


def test_one_batch_of_dashboards_is_held_at_a_time(dashboards, tmp_path, monkeypatch):
    """Each is written before the next is read."""
    written, batches = [], Dashboards.batches
    write = RowFiles.write

    def counted(self, rows):
        written.append(len(rows))
        return write(self, rows)

    def watched(self):
        for n, batch in enumerate(batches(self)):
            assert len(written) >= 3 * (8 * n - 2)
            yield batch

    monkeypatch.setattr(RowFiles, "write", counted)
    monkeypatch.setattr(Dashboards, "batches", watched)
    assert export(dashboards, tmp_path / "out").features == 18 and len(written) == 60


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.update(pos_values=[1.0, NAN]), "Latent 9: pos_values holds nan, which is no finite number"),
        (lambda f: f.update(neg_values=[INF, -INF]), "Latent 9: neg_values holds inf"),
        (lambda f: f.update(freq_hist_data_bar_heights=[1, None]), "Latent 9: freq_hist_data_bar_heights holds None"),
        (lambda f: f.update(logits_hist_data_bar_values="0.5"), "Latent 9: logits_hist_data_bar_values is no list"),
        (lambda f: f.update(logits_hist_data_bar_values=["0.5"]), "Latent 9: logits_hist_data_bar_values holds 0.5"),
        (lambda f: f.update(decoder_weights_dist=[True]), "Latent 9: decoder_weights_dist holds True"),
        (lambda f: f.update(correlated_neurons_pearson=[10**400]), "Latent 9: correlated_neurons_pearson holds 1000"),
        (lambda f: f.update(neuron_alignment_indices=[1.5]), "Latent 9: neuron_alignment_indices holds 1.5, .*integer"),
        (lambda f: f.update(correlated_features_indices=[2**31]), "Latent 9: correlated_features_indices holds 2147"),
        (lambda f: f.update(frac_nonzero=None), "Latent 9: its dashboard has no frac_nonzero"),
        (lambda f: f.update(frac_nonzero=NAN), "Latent 9: frac_nonzero is nan"),
        (lambda f: f.update(pos_str=["a", 7]), "Latent 9: pos_str is no list of texts"),
        (lambda f: f.update(pos_str=["a"]), "Latent 9: pos_str has 1 entries, and pos_values 10"),
        (lambda f: f.update(activations={}), "Latent 9: activations is no list of examples"),
        (lambda f: f["activations"][2]["values"].__setitem__(4, NAN), "Latent 9, example 2: values holds nan"),
        (lambda f: f["activations"][2]["values"].pop(), "Latent 9, example 2 has 31 tokens, and values of 30"),
        (lambda f: f["activations"][2].update(values=[], tokens=[]), "Latent 9, example 2 has 0 tokens"),
        (lambda f: f["activations"][1].update(bin_max=INF), "Latent 9, example 1: bin_max is inf"),
        (lambda f: f["activations"][1].update(tokens=[None] * 31), "Latent 9, example 1: tokens is no list of texts"),
        (lambda f: f["activations"][0].update(qualifying_token_index="3"), "Latent 9, example 0: qualifying_"),
        (lambda f: f.update(activations=[], frac_nonzero=0.0125), "Latent 9 fires on 1.25% of tokens and has no exam"),
        (lambda f: f.update(feature_index=10), "has latent 10 twice"),
        (lambda f: f.update(feature_index=11), "has latent 11 twice, with two dashboards or among the dead"),
        (lambda f: f.update(feature_index=20), "speaks of a latent 20, which there is not"),
        (lambda f: f.update(feature_index="9"), "speaks of a latent '9', which there is not"),
    ],
)  # fmt: skip
def test_a_value_that_no_column_takes_is_named_with_its_latent(change, reason, dashboards, tmp_path):
    edit(dashboards, lambda features: change(features[1]))
    with pytest.raises(DataError, match=reason):
        export(dashboards, tmp_path / "out")
    assert list((tmp_path / "out" / "gemma-4-e4b").iterdir()) == []


def test_token_texts_that_no_database_holds_get_stand_ins(dashboards, tmp_path, db):
    bad = ["", "a\0b", "\ud83d", "é\udcff", "▁fine", "\\u0000", "\u2028", "\n", "'; drop table", "\U0001f600"]

    def change(features):
        features[1]["activations"][0].update(tokens=bad, values=[0.5, *[1.0] * 9], qualifying_token_index=1)
        features[1]["pos_str"] = list(bad)

    edit(dashboards, change)
    done = export(dashboards, tmp_path / "out")
    postgres.import_folder(db, done)
    (neuron,) = postgres.rows(db, "Neuron", "index", index="9")
    expected = ["<empty>", "a<0x00>b", "\\ud83d", "é\\udcff", *bad[4:]]
    assert neuron["pos_str"] == expected
    (shown,) = [a for a in postgres.rows(db, "Activation", "id", index="9") if a["tokens"] == expected]
    assert (shown["minValue"], shown["maxValue"], shown["maxValueTokenIndex"]) == (0.5, 1.0, 1)


@pytest.mark.parametrize(
    ("token", "stand_in"), [("", "<empty>"), ("\0", "<0x00>"), ("\udcff", "\\udcff"), (" ", " "), ("\ufeff", "\ufeff")]
)
def test_one_such_text_among_others_is_enough(token, stand_in):
    assert cells.tokens(["a", token, "é"]) == ["a", stand_in, "é"]


def test_a_label_that_speaks_of_an_escape_arrives_whole(dashboards, tmp_path, db):
    texts = {0: "fires on \\u0000", 1: "on \\\\u0000 and \\\\\\u0000", 2: 'on "\\n" and \u2028 and é \U0001f600'}
    postgres.import_folder(db, export(dashboards, tmp_path / "out", explanations=texts))
    found = {int(e["index"]): e["description"] for e in postgres.rows(db, "Explanation", "index")}
    assert found == texts
    with pytest.raises(json.JSONDecodeError):  # as json alone would have written it
        json.loads(json.dumps(texts[0]).replace("\\u0000", " "))


def test_what_sae_dashboard_leaves_is_exported_with_what_it_has(tmp_path, db):
    optional = ["neuron_alignment_l1", "correlated_features_indices", "correlated_features_l1", "decoder_weights_dist",
                "vector", "logits_hist_data_bar_heights", "logits_hist_data_bar_values"]  # fmt: skip

    def change(features):
        for feature in features:
            for name in optional:
                del feature[name]
            feature["correlated_features_pearson"] = None
            feature["activations"][0] |= {"dfa_values": [0.5] * 31, "dfa_maxValue": 0.5, "dfa_targetIndex": 3}
            del feature["activations"][1]["qualifying_token_index"]

    folder = foreign(tmp_path / "f", change)
    with pytest.raises(ConfigError) as e:
        export(folder, tmp_path / "out")
    for name in (
        "model_name",
        "n_layers",
        "d_model",
        "d_mlp",
        "hook_name",
        "sae_config",
        *(LOCAL.keys() - {"set_name"}),
        "owner",
        "description",
    ):
        assert f" {name} (" in str(e.value)
    assert "set_name" not in str(e.value)
    done = export(folder, tmp_path / "out", **OF_FOREIGN, explanations={3: "dead", 4: "alive"})
    postgres.import_folder(db, done)
    assert (done.features, done.dead, done.absent) == (18, 2, 65_516)
    (neuron,) = postgres.rows(db, "Neuron", "index", index="4")
    assert all(neuron[name] == [] for name in [*optional, "topkCosSimIndices", "correlated_features_pearson"])
    (source,) = postgres.rows(db, "Source", "id")
    assert (source["num_prompts"], source["num_tokens_in_prompt"], source["dataset"]) == (24576, 128, "monology/pile")
    shown = postgres.rows(db, "Activation", "id", index="4")
    assert sorted(a["dfaMaxValue"] or 0 for a in shown)[-2:] == [0, 0.5]
    assert sum(a["qualifyingTokenIndex"] is None for a in shown) == 1


def test_vectors_that_another_s_dashboards_carry_come_along(tmp_path, db):
    folder = foreign(tmp_path / "f", lambda features: [f.update(vector=[0.5, -1]) for f in features])
    postgres.import_folder(db, export(folder, tmp_path / "out", **OF_FOREIGN))
    (neuron,) = postgres.rows(db, "Neuron", "index", index="4")
    assert (neuron["hasVector"], neuron["vector"]) == (True, [0.5, -1])
    (dead,) = postgres.rows(db, "Neuron", "index", index="3")
    assert (dead["hasVector"], dead["vector"]) == (False, [])


def test_a_label_for_a_latent_without_dashboard_is_left_out_and_counted(tmp_path):
    folder = foreign(tmp_path / "f")
    with pytest.warns(MismatchWarning, match="2 labels are for latents that .* has no dashboards of"):
        done = export(folder, tmp_path / "out", **OF_FOREIGN, explanations={4: "a", 20: "b", 65_535: "c"})
    assert (done.explanations, done.left_out) == (1, 2)
    assert "1 explanations" in str(done) and "2 labels of these were left out" in str(done)
    with pytest.raises(DataError, match="there is no latent 65536; they are 0 to 65535"):
        export(folder, tmp_path / "out", **OF_FOREIGN, explanations={65_536: "c"})


def test_a_label_for_no_latent_of_an_sae_of_unknown_width_is_named(tmp_path):
    facts = LOCAL | MODEL | {"hook_name": "blocks.5.hook_resid_post", "description": "D"}
    folder = foreign(tmp_path / "f", layer=5)
    with pytest.raises(DataError, match=r"a label of latent 20, which .* has not"):
        export(folder, tmp_path / "out", **facts, explanations={4: "a", 20: "b"})
    done = export(folder, tmp_path / "out", **facts, explanations={4: "a"})
    assert done.absent is None and done.name == "gemma-4-e4b/5-me-topk-res-20"


def test_kinds_and_models_of_explanations_are_empty_unless_stated(dashboards, tmp_path, db):
    labels = {0: "a", 1: {"label": "b", "typeName": "own", "notes": "n"}}
    done = export(dashboards, tmp_path / "out", explanations=labels).folder
    assert [(e["typeName"], e["explanationModelName"], e["notes"]) for e in lines(done, "explanations")] == [
        (None, None, None), ("own", None, "n"),
    ]  # fmt: skip
    done = export(dashboards, tmp_path / "out", explanations=labels, explanation_type="t", explanation_model="m").folder
    assert [(e["typeName"], e["explanationModelName"]) for e in lines(done, "explanations")] == [
        ("t", "m"),
        ("own", "m"),
    ]
    account = (postgres.CREATOR,)
    for kind in ("t", "own"):
        db.execute(
            'insert into "ExplanationType" (name, "displayName", description, "creatorName", "creatorId") '
            "values (%s, '', '', '', %s)", (kind, *account)
        )  # fmt: skip
    names = 'name, "displayName", description, "creatorName"'
    db.execute(f"insert into \"ExplanationModelType\" ({names}) values ('m', '', '', '')")
    postgres.import_folder(db, done)
    assert postgres.counts(db)["Explanation"] == 2


def test_the_config_is_whole_and_what_the_site_shows_of_it_is_at_its_top(tmp_path):
    metadata = {"hook_name": "blocks.21.hook_resid_post", "context_size": 1024, "dataset_path": None, "other": [1]}
    config = {"architecture": "topk", "d_in": 8, "context_size": 512, "metadata": metadata}
    done = export(sample.write_dashboards(tmp_path / "d", **settings(sae={"config": config})), tmp_path / "out").folder
    assert row(done, "source")["saelensConfig"] == config | {"hook_name": "blocks.21.hook_resid_post"}


def test_a_row_that_cannot_be_written_is_named(dashboards, tmp_path):
    folder = sample.write_dashboards(tmp_path / "d", **settings(sae={"config": {"l0": float("nan")}}))
    with pytest.raises(DataError, match=r"source\.jsonl cannot be written, .* no finite number"):
        export(folder, tmp_path / "out")
    for facts, name in (({"sae_config": {"dtype": float}}, "source"), ({"creator_name": "\ud83d"}, "release")):
        with pytest.raises(DataError, match=rf"{name}\.jsonl cannot be written, as something in it is no text"):
            export(dashboards, tmp_path / "out", **facts)
    with pytest.raises(DataError, match=r"sourceset\.jsonl cannot be written, as a text in it has a NUL"):
        export(dashboards, tmp_path / "out", description="a\0b")
    folder = foreign(tmp_path / "e", stated={"n_prompts_total": "many"})
    with pytest.raises(DataError, match="The dashboards: n_prompts_total is many, which is no finite number"):
        export(folder, tmp_path / "out", **OF_FOREIGN)
    assert list((tmp_path / "out" / "gemma-4-e4b").iterdir()) == []


def test_dead_latents_may_come_first_and_last(tmp_path):
    folder = sample.write_dashboards(tmp_path / "d", dead=(0, 1, 18, 19))
    done = export(folder, tmp_path / "out", explanations={19: "the last"})
    assert (done.features, done.dead, done.explanations) == (16, 4, 1)
    assert [int(line["index"]) for line in lines(done.folder, "features")] == list(range(20))


def test_dead_latents_are_listed_once_and_are_the_sae_s(dashboards, tmp_path):
    skipped = json.loads((dashboards / "skipped_indexes.json").read_text())
    (dashboards / "skipped_indexes.json").write_text(json.dumps(skipped | {"skipped_indexes": [11, 3, 3]}))
    assert export(dashboards, tmp_path / "out").dead == 2
    (dashboards / "skipped_indexes.json").write_text(json.dumps(skipped | {"skipped_indexes": [3, 11, 20]}))
    with pytest.raises(DataError, match="speaks of a latent 20, which there is not"):
        export(dashboards, tmp_path / "out")


def test_times_are_in_utc(dashboards, tmp_path):
    def written(moment):
        return row(export(dashboards, tmp_path / "out", created_at=moment).folder, "source")["createdAt"]

    assert written(MOMENT.astimezone(timezone(timedelta(hours=9)))) == "2026-01-02T03:04:05.678Z"
    assert written(MOMENT.replace(tzinfo=None)) == "2026-01-02T03:04:05.678Z"
    before = datetime.now(timezone.utc)
    now = datetime.fromisoformat(written(None).replace("Z", "+00:00"))
    assert before - timedelta(seconds=1) <= now <= datetime.now(timezone.utc)


def test_the_result_is_a_path(dashboards, tmp_path):
    done = export(dashboards, tmp_path / "out")
    assert os.fspath(done) == str(tmp_path / "out" / "gemma-4-e4b" / "21-matryoshka-res-65k")
    assert str(done).startswith(
        "gemma-4-e4b/21-matryoshka-res-65k: 20 latents (2 of them dead), 144 activations, 0 expl"
    )


def test_dashboards_are_left_as_they_are(dashboards, tmp_path):
    before = {p.name: p.read_bytes() for p in dashboards.iterdir()}
    kept = copy.deepcopy(before)
    export(dashboards, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in dashboards.iterdir()} == kept
