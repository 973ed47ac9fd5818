"""The mean of a figure over latents, with its interval, and as plain data.

Labels are verified one latent at a time, and what is told of them is a mean over latents. Latents were drawn, so they
are what is drawn again; a difference of two figures of the same latents is the mean of their differences, which pairs
them.

Shapes: `n` latents, `k` groups of them (one each, up to 1,024), `r` rows of weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_lens_gemma4.evaluation.intervals import Sampling, clusters


class Mean(NamedTuple):
    """A mean over `n`; None of none. `low` and `high` are None where there are too few for an interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def mean_of(values: Iterable[float], sampling: Sampling) -> Mean:
    """The mean of some latents' figures, with the interval of a bootstrap over latents (`Sampling`)."""
    value_n = torch.from_numpy(np.fromiter(values, dtype=np.float64))
    n = len(value_n)
    if not n:
        return Mean(None, None, None, 0)
    mean = float(value_n.mean())
    group_n = clusters(n)
    n_groups = int(group_n[-1]) + 1
    weights_rk = sampling.weights(n_groups)
    if weights_rk is None:
        return Mean(mean, None, None, n)
    sum_k = torch.zeros(n_groups, dtype=torch.float64).index_add_(0, group_n, value_n)
    count_k = torch.bincount(group_n, minlength=n_groups).double()
    low, high = sampling.interval(mean, (weights_rk @ sum_k) / (weights_rk @ count_k)) or (None, None)
    return Mean(mean, low, high, n)


def plain(value: Any) -> Any:
    """Results as JSON has them: named tuples as objects, other tuples as lists, numpy's numbers as Python's, None for
    what is not finite."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(v) for name, v in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
