"""Each demo recipe, made small, from the command line to its files; and what they say is held against what is known."""

import dataclasses
import gzip
import json
import re

import datasets
import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from scipy.stats import fisher_exact

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue import labels
from sae_lens_gemma4.catalogue.files import LocalFiles
from sae_lens_gemma4.catalogue.registry import parse_release
from sae_lens_gemma4.interp.items import ItemSource, read_items
from sae_lens_gemma4.mapping import from_yaml
from sae_lens_gemma4.studies.contrast import ContrastStudy
from sae_lens_gemma4.studies.labels import LabelStudy, VerifyStudy
from sae_lens_gemma4.studies.lens import LensStudy
from sae_lens_gemma4.studies.pairs import PairStudy
from sae_lens_gemma4.studies.profile import ProfileStudy
from sae_lens_gemma4.studies.steer import SteerStudy
from tests.studies.recipes import RECIPES, arguments, call, check_page, result, small, stated
from tests.support import RELEASE, SAE_ID

KINDS = {
    "profile": (ProfileStudy, "layer_profile"),
    "label": (LabelStudy, "latent_labels"),
    "verify": (VerifyStudy, "latent_labels"),
    "probe": (PairStudy, "prompt_pairs"),
    "contrast": (ContrastStudy, "contrast_by_layer"),
    "steer": (SteerStudy, "steering"),
    "lens": (LensStudy, "logit_lens"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, labelled, contrasted):
    made = {"label": labelled, "contrast": contrasted}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "run"
            changes = [f"labels={labelled / 'labels' / 'labels.jsonl'}"] if kind == "verify" else []
            small(kind, folder, *changes)
            made[kind] = folder
        return made[kind]

    return run


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_leaves_a_result_a_page_and_itself(runs, kind):
    folder = runs(kind)
    cls, name = KINDS[kind]
    document = result(folder)
    assert (document["schema"], document["kind"]) == (1, name)
    assert document["model"]["name"] == ("gemma-4-demo-it" if kind == "lens" else "gemma-4-demo")
    assert document["versions"]["sae_lens_gemma4"] == g4.__version__
    check_page(folder)
    study = from_yaml(cls, folder / "recipe.yaml", "recipe")
    assert study.output == str(folder)
    code, out, err = call("interp", kind, folder / "recipe.yaml", "--dry-run")
    assert code == 0 and "Nothing was loaded" in out, err
    changed = [part for part in arguments(kind, folder) if "=" in str(part) and "resamples=200" in str(part)]
    assert not changed or "resamples: 200" in (folder / "recipe.yaml").read_text()
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".lock"))]


def test_a_profile_begins_in_token_space(runs, model):
    layers = result(runs("profile"))["layers"]
    assert layers["hook"] == ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(6))]
    assert layers["cosine"][0] == pytest.approx(1) and layers["recovered"][0] == 1
    corpus = g4.build_corpus("embedded:text", model.tokenizer, context_size=128, max_tokens=16 * 128)
    with torch.no_grad():
        _, cache = model.run_with_cache(corpus.tokens_bp, names_filter="blocks.5.hook_resid_post")
        own = model.model.get_input_embeddings().weight[corpus.tokens_bp[corpus.keep_bp]]
        there = cache["blocks.5.hook_resid_post"][corpus.keep_bp]
    assert layers["cosine"][6] == pytest.approx(torch.cosine_similarity(there, own, dim=-1).mean().item(), abs=1e-5)


