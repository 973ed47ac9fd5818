"""How one SAE is trained, as data: its phases, its guard, and what it must reach.

A run is a list of phases because that is what the public runs became: warm-up and cosine over some epochs, then a
polish with a rate and an end of its own from the best state so far. sae_lens has one schedule a run, and a resume
under another raises (`lr_lambdas`) or is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.resampling import Resampling


def positive(of: object, where: str, *names: str) -> None:
    """Raise `ConfigError` for the first of these fields that is a number below 1."""
    for name in names:
        value = getattr(of, name)
        if value is not None and value < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, not {value}.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with a rate and a schedule of its own.

    Attributes:
        tokens, epochs: how long; one of them. An epoch is once through the training text, and may be a fraction.
        lr, lr_end: Adam's rate and, with the cosine, its end (lr / 10 if None).
        schedule: after the warm-up, cosine decay to `lr_end`, or constant.
        warm_up_steps, decay_steps: linear, from nothing at the start and to nothing at the end.
        start: from the last state, or from the best one that was measured on held-out text.
        resampling: of dead latents; None for none.
    """

    name: str = "main"
    tokens: int | None = None
    epochs: float | None = None
    lr: float = 1e-4
    lr_end: float | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warm_up_steps: int = 0
    decay_steps: int = 0
    start: Literal["last", "best"] = "last"
    resampling: Resampling | None = None

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}"
        if (self.tokens is None) == (self.epochs is None):
            raise ConfigError(f"{where} needs either `tokens` or `epochs`.")
        positive(self, where, "tokens")
        if self.epochs is not None and self.epochs <= 0:
            raise ConfigError(f"{where}.epochs must be positive, not {self.epochs}.")
        if self.lr <= 0:
            raise ConfigError(f"{where}.lr must be positive, not {self.lr}.")
        for name in ("lr_end", "warm_up_steps", "decay_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{where}.{name} must not be negative, as {value} is.")
        if self.schedule == "constant" and self.lr_end is not None:
            raise ConfigError(f"{where}.lr_end is where a cosine ends; a constant rate has decay_steps.")
        if self.decay_steps and self.final_lr == 0:
            raise ConfigError(f"{where}.decay_steps goes from lr_end to 0, and lr_end is 0.")

    @property
    def final_lr(self) -> float:
        """Where the schedule ends, before any linear decay."""
        if self.schedule == "constant":
            return self.lr
        return self.lr / 10 if self.lr_end is None else self.lr_end

    def steps(self, batch_size: int, tokens_per_epoch: int | None) -> int:
        """Steps that this phase takes.

        Args:
            tokens_per_epoch: tokens in the training text; None if that is not known.

        Raises:
            ConfigError: less than one batch, a schedule that is longer, or epochs of a text without a known end.
        """
        if self.tokens is not None:
            tokens = self.tokens
        elif tokens_per_epoch is None:
            raise ConfigError(f"phase {self.name!r} counts epochs, and a streamed text has none; say `tokens`.")
        else:
            assert self.epochs is not None
            tokens = round(self.epochs * tokens_per_epoch)
        steps = tokens // batch_size
        if steps < 1:
            raise ConfigError(f"phase {self.name!r} ({tokens:,} tokens) is less than one batch ({batch_size:,}).")
        if self.warm_up_steps + self.decay_steps >= steps:
            raise ConfigError(
                f"Warm-up ({self.warm_up_steps}) and decay ({self.decay_steps}) leave none of the {steps} steps of "
                f"phase {self.name!r}."
            )
        return steps


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When an event is taken back: resampled latents that flood the selection, or a loss that is no number.

    The public run of this kind lost an SAE so: 7,343 latents resampled at full norm took the threshold from 1.64 to
    5.76 and variance explained from .818 to .735. Both are watched on the training stream after each event.

    Attributes:
        window_steps: steps after an event in which it is watched.
        threshold_ratio: most that the smallest activation selected may grow, against the mean before the event.
        ve_drop: most that variance explained may fall.
        tries: smaller events tried in the place of one that was taken back; after that it is left out.
        shrink: share of the norm, and of the latents, that each smaller event keeps.
    """

    window_steps: int = 50
    threshold_ratio: float = 1.5
    ve_drop: float = 0.05
    tries: int = 2
    shrink: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "guard", "window_steps")
        if self.threshold_ratio <= 1 or self.ve_drop <= 0 or not 0 < self.shrink < 1 or self.tries < 0:
            raise ConfigError(
                "A guard needs threshold_ratio above 1, ve_drop above 0, shrink between 0 and 1, and tries of 0 or "
                f"more, not {self}."
            )


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training of one SAE.

    Attributes:
        phases: one after the other.
        dead_after_steps: steps without firing after which a latent is dead: it gets the auxiliary loss, and is what
            resampling replaces.
        unit_decoder_every: steps between projections of the decoder's rows to norm 1; None for none.
        guard: None to let every event stand.
    """

    phases: list[Phase]
    dead_after_steps: int = 1000
    unit_decoder_every: int | None = None
    guard: Guard | None = Guard()

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("training.phases needs at least one phase.")
        positive(self, "training", "dead_after_steps", "unit_decoder_every")
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ConfigError(f"Two phases have one name: {', '.join(names)}.")
        for phase in self.phases:
            every = phase.resampling.every_steps if phase.resampling is not None else None
            if self.guard is not None and every is not None and every < self.guard.window_steps:
                raise ConfigError(
                    f"phase {phase.name!r} resamples every {every} steps, and the guard watches an event for "
                    f"{self.guard.window_steps}: lower guard.window_steps, or resample less often."
                )
        if self.phases[0].start == "best":
            raise ConfigError(f"phase {names[0]!r} is the first; there is no best state to start from.")

    @property
    def needs_best(self) -> bool:
        return any(phase.start == "best" for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What must hold on every held-out corpus before an SAE may be called released. None asks for nothing.

    Attributes:
        min_ve: least variance explained.
        l0_within: furthest that L0 may lie from k, as a share of k.
        max_dead: most latents that never fire on it, as a share of all.
    """

    min_ve: float | None = None
    l0_within: float | None = None
    max_dead: float | None = None

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if all(value is None for value in values.values()):
            raise ConfigError(f"A gate asks for at least one of {', '.join(values)}.")
        for name in ("l0_within", "max_dead"):
            if (value := values[name]) is not None and value < 0:
                raise ConfigError(f"gate.{name} must not be negative, as {value} is.")
        if self.min_ve is not None and self.min_ve >= 1:
            raise ConfigError(f"gate.min_ve must be below 1, not {self.min_ve}.")
