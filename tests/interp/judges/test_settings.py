import pytest

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.interp.judges.judge import JudgeError, TooLongWarning
from sae_lens_gemma4.interp.judges.settings import JudgeSettings, judge_of
from sae_lens_gemma4.mapping import from_mapping
from tests.interp.judges.conftest import detections, labels


def test_from_a_recipe():
    stated = {"kind": "openai", "model": "m", "temperature": None, "max_usd": 3, "usd_per_million_input": "1e-1",
              "usd_per_million_output": 2}  # fmt: skip
    settings = from_mapping(JudgeSettings, stated, "judge")
    assert settings.max_usd == 3.0 and settings.usd_per_million_input == 0.1 and settings.temperature is None
    with pytest.raises(UnknownNameError, match="ngrams"):
        from_mapping(JudgeSettings, {"kind": "ngram"}, "judge")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "openai"}, "needs a model"),
        ({"kind": "tokens", "model": "m"}, "has no model"),
        ({"kind": "openai", "model": "m", "concurrency": 0}, "concurrency must be from 1"),
        ({"kind": "openai", "model": "m", "retries": -1}, "retries"),
        ({"kind": "openai", "model": "m", "max_output_tokens": 1}, "max_output_tokens"),
        ({"kind": "openai", "model": "m", "timeout_s": 0.0}, "timeout_s"),
        ({"kind": "openai", "model": "m", "timeout_s": float("nan")}, "timeout_s"),
        ({"kind": "openai", "model": "m", "max_calls": -1}, "max_calls"),
        ({"kind": "openai", "model": "m", "max_usd": 1.0}, "max_usd"),
        ({"kind": "openai", "model": "m", "usd_per_million_input": 1.0}, "both"),
        ({"kind": "openai", "model": "m", "temperature": 3.0}, "temperature"),
        ({"kind": "anthropic", "model": "m", "temperature": 0.5}, "takes no temperature"),
        ({"kind": "transformers", "model": "m", "base_url": "http://x"}, "base_url"),
        ({"kind": "openai", "model": "m", "base_url": "localhost:8000"}, "base_url"),
        ({"kind": "openai", "model": "m", "base_url": "http://h:port/v1"}, "base_url"),
        ({"kind": "openai", "model": "m", "base_url": "https://ann:s3cret@h/v1"}, "api_key_env"),
        ({"kind": "openai", "model": "m", "base_url": "https://s3cret@h/v1"}, "api_key_env"),
        ({"kind": "anthropic", "model": "m", "base_url": "https://h/v1?key=s3cret"}, "api_key_env"),
        ({"kind": "openai", "model": "m", "base_url": "https://h/v1#s3cret"}, "api_key_env"),
    ],
)
def test_what_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says) as error:
        JudgeSettings(**settings)
    assert "s3cret" not in str(error.value)


def test_names():
    assert judge_of(JudgeSettings(kind="tokens"), None).name == "token statistics"
    assert judge_of(JudgeSettings(kind="ngrams", name="mine"), None).name == "mine"
    assert judge_of(JudgeSettings(kind="transformers", model="gemma-4-demo-it"), None).name == "gemma-4-demo-it"


@pytest.mark.parametrize("model", ["gemma-4-demo-it", "gemma-4-demo"])
def test_a_model_on_this_machine(model, tmp_path):
    """The embedded model answers nothing that can be used, which is counted; the second run does not ask it."""
    settings = JudgeSettings(kind="transformers", model=model, max_output_tokens=16, retries=1)
    judge = judge_of(settings, tmp_path)
    assert judge.detect(detections("cat")) == [None]
    record = judge.record()
    assert record["calls"] == 2 and sum(record["refused"].values()) == 2 and record["unanswered"] == 1
    assert record["input_tokens"] > 100 and record["output_tokens"] >= 2 and record["usd"] is None
    again = judge_of(settings, tmp_path)
    assert again.detect(detections("cat")) == [None] and again.record()["calls"] == 0
    assert again.client._loaded is None


def test_a_model_that_is_not_there(tmp_path):
    judge = judge_of(JudgeSettings(kind="transformers", model=str(tmp_path)), None)
    with pytest.raises(JudgeError, match="cannot be loaded"):
        judge.label(labels("cat"))


def test_a_question_that_is_too_long_for_the_model():
    judge = judge_of(JudgeSettings(kind="transformers", model="gemma-4-demo-it", max_output_tokens=2000), None)
    with pytest.warns(TooLongWarning, match="gemma-4-demo-it cannot read 1 of 1 questions"):
        assert judge.detect(detections("cat")) == [None]
    assert judge.record()["calls"] == 0 and judge.record()["unanswered"] == 1
