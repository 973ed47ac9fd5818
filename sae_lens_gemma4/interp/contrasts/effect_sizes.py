"""Cohen's d of very many features under very many assignments of items to two groups.

With the pooled standard deviation, d is a function of the correlation r of a feature with membership, whatever the
feature's scale: d = r √(c (n − 2) / (1 − r²)), c = n / (n_a n_b). So all features under all permutations of the groups
are one product of matrices, and the largest r of each permutation is the largest d.

A feature without spread within the groups has an infinite d, and from one item more in the thousands. `MOST_D` is the
most that any d here is taken for, observed, permuted, halved or resampled alike, so that one such feature neither is a
mean of ten by itself nor has resamples by another rule than its estimate.

Shapes: `n` items, `f` features, `b` permutations, `r` rows of weights, `s` splits in halves, `h` = 2s halves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sae_lens_gemma4.evaluation.intervals import Interval, Sampling

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_CHUNK = 2**22
"""Correlations held at once: 16 MiB in float32."""
_TIE = 1e-5
"""The null's correlations are float32."""
MOST_D = 10.0
"""A |d| that is larger is this. At 10, of normal groups one item in three million is beyond the middle between them."""
_WITHIN = 1e-12
"""The least share of a feature's variance that is taken to lie within the groups; with less, d is beyond `MOST_D`."""


class Null(NamedTuple):
    """What permuted groups give: the largest |r| of any feature, and the mean of the largest |d|, float64 `[b]`."""

    largest_b: Floats
    curve_b: Floats


class Halves(NamedTuple):
    """Features chosen on one half and measured on the other.

    Attributes:
        measured_h: mean d on the other half of the features with the largest |d| on this one, signed so that the same
            direction is positive, with Hedges' (1981) correction for the small half.
        curve_h: mean |d| of those features on the half that chose them.
    """

    measured_h: Floats
    curve_h: Floats


def permuted(in_group_n: Bools, permutations: int, seed: int) -> torch.Tensor:
    """Membership drawn anew, group sizes kept: float32 `[b, n]`."""
    drawn = np.random.default_rng(seed).permuted(np.tile(in_group_n, (permutations, 1)), axis=1)
    return torch.from_numpy(drawn.astype(np.float32))


def unit_columns(values_nf: npt.NDArray[np.float32]) -> torch.Tensor:
    """Centred columns of length one, float32: their sum over a group is r / √c."""
    x_nf = torch.from_numpy(values_nf).double()
    x_nf = x_nf - x_nf.mean(dim=0)
    unit_nf: torch.Tensor = (x_nf / x_nf.norm(dim=0)).float()
    return unit_nf


def correlations(unit_nf: torch.Tensor, in_group_n: Bools) -> Floats:
    """r of each feature with membership, float64 `[f]`."""
    r_f: Floats = (math.sqrt(_c(in_group_n)) * (torch.from_numpy(in_group_n).double() @ unit_nf.double())).numpy()
    return r_f


def d_of(r: torch.Tensor, in_group_n: Bools) -> torch.Tensor:
    """Cohen's d from r, ± `MOST_D` at most."""
    scale = math.sqrt(_c(in_group_n) * (len(in_group_n) - 2))
    return (r * scale / (1 - r.square()).clamp(min=_WITHIN).sqrt()).clamp(-MOST_D, MOST_D)