def test_labels_are_read_by_others_as_they_were_made(runs, monkeypatch):
    folder = runs("label")
    document = result(folder)
    made = document["labels"]["labels"]
    assert len(made) == 12 and [int(index) for index in made] == document["selection"]["indices"]
    assert document["profile"]["kind"] == "layer_profile" and document["selection"]["rule"] == "divergence"
    assert set(document["files"]) == {"jsonl", "parquet", "card", "adam1010", "title_description"}
    assert all((folder / file).is_file() for file in document["files"].values())

    rows = datasets.load_dataset("json", data_files=str(folder / "labels" / "labels.jsonl"), split="train")
    assert {str(row["index"]): row["label"] for row in rows} == {
        index: said["token statistics"]["label"] for index, said in made.items()
    }
    columns = datasets.load_dataset("parquet", data_files=str(folder / "labels" / "labels.parquet"), split="train")
    assert dict(zip(columns["index"], columns["label"], strict=True)) == {row["index"]: row["label"] for row in rows}

    shared = {"repo_type": "dataset", "repo_id": "a/b", "model": "gemma-4-demo", "architecture": "jumprelu"}
    shared["sources"] = {"default": "card"}
    place = {"id": "one", "layer": 3, "path": "l", "hook": "blocks.3.hook_resid_post", "d_sae": 2048}
    forms = {"labels.jsonl": "feature_labels", "labels.parquet": "feature_labels"}
    forms |= {"feature_labels.json": "title_description", "sae_features.json": "adam1010"}
    monkeypatch.setattr(labels, "files_of", lambda release: LocalFiles(folder / "labels"))
    for file, schema in forms.items():
        of_file = {"label_schema": schema, "saes": [{**place, "labels": file}]}
        entry = parse_release("ours", {**shared, **of_file})
        monkeypatch.setattr(labels, "releases", lambda entry=entry: {"ours": entry})
        found = labels.load_feature_labels("ours", "one")
        assert list(found) == sorted(map(int, made)), file
        for index, one in found.items():
            said = made[str(index)]["token statistics"]["label"]
            assert said in (one.label, one.description, *one.alternatives.values()), file


def test_what_is_written_of_a_label_is_what_was_found(runs):
    """Counts, F1, Fisher's p and the score of each label anew, from the answers alone."""
    folder = runs("label")
    document = result(folder)
    weights, scores = document["confidence"]["weights"], document["confidence"]["scores"]
    tests = document["verification"]["judges"]["token statistics"]["tests"]
    n_tested = 0
    for row in map(json.loads, (folder / "labels" / "labels.jsonl").read_text().splitlines()):
        if (test := tests.get(str(row["index"]))) is None:
            continue  # too few contexts
        score, n_tested = scores[str(row["index"])], n_tested + 1
        n = test["tp"] + test["fn"]  # contexts on which it fires come first
        m = len(test["applies"]) - n
        tp, fp = sum(test["applies"][:n]), sum(test["applies"][n:])
        assert 5 <= n <= 20 and (test["tp"], test["fp"], test["tn"]) == (tp, fp, m - fp)
        assert test["f1"] == pytest.approx(2 * tp / (2 * tp + fp + n - tp))
        assert test["p_value"] == pytest.approx(fisher_exact([[tp, n - tp], [fp, m - fp]], "greater").pvalue)
        assert test["confirmed"] == (test["p_value"] <= 0.05)
        assert score["components"]["held_out"] == test["f1"]
        expected = sum(weights[name] * value for name, value in score["components"].items())
        assert score["score"] == pytest.approx(expected)
        assert row["confidence"] == score["score"] and row["source"] == "token statistics"
    assert n_tested >= 8


def test_an_export_has_the_labels_that_were_made(tmp_path):
    """Of an SAE in a folder, the first 96 latents of the recipe's, so that there is less to export."""
    whole = SAE.from_pretrained(RELEASE, SAE_ID)
    narrow = type(whole)(dataclasses.replace(whole.cfg, d_sae=96))
    narrow.load_state_dict(
        {
            name: t[:, :96] if name == "W_enc" else t if name == "b_dec" else t[:96]
            for name, t in whole.state_dict().items()
        }
    )
    narrow.save_model(tmp_path / "sae")
    changes = (f"sae={{path: {tmp_path / 'sae'}}}", "selection.n=6", "selection.max_density=1", "calibration=false")
    code, _, err = call(
        *arguments(
            "label", tmp_path / "run", *changes, "listing={set_name: res-narrow, release: narrow, sae_id: narrow}"
        )
    )
    assert code == 2 and "hf_repo_id" in err and "creator_name" in err and not (tmp_path / "run").exists()
    told = "set_name: res-narrow, release: narrow, sae_id: narrow, owner: me, hf_repo_id: me/narrow, hf_folder_id: sae"
    document = small("label", tmp_path / "run", *changes, f"listing={{{told}, release_title: N, creator_name: Me}}")
    made = {
        (int(index), who, one["label"])
        for index, said in document["labels"]["labels"].items()
        for who, one in said.items()
        if one is not None
    }
    exported = set()
    (export,) = (tmp_path / "run" / "exports" / "gemma-4-demo").iterdir()
    for batch in (export / "explanations").iterdir():
        for row in map(json.loads, gzip.decompress(batch.read_bytes()).splitlines()):
            exported.add((int(row["index"]), row["notes"], row["description"]))
    assert exported == made and len({index for index, *_ in made}) == 6
    assert document["calibration"] == {"none": "it was not asked for"}
    assert document["sae"]["path"] == str(tmp_path / "sae") and document["sae"]["d_sae"] == 96


