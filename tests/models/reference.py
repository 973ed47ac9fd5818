"""A Gemma 4 text forward by hand, from the raw weights: what the package's hook points are held against.

It is the layer equation in plain torch and shares no code with the package or with transformers' forward, so
neither's mistakes are in it. `test_reference.py` holds it against transformers. Text tokens only: an image's,
audio's or video's placeholder has no meaning here, nor has padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Edit = Callable[[torch.Tensor], torch.Tensor]
Hook = Callable[[str, torch.Tensor], torch.Tensor]
Shared = dict[str, tuple[torch.Tensor, torch.Tensor]]  # each kind of layer's latest keys and values


@dataclass
class Reference:
    logits: torch.Tensor  # [batch, pos, vocab], after softcapping
    values: dict[str, torch.Tensor]  # canonical hook name -> value after its own edit, in order of computation


def reference(model: Any, tokens: torch.Tensor, edits: dict[str, Edit] | None = None) -> Reference:
    """The logits and every hook point's value. An edit gets a copy of the value and returns what takes its place."""
    edits = edits or {}
    values: dict[str, torch.Tensor] = {}

    def hook(name: str, value: torch.Tensor) -> torch.Tensor:
        values[name] = edits[name](value.clone()) if name in edits else value
        return values[name]

    config = model.config.get_text_config()
    text = getattr(model.model, "language_model", model.model)

    embed = text.embed_tokens.weight[tokens]
    x = embed = hook("hook_embed", embed * embed.shape[-1] ** 0.5)
    ple = None
    if hasattr(text, "embed_tokens_per_layer"):
        ple = hook("hook_ple_inputs", _ple_inputs(text, tokens, embed, config))

    shared: Shared = {}
    for i, layer in enumerate(text.layers):
        x = _layer(layer, i, x, None if ple is None else ple[:, :, i], shared, config, hook)
    x = hook("ln_final.hook_out", _norm(x, config, text.norm))

    cap = config.final_logit_softcapping
    logits = F.linear(x, model.lm_head.weight)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    if unknown := edits.keys() - values.keys():
        raise KeyError(f"no such hook points: {sorted(unknown)}")
    return Reference(logits, values)


@torch.no_grad()
def hook_names(model: Any) -> list[str]:
    """Every canonical name this model has, in order of computation."""
    return list(reference(model, torch.zeros(1, 1, dtype=torch.long)).values)


def _layer(
    layer: Any, i: int, x: torch.Tensor, ple: torch.Tensor | None, shared: Shared, config: Any, model_hook: Hook
) -> torch.Tensor:
    def hook(name: str, value: torch.Tensor) -> torch.Tensor:
        return model_hook(f"blocks.{i}.{name}", value)

    x = hook("hook_resid_pre", x)
    attn = _attention(layer.self_attn, i, _norm(x, config, layer.input_layernorm), shared, config, hook)
    attn_out = hook("hook_attn_out", _norm(attn, config, layer.post_attention_layernorm))
    mid = hook("hook_resid_mid", x + attn_out)

    mlp, mlp_in = layer.mlp, _norm(mid, config, layer.pre_feedforward_layernorm)
    gated = _act(_linear(mlp_in, mlp.gate_proj), config) * _linear(mlp_in, mlp.up_proj)
    feed_forward = hook("mlp.hook_out", _linear(gated, mlp.down_proj))
    if hasattr(layer, "router"):
        experts = _experts(layer, mid, config, hook)
        dense_out = hook("moe.hook_dense_out", _norm(feed_forward, config, layer.post_feedforward_layernorm_1))
        experts_out = hook("moe.hook_experts_out", _norm(experts, config, layer.post_feedforward_layernorm_2))
        feed_forward = dense_out + experts_out
    x = mid + hook("hook_mlp_out", _norm(feed_forward, config, layer.post_feedforward_layernorm))

    if ple is not None:
        gated = _act(_linear(x, layer.per_layer_input_gate), config) * ple
        projected = _linear(gated, layer.per_layer_projection)
        x = x + hook("hook_ple_out", _norm(projected, config, layer.post_per_layer_input_norm))
    return hook("hook_resid_post", hook("hook_resid_prescale", x) * layer.layer_scalar)


