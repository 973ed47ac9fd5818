"""Cached activations under all of their names, and decompositions of the residual stream that add up.

TransformerLens's `ActivationCache.decompose_resid` (ActivationCache.py:644) knows embeddings, attention and MLPs. In
Gemma 4 the per-layer embedding adds as well, and every layer multiplies what it passes on by its `layer_scalar`:
its parts miss the residual stream by far more than they explain. `logit_attrs` divides by a cached norm and
forgets the norm's weight, which nothing folds into the unembedding here. Both are put right below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.utilities.slice import Slice

from sae_lens_gemma4.errors import ConfigError, ModelError, UnknownNameError
from sae_lens_gemma4.models.geometry import text_decoder
from sae_lens_gemma4.models.hook_names import canonical_name

_GRAD = "_grad"


class ByEitherName(dict[str, Any]):
    """A dict with canonical keys that is read with any name of a hook; of a gradient, with `_grad` at the end."""

    @staticmethod
    def _key(name: str) -> str:
        return canonical_name(name.removesuffix(_GRAD)) + (_GRAD if name.endswith(_GRAD) else "")

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        for name, value in (values or {}).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(self._key(name), value)

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(self._key(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(self._key(name))

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(self._key(name), default)

    def pop(self, name: str, *default: Any) -> Any:
        return super().pop(self._key(name), *default)


class Gemma4Cache(ActivationCache):
    """An `ActivationCache` that is read with any name of a hook, and whose decompositions are Gemma 4's."""

    def __init__(self, cache_dict: Mapping[str, torch.Tensor], model: Any, has_batch_dim: bool = True) -> None:
        super().__init__(ByEitherName(cache_dict), model, has_batch_dim)

    def to(self, device: str | torch.device) -> Gemma4Cache:
        super().to(device)
        self.cache_dict = ByEitherName(self.cache_dict)
        return self

    def __contains__(self, name: object) -> bool:
        return name in self.cache_dict

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> Gemma4Cache:
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return Gemma4Cache(sliced.cache_dict, self.model, sliced.has_batch_dim)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Per-head and per-neuron parts: a norm stands between them and the stream, and they would not add up."""
        raise ModelError("Gemma 4 normalises what heads and neurons put out together: see decompose_residual.")

    compute_head_results = stack_head_results = _refuse
    get_neuron_results = stack_neuron_results = get_full_resid_decomposition = _refuse

    def logit_attrs(  # type: ignore[override]
        self,
        residual_stack: torch.Tensor,
        tokens: int | torch.Tensor,
        incorrect_tokens: int | torch.Tensor | None = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> torch.Tensor:
        """As `ActivationCache.logit_attrs`, by ids of tokens, before the soft cap."""
        settings = {"pos_slice": pos_slice, "batch_slice": batch_slice, "has_batch_dim": has_batch_dim}
        scaled = self.apply_ln_to_stack(residual_stack, **settings)
        return (scaled * _direction(self.model, tokens, incorrect_tokens)).sum(dim=-1)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """As `ActivationCache.decompose_resid`, with parts that sum to the residual stream (`decompose_residual`).

        The per-layer embedding's parts, `"3_ple_out"`, are among them unless `mode` is "mlp" or "attn".
        """
        last = _n_layers(self.model)
        layer = last if layer is None or layer == -1 else layer
        if not 0 <= layer <= last:
            raise ConfigError(f"layer must lie in 0..{last}, not {layer}.")
        parts = _parts(self, layer, mlp_input)
        wanted = {"all": ("attn_out", "mlp_out", "ple_out"), "mlp": ("mlp_out",), "attn": ("attn_out",)}[mode]
        labels = [name for name in parts if name.endswith(wanted) or (incl_embeds and name == "embed")]
        pos_slice = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        stack = torch.stack([pos_slice.apply(parts[label], dim=-2) for label in labels])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input=mlp_input, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def apply_ln_to_stack(
        self,
        residual_stack: torch.Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> torch.Tensor:
        """As `ActivationCache.apply_ln_to_stack`, with the norm's weight, and its scale from the cached stream."""
        last = _n_layers(self.model)
        layer = last if layer is None or layer == -1 else layer
        if recompute_ln:
            args = (residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln)
            return super().apply_ln_to_stack(*args)
        decoder = text_decoder(_hf_model(self.model))
        if layer == last:
            stream, norm = _cached(self, f"blocks.{last - 1}.hook_resid_post"), decoder.norm
        else:
            stream = _cached(self, f"blocks.{layer}.hook_resid_{'mid' if mlp_input else 'pre'}")
            block = decoder.layers[layer]
            norm = block.pre_feedforward_layernorm if mlp_input else block.input_layernorm
        pos_slice, batch_slice = (s if isinstance(s, Slice) else Slice(s) for s in (pos_slice, batch_slice))
        stream = pos_slice.apply(stream, dim=-2)
        if self.has_batch_dim:
            stream = batch_slice.apply(stream, dim=0)
        if has_batch_dim:
            residual_stack = batch_slice.apply(residual_stack, dim=1)
        return residual_stack * _norm_factor(norm, stream)


