"""The bench compares like with like. Speed itself is not tested here."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_gemma4.bench import disk, harvest
from sae_lens_gemma4.cli import cli
from sae_lens_gemma4.errors import ConfigError

SIZES = ["--hidden", 64, "--layers", 6, "--tokens", 64, "--context", 16, "--rounds", 2, "--cache-gb", 0]


def test_three_layers_race_the_deepest_alone_and_a_bare_forward_and_themselves_read_ahead(monkeypatch, tmp_path):
    asked = []
    stream = harvest.ActivationStream

    def asking(model, text, hooks, **settings):
        asked.append((tuple(hooks), settings["buffer_blocks"], settings["prefetch"]))
        return stream(model, text, hooks, **settings)

    monkeypatch.setattr(harvest, "ActivationStream", asking)
    result = harvest.bench_harvest(64, 6, 64, 16, rounds=3, cache_gb=0, folder=tmp_path)
    hooks = tuple(f"blocks.{n}.hook_resid_post" for n in (1, 3, 4))
    in_turn, ahead = [(hooks, 1, False)] * 3, [(hooks, 1, True)] * 3
    alone = [((hooks[-1],), 4, False)] * 4  # a warm-up and three rounds
    assert sorted(asked) == sorted([(hooks, 4, False)] * 4 + alone + in_turn + ahead)
    assert result.layers == [1, 3, 4] and result.tokens == 64
    assert len(result.ratios) == 5 and all(p.ratio > 0 for p in result.ratios)
    assert result.cache.gigabytes == 4 * 64 * 16 * 64 * 4 / 1e9  # four chunks of 64 blocks
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"hidden": 100}, "multiple of 64"),
        ({"device": "cpuu"}, "device 'cpuu'"),
        ({"folder": "nowhere", "rounds": 1, "cache_gb": 0}, "cannot be written to nowhere"),
    ],
)
def test_what_cannot_be_run_is_named(settings, match):
    sizes = {"hidden": 64, "n_layers": 6, "tokens": 64, "context": 16}
    with pytest.raises(ConfigError, match=match):
        harvest.bench_harvest(**{**sizes, **settings})


def test_the_cache_and_the_plain_read_read_the_same_bytes(monkeypatch, tmp_path):
    read = []
    cached = disk.ActivationCache.read
    plain = disk._plain
    monkeypatch.setattr(
        disk.ActivationCache,
        "read",
        lambda *a, **k: read.append(("cache", (acts := cached(*a, **k)).nbytes)) or acts,
    )
    monkeypatch.setattr(disk, "_plain", lambda path: read.append(("plain", path.stat().st_size)) or plain(path))
    disk.bench_cache(8, 4, 3, 2e-5, tmp_path, 1, "cpu")
    size = 156 * 4 * 8 * 4  # the whole blocks of 20 kB
    assert [n for what, n in read if what == "plain"] == [size]
    once_more = sum(n for what, n in read if what == "cache") - 3 * size  # alone, in turn with steps, ahead of them
    assert 0 <= once_more <= 3 * 4 * 8 * 4  # of the second epoch no more than a chunk ahead


@pytest.mark.parametrize(("seconds", "products"), [(1.1, 4), (0.3, 1), (0.13, 0.5), (0.001, 0.25)])
def test_a_step_is_products_for_about_the_time_that_is_asked_for(monkeypatch, seconds, products):
    monkeypatch.setattr(disk, "race", lambda runs, *_: {key: [0.25] for key in runs})
    step = disk.step_like(8, 4, seconds, "cpu")
    with FlopCounterMode(display=False) as counter:
        step(torch.ones(4, 8))
    assert counter.get_total_flops() == products * 2 * 4 * 8 * (16 * 8)


def test_the_command_says_what_it_ran(tmp_path):
    done = CliRunner().invoke(cli, ["bench", "harvest", *map(str, SIZES), "--folder", str(tmp_path)])
    assert done.exit_code == 0 and "layers 1, 3, 4 of 6" in done.output and "three layers by the deepest" in done.output
    facts = json.loads(CliRunner().invoke(cli, ["bench", "harvest", *map(str, SIZES), "--json"]).output)
    assert facts["tokens"] == 64 and facts["cache"]["read"]["target"] == "≥ 0.8"
