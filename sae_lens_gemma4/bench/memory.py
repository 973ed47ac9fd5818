"""The memory that a training step needs above what any step has: weights, gradients and Adam's moments.

On CUDA the caching allocator counts. On a CPU torch's profiler lists what torch allocates and frees, and tracemalloc
counts what numpy does; each has its own peak, and their sum is no less than the true one. A first step is measured for
what it leaves behind (buffers that are kept count too), a second one for its peak.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sae_lens_gemma4.bench.contestants import Contestant


@dataclass(frozen=True)
class Memory:
    """Of one contestant's step.

    Attributes:
        static_bytes: weights, gradients and Adam's two moments.
        peak_bytes: the most that is needed above these, buffers that are kept from step to step among it.
    """

    name: str
    dead: bool
    static_bytes: int
    peak_bytes: int


def memory(make: Callable[[], Contestant], x_nd: torch.Tensor, device: str, *, dead: bool) -> Memory:
    """Weigh two steps of a contestant that has not taken any.

    Args:
        make: makes it.
        x_nd: the batch of both.
    """
    runner = make()
    weights = _held(runner.parameters)
    measure = _on_cuda if torch.device(device).type == "cuda" else _on_cpu
    _, left = measure(lambda: runner.step(x_nd))
    kept = max(0, left - 2 * weights - _held(_gradients(runner)))
    to_come = weights - _held(_gradients(runner))
    peak, _ = measure(lambda: runner.step(x_nd))
    return Memory(runner.name, dead, 4 * weights, max(0, peak - to_come) + kept)


def _held(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gradients(runner: Contestant) -> list[torch.Tensor]:
    return [p.grad for p in runner.parameters if p.grad is not None]


def _on_cuda(run: Callable[[], None]) -> tuple[int, int]:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def _on_cpu(run: Callable[[], None]) -> tuple[int, int]:
    """Bytes at the peak, and bytes left at the end."""
    gc.collect()
    tracemalloc.start()
    try:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            run()
            gc.collect()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    torch_peak, torch_left = _running(profile)
    return torch_peak + peak, torch_left + left


def _running(profile: Any) -> tuple[int, int]:
    """Peak and end of the sum of all that was allocated and freed."""
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak, total


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's standard error: the profiler tells of itself there, past Python."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
