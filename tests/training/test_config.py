from pathlib import Path

import pytest
import yaml

from sae_lens_gemma4.demo.job import SHIFTS, demo_config
from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.mapping import from_mapping
from sae_lens_gemma4.training.config import ContinueTrainingConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(**changes):
    data = {
        "warm_start": {"release": "r", "sae_id": "s"},
        "model": {"name": "m"},
        "data": {"train": [{"dataset": "a"}], "heldout": [{"dataset": "b"}]},
        "training": {"phases": [{"tokens": 10_000}]},
        "output": "out",
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = data
        for key in parents:
            at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
        at[last] = value
    return data


def parse(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(**changes)))
    return ContinueTrainingConfig.from_yaml(path)


def test_a_recipe_is_the_config(tmp_path):
    cfg = parse(tmp_path, training__phases__0__lr="1e-3", training__phases__0__lr_end=0, seed=3.0)
    [phase] = cfg.training.phases
    assert phase.lr == 1e-3
    assert phase.lr_end == 0.0
    assert cfg.seed == 3
    assert from_mapping(ContinueTrainingConfig, yaml.safe_load(cfg.to_yaml()), "recipe") == cfg
    assert [run.name for run in cfg.runs()] == ["sae"]


def test_an_entry_of_saes_is_laid_over_the_whole(tmp_path):
    cfg = parse(
        tmp_path,
        warm_start__sae_id="at_{layer}",
        sae={"settings": {"k": 8, "topk_threshold_lr": 0.1}},
        gate={"min_ve": 0.5},
        monitoring={"evaluate_every": 10},
        saes=[
            {"layer": 7, "gate": None},
            {"layer": 21, "training": {"phases": [{"tokens": 5000}, {"name": "polish", "epochs": 1, "start": "best"}]}},
            {"layer": 35, "name": "last", "sae": {"settings": {"k": 16}}, "calibration": {"tokens": 100}},
        ],
    )
    seven, twenty_one, last = cfg.runs()
    assert [run.name for run in (seven, twenty_one, last)] == ["layer_7", "layer_21", "last"]
    assert [run.warm_start.sae_id for run in cfg.runs()] == ["at_7", "at_21", "at_35"]
    assert seven.gate is None and last.gate.min_ve == 0.5
    assert [phase.name for phase in twenty_one.training.phases] == ["main", "polish"]
    assert twenty_one.training.dead_after_steps == cfg.training.dead_after_steps
    assert last.sae.settings == {"k": 16, "topk_threshold_lr": 0.1} and seven.sae.settings["k"] == 8
    assert last.calibration.tokens == 100 and seven.calibration == cfg.calibration
    assert from_mapping(ContinueTrainingConfig, yaml.safe_load(cfg.to_yaml()), "recipe") == cfg


def test_every_recipe_can_be_read(monkeypatch):
    monkeypatch.setattr("torch.empty", lambda *_, **__: None)  # there may be no such device here
    paths = [p for p in RECIPES.rglob("*.yaml") if p.parent.name != "interp" and not p.stem.endswith("-neuronpedia")]
    assert {p.name for p in paths if p.parent.name == "tiny"} == {p.name for p in paths if p.parent.name != "tiny"} - {
        "gemma-4-demo-it-rescaled.yaml"
    }
    for path in paths:
        cfg = ContinueTrainingConfig.from_yaml(path)
        assert cfg.output == f"runs/{path.relative_to(RECIPES).with_suffix('')}", path


