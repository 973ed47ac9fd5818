"""Gemma 4 behind TransformerLens's hook names, with sae_lens's methods for attaching SAEs.

An `SAETransformerBridge` (sae_lens/analysis/sae_transformer_bridge.py), built by another road and made to fail
aloud. What it works around, in transformer_lens 3.9 and sae_lens 6.54:

- `boot()` loads an AutoProcessor for multimodal models and, where that fails and torchvision is missing, runs
  `pip install torchvision` (model_bridge/sources/transformers.py:995-1030). Here nothing but
  `build_bridge_from_module` is called, which loads and installs nothing.
- `setup_tokenizer` reads `init_kwargs["name_or_path"]` (utilities/tokenize_utils.py:155), which a tokenizer made
  in memory lacks, and loads that name anew, possibly from the hub. Here the tokenizer is used as it is, copied.
- The adapter maps vision parts that a model without towers lacks, and their hooks would never fire.
- `SAETransformerBridge.hook_dict` (:425) drops aliases, so that hooks on `blocks.2.hook_resid_post` never fire; a
  reset (:248) leaves a new hook point under a wrong name, without the old one's hooks and reshaping; and an SAE
  whose hook does not exist is skipped with a log line (:143).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper, set_deep_attr
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources import build_bridge_from_module, detect_tokenizer_bos_eos
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_lens_gemma4.errors import ModelError, SAEError, UnknownNameError
from sae_lens_gemma4.models.geometry import gemma4_geometry

HookList = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]

_ARCHITECTURES = {
    "Gemma4ForCausalLM": "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration": "Gemma4UnifiedForConditionalGeneration",
    "Gemma4UnifiedForCausalLM": "Gemma4ForCausalLM",  # not among TransformerLens's; the same module paths
}
"""Model class → the key of its adapter in TransformerLens's factory."""