def _attention(attn: Any, i: int, x: torch.Tensor, shared: Shared, config: Any, hook: Hook) -> torch.Tensor:
    kind, head_dim = config.layer_types[i], attn.q_norm.weight.shape[0]

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, head_dim))

    q = _rotate(_norm(heads(_linear(x, attn.q_proj)), config, attn.q_norm), kind, config)
    if i < config.num_hidden_layers - config.num_kv_shared_layers:
        k = heads(_linear(x, attn.k_proj))
        v = k if attn.v_proj is None else heads(_linear(x, attn.v_proj))  # K==V: the projection, before k_norm
        shared[kind] = _rotate(_norm(k, config, attn.k_norm), kind, config), _norm(v, config)
    k = hook("attn.hook_k_used", shared[kind][0])
    v = hook("attn.hook_v_used", shared[kind][1])

    k, v = (each.repeat_interleave(q.shape[2] // each.shape[2], dim=2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)  # q_norm and k_norm do the scaling: no 1/√d
    scores = hook("attn.hook_attn_scores", scores + _mask(x.shape[1], kind, config))
    pattern = hook("attn.hook_pattern", scores.softmax(-1))
    return _linear(torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2), attn.o_proj)


def _experts(layer: Any, mid: torch.Tensor, config: Any, hook: Hook) -> torch.Tensor:
    """The routed branch before its post-norm. Every expert runs on every token; the router then picks."""
    router, weights = layer.router, layer.experts
    router_in = _norm(mid, config) * router.scale * mid.shape[-1] ** -0.5
    logits = hook("moe.hook_router_logits", _linear(router_in, router.proj))
    probs = hook("moe.hook_router_probs", logits.softmax(-1))
    top, chosen = probs.topk(config.top_k_experts)
    top = top / top.sum(-1, keepdim=True) * router.per_expert_scale[chosen]
    chosen = hook("moe.hook_expert_indices", chosen)
    top = hook("moe.hook_expert_weights", top)

    expert_in = _norm(mid, config, layer.pre_feedforward_layernorm_2)
    gate, up = torch.einsum("bpd,efd->bpef", expert_in, weights.gate_up_proj).chunk(2, dim=-1)
    every = torch.einsum("bpef,edf->bped", _act(gate, config) * up, weights.down_proj)
    outs = every.gather(2, chosen[..., None].expand(*chosen.shape, mid.shape[-1]))
    outs = hook("moe.hook_expert_outs", outs)
    return torch.einsum("bpk,bpkd->bpd", top, outs)


def _ple_inputs(text: Any, tokens: torch.Tensor, embed: torch.Tensor, config: Any) -> torch.Tensor:
    """All layers' per-layer inputs: of the embeddings, as `hook_embed` left them, and of the tokens."""
    d_ple = text.per_layer_projection_norm.weight.shape[0]
    of_embed = _linear(embed, text.per_layer_model_projection) * embed.shape[-1] ** -0.5
    of_embed = _norm(of_embed.unflatten(-1, (-1, d_ple)), config, text.per_layer_projection_norm)
    of_tokens = text.embed_tokens_per_layer.weight[tokens].unflatten(-1, (-1, d_ple)) * d_ple**0.5
    return (of_embed + of_tokens) * 2**-0.5


def _norm(x: torch.Tensor, config: Any, norm: Any = None) -> torch.Tensor:
    """RMS norm; without `norm`, one without weights."""
    normed = x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) ** -0.5
    return normed if norm is None else normed * norm.weight


def _linear(x: torch.Tensor, linear: Any) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _act(x: torch.Tensor, config: Any) -> torch.Tensor:
    assert config.hidden_activation == "gelu_pytorch_tanh"
    return F.gelu(x, approximate="tanh")


def _rotate(x: torch.Tensor, kind: str, config: Any) -> torch.Tensor:
    """Rotary embedding of [batch, pos, head, head_dim]: dimension j turns with j + head_dim/2.

    Full attention's is "proportional": only the first `partial_rotary_factor` of the pairs turn, at frequencies
    that are those of the whole head.
    """
    rope, half = config.rope_parameters[kind], x.shape[-1] // 2
    turning = int(rope.get("partial_rotary_factor", 1.0) * half)
    frequency = torch.zeros(half)
    frequency[:turning] = 1 / rope["rope_theta"] ** (torch.arange(turning) / half)
    angle = torch.arange(x.shape[1])[:, None, None] * frequency  # [pos, 1, half]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def _mask(n: int, kind: str, config: Any) -> torch.Tensor:
    """Additive [query, key]: a sliding layer sees `sliding_window` tokens, itself among them."""
    back = torch.arange(n)[:, None] - torch.arange(n)
    seen = (back >= 0) & (back < (config.sliding_window if kind == "sliding_attention" else n))
    return torch.zeros(n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