def under_permutation(unit_nf: torch.Tensor, permuted_bn: torch.Tensor, in_group_n: Bools, top: int) -> Null:
    """The largest |r|, and the mean of the `top` largest |d|, under each permutation."""
    scale = math.sqrt(_c(in_group_n))
    largest, curves = [], []
    for rows in permuted_bn.split(max(1, _CHUNK // unit_nf.shape[1])):
        r_bf = (rows @ unit_nf).mul_(scale).abs_()
        top_bk = r_bf.topk(min(top, r_bf.shape[1]), dim=1).values
        largest.append(top_bk[:, 0])
        curves.append(d_of(top_bk, in_group_n).mean(dim=1))
    return Null(torch.cat(largest).double().numpy(), torch.cat(curves).double().numpy())


def shares(null_b: Floats, value_f: Floats) -> Floats:
    """p-values: how many of a null's values, ascending, and of the value itself, are as large as it; two that are
    nearer than `_TIE` are equal."""
    as_large_f = len(null_b) - np.searchsorted(null_b, value_f - _TIE)
    return (1 + as_large_f) / (1 + len(null_b))


def half_by_half(values_nf: npt.NDArray[np.float32], in_group_n: Bools, splits: int, seed: int, top: int) -> Halves:
    """Both groups split in halves `splits` times; each half chooses, the other measures: neither sees the other.

    Cohen's d of few items is too large on average even where nothing was chosen: by 6 % in halves of 8 items against 8
    of a normal feature. Hedges' factor takes that out.
    """
    generator = np.random.default_rng(seed)
    chosen_sn = np.zeros((splits, len(in_group_n)))
    for row_n in chosen_sn:
        for group in (True, False):
            members = np.flatnonzero(in_group_n == group)
            row_n[generator.permutation(members)[: len(members) // 2]] = 1
    weights_hn = torch.from_numpy(np.concatenate([chosen_sn, 1 - chosen_sn]))
    d_hf = weighted_d(values_nf, weights_hn, in_group_n)
    top_hk = d_hf.abs().topk(min(top, d_hf.shape[1]), dim=1)
    other_hk = d_hf.roll(splits, dims=0).gather(1, top_hk.indices)
    signed_hk = other_hk * d_hf.gather(1, top_hk.indices).sign()
    factor_h = [hedges(int(weights_n.sum()) - 2) for weights_n in weights_hn.roll(splits, dims=0)]
    return Halves(signed_hk.mean(dim=1).numpy() * np.array(factor_h), top_hk.values.mean(dim=1).numpy())


def hedges(freedom: int) -> float:
    """What Cohen's d with so many degrees of freedom is multiplied by to be unbiased for normal features (Hedges 1981,
    exactly)."""
    log_factor = math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)
    return math.exp(log_factor) / math.sqrt(freedom / 2)


def weighted_d(values_nf: npt.NDArray[np.float32], weights_rn: torch.Tensor, in_group_n: Bools) -> torch.Tensor:
    """Cohen's d of each feature where item i counts `weights_rn[r, i]` times, ± `MOST_D` at most: float64 `[r, f]`."""
    x_nf = torch.from_numpy(values_nf).double()
    x_nf = x_nf - x_nf.mean(dim=0)
    scale_f = x_nf.norm(dim=0) / math.sqrt(len(x_nf))
    x_nf = x_nf / torch.where(scale_f > 0, scale_f, 1)
    means, squares, totals = [], torch.zeros(len(weights_rn), x_nf.shape[1], dtype=torch.float64), []
    for group in (in_group_n, ~in_group_n):
        members = torch.from_numpy(np.flatnonzero(group))
        w_rm, x_mf = weights_rn[:, members], x_nf[members]
        total_r = w_rm.sum(dim=1, keepdim=True)
        mean_rf = w_rm @ x_mf / total_r
        squares += w_rm @ x_mf.square() - total_r * mean_rf.square()
        means.append(mean_rf)
        totals.append(total_r)
    pooled_rf = squares / (totals[0] + totals[1] - 2)
    return ((means[0] - means[1]) / pooled_rf.clamp(min=_WITHIN).sqrt()).clamp(-MOST_D, MOST_D)


class Resampled:
    """Cohen's d of some features on bootstrap samples of the items, each group drawn from itself.

    BCa intervals of two groups (Efron and Tibshirani 1993, chapter 14): draws of each, then all items but one; each
    group's part of the acceleration is taken about its own mean.

    Args:
        sampling: None of its intervals are made where a group has fewer than `MIN_DOCUMENTS` items.
    """

    def __init__(self, in_group_n: Bools, sampling: Sampling) -> None:
        self.in_group_n, self.sampling = in_group_n, sampling
        sizes = int(in_group_n.sum()), int((~in_group_n).sum())
        seeds = np.random.SeedSequence(sampling.seed).generate_state(2).tolist()
        drawn = [
            Sampling(sampling.resamples, seed, sampling.level).weights(n) for n, seed in zip(sizes, seeds, strict=True)
        ]
        self.weights_rn: torch.Tensor | None = None
        if drawn[0] is None or drawn[1] is None:
            return
        n_draws = sampling.resamples
        self.weights_rn = torch.ones(n_draws + sum(sizes), len(in_group_n), dtype=torch.float64)
        self._without: list[slice] = []
        first = n_draws
        for group, weights in zip((in_group_n, ~in_group_n), drawn, strict=True):
            members = torch.from_numpy(np.flatnonzero(group))
            self.weights_rn[:n_draws, members] = weights[:n_draws]  # type: ignore[index]
            here = slice(first, first := first + len(members))
            self.weights_rn[here, members] = weights[n_draws:]  # type: ignore[index]
            self._without.append(here)

    def d(self, values_nf: npt.NDArray[np.float32]) -> torch.Tensor | None:
        """Float64 `[r, f]`; None where there are too few items."""
        return None if self.weights_rn is None else weighted_d(values_nf, self.weights_rn, self.in_group_n)

    def interval(self, value: float, replicates_r: torch.Tensor) -> Interval | None:
        """Of a figure that was computed on each row of `d`."""
        aligned_r = replicates_r.clone()
        for here in self._without:
            m = here.stop - here.start
            aligned_r[here] = (replicates_r[here] - replicates_r[here].mean()) * (m - 1) / m
        return self.sampling.interval(value, aligned_r)


def _c(in_group_n: Bools) -> float:
    n = len(in_group_n)
    n_a = int(in_group_n.sum())
    return n / (n_a * (n - n_a))
