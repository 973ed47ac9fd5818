"""The routing of a mixture-of-experts layer, opened: logits, probabilities, choice, weights and single experts.

transformers' router returns (probabilities, weights, indices) for all positions in one row, and the layer discards
the probabilities (transformers 5.23 modeling_gemma4.py:1403), so a hook on the router sees them and changes nothing.
Here an edit of logits or probabilities chooses anew. Each expert's own output is computed, by the experts module
itself, only while somebody listens to `moe.hook_expert_outs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.models.layer import Points, any_live, replace_forward, show, through


class _Routing:
    """Hooks of one layer. Shapes: `b` batch, `p` pos, `t` = b·p, `k` chosen experts, `e` experts, `d` d_model."""

    def __init__(self, points: Points) -> None:
        self._points = points
        self._shape_bp = torch.Size()

    def remember_shape(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._shape_bp = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def logits(self, _: nn.Module, __: Any, logits_te: torch.Tensor) -> torch.Tensor:
        return self._through("router_logits", logits_te)

    def choice(
        self, router: nn.Module, original: Callable[..., tuple[torch.Tensor, ...]], hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        probs_te, weights_tk, indices_tk = original(hidden_states)
        if any_live(self._points, "moe.hook_router_probs"):
            probs_te = self._through("router_probs", probs_te)
            weights_tk, indices_tk = choose_experts(router, probs_te)
        if any_live(self._points, "moe.hook_expert_indices"):
            indices_tk = _checked_indices(self._through("expert_indices", indices_tk), probs_te.shape[1])
        return probs_te, self._through("expert_weights", weights_tk), indices_tk

    def experts(
        self,
        original: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        if not any_live(self._points, "moe.hook_expert_outs"):
            return original(hidden_states, top_k_index, top_k_weights)
        ones = torch.ones_like(top_k_weights[:, :1])
        outs_tkd = torch.stack([original(hidden_states, index[:, None], ones) for index in top_k_index.T], dim=1)
        outs_bpkd = outs_tkd.reshape(*self._shape_bp, *outs_tkd.shape[1:])
        outs_bpkd, changed = show(self._points, "moe.hook_expert_outs", outs_bpkd)
        if not changed:
            return original(hidden_states, top_k_index, top_k_weights)
        return (outs_bpkd.reshape(outs_tkd.shape) * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    def _through(self, hook: str, flat: torch.Tensor) -> torch.Tensor:
        name = f"moe.hook_{hook}"
        if not any_live(self._points, name):
            return flat
        return through(self._points, name, flat.reshape(*self._shape_bp, *flat.shape[1:])).reshape(flat.shape)


def open_moe(layer: Any, points: Points, stack: ExitStack) -> None:
    """Put the routing's hook points of `points` into a layer until `stack` is closed."""
    routing = _Routing(points)
    router, experts = (getattr(part, "original_component", part) for part in (layer.router, layer.experts))
    for handle in (
        layer.register_forward_pre_hook(routing.remember_shape, with_kwargs=True),
        router.proj.register_forward_hook(routing.logits),
    ):
        stack.callback(handle.remove)
    stack.callback(replace_forward(router, functools.partial(routing.choice, router)))
    stack.callback(replace_forward(experts, routing.experts))


def _checked_indices(indices_tk: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Fused kernels read past the weights for an expert that does not exist."""
    if indices_tk.is_floating_point() or not ((indices_tk >= 0) & (indices_tk < n_experts)).all():
        raise ConfigError(f"moe.hook_expert_indices must be left with integers in 0..{n_experts - 1}.")
    return indices_tk


def choose_experts(router: Any, probs_te: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and indices `[t, k]` as `Gemma4TextRouter.forward` makes them of probabilities (5.23, line 1322)."""
    weights_tk, indices_tk = torch.topk(probs_te, k=router.config.top_k_experts, dim=-1)
    weights_tk = weights_tk / weights_tk.sum(dim=-1, keepdim=True)
    return weights_tk * router.per_expert_scale[indices_tk], indices_tk
