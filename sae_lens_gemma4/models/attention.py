"""What a layer attends with, opened: keys and values, scores and pattern.

Layers that share keys and values have no projections to hook, and transformers' fast attention functions have no
pattern. All of them go through one call, though: the attention function that the config names
(transformers' `AttentionInterface`). `tapped_attention` is such a function; it shows keys and values, which a layer
that computes them has by then handed to those that share them, so that an edit is this layer's alone. Only while
somebody listens to scores or pattern does it compute attention itself, by the eager form.
"""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sae_lens_gemma4.errors import ModelError
from sae_lens_gemma4.models.layer import Points, any_live, show, through

TAPPED = "sae_lens_gemma4_tapped"


_calling = threading.local()
"""Whether this thread is within the real attention function, which may ask the config for its own name."""


class _TappedConfig:
    """A layer's config, in which the attention function is `tapped_attention`. The model's own stays as it is."""

    def __init__(self, config: Any, points: Points) -> None:
        self.config, self.points = config, points

    @property
    def _attn_implementation(self) -> str:
        return str(self.config._attn_implementation) if getattr(_calling, "real", False) else TAPPED

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "points"):  # not yet set, when copied
            raise AttributeError(name)
        return getattr(self.config, name)


def open_attention(attention: nn.Module, points: Points, stack: ExitStack) -> None:
    """Put the `attn.` hook points of `points` into an attention module until `stack` is closed."""
    config = attention.__dict__["config"]
    attention.__dict__["config"] = _TappedConfig(config, points)
    stack.callback(attention.__dict__.__setitem__, "config", config)


def tapped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers; `query`, `key`, `value` are `[batch, head, pos, head_dim]`."""
    tapped: _TappedConfig = module.config
    points = tapped.points
    if any_live(points, "attn.hook_k_used"):  # a copy: other layers attend with the same keys
        key = through(points, "attn.hook_k_used", key.transpose(1, 2).clone()).transpose(1, 2)
    if any_live(points, "attn.hook_v_used"):
        value = through(points, "attn.hook_v_used", value.transpose(1, 2).clone()).transpose(1, 2)
    if any_live(points, "attn.hook_attn_scores", "attn.hook_pattern"):
        result, changed = _open_attention(module, points, query, key, value, attention_mask, **kwargs)
        if changed:
            return result
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(tapped.config._attn_implementation, eager)
    _calling.real = True
    try:
        output: tuple[torch.Tensor, torch.Tensor | None] = attend(module, query, key, value, attention_mask, **kwargs)
    finally:
        _calling.real = False
    return output


def _open_attention(
    module: Any,
    points: Points,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[tuple[torch.Tensor, torch.Tensor], bool]:
    """transformers' eager attention (5.23 modeling_gemma4.py:812) with hooks, and whether any of them changed it."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    mask = _additive(mask, scores, module)
    if mask is not None:
        scores = scores + mask
    scores, changed_scores = show(points, "attn.hook_attn_scores", scores)
    pattern = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern, changed_pattern = show(points, "attn.hook_pattern", pattern)
    pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
    output = torch.matmul(pattern, value).transpose(1, 2).contiguous()
    return (output, pattern), changed_scores or changed_pattern


def _additive(mask: torch.Tensor | None, scores: torch.Tensor, module: Any) -> torch.Tensor | None:
    """The mask as eager attention takes it, from what other attention functions take."""
    implementation = module.config.config._attn_implementation
    lowest = torch.finfo(scores.dtype).min
    if mask is None:
        n_query, n_key = scores.shape[-2:]
        if implementation == "eager" or n_query == 1 or not module.is_causal:
            return None
        if implementation == "sdpa":
            return torch.full((n_query, n_key), lowest, dtype=scores.dtype, device=scores.device).triu(1)
    elif isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return torch.zeros_like(scores).masked_fill(~mask, lowest) if mask.dtype == torch.bool else mask
    raise ModelError(f"Attention scores and pattern can be hooked under eager or sdpa attention, not {implementation}.")


ALL_ATTENTION_FUNCTIONS.register(TAPPED, tapped_attention)