def decompose_residual(cache: ActivationCache, layer: int) -> dict[str, torch.Tensor]:
    """What each part of the model has put into the residual stream that leaves a layer.

    The labels are TransformerLens's: "embed", "0_attn_out", "0_mlp_out", and "0_ple_out" for the per-layer
    embedding. Each part `[batch, pos, d_model]` is multiplied by every `layer_scalar` that it has passed, and their
    sum is `blocks.{layer}.hook_resid_post`, unless a hook or an SAE wrote into the stream itself.

    Args:
        cache: from `run_with_cache` of `Gemma4Bridge` or `Gemma4ProxyLM`, with `hook_embed` and every layer's
            `hook_attn_out`, `hook_mlp_out` and, where there is one, `hook_ple_out`, up to `layer`.

    Raises:
        ConfigError: no such layer. UnknownNameError: something needed was not cached.
    """
    n_layers = _n_layers(cache.model)
    if not -n_layers <= layer < n_layers:
        raise ConfigError(f"The model has layers 0..{n_layers - 1}, not {layer}.")
    return _parts(cache, layer % n_layers + 1, mlp_input=False)


def logit_attribution(
    cache: ActivationCache, tokens: int | torch.Tensor, incorrect_tokens: int | torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """How much each part of `decompose_residual` adds to a token's logit, `[batch, pos]` each.

    The final norm's scale is held at the run's own, so the parts sum to the logit before Gemma 4's soft cap
    (`hook_unembed`), exactly up to rounding. The soft cap, `30·tanh(logit/30)`, is not linear and is left out.

    Args:
        cache: as `decompose_residual` needs it, for the last layer; its `hook_resid_post` as well.
        tokens: one token's id, or ids `[batch]` or `[batch, pos]`.
        incorrect_tokens: attribute the difference to these instead.
    """
    hf_model = _hf_model(cache.model)
    last = _n_layers(cache.model) - 1
    parts = decompose_residual(cache, last)
    direction_d = _direction(cache.model, tokens, incorrect_tokens)
    stream_bpd = _cached(cache, f"blocks.{last}.hook_resid_post")
    scaled = direction_d * _norm_factor(text_decoder(hf_model).norm, stream_bpd)
    return {name: (part * scaled).sum(dim=-1) for name, part in parts.items()}


def _direction(model: Any, tokens: int | torch.Tensor, other: int | torch.Tensor | None) -> torch.Tensor:
    """Rows of the unembedding, `[d_model]`, `[batch, 1, d_model]` or `[batch, pos, d_model]`; less those of `other`."""
    weight_vd: torch.Tensor = _hf_model(model).lm_head.weight
    if isinstance(tokens, str):
        raise ConfigError(f"Tokens are named by their ids, not by text: {tokens!r}.")
    ids = torch.as_tensor(tokens, device=weight_vd.device)
    rows = weight_vd[ids[:, None] if ids.ndim == 1 else ids]
    return rows if other is None else rows - _direction(model, other, None)


def _parts(cache: ActivationCache, layer: int, mlp_input: bool) -> dict[str, torch.Tensor]:
    """Parts of the stream that enters layer `layer`; of its `resid_mid` if `mlp_input`."""
    parts = {"embed": _cached(cache, "hook_embed")}
    layers: Sequence[Any] = text_decoder(_hf_model(cache.model)).layers
    for n, block in enumerate(layers[:layer]):
        parts[f"{n}_attn_out"] = _cached(cache, f"blocks.{n}.hook_attn_out")
        parts[f"{n}_mlp_out"] = _cached(cache, f"blocks.{n}.hook_mlp_out")
        if getattr(block, "hidden_size_per_layer_input", 0):
            parts[f"{n}_ple_out"] = _cached(cache, f"blocks.{n}.hook_ple_out")
        parts = {name: part * block.layer_scalar for name, part in parts.items()}
    if mlp_input:
        parts[f"{layer}_attn_out"] = _cached(cache, f"blocks.{layer}.hook_attn_out")
    return parts


def _cached(cache: ActivationCache, name: str) -> torch.Tensor:
    if name not in cache.cache_dict:
        raise UnknownNameError("activation", name, cache.cache_dict, "It was not cached: give run_with_cache its name.")
    value: torch.Tensor = cache.cache_dict[name]
    return value


def _norm_factor(norm: Any, stream: torch.Tensor) -> torch.Tensor:
    """What a Gemma4RMSNorm multiplies this stream by."""
    scale: torch.Tensor = (stream.float().pow(2).mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    weight: torch.Tensor = norm.weight
    return (scale * weight.float()).to(stream.dtype)


def _hf_model(model: Any) -> Any:
    return getattr(model, "original_model", None) or model.model


def _n_layers(model: Any) -> int:
    return len(text_decoder(_hf_model(model)).layers)
