"""One item ahead: the next one is made by a thread while the one before it is used.

Making activations and training on them wait for different things (a disk, another device, another stream of the same
one), so that each can go on while the other waits. What comes out, and in which order, is what it would be without the
thread; an exception comes out where its item would have, as it was raised.

A thread lives for one item and none waits for work: an iterator that nobody reads any more holds no thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """An iterator over `items`. At most two exist: the last one given out, and the one that is being made or waits.

    Nothing is begun before the first is asked for.

    Args:
        items: None among them is no item, but a place at which the work may be stopped.
        context: entered by the thread around its work.
    """

    def __init__(
        self,
        items: Generator[Item | None, None, None],
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._items, self._context = items, context
        self._stopped = threading.Event()
        self._coming: Future[Item | None] | None = None
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Prefetch[Item]:
        return self

    def __next__(self) -> Item:
        item = (self._coming or self._begin()).result()
        if item is None:
            raise StopIteration
        self._begin()
        return item

    def settle(self) -> None:
        """Wait until the item in work, if any, is made. No other is begun before the next is asked for."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop the work at its next None, wait for that, and let go of what was made. There is no next item."""
        self._stopped.set()
        if self._thread is not threading.current_thread():  # it may be the one that collects garbage
            self.settle()
            self._items.close()
        self._coming = Future()
        self._coming.set_result(None)

    def _begin(self) -> Future[Item | None]:
        self._coming = Future()
        self._thread = threading.Thread(target=self._make, args=(self._coming,), name="sae_lens_gemma4 prefetch")
        self._thread.start()
        return self._coming

    def _make(self, coming: Future[Item | None]) -> None:
        try:
            with self._context():
                made = (item for item in self._items if item is not None or self._stopped.is_set())
                coming.set_result(next(made, None))
        except BaseException as e:
            coming.set_exception(e)


class SideStreams:
    """A context in which work on CUDA devices goes to streams of its own; on other devices it does nothing.

    Work that was queued on the devices' streams when this was made comes first. Whoever takes what was made waits for
    it, and tells the allocator by `record_stream` that it is used on another stream.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = [torch.cuda.Stream(device) for device in dict.fromkeys(devices) if device.type == "cuda"]
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
