"""What each layer of a Gemma 4 model is, read from its config alone.

Layers of one model differ (sliding or full attention, own or another layer's keys and values, head sizes), and
transformers changed where it keeps that. Up to 5.14, `global_head_dim` and `num_global_key_value_heads` are
attributes of the text config, which the attention reads (5.14 models/gemma4/modeling_gemma4.py:1194); since 5.15
they are entries of `per_layer_config`, and reading `config.head_dim` raises (integrations/heterogeneity/
configuration_utils.py, `AmbiguousGlobalPerLayerAttributeError`). 5.14 has a `per_layer_config` too, but Gemma 4
does not use it yet: it is the attribute `global_head_dim` that tells which form a config has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sae_lens_gemma4.errors import ModelError

GEMMA4_MODEL_TYPES = frozenset({"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"})
_ATTENTION: dict[str, Literal["sliding", "full"]] = {"sliding_attention": "sliding", "full_attention": "full"}


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer. Sizes are counts of dimensions, heads or experts."""

    index: int
    attention: Literal["sliding", "full"]
    head_dim: int
    n_heads: int
    n_kv_heads: int
    kv_source: int
    """The layer whose keys and values it attends with; its own index where it computes them itself."""
    has_ple: bool
    """Whether the per-layer embedding is added."""
    is_moe: bool
    """Whether experts run beside the dense MLP."""
    n_experts: int
    """0 without experts, and so is `top_k`."""
    top_k: int
    k_eq_v: bool
    """Whether values are made from the key projection (there is no `v_proj`)."""
    d_mlp: int
    """Width of the dense MLP."""


@dataclass(frozen=True)
class Geometry:
    """A Gemma 4 decoder: `layers[i].index == i`."""

    n_layers: int
    d_model: int
    layers: tuple[LayerGeometry, ...]


def is_gemma4(config: Any) -> bool:
    """Whether this is the config of a Gemma 4 language model, multimodal or text-only. Assistants are not."""
    return getattr(config, "model_type", None) in GEMMA4_MODEL_TYPES


def text_decoder(model: Any) -> Any:
    """The text decoder in a transformers model of the family: what has `embed_tokens`, `layers` and `norm`."""
    return getattr(model.model, "language_model", model.model)


def gemma4_geometry(hf_config: Any) -> Geometry:
    """Read the geometry of a Gemma 4 model from its `transformers` config, composite or text-only.

    Raises:
        ModelError: the config is not Gemma 4's, or its KV-shared layers have no layer to share with.
    """
    if not is_gemma4(hf_config):
        found = f"model_type {getattr(hf_config, 'model_type', None)!r} ({type(hf_config).__name__})"
        raise ModelError(f"This is not Gemma 4: {found}. Expected one of {', '.join(sorted(GEMMA4_MODEL_TYPES))}.")
    text = hf_config.get_text_config()
    n_layers: int = text.num_hidden_layers
    return Geometry(n_layers, text.hidden_size, tuple(_layer(text, i) for i in range(n_layers)))


def _layer(text: Any, index: int) -> LayerGeometry:
    is_full = text.layer_types[index] == "full_attention"
    k_eq_v = bool(text.attention_k_eq_v) and is_full
    head_dim, n_kv_heads = _attention_sizes(text, index, is_full, k_eq_v)
    kv_source = _kv_source(text, index)
    is_moe = bool(getattr(text, "enable_moe_block", False))
    double_wide = bool(text.use_double_wide_mlp) and kv_source != index
    return LayerGeometry(
        index=index,
        attention=_ATTENTION[text.layer_types[index]],
        head_dim=head_dim,
        n_heads=text.num_attention_heads,
        n_kv_heads=n_kv_heads,
        kv_source=kv_source,
        has_ple=bool(getattr(text, "hidden_size_per_layer_input", 0)),
        is_moe=is_moe,
        n_experts=text.num_experts if is_moe else 0,
        top_k=text.top_k_experts if is_moe else 0,
        k_eq_v=k_eq_v,
        d_mlp=text.intermediate_size * (2 if double_wide else 1),
    )


def _attention_sizes(text: Any, index: int, is_full: bool, k_eq_v: bool) -> tuple[int, int]:
    """`(head_dim, n_kv_heads)` of one layer, from either form of the config."""
    if not hasattr(text, "global_head_dim"):
        layer = text.per_layer_config[index]
        return layer.head_dim, layer.num_key_value_heads
    return (
        (text.global_head_dim if is_full else None) or text.head_dim,
        (text.num_global_key_value_heads if k_eq_v else None) or text.num_key_value_heads,
    )


def _kv_source(text: Any, index: int) -> int:
    """The last layer of the same kind that has keys and values of its own."""
    n_own = text.num_hidden_layers - text.num_kv_shared_layers
    if index < n_own:
        return index
    kind = text.layer_types[index]
    own = [i for i in range(n_own) if text.layer_types[i] == kind]
    if not own:
        raise ModelError(f"Layer {index} shares keys and values, but no {kind} layer before layer {n_own} has any.")
    return own[-1]
