"""Every recipe, in its tiny form, from the command line to a folder that stock sae_lens reads, and to a hub."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from sae_lens import SAE

from tests.publishing.upload_hub import upload_hub

__all__ = ["upload_hub"]
RECIPES = Path(__file__).parents[1] / "recipes"
RANDOM = {"gemma-4-31b-topk64": "dense_keqv", "gemma-4-26b-a4b-topk64": "moe", "gemma-3-27b-batchtopk": "gemma3"}
WARM = "gemma-4-e4b-it-warm-start"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    sys.path.insert(0, str(RECIPES))
    try:
        import make_tiny
    finally:
        sys.path.remove(str(RECIPES))
    folder = tmp_path_factory.mktemp("models")
    make_tiny.main(folder)
    return folder


def arguments(name, folder, models):
    found = ["train", RECIPES / "tiny" / f"{name}.yaml", "--set", f"output={folder}"]
    return [*found, "--set", f"model.name={models / RANDOM[name]}"] if name in RANDOM else found


@pytest.mark.parametrize("name", [path.stem for path in sorted((RECIPES / "tiny").glob("*.yaml"))])
def test_a_tiny_recipe_runs_to_its_end(run, models, tmp_path, name):
    given = arguments(name, tmp_path / "run", models)
    code, out, err = run(*given, "--dry-run")
    assert code == 0, err
    assert "Nothing was trained or written." in out and not (tmp_path / "run").exists()
    code, out, err = run(*given)
    assert code == 0, err
    recipe = yaml.safe_load((RECIPES / "tiny" / f"{name}.yaml").read_text())
    names = [entry.get("name", f"layer_{entry.get('layer')}") for entry in recipe.get("saes", [{"name": "sae"}])]
    for sae in names:
        folder = tmp_path / "run" / sae
        assert SAE.load_from_disk(folder).cfg.metadata.model_name
        result = json.loads((folder / "result.json").read_text())
        assert result["after"] and str(folder) in out
        if name not in RANDOM:
            assert result["gate"]["passed"] and f"{folder}: the gate holds" in out
        assert (folder / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize(
    "name",
    [
        path.stem
        for path in sorted(RECIPES.glob("*.yaml"))
        if path.stem != "gemma-4-demo-it-rescaled" and not path.stem.endswith("-neuronpedia")
    ],
)
def test_a_twin_has_every_part_of_the_large_one(name):
    def parts(value, at=""):
        if isinstance(value, dict):
            return {p for key, v in value.items() for p in parts(v, f"{at}.{key}")}
        return {p for v in value for p in parts(v, f"{at}[]")} if isinstance(value, list) else {at}

    large, tiny = (
        parts(yaml.safe_load(path.read_text()))
        for path in (RECIPES / f"{name}.yaml", RECIPES / "tiny" / f"{name}.yaml")
    )
    own = {
        ".model.device",
        ".model.dtype",
        ".model.class_name",
        ".seed",
        ".monitoring.evaluate_every",
        ".monitoring.downstream_tokens",
    }
    settings = {p for p in large if p.startswith((".sae.settings", ".data.train", ".data.heldout", ".gate"))}
    assert large - tiny - own - settings == set()


def test_a_gate_that_does_not_hold_is_said_and_nothing_is_sent(run, models, tmp_path, upload_hub):
    given = arguments("gemma-4-e4b-l21-topk", tmp_path / "run", models)
    short = ["--set", "training.phases.0.tokens=4096", "--set", "gate.min_ve=0.999"]
    code, out, _ = run(*given, *short, "--push", "somebody/saes")
    assert code == 3
    assert "the gate does not hold: ve on text held out is" in " ".join(out.split())
    assert not upload_hub.messages and (tmp_path / "run" / "sae" / "cfg.json").is_file()
    code, _, err = run("publish", tmp_path / "run", "--push", "somebody/saes")
    assert code == 2 and "Only SAEs whose gate holds are uploaded" in err and not upload_hub.messages


def test_a_run_that_passes_goes_to_the_hub_and_back(run, models, tmp_path, upload_hub):
    given = arguments("gemma-4-e4b-l21-topk", tmp_path / "run", models)
    code, out, err = run(*given, "--push", "somebody/saes")
    assert code == 0, err
    assert len(upload_hub.messages) == 2 and "https://huggingface.co/somebody/saes" in out
    head = upload_hub.head("somebody/saes")
    assert {f"sae/{name}" for name in ("cfg.json", "result.json", "recipe.yaml", "sparsity.safetensors")} <= set(
        head.files
    )
    assert "was downloaded" in head.files["README.md"].decode()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "trainin.phases=1"], "Unknown key in recipe 'trainin'. Did you mean 'training'"),
        (["--set", "training.phases.0.lrr=1"], "Did you mean 'lr'"),
        (["--set", "training.phases.3.lr=1"], "'3' is no entry of a list of 1"),
        (["--set", "output.x=1"], "no mapping or list"),
        (["--set", "seed"], "--set takes KEY=VALUE"),
        (["--set", "seed=[1"], "is not YAML"),
        (["--set", "model.name=gemma-4-dmo"], "Did you mean 'gemma-4-demo'"),
        (["--set", "sae.hook_name=blocks.3.hook_resid_pots"], "blocks.3.hook_resid_post"),
        (["--set", "sae.settings.kk=3"], "'k'"),
        (["--resume", "--replace"], "choose one"),
        (["--dryrun"], "--dry-run"),
    ],
)
def test_a_mistake_is_one_line(run, models, tmp_path, extra, message):
    code, out, err = run(*arguments("gemma-4-e4b-l21-topk", tmp_path / "run", models), *extra)
    assert code == 2 and message in err and "Traceback" not in err + out
    assert not (tmp_path / "run").exists()
