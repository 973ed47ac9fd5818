"""What is run: the baseline, the vector both ways, and random directions of the same length, at every scale.

A vector that helps when added says little: any push of that length may help. So the opposite of each push is always
run, and random directions unless they are switched off, in which case no direction effect can be found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sae_lens_gemma4.errors import ConfigError

Kind = Literal["baseline", "positive", "negative", "random"]
Positions = Literal["all", "generated"]


class Condition(NamedTuple):
    """One way of answering all items.

    Attributes:
        scale: signed share of the mean norm that is added; 0 at the baseline, below it for "negative".
        seed: of a random direction; None of others.
    """

    name: str
    kind: Kind
    scale: float
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class SteeringSettings:
    """What is run, and how answers are generated (greedily).

    Args:
        scales: shares of the mean norm at the hook, each run with both signs.
        n_random: random directions at each scale; with fewer than eight or so a direction effect is hardly ever found.
        random_scales: the scales at which they are run; all if None.
        positions: "all", the prompt's included, or "generated": only positions from which a new token is predicted, the
            prompt's last one and all after it.
        max_new_tokens: tokens an answer has at most.
        batch_items: items a batch, padded on the left. With weights of 16 bits it may change answers, and a run goes on
            with the same only; in float32 it is free.
        stop: texts that end an answer, beside the model's own end tokens; not part of it.
        seed: of the random directions.

    Raises:
        ConfigError: scales that are not positive, finite and different, or numbers that make no sense.
    """

    scales: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.10, 0.15])
    n_random: int = 8
    random_scales: list[float] | None = None
    positions: Positions = "all"
    max_new_tokens: int = 256
    batch_items: int = 8
    stop: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_scales(self.scales, "scales")
        if self.n_random < 0 or self.max_new_tokens < 1 or self.batch_items < 1 or self.seed < 0:
            raise ConfigError(f"n_random and seed must not be negative, max_new_tokens and batch_items not 0: {self}.")
        if self.positions not in ("all", "generated"):
            raise ConfigError(f"positions must be 'all' or 'generated', not {self.positions!r}.")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ConfigError(f"stop must be a list of texts that are not empty, not {self.stop!r}.")
        if self.random_scales is not None:
            _check_scales(self.random_scales, "random_scales")
            if missing := [s for s in self.random_scales if s not in self.scales]:
                raise ConfigError(
                    f"random_scales has {missing[0]:g}, which is none of scales: there is nothing to check."
                )


def plan(settings: SteeringSettings) -> list[Condition]:
    """The conditions, in the order in which they are run: the baseline, then scale by scale."""
    conditions = [Condition("baseline", "baseline", 0.0)]
    for scale in settings.scales:
        share = percent(scale)
        conditions += [
            Condition(f"+{share}", "positive", scale),
            Condition(f"−{share}", "negative", -scale),
        ]
        if settings.random_scales is None or scale in settings.random_scales:
            conditions += [
                Condition(f"random {i + 1}, {share}", "random", scale, settings.seed + i)
                for i in range(settings.n_random)
            ]
    return conditions


def percent(scale: float) -> str:
    """A scale as it is called: .05 is "5 %"."""
    return f"{100 * abs(scale):g} %"


def _check_scales(scales: Sequence[float], what: str) -> None:
    if not scales:
        raise ConfigError(f"{what} is empty: give shares of the mean norm, as [0.02, 0.05, 0.1].")
    for scale in scales:
        if not math.isfinite(scale) or scale <= 0:
            raise ConfigError(
                f"{what} must be positive shares of the mean norm, unlike {scale:g}: the baseline is run anyway, and "
                "every scale with both signs."
            )
    if len({percent(s) for s in scales}) < len(scales):
        raise ConfigError(f"{what} names a scale twice: {', '.join(f'{s:g}' for s in scales)}.")
