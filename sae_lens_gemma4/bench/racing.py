"""Times that can be compared: contestants run round by round, in an order drawn anew for each, so that a machine's
drift falls on all alike; what is stated is the median over rounds of the ratio within a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")


@torch.no_grad()
def race(
    contestants: Mapping[Key, Callable[[], Any]], rounds: int, device: str | torch.device, seed: int
) -> dict[Key, list[float]]:
    """Seconds of each contestant, round by round. Nothing is warmed up here."""
    order, draw = list(contestants), random.Random(seed)
    times: dict[Key, list[float]] = {key: [] for key in order}
    for _ in range(rounds):
        draw.shuffle(order)
        for key in order:
            _wait(device)
            start = time.perf_counter()
            contestants[key]()
            _wait(device)
            times[key].append(time.perf_counter() - start)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of the ratios within rounds."""
    ratios = [o / u for o, u in zip(over, under, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), (quartiles[0], quartiles[2])


def _wait(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
