"""Loading a Gemma 4 model by name, for this package and for sae_lens's configs.

sae_lens finds its model through `load_model(model_class_name, model_name, …)`, an if-chain
(sae_lens/load_model.py:18); `plugin.py` puts the classes below in front of it. Text only: the vision and
audio towers of a multimodal checkpoint are never built. No processor is loaded and nothing is installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens.constants import DTYPE_MAP
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from sae_lens_gemma4 import embedded
from sae_lens_gemma4.errors import ConfigError, Gemma4SAEError, ModelError, check_name, nearest
from sae_lens_gemma4.models.geometry import gemma4_geometry
from sae_lens_gemma4.models.interface import HookedModel, require_hook
from sae_lens_gemma4.models.rescale import rescale_residual_
from sae_lens_gemma4.models.sharing import cast_, tree_on_same_weights

MODEL_CLASSES = ("Gemma4Bridge", "Gemma4ProxyLM")
STOCK_CLASSES = ("HookedTransformer", "HookedMamba", "AutoModelForCausalLM")
PUBLIC_MODELS = tuple(
    f"google/gemma-4-{size}{tuned}" for size in ("E2B", "E4B", "12B", "26B-A4B", "31B") for tuned in ("", "-it")
)
_TOWERS = ("vision_config", "audio_config")
_UNLOADABLE = (OSError, ValueError, TypeError, RuntimeError, ImportError, AssertionError, SafetensorError)
"""What transformers, its hub client and torch raise where a model cannot be had as asked."""


def load_model(
    name_or_path: str,
    model_class_name: str = "Gemma4Bridge",
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    **hf_kwargs: Any,
) -> HookedModel:
    """Load a Gemma 4 model with hook points.

    Args:
        name_or_path: a name on the hub, a local folder, or an embedded model (`gemma-4-demo`,
            `gemma-4-demo-it`, `gemma-4-demo-it-rescaled`).
        model_class_name: "Gemma4Bridge" or "Gemma4ProxyLM".
        dtype: the checkpoint's own if None; float32 for the embedded models.
        hf_kwargs: for transformers' `from_pretrained`: `attn_implementation`, `device_map` (then `device` is not
            used), `quantization_config`, `revision`, …; and `towers=True` to load vision and audio as well.

    Raises:
        UnknownNameError: a model class that does not exist.
        ModelError: no such model, or not Gemma 4.
    """
    check_name("model class", model_class_name, MODEL_CLASSES)
    arguments = {"device": device, "dtype": dtype, **hf_kwargs}
    if model_class_name == "Gemma4ProxyLM":
        from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

        return cast(HookedModel, Gemma4ProxyLM(name_or_path, **arguments))
    from sae_lens_gemma4.models.bridge import Gemma4Bridge

    return cast(HookedModel, Gemma4Bridge.boot(name_or_path, **arguments))


def load_for_sae_lens(
    model_class_name: str,
    model_name: str,
    device: str | torch.device | None = None,
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
    hook_names: list[str] | None = None,
) -> HookedModel:
    """A model of any class that sae_lens's configs name, this package's or stock's; the signature is stock's.

    For the classes of this package `hook_names` are checked at once. Errors as `load_model`.
    """
    if model_class_name not in MODEL_CLASSES:
        from sae_lens.load_model import load_model as load_stock

        check_name("model class", model_class_name, (*MODEL_CLASSES, *STOCK_CLASSES))
        try:
            stock = load_stock(model_class_name, model_name, device, model_from_pretrained_kwargs, hook_names)
        except _UNLOADABLE as e:
            raise ModelError(_cannot_load(model_name, str(e) or type(e).__name__)) from e
        return cast(HookedModel, stock)
    model = load_model(model_name, model_class_name, device, **(model_from_pretrained_kwargs or {}))
    for name in hook_names or []:
        require_hook(model, name)
    return model


def is_ours(model: object) -> bool:
    """Whether a model is of a class of this package."""
    return any(base.__name__ in MODEL_CLASSES for base in type(model).__mro__)


def isolation(model: Any, isolate_documents: bool) -> dict[str, bool]:
    """What to pass to a run of `model` so that documents packed into one block do not see each other, or do.

    Raises:
        ConfigError: they shall not, with a model of another package.
    """
    if isolate_documents and not is_ours(model):
        raise ConfigError(f"isolate_documents needs {' or '.join(MODEL_CLASSES)}, not {type(model).__name__}.")
    return {"isolate_documents": True} if isolate_documents else {}


def resolve_model(
    model_or_name: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
    own_tree: bool,
    **hf_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]:
    """The model, tokenizer and name that a model class is built on, from whatever it is given.

    A model in memory is never changed. It comes back as it is, or, where `own_tree` or an argument asks for another
    one, as a module tree of its own: on the same weights, or on a copy where `device` or `dtype` differ.
    """
    if isinstance(model_or_name, str | os.PathLike):
        loaded_name = str(model_or_name)
        if attn_implementation is not None:
            hf_kwargs["attn_implementation"] = attn_implementation
        model, loaded = load_hf_model(loaded_name, device=device, dtype=dtype, **hf_kwargs)
        return model, loaded if tokenizer is None else tokenizer, name or loaded_name
    model = model_or_name
    gemma4_geometry(getattr(model, "config", None))
    if hf_kwargs:
        raise ModelError(f"{', '.join(hf_kwargs)}: these apply to a model loaded by name, not to one in memory.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"A {type(tokenizer).__name__} is not a tokenizer; of a processor, pass its .tokenizer.")
    to_device = None if device is None else torch.device(device)
    if to_device is not None and to_device.type == model.device.type and to_device.index in (None, model.device.index):
        to_device = None
    to_dtype = None if dtype in (None, "auto") else as_dtype(dtype)
    if to_dtype == model.dtype:
        to_dtype = None
    if (to_device or to_dtype) and (getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")):
        raise ModelError("A model that is quantised, or placed by a device_map, cannot be cast or moved: load it anew.")
    name = name or str(model.config._name_or_path) or type(model).__name__
    if own_tree or to_device or to_dtype or attn_implementation not in (None, attention_of(model)):
        model = tree_on_same_weights(model)
    if to_device or to_dtype:
        cast_(model, to_device, to_dtype)
    if attn_implementation is not None and model is not model_or_name:
        set_attention(model, attn_implementation)
    return model, tokenizer, name


def attention_of(model: PreTrainedModel) -> str:
    """The name of the text decoder's attention function."""
    return str(model.config.get_text_config()._attn_implementation)


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Switch the attention function of a model that is ours, but for eager the text decoder's alone (an audio tower
    knows no sdpa); `ModelError` if transformers has none of this name."""
    alone = implementation != "eager" and model.config.get_text_config() is not model.config
    try:
        model.set_attn_implementation({"text_config": implementation} if alone else implementation)
    except (ValueError, ImportError) as e:
        raise ModelError(f"attn_implementation={implementation!r} cannot be used: {e}") from e


def as_dtype(dtype: Any) -> torch.dtype:
    """A dtype by itself or by its name; `UnknownNameError` for another name."""
    return dtype if isinstance(dtype, torch.dtype) else str_to_dtype(check_name("dtype", str(dtype), DTYPE_MAP))


def load_hf_model(
    name_or_path: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    towers: bool = False,
    **hf_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Hugging Face model, in eval mode, and its tokenizer; vision and audio towers only if asked for.

    `device` is where it goes unless `device_map` or a quantisation has placed it. Errors as `load_model`.
    """
    name = str(name_or_path)
    carried = embedded.MODELS.get(name)
    dtype = hf_kwargs.pop("torch_dtype", dtype)  # transformers' older name
    if dtype is None and carried is not None:
        dtype = torch.float32
    if dtype is not None:
        hf_kwargs["dtype"] = dtype if dtype == "auto" else as_dtype(dtype)
    source = str(carried.path) if carried else name
    if carried is None and "/" not in name and not Path(name).exists():  # no name on the hub lacks its author
        raise ModelError(_cannot_load(name, "there is no such folder, and a hub name has the form author/name"))
    revision = {k: hf_kwargs[k] for k in ("revision", "token", "cache_dir") if k in hf_kwargs}
    try:
        config = AutoConfig.from_pretrained(source, **revision)
        gemma4_geometry(config)
        for tower in () if towers else _TOWERS:
            if getattr(config, tower, None) is not None:
                setattr(config, tower, None)
        with _quietly(bars=carried is None):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, config=config, output_loading_info=True, **hf_kwargs
            )
        model, report = loaded
        if missing := sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"]))):
            raise ModelError(f"Model {name!r} lacks weights or has them in another shape: {', '.join(missing[:4])}.")
        tokenizer = AutoTokenizer.from_pretrained(str(embedded.TOKENIZER) if carried else source, **revision)
        placed = hf_kwargs.get("device_map") is not None or getattr(model, "is_quantized", False)
        if device is not None and not placed:
            model.to(device)
    except Gemma4SAEError:
        raise
    except _UNLOADABLE as e:
        raise ModelError(_cannot_load(name, str(e) or type(e).__name__)) from e
    if carried is not None and carried.residual_scale != 1.0:
        rescale_residual_(model, carried.residual_scale)
    return model.eval(), tokenizer


@contextmanager
def _quietly(*, bars: bool) -> Iterator[None]:
    """Without transformers' list of the tower weights that were left out on purpose, and with or without its bars."""
    level, shown = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not bars:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


def _cannot_load(name: str, reason: str) -> str:
    known = [*embedded.MODELS, *PUBLIC_MODELS]
    close = [] if name in known else nearest(name, known)
    hint = " Did you mean " + " or ".join(repr(n) for n in close) + "?" if close else ""
    return f"Model {name!r} cannot be loaded.{hint} ({reason.strip().splitlines()[0]})"
