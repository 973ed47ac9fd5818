"""The bench races what it says it races, and counts what is read. Speed itself is not tested here."""

import json

import pytest

from sae_lens_gemma4.bench import interp as bench
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

SMALL = {"hidden": 64, "n_layers": 6, "tokens": 128, "context": 16, "d_sae": 300, "prompts": 32, "rounds": 2}


@pytest.fixture(scope="module")
def run():
    """The result, and what each reading was asked for."""
    asked = {"forwards": [], "profile_layers": [], "item_means": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, calls in asked.items():
            real = getattr(bench, name)

            def spying(*args, _real=real, _calls=calls, **settings):
                _calls.append((args, settings))
                return _real(*args, **settings)

            patch.setattr(bench, name, spying)
        return bench.bench_interp(**SMALL), asked


def test_all_layers_race_the_forward_to_the_last(run):
    result, asked = run
    layers = [f"blocks.{n}.hook_resid_post" for n in range(6)]
    assert [args[2] for args, _ in asked["forwards"]] == [layers[-1:]] * 3  # a warm-up and two rounds
    assert [args[2] for args, _ in asked["item_means"]] == [layers] * 3
    drawn = sorted(settings["nearest_tokens"] for _, settings in asked["profile_layers"])
    assert drawn == [0] * 3 + [2] * 3 and result.nearest_tokens == 2  # of 128, one of 64
    texts = {id(args[1]) for calls in asked.values() for args, _ in calls}
    sizes = {settings["batch_blocks"] for calls in asked.values() for _, settings in calls}
    assert len(texts) == 1 and len(sizes) == 1


def test_the_text_is_read_once_for_all_latents(run):
    examples = run[0].examples
    assert examples.text_reads == 1
    assert examples.d_sae == 300 and 0 < examples.fired <= 300 and 32 * 110 < examples.tokens <= 32 * 127


def test_the_json_has_what_was_run_and_what_came_out(run):
    result = run[0]
    facts = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (facts["hidden"], facts["layers"], facts["vocabulary"], facts["tokens"]) == (64, 6, 48 * 64, 128)
    assert facts["profile"]["target"] == "≤ 1.3" and facts["forward_seconds"] > 0
    assert len(result.ratios) == 4
    for paired in result.ratios:
        low, high = paired.quartiles
        assert 0 < low <= paired.ratio <= high
    assert facts["examples"]["by_pass"]["ratio"] == result.ratios[-1].ratio


def test_the_model_has_the_proportions_that_are_stated():
    config = bench.deep_model(128, 12, 0).config
    assert config.intermediate_size == 4 * 128 and config.vocab_size == 48 * 128 and config.num_hidden_layers == 12
    assert config.num_attention_heads * 64 == 128 or config.num_attention_heads * 64 == 192
    assert "blocks.11.hook_resid_post" in Gemma4ProxyLM(bench.deep_model(64, 12, 0)).hook_dict


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"hidden": 100}, "multiple of 64"),
        ({"tokens": 8}, "at least the context"),
        ({"rounds": 0}, "at least 1"),
        ({"d_sae": 100}, "more than 100"),
        ({"device": "cpuu"}, "device 'cpuu' cannot be used"),
    ],
)
def test_what_cannot_be_run_is_named(wrong, match):
    with pytest.raises(ConfigError, match=match):
        bench.bench_interp(**(SMALL | wrong))
