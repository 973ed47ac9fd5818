"""A decoder layer's own equation, with hook points where no module of Hugging Face's ends.

The residual between attention and the feed-forward half, and the one before `layer_scalar`, are sums within
`Gemma4TextDecoderLayer.forward`: no module's output is one, so no hook on a module can edit them. (TransformerLens
takes the first at the input of the dense branch's norm, and an edit there misses the skip path and the experts.)
`layer_forward` is that equation, and runs in the place of transformers' only where somebody listens.
`check_layer_equation` holds the two against each other once in a process, so that a change upstream is an error here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformers import AutoModel

from sae_lens_gemma4.errors import DependencyError

Points = Mapping[str, HookPoint]
"""Hook points of one layer by the last part of their canonical names (`hook_resid_mid`, `moe.hook_expert_outs`)."""


def is_live(point: HookPoint | None) -> bool:
    """Whether somebody listens at a hook point, or an SAE is attached to it."""
    return point is not None and bool(point._forward_hooks or point._backward_hooks or "writer" in point.__dict__)


def any_live(points: Points, *names: str) -> bool:
    return any(is_live(points.get(name)) for name in names)


def through(points: Points, name: str, value: torch.Tensor) -> torch.Tensor:
    """What the hook point of this name makes of `value`; `value` if there is none."""
    point = points.get(name)
    if point is None:
        return value
    result: torch.Tensor = point(value)
    return result


def show(points: Points, name: str, value: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """`through`, and whether anything downstream can tell: False where hooks only watched and no gradient is kept.

    Where a value is made only to be shown, what is unchanged need not be put back: watching changes not one bit.
    """
    if torch.is_grad_enabled():
        return through(points, name, value), True
    before = value.clone()
    shown = through(points, name, value)
    return shown, not torch.equal(shown, before)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let `forward(original, …)` answer for a module; what is returned undoes it.

    `forward` must be something that `copy.deepcopy` copies with the module (no closure), for the sake of bridges.

    Where accelerate places a module's weights, it is the forward within accelerate's that is replaced.
    """
    slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    before = module.__dict__.get(slot)
    module.__dict__[slot] = functools.partial(forward, getattr(module, slot))

    def undo() -> None:
        if before is None:
            del module.__dict__[slot]
        else:
            module.__dict__[slot] = before

    return undo


def open_layer(layer: nn.Module, points: Points, stack: ExitStack) -> None:
    """Put `hook_resid_mid` and `hook_resid_prescale` of `points` into a layer until `stack` is closed."""
    config: Any = layer.config
    config_class: Any = type(config)
    check_layer_equation(config_class)
    stack.callback(replace_forward(layer, functools.partial(_layer, layer, points)))


def _layer(layer: nn.Module, points: Points, original: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    if any_live(points, "hook_resid_mid", "hook_resid_prescale"):
        return layer_forward(layer, points, *args, **kwargs)
    output: torch.Tensor = original(*args, **kwargs)
    return output


def open_decoder(decoder: nn.Module, points: Points, stack: ExitStack) -> None:
    """Put `hook_ple_inputs` of `points` into a decoder, and let it compute every position, until `stack` is closed.

    While it generates, transformers computes the layers that share keys and values at the last position only
    (5.23 modeling_gemma4.py:1677): what listens there, an SAE or a cache, would get a part of the sequence.
    """
    stack.callback(decoder.register_forward_pre_hook(_whole_sequence, with_kwargs=True).remove)
    if "hook_ple_inputs" in points:
        project: Any = decoder.project_per_layer_inputs
        projected = functools.partial(_projected, points, project)
        decoder.__dict__["project_per_layer_inputs"] = projected
        stack.callback(decoder.__dict__.pop, "project_per_layer_inputs")


def _whole_sequence(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "logits_to_keep": 0} if "logits_to_keep" in kwargs else kwargs


def _projected(points: Points, project: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    return through(points, "hook_ple_inputs", project(*args, **kwargs))


def layer_forward(
    layer: Any, points: Points, hidden_states: torch.Tensor, per_layer_input: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """`Gemma4TextDecoderLayer.forward` (transformers 5.23 models/gemma4/modeling_gemma4.py:1368), `[batch, pos, d]`."""
    attn, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    mid = through(points, "hook_resid_mid", hidden_states + layer.post_attention_layernorm(attn))
    ff = layer.mlp(layer.pre_feedforward_layernorm(mid))
    if getattr(layer, "enable_moe_block", False):
        ff = layer.post_feedforward_layernorm_1(ff)
        flat = mid.reshape(-1, mid.shape[-1])
        _, weights, indices = layer.router(flat)
        experts = layer.experts(layer.pre_feedforward_layernorm_2(flat), indices, weights)
        ff = ff + layer.post_feedforward_layernorm_2(experts.reshape(mid.shape))
    resid = mid + layer.post_feedforward_layernorm(ff)
    if getattr(layer, "hidden_size_per_layer_input", 0):
        ple = layer.act_fn(layer.per_layer_input_gate(resid)) * per_layer_input
        resid = resid + layer.post_per_layer_input_norm(layer.per_layer_projection(ple))
    resid = through(points, "hook_resid_prescale", resid)
    scaled: torch.Tensor = resid * layer.layer_scalar
    return scaled.to(resid.dtype)  # upstream multiplies in place


_TOY = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "global_head_dim": 4,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 8,
    "enable_moe_block": True,
    "num_experts": 3,
    "top_k_experts": 2,
    "moe_intermediate_size": 4,
}


@functools.cache
def check_layer_equation(config_class: type[Any]) -> None:
    """Hold `layer_forward` against transformers' own on a toy model with every branch; once in a process.

    Raises:
        DependencyError: they differ: this transformers computes a Gemma 4 layer in another way.
    """
    import transformers

    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        model: Any = AutoModel.from_config(config_class(**_TOY), dtype=torch.float32).eval()
        for tensor in (*model.parameters(), *(layer.layer_scalar for layer in model.layers)):
            tensor.uniform_(-1, 1)
        tokens = torch.arange(8)[None]
        theirs = model(tokens, use_cache=False).last_hidden_state
        for layer in model.layers:
            layer.forward = functools.partial(layer_forward, layer, {})
        ours = model(tokens, use_cache=False).last_hidden_state
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        raise DependencyError(
            f"transformers {transformers.__version__} computes a Gemma 4 layer in another way than this package: "
            "hook_resid_mid and hook_resid_prescale cannot be used. constraints.txt names a version that is known."
        )
