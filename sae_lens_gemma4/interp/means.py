"""Means with intervals by a bootstrap over what was drawn: latents, prompts or documents; and results as plain data.

Labels are verified one latent at a time, and what is told of them is a mean over latents. Latents were drawn, so they
are what is drawn again; a difference of two figures of the same latents is the mean of their differences, which pairs
them. Positions of one prompt, and tokens of one document, go together: there the prompts and documents are drawn.

Shapes: `n` values, `l` figures of each, `k` groups that are drawn (`clusters`: one each, up to 1,024), `r` rows of
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from sae_lens_gemma4.evaluation.intervals import Estimate, Sampling, clusters


class Mean(NamedTuple):
    """A mean over `n`; None of none. `low` and `high` are None where there are too few for an interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def mean_of(values: Iterable[float], sampling: Sampling) -> Mean:
    """The mean of some latents' figures, with the interval of a bootstrap over latents (`Sampling`)."""
    value_n1 = torch.from_numpy(np.fromiter(values, dtype=np.float64))[:, None]
    if not len(value_n1):
        return Mean(None, None, None, 0)
    [mean], _ = means_of(*summed(value_n1, torch.arange(len(value_n1))), sampling)
    low, high = mean.interval or (None, None)
    return Mean(float(mean), low, high, len(value_n1))


def summed(value_nl: torch.Tensor, drawn_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `means_of` takes: sums and counts by group of what each value belongs to, which is numbered from 0 on."""
    group_n = clusters(int(drawn_n.max()) + 1)[drawn_n]
    count_k = torch.bincount(group_n).double()
    sum_kl = torch.zeros(len(count_k), value_nl.shape[1], dtype=torch.float64).index_add_(0, group_n, value_nl.double())
    return sum_kl, count_k


def means_of(
    sum_kl: torch.Tensor, count_k: torch.Tensor, sampling: Sampling
) -> tuple[list[Estimate], torch.Tensor | None]:
    """Means of what was summed by group, float64, with their intervals; all on the same draws of groups, which stand
    beside them `[r, l]`, the first `sampling.resamples` rows of `Sampling.weights` first. None with too few groups."""
    value_l = (sum_kl.sum(dim=0) / count_k.sum()).tolist()
    weights_rk = sampling.weights(len(count_k))
    if weights_rk is None:
        return [Estimate(value) for value in value_l], None
    mean_rl = (weights_rk @ sum_kl) / (weights_rk @ count_k)[:, None]
    return [Estimate(value, sampling.interval(value, mean_rl[:, at])) for at, value in enumerate(value_l)], mean_rl


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
