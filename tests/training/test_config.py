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
        "training": {"tokens": 10_000},
        "output": "out",
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = data
        for key in parents:
            at = at[key]
        at[last] = value
    return data


def parse(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(**changes)))
    return ContinueTrainingConfig.from_yaml(path)


def test_a_recipe_is_the_config(tmp_path):
    cfg = parse(tmp_path, training__lr="1e-3", training__lr_end=0, seed=3.0)
    assert cfg.training.lr == 1e-3
    assert cfg.training.lr_end == 0.0
    assert cfg.seed == 3
    assert cfg.training.steps == 10_000 // 4096
    assert from_mapping(ContinueTrainingConfig, cfg.to_dict(), "recipe") == cfg


def test_the_recipe_in_recipes_is_the_demo_s(tmp_path):
    cfg = ContinueTrainingConfig.from_yaml(RECIPES / "gemma-4-demo-it-rescaled.yaml")
    assert cfg == demo_config(SHIFTS[1], Path(cfg.output), seed=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainig": {}}, UnknownNameError, "key in recipe 'trainig'. Did you mean 'training'"),
        ({"training__batchsize": 4}, UnknownNameError, r"recipe\.training.*'batch_size'"),
        ({"data__train": [{"dataset": "a", "tokns": 4}]}, UnknownNameError, r"recipe\.data\.train\[0\].*'tokens'"),
        ({"data__train": []}, ConfigError, r"recipe\.data\.train must be a list"),
        ({"data__train": "a"}, ConfigError, r"recipe\.data\.train must be a list"),
        ({"training__tokens": "many"}, ConfigError, r"recipe\.training\.tokens must be int, not str"),
        ({"training__tokens": True}, ConfigError, r"must be int, not bool"),
        ({"training__lr": "fast"}, ConfigError, r"recipe\.training\.lr must be float"),
        ({"training__lr": 0}, ConfigError, "lr must be positive"),
        ({"training__batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"training__batch_size": 20_000}, ConfigError, "less than one batch"),
        ({"training__warm_up_steps": 2}, ConfigError, "leaves none of 2 steps"),
        ({"training__warm_up_steps": -1}, ConfigError, "warm_up_steps"),
        ({"training__lr_end": -1}, ConfigError, "lr_end"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"seed": 2**64}, ConfigError, "seed"),
        ({"model__dtype": "bf16"}, UnknownNameError, "'bf16'"),
        ({"model__device": "cpuu"}, ConfigError, "Device 'cpuu' cannot be used"),
        ({"data__train": [{"dataset": "a", "tokens": 0}]}, ConfigError, "tokens of a"),
        ({"model": None}, ConfigError, r"recipe\.model must be a mapping, not nothing"),
        ({"warm_start": {"release": "r"}}, ConfigError, "release` and `sae_id`"),
        ({"warm_start": {"release": "r", "sae_id": "s", "path": "p"}}, ConfigError, "or `path`"),
        ({"warm_start": {}}, ConfigError, "either"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named_with_its_place(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        parse(tmp_path, **changes)


def test_missing_parts_are_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("output: x\nmodel: {}\n")
    with pytest.raises(ConfigError, match="recipe lacks warm_start, data, training"):
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
