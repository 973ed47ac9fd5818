"""What it costs, told before and kept to."""

import threading

import pytest

from sae_lens_gemma4.interp.judges.budget import Budget, BudgetError, Prices
from sae_lens_gemma4.interp.judges.questions import prompt_of
from tests.interp.judges.conftest import detections, labels

PRICED = {"usd_per_million_input": 2.0, "usd_per_million_output": 10.0, "max_output_tokens": 100}


def test_cost_is_told_before_and_holds(judge, server):
    judged = judge(**PRICED)
    questions = [*labels("cat", "dog", "cat"), *detections("cat")]
    cost = judged.cost_of(questions)
    sizes = [len(p.system.encode()) + len(p.user.encode()) for p in map(prompt_of, questions)]
    different = [sizes[0], sizes[1], sizes[3]]  # the third is the first again
    assert (cost.questions, cost.cached, cost.calls, cost.calls_at_most) == (3, 0, 3, 9)
    assert cost.input_tokens == sum(-(-2 * n // 7) + 64 for n in different)
    assert cost.output_tokens == 300
    assert cost.usd == pytest.approx(cost.input_tokens * 2e-6 + 300 * 1e-5)
    assert cost.usd_at_most == pytest.approx(3 * ((sum(different) + 3 * 64) * 2e-6 + 300 * 1e-5))
    judged.label(questions[:3])
    judged.detect(questions[3:])
    record = judged.record()
    assert record["calls"] == 3 and 0 < record["input_tokens"] <= cost.input_tokens
    assert 0 < record["output_tokens"] <= cost.output_tokens and record["usd"] <= cost.usd
    assert record["usd"] == pytest.approx(record["input_tokens"] * 2e-6 + record["output_tokens"] * 1e-5)
    assert judge(**PRICED).cost_of(questions)[:4] == (3, 3, 0, 0)
    assert judge(**PRICED).cost_of(questions).usd_at_most == 0


def test_cost_before_there_are_questions(judge, server):
    judged = judge(**PRICED)
    cost = judged.cost(10, 4, n_examples=3, bytes_per_example=100)
    assert (cost.questions, cost.calls, cost.calls_at_most, cost.output_tokens) == (14, 14, 42, 1400)
    assert cost.usd < judged.cost(10, 5, n_examples=3, bytes_per_example=100).usd
    assert cost.usd < judged.cost(10, 4, n_examples=3, bytes_per_example=200).usd
    free = judge().cost(10, 4)
    assert free.usd is None and free.usd_at_most is None and free.input_tokens > 0
    real = judged.cost_of(detections("cat"))
    assert judged.cost(0, 1, n_examples=3, bytes_per_example=19).input_tokens >= real.input_tokens


def test_calls_are_kept_to_and_answers_kept(judge, server):
    judged = judge(max_calls=3)
    with pytest.raises(BudgetError, match=r"max_calls is 3.*raise max_calls"):
        judged.label(labels(*"abcde"))
    assert len(server.requests) == 3
    assert None not in judge(max_calls=2).label(labels(*"abcde"))
    assert len(server.requests) == 5


@pytest.mark.parametrize("concurrency", [1, 4])
def test_dollars_are_kept_to(judge, server, concurrency):
    most = judge(**PRICED).cost_of(labels("a")).usd_at_most / 3
    judged = judge(**PRICED, max_usd=most * 2.5, concurrency=concurrency)
    with pytest.raises(BudgetError, match=r"max_usd is .* USD are spent in \d+ calls, and the next call may cost"):
        judged.label(labels(*(f"w{i}" for i in range(40))))
    spent = judged.record()["usd"]
    assert most * 1.4 < spent <= most * 2.5  # it goes on while the most of one more call fits
    assert judged.record()["calls"] == len(server.requests) == sum(server.answered.values())


def test_a_reply_without_usage_is_booked_in_full(judge, server, kind):
    server.usage = False
    judged = judge(max_output_tokens=100)
    judged.label(labels("cat"))
    if kind == "openai":
        assert judged.record()["output_tokens"] == 100
        assert judged.record()["input_tokens"] == prompt_of(labels("cat")[0]).n_bytes


def test_a_call_waits_for_what_others_have_set_aside():
    budget = Budget(Prices(1e6, 0.0), 10, most_usd=200.0)  # a dollar a token
    first = budget.reserve(100)
    assert first == 164
    began = []
    thread = threading.Thread(target=lambda: began.append(budget.reserve(100)), daemon=True)
    thread.start()
    thread.join(0.1)
    assert began == []
    budget.book(first, 20, 1)
    thread.join(5)
    assert began == [164] and budget.usd == 20
    budget.release(164)
    budget.reserve(116)
    budget.book(180, 150, 0)
    with pytest.raises(BudgetError, match="170 USD are spent in 2 calls, and the next call may cost 164"):
        budget.reserve(100)
    assert budget.used == (2, 170, 1)


def test_without_limits_nothing_is_refused():
    budget = Budget(Prices(), 10)
    for _ in range(100):
        budget.book(budget.reserve(10**9), 5, 2)
    assert budget.record() == {
        "calls": 100, "input_tokens": 500, "output_tokens": 200, "usd": None, "max_calls": None, "max_usd": None
    }  # fmt: skip
