"""What it costs, told before and kept to."""

import contextlib
import multiprocessing
import threading

import pytest

from sae_lens_gemma4.interp.judges.budget import Budget, BudgetError, Prices
from sae_lens_gemma4.interp.judges.cache import AnswerCache
from sae_lens_gemma4.interp.judges.questions import AGAIN_BYTES, prompt_of
from tests.interp.judges.conftest import detections, labels

PRICED = {"usd_per_million_input": 2.0, "usd_per_million_output": 10.0, "max_output_tokens": 100}


def test_cost_is_told_before_and_holds(judge, server):
    judged = judge(**PRICED)
    questions = [*labels("cat", "dog", "cat"), *detections("cat")]
    cost = judged.cost_of(questions)
    sizes = [len(p.system.encode()) + len(p.user.encode()) for p in map(prompt_of, questions)]
    different = [sizes[0], sizes[1], sizes[3]]  # the third is the first again
    assert (cost.questions, cost.cached, cost.calls, cost.calls_at_most) == (3, 0, 3, 15)
    assert cost.input_tokens == sum(-(-2 * n // 7) + 64 for n in different)
    assert cost.output_tokens == 300
    assert cost.usd == pytest.approx(cost.input_tokens * 2e-6 + 300 * 1e-5)
    assert cost.usd_at_most == pytest.approx(
        5 * ((sum(different) + 3 * 64) * 2e-6 + 300 * 1e-5) + 4 * 3 * AGAIN_BYTES * 2e-6
    )
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
    assert (cost.questions, cost.calls, cost.calls_at_most, cost.output_tokens) == (14, 14, 70, 1400)
    assert cost.usd < judged.cost(10, 5, n_examples=3, bytes_per_example=100).usd
    assert cost.usd < judged.cost(10, 4, n_examples=3, bytes_per_example=200).usd
    free = judge().cost(10, 4)
    assert free.usd is None and free.usd_at_most is None and free.input_tokens > 0
    real = judged.cost_of(detections("cat"))
    assert judged.cost(0, 1, n_examples=3, bytes_per_example=19).input_tokens >= real.input_tokens


def test_calls_are_kept_to_by_all_runs_on_a_folder(judge, server, tmp_path):
    for name in ("one", "one", "other"):
        with pytest.raises(BudgetError, match=r"max_calls is 3, and 3 were made in this folder.*raise max_calls"):
            judge(max_calls=3, name=name).label(labels(*"abcde"))
        assert len(server.requests) == 3
    judged = judge(max_calls=5)
    assert None not in judged.label(labels(*"abcde"))
    assert len(server.requests) == 5
    assert judged.record()["calls"] == 2 and judged.record()["in_folder"]["calls"] == 5
    assert None not in judge(max_calls=3, model="judge-2").label(labels(*"abc"))  # has a sum of its own
    assert None not in judge(tmp_path / "other", max_calls=3).label(labels(*"abc"))
    with pytest.raises(BudgetError, match="3 were made in this run"):
        judge(None, max_calls=3).label(labels(*"abcd"))


def test_a_request_that_is_sent_again_is_in_the_budget(judge, server):
    server.fail("500", "500")
    with pytest.raises(BudgetError, match="max_calls is 2"):
        judge(max_calls=2).label(labels("cat"))
    assert len(server.requests) == 2


@pytest.mark.parametrize("concurrency", [1, 4])
def test_dollars_are_kept_to_by_all_runs_on_a_folder(judge, server, concurrency):
    words = [f"w{i}" for i in range(40)]
    most = (prompt_of(labels("w1")[0]).n_bytes + 64) * 2e-6 + 100 * 1e-5
    spent, n_sent = 0.0, []
    for limit in (2.5, 2.5, 3.5):
        judged = judge(**PRICED, max_usd=most * limit, concurrency=concurrency)
        with pytest.raises(
            BudgetError, match=r"USD are spent in \d+ calls in this folder.*, and the next call may cost"
        ):
            judged.label(labels(*words))
        record = judged.record()
        assert record["in_folder"]["usd"] == pytest.approx(spent + record["usd"])
        spent = record["in_folder"]["usd"]
        assert most * (limit - 1.1) < spent <= most * limit  # it goes on while the most of one more call fits
        assert record["in_folder"]["calls"] == len(server.requests) == sum(server.answered.values())
        n_sent.append(len(server.requests))
    assert n_sent[0] == n_sent[1] < n_sent[2]


def _spend(folder, i):
    budget = Budget(Prices(), 10, most_calls=20, ledger=AnswerCache(folder), judge="j")
    with contextlib.suppress(BudgetError):
        for _ in range(15):
            budget.book(budget.reserve(100), 5, 2)


def test_processes_share_a_limit(tmp_path):
    AnswerCache(tmp_path).close()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_spend, args=(tmp_path, i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert AnswerCache(tmp_path).spent("j") == (20, 100, 40, 0)
    assert AnswerCache(tmp_path).spent("k") == (0, 0, 0, 0)


def test_a_reply_without_usage_is_booked_in_full(judge, server, kind):
    server.usage = False
    judged = judge(max_output_tokens=100)
    judged.label(labels("cat"))
    if kind == "openai":
        assert judged.record()["output_tokens"] == 100
        assert judged.record()["input_tokens"] == prompt_of(labels("cat")[0]).n_bytes + 64
        assert judged.record()["assumed"] == 1


def test_a_call_waits_for_what_others_have_set_aside():
    budget = Budget(Prices(1e6, 0.0), 10, most_usd=200.0)  # a dollar a token
    first = budget.reserve(100)
    assert first == (1, 164, 10, 1)
    began = []
    thread = threading.Thread(target=lambda: began.append(budget.reserve(100)), daemon=True)
    thread.start()
    thread.join(0.1)
    assert began == []
    budget.book(first, 20, 1)
    thread.join(5)
    assert began == [first] and budget.used == (2, 184, 11, 1)
    budget.release(first)
    assert budget.used == (1, 20, 1, 0)
    budget.book(budget.reserve(116), 150, 0)
    with pytest.raises(BudgetError, match="170 USD are spent in 2 calls in this run, and the next call may cost 164"):
        budget.reserve(100)
    assert budget.used == (2, 170, 1, 0)


def test_without_limits_nothing_is_refused():
    budget = Budget(Prices(), 10)
    for _ in range(100):
        budget.book(budget.reserve(10**9), 5, 2)
    said = {"calls": 100, "input_tokens": 500, "output_tokens": 200, "assumed": 0, "usd": None}
    assert budget.record() == {**said, "in_folder": said, "max_calls": None, "max_usd": None}


def test_a_request_without_a_reply_stays_at_its_most():
    budget = Budget(Prices(1.0, 2.0), 10, most_usd=1.0)
    budget.book(budget.reserve(100))
    budget.book(budget.reserve(100), 7)
    assert budget.used == (2, 171, 20, 2)
    budget.release(budget.reserve(100))
    assert budget.record()["in_folder"]["usd"] == pytest.approx((171 + 2 * 20) / 1e6)


def test_what_is_added_to_a_question_is_no_more_than_is_told():
    prompt = prompt_of(detections("cat")[0])
    for n in (1, 10**6):
        reason = f'"applies" must be whole numbers from 1 to {n}'
        assert prompt.again(reason).n_bytes - prompt.n_bytes <= AGAIN_BYTES
