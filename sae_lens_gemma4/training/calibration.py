"""Before the first step a base SAE is fitted to the tuned activations, as far as closed forms go.

What tuning changed is often no more than where activations lie and how large they are. Adam needs many steps for that,
and moves every weight on the way. Here it is found from the activations and the SAE alone, without the base model, and
put into the weights (`affine.fold`). In turn: the threshold for L0 = k; where the SAE expects its input; how large;
then gain and offset of each channel, by alternating between what the SAE makes of the input and the gains with which
that fits best.

Nothing is believed. Each part is tried in the form in which the SAE will be saved, on tokens that no fit has seen, and
what does not raise VE there by more than 0.001 is undone. Tokens many times the usual distance from the centre are left
out of fits and scores, since a handful of them would decide both; how many is in the report.

Shapes: `t` tokens, `d` channels, `f` latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from sae_lens_gemma4.errors import ConfigError, DataError, SAEError
from sae_lens_gemma4.evaluation.reading import float64, read, reconstruct
from sae_lens_gemma4.training.affine import Affine, fit_gains, fold
from sae_lens_gemma4.training.calibration_sample import LEAST, Sample, some, variance_explained
from sae_lens_gemma4.training.restore import inference_form
from sae_lens_gemma4.training.thresholds import set_threshold, take_threshold, target_l0

_SEARCH, _FIT = 1024, 8192  # the most tokens of a search's and of another trial
_SCALES = (tuple(2.0**n for n in range(-7, 8)), (0.7, 1.4), (0.84, 1.19), (0.92, 1.09))
_GUESSES = 3  # of where activations are expected, for each scale
_ROUNDS, _PATIENCE = 24, 3  # of gains, and of them without a rise of VE
_RISE = 1e-3  # of VE, below which nothing is gained


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a base SAE is fitted to tuned activations before training.

    Attributes:
        tokens: of the training text that are looked at.
        recentre: move the SAE to where the activations are.
        scale: one factor for all channels.
        gains: a factor and an offset for each channel.
        threshold: set it so that k latents are active on the mean token.
    """

    tokens: int = 65_536
    recentre: bool = True
    scale: bool = True
    gains: bool = True
    threshold: bool = True

    def __post_init__(self) -> None:
        if self.tokens < LEAST:
            raise ConfigError(f"calibration.tokens must be at least {LEAST}, not {self.tokens}.")


@dataclass(frozen=True)
class Part:
    """One part: variance explained and L0 with it and all that was kept before, on tokens held back from fits.

    `threshold` is the one in use, the median where each latent has its own, None where there is none. `ve` is None
    where reconstructions are not finite.
    """

    name: str
    kept: bool
    ve: float | None
    l0: float
    threshold: float | None


@dataclass(frozen=True)
class CalibrationReport:
    """What was found in the activations and what was done to the SAE.

    Attributes:
        tokens, held_back: tokens looked at, and how many of them no fit has seen.
        outliers: tokens more than ten times the median distance from the mean; they count for the threshold alone.
        mean_norm, sigma: ‖mean‖ and √E‖x − mean‖²; `gamma` is their ratio (arXiv 2605.31518).
        k: the L0 that thresholds were set for, if there was one.
        scale: geometric mean of the gains in the weights now; 1 if none was kept. Where an SAE's biases are small for
            its activations it does nearly the same at any scale, and this says little.
        gain_spread: standard deviation of their logarithms; `gain_min` and `gain_max` go with it.
        offset_norm: ‖offset‖ in units of sigma.
        parts: "none" (the SAE as it came), then each part that was tried, then "calibrated" (as it is now).
    """

    tokens: int
    held_back: int
    outliers: int
    mean_norm: float
    sigma: float
    gamma: float
    k: float | None
    scale: float
    gain_spread: float
    gain_min: float
    gain_max: float
    offset_norm: float
    parts: list[Part]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def calibrate(sae: TrainingSAE[Any], x_td: torch.Tensor, cfg: Calibration) -> CalibrationReport:
    """Fit `sae` to the activations `x_td`, in place. Nothing is drawn at random.

    The threshold comes first, and is set whatever VE does. Every other part is kept if VE rises by more than 0.001 on
    the tokens held back, thresholds set for the same L0 each time. JumpReLU SAEs need `target_l0` for that: without it
    they keep their thresholds, in the new units, and L0 may change. The offset of each channel belongs to `gains`, with
    or without `recentre`.

    Raises:
        DataError: activations that are too few, all the same, or no numbers.
        SAEError: an SAE of another width, or one that normalises its input.
    """
    if x_td.ndim != 2 or x_td.shape[1] != sae.cfg.d_in:
        raise SAEError(f"The SAE reads {sae.cfg.d_in} channels; the activations are of shape {list(x_td.shape)}.")
    if sae.cfg.normalize_activations != "none":
        raise SAEError(f"An SAE that normalises its input ({sae.cfg.normalize_activations}) cannot be calibrated.")
    return _Calibrator(sae, Sample.of(x_td), cfg).run()


