"""Gemma 4 as Hugging Face runs it, hooked only where somebody listens: the model to harvest with.

A `HookedProxyLM` (sae_lens/load_model.py:83), mended where stock goes wrong on Gemma 4:

- any name of a hook works, and the cache answers to all; stock knows module paths only;
- the hook points of `hook_names` are here too, those within modules included (`layer`, `moe`, `attention`);
- a module is tapped for the length of a forward pass, and only if a hook waits there; stock hooks every module;
- `stop_at_layer` stops before that layer and returns the residual stream there, as TransformerLens does;
- keyword arguments (`attention_mask`, `position_ids`, …) reach the model; stock drops them (load_model.py:174);
- `to_tokens` adds no BOS unasked; stock's test for one never holds on transformers 5 (load_model.py:236);
- the loss is computed in float32 whatever the model's dtype, and not on tokens that are masked.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from sae_lens.load_model import HookedProxyLM, StopForward
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.HookedTransformer import Output
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_lens_gemma4.errors import ConfigError, UnknownNameError
from sae_lens_gemma4.models.arguments import check_filter, checked_stop, isolate
from sae_lens_gemma4.models.cache import ByEitherName, Gemma4Cache
from sae_lens_gemma4.models.geometry import gemma4_geometry
from sae_lens_gemma4.models.loading import resolve_model
from sae_lens_gemma4.models.taps import TappedPoints

_MASKED_FORWARD_ARGUMENTS = {"input_ids", "inputs_embeds", "labels", "return_dict", "kwargs"}


class Gemma4ProxyLM(HookedProxyLM):
    """A Gemma 4 language model behind sae_lens's model interface, by plain forward hooks on the HF modules.

    Args:
        model: a Gemma 4 model of transformers, in memory, which is used as it is and never changed; or the name of
            one, a folder or an embedded model's name, loaded without towers.
        tokenizer: its tokenizer; the one loaded with the model if None.
        hook_names: hooks that must exist; each is checked now rather than at the first batch.
        name: what the model is called in reports; its config's own name if None.
        device, dtype, attn_implementation: those of the model, or of a loaded checkpoint, if None. Where a model in
            memory differs, the proxy runs a module tree of its own.
        hf_kwargs: for loading by name: arguments of transformers' `from_pretrained` (`device_map`, …).

    Raises:
        ModelError: the model is not Gemma 4, or cannot be loaded as asked.
        UnknownNameError: a hook that this model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        hook_names: list[str] | None = None,
        *,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        **hf_kwargs: Any,
    ) -> None:
        hf_model, used_tokenizer, model_name = resolve_model(
            model,
            tokenizer,
            name=name,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            own_tree=False,
            **hf_kwargs,
        )
        self.geometry = gemma4_geometry(hf_model.config)
        super().__init__(hf_model, used_tokenizer)  # type: ignore[arg-type]
        self.model_name = model_name
        for hook_name in hook_names or []:
            self.hook_point(hook_name)

    def setup(self) -> None:
        """Make the hook points. Called by the base class."""
        hf_model: Any = self.model
        self._forward_arguments = set(inspect.signature(hf_model.forward).parameters) - _MASKED_FORWARD_ARGUMENTS
        self.hook_dict: TappedPoints = TappedPoints(hf_model, self.geometry)
        self.mod_dict = self.hook_dict

    def hook_point(self, name: str) -> HookPoint:
        """The hook point of this name, whichever of its names; `UnknownNameError` if the model has none."""
        point: HookPoint = self.hook_dict[name]
        return point

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `HookedRootModule.run_with_cache`; the cache is read with any name of a hook.

        `names_filter` is a name, a list of names or a function on canonical names.

        Raises:
            UnknownNameError: a name that the model lacks.
            ConfigError: a name that a run with this `stop_at_layer` would not come to.
        """
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        if names_filter is not None and not callable(names_filter):
            names_filter = list(names_filter)
            checked_stop(kwargs.get("stop_at_layer"), self.geometry.n_layers, names_filter)
            names_filter = [str(self.hook_point(name).name) for name in names_filter]
        elif names_filter is not None:
            check_filter(names_filter, self.hook_dict)
        output, cache = HookedRootModule.run_with_cache(self, *args, names_filter=names_filter, **kwargs)
        if not return_cache_object:
            return output, ByEitherName(cache)
        gemma4_cache = Gemma4Cache(cache, self)
        return output, gemma4_cache.remove_batch_dim() if remove_batch_dim else gemma4_cache

    def run_with_hooks(self, *args: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), **kwargs: Any) -> Any:
        """As `HookedRootModule.run_with_hooks`; errors as `run_with_cache`."""
        names = [name for name, _ in (*fwd_hooks, *bwd_hooks) if isinstance(name, str)]
        checked_stop(kwargs.get("stop_at_layer"), self.geometry.n_layers, names)
        return super().run_with_hooks(*args, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), **kwargs)

    def hook_points(self) -> list[HookPoint]:
        """Those with a hook or a context: removing the hooks of all of them is what costs in a run on a small model."""
        return [point for point in self.hook_dict.values() if point.fwd_hooks or point.bwd_hooks or point.ctx]

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """As `HookedRootModule.add_hook`; a filter that matches no hook raises `ConfigError`."""
        if callable(name):
            check_filter(name, self.hook_dict)
        super().add_hook(name, *args, **kwargs)

    def _enable_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        if callable(name):
            check_filter(name, self.hook_dict)
        super()._enable_hook(name, *args, **kwargs)

    def forward(  # type: ignore[override]
        self,
        tokens: torch.Tensor,
        return_type: Literal["both", "logits", "loss"] | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        prepend_bos: bool | None = None,  # noqa: ARG002
        isolate_documents: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model with its hooks.

        Args:
            tokens: int64 `[batch, pos]`.
            return_type: "logits" `[batch, pos, vocab]`, "loss", "both", or None.
            loss_per_token: the loss as `[batch, pos - 1]` rather than its mean. In nats, in float32.
            stop_at_layer: run the layers before this one only and return the residual stream
                `[batch, pos, d_model]` that it would read; the number of layers: what the final norm would read.
            prepend_bos: accepted because sae_lens passes it; tokens are never changed here.
            isolate_documents: packed documents, each opened by BOS, do not see each other.
            kwargs: passed to the model's own forward (`attention_mask`, `position_ids`, …).
        """
        if return_type not in ("both", "logits", "loss", None):
            raise ConfigError(f"return_type must be 'logits', 'loss', 'both' or None, not {return_type!r}.")
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            given = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
            raise ConfigError(f"The proxy takes tokens [batch, pos], not {given}: see to_tokens.")
        unknown = sorted(set(kwargs) - self._forward_arguments)
        if unknown:
            raise UnknownNameError("argument of the model", unknown[0], self._forward_arguments)
        stop = checked_stop(stop_at_layer, self.geometry.n_layers)
        if isolate_documents:
            kwargs = isolate(self.model, tokens, kwargs)
        with ExitStack() as taps:
            self.hook_dict.open(taps)
            if stop is not None:
                self.hook_dict.end_before(stop, _end, taps)
            try:
                logits = self.model(input_ids=tokens, **{"use_cache": False, **kwargs}).logits
            except _Stopped as stopped:
                return stopped.resid
        if return_type in ("logits", None):
            return logits if return_type else None
        mask = kwargs.get("attention_mask")
        mask = None if mask is None or mask.ndim != 2 else mask.to(logits.device)
        loss = lm_cross_entropy_loss(logits.float(), tokens.to(logits.device), mask, loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def generate(self, tokens: torch.Tensor, **kwargs: Any) -> Any:
        """transformers' `generate` on tokens `[batch, pos]`, with this model's hooks at every step.

        Hooks see each position once: the prompt's together, then one at a time; `use_cache=False` shows the whole
        sequence at every step. Takes and returns what transformers' own does.
        """
        with ExitStack() as taps:
            self.hook_dict.open(taps)
            hf_model: Any = self.model
            return hf_model.generate(tokens, **kwargs)

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


def _end(resid: torch.Tensor) -> None:
    raise _Stopped(resid)
