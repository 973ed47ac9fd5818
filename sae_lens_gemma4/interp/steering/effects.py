"""What steering did to the answers, item by item: which became right, which wrong, and which do so whatever is added.

An accuracy that stays may hide many answers that changed. The sets of recovered answers of the two opposite directions
are set against what chance would make them share, because questions near the boundary change under any push.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import hypergeom

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.interp.statistics import PairedChange, Share, mcnemar, share
from sae_lens_gemma4.interp.steering.conditions import Condition

Bools = npt.NDArray[np.bool_]
Outcomes = Mapping[Condition, npt.ArrayLike]


class Effect(NamedTuple):
    """A condition's answers against the baseline's.

    Attributes:
        accuracy: right answers of all.
        recovered, broken: items that were wrong at the baseline and are right here, and the reverse.
        change: of the two, with McNemar's exact test; None of the baseline itself.
    """

    condition: Condition
    accuracy: Share
    recovered: tuple[int, ...]
    broken: tuple[int, ...]
    change: PairedChange | None

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.condition._asdict(),
            "accuracy": self.accuracy._asdict(),
            "recovered": list(self.recovered),
            "broken": list(self.broken),
            "net": len(self.recovered) - len(self.broken),
            "change": None if self.change is None else self.change._asdict(),
        }


class Overlap(NamedTuple):
    """Two sets of items of one pool.

    Attributes:
        both, first_only, second_only: the items.
        jaccard: shared of all that are in either; None where both are empty.
        expected: how many two such sets drawn at random from the pool share on average.
        p_value: how often two such sets share as many or more (hypergeometric, one-sided).
    """

    both: tuple[int, ...]
    first_only: tuple[int, ...]
    second_only: tuple[int, ...]
    pool: int
    jaccard: float | None
    expected: float
    p_value: float


class OppositeSets(NamedTuple):
    """At one scale, what adding and subtracting the vector both did, first "+" and then "−"."""

    scale: float
    what: Literal["recovered", "broken"]
    overlap: Overlap

    def to_dict(self) -> dict[str, Any]:
        sets = {k: list(v) if isinstance(v, tuple) else v for k, v in self.overlap._asdict().items()}
        return {"scale": self.scale, "what": self.what, **sets}


def checked(outcomes: Outcomes) -> tuple[Bools, dict[Condition, Bools]]:
    """The baseline's answers, and the other conditions': bool `[n]`.

    Raises:
        DataError: no baseline or several, nothing else, or not one true or false an item.
    """
    arrays = {condition: np.asarray(right) for condition, right in outcomes.items()}
    baselines = [c for c in arrays if c.kind == "baseline"]
    if len(baselines) != 1 or len(arrays) < 2:
        raise DataError(f"A steering run has one baseline and something else, not {[c.name for c in arrays]}.")
    n = len(arrays[baselines[0]])
    for condition, right_n in arrays.items():
        if right_n.dtype != np.bool_ or right_n.shape != (n,) or not n:
            raise DataError(
                f"{condition.name} must be one true or false an item, [{n}], not {right_n.dtype} {right_n.shape}."
            )
    return arrays.pop(baselines[0]), arrays


def effects(outcomes: Outcomes) -> list[Effect]:
    """Each condition's, in the order given; errors as `checked`."""
    before_n, _ = checked(outcomes)
    found = []
    for condition, answers in outcomes.items():
        right_n = np.asarray(answers)
        recovered = tuple(np.flatnonzero(right_n & ~before_n).tolist())
        broken = tuple(np.flatnonzero(~right_n & before_n).tolist())
        change = None if condition.kind == "baseline" else mcnemar(len(recovered), len(broken), len(right_n))
        found.append(Effect(condition, share(int(right_n.sum()), len(right_n)), recovered, broken, change))
    return found


def opposite_sets(found: Iterable[Effect]) -> list[OppositeSets]:
    """At every scale that was run both ways, the items recovered both ways and those broken both ways."""
    by_condition = {e.condition: e for e in found}
    (baseline,) = [e for e in by_condition.values() if e.condition.kind == "baseline"]
    n_right, n = baseline.accuracy.k, baseline.accuracy.n
    negatives = {-c.scale: e for c, e in by_condition.items() if c.kind == "negative"}
    sets = []
    for plus in by_condition.values():
        minus = negatives.get(plus.condition.scale)
        if plus.condition.kind == "positive" and minus is not None:
            recovered = overlap(plus.recovered, minus.recovered, n - n_right)
            sets.append(OppositeSets(plus.condition.scale, "recovered", recovered))
            sets.append(OppositeSets(plus.condition.scale, "broken", overlap(plus.broken, minus.broken, n_right)))
    return sets


def overlap(first: Iterable[int], second: Iterable[int], pool: int) -> Overlap:
    """Of two sets of items out of `pool` that could have been in either."""
    a, b = set(first), set(second)
    both, n_all = a & b, len(a | b)
    if n_all > pool:
        raise DataError(f"{n_all} items cannot come out of {pool}.")
    return Overlap(
        tuple(sorted(both)),
        tuple(sorted(a - b)),
        tuple(sorted(b - a)),
        pool,
        len(both) / n_all if n_all else None,
        len(a) * len(b) / pool if pool else 0.0,
        float(hypergeom.sf(len(both) - 1, pool, len(a), len(b))) if both else 1.0,
    )
