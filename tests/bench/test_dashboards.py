"""The bench races what it says it races, and counts what is read. Speed itself is not tested here."""

import json

import pytest
import torch
from click.testing import CliRunner

from sae_lens_gemma4.bench import dashboards as bench
from sae_lens_gemma4.cli import cli
from sae_lens_gemma4.errors import ConfigError

SMALL = {"d_sae": 300, "prompts": 4, "k": 10, "rounds": 2}


@pytest.fixture(scope="module")
def result():
    return bench.bench_dashboards(**SMALL)


def test_each_activation_is_read_once_and_once_for_every_128_latents(result):
    assert result.reads_by_pass == 3  # 300 latents are three groups of 128
    assert result.d_sae == 300 and 4 * 110 < result.tokens <= 4 * 127 and result.rounds == 2
    assert result.l0 == pytest.approx(10, rel=0.5)


def test_ratios_are_of_what_was_timed(result):
    assert min(result.bare_seconds, result.pass_seconds, result.pass_by_bare, result.by_128_by_pass) > 0
    low, high = result.pass_by_bare_quartiles
    assert low <= result.pass_by_bare <= high
    usual = result.bare_seconds * 24_576 / 4
    whole = (result.pass_by_bare * usual + result.latent_ms / 1e3 * 300) / usual
    assert result.whole_by_bare == pytest.approx(whole)


def test_by_128_computes_the_saes_own_activations():
    x_td = torch.randn(40, 96)
    with torch.no_grad():
        sae = bench.active_sae(x_td, 300, 10, 0)
        kept = []
        real = torch.relu
        try:
            torch.relu = lambda pre: kept.append(real(pre)) or kept[-1]
            assert bench._by_128(x_td, sae) == 3 * 40
        finally:
            torch.relu = real
        acts_tf = torch.cat(kept, dim=1)
        torch.testing.assert_close(acts_tf * (acts_tf > sae.threshold), sae.encode(x_td), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"k": 300}, {"device": "cuda:99"}])
def test_what_cannot_be_run_is_named(wrong):
    with pytest.raises(ConfigError, match=r"Sizes must be positive|Device 'cuda:99' cannot be used"):
        bench.bench_dashboards(**(SMALL | wrong))


def test_from_the_command_line():
    sizes = ["--d-sae", "300", "--prompts", "3", "--k", "10", "--rounds", "1"]
    shown = CliRunner().invoke(cli, ["bench", "dashboards", *sizes])
    assert shown.exit_code == 0, shown.output
    assert "forward + encode" in shown.output and "≤ 1.5" in shown.output
    as_json = CliRunner().invoke(cli, ["bench", "dashboards", *sizes, "--json"])
    assert json.loads(as_json.output)["d_sae"] == 300
