"""The whole way from the command line: an SAE to a folder that PostgreSQL takes."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.mapping import from_mapping
from sae_lens_gemma4.models import loading
from sae_lens_gemma4.neuronpedia import job as job_module
from sae_lens_gemma4.neuronpedia.folder import Dashboards
from sae_lens_gemma4.neuronpedia.job import NeuronpediaJob, prepare
from tests.neuronpedia import postgres
from tests.support import RELEASE, SAE_ID, required_module

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--corpus", "embedded:text", "--prompts", "40", "--context-size", "32"]
GIVEN = [RELEASE, SAE_ID, "--model", "gemma-4-demo", *SMALL]


@pytest.fixture(scope="module")
def db():
    required_module("pgserver")
    with postgres.server() as uri, postgres.database(uri, "job") as connection:
        yield connection


def recipe(output, **parts):
    return {
        "sae": {"release": RELEASE, "sae_id": SAE_ID},
        "model": {"name": "gemma-4-demo"},
        "text": {"dataset": "embedded:text", "prompts": 20, "context_size": 16},
        "output": str(output),
    } | parts


@pytest.mark.filterwarnings("ignore::sae_lens_gemma4.errors.CatalogueWarning")
def test_one_command_yields_a_folder_that_postgresql_takes_with_every_row(run, db, tmp_path):
    labels = tmp_path / "labels.csv"
    with labels.open("w", newline="") as file:
        csv.writer(file).writerows([["index", "label"], [5, "a label, with a comma"], [2047, "the last"]])
    code, out, err = run("export-neuronpedia", *GIVEN, "--out", tmp_path / "out", "--labels", labels)
    assert code == 0, err
    assert "40 prompts" in err + out and "sae-lens-gemma4 dashboard" in out
    dashboards = Dashboards(tmp_path / "out" / "dashboards")
    export = tmp_path / "out" / "exports" / "gemma-4-demo" / "3-embedded-matryoshka-res-2k"
    postgres.import_folder(db, export)
    n_activations = sum(len(f["activations"]) for f in dashboards.features())
    assert postgres.counts(db) == {
        "SourceRelease": 1, "Model": 1, "SourceSet": 1, "Source": 1,
        "Neuron": 2048, "Activation": n_activations, "Explanation": 2,
    }  # fmt: skip
    model = db.execute('select layers, "neuronsPerLayer", dimension, owner from "Model"').fetchone()
    assert model == (6, 256, 96, "sae-lens-gemma4")
    of = """select n."maxActApprox", n."hookName", n."sourceSetName", max(a."maxValue"), count(a.id) from "Neuron" n
            left join "Activation" a on (a."modelId", a.layer, a.index) = (n."modelId", n.layer, n.index)
            where n.index = %s group by 1, 2, 3"""
    for feature in list(dashboards.features())[::97]:
        most, hook, set_name, greatest, n = db.execute(of, [str(feature["feature_index"])]).fetchone()
        assert most == pytest.approx(greatest) and n == len(feature["activations"])
        assert (hook, set_name) == ("blocks.3.hook_resid_post", "embedded-matryoshka-res-2k")


def test_a_second_call_takes_the_dashboards_that_are_there(run, tmp_path, monkeypatch):
    out_folder = tmp_path / "out"
    assert run("export-neuronpedia", *GIVEN, "--out", out_folder)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (out_folder / "dashboards").iterdir()}
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"7": "seven"}))
    code, out, err = run("export-neuronpedia", *GIVEN, "--out", out_folder, "--labels", labels)
    assert code == 0 and "1 explanations" in out, err
    assert before == {p: p.stat().st_mtime_ns for p in (out_folder / "dashboards").iterdir()}
    code, _, err = run("export-neuronpedia", *GIVEN, "--out", out_folder, "--prompts", "41")
    assert code == 2 and "was begun with" in err
    assert before == {p: p.stat().st_mtime_ns for p in (out_folder / "dashboards").iterdir()}


def test_what_is_missing_or_wrong_is_said_before_the_text_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "make_dashboards", lambda *_, **__: pytest.fail("the text was read"))
    out = ["--out", tmp_path / "out"]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"2048": "one too many"}))
    cases = [
        ([RELEASE, SAE_ID], "--model, --corpus, --out must be given"),
        ([RELEASE, *out], f"State an SAE id of {RELEASE}: {SAE_ID}"),
        (["gemma-4-demo-res-matryoshka-embeded", "x", "--model", "gemma-4-demo", *SMALL, *out], RELEASE),
        ([*GIVEN, *out, "--model", "gemma-4-dmo"], "gemma-4-demo"),
        ([*GIVEN, *out, "--set", "dashboard.n_strongst=3"], "Did you mean 'n_strongest'"),
        ([*GIVEN, *out, "--set", "listing.set_name=My Set"], "'my-set' would do"),
        ([*GIVEN, *out, "--labels", labels], "2048"),
        ([*GIVEN, *out, "--labels", tmp_path / "none.csv"], "none.csv"),
        ([*GIVEN, *out, "--corpus", "embedded:txt"], "embedded:text"),
        (["a", "b", "c"], "takes RELEASE SAE_ID"),
    ]
    for given, said in cases:
        code, _, err = run("export-neuronpedia", *given)
        assert code == 2 and said in err and "Traceback" not in err, (given, err)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(run, tmp_path):
    code, out, err = run("export-neuronpedia", *GIVEN, "--out", tmp_path / "out", "--dry-run")
    assert code == 0, err
    assert "40 prompts" in out and "Memory, besides model and SAE" in out
    assert "2,048 latents as gemma-4-demo/3-embedded-matryoshka-res-2k" in out and "Nothing was written." in out
    assert not (tmp_path / "out").exists()


def test_an_sae_in_a_folder_is_asked_about_all_at_once_and_takes_what_is_stated(tmp_path):
    from sae_lens_gemma4.embedded import DATA

    place = {"path": str(DATA / "sae" / SAE_ID)}
    with pytest.raises(ConfigError) as e:
        prepare(from_mapping(NeuronpediaJob, recipe(tmp_path, sae=place), "recipe"))
    asked = ("hf_repo_id", "hf_folder_id", "set_name", "creator_name", "release_title")
    assert all(name in str(e.value) for name in asked), e.value
    stated = {
        "release": "my-saes", "sae_id": "layer_3", "hf_repo_id": "me/saes", "hf_folder_id": "a/layer_3",
        "set_name": "me-res-2k", "creator_name": "Me", "release_title": "My SAEs", "owner": "Me",
    }  # fmt: skip
    prepared = prepare(from_mapping(NeuronpediaJob, recipe(tmp_path, sae=place, listing=stated), "recipe"))
    found = prepared.run(progress=False)
    source = json.loads((found.folder / "source.jsonl").read_text())
    assert (source["hfRepoId"], source["hfFolderId"], source["saelensSaeId"]) == ("me/saes", "a/layer_3", "layer_3")
    row = yaml.safe_load((found.folder / "pretrained_saes.yaml").read_text())["my-saes"]
    assert row["model"] == "gemma-4-demo" and row["saes"][0]["neuronpedia"] == "gemma-4-demo/3-me-res-2k"


def test_every_key_of_a_recipe_arrives(tmp_path, monkeypatch):
    """Of a recipe in which no value is the default."""
    seen = {}

    def spied(name, module=job_module):
        real = getattr(module, name)

        def call(*args, **kwargs):
            seen[name] = (args, kwargs)
            return real(*args, **kwargs)

        return call

    for name in ("plan_dashboards", "make_dashboards", "export_neuronpedia", "read_explanations"):
        monkeypatch.setattr(job_module, name, spied(name))
    monkeypatch.setattr(loading, "load_for_sae_lens", spied("load_for_sae_lens", loading))
    labels = tmp_path / "labels.json"
    labels.write_text('{"3": "three"}')
    text = {
        "dataset": "embedded:chat", "split": "heldout", "prompts": 6, "context_size": 24, "batch_blocks": 5,
        "isolate_documents": True,
    }  # fmt: skip
    dashboard = {
        "n_strongest": 3, "n_intervals": 2, "n_each": 1, "n_logits": 4, "n_nearest": 5, "n_rows": 2,
        "cofiring_tokens": 100, "seed": 9,
    }  # fmt: skip
    stated = {"set_name": "mine-res", "suffix": "b", "notes": "why", "explanation_type": "np_max-act"}
    job = recipe(
        tmp_path / "out",
        sae={"release": RELEASE, "sae_id": SAE_ID, "fold_decoder_norms": True, "hook_name": "model.layers.3"},
        model={"name": "gemma-4-demo", "dtype": "float64", "kwargs": {"attn_implementation": "eager"}},
        text=text,
        dashboard=dashboard,
        listing=stated,
        labels=str(labels),
        keep_firings=True,
    )
    folded = []
    monkeypatch.setattr("sae_lens.JumpReLUSAE.fold_W_dec_norm", lambda self: folded.append(self))
    prepare(from_mapping(NeuronpediaJob, job, "recipe")).run(progress=False)
    assert len(folded) == 1
    args, kwargs = seen["plan_dashboards"]
    assert args[2] == "embedded:chat" and kwargs["hook_name"] == "model.layers.3"
    assert {k: kwargs["n_prompts" if k == "prompts" else k] for k in text if k != "dataset"} == {
        k: v for k, v in text.items() if k != "dataset"
    }
    assert kwargs["settings"] == job_module.DashboardSettings(**dashboard)
    assert (kwargs["set_name"], kwargs["suffix"]) == ("mine-res", "b")
    assert kwargs["source"] == {"release": RELEASE, "sae_id": SAE_ID}
    assert seen["load_for_sae_lens"][0][3] == {"dtype": "float64", "attn_implementation": "eager"}
    assert seen["make_dashboards"][1]["keep_firings"] is True
    assert seen["read_explanations"][1]["type_name"] == "np_max-act"
    assert seen["export_neuronpedia"][1].items() >= stated.items()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*-neuronpedia.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read_strictly(path, tmp_path):
    data = yaml.safe_load(path.read_text())
    data["model"].pop("device", None)  # which this machine may not have
    job = from_mapping(NeuronpediaJob, data, "recipe")
    assert job.text.context_size == 128 and job.sae.release
    with pytest.raises(UnknownNameError, match="text"):
        from_mapping(NeuronpediaJob, data | {"txt": {}}, "recipe")


def test_the_embedded_recipe_runs(run, tmp_path):
    path = RECIPES / "gemma-4-demo-neuronpedia.yaml"
    code, out, err = run("export-neuronpedia", path, "--out", tmp_path / "out", "--prompts", "12")
    assert code == 0 and "2,048 latents" in out, err


def test_ctrl_c_leaves_what_the_next_call_goes_on_from(run, tmp_path, monkeypatch):
    from sae_lens_gemma4.neuronpedia import writing

    def interrupted(self, file, first, end):
        if "batch-2" in file.name:
            raise KeyboardInterrupt
        return real(self, file, first, end)

    real = writing.Writer._write_file
    monkeypatch.setattr(writing.Writer, "_write_file", interrupted)
    code, _, err = run("export-neuronpedia", *GIVEN, "--out", tmp_path / "out")
    assert code == 130 and "The same command goes on from here." in err
    assert (tmp_path / "out" / "dashboards" / "batch-1.json").is_file() and not (tmp_path / "out" / "exports").exists()
    with pytest.raises(DataError, match="not finished"):
        Dashboards(tmp_path / "out" / "dashboards")
    monkeypatch.undo()
