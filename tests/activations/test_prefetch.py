"""Made ahead, in order, and never more than one."""

import threading
from contextlib import contextmanager

import pytest
import torch

from sae_lens_gemma4.activations.prefetch import Prefetch, SideStreams


def counted(n, made):
    for i in range(n):
        yield None
        made.append((i, threading.current_thread()))
        yield i


def test_items_come_in_order_each_made_by_a_thread_while_the_one_before_is_used():
    made = []
    items = Prefetch(counted(4, made))
    assert made == []
    for i in range(4):
        assert next(items) == i
        items.settle()
        assert [number for number, _ in made] == [*range(min(i + 2, 4))]
    assert list(items) == [] and list(items) == []
    assert threading.main_thread() not in {thread for _, thread in made}


def test_an_exception_comes_in_its_item_s_place_as_it_was_raised():
    error = LookupError("the third")

    def failing():
        yield from (0, None, 1)
        raise error

    items = Prefetch(failing())
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(LookupError) as raised:
        next(items)
    assert raised.value is error and "failing" in [entry.name for entry in raised.traceback]


def test_closing_stops_the_work_where_it_may_be_stopped_and_closes_it():
    reached, done = threading.Event(), []

    def work():
        try:
            yield 0
            reached.set()
            assert items._stopped.wait(60)
            done.append("a step")
            yield None
            done.append("another")
            yield 1
        finally:
            done.append("closed")

    items = Prefetch(work())
    assert next(items) == 0 and reached.wait(60)
    items.close()
    assert done == ["a step", "closed"] and list(items) == []
    items.close()


def test_what_was_never_begun_is_closed_without_being_begun():
    made = []
    items = Prefetch(counted(3, made))
    items.settle()
    items.close()
    assert list(items) == [] and made == []


def test_the_context_is_entered_by_the_thread_around_each_item():
    entered, made = [], []

    @contextmanager
    def context():
        entered.append(threading.current_thread())
        yield

    assert list(Prefetch(counted(3, made), context)) == [0, 1, 2]
    assert entered[:3] == [thread for _, thread in made] and len(entered) == 4  # the last finds the end


def test_beside_cuda_there_are_no_streams_of_one_s_own():
    with SideStreams([torch.device("cpu"), torch.device("cpu")])():
        assert torch.ones(2).sum() == 2
