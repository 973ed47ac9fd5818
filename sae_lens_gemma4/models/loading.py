"""Loading a Gemma 4 model by name, for this package and for sae_lens's configs.

sae_lens finds its model through `load_model(model_class_name, model_name, …)`, an if-chain
(sae_lens/load_model.py:18); `plugin.py` puts the classes below in front of it. Text only: the vision and
audio towers of a multimodal checkpoint are never built. No processor is loaded and nothing is installed.
"""

from __future__ import annotations

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
from sae_lens_gemma4.errors import Gemma4SAEError, ModelError, check_name, nearest
from sae_lens_gemma4.models.geometry import gemma4_geometry
from sae_lens_gemma4.models.interface import HookedModel, require_hook
from sae_lens_gemma4.models.rescale import rescale_residual_

MODEL_CLASSES = ("Gemma4Bridge", "Gemma4ProxyLM")
STOCK_CLASSES = ("HookedTransformer", "HookedMamba", "AutoModelForCausalLM")
PUBLIC_MODELS = tuple(
    f"google/gemma-4-{size}{tuned}" for size in ("E2B", "E4B", "12B", "26B-A4B", "31B") for tuned in ("", "-it")
)
_TOWERS = ("vision_config", "audio_config")


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
        hf_kwargs: for transformers' `from_pretrained` (`attn_implementation`, `device_map`, `revision`, …).

    Raises:
        UnknownNameError: a model class that does not exist.
        ModelError: no such model, or not Gemma 4.
    """
    check_name("model class", model_class_name, MODEL_CLASSES)
    model, tokenizer = load_hf_model(name_or_path, device=device, dtype=dtype, **hf_kwargs)
    if model_class_name == "Gemma4ProxyLM":
        from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

        return cast(HookedModel, Gemma4ProxyLM(model, tokenizer, name=name_or_path))
    from sae_lens_gemma4.models.bridge import Gemma4Bridge

    return cast(HookedModel, Gemma4Bridge.boot(model, tokenizer, model_name=name_or_path))


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
        stock = load_stock(model_class_name, model_name, device, model_from_pretrained_kwargs, hook_names)
        return cast(HookedModel, stock)
    model = load_model(model_name, model_class_name, device, **(model_from_pretrained_kwargs or {}))
    for name in hook_names or []:
        require_hook(model, name)
    return model


def load_hf_model(
    name_or_path: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **hf_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Hugging Face model, in eval mode and without towers, and its tokenizer. Errors as `load_model`."""
    name = str(name_or_path)
    carried = embedded.MODELS.get(name)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = str_to_dtype(check_name("dtype", dtype, DTYPE_MAP))
    if dtype is None and carried is not None:
        dtype = torch.float32
    if dtype is not None:
        hf_kwargs["dtype"] = dtype
    source = str(carried.path) if carried else name
    if carried is None and "/" not in name and not Path(name).exists():  # no name on the hub lacks its author
        raise ModelError(_cannot_load(name, "there is no such folder, and a hub name has the form author/name"))
    revision = {k: hf_kwargs[k] for k in ("revision", "token", "cache_dir") if k in hf_kwargs}
    try:
        config = AutoConfig.from_pretrained(source, **revision)
        gemma4_geometry(config)
        for tower in _TOWERS:
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
        if device is not None and hf_kwargs.get("device_map") is None:
            model.to(device)
    except Gemma4SAEError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as e:
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
