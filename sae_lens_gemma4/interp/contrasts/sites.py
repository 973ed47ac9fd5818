"""One site of a contrast: every feature's effect, and what permuted groups, halves and resampled items make of it.

`SiteReading` is what can be known of a site by itself; p-values need all sites, since chance is measured by the largest
of all.

Shapes: as `contrast.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sae_lens_gemma4.evaluation.intervals import Interval
from sae_lens_gemma4.interp.contrasts import effect_sizes
from sae_lens_gemma4.interp.contrasts.effect_sizes import MOST_D, Bools, Floats, Halves, Null, Resampled, shares
from sae_lens_gemma4.interp.item_means import Site, length_correlation

LEVEL = 0.05
"""The family-wise p-value up to which a feature is found."""
LEAST_SPLIT = 8
"""Items a group must have to be halved: four in each half. With fewer, which features a half chooses is chance."""


class Feature(NamedTuple):
    """One dimension or latent.

    Attributes:
        feature: its number at the site.
        d: Cohen's d, group − rest, ± `MOST_D` at most; `interval` is its bootstrap interval, None with too few items
            and of a feature that `separates`.
        separates: |d| is `MOST_D` or more: within the groups too little varies for an interval.
        p_value: family-wise, over all features of all sites; by r, which has no such limit.
        active: items in which it is not zero.
        length_r: its correlation with the items' numbers of tokens; None where these are all the same.
    """

    feature: int
    d: float
    interval: Interval | None
    separates: bool
    p_value: float
    active: int
    length_r: float | None


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteContrast:
    """One site.

    Attributes:
        d_f: Cohen's d of every feature, ± `MOST_D` at most, 0 of those left out.
        p_f: family-wise p-values, 1 of those left out.
        admitted_f: which vary, and are active in enough items.
        curve: mean of the largest |d|; None where nothing was admitted.
        interval: of the mean |d| of the features chosen, held fixed.
        split_half: mean d, on half of the items, of the features chosen on the other; None where a group has fewer
            than `LEAST_SPLIT` items. See `contrast.py` for what it estimates.
        null_median, null_95: of the curve with permuted groups.
        p_value: share of permutations whose largest curve over all sites is as large.
        top: the features with the largest |d|.
        difference_d: group mean − rest's mean, of activations; None of latents.
    """

    hook_name: str
    kind: str
    d_f: Floats
    p_f: Floats
    admitted_f: Bools
    curve: float | None
    interval: Interval | None
    split_half: float | None
    null_median: float | None
    null_95: float | None
    p_value: float | None
    top: tuple[Feature, ...]
    difference_d: npt.NDArray[np.float32] | None

    @property
    def n_found(self) -> int:
        """Features with a family-wise p-value of .05 or less."""
        return int((self.p_f <= LEVEL).sum())

    def to_dict(self) -> dict[str, Any]:
        return {
            "hook_name": self.hook_name,
            "kind": self.kind,
            "features": len(self.d_f),
            "left_out": int((~self.admitted_f).sum()),
            "curve": self.curve,
            "interval": _listed(self.interval),
            "split_half": self.split_half,
            "separate": sum(feature.separates for feature in self.top),
            "null_median": self.null_median,
            "null_95": self.null_95,
            "p_value": self.p_value,
            "found": self.n_found,
            "top": [feature._asdict() | {"interval": _listed(feature.interval)} for feature in self.top],
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Design:
    """What is the same at all sites: groups, permutations of them, resampled items; numbers as in `contrast`."""

    in_group_n: Bools
    permuted_bn: torch.Tensor
    tokens_n: npt.NDArray[np.int64]
    resampled: Resampled
    splits: int
    seed: int
    top: int
    min_active: int


class SiteReading:
    """One site by itself.

    Attributes:
        d_f, r_f: effects of all features, 0 of those left out.
        null: None where no feature was admitted.
        halves: None there, and where a group has fewer than `LEAST_SPLIT` items.
    """

    def __init__(self, site: Site, design: Design) -> None:
        self.site, self.design = site, design
        values_nf, in_group_n = site.values_nf, design.in_group_n
        self.active_f = (values_nf != 0).sum(axis=0)
        varies_f = values_nf.min(axis=0) < values_nf.max(axis=0)
        self.admitted_f: Bools = varies_f & (self.active_f >= design.min_active)
        self.at_a = np.flatnonzero(self.admitted_f)
        self.d_f, self.r_f = np.zeros(len(varies_f)), np.zeros(len(varies_f))
        self.null: Null | None = None
        self.halves: Halves | None = None
        if not len(self.at_a):
            return
        admitted_na = values_nf if len(self.at_a) == len(varies_f) else values_nf[:, self.at_a]
        unit_na = effect_sizes.unit_columns(admitted_na)
        self.r_f[self.at_a] = effect_sizes.correlations(unit_na, in_group_n)
        self.d_f = effect_sizes.d_of(torch.from_numpy(self.r_f), in_group_n).numpy()
        self.null = effect_sizes.under_permutation(unit_na, design.permuted_bn, in_group_n, design.top)
        if min(in_group_n.sum(), (~in_group_n).sum()) >= LEAST_SPLIT:
            self.halves = effect_sizes.half_by_half(admitted_na, in_group_n, design.splits, design.seed, design.top)

    def finished(self, largest_b: Floats, curves_b: Floats) -> SiteContrast:
        """With p-values against the largest |r| and the largest curve of all sites, each ascending."""
        top_k = self.at_a[np.argsort(-np.abs(self.r_f[self.at_a]), kind="stable")[: self.design.top]]
        p_f = np.where(self.admitted_f, shares(largest_b, np.abs(self.r_f)), 1.0)
        values_nk = self.site.values_nf[:, top_k]
        d_k = self.d_f[top_k]
        curve = None if self.null is None else float(np.abs(d_k).mean())
        resampled = self.design.resampled
        d_rk = resampled.d(values_nk) if len(top_k) else None
        signed = None if d_rk is None else (d_rk * torch.from_numpy(np.sign(d_k))).mean(dim=1)
        return SiteContrast(
            hook_name=self.site.hook_name,
            kind=self.site.kind,
            d_f=self.d_f,
            p_f=p_f,
            admitted_f=self.admitted_f,
            curve=curve,
            interval=None if signed is None or curve is None else resampled.interval(curve, signed),
            split_half=None if self.halves is None else float(self.halves.measured_h.mean()),
            null_median=None if self.null is None else float(np.median(self.null.curve_b)),
            null_95=None if self.null is None else float(np.quantile(self.null.curve_b, 0.95)),
            p_value=None if curve is None else float(shares(curves_b, np.array([curve]))[0]),
            top=tuple(
                Feature(
                    feature=int(feature),
                    d=float(d),
                    interval=None if d_rk is None or abs(d) >= MOST_D else resampled.interval(float(d), d_rk[:, k]),
                    separates=bool(abs(d) >= MOST_D),
                    p_value=float(p_f[feature]),
                    active=int(self.active_f[feature]),
                    length_r=length_correlation(values_nk[:, k], self.design.tokens_n),
                )
                for k, (feature, d) in enumerate(zip(top_k, d_k, strict=True))
            ),
            difference_d=self._difference() if self.site.kind == "activations" else None,
        )

    def _difference(self) -> npt.NDArray[np.float32]:
        values_nf, in_group_n = self.site.values_nf, self.design.in_group_n
        group_d = values_nf[in_group_n].mean(axis=0, dtype=np.float64)
        difference_d = group_d - values_nf[~in_group_n].mean(axis=0, dtype=np.float64)
        return difference_d.astype(np.float32)  # type: ignore[no-any-return]


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [*interval]
