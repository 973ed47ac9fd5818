"""Gemma 4 behind TransformerLens's hook names, with sae_lens's methods for SAEs: every hook fires, every edit counts.

An `SAETransformerBridge` (sae_lens/analysis/sae_transformer_bridge.py), built by another road. What it works around,
in transformer_lens 3.9 and sae_lens 6.54:

- `boot()` loads an AutoProcessor for multimodal models and, where that fails and torchvision is missing, runs
  `pip install torchvision` (model_bridge/sources/transformers.py:995-1030). Here nothing but
  `build_bridge_from_module` is called, which loads and installs nothing.
- `setup_tokenizer` reads `init_kwargs["name_or_path"]` (utilities/tokenize_utils.py:155), which a tokenizer made
  in memory lacks, and loads that name anew, possibly from the hub. Here the tokenizer is used as it is, copied.
- The model that is passed is wrapped in place and switched to eager attention. Here a tree of its own is (`sharing`).
- Hook points are missing, inert or never fire: `adapter` says which.
- Aliases, hooks and whole SAEs get lost in attaching: `splice` says how.
- What cannot fire (an unknown name, a layer at or after `stop_at_layer`) is passed over. Here it raises.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.sources import build_bridge_from_module, detect_tokenizer_bos_eos
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_lens_gemma4.errors import ConfigError, ModelError, UnknownNameError
from sae_lens_gemma4.models.adapter import adapt, connect
from sae_lens_gemma4.models.amended import AmendedBridge
from sae_lens_gemma4.models.arguments import check_filter, checked_stop, isolate, why_missing
from sae_lens_gemma4.models.cache import ByEitherName, Gemma4Cache
from sae_lens_gemma4.models.geometry import Geometry, gemma4_geometry, text_decoder
from sae_lens_gemma4.models.hook_names import bridge_path, canonical_name
from sae_lens_gemma4.models.loading import attention_of, resolve_model
from sae_lens_gemma4.models.splice import SplicesSAEs

HookList = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]

_ARCHITECTURES = {
    "Gemma4ForCausalLM": "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration": "Gemma4UnifiedForConditionalGeneration",
    "Gemma4UnifiedForCausalLM": "Gemma4ForCausalLM",  # not among TransformerLens's; the same module paths
}
"""Model class → the key of its adapter in TransformerLens's factory."""


_FORWARD_ARGUMENTS = set(inspect.signature(TransformerBridge.forward).parameters) | {
    *("use_past_kv_cache", "cache_position", "return_dict", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "image_position_ids", "mm_token_type_ids"),
}
"""What a run takes beside what transformers' forward names."""


