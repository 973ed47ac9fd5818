"""One hook, two names: TransformerLens's (`blocks.21.hook_resid_post`) and the module path that Hugging Face
code hooks (`model.language_model.layers.21`, the layer's output). Published SAEs use either, and text-only
checkpoints lack the `language_model` part of the path; both are read everywhere and mean the same.

`SITES` says for each name which module it is and on which side of it. Modules that have no TransformerLens
name go by their path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

HF_PREFIX = "model.language_model."
_TEXT_ONLY_PREFIX = "model."


@dataclass(frozen=True)
class Site:
    """A place in the decoder: the module's path within it (`{n}` is the layer), and whether its input or output."""

    path: str
    side: Literal["in", "out"] = "out"


BLOCK_SITES = {
    "hook_resid_pre": Site("layers.{n}", "in"),
    "hook_resid_post": Site("layers.{n}"),
    "hook_attn_out": Site("layers.{n}.post_attention_layernorm"),
    "hook_mlp_out": Site("layers.{n}.post_feedforward_layernorm"),
    "hook_ple_out": Site("layers.{n}.post_per_layer_input_norm"),
    "mlp.hook_out": Site("layers.{n}.mlp"),
}
MODEL_SITES = {
    "hook_embed": Site("embed_tokens"),
    "ln_final.hook_out": Site("norm"),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"layers\.(\d+)(?:\.(.+))?")
_BLOCK_NAMES = {
    site.path.removeprefix("layers.{n}").lstrip("."): k for k, site in BLOCK_SITES.items() if site.side == "out"
}
_MODEL_NAMES = {site.path: k for k, site in MODEL_SITES.items()}


def decoder_path(name: str) -> str | None:
    """The part of an HF module path below the text decoder; None for a name that is not such a path."""
    for prefix in (HF_PREFIX, _TEXT_ONLY_PREFIX):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None


def canonical_name(name: str) -> str:
    """The one name of a hook, whichever of its names is given.

    `model.language_model.layers.3` and `model.layers.3` become `blocks.3.hook_resid_post`; a module without a
    TransformerLens name becomes its path with the prefix `model.language_model.`; anything else is returned as
    it is. Whether the model has such a hook is not checked here.
    """
    path = decoder_path(name)
    if path is None:
        return name
    if match := _LAYER.fullmatch(path):
        layer, rest = match[1], match[2] or ""
        if rest in _BLOCK_NAMES:
            return f"blocks.{int(layer)}.{_BLOCK_NAMES[rest]}"
    return _MODEL_NAMES.get(path, HF_PREFIX + path)


def site_of(name: str) -> Site | None:
    """The site of a hook by any of its names; None if the name is of no known form."""
    name = canonical_name(name)
    if match := _BLOCK.fullmatch(name):
        site = BLOCK_SITES.get(match[2])
        return None if site is None else Site(site.path.format(n=int(match[1])), site.side)
    if name in MODEL_SITES:
        return MODEL_SITES[name]
    path = decoder_path(name)
    return None if path is None else Site(path)


def hf_name(name: str) -> str | None:
    """The HF module path whose output a hook is (`hf_hook_name` in an SAE's metadata); None where it is an input."""
    site = site_of(name)
    return None if site is None or site.side == "in" else HF_PREFIX + site.path
