"""Judges against a server that fails in every way a server does, by both protocols."""

import json
import multiprocessing
import signal
import sys
import threading
import time

import pytest

from sae_lens_gemma4.errors import ConfigError, DependencyError
from sae_lens_gemma4.interp.judges import clients, questions
from sae_lens_gemma4.interp.judges.judge import Answer, JudgeError, LabelQuestion
from sae_lens_gemma4.interp.judges.questions import prompts, prompts_hash
from sae_lens_gemma4.interp.judges.settings import JudgeSettings, judge_of
from sae_lens_gemma4.interp.labels.labelling import check_judges
from tests.interp.judges.conftest import detections, labels
from tests.interp.judges.llm_server import KEY


def test_good_answers_in_order(judge, server):
    judged = judge(concurrency=4)
    words = [f"word{i}" for i in range(12)]
    assert judged.label(labels(*words)) == [Answer(f"token {w}", "token") for w in words]
    assert judged.detect(detections("cat", "dog", "bird")) == [[True, False, True], [False, True, True], [False] * 3]
    assert len(server.requests) == 15
    record = judged.record()
    assert (record["questions"], record["calls"], record["unanswered"], record["refused"]) == (15, 15, 0, {})
    assert json.loads(json.dumps(record)) == record


def test_calls_are_concurrent_and_no_more_than_asked(judge, server):
    server.fail(*["slow"] * 6)
    server.slow_s = 0.3
    judge(concurrency=3).label(labels(*"abcdef"))
    assert server.most_busy == 3


def test_the_same_question_is_asked_once(judge, server):
    one, other = labels("cat", "dog")
    again = LabelQuestion(7, one.positives, one.negatives)
    assert [answer.label for answer in judge().label([one, other, again])] == ["token cat", "token dog", "token cat"]
    assert len(server.requests) == 2


def test_a_fenced_answer_is_taken(judge, server):
    server.fail("fenced")
    assert judge().label(labels("cat")) == [Answer("token cat", "token")]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("malformed", "it was not one JSON object alone"),
        ("schema", 'there is no text "label" in it'),
        ("empty", "it was empty"),
        ("truncated", "it was cut off at max_output_tokens"),
    ],
)
def test_unusable_answers_are_asked_again_with_the_reason(judge, server, fault, reason):
    server.fail(fault)
    judged = judge()
    assert judged.label(labels("cat")) == [Answer("token cat", "token")]
    assert judged.record()["refused"] == {reason: 1}
    first, second = server.users()
    assert second.startswith(first) and reason in second.removeprefix(first)


def test_no_usable_answer_is_none_and_costs_nothing_the_next_time(judge, server):
    server.fail(*["malformed"] * 3)
    judged = judge()
    assert judged.label(labels("cat", "dog")) == [None, Answer("token dog", "token")]
    assert judged.record()["unanswered"] == 1
    assert len(server.requests) == 4
    again = judge()
    assert again.label(labels("cat", "dog")) == [None, Answer("token dog", "token")]
    assert again.record()["unanswered"] == 1 and again.record()["cached"] == 2
    assert len(server.requests) == 4
    assert judge(retries=3).label(labels("cat")) == [Answer("token cat", "token")]
    assert len(server.requests) == 5


def test_numbers_outside_the_list_are_refused(judge, server):
    replies = iter(['{"applies": [4]}', '{"applies": [0]}', '{"applies": [true]}'])
    server.reply = lambda system, user: next(replies)
    assert judge().detect(detections("cat")) == [None]
    assert len(server.requests) == 3


def test_questions_that_ask_nothing(judge, server):
    assert judge().label([LabelQuestion(0, ())]) == [None]
    empty = detections("cat")[0]
    assert judge().detect([type(empty)(0, "x", ())]) == [[]]
    assert judge().label([]) == []
    assert server.requests == []


def test_a_second_run_asks_nothing(judge, server):
    judge().label(labels("cat", "dog"))
    judge().detect(detections("cat"))
    again = judge()
    assert again.label(labels("cat", "dog"))[1] == Answer("token dog", "token")
    assert again.record()["cached"] == 2 and again.record()["calls"] == 0
    assert len(server.requests) == 3
    judge(model="judge-2").label(labels("cat"))
    judge(max_output_tokens=99).label(labels("cat"))
    assert len(server.requests) == 5


def test_what_was_answered_before_an_error_is_kept(judge, server):
    server.fail("ok", "ok", "401")
    with pytest.raises(JudgeError):
        judge().label(labels("a1", "b2", "c3", "d4"))
    assert judge().label(labels("a1", "b2", "c3", "d4"))[3] == Answer("token d4", "token")
    assert all(n == 1 for n in server.answered.values()) and len(server.requests) == 5


def test_control_c_is_quick_and_loses_nothing(judge, server):
    server.stops_after = 3
    judged = judge(concurrency=2)

    def interrupt():
        server.held.wait(10)
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judged.label(labels(*"abcdefgh"))
    assert time.monotonic() - start < 5
    sent = len(server.requests)
    server.stops_after = None
    server.release.set()  # and both calls are cut, which would be retried
    time.sleep(0.3)
    assert len(server.requests) == sent
    before = dict(server.answered)
    assert None not in judge(concurrency=2).label(labels(*"abcdefgh"))
    assert len(before) == 3 and all(server.answered[user] == 1 for user in before)


