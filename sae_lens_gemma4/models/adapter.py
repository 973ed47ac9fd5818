"""Gemma 4's parts for a TransformerBridge: TransformerLens's own mapping, with hook points that fire and count.

TransformerLens maps Gemma 4 (model_bridge/supported_architectures/gemma4.py) and leaves the mathematics to Hugging
Face. Its mapping is kept; this is what differs, and why:

- block: `hook_resid_mid` and `hook_resid_prescale` are points of their own. Stock's first is an alias of
  `ln2.hook_in`, which the skip path and the experts do not pass.
- attention: `hook_k_used`, `hook_v_used`; and `hook_attn_scores` and `hook_pattern` fire before they are used.
- moe: the routing, which stock lacks. The router has no `hook_out`, as the layer discards what it would show.
- rotary_emb: none. It runs once for each kind of attention under one name, in an order that hashing decides.
- No hook point that never fires (`attn.hook_result`, `hook_mlp_in`, …).

What the points are fed by stands in `layer`, `moe` and `attention`; `connect` brings the two together.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    DelegatedAttentionBlockBridge,
    SymbolicBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from sae_lens_gemma4.models.attention import open_attention
from sae_lens_gemma4.models.geometry import Geometry
from sae_lens_gemma4.models.hook_names import BLOCK_HOOKS
from sae_lens_gemma4.models.layer import Points, open_decoder, open_layer
from sae_lens_gemma4.models.moe import open_moe

MOE_HOOKS = [name.removeprefix("moe.") for name, h in BLOCK_HOOKS.items() if name.startswith("moe.") and not h.module]


class _Own(GeneralizedComponent):
    """A part that may lack `hook_in` or `hook_out`."""

    def remove_hooks(self, hook_name: str | None = None) -> None:
        for name, point in self._hook_registry.items():
            if hook_name is None or name == f"hook_{hook_name.removesuffix('put')}":
                point.remove_hooks(dir="both")


class Block(DelegatedAttentionBlockBridge):
    """A decoder layer. Stock's forward inspects a signature at every call; this one calls the layer."""

    _stops_here = False

    def __init__(self, stock: GeneralizedComponent) -> None:
        super().__init__(str(stock.name), config=stock.config, submodules=stock.submodules)
        self.hook_aliases = {k: v for k, v in self.hook_aliases.items() if k != "hook_resid_mid"}
        if "post_per_layer_input_norm" in self.submodules:
            self.hook_aliases = {**self.hook_aliases, "hook_ple_out": "post_per_layer_input_norm.hook_out"}
        self.hook_resid_mid = HookPoint()
        self.hook_resid_prescale = HookPoint()
        _drop(self, "hook_mlp_in")

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden_states = self.hook_in(hidden_states)
        layer: Any = self.original_component
        if self._stops_here:
            raise StopAtLayerException(hidden_states)
        output: torch.Tensor = self.hook_out(layer(hidden_states, *args, **kwargs))
        return output


class Attention(AttentionBridge):
    """Attention as transformers runs it."""

    supports_split_qkv_fork = False

    def __init__(self, stock: GeneralizedComponent) -> None:
        super().__init__(stock.name, stock.config, submodules=stock.submodules, maintain_native_attention=True)
        self.hook_k_used = HookPoint()
        self.hook_v_used = HookPoint()
        _drop(self, "hook_hidden_states", "hook_result", "hook_rot_k", "hook_rot_q")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return GeneralizedComponent.forward(self, *args, **kwargs)

    def _reshape_weight_to_3d(
        self, weight: torch.Tensor, n_heads: int, pattern: str = "qkv", in_out_layout: bool | None = None
    ) -> torch.Tensor:
        """`W_Q`, `W_K`, `W_V` `[head, d_model, head_dim]` and `W_O` `[head, head_dim, d_model]`, of this layer's heads.

        Stock splits by the model's heads (generalized_components/attention.py:645), which full layers do not share.
        """
        del n_heads, in_out_layout
        attention: Any = self.original_component
        rows = weight.T if pattern == "o" else weight
        heads = rows.reshape(-1, attention.head_dim, rows.shape[1])
        return heads if pattern == "o" else heads.transpose(1, 2)


class Moe(_Own, SymbolicBridge):
    """The routing's hook points. Router and experts keep their places in the block."""

    def __init__(self) -> None:
        super().__init__()
        _drop(self, "hook_in", "hook_out")
        for name in MOE_HOOKS:
            self.__setattr__(name, HookPoint())


class Router(_Own):
    """A router; what it chooses is hooked at `moe`."""

    def __init__(self) -> None:
        super().__init__("router")
        _drop(self, "hook_out")

    def forward(self, hidden_states: torch.Tensor) -> Any:
        router: Any = self.original_component
        return router(self.hook_in(hidden_states))


def adapt(adapter: ArchitectureAdapter, model: Any, geometry: Geometry, attn_implementation: str) -> None:
    """Turn stock's mapping into the one for this model. To be called before a bridge is built from it."""
    parts = adapter.components
    for key, name in (("vision_encoder", "vision_tower"), ("vision_projector", "embed_vision")):
        if getattr(model.model, name, None) is None:
            parts.pop(key, None)
    adapter.cfg.is_multimodal = "vision_projector" in parts
    adapter.cfg.attn_implementation = attn_implementation
    adapter.supports_hf_output_attentions = False  # the pattern has a hook point
    parts.pop("rotary_emb")
    blocks = parts["blocks"]
    first = geometry.layers[0]
    if not first.has_ple:
        for name in ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"):
            blocks.submodules.pop(name)
    if first.is_moe:
        blocks.submodules["router"] = Router()
        blocks.submodules["moe"] = Moe()
    blocks.submodules["attn"] = Attention(blocks.submodules["attn"])
    parts["blocks"] = Block(blocks)


def connect(blocks: Any, decoder: Any, ple_inputs: HookPoint | None) -> None:
    """Feed a built bridge's own hook points from the layers and the decoder that it wraps, for good."""
    stack = ExitStack()  # never closed: a bridge's module tree is its own
    for block in blocks:
        layer = block.original_component
        open_layer(layer, block._hook_registry, stack)
        open_attention(block.attn.original_component, _prefixed("attn", block.attn), stack)
        if hasattr(layer, "router"):
            open_moe(layer, _prefixed("moe", block.moe), stack)
            object.__setattr__(block.moe, "hook_dense_out", block.post_feedforward_layernorm_1.hook_out)
            object.__setattr__(block.moe, "hook_experts_out", block.post_feedforward_layernorm_2.hook_out)
    open_decoder(decoder, {} if ple_inputs is None else {"hook_ple_inputs": ple_inputs}, stack)


def _prefixed(name: str, component: GeneralizedComponent) -> Points:
    return {f"{name}.{hook}": point for hook, point in component._hook_registry.items()}


def _drop(component: GeneralizedComponent, *names: str) -> None:
    """Take hook points away that would never fire."""
    for name in names:
        component._hook_registry.pop(name, None)
        component._modules.pop(name, None)
