"""Every figure as a formula on sums, for the tokens as they are and for any number of resamples of them at once.

A resample draws documents; `weights_bk` says how often each was drawn. All tokens once is one more row, of ones. So a
figure and its bootstrap replicates come from the same lines, and cannot disagree.

Variance explained is 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖² over the tokens that count, sae_lens's definition (evals.py,
`explained_variance`); figures of other tools are not comparable. What is not defined is NaN here and None outside.

Shapes: `b` resamples, `k` documents, `m` rows kept of the worst tokens, `d` the activations' width.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch

from sae_lens_gemma4.evaluation.sums import COLUMNS

ROUNDING = 1e-13
"""Of float64 sums, with room: a variance below this part of what it was made from is not told from zero."""


class Sums(NamedTuple):
    """Sums of `COLUMNS` `[b, c]`, of ‖x − reference‖² `[b, 1]` and of x − reference `[b, d]`."""

    columns: torch.Tensor
    centred: torch.Tensor
    x: torch.Tensor

    def of(self, column: str) -> torch.Tensor:
        return self.columns[:, COLUMNS.index(column)]

    def weighted(self, weights_bk: torch.Tensor) -> Sums:
        return Sums(*(weights_bk @ part for part in self))

    def plus(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: Sums) -> Sums:
        return Sums(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


class Kept(NamedTuple):
    """Tokens that may be left out, the first to go first: their own sums `[m, …]` and their documents' places `[m]`."""

    sums: Sums
    document: torch.Tensor


def top_count(fraction: float, n_tokens: float) -> int:
    """⌈f · n⌉ for the fraction as it is written: .07 of 100 is 7, which in floats is a little more."""
    return math.ceil(Fraction(str(float(fraction))) * int(n_tokens))


def ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """part / whole; NaN where whole is zero."""
    return torch.where(whole != 0, part / whole, torch.nan)


def variance(sums: Sums) -> torch.Tensor:
    """Σ‖x − mean(x)‖² `[b]`; NaN where it is lost in the rounding of what it was made from."""
    value = sums.centred[:, 0] - sums.x.square().sum(1) / sums.of("n").clamp(min=1)
    floor = torch.maximum(ROUNDING**2 * sums.of("squares"), ROUNDING * sums.centred[:, 0])
    return torch.where(value > floor, value, torch.nan)


def variance_explained(sums: Sums, left_out: Sums | None = None) -> torch.Tensor:
    """VE `[b]` of all tokens, or of those that stay."""
    if left_out is None:
        return 1 - sums.of("sse") / variance(sums)
    stay = sums.minus(left_out)
    value = variance(stay)
    lost = (stay.of("n") < 1) | (value <= ROUNDING * sums.centred[:, 0])
    return torch.where(lost, torch.nan, 1 - stay.of("sse") / value)


def plain_figures(sums: Sums, error_bd: torch.Tensor) -> dict[str, torch.Tensor]:
    """The figures on all tokens, each `[b]`; `error_bd` are the sums of x − x̂."""
    n, sse = sums.of("n"), sums.of("sse")
    bias = error_bd.square().sum(1) / n
    return {
        "ve": variance_explained(sums),
        "ve_centred": 1 - (sse - bias) / variance(sums),
        "mse": ratio(sse, n),
        "nmse": ratio(sse, sums.of("squares")),
        "cosine": ratio(sums.of("cosine"), sums.of("cosine_n")),
        "relative_bias": ratio(sums.of("squares_hat"), sums.of("dot")),
        "l2_norm_in": ratio(sums.of("norm"), n),
        "l2_norm_out": ratio(sums.of("norm_hat"), n),
        "l2_ratio": ratio(sums.of("ratio"), sums.of("ratio_n")),
        "l0": ratio(sums.of("l0"), n),
        "l1": ratio(sums.of("l1"), n),
    }


def top_sums(kept: Kept, weights_bk: torch.Tensor, n_b: torch.Tensor, fraction: float) -> Sums:
    """The sums of the first ⌈fraction · n⌉ tokens of each resample.

    A document drawn twice brings its tokens twice. NaN for a resample that needs more rows than were kept.
    """
    wanted_b = n_b.new_tensor([top_count(fraction, n) for n in n_b.tolist()])
    m, n_kept = int(wanted_b.max()), len(kept.document)
    while m < n_kept and (weights_bk[:, kept.document[:m]].sum(1) < wanted_b).any():
        m *= 2  # most draws need little more than they want
    drawn_bm = weights_bk[:, kept.document[:m]]
    before_bm = drawn_bm.cumsum(1) - drawn_bm
    taken_bm = torch.minimum((wanted_b[:, None] - before_bm).clamp(min=0), drawn_bm)
    short_b = taken_bm.sum(1) < wanted_b
    sums = Sums(*(rows[:m] for rows in kept.sums)).weighted(taken_bm)
    for part in sums:
        part[short_b] = torch.nan
    return sums
