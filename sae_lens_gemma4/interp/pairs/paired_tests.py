"""Every latent in every category of prompt pairs, as tests that share one false-discovery rate.

Many latents are looked at, so some differ by chance as much as those that are sought. Each difference has a p-value
from sign flips (`interp/pairs/sign_flips.py`), and the tests of all categories are corrected together (Benjamini and
Hochberg 1995). Which latents are tested is decided by on how many prompts they are active, on whichever side: that
does not depend on the signs that are tested, so it takes nothing from what the p-values mean.

With few pairs no p-value can be small enough; that is told before anybody concludes that there is nothing.

Shapes: `p` pairs of a category, `f` latents, `m` tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control

from sae_lens_gemma4.errors import CatalogueWarning, ConfigError, DataError, check_name, warn_caller
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.pairs.prompt_pairs import Category, PairMeans
from sae_lens_gemma4.interp.pairs.sign_flips import Alternative, Floats, is_exact, least_p, sign_flip_test

Ints = npt.NDArray[np.int64]
_LONGER = 0.2
"""Sides whose mean lengths differ by more than this share are warned of."""


class ProbingWarning(CatalogueWarning):
    """Prompt pairs that cannot show what they are for."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How pairs are tested.

    Attributes:
        q: false-discovery rate over all tests of all categories.
        permutations: sign flips a category; all 2^pairs, exactly, where these are no more.
        alternative: "greater" for more active with the property; "two-sided" for less active, too.
        correction: "bh", or "by", which holds under any dependence and finds less (Benjamini and Yekutieli 2001).
        min_active: a latent is tested in a category if it is active on so many of its prompts.
        scrambles: how often the analysis is made again with sides swapped at random.
        seed: of flips, of scrambles, and of the samples that plots show.
        sampling: intervals of effects, by bootstrap over pairs.

    Raises:
        ConfigError: numbers that make no sense.
        UnknownNameError: another alternative or correction.
    """

    q: float = 0.05
    permutations: int = 100_000
    alternative: Alternative = "greater"
    correction: Literal["bh", "by"] = "bh"
    min_active: int = 8
    scrambles: int = 5
    seed: int = 0
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        check_name("alternative", self.alternative, ("greater", "two-sided"))
        check_name("correction", self.correction, ("bh", "by"))
        if not 0 < self.q < 1:
            raise ConfigError(f"q must be between 0 and 1, not {self.q}.")
        for name, least in (("permutations", 100), ("min_active", 1), ("scrambles", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}.")


class Tests(NamedTuple):
    """One category's tests. Arrays are float64 `[f]`, NaN for latents that were not tested.

    Attributes:
        effect_f: paired standardised differences d_z.
        p_f, q_f: p-values, and the least false-discovery rate at which each latent is found.
        family_f: p-value of the largest of all tests of all categories: maxT, times the number of categories.
        least_p: the smallest p-value that these pairs can give.
        exact: whether all sign flips were gone through.
    """

    category: Category
    effect_f: Floats
    p_f: Floats
    q_f: Floats
    family_f: Floats
    least_p: float
    exact: bool

    @property
    def tested(self) -> Ints:
        return np.flatnonzero(np.isfinite(self.p_f))

    def passed(self, q: float) -> Ints:
        """Latents found at that rate."""
        return np.flatnonzero(self.q_f <= q)


def differences(means: PairMeans) -> npt.NDArray[np.floating]:
    """With minus without, `[p, f]`."""
    difference_pf: npt.NDArray[np.floating] = means.with_pf - means.without_pf
    return difference_pf


def standardised(difference_pf: npt.NDArray[np.floating]) -> Floats:
    """d_z, mean over standard deviation of each latent's differences (Cohen 1988): float64 `[f]`, 0 where all are 0,
    infinite where all are equal."""
    difference_pf = difference_pf.astype(np.float64)
    mean_f = difference_pf.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        d_f: Floats = mean_f / difference_pf.std(axis=0, ddof=1)
    return np.where(mean_f == 0, 0.0, d_f)


def longer(means: PairMeans) -> float | None:
    """How much longer the sides with the property are, as a share of the mean length of both."""
    if means.tokens_with_p is None or means.tokens_without_p is None:
        return None
    with_, without = float(means.tokens_with_p.mean()), float(means.tokens_without_p.mean())
    return 2 * (with_ - without) / (with_ + without)


def check_means(means: Sequence[PairMeans]) -> None:
    """Raise `DataError` for what cannot be tested."""
    if not means:
        raise DataError("There is no category to probe for.")
    names = [one.category.name for one in means]
    if len(set(names)) < len(names):
        raise DataError(f"Each category needs its own name; these are {', '.join(names)}.")
    width = means[0].with_pf.shape[-1]
    for one in means:
        shape, name = (len(one.category.pairs), width), one.category.name
        if one.with_pf.shape != shape or one.without_pf.shape != shape:
            raise DataError(
                f"Category {name!r} needs activations of {shape} on either side, "
                f"not {one.with_pf.shape} and {one.without_pf.shape}."
            )
        if shape[0] < 2:
            raise DataError(f"Category {name!r} has {shape[0]} pairs; a test needs two or more.")
        if not (np.isfinite(one.with_pf).all() and np.isfinite(one.without_pf).all()):
            raise DataError(f"The activations of category {name!r} are not all finite.")


def admitted(means: Sequence[PairMeans], min_active: int) -> list[Ints]:
    """Of each category the latents that are active on `min_active` of its prompts or more.

    Raises:
        DataError: there is none in any.
    """
    active = [np.count_nonzero(one.with_pf, axis=0) + np.count_nonzero(one.without_pf, axis=0) for one in means]
    found = [np.flatnonzero(n_f >= min_active) for n_f in active]
    if not any(map(len, found)):
        raise DataError(
            f"No latent is active on {min_active} prompts of a category; the most is "
            f"{max(int(n_f.max(initial=0)) for n_f in active)}. Lower min_active, or write more pairs."
        )
    return found


def run_tests(
    categories: Sequence[Category],
    differences_cpf: Sequence[npt.NDArray[np.floating]],
    admitted_c: Sequence[Ints],
    settings: ProbeSettings,
) -> list[Tests]:
    """Test the admitted latents of every category, and correct all tests together."""
    tests = []
    for number, (category, difference_pf, at_m) in enumerate(zip(categories, differences_cpf, admitted_c, strict=True)):
        n_pairs, n_latents = difference_pf.shape
        flips = sign_flip_test(
            difference_pf[:, at_m], settings.permutations, [settings.seed, 0, number], settings.alternative
        )
        family_m = np.minimum(flips.family_f * len(categories), 1.0)
        effect_f, p_f, family_f = (
            _spread(values_m, at_m, n_latents)
            for values_m in (standardised(difference_pf[:, at_m]), flips.p_f, family_m)
        )
        least = least_p(n_pairs, settings.permutations, settings.alternative)
        tests.append(Tests(category, effect_f, p_f, p_f, family_f, least, is_exact(n_pairs, settings.permutations)))
    p_m = np.concatenate([one.p_f[at_m] for one, at_m in zip(tests, admitted_c, strict=True)])
    q_m = false_discovery_control(p_m, method=settings.correction)
    bounds = pairwise(np.cumsum([0, *map(len, admitted_c)]))
    return [
        one._replace(q_f=_spread(q_m[first:end], at_m, len(one.p_f)))
        for one, at_m, (first, end) in zip(tests, admitted_c, bounds, strict=True)
    ]


def warn_of(means: Sequence[PairMeans], tests: Sequence[Tests], settings: ProbeSettings) -> None:
    """Warn of categories in which no single latent can be found, and of those whose sides differ in length."""
    n_tests = sum(len(one.tested) for one in tests)
    if settings.correction == "by":  # whose harmonic factor makes it more
        n_tests = math.ceil(n_tests * float(np.sum(1 / np.arange(1, n_tests + 1))))
    short = [one for one in tests if one.least_p * n_tests > settings.q]
    if short:
        worst = max(short, key=lambda one: one.least_p)
        n_pairs, together = len(worst.category.pairs), math.ceil(worst.least_p * n_tests / settings.q)
        more = math.ceil(math.log2(n_tests / settings.q)) + (settings.alternative == "two-sided")
        wanted = [f"{more} pairs"] if n_pairs < more else []
        wanted += [f"permutations={2**more}"] if settings.permutations < 2**more else []
        warn_caller(
            f"No latent by itself can be found in {_names(short)}: {n_pairs} pairs and "
            f"permutations={settings.permutations} give no p-value below {worst.least_p:.2g}, and of {n_tests:,} tests "
            f"{together:,} would have to reach that for a false-discovery rate of {settings.q}. "
            f"Have {' and '.join(wanted)}, or test fewer latents by a higher min_active.",
            ProbingWarning,
        )
    for one in means:
        share = longer(one)
        if share is not None and abs(share) > _LONGER:
            warn_caller(
                f"In category {one.category.name!r} prompts with the property are {abs(share):.0%} "
                f"{'longer' if share > 0 else 'shorter'} than those without: what is found may be length. "
                "Write sides of like lengths.",
                ProbingWarning,
            )


def _names(tests: Sequence[Tests]) -> str:
    return ("category " if len(tests) == 1 else "categories ") + ", ".join(repr(one.category.name) for one in tests)


def _spread(values_m: Floats, at_m: Ints, n_latents: int) -> Floats:
    spread_f = np.full(n_latents, np.nan)
    spread_f[at_m] = values_m
    return spread_f
