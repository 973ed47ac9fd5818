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
DECIDING = (0.001, 0.01)
"""The fractions that can make an SAE outlier-dominated; the last of them tells a misfit."""
NORM_MULTIPLES = (2.0, 5.0, 10.0, 100.0)
SCREENED_AT_MOST = 0.01
Figures = Mapping[float, float | None]


@dataclass(frozen=True)
class VerdictRules:
    """Thresholds of the verdict.

    Attributes:
        misfit_below: an SAE whose VE without the top 1 % of tokens by SSE is below this is a misfit.
        outlier_gain: it is outlier-dominated if leaving out the top .1 %, or the top 1 %, gains more VE than this …
        outlier_share: … and those tokens hold more of the SSE than this.
    """

    misfit_below: float = 0.5
    outlier_gain: float = 0.05
    outlier_share: float = 0.2


def verdict(
    ve: float | None, ve_without_top_sse: Figures, sse_share: Figures, rules: VerdictRules = VerdictRules()
) -> Verdict | None:
    """The verdict on these figures; None where one that decides is not defined."""
    without = ve_without_top_sse.get(DECIDING[-1])
    if without is None or None in (ve, *(table.get(f) for table in (ve_without_top_sse, sse_share) for f in DECIDING)):
        return None
    if without < rules.misfit_below:
        return "misfit"
    return "healthy" if _concentrated(ve, ve_without_top_sse, sse_share, rules) is None else "outlier-dominated"


def _concentrated(ve: float | None, without: Figures, share: Figures, rules: VerdictRules) -> float | None:
    """The least fraction by SSE whose tokens gain and hold enough to be what spoils the figure, if one does."""
    for fraction in DECIDING:
        gain = (without[fraction] or 0.0) - (ve or 0.0)
        if gain > rules.outlier_gain and (share[fraction] or 0.0) > rules.outlier_share:
            return fraction
    return None


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
    wanted = [value - ve for f in DECIDING if (value := ve_without_top_sse.get(f)) is not None]
    by_norm = [*(ve_without_top_norm.get(f) for f in DECIDING), *above]
    gains = [screened - ve for screened in by_norm if screened is not None]
    return bool(wanted and gains) and max(gains) >= 0.5 * max(wanted) > 0


def reason(
    decided: Verdict | None,
    n_tokens: int,
    ve: float | None,
    without: Figures,
    share: Figures,
    rules: VerdictRules = VerdictRules(),
) -> str:
    """One sentence with the figures that decided."""
    if decided is None or ve is None:
        return "A figure that the verdict needs is not defined on these tokens."
    if decided == "misfit":
        worst, _ = _worst(DECIDING[-1], n_tokens)
        return f"VE without {worst} is {_written(without[DECIDING[-1]])}, below {rules.misfit_below:g}."
    fraction = _concentrated(ve, without, share, rules)
    shown = DECIDING[0] if fraction is None else fraction
    worst, hold = _worst(shown, n_tokens)
    figures = f"VE is {_written(ve)} and {_written(without[shown])} without {worst}, which {hold} "
    figures += f"{100 * (share[shown] or 0):.1f} % of the squared error"
    if fraction is None:
        return f"{figures}."
    return f"{figures}: more than {rules.outlier_gain:g} gained, more than {100 * rules.outlier_share:g} % held."


def _worst(fraction: float, n_tokens: int) -> tuple[str, str]:
    """What the top fraction is and does: where n < 1 / f it is one token, which is more than the fraction says."""
    if fraction * n_tokens < 1:
        return f"the worst token of {n_tokens:,} ({100 / n_tokens:.2g} %)", "holds"
    return f"the worst {100 * fraction:g} % of tokens", "hold"


def _written(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}".replace("-", "−")
