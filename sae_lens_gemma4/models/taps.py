"""Hook points on plain Hugging Face modules, opened for the length of a run.

A module's input or output is tapped by a torch hook, what lies inside a module by `layer`, `moe` and `attention`;
and only where somebody listens, so that a run in which nobody does is the model's own.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextRotaryEmbedding

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.models.arguments import why_missing
from sae_lens_gemma4.models.attention import open_attention
from sae_lens_gemma4.models.cache import ByEitherName
from sae_lens_gemma4.models.geometry import Geometry, text_decoder
from sae_lens_gemma4.models.hook_names import BLOCK_HOOKS, HF_PREFIX, LM_HEAD, MODEL_HOOKS, hook_of, layer_of, site_of
from sae_lens_gemma4.models.layer import Points, is_live, open_decoder, open_layer
from sae_lens_gemma4.models.moe import open_moe

_NOT_ONCE = (nn.ModuleList, Gemma4TextRotaryEmbedding, Gemma4UnifiedTextRotaryEmbedding)
"""Modules that are never called, or once for each kind of attention."""
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_RUNNING: WeakSet[nn.Module] = WeakSet()
"""By decoder: two proxies may share one model, and two threads a proxy."""
_PER_HEAD = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")


class TappedPoints(ByEitherName):
    """The hook points of a model by their canonical names, looked up by any.

    Those of `hook_names` are there from the start; one on another module of the decoder is made when asked for.
    """

    def __init__(self, model: PreTrainedModel, geometry: Geometry) -> None:
        super().__init__()
        self._geometry = geometry
        self._decoder = text_decoder(model)
        self._modules: dict[str, Any] = dict(self._decoder.named_modules()) | {LM_HEAD: model.lm_head}
        names = [*MODEL_HOOKS, *(f"blocks.{n}.{k}" for n in range(geometry.n_layers) for k in BLOCK_HOOKS)]
        for name in names:
            if self._exists(name):
                self[name] = self._make(name)

    def __missing__(self, name: str) -> HookPoint:
        if not self._exists(name):
            known = [*self, *(HF_PREFIX + path for path in self._modules if self._fires_once(path))]
            raise UnknownNameError("hook", name, known, why_missing(name, self._geometry))
        self[name] = point = self._make(name)
        return point

    def _exists(self, name: str) -> bool:
        if (site := site_of(name)) is not None:
            return self._fires_once(site.path)
        hook, layer = hook_of(name), layer_of(name) or 0
        if hook is None or layer >= self._geometry.n_layers:
            return False
        geometry = self._geometry.layers[layer]
        return {"ple": geometry.has_ple, "moe": geometry.is_moe, None: True}[hook.only]

    def _fires_once(self, path: str) -> bool:
        module = self._modules.get(path) if path else None
        return module is not None and not isinstance(module, _NOT_ONCE) and not path.endswith("experts.act_fn")

    def _make(self, name: str) -> HookPoint:
        point = HookPoint()
        point.name = name
        if name.endswith(_PER_HEAD):
            point.hook_conversion = _SplitHeads(self._geometry.layers[layer_of(name) or 0].head_dim)
        return point

    def open(self, stack: ExitStack) -> None:
        """Tap what somebody listens to, until `stack` is closed. One run at a time on one model, whoever's it is.

        Raises:
            ConfigError: a run on this model is under way in this thread (a hook runs the model that it hooks), or
                gradient checkpointing would compute the layers again after the taps are gone.
        """
        lock = _LOCKS.setdefault(self._decoder, threading.RLock())
        stack.enter_context(lock)
        if self._decoder in _RUNNING:
            raise ConfigError("A hook cannot run the model that it hooks: give it one of its own (copy.deepcopy).")
        _RUNNING.add(self._decoder)
        stack.callback(_RUNNING.discard, self._decoder)
        live: Mapping[str, HookPoint] = {name: point for name, point in self.items() if is_live(point)}
        inside: defaultdict[int | None, dict[str, HookPoint]] = defaultdict(dict)
        for name, point in live.items():
            if (site := site_of(name)) is None:
                inside[layer_of(name)][name.split(".", 2)[-1]] = point
            elif site.side == "in":
                tap = self._modules[site.path].register_forward_pre_hook(_input_tap(point), with_kwargs=True)
                stack.callback(tap.remove)
            else:
                stack.callback(self._modules[site.path].register_forward_hook(_output_tap(point)).remove)
        if live and self._decoder.training and self._decoder.gradient_checkpointing and torch.is_grad_enabled():
            raise ConfigError("Hooks and gradient checkpointing cannot go together on the proxy: use Gemma4Bridge.")
        if live:
            open_decoder(self._decoder, inside.pop(None, {}), stack)
        for n, points in inside.items():
            _open_inside(self._decoder.layers[n], points, stack)

    def end_before(self, layer: int, end: Callable[[torch.Tensor], None], stack: ExitStack) -> None:
        """Call `end` with the residual stream that this layer, or the final norm, would read."""
        module = self._decoder.norm if layer == self._geometry.n_layers else self._decoder.layers[layer]
        stack.callback(module.register_forward_pre_hook(lambda _, args: end(args[0])).remove)


def _open_inside(layer: Any, points: Points, stack: ExitStack) -> None:
    kinds = {name.partition(".")[0] for name in points}
    if "attn" in kinds:
        open_attention(layer.self_attn, points, stack)
    if "moe" in kinds:
        open_moe(layer, points, stack)
    if kinds - {"attn", "moe"}:
        open_layer(layer, points, stack)


class _SplitHeads(BaseTensorConversion):
    """Shows `[batch, pos, head * head_dim]` as `[batch, pos, head, head_dim]`, as a bridge does."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def handle_conversion(self, input_value: torch.Tensor, *_: Any) -> torch.Tensor:
        return input_value.reshape((*input_value.shape[:-1], -1, self.head_dim))

    def revert(self, input_value: torch.Tensor, *_: Any) -> torch.Tensor:
        return input_value.flatten(-2)


def _input_tap(point: HookPoint) -> Callable[..., Any]:
    def tap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (point(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": point(kwargs["hidden_states"])}  # attention is called by keyword

    return tap


def _output_tap(point: HookPoint) -> Callable[[nn.Module, Any, Any], Any]:
    def tap(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (point(output[0]), *output[1:])
        return point(output)

    return tap
