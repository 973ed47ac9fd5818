"""What both model classes take and transformers does not, checked: hook names and filters, `stop_at_layer`,
`isolate_documents`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.models.geometry import Geometry
from sae_lens_gemma4.models.hook_names import canonical_name, layer_of, lies_beyond

_CLASHES = ("attention_mask", "position_ids", "past_key_values", "use_cache")


def checked_stop(stop_at_layer: int | None, n_layers: int, names: Iterable[str] = ()) -> int | None:
    """The layer before which a run stops, counted from the front; `n_layers` is the final norm.

    Raises:
        ConfigError: no such layer, or a hook of `names` that the run would never come to.
    """
    if stop_at_layer is None:
        return None
    if not isinstance(stop_at_layer, int):
        raise ConfigError(f"stop_at_layer must be an integer, not {stop_at_layer!r}.")
    if not -n_layers <= stop_at_layer <= n_layers:
        raise ConfigError(f"stop_at_layer must lie in {-n_layers}..{n_layers}, not {stop_at_layer}.")
    stop = stop_at_layer + n_layers if stop_at_layer < 0 else stop_at_layer
    for name in names:
        if lies_beyond(name, stop):
            raise ConfigError(f"{name} would not fire: a run with stop_at_layer={stop_at_layer} never comes to it.")
    return stop


def check_filter(matches: Callable[[str], bool], names: Iterable[str]) -> None:
    """Raise `ConfigError` for a filter that matches no hook of the model: nothing would fire, and nothing be said."""
    if not any(map(matches, names)):
        raise ConfigError("The filter matches no hook of this model.")


def why_missing(name: str, geometry: Geometry) -> str:
    """What to say of a hook that other layers have and this one has not."""
    name, layer = canonical_name(name), layer_of(name)
    if layer is None or layer >= geometry.n_layers or not name.endswith((".attn.hook_k", ".attn.hook_v")):
        return ""
    source = geometry.layers[layer].kv_source
    reason = "makes its values of its keys" if source == layer else f"attends with keys and values of layer {source}"
    return f"Layer {layer} {reason}: see {name}_used."


def isolate(model: Any, tokens_bp: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which packed documents, each opened by BOS, do not see each other.

    Positions begin anew with each document, and without a mask and a cache transformers takes such positions for
    packed sequences (masking_utils.py, `find_packed_sequence_indices`), whatever the attention function.
    """
    for name in _CLASHES:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ConfigError(f"isolate_documents sets positions itself and cannot go with {name}.")
    bos = model.config.get_text_config().bos_token_id
    if bos is None or tokens_bp.ndim != 2 or tokens_bp.is_floating_point():
        raise ConfigError("isolate_documents needs tokens [batch, pos] and a model whose config names its BOS.")
    if not (tokens_bp[:, 1:] == bos).any():
        warnings.warn("isolate_documents: no BOS opens a second document in any row of these tokens.", stacklevel=3)
    positions = torch.arange(tokens_bp.shape[1], device=tokens_bp.device).expand_as(tokens_bp)
    starts = torch.where(tokens_bp == bos, positions, 0).cummax(dim=1).values
    return {**kwargs, "position_ids": positions - starts, "use_cache": False}
