"""Where, and in which latents, two groups of items differ, against what chance would show as the largest difference.

The E4B layer-21 card of caiovicentino1 took Cohen's d of right against wrong answers in every dimension of 42 layers,
averaged the ten largest |d| of each layer, and read a peak of .896 at layer 27, without an interval or a null. Ten of
thousands of dimensions, chosen for being largest, are large in noise too: 25 items against 25 give .95 on average in
2,560 independent dimensions that know nothing of the groups, and 1.04 at the best of 42 such layers. The curve is
computed here as the card did, beside

- its null: the same with the groups permuted, by site and for the largest over sites;
- a companion that selection does not bias: features chosen on half of the items, measured on the other half. It
  estimates the d of what half of the items choose, with Hedges' correction, where each group has eight items or more.
  Half choose worse than all do, so it is rather below the true d of what the curve is of; the correction is exact for
  normal features, and skewed latents keep some bias, as does a d that is cut off;
- a family-wise p-value of every feature: the share of permutations in which the largest |r| of any feature at any site
  is as large (single-step maxT; Westfall and Young 1993). |r| orders assignments as |d| does.

The curve, and the d of what was chosen, are biased upwards, and their bootstrap intervals are of the features that were
chosen, held fixed: they show what other items would change, not what choosing did. Sparse latents have small |d| next
to their extremes; the null has the same latents, so its p-values hold. A |d| above 10 is taken for 10 wherever it
enters, so that a feature that separates the groups altogether does not make a curve of its own: it is flagged, and has
no interval.

Shapes: `n` items, `f` features of a site (dimensions or latents), `b` permutations, `d` a hook's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.result import versions
from sae_lens_gemma4.interp.contrasts.effect_sizes import (
    MOST_D,
    Bools,
    Resampled,
    correlations,
    d_of,
    permuted,
    shares,
    under_permutation,
    unit_columns,
)
from sae_lens_gemma4.interp.contrasts.sites import LEAST_SPLIT, LEVEL, Design, SiteContrast, SiteReading
from sae_lens_gemma4.interp.item_means import ItemMeans
from sae_lens_gemma4.interp.items import Item

MIN_PERMUTATIONS = 99
_SAME = 1e-4
"""No d of any feature above this: the groups hold the same items."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Contrast:
    """Two groups of items at every site.

    Attributes:
        names, sizes: of the group and of the rest.
        peak: the site with the largest curve.
        peak_share: share of random halves of the items whose own curve peaks there; None with too few items.
        length: tokens of the groups' items: means, d and its permutation p; what differs with them may be length.
        settings: of `contrast`.
        facts: of the item means.
    """

    sites: tuple[SiteContrast, ...]
    names: tuple[str, str]
    sizes: tuple[int, int]
    peak: SiteContrast
    peak_share: float | None
    length: dict[str, Any]
    settings: dict[str, Any]
    facts: dict[str, Any]

    def of(self, hook_name: str, kind: str = "activations") -> SiteContrast:
        """One site. Raises `UnknownNameError` for one that was not read."""
        for site in self.sites:
            if (site.hook_name, site.kind) == (hook_name, kind):
                return site
        raise UnknownNameError(f"site of {kind}", hook_name, [s.hook_name for s in self.sites if s.kind == kind])

    def difference_of_means(self, hook_name: str) -> npt.NDArray[np.float32]:
        """The direction from the rest's mean to the group's, of length one, float32 `[d]`: what steering adds.

        Raises:
            UnknownNameError: activations of no such hook were read.
            DataError: the means are equal.
        """
        difference_d = self.of(hook_name).difference_d
        assert difference_d is not None  # of activations there is one
        norm = float(np.linalg.norm(difference_d))
        if norm == 0:
            raise DataError(f"The means of {self.names[0]!r} and {self.names[1]!r} are equal at {hook_name}.")
        return (difference_d / norm).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the arrays of all features."""
        return {
            "schema": 1,
            "kind": "contrast",
            "groups": [{"name": n, "items": k} for n, k in zip(self.names, self.sizes, strict=True)],
            "level": LEVEL,
            "most_d": MOST_D,
            "least_split": LEAST_SPLIT,
            "peak": {
                "hook_name": self.peak.hook_name,
                "kind": self.peak.kind,
                "curve": self.peak.curve,
                "p_value": self.peak.p_value,
                "share_of_halves": self.peak_share,
            },
            "sites": [site.to_dict() for site in self.sites],
            "length": self.length,
            "settings": self.settings,
            "facts": self.facts,
            "versions": versions(),
        }


def in_group(items: Sequence[Item], group: str | None = None) -> tuple[Bools, tuple[str, str]]:
    """Which items are in a group, bool `[n]`, and the names of both sides.

    Args:
        group: against all others; by default there must be two groups, and it is the first that appears.

    Raises:
        DataError: an item without a group, one group only, or more than two and none named.
        UnknownNameError: no such group.
    """
    for number, item in enumerate(items):
        if item.group is None:
            raise DataError(f"Item {number} is in no group: {item.prompt[:60]!r}. Name the column that holds it.")
    names = list(dict.fromkeys(str(item.group) for item in items))
    if len(names) < 2:
        raise DataError(f"A contrast needs two groups; all {len(items)} items are in {', '.join(map(repr, names))}.")
    if group is None and len(names) > 2:
        raise DataError(f"There are {len(names)} groups ({', '.join(names[:6])}, …); name the one to hold against all.")
    if group is not None and group not in names:
        raise UnknownNameError("group", group, names)
    chosen = names[0] if group is None else group
    others = [name for name in names if name != chosen]
    return np.array([item.group == chosen for item in items]), (chosen, others[0] if len(others) == 1 else "others")


def contrast(
    means: ItemMeans,
    in_group_n: Bools,
    *,
    names: tuple[str, str] = ("group", "rest"),
    sampling: Sampling | None = None,
    permutations: int = 1000,
    splits: int = 20,
    seed: int = 0,
    top: int = 10,
    min_active: int = 5,
) -> Contrast:
    """Hold the items of a group against the others, at every site of `means`.

    All sites are one family: its p-values are of the largest over them. Latents and activations are best held against
    chance apart (`means.only("latents")`), since the wider kind sets the null for both.

    Args:
        in_group_n: bool `[n]`, as `in_group` gives it.
        names: of the group and the rest, for reports.
        sampling: of the bootstrap over items, within groups.
        permutations: of the groups; the smallest p-value is 1 / (1 + permutations).
        splits: in halves; each half is used both ways.
        seed: of permutations and splits.
        top: how many of the largest |d| make the curve.
        min_active: latents that are non-zero in fewer items are left out; this looks at no group.

    Raises:
        DataError: a group with fewer than two items, not one entry an item, values that are not finite, groups that
            are the same items, or no feature left.
        ConfigError: numbers that make no sense.
    """
    sampling = sampling or Sampling()
    settings = {"permutations": permutations, "splits": splits, "seed": seed, "top": top, "min_active": min_active}
    _check_settings(settings)
    in_group_n = np.asarray(in_group_n, dtype=bool)
    sizes = _check_groups(means, in_group_n, names)
    design = Design(
        in_group_n=in_group_n,
        permuted_bn=permuted(in_group_n, permutations, seed),
        tokens_n=means.tokens_n,
        resampled=Resampled(in_group_n, sampling),
        splits=splits,
        seed=seed,
        top=top,
        min_active=min_active,
    )
    reads = [SiteReading(site, design) for site in means.sites]
    nulls = [read.null for read in reads if read.null is not None]
    if not nulls:
        raise DataError(
            f"No feature at {len(reads)} sites varies and is non-zero in {min_active} of {len(in_group_n)} items. "
            "Take more items, or a smaller min_active."
        )
    if max(float(np.abs(read.d_f).max()) for read in reads) < _SAME:
        raise DataError(f"No feature differs between {names[0]!r} and {names[1]!r}: the groups are the same items.")
    largest_b = np.sort(np.max([null.largest_b for null in nulls], axis=0))
    curves_b = np.sort(np.max([null.curve_b for null in nulls], axis=0))
    sites = tuple(read.finished(largest_b, curves_b) for read in reads)
    at = int(np.argmax([-math.inf if site.curve is None else site.curve for site in sites]))
    peak_share = None
    if any(read.halves is not None for read in reads):
        nothing_h = np.full(2 * splits, -math.inf)
        curve_sh = np.stack([nothing_h if read.halves is None else read.halves.curve_h for read in reads])
        peak_share = float((curve_sh.argmax(axis=0) == at).mean())
    return Contrast(
        sites=sites,
        names=names,
        sizes=sizes,
        peak=sites[at],
        peak_share=peak_share,
        length=_length(means.tokens_n, design),
        settings=settings | {"sampling": asdict(sampling)},
        facts=means.facts,
    )


def _check_settings(settings: dict[str, int]) -> None:
    least = {"permutations": MIN_PERMUTATIONS, "splits": 1, "seed": 0, "top": 1, "min_active": 1}
    for name, smallest in least.items():
        if settings[name] < smallest:
            raise ConfigError(f"{name} must be at least {smallest}, not {settings[name]}.")


def _check_groups(means: ItemMeans, in_group_n: Bools, names: tuple[str, str]) -> tuple[int, int]:
    if in_group_n.shape != (means.n_items,):
        raise DataError(f"Groups of shape {in_group_n.shape} are not one entry for each of {means.n_items} items.")
    sizes = int(in_group_n.sum()), int((~in_group_n).sum())
    if min(sizes) < 2:
        raise DataError(
            f"A contrast needs two items a group or more; {names[0]!r} has {sizes[0]} and {names[1]!r} {sizes[1]}."
        )
    for site in means.sites:
        if not np.isfinite(site.values_nf).all():
            item = int(np.flatnonzero(~np.isfinite(site.values_nf).all(axis=1))[0])
            raise DataError(f"The {site.kind} at {site.hook_name} are not finite, first of item {item}.")
    return sizes


def _length(tokens_n: npt.NDArray[np.int64], design: Design) -> dict[str, Any]:
    """Whether the groups' items differ in length: means, d and its two-sided permutation p."""
    in_group_n = design.in_group_n
    means = [float(tokens_n[in_group_n].mean()), float(tokens_n[~in_group_n].mean())]
    if tokens_n.min() == tokens_n.max():
        return {"mean_tokens": means, "d": 0.0, "p_value": 1.0}
    unit_n1 = unit_columns(tokens_n[:, None].astype(np.float32))
    null = under_permutation(unit_n1, design.permuted_bn, in_group_n, 1)
    r = correlations(unit_n1, in_group_n)
    d = float(d_of(torch.from_numpy(r), in_group_n)[0])
    return {"mean_tokens": means, "d": d, "p_value": float(shares(np.sort(null.largest_b), np.abs(r))[0])}
