"""Dead latents begin again, at tokens that the SAE reconstructs badly.

sae_lens has the words for it in its config and no code. What others do agrees in its outline (Bricken et al. 2023,
"Towards Monosemanticity", and dictionary_learning): tokens drawn by their error, an encoder at 0.2 of the alive norm,
no bias, Adam's moments forgotten. Two things differ here. Theirs take the direction of the activation; here it is that
of its residual, which is what the auxiliary loss asks of dead latents too (2406.04093, A.2): where activations share a
large mean, as Gemma's do, the former makes all new latents alike. And norms are compared where the top-k compares
them: at full norm new latents flood a batch's selection, and the public run that did so lost .08 of its variance
explained.

Shapes: `n` tokens, `d` d_in, `f` latents, `r` those that are resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens import TrainingSAE

from sae_lens_gemma4.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """When dead latents are replaced, and how large the new ones are.

    Attributes:
        every_steps: steps between events; None for the end of each epoch of the training text.
        share: of the alive latents' encoder norm.
        of: which norm of theirs.
        cap: most latents an event; None for all that are dead.
    """

    every_steps: int | None = None
    share: float = 0.2
    of: Literal["median", "mean"] = "median"
    cap: int | None = None

    def __post_init__(self) -> None:
        for name in ("every_steps", "cap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"resampling.{name} must be at least 1, not {value}.")
        if not self.share > 0:
            raise ConfigError(f"resampling.share must be positive, not {self.share}.")


@dataclass(frozen=True)
class Resampled:
    """What an event did.

    Attributes:
        latents: which latents are new, ascending, on the SAE's device `[r]`.
        dead: how many were dead.
        norm: the new latents' encoder norm where activations are compared; None without any.
    """

    latents: torch.Tensor
    dead: int
    norm: float | None


@torch.no_grad()
def resample(
    sae: TrainingSAE[Any],
    optimizer: torch.optim.Optimizer,
    x_nd: torch.Tensor,
    dead_f: torch.Tensor,
    *,
    share: float,
    of: Literal["median", "mean"],
    cap: int | None,
    generator: torch.Generator,
) -> Resampled:
    """Replace dead latents in place; every one gets a token of its own.

    A new latent reads and writes along its token's residual, with the alive latents' decoder norm and `share` of their
    encoder norm, bias 0, and no moments in the optimizer. With `rescale_acts_by_decoder_norm` an encoder's norm counts
    times its decoder's. A JumpReLU threshold is that share of the alive ones. Without alive latents, all count as such.
    There are never more new latents than tokens with an error, nor than `cap`; which of the dead is drawn.

    Args:
        x_nd: activations on the SAE's device. Each is drawn with probability in proportion to its squared error; those
            without a finite one never are.
        dead_f: boolean mask.
        generator: on the CPU, for the same draws on every device.
    """
    residual_nd = (x_nd - sae.decode(sae.encode(x_nd))).to(torch.promote_types(x_nd.dtype, torch.float32))
    error_n = torch.nan_to_num(residual_nd.square().sum(dim=1), nan=0, posinf=0).double().cpu()
    all_dead = dead_f.nonzero().flatten()
    n_dead = len(all_dead)
    r = min(n_dead, int((error_n > 0).sum()), n_dead if cap is None else cap)
    if r == 0:
        return Resampled(all_dead[:0], n_dead, None)
    order = torch.randperm(n_dead, generator=generator)[:r].to(all_dead.device)
    latents = all_dead[order].sort().values
    tokens = torch.multinomial(error_n, r, replacement=False, generator=generator).to(residual_nd.device)
    direction_rd = torch.nn.functional.normalize(residual_nd[tokens], dim=1)

    alive_f = ~dead_f if n_dead < len(dead_f) else dead_f
    rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    enc_f, dec_f = sae.W_enc.norm(dim=0), sae.W_dec.norm(dim=1)
    norm = share * _typical((enc_f * dec_f if rescaled else enc_f)[alive_f], of)
    dec_norm = _typical(dec_f[alive_f], of)
    sae.W_dec[latents] = (direction_rd * dec_norm).to(sae.W_dec.dtype)
    sae.W_enc[:, latents] = (direction_rd.T * norm / (dec_norm if rescaled else 1)).to(sae.W_enc.dtype)
    for name, parameter in sae.named_parameters():
        if name == "b_enc":
            parameter[latents] = 0
        elif name == "threshold":
            parameter[latents] = share * _typical(parameter[alive_f], of)
        if name != "b_dec":
            _forget(optimizer, parameter, (slice(None), latents) if name == "W_enc" else (latents,))
    return Resampled(latents, n_dead, float(norm))


def _typical(values: torch.Tensor, of: str) -> torch.Tensor:
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.quantile(0.5) if of == "median" else values.mean()


def _forget(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, where: tuple[Any, ...]) -> None:
    """Adam's moments of a part of a parameter back to 0; its count of steps is the whole parameter's, and stays."""
    for moment, value in optimizer.state.get(parameter, {}).items():
        if moment != "step":
            value[where] = 0
