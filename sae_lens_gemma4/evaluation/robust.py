"""The verdict: what a set of figures says of an SAE, by rules that are stated.

On long contexts a handful of tokens can hold most of an SAE's squared error without having large norms; an SAE
on the wrong model fails on every token. Plain variance explained cannot tell the two apart, variance explained
without the worst tokens can (the seed of this project measured 88 % of the error on .1 % of the tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["healthy", "outlier-dominated", "misfit"]
TOP_FRACTIONS = (0.0001, 0.001, 0.01)


@dataclass(frozen=True)
class VerdictRules:
    """Thresholds of the verdict.

    Attributes:
        misfit_below: an SAE whose VE without the top 1 % of tokens by SSE is below this is a misfit.
        outlier_gain: it is outlier-dominated if leaving out the top .1 % gains more VE than this …
        outlier_share: … and those tokens hold more of the SSE than this.
    """

    misfit_below: float = 0.5
    outlier_gain: float = 0.05
    outlier_share: float = 0.2


def verdict(
    ve: float | None,
    ve_without_top_sse: Mapping[float, float | None],
    sse_share: Mapping[float, float | None],
    rules: VerdictRules = VerdictRules(),
) -> Verdict | None:
    """The verdict on these figures; None where one that decides is not defined."""
    without_1, without_01, share_01 = ve_without_top_sse.get(0.01), ve_without_top_sse.get(0.001), sse_share.get(0.001)
    if ve is None or without_1 is None or without_01 is None or share_01 is None:
        return None
    if without_1 < rules.misfit_below:
        return "misfit"
    if without_01 - ve > rules.outlier_gain and share_01 > rules.outlier_share:
        return "outlier-dominated"
    return "healthy"