def test_pairs_are_those_of_the_file_and_their_labels_are_written(runs):
    folder = runs("probe")
    document = result(folder)
    categories = stated("demo-pairs")["categories"]
    assert [one["name"] for one in document["categories"]] == [one["name"] for one in categories]
    assert (document["pairs"], document["sae"]["sae_id"]) == ("demo-pairs.yaml", SAE_ID)
    rows = datasets.load_dataset("json", data_files=str(folder / document["files"]["jsonl"]), split="train")
    assert len(rows) == len(set(rows["index"])) and all(0 <= index < 2048 for index in rows["index"])
    with (folder / document["files"]["feature_map"]).open() as file:
        assert str(rows["index"][0]) in json.dumps(json.load(file))


def test_a_contrast_is_cohens_d_of_item_means(runs, model):
    """By hand: one forward an item, the mean over its tokens but BOS, and d with the pooled deviation."""
    folder, hook = runs("contrast"), "blocks.3.hook_resid_post"
    items = read_items(ItemSource(dataset=str(RECIPES / "demo-items.yaml"), prompt="text", group="kind"))
    sae, means, acts = SAE.from_pretrained(RELEASE, SAE_ID), [], []
    with torch.no_grad():
        for item in items:
            ids = model.tokenizer(item.prompt, return_tensors="pt")["input_ids"]
            _, cache = model.run_with_cache(ids, names_filter=hook)
            means.append(cache[hook][0, 1:].double().mean(0).numpy())
            acts.append(sae.encode(cache[hook][0, 1:]).double().mean(0).numpy())
    files = np.array([item.group == "files" for item in items])
    found = load_file(folder / "effects.safetensors")
    for key, rows in ((f"d/activations/{hook}", np.array(means)), (f"d/latents/{hook}", np.array(acts))):
        a, b = rows[files], rows[~files]
        pooled = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)  # groups of one size
        with np.errstate(divide="ignore", invalid="ignore"):
            d = (a.mean(0) - b.mean(0)) / pooled
        known = np.isfinite(d) & torch.isfinite(found[key]).numpy() & ((rows != 0).sum(0) >= 5)
        assert known.sum() >= 90
        np.testing.assert_allclose(found[key].numpy()[known], d[known], atol=2e-3)
    difference = np.mean(np.array(means)[files], 0) - np.mean(np.array(means)[~files], 0)
    direction = found[f"direction/{hook}"].numpy()
    assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-5)
    assert direction @ difference / np.linalg.norm(difference) == pytest.approx(1, abs=1e-5)
    assert result(folder)["files"] == {"effects": "effects.safetensors"}


def test_steering_runs_every_condition_and_counts_by_hand(runs):
    folder = runs("steer")
    document = result(folder)
    names = ["baseline", "+30 %", "−30 %", "random 1, 30 %", "random 2, 30 %"]
    assert [condition["name"] for condition in document["conditions"]] == names
    rows = [json.loads(line) for line in (folder / "outputs" / "outputs.jsonl").read_text().splitlines()]
    for condition in document["conditions"]:
        texts = [row["text"] for row in rows if row["condition"] == condition["name"]]
        assert len(texts) == condition["accuracy"]["n"] == 12
        assert condition["accuracy"]["k"] == sum(re.search(r"\bfile\b", t.casefold()) is not None for t in texts)
    assert document["source"].endswith("demo-questions.yaml [train]") and document["contrast_answers"] is None


def test_the_last_layer_of_a_lens_is_the_model(runs):
    document = result(runs("lens"))
    assert [one["index"] for one in document["decoder"]["latents"]] == [3, 23, 36, 68]
    model, entropies = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM"), []
    for item in read_items(ItemSource(dataset="embedded:text", prompt="text", n=4)):
        with torch.no_grad():
            logits = model(model.tokenizer(item.prompt, return_tensors="pt")["input_ids"])[0, -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().item())
    assert document["curves"]["entropy"]["values"][-1] == pytest.approx(np.mean(entropies), abs=1e-4)
    assert document["curves"]["kl"]["values"][-1] == pytest.approx(0, abs=1e-6) != document["curves"]["kl"]["values"][0]


def test_another_run_of_the_same_recipe_says_the_same(runs, tmp_path):
    again = small("lens", tmp_path / "run")
    assert again == result(runs("lens"))