def test_a_killed_run_repeats_no_answered_call(judge, server):
    server.stops_after = 6
    process = multiprocessing.get_context("fork").Process(
        target=lambda: judge(concurrency=2).label(labels(*"abcdefghij")), daemon=True
    )
    process.start()
    deadline = time.monotonic() + 30
    while len(server.requests) < 8 and time.monotonic() < deadline:  # both threads are behind the six
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    answered = dict(server.answered)
    assert len(answered) == 6 and len(server.requests) == 8
    left = judge().record()
    assert (left["calls"], left["in_folder"]["calls"], left["in_folder"]["assumed"]) == (0, 8, 2)
    server.stops_after = None
    server.release.set()
    assert judge().label(labels(*"abcdefghij")) == [Answer(f"token {w}", "token") for w in "abcdefghij"]
    assert all(server.answered[user] == 1 for user in answered) and len(server.answered) == 10
    assert len(server.requests) == 12


def test_a_temperature_that_is_refused_is_left_out(judge, server, kind):
    server.refuses = {"temperature", "max_tokens"} if kind == "openai" else {"temperature"}
    judged = judge(retries=0)
    assert judged.label(labels("cat", "dog")) == [Answer("token cat", "token"), Answer("token dog", "token")]
    assert judged.record()["calls"] == 2
    assert judged.record()["left_out"] == (["temperature"] if kind == "openai" else [])
    assert len(server.requests) == (4 if kind == "openai" else 2)
    assert "temperature" not in server.requests[-1]


def test_the_environment_sends_nothing_elsewhere(judge, server, monkeypatch):
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    judge().label(labels("cat"))
    assert len(server.requests) == 1
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    for kind, url in (("openai", clients.OPENAI_URL), ("anthropic", clients.ANTHROPIC_URL)):
        client = judge_of(JudgeSettings(kind=kind, model="m"), None).client
        assert client.identity["base_url"] == url and str(client._client.base_url).rstrip("/") == url


def test_no_key(kind, monkeypatch):
    variable = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}[kind]
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=f"set {variable}"):
        judge_of(JudgeSettings(kind=kind, model="m"), None)
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(ConfigError, match="set OTHER_KEY"):
        judge_of(JudgeSettings(kind=kind, model="m", api_key_env="OTHER_KEY"), None)
    monkeypatch.setenv("OTHER_KEY", "sk-\nHost: evil")
    with pytest.raises(ConfigError, match="OTHER_KEY holds") as error:
        judge_of(JudgeSettings(kind=kind, model="m", api_key_env="OTHER_KEY"), None)
    assert "evil" not in str(error.value)


def test_no_client(judge, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(DependencyError, match=r'pip install "sae-lens-gemma4\[judges\]"'):
        judge()


def test_no_key_is_written(judge, server, tmp_path):
    judged = judge()
    judged.label(labels("cat"))
    server.fail("401")
    with pytest.raises(JudgeError) as error:
        judged.label(labels("dog"))
    written = b"".join(p.read_bytes() for p in (tmp_path / "cache").iterdir()).decode("latin-1")
    for text in (written, json.dumps(judged.record()), str(error.value)):
        assert KEY not in text


def test_one_model_is_one_judge_under_any_name(judge, server, kind):
    one, other = judge(name="one"), judge(name="other", temperature=None)
    assert one.name != other.name and one.identity == other.identity == f"{kind} judge-1 at {server.url(kind)}"
    assert judge(base_url=server.url(kind) + "/").identity == one.identity != judge(model="judge-2").identity
    record = one.record()
    assert record["identity"] == one.identity and record["temperature"] == (0.0 if kind == "openai" else None)
    with pytest.raises(ConfigError, match="same model"):
        check_judges([one, other])
    check_judges([one, judge(model="judge-2")])


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("HTTPS://API.Example.com:443/V1/", "https://api.example.com/V1"),
        ("http://h:80", "http://h"),
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("https://h:80/v1", "https://h:80/v1"),
        ("http://u:p@h/v1?k=1#f", "http://h/v1"),
    ],
)
def test_one_server_has_one_url(url, known):
    assert clients.plain_url(url) == known


def test_what_judges_are_told_is_said(judge, server, monkeypatch):
    judged = judge()
    judged.label(labels("cat"))
    judged.detect(detections("cat"))
    sent = [body["system"] if "system" in body else body["messages"][0]["content"] for body in server.requests]
    assert sent == [prompts()["label"], prompts()["detection"]]
    assert judged.record()["prompts"] == prompts_hash()
    before = prompts_hash()
    monkeypatch.setattr(questions, "_DETECT", "Say anything.")
    assert prompts_hash() != before


def test_what_is_sent(judge, server, kind):
    judge(max_output_tokens=77).label(labels("cat"))
    (body,), (headers,) = server.requests, server.headers
    assert body["model"] == "judge-1" and body["max_tokens"] == 77
    assert body.get("temperature") == (0.0 if kind == "openai" else None)
    assert not body.keys() - {"model", "messages", "max_tokens", "temperature", "system"}
    assert KEY in " ".join(headers.values())
