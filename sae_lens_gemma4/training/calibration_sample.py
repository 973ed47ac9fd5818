"""Which activations an SAE is fitted to, and on which the fit is tried.

Neighbouring tokens are alike, so what is held back is the last part of the sample, not tokens here and there. Tokens
many times the usual distance from the centre are in neither: a handful of them would decide both.

Shapes: `t` tokens, `d` channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.evaluation.reading import float64

LEAST = 64
"""Tokens without which nothing is fitted."""
_HELD_BACK = 4  # the last of so many parts
_FAR = 10.0  # times the median distance from the centre
_CENTRE = 8192  # the most tokens whose median is the centre


class Sample(NamedTuple):
    """Activations in float32.

    Attributes:
        all_td: all that were given.
        fit_td, held_td: the first three quarters and the last, without outliers.
        outliers: how many tokens are in neither.
    """

    all_td: torch.Tensor
    fit_td: torch.Tensor
    held_td: torch.Tensor
    outliers: int

    @staticmethod
    def of(x_td: torch.Tensor) -> Sample:
        """Divide `x_td`.

        Raises:
            DataError: activations that are too few, all the same, or no numbers.
        """
        if len(x_td) < LEAST:
            raise DataError(f"Calibration needs at least {LEAST} tokens; there are {len(x_td)}.")
        if not x_td.isfinite().all():
            raise DataError("Activations to calibrate with are not all finite.")
        x_td = x_td.float()
        distance_t = (x_td - some(x_td, _CENTRE).median(dim=0).values).norm(dim=1)
        near_t = distance_t <= _FAR * distance_t.median()
        cut = len(x_td) - len(x_td) // _HELD_BACK
        fit_td, held_td = x_td[:cut][near_t[:cut]], x_td[cut:][near_t[cut:]]
        if any(len(part_td) < 2 or not part_td.std(0).any() for part_td in (fit_td, held_td)):
            raise DataError("Activations to calibrate with do not vary.")
        return Sample(x_td, fit_td, held_td, int((~near_t).sum()))


def some(x_td: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, evenly from all over `x_td`."""
    return x_td[:: math.ceil(len(x_td) / most)]


def variance_explained(x_td: torch.Tensor, x_hat_td: torch.Tensor) -> float | None:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖², or None if that is not finite."""
    x = float64(x_td)
    x_hat = float64(x_hat_td).to(x.device)
    ve = float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    return ve if math.isfinite(ve) else None
