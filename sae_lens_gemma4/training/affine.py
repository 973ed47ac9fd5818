"""A change of an SAE's input that its weights can absorb: each channel stretched by a gain and moved by an offset.

If tuned activations are x = g ∘ z + m, with z such as the SAE was trained on, then the SAE for x is the one for z with
g and m in its weights, and nothing has to be learned again. `fold` puts them there; `fit_gains` finds them.

Shapes: `t` tokens, `d` channels, `f` latents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sae_lens import TrainingSAE

from sae_lens_gemma4.evaluation.reading import float64

_STEP = 4.0  # the most by which a gain changes in one round


class Affine(NamedTuple):
    """x = gain_d ∘ z + offset_d, gains positive; float32 or more."""

    gain_d: torch.Tensor
    offset_d: torch.Tensor

    @staticmethod
    def of(scale: float, offset_d: torch.Tensor) -> Affine:
        return Affine(torch.full_like(offset_d, scale), offset_d)


@torch.no_grad()
def fold(sae: TrainingSAE[Any], affine: Affine) -> None:
    """Let `sae` do for x what it did for z: F'(x) = g ∘ F((x − m) / g) + m, its weights changed in place.

    Rows of the decoder keep their norms, on which a learning rate was chosen, and the encoder takes them on. Where each
    latent has a unit of its own (JumpReLU, or `rescale_acts_by_decoder_norm`) each row keeps its norm; else all share
    one factor, so that the top k are the same. With rescaling the top k are chosen by what latents write into x, not
    into z: under one scale that is the same, under gains it is not, and F' is the function above for the same choice.
    """
    parameters, buffers = dict(sae.named_parameters()), dict(sae.named_buffers())
    wide = torch.promote_types(parameters["W_dec"].dtype, torch.float32)
    W_enc, b_enc, W_dec, b_dec = (parameters[name].to(wide) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    gain_d, offset_d = (v.to(W_dec) for v in affine)
    norm_f = W_dec.norm(dim=1)
    unit_f = torch.where(norm_f > 0, (W_dec * gain_d).norm(dim=1) / norm_f, 1.0)
    middle = unit_f.median()
    if "threshold" not in parameters and not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        unit_f = middle.expand_as(unit_f)
    if not sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc - (offset_d / gain_d) @ W_enc
    parameters["W_enc"].copy_(W_enc / gain_d[:, None] * unit_f)
    parameters["b_enc"].copy_(b_enc * unit_f)
    parameters["W_dec"].copy_(W_dec * gain_d / unit_f[:, None])
    parameters["b_dec"].copy_(gain_d * b_dec + offset_d)
    if "threshold" in parameters:
        parameters["threshold"].mul_(unit_f)
    if "topk_threshold" in buffers:
        buffers["topk_threshold"].mul_(middle)


def fit_gains(x_td: torch.Tensor, x_hat_td: torch.Tensor, affine: Affine) -> Affine:
    """The gains and offsets with which the reconstructions fit better: least squares of x on x̂, channel by channel.

    x̂ was made with `affine`; an SAE that reconstructs z without bias is left as it is by the right gains.
    """
    x, x_hat = float64(x_td), float64(x_hat_td)
    mean_d, mean_hat_d = x.mean(0), x_hat.mean(0)
    x, x_hat = x - mean_d, x_hat - mean_hat_d
    slope_d = (x * x_hat).sum(0) / x_hat.square().sum(0)
    slope_d = slope_d.nan_to_num(1.0, _STEP, 1.0).clamp(1 / _STEP, _STEP)
    offset_d = mean_d - slope_d * mean_hat_d
    gain_d, before_d = (v.to(offset_d.device, torch.float64) for v in affine)
    new = Affine(slope_d * gain_d, slope_d * before_d + offset_d)
    return Affine(*(v.to(x_td) for v in new))
