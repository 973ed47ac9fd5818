"""sae_lens's own form: `cfg.json` and `sae_weights.safetensors`, read as sae_lens reads them.

The config is whatever sae_lens wrote, of any architecture it knows. Only what a foreign file may get wrong is checked
here; the weights are those of the file, unchanged.
"""

from __future__ import annotations

import copy

from sae_lens import __version__
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY

from sae_lens_gemma4.catalogue.formats.base import Checkpoint, Form, Weights
from sae_lens_gemma4.errors import SAEError, check_name


def convert(checkpoint: Checkpoint) -> Weights:
    if "d_in" not in checkpoint.stated or "d_sae" not in checkpoint.stated:
        raise SAEError(f"{checkpoint.where}: its config states no d_in and d_sae, as sae_lens's own would.")
    if checkpoint.tensors.pop("scaling_factor", None) is not None:
        raise SAEError(f"{checkpoint.where}: it has a scaling_factor, of sae_lens before 6; convert it with sae_lens.")
    check_name(
        f"architecture in the config of {checkpoint.where}",
        str(checkpoint.stated.get("architecture", "standard")),
        SAE_CLASS_REGISTRY,
        "A TrainingSAE's folder is not one for inference: save it with save_inference_model.",
    )
    cfg = handle_config_defaulting(copy.deepcopy(dict(checkpoint.stated)))
    metadata = dict(cfg.pop("metadata", None) or {})
    metadata.setdefault("sae_lens_version", __version__)
    architecture = cfg.pop("architecture")
    settings = {k: v for k, v in cfg.items() if k not in ("dtype", "device", "d_in", "d_sae")}
    return Weights(
        architecture,
        dict(checkpoint.tensors),
        cfg.get("apply_b_dec_to_input", True),
        checkpoint.k() if "k" in settings else None,
        settings,
        metadata,
    )


FORM = Form(
    name="sae_lens",
    title="sae_lens's own: `cfg.json`, `sae_weights.safetensors`",
    keys=("W_enc", "W_dec", "b_dec"),
    optional=("b_enc", "threshold", "r_mag", "b_mag", "b_gate", "W_skip", "b_dec_out", "scaling_factor"),
    convert=convert,
    marks=lambda checkpoint: "d_sae" in checkpoint.stated and "architecture" in checkpoint.stated,
)
