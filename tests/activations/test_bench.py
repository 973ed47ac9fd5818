"""The bench compares like with like. Speed itself is not tested here."""

import json

import pytest
from click.testing import CliRunner

from sae_lens_gemma4.activations import bench
from sae_lens_gemma4.cli import cli
from sae_lens_gemma4.errors import ConfigError

SMALL = ["--hidden", 64, "--layers", 6, "--tokens", 64, "--context", 16, "--rounds", 2]


def test_three_layers_race_the_deepest_alone(monkeypatch):
    asked = []
    stream = bench.ActivationStream
    monkeypatch.setattr(bench, "ActivationStream", lambda m, t, h, **k: asked.append(tuple(h)) or stream(m, t, h, **k))
    result = bench.bench_harvest(64, 6, 64, 16, rounds=3)
    hooks = tuple(f"blocks.{n}.hook_resid_post" for n in (1, 3, 4))
    assert sorted(asked) == sorted([hooks] * 4 + [hooks[-1:]] * 4)  # a warm-up and three rounds each
    assert result.layers == [1, 3, 4] and result.ratio > 0 and result.tokens == 64
    with pytest.raises(ConfigError, match="multiple of 64"):
        bench.bench_harvest(100)
    with pytest.raises(ConfigError, match="device 'cpuu'"):
        bench.bench_harvest(64, 6, 64, 16, device="cpuu")


def test_the_command_says_what_it_ran():
    done = CliRunner().invoke(cli, ["bench", "harvest", *map(str, SMALL)])
    assert done.exit_code == 0 and "layers 1, 3, 4 of 6" in done.output and "of the deepest alone" in done.output
    assert json.loads(CliRunner().invoke(cli, ["bench", "harvest", *map(str, SMALL), "--json"]).output)["tokens"] == 64
