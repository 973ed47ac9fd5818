"""Every recipe, without a model: what it would do, and what that would cost."""

import re

import pytest

from sae_lens_gemma4.neuronpedia.job import Place
from tests.studies.recipes import RECIPES, STUDIES, call, kind_of, stated


@pytest.fixture
def nothing_loads(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a dry run loaded something")

    monkeypatch.setattr("sae_lens_gemma4.models.loading.load_for_sae_lens", fail)
    monkeypatch.setattr(Place, "load", fail)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "JUDGE_API_KEY"):
        monkeypatch.setenv(name, "sk-of-a-test")


def dry(recipe, folder, *changes):
    sets = [part for change in ("model.device=cpu", *changes) for part in ("--set", change)]
    return call("interp", kind_of(recipe), RECIPES / f"{recipe}.yaml", *sets, "--out", folder, "--dry-run")


@pytest.mark.parametrize("recipe", STUDIES)
def test_a_recipe_says_what_it_would_do(nothing_loads, tmp_path, recipe):
    labels = tmp_path / "labels.csv"
    labels.write_text("index,label\n3,lists\n5,files\n")
    changes = [f"labels={labels}"] if recipe == "demo-verify" else []
    code, out, err = dry(recipe, tmp_path / "out", *changes)
    assert code == 0, err
    assert not err and out.endswith("Nothing was loaded, asked or written.\n")
    assert not (tmp_path / "out").exists()
    said = stated(recipe)
    assert f"Model {said['model']['name']}" in out
    for place in (said.get("sae"), *said.get("saes", ())):
        assert place is None or f"SAE {place['sae_id']} of {place['release']}" in out
    for judge in said.get("judges", ()):
        assert judge["kind"] in ("tokens", "ngrams") or re.search(f"\n{judge['model']}: [1-9][0-9,]* questions", out)
    kinds = {judge["kind"] for judge in said.get("judges", ())}
    assert ("no model is asked" in out) == bool(kinds & {"tokens", "ngrams"})
    limits = [judge["max_usd"] for judge in said.get("judges", ()) if "max_usd" in judge]
    assert re.findall(r"it stops before (\d+) USD are spent", out) == [str(limit) for limit in limits]
    assert out.count("USD, ") == len(limits)


def test_there_is_a_recipe_of_every_kind_and_of_the_demo():
    kinds = {"profile", "label", "verify", "probe", "contrast", "steer", "lens"}
    assert {kind_of(recipe) for recipe in STUDIES} == kinds
    assert {recipe for recipe in STUDIES if recipe.startswith("demo-")} == {f"demo-{kind}" for kind in kinds}


def test_an_estimate_grows_with_what_is_asked(nothing_loads, tmp_path):
    def questions(*changes):
        out = dry("gemma-4-31b-label", tmp_path / "out", *changes)[1]
        return [int(n.replace(",", "")) for n in re.findall(r"(?m)^\S+: ([\d,]+) questions", out)]

    assert questions() == [50 + 3 * 50] * 2  # labels; held out, dealt out anew, and for the calibration
    assert questions("calibration=false") == [50 + 2 * 50] * 2
    assert questions("calibration=false", "verification.floor=false") == [50 + 50] * 2
    assert questions("selection.rule=given", "selection.latents=[1,2,3]", "profile=null") == [3 + 9] * 2
    assert questions("selection.rule=all", "profile=null") == [4 * 43_008] * 2


def test_labels_of_a_file_are_counted(nothing_loads, tmp_path):
    labels = tmp_path / "labels.jsonl"
    two = '"source": "a", "label": "x", "alternatives": [{"source": "b", "text": "y"}]'
    labels.write_text("".join(f'{{"index": {i}, {two}}}\n' for i in range(7)))
    out = dry("gemma-4-31b-verify", tmp_path / "out", f"labels={labels}")[1]
    assert "7 of 7 labelled latents, by a, b." in out
    assert "claude-sonnet-4-5: 21 questions for each set of labels" in out
    assert "3 of 7 labelled latents" in dry("gemma-4-31b-verify", tmp_path / "out", f"labels={labels}", "n=3")[1]


def test_of_an_sae_of_unknown_width_costs_are_told_by_the_thousand(nothing_loads, tmp_path):
    changes = (f"sae={{path: {tmp_path}}}", "selection.rule=all", "profile=null", "calibration=false")
    code, out, err = dry("gemma-4-31b-label", tmp_path / "out", *changes)
    assert code == 0, err
    assert "All latents that fire; how many is not known before the SAE is loaded. Of each 1,000:" in out
    assert "gpt-4o: 3,000 questions" in out