class Gemma4Bridge(SAETransformerBridge):
    """A Gemma 4 model with hook points that either fire or raise. Made by `boot`.

    An unknown hook name raises `UnknownNameError` in `run_with_cache`, `run_with_hooks`, `hooks`, `add_hook` and
    `add_sae`, and so does a hook point that an attached SAE stands in for.
    """

    _own_hook_points: dict[str, HookPoint]

    @classmethod
    def boot(
        cls,
        model_or_name: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        model_name: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **hf_kwargs: Any,
    ) -> Gemma4Bridge:
        """Wrap a model in memory, or load one by name and wrap it. No processor is loaded, nothing is installed.

        A model in memory is wrapped in place. Its weights are neither moved, cast nor copied, but TransformerLens
        puts its wrappers into the model's module tree (save it before, not after: its state dict has other names
        then), gives `lm_head` a bias of zeros, and switches it for good from sdpa to eager attention, towers
        included (`ArchitectureAdapter.prepare_model`): `attn.hook_pattern` needs the weights that only eager
        attention returns. Logits therefore equal those of eager transformers exactly.

        Args:
            model_or_name: a Gemma 4 model with a language-model head, with or without towers; or a hub name, a
                folder or an embedded model's name, loaded without towers by `models.loading.load_hf_model`.
            tokenizer: used as it is (as a copy); the one loaded with the model if None. A model in memory may go
                without, and then takes tokens only.
            model_name: what the model is called in `cfg.model_name`.
            device, dtype: for loading by name. A model in memory must already agree with them.
            hf_kwargs: for loading by name: arguments of transformers' `from_pretrained`.

        Raises:
            ModelError: not Gemma 4, no language-model head, not loadable, or not as `device` and `dtype` ask.
        """
        if isinstance(model_or_name, str | os.PathLike):
            from sae_lens_gemma4.models.loading import load_hf_model

            name = str(model_or_name)
            model, loaded_tokenizer = load_hf_model(name, device=device, dtype=dtype, **hf_kwargs)
            return cls._wrap(model, loaded_tokenizer if tokenizer is None else tokenizer, model_name or name)
        _check_in_memory(model_or_name, device, dtype, hf_kwargs)
        return cls._wrap(model_or_name, tokenizer, model_name)

    @classmethod
    def boot_transformers(cls, model_name: str, **kwargs: Any) -> Gemma4Bridge:  # type: ignore[override]
        """`boot`, by stock's name: `hf_model` gives a model in memory. `dtype` defaults to the checkpoint's own."""
        hf_model = kwargs.pop("hf_model", None)
        return cls.boot(model_name if hf_model is None else hf_model, model_name=model_name, **kwargs)

    @classmethod
    def _wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, model_name: str | None
    ) -> Gemma4Bridge:
        architecture = _architecture(model)
        bridge = build_bridge_from_module(
            model,
            architecture,
            hf_config=model.config,
            model_name=model_name or model.config._name_or_path or architecture,
            post_adapter_hook=lambda adapter: _drop_missing_towers(adapter, model),
        )
        bridge.__class__ = cls  # as SAETransformerBridge.boot_transformers does
        assert isinstance(bridge, cls)
        bridge._acts_to_saes = {}
        bridge._transcoder_output_hooks = {}
        bridge._own_hook_points = {}
        if tokenizer is not None:
            bridge.tokenizer = _prepared(tokenizer)
            added = detect_tokenizer_bos_eos(bridge.tokenizer)
            bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = added
        return bridge

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by every name it has; those of an attached SAE instead of the one it stands in for."""
        hooks = dict(super().hook_dict)
        hooks.update({alias: hooks[path] for alias, path in self._aliases().items() if path in hooks})
        return hooks

    def hook_point(self, name: str) -> HookPoint:
        """The hook point of this name; `UnknownNameError` if the model has none."""
        hooks = self.hook_dict
        if name in hooks:
            return hooks[name]
        path = self._resolve_hook_name(name)
        attached = isinstance(self._hook_registry.get(path), _SAEWrapper)
        hint = f"An SAE is attached there: hook {path}.hook_sae_input or {path}.hook_sae_output." if attached else ""
        raise UnknownNameError("hook", name, hooks, hint)

    def run_with_cache(
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: str | list[str] | Callable[[str], bool] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `TransformerBridge.run_with_cache`; a name in `names_filter` that the model lacks raises."""
        self._check_hooks([names_filter] if isinstance(names_filter, str) else names_filter)
        return super().run_with_cache(  # type: ignore[call-overload]
            input, return_cache_object, remove_batch_dim, names_filter, *args, **kwargs
        )

    def run_with_hooks(
        self, input: Any, fwd_hooks: HookList = (), bwd_hooks: HookList = (), *args: Any, **kwargs: Any
    ) -> Any:
        """As `TransformerBridge.run_with_hooks`; a hook name that the model lacks raises."""
        self._check_hooks(name for name, _ in (*fwd_hooks, *bwd_hooks))
        return super().run_with_hooks(input, list(fwd_hooks), list(bwd_hooks), *args, **kwargs)

    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), *args: Any, **kwargs: Any) -> Any:
        """As `TransformerBridge.hooks`; a hook name that the model lacks raises."""
        self._check_hooks(name for name, _ in (*fwd_hooks, *bwd_hooks))
        return super().hooks(list(fwd_hooks), list(bwd_hooks), *args, **kwargs)  # type: ignore[no-untyped-call]

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """As `TransformerBridge.add_hook`; a hook name that the model lacks raises."""
        self._check_hooks([name])
        super().add_hook(name, *args, **kwargs)

    def add_sae(self, sae: SAE[Any], use_error_term: bool | None = None) -> None:
        """Attach an SAE or transcoder until `reset_saes`; one already there by the same name is replaced.

        Raises:
            UnknownNameError: the model has no hook of the SAE's `hook_name` or `hook_name_out`.
            SAEError: the SAE names no hook; hooks wait at the point that it would stand in for and would no longer
                fire; or an attached SAE is in the way: at that point by another name, elsewhere by this name, or
                where a transcoder reads.
        """
        metadata = sae.cfg.metadata
        if not metadata.hook_name:
            raise SAEError("This SAE's metadata has no hook_name: set sae.cfg.metadata.hook_name before attaching it.")
        names = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
        source, path = (self._resolve_hook_name(name) for name in names)
        for name, where in zip(names, (source, path), strict=True):
            if where not in self._hook_registry:
                raise UnknownNameError("hook", name, self.hook_dict, "The SAE's metadata names it.")
        read: Any = self._hook_registry[source]
        point: Any = self._hook_registry[path]
        for act_name, attached in self._acts_to_saes.items():
            if (read is not point and attached is read) or (attached is point) != (act_name == metadata.hook_name):
                raise SAEError(f"The SAE attached as {act_name} is in the way of one at {path}: reset it first.")
        if isinstance(point, HookPoint):
            if point.has_hooks():
                raise SAEError(f"Hooks wait at {path} and would not fire under an SAE: remove them first.")
            self._own_hook_points[path] = point
        super().add_sae(sae, use_error_term=use_error_term)

    def _reset_sae(self, act_name: str, prev_wrapper: _SAEWrapper | None = None) -> None:
        path = self._transcoder_output_hooks.get(act_name) or self._resolve_hook_name(act_name)
        was_attached = act_name in self._acts_to_saes
        super()._reset_sae(act_name)
        if was_attached:
            point = self._own_hook_points[path]
            set_deep_attr(self, path, point)
            point.name = path  # set_deep_attr renames it to the last part
            self._hook_registry[path] = point
        if prev_wrapper is not None:
            self.add_sae(prev_wrapper.sae, use_error_term=prev_wrapper.use_error_term)

    def _resolve_hook_name(self, hook_name: str) -> str:
        return self._aliases().get(hook_name, hook_name)

    def _aliases(self) -> dict[str, str]:
        """Alias → path. Stock does not resolve those with several possible targets (`hook_embed`)."""
        aliases = {}
        for alias, targets in self.hook_aliases.items():
            for target in [targets] if isinstance(targets, str) else targets:
                if target in self._hook_registry:
                    aliases[alias] = target
                    break
        aliases.update(self._collect_hook_aliases_from_registry())  # type: ignore[no-untyped-call]
        return aliases

    def _check_hooks(self, names: Iterable[Any] | Callable[[str], bool] | None) -> None:
        """Raise `UnknownNameError` for the first string that is no hook's name; filter functions pass."""
        if names is None or callable(names):
            return
        known = self.hook_dict
        for name in names:
            if isinstance(name, str) and name not in known:
                self.hook_point(name)


