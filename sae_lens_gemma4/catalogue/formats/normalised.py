"""SAEs on standardised activations, whose mean and scale lie in the same file: folded into the weights, exactly.

The author's SAE reads u = (x − mean) / scale and subtracts its decoder bias b; its output is scaled back. With
b_dec = mean + scale·b, W_enc / scale and W_dec · scale, the SAE of sae_lens computes the same latents and the same
reconstruction from x itself: (x − b_dec) W_enc / scale = (u − b) W_enc. Thresholds are in units of the latents, which
do not change.
"""

from __future__ import annotations

import torch

from sae_lens_gemma4.catalogue.formats.base import LINEAR, Checkpoint, Form, Weights, jumprelu
from sae_lens_gemma4.errors import SAEError


def convert(checkpoint: Checkpoint) -> Weights:
    tensors = checkpoint.laid_out(
        "sae.encoder.weight", "sae.decoder.weight", "sae.encoder.bias", "sae.decoder_bias", **LINEAR
    )
    mean = checkpoint.vector("normalization.activation_mean")
    scale = checkpoint.need("normalization.activation_scale").reshape(-1)
    bias = tensors["b_dec"]
    d_in = bias.shape[0]
    if mean.shape[0] != d_in or scale.shape[0] not in (1, d_in):
        raise SAEError(f"{checkpoint.where}: mean {list(mean.shape)} and scale {list(scale.shape)} do not fit.")
    if not scale.is_meta and not bool((scale > 0).all()):
        raise SAEError(f"{checkpoint.where}: normalization.activation_scale is not positive.")
    tensors["W_enc"] = _copy(tensors["W_enc"]).div_(scale[:, None])
    tensors["W_dec"] = _copy(tensors["W_dec"]).mul_(scale)
    tensors["b_dec"] = (mean.double() + scale.double() * bias.double()).to(tensors["W_enc"].dtype)
    weights = jumprelu(tensors, checkpoint.scalar("sae.inference_threshold"), True)
    weights.metadata["training_architecture"] = "batchtopk"
    if (k := checkpoint.k()) is not None:
        weights.metadata["training_architecture_details"] = {"k": k, "rescale_acts_by_decoder_norm": False}
    return weights


def _copy(matrix: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return torch.empty(matrix.shape, dtype=wide, device=matrix.device).copy_(matrix)


FORM = Form(
    name="normalised",
    title="BatchTopK with its normalisation: `sae_weights.safetensors`, `sae_config.json`",
    keys=(
        "sae.encoder.weight",
        "sae.encoder.bias",
        "sae.decoder.weight",
        "sae.decoder_bias",
        "sae.inference_threshold",
        "normalization.activation_mean",
        "normalization.activation_scale",
    ),
    convert=convert,
)
