"""The figures of one SAE on one set of tokens, and their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch

from sae_lens_gemma4.evaluation.intervals import Estimate, Key
from sae_lens_gemma4.evaluation.robust import Verdict

ERROR_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

RESAMPLED = (
    "ve", "ve_centred", "ve_without_top_sse", "ve_without_high_norm", "sse_share", "high_norm_share",
    "high_norm_sse_share", "mse", "nmse", "cosine", "relative_bias", "l2_norm_in", "l2_norm_out", "l2_ratio", "l0",
    "l1",
)  # fmt: skip
"""The figures that get intervals, and whose differences are told."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetrics:
    """What an SAE does to a set of tokens. A figure that is not defined on them is None, never 0 or 1.

    Figures that are floats are `Estimate`s: `.interval` is (low, high) where documents were given, else None.

    Attributes:
        n_tokens: tokens measured.
        ve: variance explained, 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖².
        ve_centred: 1 − Σ‖e − mean(e)‖² / Σ‖x − mean(x)‖² with e = x − x̂: blind to a constant error, as some tools are.
        ve_per_dimension: the mean over dimensions of each one's own VE; dimensions without variance are left out.
        ve_without_top_sse: for each fraction f, VE over the tokens that stay when the ⌈f·n⌉ tokens with the
            largest SSE are left out, against the variance of those that stay. Of equal SSEs the earlier goes first.
        ve_without_top_norm: the same for the ⌈f·n⌉ tokens with the largest norm.
        ve_without_high_norm: for each c, VE over the tokens whose norm is at most c times the median norm.
        ve_without_both: for each c and f, VE without the tokens that either leaves out.
        sse_share: the share of all squared error that the top f by SSE hold.
        high_norm_share, high_norm_sse_share: for each c the share of tokens, and of squared error, above.
        mse: Σ‖x − x̂‖² / n, a token's squared error.
        nmse: Σ‖x − x̂‖² / Σ‖x‖².
        cosine: mean cosine of x and x̂ over tokens where both are non-zero.
        relative_bias: Σ‖x̂‖² / Σ x·x̂ (2404.16014, eq. 10): 1 where nothing shrinks.
        l2_norm_in, l2_norm_out: mean ‖x‖, mean ‖x̂‖.
        l2_ratio: mean ‖x̂‖ / ‖x‖ over tokens with ‖x‖ > 0.
        l0, l1: mean number and mean absolute sum of active latents a token.
        dead: latents that fired on none of these tokens.
        gamma: ‖mean(x)‖ / √(Σ‖x − mean(x)‖² / n), how far activations sit from zero for their spread (2605.31518).
        error_quantiles: of ‖x − x̂‖² / ‖x‖² over tokens with ‖x‖ > 0, linear between neighbours.
        never_fired: latents that were silent on the first so many tokens.
        verdict: see `evaluation.robust`.
        verdict_share: the share of resamples with the same verdict.
        replicates: each figure on each resample, `[b]`, for paired differences.
    """

    n_tokens: int
    ve: Estimate | None
    ve_centred: Estimate | None
    ve_per_dimension: Estimate | None
    ve_without_top_sse: Mapping[float, Estimate | None]
    ve_without_top_norm: Mapping[float, Estimate | None]
    ve_without_high_norm: Mapping[float, Estimate | None]
    ve_without_both: Mapping[float, Mapping[float, Estimate | None]]
    sse_share: Mapping[float, Estimate | None]
    high_norm_share: Mapping[float, Estimate | None]
    high_norm_sse_share: Mapping[float, Estimate | None]
    mse: Estimate | None
    nmse: Estimate | None
    cosine: Estimate | None
    relative_bias: Estimate | None
    l2_norm_in: Estimate | None
    l2_norm_out: Estimate | None
    l2_ratio: Estimate | None
    l0: Estimate | None
    l1: Estimate | None
    dead: int | None
    gamma: Estimate | None
    error_quantiles: Mapping[float, Estimate | None]
    never_fired: Mapping[int, int]
    verdict: Verdict | None
    verdict_share: float | None
    replicates: Mapping[Key, torch.Tensor] = field(repr=False, compare=False)

    def figure(self, key: Key) -> Estimate | None:
        """The figure of a key of `resampled` and `replicates`: a name, or a name and what it is at."""
        name, *inner = _parts(key)
        value = getattr(self, name)
        for part in inner:
            value = value[part]
        return cast("Estimate | None", value)

    def resampled(self) -> dict[Key, Estimate | None]:
        """The figures of `RESAMPLED`, by their keys in `replicates`."""
        figures: dict[Key, Estimate | None] = {}
        for name in RESAMPLED:
            value = getattr(self, name)
            figures |= {(name, key): v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
        return figures

    def to_dict(self) -> dict[str, Any]:
        """JSON form: fractions, multiples and counts as strings, without intervals and replicates."""
        left_out = ("verdict_share", "replicates")
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}

    def intervals(self) -> dict[str, Any]:
        """The intervals of the figures that have one or might, in the form of `to_dict`."""
        names = {_parts(key)[0] for key in self.replicates}
        return {name: _intervals(getattr(self, name)) for name in RESAMPLED if name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else str(key): _plain(v) for key, v in value.items()}
    return float(value) if isinstance(value, float) else value


def _intervals(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{key:g}": _intervals(inner) for key, inner in value.items()}
    return list(value.interval) if isinstance(value, Estimate) and value.interval else None


def nested(figures: Mapping[Key, Any]) -> dict[str, Any]:
    """Keys that are tuples as mappings in mappings, with the names that JSON gives them."""
    result: dict[str, Any] = {}
    for key, value in figures.items():
        *path, last = [f"{part:g}" if isinstance(part, float) else str(part) for part in _parts(key)]
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def _parts(key: Key) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)