def _architecture(model: PreTrainedModel) -> str:
    for base in type(model).__mro__:
        if base.__name__ in _ARCHITECTURES:
            return _ARCHITECTURES[base.__name__]
    raise ModelError(
        f"A bridge cannot be built on a {type(model).__name__}: it needs a model with a language-model head, one of "
        f"{', '.join(_ARCHITECTURES)}."
    )


def _check_in_memory(
    model: Any, device: str | torch.device | None, dtype: str | torch.dtype | None, hf_kwargs: dict[str, Any]
) -> None:
    """A model in memory is neither moved nor cast, so what it is asked to be it must be already."""
    gemma4_geometry(getattr(model, "config", None))
    if hf_kwargs:
        raise ModelError(f"{', '.join(hf_kwargs)}: these apply to a model loaded by name, not to one in memory.")
    if dtype is not None and str(dtype).removeprefix("torch.") != str(model.dtype).removeprefix("torch."):
        raise ModelError(f"The model in memory is {model.dtype}, not {dtype}: cast it before wrapping it.")
    if device is not None:
        asked = torch.device(device)
        if asked.type != model.device.type or asked.index not in (None, model.device.index):
            raise ModelError(f"The model in memory is on {model.device}, not {asked}: move it before wrapping it.")


def _drop_missing_towers(adapter: ArchitectureAdapter, model: PreTrainedModel) -> None:
    """Unmap the vision parts this model lacks. TransformerLens calls a model multimodal if it takes images."""
    parts = adapter.components
    for key, name in (("vision_encoder", "vision_tower"), ("vision_projector", "embed_vision")):
        if getattr(model.model, name, None) is None:
            parts.pop(key, None)
    adapter.cfg.is_multimodal = "vision_projector" in parts


def _prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that can pad a batch: the bridge sets sides and padding on its tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"A {type(tokenizer).__name__} is not a tokenizer; of a processor, pass its .tokenizer.")
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
