"""JumpReLU SAEs that keep the logarithm of their thresholds: `sae.pt` and `meta.json`.

z = pre · 1[pre > exp(log_threshold)] with pre = W_enc (x − b_dec) + b_enc, as the trainer's README has it
(github.com/JuiceB0xC0de/event-aware-SAE-trainer). The example script of the same repository computes
relu(pre − θ), which that README says it is not.
"""

from __future__ import annotations

from sae_lens_gemma4.catalogue.formats.base import LINEAR, Checkpoint, Form, Weights, jumprelu


def convert(checkpoint: Checkpoint) -> Weights:
    tensors = checkpoint.laid_out("W_enc.weight", "W_dec.weight", "W_enc.bias", "b_dec", **LINEAR)
    threshold = checkpoint.need("log_threshold").exp()
    weights = jumprelu(tensors, threshold, True)
    weights.metadata["training_architecture"] = "jumprelu"
    if isinstance(model := checkpoint.stated.get("model_id"), str):
        weights.metadata["model_name"] = model
    if isinstance(layer := checkpoint.stated.get("layer"), int):
        weights.metadata["hook_name"] = f"blocks.{layer}.hook_resid_post"
    if isinstance(metrics := checkpoint.stated.get("final_metrics"), dict):  # ev, mean_l0, dead_pct of this layer
        weights.metadata["final_metrics"] = metrics
    return weights


FORM = Form(
    name="log_threshold",
    title="JumpReLU with `log_threshold`: `sae.pt`, `meta.json`",
    keys=("W_enc.weight", "W_enc.bias", "W_dec.weight", "b_dec", "log_threshold"),
    convert=convert,
)
