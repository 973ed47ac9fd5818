"""Why an SAE is a misfit: its input is changed back in one way at a time, and what mends it is the cause.

A base model's SAE can fail on the tuned model because activations grew (scale), because they moved (mean), or because
its threshold is wrong for them. Each guess is tried on a sample of the same tokens: activations divided by a factor,
activations moved to where the SAE expects them, a threshold multiplied by a factor. Nothing is inferred from how
activations look. A trial that brings VE over the misfit's bar, and takes away at least half of what is unexplained,
names the cause; of several, the one with the best VE. Biases aside, a larger input is the same as a lower threshold, so
these two often tie: the scale is named then.

Where an SAE expects activations is not in its file. The decoder's bias is a first guess; what the SAE makes of
activations moved there has a mean that is a better one, and so on.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import torch
from sae_lens import SAE

from sae_lens_gemma4.evaluation.reading import float64, read
from sae_lens_gemma4.evaluation.robust import VerdictRules

Cause = Literal["scale", "mean", "threshold"]
_FACTORS = ((1 / 16, 1 / 8, 1 / 4, 1 / 2, 2.0, 4.0, 8.0, 16.0), (2 / 3, 0.8, 1.25, 1.5), (0.9, 1.1), (0.95, 1.05))
"""Tried in turn, each set around the best so far."""
_GUESSES = 4
_TOKENS = 1024
_TIE = 0.02


@dataclass(frozen=True)
class Trial:
    """One correction: VE and L0 with it, on the sample. `factor` is what activations are divided, thresholds multiplied
    by; for the mean it is γ, the mean's size for the spread."""

    correction: Literal["none", "scale", "mean", "threshold"]
    factor: float | None
    ve: float | None
    l0: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def misfit_trials(sae: SAE[Any], x_td: torch.Tensor) -> list[Trial]:
    """The SAE on `x_td` as it is and with each correction; of scale and threshold the factor with the best VE."""
    x_td = x_td[:: math.ceil(len(x_td) / _TOKENS)].to(sae.W_dec.device).float()
    trials = [_trial("none", None, sae, x_td), _moved(sae, x_td), _search("scale", sae, x_td)]
    if isinstance(getattr(sae, "threshold", None), torch.Tensor):
        trials.append(_search("threshold", sae, x_td))
    return trials


def cause(trials: list[Trial], rules: VerdictRules) -> tuple[Cause | None, str | None]:
    """The correction that lifts VE most, if that mends it (see above), and a sentence that says so."""
    tried = [t for t in trials if t.correction != "none" and t.ve is not None]
    top = max(map(_goodness, tried), default=-math.inf)
    best = next((t for t in sorted(tried, key=_order) if _goodness(t) >= top - _TIE), None)
    plain = next((t.ve for t in trials if t.correction == "none"), None)
    if best is None or best.ve is None or plain is None:
        return None, None
    if plain >= rules.misfit_below:
        return None, f"On a sample of the tokens VE is {plain:.3f} with nothing changed."
    if best.ve < max(rules.misfit_below, (1 + plain) / 2) or best.correction == "none":
        sentence = f"No single change of scale, mean or threshold mends it; the best brings VE to {best.ve:.3f}."
        return None, sentence.replace("-", "−")
    what = {
        "scale": f"activations divided by {best.factor:.3g}",
        "mean": f"activations moved to the mean that the SAE expects (as they are, γ = {best.factor:.2f})",
        "threshold": f"thresholds multiplied by {best.factor:.3g}",
    }[best.correction]
    sentence = f"On a sample VE goes from {plain:.3f} to {best.ve:.3f} with {what}.".replace("-", "−")
    return best.correction, sentence


def _moved(sae: SAE[Any], x_td: torch.Tensor) -> Trial:
    mean_d = x_td.mean(dim=0)
    gamma = float(mean_d.norm() / (x_td - mean_d).square().sum(1).mean().sqrt())
    expected_d = sae.b_dec.float()
    trials = []
    for _ in range(_GUESSES):
        trials.append(_trial("mean", gamma, sae, x_td, shift_d=expected_d - mean_d))
        parts = [reading.x_hat_td.float().sum(0) for reading in read(sae, x_td + expected_d - mean_d)]
        expected_d = torch.stack(parts).sum(0) / len(x_td)
    return max(trials, key=_goodness)


def _order(trial: Trial) -> int:
    return ("scale", "mean", "threshold").index(trial.correction)


def _goodness(trial: Trial) -> float:
    return -math.inf if trial.ve is None else trial.ve


def _search(correction: Literal["scale", "threshold"], sae: SAE[Any], x_td: torch.Tensor) -> Trial:
    def attempt(factor: float) -> Trial:
        if correction == "scale":
            return _trial(correction, factor, sae, x_td, scale=factor)
        changed = copy.copy(sae)  # its other parameters are the SAE's own
        threshold = cast(torch.Tensor, sae.threshold) * factor
        changed._parameters = {**sae._parameters, "threshold": torch.nn.Parameter(threshold)}
        return _trial(correction, factor, changed, x_td)

    best = _trial("none", 1.0, sae, x_td)
    for factors in _FACTORS:
        around = best.factor or 1.0
        best = max((best, *(attempt(around * factor) for factor in factors)), key=_goodness)
    return replace(best, correction=correction)


def _trial(
    correction: Literal["none", "scale", "mean", "threshold"],
    factor: float | None,
    sae: SAE[Any],
    x_td: torch.Tensor,
    *,
    scale: float = 1.0,
    shift_d: torch.Tensor | None = None,
) -> Trial:
    """VE of the activations themselves: what was changed before the SAE is changed back after it."""
    sse, n_active = 0.0, 0
    shift_d = torch.zeros_like(x_td[0]) if shift_d is None else shift_d
    for reading in read(sae, x_td / scale + shift_d):
        error = (float64(reading.x_td) - float64(reading.x_hat_td)) * scale
        sse += float(error.square().sum())
        n_active += len(reading.active.value_a)
    variance = float((float64(x_td) - float64(x_td).mean(0)).square().sum())
    ve = 1 - sse / variance if variance > 0 and math.isfinite(sse) else None
    return Trial(correction, factor, ve, n_active / len(x_td))
