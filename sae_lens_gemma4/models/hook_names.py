"""What every hook point of a Gemma 4 model is called, what it is, and where it lies.

One hook has several names: TransformerLens's (`blocks.21.hook_resid_post`), the path of its part of a bridge
(`blocks.21.hook_out`) and the module path that Hugging Face code hooks (`model.language_model.layers.21`, the
layer's output). Published SAEs use either of the last two kinds and the first, and text-only checkpoints lack the
`language_model` of the path; all are read everywhere and mean the same. `canonical_name` gives the one that is
kept: a name of the tables below, else a bridge's path, else the module path.

The tables are data for the models, for `docs/models.md` and for the tests, so that none can know of a hook that
the others lack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

HF_PREFIX = "model.language_model."
TEXT_ONLY_PREFIX = "model."
_TOWERS = ("model.vision_tower", "model.embed_vision", "model.audio_tower", "model.embed_audio")
LM_HEAD = "lm_head"

RESID = "batch pos d_model"


@dataclass(frozen=True)
class Hook:
    """One kind of hook point. In `module` the layer itself is the empty path."""

    meaning: str
    module: str | None = None
    """The HF module, within the layer or the decoder, whose input or output it is; None where it lies inside one."""
    side: Literal["in", "out"] = "out"
    shape: str = RESID
    only: Literal["ple", "moe"] | None = None
    """The layers that have it, if not all."""


BLOCK_HOOKS = {
    "hook_resid_pre": Hook("the residual stream that enters the layer", "", "in"),
    "attn.hook_q": Hook("queries, before their norm", "self_attn.q_proj", shape="batch pos head head_dim"),
    "attn.hook_k": Hook("keys, before their norm", "self_attn.k_proj", shape="batch pos kv_head head_dim"),
    "attn.hook_v": Hook("values, before their norm", "self_attn.v_proj", shape="batch pos kv_head head_dim"),
    "attn.hook_k_used": Hook("the keys this layer attends with", shape="batch pos kv_head head_dim"),
    "attn.hook_v_used": Hook("the values this layer attends with", shape="batch pos kv_head head_dim"),
    "attn.hook_attn_scores": Hook("attention before the softmax, masked", shape="batch head query key"),
    "attn.hook_pattern": Hook("attention after the softmax", shape="batch head query key"),
    "attn.hook_z": Hook("heads' outputs, before o_proj", "self_attn.o_proj", "in", "batch pos head head_dim"),
    "hook_attn_out": Hook("what attention adds", "post_attention_layernorm"),
    "hook_resid_mid": Hook("the stream between attention and the feed-forward half; every branch reads it"),
    "mlp.hook_pre": Hook("the dense MLP's gate, before the activation", "mlp.gate_proj", shape="batch pos d_mlp"),
    "mlp.hook_pre_linear": Hook("what the activated gate multiplies", "mlp.up_proj", shape="batch pos d_mlp"),
    "mlp.hook_post": Hook("the dense MLP's neurons", "mlp.down_proj", "in", "batch pos d_mlp"),
    "mlp.hook_out": Hook("the dense MLP's output, before its norm", "mlp"),
    "moe.hook_dense_out": Hook("the dense branch, after its norm", "post_feedforward_layernorm_1", only="moe"),
    "moe.hook_router_logits": Hook("before the softmax; an edit re-routes", shape="batch pos expert", only="moe"),
    "moe.hook_router_probs": Hook("after the softmax; an edit re-routes", shape="batch pos expert", only="moe"),
    "moe.hook_expert_indices": Hook("the experts used, integers", shape="batch pos k", only="moe"),
    "moe.hook_expert_weights": Hook("their weights as used", shape="batch pos k", only="moe"),
    "moe.hook_expert_outs": Hook("their outputs, unweighted", shape="batch pos k d_model", only="moe"),
    "moe.hook_experts_out": Hook("the experts' branch, after its norm", "post_feedforward_layernorm_2", only="moe"),
    "hook_mlp_out": Hook("what the feed-forward half adds, experts included", "post_feedforward_layernorm"),
    "hook_ple_out": Hook("what the per-layer embedding adds", "post_per_layer_input_norm", only="ple"),
    "hook_resid_prescale": Hook("the stream before layer_scalar"),
    "hook_resid_post": Hook("the stream that leaves the layer", ""),
}
MODEL_HOOKS = {
    "hook_embed": Hook("scaled token embeddings", "embed_tokens"),
    "hook_ple_inputs": Hook("all layers' PLE inputs", shape="batch pos layer d_ple", only="ple"),
    "ln_final.hook_out": Hook("after the final norm", "norm"),
    "hook_unembed": Hook("logits, before their soft cap", LM_HEAD, shape="batch pos vocab"),
}
"""In the order in which they are computed. A layer has `attn.hook_k` unless it shares another's keys, and
`attn.hook_v` unless its values are made of its keys."""

BLOCK_PARTS = {
    "": "",
    "ln1": "input_layernorm",
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.v_norm": "self_attn.v_norm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "mlp": "mlp",
    "mlp.gate": "mlp.gate_proj",
    "mlp.in": "mlp.up_proj",
    "mlp.out": "mlp.down_proj",
    "post_feedforward_layernorm_1": "post_feedforward_layernorm_1",
    "router": "router",
    "pre_feedforward_layernorm_2": "pre_feedforward_layernorm_2",
    "experts": "experts",
    "post_feedforward_layernorm_2": "post_feedforward_layernorm_2",
    "ln2_post": "post_feedforward_layernorm",
    "per_layer_input_gate": "per_layer_input_gate",
    "per_layer_projection": "per_layer_projection",
    "post_per_layer_input_norm": "post_per_layer_input_norm",
}
MODEL_PARTS = {"embed": "embed_tokens", "ln_final": "norm", "unembed": LM_HEAD}
"""A bridge's parts (transformer_lens/model_bridge/supported_architectures/gemma4.py) and the HF modules they wrap.
Each has a `hook_in` and a `hook_out`."""


@dataclass(frozen=True)
class Site:
    """A module of the decoder, or `lm_head`, and one side of it."""

    path: str
    side: Literal["in", "out"] = "out"


_FLAT_PARTS = ("router.", "pre_feedforward_layernorm_2.", "experts.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)(?:\.(.+))?")
_SAE_HOOK = re.compile(r"(.+)(\.hook_sae_\w+)")


def _bridge_path(hook: Hook, parts: dict[str, str]) -> str | None:
    part = next((p for p, module in parts.items() if module == hook.module), None)
    return None if part is None else f"{part}.hook_{hook.side}".lstrip(".")


_BLOCK_PATHS = {name: _bridge_path(hook, BLOCK_PARTS) or name for name, hook in BLOCK_HOOKS.items()}
_MODEL_PATHS = {name: _bridge_path(hook, MODEL_PARTS) or name for name, hook in MODEL_HOOKS.items()}
_INSIDE = {"router": "moe.hook_router_probs", "router.proj": "moe.hook_router_logits"}
"""HF modules whose outputs are hooked where they are used: a layer discards the probabilities its router returns."""
_OF_BLOCK_PATH = {path: name for name, path in _BLOCK_PATHS.items()} | {"router.hook_out": _INSIDE["router"]}
_OF_MODEL_PATH = {path: name for name, path in _MODEL_PATHS.items()}
_BLOCK_PART_OF = {module: part for part, module in BLOCK_PARTS.items()}
_MODEL_PART_OF = {module: part for part, module in MODEL_PARTS.items()}


def canonical_name(name: str) -> str:
    """The one name of a hook, whichever of its names is given.

    `model.language_model.layers.3`, `model.layers.3` and `blocks.3.hook_out` become `blocks.3.hook_resid_post`; a
    module that is no part of a bridge becomes its path with the prefix `model.language_model.`; hook points within
    an attached SAE keep their last part; anything else is returned as it is. Whether a model has such a hook is not
    checked here.
    """
    if match := _SAE_HOOK.fullmatch(name):
        return canonical_name(match[1]) + match[2]
    path = _decoder_path(name)
    if path is None:
        return _of_bridge_path(name)
    if match := _LAYER.fullmatch(path):
        layer, module = int(match[1]), match[2] or ""
        if module in _INSIDE:
            return f"blocks.{layer}.{_INSIDE[module]}"
        if module in _BLOCK_PART_OF:
            return _of_bridge_path(f"blocks.{layer}.{_BLOCK_PART_OF[module]}.hook_out".replace("..", "."))
    elif path in _MODEL_PART_OF:
        return _of_bridge_path(f"{_MODEL_PART_OF[path]}.hook_out")
    return path if path == LM_HEAD else HF_PREFIX + path


def bridge_path(name: str) -> str:
    """A hook's path in a bridge's registry: `blocks.3.hook_out` for any name of `blocks.3.hook_resid_post`."""
    name = canonical_name(name)
    if match := _SAE_HOOK.fullmatch(name):
        return bridge_path(match[1]) + match[2]
    if match := _BLOCK.fullmatch(name):
        return f"blocks.{match[1]}.{_BLOCK_PATHS.get(match[2], match[2])}"
    return _MODEL_PATHS.get(name, name)


def site_of(name: str) -> Site | None:
    """The module and side that a hook is, by any of its names; None where it lies inside a module, or is no hook."""
    name = canonical_name(name)
    if (path := _decoder_path(name)) is not None:
        return Site(path)
    part, _, side = bridge_path(name).rpartition("hook_")
    part = part.rstrip(".")
    if match := re.fullmatch(r"blocks\.(\d+)(?:\.(.+))?", part):
        module = BLOCK_PARTS.get(match[2] or "")
        path = None if module is None else f"layers.{match[1]}.{module}".rstrip(".")
    else:
        path = MODEL_PARTS.get(part)
    if path is None or side not in ("in", "out"):
        return None
    return Site(path, "in" if side == "in" else "out")


def hf_name(name: str) -> str | None:
    """The HF module path whose output a hook is (`hf_hook_name` in an SAE's metadata); None where it is none's."""
    if match := _BLOCK.fullmatch(canonical_name(name)):
        for module, inside in _INSIDE.items():
            if match[2] == inside:
                return f"{HF_PREFIX}layers.{match[1]}.{module}"
    site = site_of(name)
    if site is None or site.side == "in":
        return None
    return site.path if site.path == LM_HEAD else HF_PREFIX + site.path


def layer_of(name: str) -> int | None:
    """The layer that a hook lies in; None outside the layers."""
    match = _BLOCK.fullmatch(canonical_name(name)) or _LAYER.fullmatch(_decoder_path(name) or "")
    return int(match[1]) if match else None


def hook_of(name: str) -> Hook | None:
    """What the tables say of a hook; None for one that is not in them."""
    name = canonical_name(name)
    match = _BLOCK.fullmatch(name)
    return MODEL_HOOKS.get(name) if match is None else BLOCK_HOOKS.get(match[2])


def has_no_batch_axis(name: str) -> bool:
    """Whether a hook sees all positions of a batch in one row, as transformers runs router and experts."""
    match = _BLOCK.fullmatch(bridge_path(name))
    return match is not None and match[2].startswith(_FLAT_PARTS)


def lies_beyond(name: str, stop_at_layer: int) -> bool:
    """Whether a forward pass that stops before layer `stop_at_layer` never comes to a hook."""
    layer = layer_of(name)
    if layer is not None:
        return layer > stop_at_layer or (layer == stop_at_layer and not bridge_path(name).endswith(f".{layer}.hook_in"))
    return bridge_path(name).startswith(("ln_final.", "unembed."))


def _of_bridge_path(name: str) -> str:
    if match := _BLOCK.fullmatch(name):
        return f"blocks.{int(match[1])}.{_OF_BLOCK_PATH.get(match[2], match[2])}"
    return _OF_MODEL_PATH.get(name, name)


def _decoder_path(name: str) -> str | None:
    """The part of an HF module path below the text decoder; None for a name that is not such a path."""
    if name == LM_HEAD:
        return name
    if name.startswith(_TOWERS):
        return None
    for prefix in (HF_PREFIX, TEXT_ONLY_PREFIX):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None
