"""What a confidence of .8 means: how often labels with such a score are confirmed on contexts that nobody used.

The score is made of held-out contexts, so what it is worth shows only on others: the `calibration` part, whose
documents neither labellers nor tests nor probes have seen. (Latents were chosen on the whole text, as a rule.)

The score is no probability: nothing was fitted to make it one, and "confirmed" is a test's verdict, whose power depends
on how many contexts there are. So calibration error and Brier score tell how far it is from one, and a reader who takes
.8 for "four in five hold" needs the bins' shares instead. That it orders the labels is another matter: AUROC is how
often a confirmed label has the larger score of two, Spearman's correlation is with F1.

Each component has a table of its own. One that does not go with the confirmations adds nothing but a number to the
score, whatever its weight; a component without variation, as probe accuracies that are all near 1, cannot go with
anything, and is said to.

Shapes: `n` labels, `b` bins, `k` groups of labels (one each, up to 1,024), `r` rows of bootstrap weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.intervals import Interval, Sampling, clusters
from sae_lens_gemma4.interp.labels.confidence import COMPONENTS, Confidence
from sae_lens_gemma4.interp.labels.detection import LabelTest
from sae_lens_gemma4.interp.labels.verification import Verification
from sae_lens_gemma4.interp.means import plain
from sae_lens_gemma4.interp.statistics import Share, share
from sae_lens_gemma4.interp.steering.permuting import holm

Floats = npt.NDArray[np.float64]
_FEWEST = 3
"""With two latents a rank correlation is 1 or −1."""
_ROWS = 64
"""Of weights, ranked at once."""


class Bin(NamedTuple):
    """Scores in [low, high), of the last one in [low, high]; `mean_score` is None where there are none."""

    low: float
    high: float
    mean_score: float | None
    confirmed: Share


class Rank(NamedTuple):
    """Spearman's correlation of a score and F1 on the calibration contexts.

    Attributes:
        low, high: bootstrap over labels; None where there are too few.
        p_value: two-sided; of components, by Holm's method for as many as have one.
    """

    rho: float
    low: float | None
    high: float | None
    p_value: float
    n: int


class Table(NamedTuple):
    """One score against the confirmations.

    Attributes:
        error: expected calibration error: |mean score − share confirmed| of the bins, weighed by their labels.
        error_low, error_high: bootstrap over labels; None where there are too few.
        brier: mean of (score − confirmed)²; of the share confirmed, said of every label, it would be `brier_constant`.
        auroc: of the score for confirmed against other labels; None where there is one kind only.
        rank: None where there is no correlation; `no_rank` says why.
    """

    bins: tuple[Bin, ...]
    n: int
    mean_score: float
    confirmed: Share
    error: float
    error_low: float | None
    error_high: float | None
    brier: float
    brier_constant: float
    auroc: float | None
    rank: Rank | None
    no_rank: str | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The score's table, and each component's that any label has.

    Attributes:
        left_out: labels without a score, or not tested on the calibration contexts.
    """

    score: Table
    components: Mapping[str, Table]
    left_out: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "kind": "calibration",
            "score": plain(self.score),
            "components": plain(dict(self.components)),
            "left_out": self.left_out,
        }


def calibrate(
    scores: Mapping[int, Confidence], further: Verification, n_bins: int = 5, sampling: Sampling = Sampling()
) -> Calibration:
    """Hold scores against tests on further contexts: of the first judge's labels, which the scores are of.

    Args:
        further: `verify_labels(..., part="calibration")`.
        n_bins: of equal width, between 0 and 1.

    Raises:
        ConfigError: no bins; or the tests are on contexts that made the score.
        DataError: no label has both a score and a test.
    """
    if n_bins < 1:
        raise ConfigError(f"n_bins must be 1 or more, not {n_bins}.")
    if further.part != "calibration":
        raise ConfigError(
            f"The tests are on the {further.part} contexts, which made the score: verify on the calibration part."
        )
    tests = next(iter(further.by_judge.values())).tests
    both = [(scores[index], test) for index, test in tests.items() if index in scores]
    scored = [(s.score, test) for s, test in both if s.score is not None]
    if not scored:
        raise DataError(
            f"No label has both a score and a test on the calibration contexts: {len(scores)} labels, of which "
            f"{sum(s.score is not None for s in scores.values())} have a score and {len(tests)} a test."
        )
    components = {}
    for name in COMPONENTS:
        known = [(value, test) for s, test in both if (value := getattr(s.components, name)) is not None]
        if known:
            components[name] = table(known, n_bins, sampling)
    ranks = {name: found.rank for name, found in components.items() if found.rank is not None}
    adjusted = holm([rank.p_value for rank in ranks.values()])
    for (name, rank), p_value in zip(ranks.items(), adjusted, strict=True):
        components[name] = components[name]._replace(rank=rank._replace(p_value=p_value))
    return Calibration(score=table(scored, n_bins, sampling), components=components, left_out=len(scores) - len(scored))