@torch.no_grad()
def centre(sae: TrainingSAE[Any], x_td: torch.Tensor, cfg: Calibration) -> dict[str, Any]:
    """Let a new SAE begin at the activations' mean. sae_lens's begins at 0, and where γ is large, latents die of that.

    There is nothing else to fit in an SAE that knows nothing. What is returned has a `CalibrationReport`'s names.

    Raises:
        DataError: activations that are all the same.
    """
    x_td = float64(x_td)
    mean_d = x_td.mean(0)
    mean_norm, sigma = float(mean_d.norm()), float((x_td - mean_d).square().sum(1).mean().sqrt())
    if sigma == 0:
        raise DataError(f"The {len(x_td)} activations to calibrate with are all the same.")
    if cfg.recentre:
        sae.b_dec.copy_(mean_d)
    return {"tokens": len(x_td), "mean_norm": mean_norm, "sigma": sigma, "gamma": mean_norm / sigma, "parts": []}


class _Calibrator:
    def __init__(self, sae: TrainingSAE[Any], sample: Sample, cfg: Calibration) -> None:
        self.sae, self.sample, self.cfg = sae, sample, cfg
        self.k = target_l0(sae)
        self.refits = cfg.threshold and self.k is not None
        self.state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
        self.x_td = some(sample.fit_td, _SEARCH).to(sae.device)
        self.best = Affine.of(1.0, torch.zeros_like(self.x_td[0]))

    def run(self) -> CalibrationReport:
        try:
            parts = [self._measured("none", self.best, refit=False)]
            if self.refits:
                parts.append(self._measured("threshold", self.best, refit=True))
            ve = _order(parts[-1].ve)
            for name, affine in self._trials():
                part = self._measured(name, affine, refit=self.refits)
                parts.append(replace(part, kept=_order(part.ve) > ve + _RISE))
                if parts[-1].kept:
                    self.best, ve = affine, _order(part.ve)
            saved = self._saved(self.best)
            if self.refits:
                self._set_threshold(saved, self.sample.all_td)
                take_threshold(self.sae, saved)
            return self._report([*parts, self._scored("calibrated", saved)])
        except BaseException:
            self.sae.load_state_dict(self.state)
            raise

    def _trials(self) -> Iterator[tuple[str, Affine]]:
        """Each part's proposal, made when what came before it was kept or not."""
        if self.cfg.recentre:
            yield "recentre", self._search(((1.0,),))
        if self.cfg.scale:
            yield "scale", self._search(_SCALES)
        if self.cfg.gains:
            yield "gains", self._gains()

    def _search(self, rounds: tuple[tuple[float, ...], ...]) -> Affine:
        """The scale and centre with the best VE: a wide grid first, then finer ones about the best so far."""
        best, best_ve, scale = self.best, -math.inf, 1.0
        for factors in rounds:
            around = scale
            for factor in factors:
                for affine, ve in self._centred(around * factor):
                    if _order(ve) > best_ve:
                        best, best_ve, scale = affine, _order(ve), around * factor
        return best

    def _centred(self, scale: float) -> Iterator[tuple[Affine, float | None]]:
        """One scale where it is, and moved.

        Where the SAE expects activations is not in its file. The decoder's bias is a first guess; the mean of what the
        SAE makes of activations moved there is a better one, and so on.
        """
        affine = Affine.of(scale, torch.zeros_like(self.x_td[0]))
        yield affine, self._score(affine)[0]
        if not self.cfg.recentre:
            return
        mean_d = self.x_td.mean(0)
        affine = Affine.of(scale, mean_d - scale * self.state["b_dec"].to(mean_d))
        for _ in range(_GUESSES):
            ve, x_hat_td = self._score(affine)
            yield affine, ve
            affine = Affine(affine.gain_d, affine.offset_d + mean_d - x_hat_td.to(mean_d.dtype).mean(0))

    def _score(self, affine: Affine) -> tuple[float | None, torch.Tensor]:
        """VE and reconstructions with the SAE's own threshold, which says how large the SAE expects its input."""
        saved = self._saved(affine)
        x_hat_td = reconstruct(saved, self.x_td)
        return variance_explained(self.x_td, x_hat_td), x_hat_td

    def _gains(self) -> Affine:
        """Gains and offsets and reconstructions by turns, until VE no longer rises; the best of all rounds."""
        x_td = some(self.sample.fit_td, _FIT).to(self.sae.device)
        affine, best, best_ve, waited = self.best, self.best, -math.inf, 0
        for _ in range(_ROUNDS):
            saved = self._saved(affine)
            if self.refits:
                self._set_threshold(saved, some(x_td, _SEARCH))
            x_hat_td = reconstruct(saved, x_td)
            ve, waited = _order(variance_explained(x_td, x_hat_td)), waited + 1
            if ve > best_ve:
                waited = waited if ve < best_ve + _RISE else 0
                best, best_ve = affine, ve
            if waited == _PATIENCE or ve == -math.inf:
                break
            affine = fit_gains(x_td, x_hat_td, affine)
        return best

    def _saved(self, affine: Affine) -> SAE[Any]:
        """The SAE with `affine` in its weights, as it would be saved."""
        self.sae.load_state_dict(self.state)
        fold(self.sae, affine)
        return inference_form(self.sae)

    def _measured(self, name: str, affine: Affine, *, refit: bool) -> Part:
        saved = self._saved(affine)
        if refit:
            self._set_threshold(saved, some(self.sample.fit_td, _FIT))
        return self._scored(name, saved)

    def _scored(self, name: str, saved: SAE[Any]) -> Part:
        held_td, n_active, x_hat = some(self.sample.held_td, _FIT), 0, []
        for reading in read(saved, held_td):
            n_active += len(reading.active.value_a)
            x_hat.append(reading.x_hat_td)
        threshold = float(saved.threshold.median()) if isinstance(saved, JumpReLUSAE) else None
        return Part(name, True, variance_explained(held_td, torch.cat(x_hat)), n_active / len(held_td), threshold)

    def _set_threshold(self, saved: SAE[Any], x_td: torch.Tensor) -> None:
        if isinstance(saved, JumpReLUSAE) and self.k is not None:
            set_threshold(saved, x_td, self.k)

    def _report(self, parts: list[Part]) -> CalibrationReport:
        x_td = float64(self.sample.fit_td)
        mean_d = x_td.mean(0)
        mean_norm, sigma = float(mean_d.norm()), float((x_td - mean_d).square().sum(1).mean().sqrt())
        log_gain_d = float64(self.best.gain_d).log()
        return CalibrationReport(
            tokens=len(self.sample.all_td),
            held_back=len(self.sample.held_td),
            outliers=self.sample.outliers,
            mean_norm=mean_norm,
            sigma=sigma,
            gamma=mean_norm / sigma,
            k=self.k if self.refits else None,
            scale=float(log_gain_d.mean().exp()),
            gain_spread=float(log_gain_d.std(correction=0)),
            gain_min=float(self.best.gain_d.min()),
            gain_max=float(self.best.gain_d.max()),
            offset_norm=float(self.best.offset_d.norm()) / sigma,
            parts=parts,
        )


def _order(ve: float | None) -> float:
    return -math.inf if ve is None else ve
