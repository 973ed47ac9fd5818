"""dictionary_learning's form: `ae.pt` with `config.json` beside it.

BatchTopK files have the keys of its `nn.Linear`s, Matryoshka files those of its parameters. Both encode with a
running threshold: relu(encoder(x − b_dec)), kept where it exceeds `threshold`
(dictionary_learning/trainers/batch_top_k.py, `BatchTopKSAE.encode`); `AutoEncoderTopK` keeps the k largest instead.
Stock's `dictionary_learning_1` needs `buffer.ctx_len`, and calls every hook `hook_resid_post`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from sae_lens_gemma4.catalogue.formats.base import LINEAR, Checkpoint, Form, Weights, jumprelu, topk
from sae_lens_gemma4.errors import SAEError

_THRESHOLDED = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk"}
_KNOWN = (*_THRESHOLDED, "AutoEncoderTopK")


def convert(checkpoint: Checkpoint) -> Weights:
    trainer = checkpoint.section("trainer")
    linear = "encoder.weight" in checkpoint.tensors
    kind = str(trainer.get("dict_class") or _by_what_is_there(checkpoint, linear))
    if kind not in _KNOWN:
        raise SAEError(f"{checkpoint.where}: a {kind} of dictionary_learning is not read, only {', '.join(_KNOWN)}.")
    if linear:
        tensors = checkpoint.laid_out("encoder.weight", "decoder.weight", "encoder.bias", "b_dec", **LINEAR)
    else:
        tensors = checkpoint.laid_out("W_enc", "W_dec", "b_enc", "b_dec")
    k = checkpoint.k()
    thresholded = "threshold" in checkpoint.tensors
    threshold = checkpoint.scalar("threshold")
    sizes = checkpoint.take("group_sizes")
    if kind == "AutoEncoderTopK":
        weights = topk(checkpoint, tensors, k, True if trainer else None)
    else:
        if not thresholded:
            raise SAEError(f"{checkpoint.where}: a {kind} encodes with a threshold, and the file has none.")
        weights = jumprelu(tensors, threshold, True)
        details: dict[str, Any] = {"k": k, "rescale_acts_by_decoder_norm": False}
        if sizes is not None and not sizes.is_meta:
            details["matryoshka_widths"] = list(accumulate(sizes.tolist()))
        weights.metadata.update(training_architecture=_THRESHOLDED[kind], training_architecture_details=details)
    if trainer.get("lm_name"):
        weights.metadata["model_name"] = trainer["lm_name"]
    if str(trainer.get("submodule_name", "")).startswith("resid_post") and "layer" in trainer:
        weights.metadata["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    if context_size := checkpoint.section("buffer").get("ctx_len"):
        weights.metadata["context_size"] = context_size
    return weights


def _by_what_is_there(checkpoint: Checkpoint, linear: bool) -> str:
    """The class of a file whose config does not name it."""
    if not linear:
        return "MatryoshkaBatchTopKSAE"
    architecture = checkpoint.facts.get("architecture")
    if "threshold" not in checkpoint.tensors or architecture == "topk":
        return "AutoEncoderTopK"
    if architecture is None:
        raise SAEError(
            f"{checkpoint.where}: no config says whether it is a BatchTopKSAE of dictionary_learning, which encodes "
            "with its threshold, or an AutoEncoderTopK, which keeps the k largest. Pass "
            "converter=sae_lens_gemma4.converter(architecture='batchtopk'), or 'topk'."
        )
    return "BatchTopKSAE"


FORM = Form(
    name="dictionary_learning",
    title="dictionary_learning BatchTopK or TopK: `ae.pt`, `config.json`",
    keys=("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
    optional=("k", "threshold"),
    convert=convert,
)
MATRYOSHKA = Form(
    name="dictionary_learning_matryoshka",
    title="dictionary_learning Matryoshka BatchTopK: `ae.pt`, `config.json`",
    keys=("W_enc", "b_enc", "W_dec", "b_dec", "group_sizes", "threshold"),
    optional=("k",),
    convert=convert,
)
