"""Which latents a property of the prompt turns on, by prompt pairs, and what the same analysis makes of nothing.

ErnOSAgent's feature map labels 195 of 131,072 latents "via automated probing: targeted prompt pairs", each with a
confidence that is not defined. Here a latent is in the map if its paired difference passes a false-discovery rate over
everything that was tested (`pairs/paired_tests.py`), and beside the number of those stands how many pass when the
sides of pairs are swapped at random, which should be none.

Effects and shares of pairs are those of the pairs on which the latents were chosen, so they are too large on average,
and their intervals do not take that out. Other pairs, or `interp/labels/verification.py`, tell how well a label holds.

Shapes: `p` pairs of a category, `f` latents, `k` chosen ones, `r` rows of the bootstrap's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_lens_gemma4.catalogue.label_schemas import FeatureLabel
from sae_lens_gemma4.evaluation.intervals import Interval, Sampling
from sae_lens_gemma4.interp.item_means import length_correlation
from sae_lens_gemma4.interp.means import plain
from sae_lens_gemma4.interp.pairs.paired_tests import (
    Ints,
    ProbeSettings,
    ProbingWarning,
    Tests,
    admitted,
    check_means,
    differences,
    longer,
    run_tests,
    standardised,
    warn_of,
)
from sae_lens_gemma4.interp.pairs.prompt_pairs import PairMeans
from sae_lens_gemma4.interp.statistics import Share, share

__all__ = ["Found", "ProbeSettings", "Probing", "ProbingWarning", "feature_labels", "probe_pairs"]

SOURCE = "prompt pairs"
_TOP, _POINTS = 20, 2000
"""Latents of a category, and points of its plot, that `to_dict` holds at most."""
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class Found:
    """A latent that a category turns on.

    Attributes:
        effect: d_z, the mean of the paired differences over their standard deviation; infinite where all are equal,
            which `to_dict` writes as None beside `all_equal`.
        all_equal: all differences are equal.
        interval: of `effect`, by bootstrap over pairs; None of fewer than 8 pairs, or where all are equal.
        difference: mean activation with the property minus that without it.
        p_value, q_value: by sign flips, and the least false-discovery rate at which it is found.
        p_family: of any test of any category being as large by chance.
        fires_more: pairs in which it is more active with the property.
        length_r: correlation of its differences with those of the sides' token counts; None where one is constant.
        also: its effects in other categories in which it passed, largest first; as `effect`.
    """

    index: int
    category: str
    effect: float
    all_equal: bool
    interval: Interval | None
    difference: float
    mean_with: float
    mean_without: float
    p_value: float
    q_value: float
    p_family: float
    fires_more: Share
    length_r: float | None
    also: dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probing:
    """What `probe_pairs` found.

    Attributes:
        tests: of each category, in the order given.
        found: each latent once, under the category of its largest effect; by category, the largest first.
        scrambled: how many tests passed in each analysis of swapped sides, over all categories.
        longer: how much longer the sides with the property are, a category; None where lengths are not known.
    """

    settings: ProbeSettings
    tests: tuple[Tests, ...]
    found: tuple[Found, ...]
    scrambled: tuple[int, ...]
    longer: tuple[float | None, ...]

    @property
    def n_tests(self) -> int:
        return sum(len(tests.tested) for tests in self.tests)

    @property
    def n_passed(self) -> int:
        """Tests that passed; a latent that passed in two categories counts twice, as it does in `scrambled`."""
        return sum(len(tests.passed(self.settings.q)) for tests in self.tests)

    @property
    def labelled(self) -> list[Found]:
        """Those that are more active with the property, which have labels; with "two-sided" there may be others."""
        return [found for found in self.found if found.effect > 0]

    def to_dict(self) -> dict[str, Any]:
        """As plain data: figures, the top latents of each category, the control, and the points of plots."""
        document: dict[str, Any] = plain(
            {
                "schema": 1,
                "kind": "prompt_pairs",
                "settings": asdict(self.settings),
                "tests": self.n_tests,
                "passed": self.n_passed,
                "found": len(self.found),
                "labelled": len(self.labelled),
                "less_active": len(self.found) - len(self.labelled),
                "scrambled": {
                    "passed": self.scrambled,
                    "mean": float(np.mean(self.scrambled)) if self.scrambled else None,
                },
                "categories": [self._category(number) for number in range(len(self.tests))],
            }
        )
        return document

    def _category(self, number: int) -> dict[str, Any]:
        tests, q = self.tests[number], self.settings.q
        mine = [found for found in self.found if found.category == tests.category.name]
        return {
            "name": tests.category.name,
            "label": tests.category.label,
            "description": tests.category.description,
            "pairs": len(tests.category.pairs),
            "tests": len(tests.tested),
            "passed": len(tests.passed(q)),
            "found": len(mine),
            "less_active": sum(found.effect < 0 for found in mine),
            "found_family_wise": sum(found.p_family <= q for found in mine),
            "least_p": tests.least_p,
            "exact": tests.exact,
            "longer": self.longer[number],
            "top": [asdict(found) for found in mine[:_TOP]],
            "points": self._points(number),
        }

    def _points(self, number: int) -> dict[str, Any]:
        """Effects against p-values: of the latents that passed, and of a sample of the others."""
        rng, tests = np.random.default_rng([self.settings.seed, 2, number]), self.tests[number]
        passed = tests.passed(self.settings.q)
        others = np.setdiff1d(tests.tested, passed)
        shown = [rng.choice(part, min(len(part), _POINTS // 2), replace=False) for part in (passed, others)]
        index_k = np.sort(np.concatenate(shown))
        values = {"effect": tests.effect_f, "p_value": tests.p_f, "q_value": tests.q_f}
        return {"index": index_k.tolist(), **{name: value_f[index_k].tolist() for name, value_f in values.items()}}


def probe_pairs(means: Sequence[PairMeans], settings: ProbeSettings | None = None) -> Probing:
    """Test every latent in every category, and again with the sides of pairs swapped at random.

    Warns (`ProbingWarning`) where pairs are too few for a single latent to be found, and where one side is longer.

    Args:
        means: of each category, what latents do on either side (`pair_means`).

    Raises:
        DataError: fewer than two pairs, arrays that do not fit or are not finite, or no latent active enough to test.
    """
    settings = settings or ProbeSettings()
    check_means(means)
    admitted_c = admitted(means, settings.min_active)
    categories, differences_cpf = [one.category for one in means], [differences(one) for one in means]
    tests = run_tests(categories, differences_cpf, admitted_c, settings)
    warn_of(means, tests, settings)
    rng, scrambled = np.random.default_rng([settings.seed, 1]), []
    for _ in range(settings.scrambles):
        swapped = [np.where(rng.integers(0, 2, size=(len(d_pf), 1)), d_pf, -d_pf) for d_pf in differences_cpf]
        again = run_tests(categories, swapped, admitted_c, settings)
        scrambled.append(sum(len(one.passed(settings.q)) for one in again))
    return Probing(
        settings=settings,
        tests=tuple(tests),
        found=tuple(_found(means, tests, settings)),
        scrambled=tuple(scrambled),
        longer=tuple(longer(one) for one in means),
    )


def feature_labels(probing: Probing) -> list[FeatureLabel]:
    """The feature map in the catalogue's form, by index: the latents that are more active with a property. Those that
    are less active with it, which two-sided tests find too, are in the result and have no label.

    `confidence` is the share of pairs in which that is so, on the pairs that found the latent. Its interval (Wilson) is
    among the facts, with the effect, its interval and its p-values.
    """
    categories = {tests.category.name: tests.category for tests in probing.tests}
    labels = []
    for found in sorted(probing.labelled, key=lambda found: found.index):
        facts = plain(asdict(found))
        del facts["index"], facts["category"]
        category = categories[found.category]
        labels.append(
            FeatureLabel(
                index=found.index,
                label=category.label,
                description=category.description or None,
                category=category.name,
                confidence=found.fires_more.value,
                source=SOURCE,
                facts=facts,
            )
        )
    return labels


def _found(means: Sequence[PairMeans], tests: Sequence[Tests], settings: ProbeSettings) -> Iterator[Found]:
    effects: dict[int, dict[str, float]] = {}
    for one in tests:
        for index in one.passed(settings.q).tolist():
            effects.setdefault(index, {})[one.category.name] = float(one.effect_f[index])
    ranked = {
        index: dict(sorted(by_name.items(), key=lambda item: -abs(item[1]))) for index, by_name in effects.items()
    }
    for values, one in zip(means, tests, strict=True):
        name = one.category.name
        chosen = [index for index, by_name in ranked.items() if next(iter(by_name)) == name]
        index_k = np.array(sorted(chosen, key=lambda index: (-abs(ranked[index][name]), index)), dtype=np.int64)
        yield from _described(values, one, index_k, ranked, settings.sampling)


def _described(
    values: PairMeans, tests: Tests, index_k: Ints, ranked: dict[int, dict[str, float]], sampling: Sampling
) -> Iterator[Found]:
    name, longer_p = values.category.name, None
    if values.tokens_with_p is not None and values.tokens_without_p is not None:
        longer_p = values.tokens_with_p - values.tokens_without_p
    for first in range(0, len(index_k), _CHUNK):
        part_k = index_k[first : first + _CHUNK]
        with_pk, without_pk = (side[:, part_k].astype(np.float64) for side in (values.with_pf, values.without_pf))
        difference_pk = with_pk - without_pk
        intervals = effect_intervals(difference_pk, sampling)
        for at, index in enumerate(part_k.tolist()):
            yield Found(
                index=index,
                category=name,
                effect=ranked[index][name],
                all_equal=not np.isfinite(ranked[index][name]),
                interval=intervals[at],
                difference=float(difference_pk[:, at].mean()),
                mean_with=float(with_pk[:, at].mean()),
                mean_without=float(without_pk[:, at].mean()),
                p_value=float(tests.p_f[index]),
                q_value=float(tests.q_f[index]),
                p_family=float(tests.family_f[index]),
                fires_more=share(int((difference_pk[:, at] > 0).sum()), len(difference_pk), sampling.level),
                length_r=None if longer_p is None else length_correlation(difference_pk[:, at], longer_p),
                also={other: effect for other, effect in ranked[index].items() if other != name},
            )


def effect_intervals(difference_pk: npt.NDArray[np.float64], sampling: Sampling) -> list[Interval | None]:
    """Of each latent's d_z, by bootstrap over pairs (`Sampling`); None where pairs are too few or all but equal."""
    n_pairs, n_latents = difference_pk.shape
    weights_rp = sampling.weights(n_pairs)
    if weights_rp is None:
        return [None] * n_latents
    x_pk = torch.from_numpy(difference_pk)
    n_r1 = weights_rp.sum(dim=1, keepdim=True)
    mean_rk = weights_rp @ x_pk / n_r1
    squares_rk = (weights_rp @ x_pk**2 - n_r1 * mean_rk**2).clamp(min=0) / (n_r1 - 1)
    d_rk = mean_rk / squares_rk.sqrt()
    effect_k = standardised(difference_pk).tolist()
    return [sampling.interval(effect, d_rk[:, at]) for at, effect in enumerate(effect_k)]
