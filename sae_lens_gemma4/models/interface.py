"""What runners and evaluation ask of a model, so that any model of sae_lens will do: a `HookedTransformer`, a
`HookedProxyLM`, a TransformerBridge (which is no `HookedRootModule`), or a class of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from sae_lens_gemma4.errors import UnknownNameError
from sae_lens_gemma4.models.hook_names import canonical_name


class HookedModel(Protocol):
    """A language model with named hook points, a cache and a tokenizer."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def require_hook(model: HookedModel, name: str) -> str:
    """The name by which `model` knows a hook: the canonical one where it can, else as given.

    Raises:
        UnknownNameError: it has no such hook; with the nearest that it has.
    """
    for known in dict.fromkeys((canonical_name(name), name)):
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
