"""The bench compares like with like and says what it ran. Speed itself is not tested here."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from click.testing import CliRunner

from sae_lens_gemma4.bench import models
from sae_lens_gemma4.cli import cli
from sae_lens_gemma4.errors import ConfigError, ModelError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4

SMALL = {"hidden": 64, "layers": 6, "tokens": 8, "rounds": 3}


def test_each_class_is_held_against_its_own_attention() -> None:
    result = models.bench_models(**SMALL)
    assert [(c.model_class, c.attention) for c in result.comparisons] == [
        ("Gemma4ProxyLM", "sdpa"),
        ("Gemma4Bridge", "eager"),
        ("Gemma4Bridge", "sdpa"),
    ]
    assert all(c.bare_ms > 0 and c.class_ms > 0 and c.ratio > 0 for c in result.comparisons)
    assert (result.hidden, result.layers, result.stop_after_layer, result.device) == (64, 6, 4, "cpu")


def test_a_ratio_is_the_median_of_paired_rounds() -> None:
    comparison = models._compare("Gemma4Bridge", "eager", [0.1, 0.2, 0.4, 0.8], [0.2, 0.2, 0.5, 0.4])
    ratios = [0.5, 1.0, 0.8, 2.0]
    assert comparison.ratio == statistics.median(ratios)
    assert (comparison.bare_ms, comparison.class_ms) == pytest.approx((300, 300))


def test_the_bare_forward_ends_at_the_layer() -> None:
    model = tiny_gemma4("ple")
    tokens = torch.arange(100, 112)[None]
    ran: list[int] = []
    for n, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
    kept = models.bare_harvest(model, tokens, 3)
    assert ran == [0, 1, 2, 3] or ran == [0, 1, 2]  # its own hook may come first
    expected = Gemma4ProxyLM(model).run_with_cache(tokens, names_filter="blocks.3.hook_resid_post", stop_at_layer=4)[1]
    assert torch.equal(kept, expected["blocks.3.hook_resid_post"])


def test_a_class_that_gives_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "bare_harvest", lambda model, ids, layer: torch.zeros(1, 8, 64))
    with pytest.raises(ModelError, match="Gemma4ProxyLM under sdpa attention does not give what a bare forward gives"):
        models.bench_models(**SMALL)


@pytest.mark.parametrize("wrong", [{"hidden": 100}, {"layers": 5}, {"tokens": 0}, {"device": "cuda:99"}])
def test_what_cannot_be_run_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"hidden must be a multiple of 64|device 'cuda:99' cannot be used"):
        models.bench_models(**(SMALL | wrong))  # type: ignore[arg-type]


def test_from_the_command_line() -> None:
    sizes = ["--hidden", "64", "--layers", "6", "--tokens", "8", "--rounds", "2"]
    shown = CliRunner().invoke(cli, ["bench", "models", *sizes])
    assert shown.exit_code == 0
    assert "Gemma4ProxyLM" in shown.output
    assert "0.97" in shown.output
    as_json = CliRunner().invoke(cli, ["bench", "models", *sizes, "--json"])
    assert len(json.loads(as_json.output)["comparisons"]) == 3