def table(pairs: Sequence[tuple[float, LabelTest]], n_bins: int, sampling: Sampling = Sampling()) -> Table:
    """Of scores between 0 and 1, at least one, and the same labels' tests."""
    from sklearn.metrics import roc_auc_score

    score_n = np.array([score for score, _ in pairs])
    confirmed_n = np.array([test.confirmed for _, test in pairs])
    f1_n = np.array([test.f1 for _, test in pairs])
    edges = np.round(np.linspace(0, 1, n_bins + 1), 9)  # as the scores are: .6000…01 of either is .6
    bin_n = np.clip(np.searchsorted(edges, np.round(score_n, 9), side="right") - 1, 0, n_bins - 1)
    bins = []
    for number in range(n_bins):
        inside = bin_n == number
        n, k = int(inside.sum()), int(confirmed_n[inside].sum())
        mean = float(score_n[inside].mean()) if n else None
        bins.append(Bin(float(edges[number]), float(edges[number + 1]), mean, share(k, n)))
    rank, no_rank = None, None
    if len(pairs) < _FEWEST:
        no_rank = f"{len(pairs)} labels are too few"
    elif np.ptp(score_n) == 0:
        no_rank = f"it is {score_n[0]:g} for every label"
    elif np.ptp(f1_n) == 0:
        no_rank = f"F1 on the calibration contexts is {f1_n[0]:g} for every label"
    else:
        found = spearmanr(score_n, f1_n)
        rho = float(found.statistic)
        low, high = _interval(rho, lambda w_rn: _rank_correlations(score_n, f1_n, w_rn), len(pairs), sampling)
        rank = Rank(rho, low, high, float(found.pvalue), len(pairs))
    off_nb = (score_n - confirmed_n)[:, None] * (bin_n[:, None] == np.arange(n_bins))

    def errors(w_rn: Floats) -> Floats:
        found_r: Floats = np.abs(w_rn @ off_nb).sum(axis=1) / w_rn.sum(axis=1)
        return found_r

    error = float(errors(np.ones((1, len(pairs))))[0])
    low, high = _interval(error, errors, len(pairs), sampling)
    whole = share(int(confirmed_n.sum()), len(pairs))
    rate = float(confirmed_n.mean())
    return Table(
        bins=tuple(bins),
        n=len(pairs),
        mean_score=float(score_n.mean()),
        confirmed=whole,
        error=error,
        error_low=low,
        error_high=high,
        brier=float(((score_n - confirmed_n) ** 2).mean()),
        brier_constant=rate * (1 - rate),
        auroc=float(roc_auc_score(confirmed_n, score_n)) if 0 < rate < 1 else None,
        rank=rank,
        no_rank=no_rank,
    )


def _interval(
    value: float, figure: Callable[[Floats], Floats], n: int, sampling: Sampling
) -> Interval | tuple[None, None]:
    """Of a figure of labels with weights `[r, n]`, by a bootstrap over labels, or over their groups beyond 1,024."""
    group_n = clusters(n)
    weights_rk = sampling.weights(int(group_n[-1]) + 1)
    if weights_rk is None:
        return None, None
    found = [figure(rows_rk[:, group_n].numpy()) for rows_rk in weights_rk.split(_ROWS)]
    return sampling.interval(value, torch.from_numpy(np.concatenate(found))) or (None, None)


def _rank_correlations(one_n: Floats, other_n: Floats, w_rn: Floats) -> Floats:
    """Spearman's correlation, Pearson's of ranks, with each label as often as it was drawn; NaN where ranks are one."""
    total_r1 = w_rn.sum(axis=1, keepdims=True)
    one_rn, other_rn = _ranks(one_n, w_rn), _ranks(other_n, w_rn)
    one_rn = one_rn - (w_rn * one_rn).sum(axis=1, keepdims=True) / total_r1
    other_rn = other_rn - (w_rn * other_rn).sum(axis=1, keepdims=True) / total_r1
    product_r = (w_rn * one_rn**2).sum(axis=1) * (w_rn * other_rn**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found_r: Floats = np.where(product_r > 0, (w_rn * one_rn * other_rn).sum(axis=1) / np.sqrt(product_r), np.nan)
    return found_r


def _ranks(value_n: Floats, w_rn: Floats) -> Floats:
    """Ranks, equals sharing their mean, where each value counts as often as its weight says."""
    _, group_n = np.unique(value_n, return_inverse=True)
    order_n = np.argsort(group_n, kind="stable")
    starts = np.flatnonzero(np.diff(group_n[order_n], prepend=-1))
    weight_rg = np.add.reduceat(w_rn[:, order_n], starts, axis=1)
    ranks_rn: Floats = (np.cumsum(weight_rg, axis=1) - weight_rg / 2)[:, group_n]
    return ranks_rn
