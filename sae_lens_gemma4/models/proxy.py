"""Gemma 4 as Hugging Face runs it, hooked only where somebody listens: the model to harvest with.

A `HookedProxyLM` (sae_lens/load_model.py:83), mended where stock goes wrong on Gemma 4:

- either name of a hook works, and the cache answers to both; stock knows module paths only;
- a module is tapped for the length of a forward pass, and only if a hook waits there; stock hooks every module;
- `stop_at_layer` stops before that layer and returns the residual stream there, as TransformerLens does;
- keyword arguments (`attention_mask`, `position_ids`, …) reach the model; stock drops them (load_model.py:174);
- `to_tokens` never yields a BOS; stock's test for one never holds on transformers 5 (load_model.py:236);
- the loss is computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from sae_lens.load_model import HookedProxyLM, StopForward
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.HookedTransformer import Output
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.models.geometry import gemma4_geometry
from sae_lens_gemma4.models.hook_names import BLOCK_SITES, MODEL_SITES, Site, canonical_name, site_of

_MASKED_FORWARD_ARGUMENTS = {"input_ids", "labels", "return_dict", "kwargs"}


class _ByEitherName(dict[str, Any]):
    """A dict with canonical keys that is read with either name of a hook."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(canonical_name(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(canonical_name(name))

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(canonical_name(name), default)


class _HookPoints(_ByEitherName):
    """All hook points of a proxy; one on a module without a TransformerLens name is made when first asked for."""

    def __init__(self, proxy: Gemma4ProxyLM) -> None:
        super().__init__()
        self._make = proxy.make_hook_point

    def __missing__(self, name: str) -> HookPoint:
        self[name] = point = self._make(name)
        return point


class Gemma4ProxyLM(HookedProxyLM):
    """A Gemma 4 language model behind sae_lens's model interface, by plain forward hooks on the HF modules.

    Args:
        model: a Gemma 4 model of transformers, in memory. It is neither moved, cast nor switched to another
            attention implementation.
        tokenizer: its tokenizer.
        hook_names: hooks that must exist; each is checked now rather than at the first batch.
        name: what the model is called in reports; its config's own name if None.

    Raises:
        ModelError: the model is not Gemma 4.
        UnknownNameError: a hook that this model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hook_names: list[str] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self.geometry = gemma4_geometry(getattr(model, "config", None))
        super().__init__(model, tokenizer)
        self.model_name = name or str(model.config._name_or_path)
        for hook_name in hook_names or []:
            self.hook_point(hook_name)

    def setup(self) -> None:
        """Make a hook point for each name that this model has. Called by the base class."""
        base: Any = self.model.model
        decoder: nn.Module = getattr(base, "language_model", base)
        self._modules_by_path = dict(decoder.named_modules())
        self._forward_arguments = set(inspect.signature(self.model.forward).parameters) - _MASKED_FORWARD_ARGUMENTS
        self.hook_dict = _HookPoints(self)
        self.mod_dict = self.hook_dict
        names = [*MODEL_SITES, *(f"blocks.{n}.{k}" for n in range(self.geometry.n_layers) for k in BLOCK_SITES)]
        for name in names:
            if self._site(name) is not None:
                self.hook_dict[name] = self.make_hook_point(name)

    def _site(self, name: str) -> Site | None:
        site = site_of(name)
        return site if site is not None and site.path in self._modules_by_path else None

    def make_hook_point(self, name: str) -> HookPoint:
        """A new hook point for a site of this model, by its canonical name."""
        if self._site(name) is None:
            known = [*self.hook_dict, *(f"model.language_model.{p}" for p in self._modules_by_path if p)]
            raise UnknownNameError("hook", name, known)
        point = HookPoint()
        point.name = name
        return point

    def hook_point(self, name: str) -> HookPoint:
        """The hook point of this name, canonical or HF path; `UnknownNameError` if the model has none."""
        point: HookPoint = self.hook_dict[name]
        return point

    def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
        """As `HookedRootModule.run_with_cache`; the cache is read with either name of a hook.

        `names_filter` is a name, a list of names or a function on canonical names. A name the model lacks raises.
        """
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        if isinstance(names_filter, list | tuple):
            names_filter = [str(self.hook_point(name).name) for name in names_filter]
        output, cache = HookedRootModule.run_with_cache(self, *args, names_filter=names_filter, **kwargs)
        return output, _ByEitherName(cache)

    def forward(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        return_type: Literal["both", "logits", "loss"] | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        prepend_bos: bool | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Any:
        """Run the model with its hooks.

        Args:
            tokens: int64 `[batch, pos]`.
            return_type: "logits" `[batch, pos, vocab]`, "loss", "both", or None.
            loss_per_token: the loss as `[batch, pos - 1]` rather than its mean. In nats, in float32.
            stop_at_layer: run the layers before this one only and return the residual stream
                `[batch, pos, d_model]` that it would read.
            prepend_bos: accepted because sae_lens passes it; tokens are never changed here.
            kwargs: passed to the model's own forward (`attention_mask`, `position_ids`, …).
        """
        if return_type not in ("both", "logits", "loss", None):
            raise ConfigError(f"return_type must be 'logits', 'loss', 'both' or None, not {return_type!r}.")
        unknown = sorted(set(kwargs) - self._forward_arguments)
        if unknown:
            raise UnknownNameError("argument of the model", unknown[0], self._forward_arguments)
        with ExitStack() as taps:
            for point in list(self.hook_dict.values()):
                if point._forward_hooks or point._backward_hooks:
                    taps.callback(self._tap(point).remove)
            if stop_at_layer is not None:
                taps.callback(self._stop_before(stop_at_layer).remove)
            try:
                logits = self.model(input_ids=tokens, **{"use_cache": False, **kwargs}).logits
            except _Stopped as stopped:
                return stopped.resid
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = lm_cross_entropy_loss(logits.float(), tokens.to(logits.device), per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _tap(self, point: HookPoint) -> Any:
        site = self._site(str(point.name))
        assert site is not None
        module = self._modules_by_path[site.path]
        if site.side == "in":
            return module.register_forward_pre_hook(lambda _, args: (point(args[0]), *args[1:]))
        return module.register_forward_hook(_output_tap(point))

    def _stop_before(self, layer: int) -> Any:
        n_layers = self.geometry.n_layers
        if not -n_layers <= layer <= n_layers:
            raise ConfigError(f"stop_at_layer must lie in 0..{n_layers}, not {layer}.")
        path = "norm" if layer == n_layers else f"layers.{layer % n_layers}"

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            raise _Stopped(args[0])

        return self._modules_by_path[path].register_forward_pre_hook(stop)

    def to_tokens(  # type: ignore[override]
        self, input: str | list[str], prepend_bos: bool | None = False, **_: Any
    ) -> torch.Tensor:
        """Tokens `[batch, pos]` of one text or of texts of one length, without BOS unless asked for."""
        texts = [input] if isinstance(input, str) else list(input)
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if prepend_bos and bos is not None:
            rows = [[bos, *row] for row in rows]
        if len({len(row) for row in rows}) > 1:
            raise ConfigError("The texts have different lengths in tokens; pass one at a time, or tokens.")
        return torch.tensor(rows, dtype=torch.long)


class _Stopped(StopForward):
    def __init__(self, resid: torch.Tensor) -> None:
        super().__init__()
        self.resid = resid


def _output_tap(point: HookPoint) -> Callable[[nn.Module, Any, Any], Any]:
    def tap(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (point(output[0]), *output[1:])
        return point(output)

    return tap
