"""sparsify's form: `sae.safetensors` and `cfg.json` in a folder named after the hooked module.

Both matrices are [d_sae, d_in] (sparsify/sparse_coder.py, `SparseCoder.__init__`); b_dec is subtracted from the input
unless it is a transcoder (`encode`). Stock's `sparsify` loader transposes W_dec, reads `num_latents: 0` as no latents,
and takes `normalize_decoder` for a reason not to subtract b_dec.
"""

from __future__ import annotations

from sae_lens_gemma4.catalogue.formats.base import Checkpoint, Form, Weights, topk
from sae_lens_gemma4.errors import SAEError
from sae_lens_gemma4.models.hook_names import canonical_name


def convert(checkpoint: Checkpoint) -> Weights:
    stated = checkpoint.stated
    if stated.get("transcode") or stated.get("skip_connection"):
        raise SAEError(f"{checkpoint.where}: a transcoder or skip connection of sparsify is not an SAE.")
    tensors = checkpoint.laid_out("encoder.weight", "W_dec", "encoder.bias", "b_dec", encoder="d_sae d_in")
    d_in, d_sae = tensors["W_enc"].shape
    if not stated.get("num_latents") and stated.get("expansion_factor", d_sae / d_in) != d_sae / d_in:
        raise SAEError(
            f"{checkpoint.where}: the config states {stated['expansion_factor']} times as many latents as inputs; "
            f"the weights have {d_sae} and {d_in}."
        )
    weights = topk(checkpoint, tensors, checkpoint.k(), True)
    module = checkpoint.folder.rstrip("/").rsplit("/", 1)[-1]
    if "layers." in module:  # sparsify names modules of the base model, below `model.`
        weights.metadata["hook_name"] = canonical_name(f"model.{module}")
    return weights


FORM = Form(
    name="sparsify",
    title="sparsify: `sae.safetensors`, `cfg.json`",
    keys=("encoder.weight", "encoder.bias", "W_dec", "b_dec"),
    convert=convert,
)
