"""Whether an event did harm: what the training stream says after it, against what it said before.

Resampled latents that are too large win the batch's selection everywhere; the smallest activation selected jumps, the
running threshold follows it for a hundred steps, and the SAE that would be saved is another one. Nothing in sae_lens
looks. The sign is there within a few batches, long before the threshold has moved, so that is where this looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.training.phases import Guard

BASELINE = 20
"""Steps whose means are what an event is compared with."""
_RECENT = 5
"""Steps whose means are compared."""
_NO_GUARD = Guard()  # says how long an event is looked at that nobody judges


class Signs(NamedTuple):
    """What one step on the training stream shows.

    Attributes:
        selected_from: smallest activation selected, which a batch top-k threshold is the moving average of; None for
            architectures without one, and where nothing was selected.
        ve: variance explained in the batch, in the training form; NaN where that is no number.
        loss: the whole loss.
    """

    selected_from: float | None
    ve: float
    loss: float


@torch.no_grad()
def signs(output: TrainStepOutput, smallest: torch.Tensor | None, ranks: Ranks = ALONE) -> torch.Tensor:
    """Those of a step as numbers on its device, float64 `[3]`, for `read_signs`; costs a pass over the batch.

    Args:
        output: its input is this rank's part of the batch, its losses are the batch's.
        smallest: smallest activation selected, infinity if there is none; None for architectures without a threshold.
    """
    x_nd = output.sae_in.float()
    mean_d = x_nd.mean(dim=0)
    away_d = mean_d - ranks.mean(mean_d.clone())
    variance = ranks.mean(x_nd.var(dim=0, correction=0) + away_d.square()).sum(dtype=torch.float64)
    ve = (1 - output.losses["mse_loss"].detach() / variance).masked_fill(~(variance > 0), torch.nan)
    smallest = torch.full_like(ve, torch.inf) if smallest is None else smallest.double()
    return torch.stack([smallest, ve, output.loss.detach().double()])


def read_signs(rows: Sequence[torch.Tensor]) -> list[Signs]:
    """Those of several steps, in one transfer."""
    table = torch.stack(list(rows)).tolist() if rows else []
    return [Signs(smallest if math.isfinite(smallest) else None, ve, loss) for smallest, ve, loss in table]


def mean_signs(rows: Sequence[Signs]) -> Signs:
    """The means over several steps; NaN and None without any."""
    selected = [row.selected_from for row in rows if row.selected_from is not None]
    ve = sum(row.ve for row in rows) / len(rows) if rows else math.nan
    loss = sum(row.loss for row in rows) / len(rows) if rows else math.nan
    return Signs(sum(selected) / len(selected) if selected else None, ve, loss)


@dataclass
class Watch:
    """Looks at the steps after an event, up to `window_steps` of the guard; without one it records and never judges.

    Args:
        before: the means before it.
    """

    guard: Guard | None
    before: Signs
    seen: list[Signs] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return len(self.seen) >= (self.guard or _NO_GUARD).window_steps

    @property
    def after(self) -> Signs:
        """The means of the last few steps."""
        return mean_signs(self.seen[-_RECENT:])

    def harm(self, row: Signs) -> str | None:
        """What the event did wrong, if this next step shows it."""
        self.seen.append(row)
        if self.guard is None:
            return None
        if not math.isfinite(row.loss) or not math.isfinite(row.ve):
            return "the loss is no number"
        if len(self.seen) < _RECENT:
            return None
        was, now = self.before, self.after
        if (
            was.selected_from
            and now.selected_from
            and now.selected_from > self.guard.threshold_ratio * was.selected_from
        ):
            return f"the smallest activation selected went from {was.selected_from:.4g} to {now.selected_from:.4g}"
        if now.ve < was.ve - self.guard.ve_drop:
            return f"variance explained went from {was.ve:.3f} to {now.ve:.3f}"
        return None
