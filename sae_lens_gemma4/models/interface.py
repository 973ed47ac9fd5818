"""What runners and evaluation ask of a model, so that any model of sae_lens will do: a `HookedTransformer`, a
`HookedProxyLM`, a TransformerBridge (which is no `HookedRootModule`), or a class of this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from sae_lens import SAE
from torch import nn
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.errors import ModelError, UnknownNameError
from sae_lens_gemma4.models.hook_names import HF_PREFIX, TEXT_ONLY_PREFIX, canonical_name, hf_name

_ENTRY = ("blocks.0.hook_resid_pre", "hook_embed")


class HookedModel(Protocol):
    """A language model with named hook points, a cache and a tokenizer."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def require_hook(model: HookedModel, name: str) -> str:
    """The name by which `model` knows a hook: the canonical one where it can, else as given, else the HF path, which is
    all that a `HookedProxyLM` of another package's model knows.

    Raises:
        UnknownNameError: it has no such hook; with the nearest that it has.
    """
    path = hf_name(name) or name
    for known in dict.fromkeys((canonical_name(name), name, path, path.replace(HF_PREFIX, TEXT_ONLY_PREFIX, 1))):
        if _has_hook(model, known):
            return known
    raise UnknownNameError("hook", name, model.hook_dict)


def _has_hook(model: HookedModel, name: str) -> bool:
    hook_point = getattr(model, "hook_point", None)
    if hook_point is None:
        resolve = getattr(model, "_resolve_hook_name", str)  # a TransformerBridge's alias to its registry's name
        return resolve(name) in model.hook_dict
    try:  # the classes of this package
        hook_point(name)
    except UnknownNameError:
        return False
    return True


def model_name(model: HookedModel) -> str | None:
    """What the model is called, if it says."""
    return getattr(model, "model_name", None) or getattr(getattr(model, "cfg", None), "model_name", None)


def n_layers_of(model: HookedModel) -> int:
    """How many layers the model has: of its text decoder, where it has others.

    Raises:
        ModelError: it does not say.
    """
    hf_model: Any = getattr(model, "original_model", None) or getattr(model, "model", None)
    text_config = getattr(getattr(hf_model, "config", None), "get_text_config", None)
    if text_config is not None:
        return int(text_config().num_hidden_layers)
    n_layers = getattr(getattr(model, "cfg", None), "n_layers", None)
    if n_layers is None:
        raise ModelError(f"This {type(model).__name__} does not say how many layers it has, in cfg.n_layers or config.")
    return int(n_layers)


def entry_hook(model: HookedModel) -> str:
    """The hook of what enters the first layer, by the first canonical name that the model knows (see `require_hook`).
    In Gemma both are the scaled embeddings; with the former a forward pass can stop before the unembedding.

    Raises:
        ModelError: it has no such hook.
    """
    for name in _ENTRY:
        try:
            require_hook(model, name)
        except UnknownNameError:
            continue
        return name
    raise ModelError(f"This {type(model).__name__} has no hook for what enters its first layer: {' or '.join(_ENTRY)}.")


def vocab_size(model: HookedModel) -> int | None:
    """How many tokens the model has embeddings for, if it says."""
    config = getattr(getattr(model, "model", None), "config", None)  # a HookedProxyLM's model of transformers
    if config is not None and hasattr(config, "get_text_config"):
        return int(config.get_text_config().vocab_size)
    size = getattr(getattr(model, "cfg", None), "d_vocab", None)
    return None if size is None or size < 1 else int(size)


def warn_if_base_sae(sae: SAE[Any], model: HookedModel) -> None:
    """Warn, once for each pair of models, of an SAE that was trained on another Gemma 4 than it is attached to."""
    theirs, ours = sae.cfg.metadata.model_name, model_name(model)
    trained, attached = _family(theirs), _family(ours)
    warned: set[tuple[str | None, str | None]] = model.__dict__.setdefault("_warned_of_saes", set())
    if trained is None or attached is None or trained == attached or (theirs, ours) in warned:
        return
    warned.add((theirs, ours))
    advice = "Its features mean nothing there."
    if trained[0] == attached[0]:
        advice = (
            "SAEs can collapse between the base and the tuned model: measure this one there (sae-lens-gemma4 evaluate) "
            "and, if it is a misfit, continue its training (sae-lens-gemma4 train; docs/recipes.md)."
        )
    where = sae.cfg.metadata.hook_name
    warnings.warn(f"The SAE at {where} was trained on {theirs} and is attached to {ours}. {advice}", stacklevel=3)


def _family(name: str | None) -> tuple[str, bool] | None:
    """Which Gemma 4 a name means, and whether the tuned one: `google/gemma-4-E4B-it` is `("gemma-4-e4b", True)`."""
    parts = str(name).rsplit("/", 1)[-1].lower().split("-")
    if parts[:2] != ["gemma", "4"]:
        return None
    tuned = "it" in parts
    return "-".join(parts[: parts.index("it")] if tuned else [p for p in parts if p not in ("pt", "base")]), tuned
