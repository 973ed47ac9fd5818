"""Another module tree on a model's own weights.

A bridge puts wrappers into the module tree, switches attention and gives the head a bias. Done to a model that was
passed in, that would change it behind its owner's back: its `state_dict` gets other names, its hooks another order,
its attention another kernel. So a bridge is built on a tree of its own. Parameters and buffers are the same
tensors: nothing is held twice, and what trains, freezes or casts the one's does so to the other's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

_SHARED_ATTRIBUTES = ("quant_state", "weights_map", "tied_params_map")
"""Of bitsandbytes' layers and accelerate's hooks: they hold weights, too."""


def tree_on_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model's modules and configs whose parameters and buffers are the model's own tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        owners = [module, getattr(module, "_hf_hook", None)]
        owners += getattr(owners[1], "hooks", ())  # accelerate's SequentialHook
        for owner in owners:
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, torch.Tensor) or name in _SHARED_ATTRIBUTES:
                    memo[id(value)] = value
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
    tree = copy.deepcopy(model, memo)
    for module in tree.modules():  # hooks stay with the model they were put on, and so do the handles that remove them
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
        module.__dict__.pop("_output_capturing_hooks_installed", None)  # transformers' own; put in again when needed
    return tree


def cast_(model: PreTrainedModel, device: torch.device | None, dtype: torch.dtype | None) -> PreTrainedModel:
    """Give a tree weights of its own on `device` and in `dtype`, as transformers would have loaded them.

    Buffers that are not in checkpoints (the rotary frequencies) keep their dtype, which `model.to(dtype)` would not.
    """
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor, cast: bool) -> torch.Tensor:
        if id(tensor) not in moved:
            new = tensor.to(device=device, dtype=dtype if cast and tensor.is_floating_point() else None)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = torch.nn.Parameter(new.detach(), tensor.requires_grad) if is_parameter else new
        return moved[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = move(parameter, True)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer, name not in module._non_persistent_buffers_set)
    return model
