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
NORM_MULTIPLES = (2.0, 5.0, 10.0, 100.0)
SCREENED_AT_MOST = 0.01
Figures = Mapping[float, float | None]


@dataclass(frozen=True)
class VerdictRules:
    """Thresholds of the verdict.

    Attributes:
        misfit_below: an SAE whose VE without the top 1 % of tokens by SSE is below this is a misfit.
        outlier_gain: it is outlier-dominated if leaving out the top .1 % gains more VE than this …
        outlier_share: … and those tokens hold more of the SSE than this; or if VE itself is below `misfit_below` and
            leaving out the top 1 % gains more than `outlier_gain`.
    """

    misfit_below: float = 0.5
    outlier_gain: float = 0.05
    outlier_share: float = 0.2


def verdict(
    ve: float | None, ve_without_top_sse: Figures, sse_share: Figures, rules: VerdictRules = VerdictRules()
) -> Verdict | None:
    """The verdict on these figures; None where one that decides is not defined."""
    without_1, without_01, share_01 = ve_without_top_sse.get(0.01), ve_without_top_sse.get(0.001), sse_share.get(0.001)
    if ve is None or without_1 is None or without_01 is None or share_01 is None:
        return None
    if without_1 < rules.misfit_below:
        return "misfit"
    if _concentrated(ve, without_01, share_01, rules):
        return "outlier-dominated"
    low = ve < rules.misfit_below and without_1 - ve > rules.outlier_gain
    return "outlier-dominated" if low else "healthy"


def _concentrated(ve: float, without_01: float | None, share_01: float | None, rules: VerdictRules) -> bool:
    """Whether the top .1 % by SSE gain and hold enough."""
    gain = (ve if without_01 is None else without_01) - ve
    return gain > rules.outlier_gain and (share_01 or 0.0) > rules.outlier_share


def norm_screen_sees(
    ve: float,
    ve_without_top_sse: Figures,
    ve_without_top_norm: Figures,
    ve_without_high_norm: Figures,
    high_norm_share: Figures,
) -> bool:
    """Whether leaving tokens out by norm gains at least half of what leaving out the top .1 % or 1 % by SSE gains.

    Tried are the top .1 % and 1 % by norm, and all tokens above each multiple of the median norm that leaves out 1 % at
    most: what leaves out more is no screen for outliers.
    """
    above = [value for c, value in ve_without_high_norm.items() if (high_norm_share.get(c) or 0.0) <= SCREENED_AT_MOST]
    wanted = [value - ve for f in (0.001, 0.01) if (value := ve_without_top_sse.get(f)) is not None]
    by_norm = [ve_without_top_norm.get(0.001), ve_without_top_norm.get(0.01), *above]
    gains = [screened - ve for screened in by_norm if screened is not None]
    return bool(wanted and gains) and max(gains) >= 0.5 * max(wanted) > 0


def reason(
    decided: Verdict | None, ve: float | None, without: Figures, share: Figures, rules: VerdictRules = VerdictRules()
) -> str:
    """One sentence with the figures that decided."""
    if decided is None or ve is None:
        return "A figure that the verdict needs is not defined on these tokens."
    without_1, without_01, share_01 = without[0.01], without[0.001], share[0.001]
    if decided == "misfit":
        return f"VE without the worst 1 % of tokens is {_written(without_1)}, below {rules.misfit_below:g}."
    figures = f"VE is {_written(ve)} and {_written(without_01)} without the worst 0.1 % of tokens, which hold "
    figures += f"{100 * (share_01 or 0):.1f} % of the squared error"
    if decided == "outlier-dominated" and not _concentrated(ve, without_01, share_01, rules):
        return f"VE is {_written(ve)}, below {rules.misfit_below:g}, and {_written(without_1)} without the worst 1 %."
    if decided == "outlier-dominated":
        return f"{figures}: more than {rules.outlier_gain:g} gained, more than {100 * rules.outlier_share:g} % held."
    return f"{figures}."


def _written(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}".replace("-", "−")