def test_the_recipe_in_recipes_is_the_demo_s(tmp_path):
    cfg = ContinueTrainingConfig.from_yaml(RECIPES / "gemma-4-demo-it-rescaled.yaml")
    assert cfg == demo_config(SHIFTS[1], Path(cfg.output), seed=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainig": {}}, UnknownNameError, "key in recipe 'trainig'. Did you mean 'training'"),
        ({"training__phase": 4}, UnknownNameError, r"recipe\.training.*'phases'"),
        ({"training__phases__0__tokns": 4}, UnknownNameError, r"recipe\.training\.phases\[0\].*'tokens'"),
        ({"data__train": [{"dataset": "a", "tokns": 4}]}, UnknownNameError, r"recipe\.data\.train\[0\].*'tokens'"),
        ({"data__train": []}, ConfigError, r"data\.train must name at least one source"),
        ({"data__heldout": []}, ConfigError, r"data\.heldout must name at least one source"),
        ({"data__train": "a"}, ConfigError, r"recipe\.data\.train must be a list"),
        ({"data__context_size": 1}, ConfigError, r"context_size must be at least 2"),
        ({"training__phases": []}, ConfigError, "needs at least one phase"),
        ({"training__phases__0__tokens": "many"}, ConfigError, r"phases\[0\]\.tokens must be int, not str"),
        ({"training__phases__0__tokens": True}, ConfigError, r"must be int, not bool"),
        ({"training__phases__0__epochs": 1}, ConfigError, "either `tokens` or `epochs`"),
        ({"training__phases__0__lr": "fast"}, ConfigError, r"phases\[0\]\.lr must be float"),
        ({"training__phases__0__lr": 0}, ConfigError, "lr must be positive"),
        ({"training__phases__0__schedule": "cosin"}, UnknownNameError, "'cosine'"),
        ({"training__phases__0__start": "best"}, ConfigError, "no best state to start from"),
        ({"training__phases__0__warm_up_steps": -1}, ConfigError, "warm_up_steps must not be negative"),
        ({"training__phases__0__lr_end": -1}, ConfigError, "lr_end must not be negative"),
        ({"training__phases__0__resampling": {"shar": 1}}, UnknownNameError, "'share'"),
        ({"training__phases": [{"tokens": 9}, {"tokens": 9}]}, ConfigError, "Two phases have one name"),
        ({"training__guard": {"shrink": 2}}, ConfigError, "shrink between 0 and 1"),
        ({"activations__batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"activations__dtype": "float16"}, UnknownNameError, "'bfloat16'"),
        ({"activations__max_skipped": 1}, ConfigError, "max_skipped must lie in"),
        ({"activations__cache": "x", "data__shard_blocks": 4}, ConfigError, "a text that is held whole"),
        ({"monitoring__loggers": ["wand"]}, UnknownNameError, "'wandb'"),
        ({"monitoring__loggers": ["wandb"]}, ConfigError, "wandb_project"),
        ({"gate": {}}, ConfigError, "A gate asks for at least one of min_ve"),
        ({"gate": {"min_ve": 1}}, ConfigError, "min_ve must be below 1"),
        ({"saes": [{"layers": 7}]}, UnknownNameError, r"key in saes\[0\] 'layers'. Did you mean 'layer'"),
        ({"saes": [{"layer": "7"}]}, ConfigError, r"saes\[0\]\.layer must be the number"),
        ({"saes": [7]}, ConfigError, r"saes\[0\] must be dict, not int"),
        ({"saes": [{"name": "../x"}]}, ConfigError, "becomes a folder"),
        ({"saes": [{"layer": 1}, {"layer": 1}]}, ConfigError, "Two SAEs of a run have one name: layer_1, layer_1"),
        ({"saes": [{"layer": 1, "sae": {"d_saee": 3}}]}, UnknownNameError, "'d_sae'"),
        ({"warm_start__sae_id": "at_{layer}"}, ConfigError, r"layer is missing: 'at_\{layer\}'"),
        ({"sae": {"d_sae": 8}}, ConfigError, "d_sae is for new SAEs"),
        ({"warm_start": None}, ConfigError, r"needs sae\.architecture and sae\.d_sae"),
        ({"warm_start": None, "sae": {"architecture": "topk", "d_sae": 8}}, ConfigError, "needs sae.hook_name"),
        ({"sae": {"dtype": "bf16"}}, UnknownNameError, "'bf16'"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"seed": 2**64}, ConfigError, "seed"),
        ({"model__dtype": "bf16"}, UnknownNameError, "'bf16'"),
        ({"model__device": "cpuu"}, ConfigError, "Device 'cpuu' cannot be used"),
        ({"data__train": [{"dataset": "a", "tokens": 0}]}, ConfigError, "tokens of a"),
        ({"model": None}, ConfigError, r"recipe\.model must be a mapping, not nothing"),
        ({"warm_start": {"release": "r"}}, ConfigError, "release` and `sae_id`"),
        ({"warm_start": {"release": "r", "sae_id": "s", "path": "p"}}, ConfigError, "or `path`"),
        ({"warm_start": {}}, ConfigError, "either"),
        ({"warm_start": {"path": "p", "sae_id": "s"}}, ConfigError, "`sae_id` goes with `release`"),
        ({"activations__cache": "out/acts"}, ConfigError, "activations.cache lies in the output"),
        ({"data__cache": "out"}, ConfigError, "data.cache lies in the output"),
        ({"saes": [{"name": "checkpoints"}]}, ConfigError, "one of the run's own files"),
        ({"training__phases__0__lr": float("nan")}, ConfigError, r"phases\[0\]\.lr must be a finite number"),
        ({"training__guard": {"ve_drop": float("inf")}}, ConfigError, "ve_drop must be a finite number"),
        ({"data__context_size": 10**30}, ConfigError, "too large a number"),
        (
            {"training__phases": [{"tokens": 10_000}, {"name": "polish", "tokens": 10_000, "start": "best"}]},
            ConfigError,
            "needs monitoring.evaluate_every",
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named_with_its_place(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        parse(tmp_path, **changes)


def test_missing_parts_are_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("output: x\nmodel: {}\n")
    with pytest.raises(ConfigError, match="recipe lacks data, training"):
        ContinueTrainingConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not YAML"), ("- 1", "must be a mapping, not list"), ("", "must be a mapping, not nothing")],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        ContinueTrainingConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        ContinueTrainingConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        ContinueTrainingConfig.from_yaml(tmp_path)
