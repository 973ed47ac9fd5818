"""The threshold with which a given number of latents is active.

A batch top-k SAE is saved with one threshold for all latents, and how many are active then depends on how activations
are scaled. Stock finds it as a moving average over hundreds of steps; on a sample it is one order statistic.

Shapes: `t` tokens, `d` channels, `f` latents, `a` positive values of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

_CHUNK = 2**23
"""Latents at once: few, so that most of what comes later is soon known to be too small."""


@torch.no_grad()
def set_threshold(saved: JumpReLUSAE, x_td: torch.Tensor, k: float) -> None:
    """Set the thresholds so that just k·t latents are active on `x_td`, or all that are positive if these are fewer.

    Thresholds that differ keep their proportions. Equal values at the edge, as in bfloat16, are active or not together.
    Memory: twice k·t numbers, and one chunk of latents.
    """
    wanted = int(k * len(x_td))
    even = bool((saved.threshold == saved.threshold[0]).all())
    unit_f = torch.ones_like(saved.threshold) if even else saved.threshold.clone()
    top = torch.empty(0, dtype=torch.float64, device=saved.threshold.device)
    floor = 0.0
    for chunk_td in x_td.split(max(1, _CHUNK // saved.cfg.d_sae)):
        value_tf = saved.process_sae_in(chunk_td.to(saved.device)) @ saved.W_enc + saved.b_enc
        if not even:
            value_tf = value_tf / unit_f
        top = torch.cat([top, value_tf[value_tf > floor].double()])
        if len(top) > 2 * wanted:
            top = top.topk(wanted + 1).values
            floor = float(top[-1])
    factor = 0.0
    if len(top) > wanted:
        factor = float(top.topk(wanted + 1).values[-2:].mean())
    saved.threshold.copy_(unit_f.double() * factor)


@torch.no_grad()
def take_threshold(sae: TrainingSAE[Any], saved: SAE[Any]) -> None:
    """Give a training SAE the threshold of its saved form, where it has one."""
    own = {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
    theirs = dict(saved.named_parameters()).get("threshold")
    if theirs is not None and "threshold" in own:
        own["threshold"].copy_(theirs)
    elif theirs is not None:
        own["topk_threshold"].copy_(theirs[0])


def target_l0(sae: TrainingSAE[Any]) -> float | None:
    """The mean L0 that a threshold of this SAE is for; None if it has none, or nobody says."""
    name = "k" if hasattr(sae, "topk_threshold") else "target_l0"
    value = getattr(sae.cfg, name, None)
    return None if value is None else float(value)
