"""Requests that fail: sent again or not, when, and what of them is booked, by both protocols."""

import email.utils
import socket
import time
from datetime import datetime, timedelta, timezone

import pytest

from sae_lens_gemma4.interp.judges.judge import Answer, JudgeError, TooLongWarning
from sae_lens_gemma4.interp.judges.questions import prompt_of
from tests.interp.judges.conftest import labels
from tests.interp.judges.llm_server import KEY


@pytest.mark.parametrize(
    ("fault", "booked"), [("429 0.05", 1), ("503", 1), ("529", 1), ("500", 2), ("cut", 2), ("slow", 2)]
)
def test_what_passes_is_sent_again_and_booked_if_it_may_be_billed(judge, server, slept, fault, booked):
    server.fail(fault)
    judged = judge(timeout_s=0.2 if fault == "slow" else 5.0, max_output_tokens=77)
    assert judged.label(labels("cat")) == [Answer("token cat", "token")]
    assert len(server.requests) == 2 and len(slept) == 1
    record, n_bytes = judged.record(), prompt_of(labels("cat")[0]).n_bytes
    assert (record["calls"], record["assumed"]) == (booked, booked - 1)
    assert (record["output_tokens"] > 77, record["input_tokens"] > n_bytes) == (booked == 2, booked == 2)


def test_a_server_that_is_not_there_costs_nothing(judge, slept, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    judged = judge(base_url=url)
    with pytest.raises(JudgeError, match="ConnectError"):
        judged.label(labels("cat"))
    assert len(slept) == 2 and judged.record()["in_folder"]["calls"] == 0


def test_pauses_grow_and_differ(judge, server, slept):
    server.fail(*["500"] * 8)
    with pytest.raises(JudgeError, match="internal"):
        judge(retries=7).label(labels("cat"))
    most = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    shares = {seconds / m for seconds, m in zip(slept, most, strict=True)}
    assert all(0.5 <= share <= 1 for share in shares) and len(shares) > 1


def test_retry_after_is_kept_to(judge, server, slept):
    date = email.utils.format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    server.fail("429 7", f"429 {date}")
    judge().label(labels("cat"))
    assert slept[0] == 7.0 and 80 < slept[1] <= 90
    server.fail("429 3600")
    with pytest.raises(JudgeError, match="left alone for 3,600 seconds"):
        judge().label(labels("dog"))
    assert len(server.requests) == 4 and len(slept) == 2


def test_an_error_ends_the_waits_of_others(judge, server):
    server.fail("429 20", "slow", "401")
    server.slow_s = 0.3
    judged = judge(concurrency=2)
    judged.sleep = None
    start = time.monotonic()
    with pytest.raises(JudgeError, match="API key"):
        judged.label(labels(*"abc"))
    assert time.monotonic() - start < 5 and len(server.requests) == 3


def test_a_question_has_so_many_requests_as_was_told(judge, server):
    server.fail("500", "malformed", "500", "malformed")
    judged = judge()
    most = judged.cost_of(labels("cat")).calls_at_most
    assert judged.label(labels("cat")) == [Answer("token cat", "token")]
    assert len(server.requests) == judged.record()["calls"] == most == 5
    server.fail("500", "malformed", "500", "malformed", "500")
    with pytest.raises(JudgeError, match="internal"):
        judged.label(labels("dog"))
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    "says",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9100 tokens",
        "prompt is too long: 209353 tokens > 200000 maximum",
        "input length and `max_tokens` exceed context limit: 178959 + 64000 > 200000",
        "request (4390 tokens) exceeds the available context size (4096 tokens), try increasing it",
        "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
    ],
)
def test_a_question_that_is_too_long_does_not_end_the_run(judge, server, slept, says):
    server.fail("ok", f"400 {says}")
    judged = judge()
    with pytest.warns(TooLongWarning, match="judge-1 cannot read 1 of 3 questions.*show fewer"):
        assert judged.label(labels("a1", "b2", "c3"))[1:] == [None, Answer("token c3", "token")]
    record = judged.record()
    assert (record["asked"], record["unanswered"], record["unusable"], record["calls"]) == (3, 1, 1, 2)
    assert record["refused"] == {"the question is longer than the model reads": 1} and not slept
    assert None not in judge().label(labels("a1", "b2", "c3"))  # as of a server with a longer context
    assert len(server.requests) == 4


def test_another_400_is_an_error_whatever_it_quotes(judge, server):
    server.fail("400 unknown field 'x' in: " + "word " * 100 + "the maximum context length is known")
    with pytest.raises(JudgeError, match="unknown field"):
        judge().label(labels("cat"))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "n_calls", "says"),
    [
        ("401", 1, "API key"),
        ("404", 1, "no such model"),
        ("500", 2, "internal"),
        ("cut", 2, "judge-1"),
        ("redirect", 1, "307"),
    ],
)
def test_what_stays_is_an_error_in_words(judge, server, kind, fault, n_calls, says):
    server.fail(*[fault] * 4)
    with pytest.raises(JudgeError, match=says) as error:
        judge(retries=1).label(labels("cat"))
    assert len(server.requests) == n_calls
    assert f"'judge-1' at {server.url(kind)}" in str(error.value)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("fault", ["html", "broken"])
def test_a_server_of_something_else(judge, server, fault):
    server.fail(*[fault] * 3)
    with pytest.raises(JudgeError, match=r"judge-1.* is no "):
        judge(retries=0).label(labels("cat"))


def test_a_server_that_hangs_is_left(judge, server):
    server.slow_s = 5
    server.fail("slow", "slow")
    judged = judge(timeout_s=0.2, retries=1, max_output_tokens=50)
    with pytest.raises(JudgeError, match=r"judge-1.*timed out"):
        judged.label(labels("cat"))
    assert len(server.requests) == 2
    assert judged.record()["in_folder"]["output_tokens"] == 100
