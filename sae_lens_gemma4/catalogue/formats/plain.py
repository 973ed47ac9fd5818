"""A dict of W_enc, W_dec, b_enc and b_dec, with k or a threshold beside them: what hand-written trainers save.

With k it is a TopK SAE, with a threshold a JumpReLU SAE, unless it is stated that it is TopK all the same. Whether
b_dec is subtracted from the input the weights do not say; a config, the catalogue or the caller does.
"""

from __future__ import annotations

import torch

from sae_lens_gemma4.catalogue.formats.base import Checkpoint, Form, Weights, jumprelu, topk
from sae_lens_gemma4.errors import SAEError

_REVERSED = {"d_in d_sae": "d_sae d_in", "d_sae d_in": "d_in d_sae"}


def matrices(checkpoint: Checkpoint, layout: str | None) -> dict[str, torch.Tensor]:
    """The four tensors laid out; `layout` is W_enc's where it is square, and W_dec's is the other."""
    shape = checkpoint.tensors["W_enc"].shape if "W_enc" in checkpoint.tensors else ()
    if layout is None and len(shape) == 2 and shape[0] == shape[1]:
        raise SAEError(
            f"{checkpoint.where}: W_enc is square, so its shape does not tell how it lies. Pass "
            "converter=sae_lens_gemma4.converter(encoder='d_in d_sae'), or 'd_sae d_in' as nn.Linear has it."
        )
    layout = layout or "d_in d_sae"
    return checkpoint.laid_out("W_enc", "W_dec", "b_enc", "b_dec", encoder=layout, decoder=_REVERSED[layout])


def convert(checkpoint: Checkpoint) -> Weights:
    tensors = matrices(checkpoint, checkpoint.facts.get("encoder"))
    threshold, k = checkpoint.take("threshold"), checkpoint.k()
    subtracted = checkpoint.stated.get("apply_b_dec_to_input")
    subtracted = subtracted if isinstance(subtracted, bool) else None
    if threshold is None or checkpoint.facts.get("architecture") == "topk":
        return topk(checkpoint, tensors, k, subtracted)
    if threshold.numel() == 1:
        return jumprelu(tensors, None if threshold.is_meta else float(threshold), subtracted)
    return jumprelu(tensors, threshold, subtracted)


FORM = Form(
    name="plain",
    title="a dict of `W_enc`, `W_dec`, `b_enc`, `b_dec` with `k` or `threshold`: `.pt` or `.safetensors`",
    keys=("W_enc", "W_dec", "b_enc", "b_dec"),
    optional=("k", "threshold"),
    convert=convert,
)