class Gemma4Bridge(SplicesSAEs, AmendedBridge):
    """A Gemma 4 model with every hook point of `hook_names`, and TransformerLens's own. Made by `boot`.

    Any name of a hook will do, everywhere: in filters, hooks, configs, SAEs' metadata and as a cache's key. A name
    that the model lacks raises `UnknownNameError` with the nearest; a hook that the run would not come to raises
    `ConfigError`.
    """

    geometry: Geometry
    hook_aliases: dict[str, str | list[str]] = {  # noqa: RUF012
        "hook_embed": "embed.hook_out",
        "hook_unembed": "unembed.hook_out",
    }
    _forward_arguments: set[str]
    _names: dict[str, str]
    """The canonical name of every path in the registry, SAEs' left out."""

    @classmethod
    def boot(
        cls,
        model_or_name: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        model_name: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        **hf_kwargs: Any,
    ) -> Gemma4Bridge:
        """Wrap a model in memory, or load one by name and wrap it. No processor is loaded, nothing is installed.

        A model in memory stays as it is: the bridge has a module tree of its own on the same weights. Those are
        copied only where `device` or `dtype` ask for others.

        Args:
            model_or_name: a Gemma 4 model with a language-model head, with or without towers; or a hub name, a
                folder or an embedded model's name, loaded without towers by `models.loading.load_hf_model`.
            tokenizer: used as it is (as a copy); the one loaded with the model if None. A model in memory may go
                without, and then takes tokens only.
            model_name: what the model is called in `cfg.model_name`.
            attn_implementation: eager if None, so that logits are exactly those of transformers' eager attention.
                Scores and patterns can be hooked under "sdpa" as well.
            hf_kwargs: for loading by name: arguments of transformers' `from_pretrained` (`device_map`, …).

        Raises:
            ModelError: not Gemma 4, no language-model head, not loadable, or not as asked.
        """
        model, tokenizer, name = resolve_model(
            model_or_name,
            tokenizer,
            name=model_name,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation or "eager",
            own_tree=True,
            **hf_kwargs,
        )
        architecture = _architecture(model)
        geometry = gemma4_geometry(model.config)
        implementation = attention_of(model)
        owners: Any = model if isinstance(model_or_name, str | os.PathLike) else model_or_name
        bridge = build_bridge_from_module(
            model,
            architecture,
            hf_config=model.config,
            model_name=name,
            post_adapter_hook=lambda adapter: adapt(adapter, model, geometry, implementation),
        )
        bridge.__class__ = cls  # as SAETransformerBridge.boot_transformers does
        assert isinstance(bridge, cls)
        bridge.geometry = geometry
        bridge._forward_arguments = _FORWARD_ARGUMENTS | set(inspect.signature(model.forward).parameters)
        bridge._shares_weights = owners is not model and next(model.parameters()) is next(owners.parameters())
        bridge._splices = ByEitherName()
        if geometry.layers[0].has_ple:
            bridge.hook_ple_inputs = HookPoint()
        connect(bridge.blocks, text_decoder(model), getattr(bridge, "hook_ple_inputs", None))
        bridge.train(model.training)
        bridge._names = {path: canonical_name(path) for path in bridge._hook_registry}
        if tokenizer is not None:
            bridge.tokenizer = _prepared(tokenizer)
            added = detect_tokenizer_bos_eos(bridge.tokenizer)
            bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = added
        return bridge

    @classmethod
    def boot_transformers(cls, model_name: str, **kwargs: Any) -> Gemma4Bridge:  # type: ignore[override]
        """`boot`, by stock's name: `hf_model` gives a model in memory. `dtype` defaults to the checkpoint's own."""
        hf_model = kwargs.pop("hf_model", None)
        return cls.boot(model_name if hf_model is None else hf_model, model_name=model_name, **kwargs)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by its path and by its canonical name."""
        hooks = dict(self._hook_registry)
        hooks.update({name: hooks[path] for path, name in self._names.items()})
        for splice in self._splices.values():
            hooks.update({canonical_name(path): hook for path, hook in splice.hooks.items()})
        return hooks

    def hook_point(self, name: str, hint: str = "") -> HookPoint:
        """The hook point of this name, whichever of its names; `UnknownNameError` if the model has none."""
        point = self._hook_registry.get(self._resolve_hook_name(name))
        if point is None:
            raise UnknownNameError("hook", name, self.hook_dict, hint or why_missing(name, self.geometry))
        return point

    def forward(
        self,
        input: Any,
        *args: Any,
        stop_at_layer: int | None = None,
        isolate_documents: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `TransformerBridge.forward`.

        Args:
            stop_at_layer: run the layers before this one and return the residual stream that it would read; the
                number of layers returns what the final norm would read.
            isolate_documents: packed documents, each opened by BOS, do not see each other.
        """
        if unknown := sorted(set(kwargs) - self._forward_arguments):
            raise UnknownNameError("argument of the model", unknown[0], self._forward_arguments)
        if isinstance(input, torch.Tensor) and not input.numel():
            raise ConfigError(f"There are no tokens in a tensor of shape {tuple(input.shape)}.")
        if isolate_documents:
            tokens = self.to_tokens(input) if isinstance(input, str | list) else input
            input, kwargs = tokens, isolate(self.original_model, tokens, kwargs)
        if not kwargs.get("use_past_kv_cache"):
            kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
        with self._stopping(checked_stop(stop_at_layer, self.geometry.n_layers)):
            return super().forward(input, *args, **kwargs)

    def run_with_cache(
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        stop_at_layer: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `TransformerBridge.run_with_cache`; the cache is read with any name of a hook.

        Raises:
            UnknownNameError: a name in `names_filter` that the model lacks.
            ConfigError: a name that a run with this `stop_at_layer` would not come to.
        """
        if kwargs.get("incl_bwd") and stop_at_layer is not None:
            raise ConfigError("incl_bwd needs a loss, and a run with stop_at_layer has none.")
        names: Any = [names_filter] if isinstance(names_filter, str) else names_filter
        if callable(names):
            check_filter(names, self.hook_dict)
        by_name = names is not None and not callable(names)
        paths = self._paths(names) if by_name else names
        stop = checked_stop(stop_at_layer, self.geometry.n_layers, names if by_name else ())
        with self._stopping(stop):
            output, cache = super().run_with_cache(input, False, False, paths, None, *args, **kwargs)
        if not return_cache_object:
            return output, ByEitherName(cache)
        gemma4_cache = Gemma4Cache(cache, self)
        return output, gemma4_cache.remove_batch_dim() if remove_batch_dim else gemma4_cache

    def run_with_hooks(
        self,
        input: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        *args: Any,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `TransformerBridge.run_with_hooks`; errors as `run_with_cache`."""
        fwd, bwd = self._resolved(fwd_hooks), self._resolved(bwd_hooks)
        names = [name for name, _ in (*fwd_hooks, *bwd_hooks) if isinstance(name, str)]
        stop = checked_stop(stop_at_layer, self.geometry.n_layers, names)
        with self._stopping(stop):
            return super().run_with_hooks(input, fwd, bwd, *args, **kwargs)

    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), *args: Any, **kwargs: Any) -> Any:
        """As `TransformerBridge.hooks`; a hook name that the model lacks raises."""
        fwd, bwd = self._resolved(fwd_hooks), self._resolved(bwd_hooks)
        return super().hooks(fwd, bwd, *args, **kwargs)  # type: ignore[no-untyped-call]

    def add_hook(self, name: str | Callable[[str], bool], hook_fn: Any, dir: Any = "fwd", **kwargs: Any) -> None:  # type: ignore[override]
        """As `TransformerBridge.add_hook`; a hook name that the model lacks raises."""
        [(name, _)] = self._resolved([(name, hook_fn)])
        if isinstance(name, str):
            self.hook_point(name).add_hook(hook_fn, dir=dir, **kwargs)
        else:
            super().add_hook(name, hook_fn, dir, **kwargs)

    def __str__(self) -> str:
        return super().__str__().replace("TransformerBridge", type(self).__name__, 1)

    def _stack_block_params(self, attr_path: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super()._stack_block_params(attr_path, *args, **kwargs)
        except (RuntimeError, TypeError) as e:
            raise ModelError(
                f"{attr_path} differs from layer to layer: read it of one, bridge.blocks[N].{attr_path}."
            ) from e

    def _resolve_hook_name(self, hook_name: str) -> str:
        return bridge_path(hook_name)

    def _paths(self, names: Sequence[str]) -> list[str]:
        return [str(self.hook_point(name).name) for name in names]

    def _resolved(self, hooks: HookList) -> list[tuple[Any, Callable[..., Any]]]:
        """Hooks by path; a filter that matches no hook raises `ConfigError`."""
        for name, _ in hooks:
            if callable(name):
                check_filter(name, self.hook_dict)
        return [(name if callable(name) else self._paths([name])[0], hook) for name, hook in hooks]

    @contextmanager
    def _stopping(self, stop: int | None) -> Iterator[None]:
        if stop is None:
            yield
        elif stop == self.geometry.n_layers:

            def end(_: Any, args: tuple[torch.Tensor, ...]) -> None:
                raise StopAtLayerException(args[0])

            with self.ln_final.register_forward_pre_hook(end):
                yield
        else:
            self.blocks[stop]._stops_here = True
            try:
                yield
            finally:
                self.blocks[stop]._stops_here = False


def _architecture(model: PreTrainedModel) -> str:
    for base in type(model).__mro__:
        if base.__name__ in _ARCHITECTURES:
            return _ARCHITECTURES[base.__name__]
    raise ModelError(
        f"A bridge cannot be built on a {type(model).__name__}: it needs a model with a language-model head, one of "
        f"{', '.join(_ARCHITECTURES)}."
    )


def _prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that can pad a batch: the bridge sets sides and padding on its tokenizer."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
