"""Reconstruction metrics over a stream of tokens, exact as if all tokens had been there at once.

Sums run in float64 and in centred form (Chan et al. 1983), so that a large mean costs no precision. The worst
tokens' activations are kept beside the sums, as many as the largest top fraction of `max_tokens` needs, so that
variance explained without them is exact too and memory stays bounded. Two accumulators add up with `+`.

Explained variance here is 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖² over the same tokens, sae_lens's definition
(evals.py, `explained_variance`); figures of other tools are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.robust import TOP_FRACTIONS, Verdict, VerdictRules, verdict

_ROUNDING = 1e-13  # of float64 sums, with room


@dataclass(frozen=True)
class ReconstructionMetrics:
    """What an SAE does to a set of tokens. A figure that is not defined on them is None, never 0 or 1.

    Attributes:
        n_tokens: tokens measured.
        ve: variance explained.
        ve_without_top_sse: for each fraction f, VE over the tokens that stay when the ceil(f·n) tokens with the
            largest SSE are left out, against the variance of those that stay. Of equal SSEs the earlier goes first.
        sse_share: the share of all squared error that those tokens hold.
        nmse: Σ‖x − x̂‖² / Σ‖x‖².
        cosine: mean cosine of x and x̂ over tokens where both are non-zero.
        l0, l1: mean number and mean sum of active latents a token.
        dead: latents that fired on none of these tokens.
        verdict: see `evaluation.robust`.
    """

    n_tokens: int
    ve: float | None
    ve_without_top_sse: Mapping[float, float | None]
    sse_share: Mapping[float, float | None]
    nmse: float | None
    cosine: float | None
    l0: float | None
    l1: float | None
    dead: int | None
    verdict: Verdict | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: fractions as strings."""
        data = asdict(self)
        for key in ("ve_without_top_sse", "sse_share"):
            data[key] = {str(fraction): value for fraction, value in data[key].items()}
        return data


@dataclass
class _Moments:
    """Count, mean `[d]` and centred sum of squares of a set of vectors, in float64."""

    n: int
    mean_d: torch.Tensor
    m2: float

    @staticmethod
    def of(x_td: torch.Tensor) -> _Moments:
        mean_d = x_td.mean(dim=0) if len(x_td) else torch.zeros(x_td.shape[1], dtype=torch.float64)
        return _Moments(len(x_td), mean_d, float((x_td - mean_d).square().sum()))

    def __add__(self, other: _Moments) -> _Moments:
        n = self.n + other.n
        if n == 0:
            return self
        delta_d = other.mean_d - self.mean_d
        m2 = self.m2 + other.m2 + float(delta_d.square().sum()) * self.n * other.n / n
        return _Moments(n, self.mean_d + delta_d * (other.n / n), m2)

    def without(self, part: _Moments) -> _Moments:
        """The moments of what is left when `part` is taken out."""
        n = self.n - part.n
        if n <= 0:
            return _Moments(0, torch.zeros_like(self.mean_d), 0.0)
        mean_d = (self.mean_d * self.n - part.mean_d * part.n) / n
        delta_d = part.mean_d - mean_d
        return _Moments(n, mean_d, self.m2 - part.m2 - float(delta_d.square().sum()) * part.n * n / self.n)


