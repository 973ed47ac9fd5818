import pytest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.phases import Guard, Phase, Training
from sae_lens_gemma4.training.resampling import Resampling


def test_steps_are_whole_batches_of_tokens_or_epochs():
    assert Phase(tokens=10_000).steps(4096, None) == 2
    assert Phase(epochs=3).steps(4096, 8_400_000) == 25_200_000 // 4096
    assert Phase(epochs=0.5).steps(10, 101) == 5  # round(50.5) = 50
    with pytest.raises(ConfigError, match="less than one batch"):
        Phase(tokens=10_000).steps(20_000, None)
    with pytest.raises(ConfigError, match="a streamed text has none"):
        Phase(epochs=1).steps(4096, None)
    with pytest.raises(ConfigError, match=r"Warm-up \(1\) and decay \(1\) leave none of the 2 steps"):
        Phase(tokens=10_000, warm_up_steps=1, decay_steps=1).steps(4096, None)


def test_a_schedule_ends_where_it_says():
    assert Phase(tokens=1, lr=1e-3).final_lr == 1e-4
    assert Phase(tokens=1, lr=1e-3, lr_end=6e-5).final_lr == 6e-5
    assert Phase(tokens=1, lr=1e-3, schedule="constant").final_lr == 1e-3
    with pytest.raises(ConfigError, match="where a cosine ends"):
        Phase(tokens=1, lr_end=6e-5, schedule="constant")
    with pytest.raises(ConfigError, match="lr_end is 0"):
        Phase(tokens=1, lr_end=0.0, decay_steps=3)


def test_events_that_would_overlap_are_refused():
    often = Phase(tokens=1, resampling=Resampling(every_steps=49))
    with pytest.raises(ConfigError, match="resamples every 49 steps, and the guard watches an event for 50"):
        Training(phases=[often])
    Training(phases=[often], guard=Guard(window_steps=49))
    Training(phases=[often], guard=None)
