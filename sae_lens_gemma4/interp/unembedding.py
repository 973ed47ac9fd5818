"""What a latent's decoder row does to the logits by the direct path: through the modules between its hook and the
residual stream, the final norm's weight, and the unembedding.

A norm divides by a scale that depends on the token, which is left out (it is one factor for all logits), and multiplies
by a weight, which is not: without it the top tokens of a Gemma 4 latent are others altogether. sae-dashboard leaves it
out (its `to_resid_direction` is followed by `W_U` alone). `layer_scalar`s on the way are one factor as well.

Shapes: `f` latents, `d` the stream's width, `v` vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from sae_lens_gemma4.models.geometry import text_decoder
from sae_lens_gemma4.models.hook_names import canonical_name
from sae_lens_gemma4.models.interface import HookedModel
from sae_lens_gemma4.models.loading import is_ours

_ROWS = 2**15
"""Rows of the unembedding that are made float32 at a time."""
_MLP_NORMS = ("post_feedforward_layernorm_1?", "post_feedforward_layernorm")
_WAYS: dict[str, tuple[str, ...]] = {
    "hook_embed": (),
    "hook_resid_pre": (),
    "hook_resid_mid": (),
    "hook_resid_prescale": (),
    "hook_resid_post": (),
    "hook_attn_out": (),
    "hook_mlp_out": (),
    "hook_ple_out": (),
    "moe.hook_dense_out": ("post_feedforward_layernorm",),
    "moe.hook_experts_out": ("post_feedforward_layernorm",),
    "mlp.hook_out": _MLP_NORMS,
    "mlp.hook_post": ("mlp.down_proj", *_MLP_NORMS),
    "attn.hook_z": ("self_attn.o_proj", "post_attention_layernorm"),
}
"""From a hook to the residual stream: modules of a Gemma layer, those with a `?` where there are any."""


class Ends(NamedTuple):
    """What a model does between its last layer and its logits.

    Attributes:
        weight_vd: the unembedding's weight.
        norm: the final norm.
        gain: multiplication by the final norm's weight alone.
        unembed: from normed activations to logits before any soft cap.
        softcap: `c` of c·tanh(logits / c); None where the model has none.
        decoder: transformers' module that has the layers, where it is one.
    """

    weight_vd: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]
    gain: Callable[[torch.Tensor], torch.Tensor]
    unembed: Callable[[torch.Tensor], torch.Tensor]
    softcap: float | None
    decoder: Any

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """As transformers' Gemma models do it, in the logits' own dtype."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class Unembedding:
    """From decoder rows to logits, for one hook of one model. Made by `of`.

    Attributes:
        weight_vd: the unembedding.
    """

    def __init__(self, weight_vd: torch.Tensor, way: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self.weight_vd, self._way = weight_vd, way

    @staticmethod
    def of(model: HookedModel, sae: SAE[Any], hook_name: str) -> Unembedding | None:
        """None for a hook that does not write to the residual stream (scores, routers), or by a way that is not known
        here, and for a model whose final norm and unembedding are not where transformers and TransformerLens have them.
        """
        name = canonical_name(hook_name)
        ends = ends_of(model)
        if ends is None:
            return None
        weight_vd, gain, decoder = ends.weight_vd, ends.gain, ends.decoder
        if name == "ln_final.hook_out":
            return Unembedding(weight_vd, ())
        kind, layer = re.sub(r"^blocks\.\d+\.", "", name), re.match(r"blocks\.(\d+)\.", name)
        if kind not in _WAYS:
            return None
        if not _WAYS[kind] or layer is None:
            return Unembedding(weight_vd, [gain])
        block = None if decoder is None else decoder.layers[int(layer[1])]
        if not hasattr(block, "pre_feedforward_layernorm"):  # Gemma 2 to 4 alone have norms on both sides
            return None
        return Unembedding(weight_vd, [*_modules(block, _WAYS[kind], sae), gain])

    def logits(self, W_fd: torch.Tensor) -> torch.Tensor:
        """What each decoder row adds to the logits, up to one positive factor: float32 `[f, v]` on the CPU."""
        rows_fd = W_fd.detach().float().to(self.weight_vd.device)
        for step in self._way:
            rows_fd = step(rows_fd)
        return torch.cat(
            [(rows_fd @ part_vd.float().T).cpu() for part_vd in self.weight_vd.detach().split(_ROWS)], dim=1
        )


def ends_of(model: Any) -> Ends | None:
    """The ends of a model, or None where they are not where transformers and TransformerLens have them."""
    hf_model: Any = getattr(model, "original_model", None) or getattr(model, "model", None)
    if is_ours(model):
        decoder = text_decoder(hf_model)
        return _of_transformers(hf_model, decoder, decoder.norm, hf_model.lm_head)
    if hasattr(hf_model, "get_output_embeddings"):
        base = getattr(hf_model, hf_model.base_model_prefix, None)
        decoder = getattr(base, "language_model", base)
        norm = next((getattr(decoder, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(decoder, n)), None)
        unembedding = hf_model.get_output_embeddings()
        if norm is None or unembedding is None:
            return None
        return _of_transformers(hf_model, decoder if hasattr(decoder, "layers") else None, norm, unembedding)
    if hasattr(model, "W_U"):  # TransformerLens; a folded norm has no weight
        norm = getattr(model, "ln_final", None) or torch.nn.Identity()
        weight_d = getattr(norm, "w", None)
        softcap = getattr(model.cfg, "output_logits_soft_cap", 0.0)
        gain = torch.nn.Identity() if weight_d is None else (lambda x: x * weight_d.float())
        return Ends(model.W_U.T, norm, gain, model.unembed, softcap if softcap > 0 else None, None)
    return None


def _of_transformers(hf_model: Any, decoder: Any, norm: Any, unembedding: Any) -> Ends:
    softcap = getattr(hf_model.config.get_text_config(), "final_logit_softcapping", None)
    return Ends(unembedding.weight, norm, _gain(norm), unembedding, softcap, decoder)


def _gain(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multiply by a norm's weight, as the norm itself applies it (Gemma 3's is 1 + weight): read off at ±1, whose mean
    is 0 and whose mean square is 1."""
    weight: torch.Tensor = norm.weight
    sign_d = torch.ones(weight.shape[-1], device=weight.device, dtype=torch.float32)
    sign_d[1::2] = -1
    with torch.no_grad():
        x_d = sign_d.to(weight.dtype)
        gain_d = (norm(x_d).float() - norm(-x_d).float()) / 2 * sign_d
    return lambda rows_fd: rows_fd * gain_d.to(rows_fd.device)


def _modules(layer: Any, names: Sequence[str], sae: SAE[Any]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    way: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for name in names:
        try:
            module = layer.get_submodule(name.removesuffix("?"))
        except AttributeError:
            if name.endswith("?"):
                continue
            raise
        way.append(_projection(module, sae) if hasattr(module, "in_features") else _gain(module))
    return way


def _projection(module: Any, sae: SAE[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer; of an SAE that reads a single head, that head's columns of it."""
    head = sae.cfg.metadata.hook_head_index

    def project(rows_fd: torch.Tensor) -> torch.Tensor:
        weight_oi: torch.Tensor = module.weight.detach().float().to(rows_fd.device)
        if head is not None:
            start = head % (weight_oi.shape[1] // rows_fd.shape[1]) * rows_fd.shape[1]
            weight_oi = weight_oi[:, start : start + rows_fd.shape[1]]
        return rows_fd @ weight_oi.T

    return project
