import math

import pytest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.interp.steering.conditions import SteeringSettings, plan
from sae_lens_gemma4.mapping import from_mapping


def test_every_scale_is_run_both_ways_and_against_random_directions():
    conditions = plan(SteeringSettings(scales=[0.05, 0.07], n_random=2, random_scales=[0.07], seed=4))
    assert [tuple(c) for c in conditions] == [
        ("baseline", "baseline", 0.0, None),
        ("+5 %", "positive", 0.05, None),
        ("−5 %", "negative", -0.05, None),
        ("+7 %", "positive", 0.07, None),
        ("−7 %", "negative", -0.07, None),
        ("random 1, 7 %", "random", 0.07, 4),
        ("random 2, 7 %", "random", 0.07, 5),
    ]
    assert len(plan(SteeringSettings())) == 1 + 4 * (2 + 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": []}, "scales is empty"),
        ({"scales": [0.1, 0]}, "unlike 0: the baseline is run anyway"),
        ({"scales": [-0.1]}, "unlike -0.1"),
        ({"scales": [math.nan]}, "unlike nan"),
        ({"scales": [0.1, 0.1]}, "names a scale twice"),
        ({"scales": [0.1, 0.1 + 1e-12]}, "names a scale twice"),
        ({"scales": [0.1], "random_scales": [0.2]}, "random_scales has 0.2"),
        ({"n_random": -1}, "must not be negative"),
        ({"max_new_tokens": 0}, "not 0"),
        ({"positions": "prompt"}, "'all' or 'generated'"),
        ({"stop": ["x", ""]}, "not empty"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        SteeringSettings(**settings)


def test_settings_are_read_from_plain_data():
    plain = {"scales": [0.1, 1], "positions": "generated", "random_scales": None, "stop": ["Q:"]}
    assert from_mapping(SteeringSettings, plain, "steering").scales == [0.1, 1.0]
