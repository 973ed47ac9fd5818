"""From what was gathered to the metrics: every figure at its point, with its interval, and the verdict.

Shapes: `k` documents, `b` resamples, `m` rows kept, `c` columns (`sums.COLUMNS`), `d` the activations' width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sae_lens_gemma4.evaluation.figures import (
    ROUNDING,
    Sums,
    plain_figures,
    ratio,
    top_count,
    top_sums,
    variance,
    variance_explained,
)
from sae_lens_gemma4.evaluation.intervals import Estimate, Key, Sampling
from sae_lens_gemma4.evaluation.metrics import ERROR_QUANTILES, ReconstructionMetrics
from sae_lens_gemma4.evaluation.robust import Verdict, VerdictRules, verdict
from sae_lens_gemma4.evaluation.snapshot import Snapshot

_FIRST_COUNT = 1024  # never-fired counts are stated at 4, 16, … times as many tokens


def resampled_figures(snapshot: Snapshot, weights_bk: torch.Tensor) -> dict[Key, torch.Tensor]:
    """The figures that get intervals, each `[b]`: keys are names, or (name, fraction), or (name, multiple).

    The screen by norm keeps the median of the tokens as they are; it is not drawn again.
    """
    total = snapshot.sums.weighted(weights_bk)
    values: dict[Key, torch.Tensor] = {}
    values.update(plain_figures(total, weights_bk @ snapshot.error_kd))
    kept = snapshot.kept(snapshot.worst)
    for fraction in snapshot.top_fractions:
        top = top_sums(kept, weights_bk, total.of("n"), fraction)
        values["ve_without_top_sse", fraction] = variance_explained(total, top)
        values["sse_share", fraction] = ratio(top.of("sse"), total.of("sse"))
    for c in snapshot.norm_multiples:
        left_out = snapshot.above_norm(c).weighted(weights_bk)
        values["ve_without_high_norm", c] = variance_explained(total, left_out)
        values["high_norm_share", c] = ratio(left_out.of("n"), total.of("n"))
        values["high_norm_sse_share", c] = ratio(left_out.of("sse"), total.of("sse"))
    return values


def point_figures(snapshot: Snapshot) -> dict[Key, float]:
    """The figures that get none."""
    ones = torch.ones(1, len(snapshot.error_kd), dtype=torch.float64)
    total = snapshot.sums.weighted(ones)
    values: dict[Key, float] = {}
    kept, largest = snapshot.kept(snapshot.worst), snapshot.kept(snapshot.largest)
    for fraction in snapshot.top_fractions:
        top = top_sums(largest, ones, total.of("n"), fraction)
        values["ve_without_top_norm", fraction] = float(variance_explained(total, top))
        n_top = top_count(fraction, snapshot.n)
        for c in snapshot.norm_multiples:
            first = Sums(*(part[:n_top] for part in kept.sums))
            ordinary = (first.of("norm") <= c * snapshot.median_norm).double()[None]
            left_out = snapshot.above_norm(c).weighted(ones).plus(first.weighted(ordinary))
            values["ve_without_both", c, fraction] = float(variance_explained(total, left_out))
    centred_d, error_d = snapshot.by_dimension_2d
    variance_d = centred_d - total.x[0].square() / snapshot.n
    varies = variance_d > torch.maximum(ROUNDING * centred_d, ROUNDING**2 * total.of("squares") / len(centred_d))
    values["ve_per_dimension"] = float((1 - error_d[varies] / variance_d[varies]).mean())
    values["gamma"] = float(snapshot.mean_d.norm() / (variance(total)[0] / snapshot.n).sqrt())
    nonzero = snapshot.column("squares") > 0
    errors = (snapshot.column("sse")[nonzero] / snapshot.column("squares")[nonzero]).numpy()
    for q in ERROR_QUANTILES:
        values["error_quantiles", q] = float(np.quantile(errors, q)) if len(errors) else math.nan
    return values


def summarise(snapshot: Snapshot, sampling: Sampling) -> ReconstructionMetrics:
    """See `ReconstructionAccumulator.compute`."""
    n_documents = len(snapshot.error_kd)
    ones = torch.ones(1, n_documents, dtype=torch.float64)
    points: dict[Key, float] = {k: float(v) for k, v in resampled_figures(snapshot, ones).items()}
    replicates: dict[Key, torch.Tensor] = {}
    weights = sampling.weights(n_documents)
    if snapshot.has_documents and weights is not None:
        replicates = resampled_figures(snapshot, weights)
    points |= point_figures(snapshot)
    if snapshot.fired_f is None:
        points |= {"l0": math.nan, "l1": math.nan}
        replicates = {k: v for k, v in replicates.items() if k not in ("l0", "l1")}

    def estimate(key: Key) -> Estimate | None:
        if not math.isfinite(points[key]):
            return None
        interval = sampling.interval(points[key], replicates[key]) if key in replicates else None
        return Estimate(points[key], interval)

    def table(name: str, keys: tuple[float, ...]) -> dict[float, Estimate | None]:
        return {key: estimate((name, key)) for key in keys}

    fractions, multiples = snapshot.top_fractions, snapshot.norm_multiples
    plain = [key for key in points if isinstance(key, str)]
    tables = {
        name: table(name, keys)
        for name, keys in {
            "ve_without_top_sse": fractions,
            "ve_without_top_norm": fractions,
            "sse_share": fractions,
            "ve_without_high_norm": multiples,
            "high_norm_share": multiples,
            "high_norm_sse_share": multiples,
            "error_quantiles": ERROR_QUANTILES,
        }.items()
    }
    both = {c: {f: estimate(("ve_without_both", c, f)) for f in fractions} for c in multiples}
    figures: dict[str, Any] = {name: estimate(name) for name in plain} | tables
    decided = verdict(figures["ve"], tables["ve_without_top_sse"], tables["sse_share"], snapshot.rules)
    return ReconstructionMetrics(
        n_tokens=snapshot.n,
        ve_without_both=both,
        dead=None if snapshot.fired_f is None else int((snapshot.fired_f == 0).sum()),
        never_fired=_never_fired(snapshot),
        verdict=decided,
        verdict_share=_verdict_share(
            decided, {k: v[: sampling.resamples] for k, v in replicates.items()}, snapshot.rules
        ),
        replicates=replicates,
        **figures,
    )


def _never_fired(snapshot: Snapshot) -> dict[int, int]:
    if snapshot.fired_f is None:
        return {}
    counts, count = [snapshot.n], _FIRST_COUNT
    while count < snapshot.n:
        counts.append(count)
        count *= 4
    silent_f = snapshot.fired_f == 0
    return {count: int((silent_f | (snapshot.first_fired_f >= count)).sum()) for count in sorted(counts)}


def _verdict_share(
    decided: Verdict | None, replicates: Mapping[Key, torch.Tensor], rules: VerdictRules
) -> float | None:
    if decided is None or not replicates:
        return None
    tables = {name: {key[1]: v.tolist() for key, v in replicates.items() if isinstance(key, tuple) and key[0] == name}
              for name in ("ve_without_top_sse", "sse_share")}  # fmt: skip
    same = 0
    ve_b = replicates["ve"].tolist()
    for b, ve in enumerate(ve_b):
        row = {n: {f: None if math.isnan(v[b]) else v[b] for f, v in t.items()} for n, t in tables.items()}
        same += verdict(None if math.isnan(ve) else ve, row["ve_without_top_sse"], row["sse_share"], rules) == decided
    return same / len(ve_b)