class ReconstructionAccumulator:
    """Streams activations and their reconstructions into `ReconstructionMetrics`.

    Args:
        d_in: width of the activations.
        max_tokens: the most tokens that this one, with all it is added to, will see: only then does each shard keep
            enough of its worst tokens. Memory is max_tokens · (8 B + max(top_fractions) · d_in · 8 B).
        d_sae: number of latents, for L0, L1 and dead counts; None leaves those undefined.
        top_fractions: the shares of worst tokens to leave out.
        rules: the verdict's thresholds.
    """

    def __init__(
        self,
        d_in: int,
        *,
        max_tokens: int,
        d_sae: int | None = None,
        top_fractions: Sequence[float] = TOP_FRACTIONS,
        rules: VerdictRules = VerdictRules(),
    ) -> None:
        if not all(0 < f < 1 for f in top_fractions):
            raise ConfigError(f"Top fractions must lie between 0 and 1, not {tuple(top_fractions)}.")
        self.d_in, self.d_sae, self.max_tokens = d_in, d_sae, max_tokens
        self.top_fractions, self.rules = tuple(top_fractions), rules
        self._n_kept = math.ceil(max(self.top_fractions, default=0) * max_tokens)
        self._moments = _Moments(0, torch.zeros(d_in, dtype=torch.float64), 0.0)
        self._sse: list[torch.Tensor] = []
        self._worst_sse = torch.zeros(0, dtype=torch.float64)
        self._worst_x_td = torch.zeros(0, d_in, dtype=torch.float64)
        self._squares = self._cosine_sum = self._l1_sum = 0.0
        self._cosine_n = 0
        self._fired_f = torch.zeros(d_sae or 0, dtype=torch.int64)

    @property
    def n_tokens(self) -> int:
        return self._moments.n

    @torch.no_grad()
    def update(self, x_td: torch.Tensor, x_hat_td: torch.Tensor, acts_tf: torch.Tensor | None = None) -> None:
        """Add tokens: activations `[t, d_in]`, reconstructions of the same shape, latents `[t, d_sae]`.

        Raises:
            DataError: shapes that do not fit, values that are not finite, or more than `max_tokens` tokens.
        """
        if x_td.shape != x_hat_td.shape or x_td.ndim != 2 or x_td.shape[1] != self.d_in:
            raise DataError(
                f"Activations {tuple(x_td.shape)} and reconstructions {tuple(x_hat_td.shape)} "
                f"must both be [tokens, {self.d_in}]."
            )
        if (acts_tf is None) != (self.d_sae is None) or (
            acts_tf is not None and acts_tf.shape != (len(x_td), self.d_sae)
        ):
            shape = None if acts_tf is None else tuple(acts_tf.shape)
            raise DataError(f"Latents have the shape {shape}, not ({len(x_td)}, {self.d_sae}).")
        self._make_room(len(x_td))
        x, x_hat = x_td.cpu().double(), x_hat_td.cpu().double()
        sse_t = (x - x_hat).square().sum(dim=1)
        if not (sse_t.isfinite().all() and x.isfinite().all()):
            raise DataError("Activations or reconstructions are not finite.")
        self._moments = self._moments + _Moments.of(x)
        self._squares += float(x.square().sum())
        norms = x.norm(dim=1) * x_hat.norm(dim=1)
        self._cosine_sum += float(((x * x_hat).sum(dim=1)[norms > 0] / norms[norms > 0]).sum())
        self._cosine_n += int((norms > 0).sum())
        self._sse.append(sse_t)
        self._keep_worst(sse_t, x)
        if acts_tf is not None:
            self._fired_f += (acts_tf != 0).sum(dim=0).cpu()
            self._l1_sum += sum(float(rows.double().abs().sum()) for rows in acts_tf.cpu().split(64))

    def _make_room(self, n: int) -> None:
        if self.n_tokens + n > self.max_tokens:
            raise DataError(f"{self.n_tokens + n} tokens are more than max_tokens={self.max_tokens}.")

    def _keep_worst(self, sse_t: torch.Tensor, x_td: torch.Tensor) -> None:
        sse = torch.cat([self._worst_sse, sse_t])
        order = sse.argsort(descending=True, stable=True)[: self._n_kept]
        self._worst_sse, self._worst_x_td = sse[order], torch.cat([self._worst_x_td, x_td])[order]

    def __add__(self, other: ReconstructionAccumulator) -> ReconstructionAccumulator:
        """Both together, exactly; `self`'s tokens count as the earlier ones.

        Raises:
            ConfigError: they were not made alike.
            DataError: together they have seen more than `max_tokens`.
        """
        for name in ("d_in", "d_sae", "max_tokens", "top_fractions", "rules"):
            if getattr(self, name) != getattr(other, name):
                values = f"{getattr(self, name)} and {getattr(other, name)}"
                raise ConfigError(f"Accumulators can be added if made alike; {name} is {values}.")
        self._make_room(other.n_tokens)
        total = ReconstructionAccumulator(
            self.d_in,
            max_tokens=self.max_tokens,
            d_sae=self.d_sae,
            top_fractions=self.top_fractions,
            rules=self.rules,
        )
        total._moments = self._moments + other._moments
        total._sse = self._sse + other._sse
        for part in (self, other):
            total._keep_worst(part._worst_sse, part._worst_x_td)
            total._squares += part._squares
            total._cosine_sum += part._cosine_sum
            total._cosine_n += part._cosine_n
            total._l1_sum += part._l1_sum
            total._fired_f += part._fired_f
        return total

    def compute(self) -> ReconstructionMetrics:
        """The metrics of all tokens so far.

        Raises:
            DataError: there are none.
        """
        n = self.n_tokens
        if n == 0:
            raise DataError("No token was measured.")
        sse = float(torch.cat(self._sse).sum())
        ve = _ve(sse, self._moments.m2, floor=_ROUNDING**2 * self._squares)
        without: dict[float, float | None] = {}
        share: dict[float, float | None] = {}
        for fraction in self.top_fractions:
            k = math.ceil(fraction * n)
            worst = float(self._worst_sse[:k].sum())
            left = self._moments.without(_Moments.of(self._worst_x_td[:k]))
            without[fraction] = _ve(sse - worst, left.m2, floor=_ROUNDING * self._moments.m2)
            share[fraction] = worst / sse if sse > 0 else None
        return ReconstructionMetrics(
            n_tokens=n,
            ve=ve,
            ve_without_top_sse=without,
            sse_share=share,
            nmse=sse / self._squares if self._squares > 0 else None,
            cosine=self._cosine_sum / self._cosine_n if self._cosine_n else None,
            l0=None if self.d_sae is None else int(self._fired_f.sum()) / n,
            l1=None if self.d_sae is None else self._l1_sum / n,
            dead=None if self.d_sae is None else int((self._fired_f == 0).sum()),
            verdict=verdict(ve, without, share, self.rules),
        )

    def firing_frequency(self) -> torch.Tensor:
        """Share of tokens on which each latent fired, float64 `[d_sae]`."""
        return self._fired_f.double() / max(self.n_tokens, 1)

    def sse_concentration(self, n_points: int = 60) -> list[tuple[float, float]]:
        """The worst fraction of tokens against the share of squared error they hold, log-spaced from one token."""
        sse = torch.cat(self._sse).sort(descending=True).values
        held = sse.cumsum(0) / sse.sum()
        counts = torch.logspace(0, math.log10(len(sse)), n_points, dtype=torch.float64).round().long().unique()
        return [(int(k) / len(sse), float(held[k - 1])) for k in counts] if sse.sum() > 0 else []


def _ve(sse: float, total_variance: float, *, floor: float) -> float | None:
    """1 − sse / total_variance; None where that variance is no more than the rounding of what it was made from."""
    return 1 - sse / total_variance if total_variance > floor else None
