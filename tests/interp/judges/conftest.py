import ssl

import pytest

from sae_lens_gemma4.catalogue.label_schemas import Example
from sae_lens_gemma4.interp.judges.judge import DetectionQuestion, LabelQuestion
from sae_lens_gemma4.interp.judges.settings import JudgeSettings, judge_of
from tests.interp.judges.llm_server import KEY, LLMServer


@pytest.fixture
def server():
    with LLMServer() as server:
        yield server


@pytest.fixture(params=["openai", "anthropic"])
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def no_certificates(monkeypatch):
    """The server speaks no TLS; reading all certificates for each client takes most of these tests' time."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *args, **kwargs: None)


@pytest.fixture
def slept():
    """Seconds that judges would have waited."""
    return []


@pytest.fixture
def judge(server, kind, slept, tmp_path, monkeypatch):
    """A judge that asks the server and does not wait between requests; settings of its own by keyword."""
    monkeypatch.setenv("KEY_OF_TEST", KEY)

    def make(folder=tmp_path / "cache", **settings):
        stated = {"kind": kind, "model": "judge-1", "base_url": server.url(kind), "api_key_env": "KEY_OF_TEST"}
        asked = {**stated, "timeout_s": 5.0, "concurrency": 1, "retries": 2, **settings}
        made = judge_of(JudgeSettings(**asked), folder)
        made.sleep = slept.append
        return made

    return make


def example(*pieces, on=()):
    """A context of these tokens, with 2.0 at those in `on` and 4.0 at the first of them."""
    values = tuple((4.0 if piece == on[0] else 2.0) if piece in on else 0.0 for piece in pieces)
    peak = on[0] if on else None
    return Example(text="".join(pieces), token=peak, tokens=pieces, activations=values)


def labels(*words):
    return [
        LabelQuestion(i, (example("A", f" {w}", " is", on=[f" {w}"]),), (example("No", "thing"),))
        for i, w in enumerate(words)
    ]


def detections(*words):
    texts = tuple(Example(text=t) for t in ("the cat sat", "a dog ran", "the cat and the dog"))
    return [DetectionQuestion(i, f"token {w}", texts) for i, w in enumerate(words)]
