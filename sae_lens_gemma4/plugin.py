"""The door: the only module that changes anything inside another package.

What sae_lens offers a dict for is registered in it; what it reaches by a name imported into several modules is
wrapped under each of those names. `WRAPPED` lists them with their upstream lines. An upgrade that moves one
makes `register` raise a `DependencyError` that names it, rather than leave half a plugin behind.

Registering is cheap: models and catalogue are imported when first asked for, and sae_lens's directory of SAEs
(1.3 s to parse) is read when its reader first looks something up, as in stock.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS, NAMED_PRETRAINED_SAE_LOADERS

from sae_lens_gemma4.catalogue.formats import package
from sae_lens_gemma4.errors import DependencyError, UnknownNameError

WRAPPED = {
    # load_model.py:18, an if-chain over class names
    "load_model": (
        "sae_lens.load_model",
        "sae_lens.llm_sae_training_runner",
        "sae_lens.multi_sae_training_runner",
        "sae_lens.cache_activations_runner",
    ),
    # loading/pretrained_saes_directory.py:23, a cached function over one YAML
    "get_pretrained_saes_directory": (
        "sae_lens.loading.pretrained_saes_directory",
        "sae_lens.loading.pretrained_sae_loaders",
        "sae_lens.saes.sae",
        "sae_lens.evals",
    ),
}
_originals: dict[tuple[str, str], Any] = {}
_our_rows: set[str] = set()


def register() -> None:
    """Make Gemma 4 known to sae_lens. Twice is as good as once.

    Raises:
        DependencyError: the installed sae_lens does not have what this wraps; nothing is changed then.
    """
    if _originals:
        return
    found = {}
    for name, modules in WRAPPED.items():
        originals = [_lookup(module, name) for module in modules]
        if any(o is not originals[0] for o in originals):
            raise DependencyError(f"sae_lens's {name} is already wrapped by another package in one of {modules}.")
        found[name] = originals[0]
    wrappers = {
        "load_model": _wrap_load_model(found["load_model"]),
        "get_pretrained_saes_directory": _wrap_directory(found["get_pretrained_saes_directory"]),
    }
    for name, modules in WRAPPED.items():
        for module in modules:
            _originals[module, name] = found[name]
            setattr(importlib.import_module(module), name, wrappers[name])
    NAMED_PRETRAINED_SAE_LOADERS[package.NAME] = package.load
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[package.NAME] = package.load_config


def unregister() -> None:
    """Leave sae_lens as it was before `register`."""
    if not _originals:
        return
    if _our_rows:
        directory = _originals["sae_lens.loading.pretrained_saes_directory", "get_pretrained_saes_directory"]()
        for name in _our_rows:
            directory.pop(name, None)
        _our_rows.clear()
    for (module, name), original in _originals.items():
        setattr(importlib.import_module(module), name, original)
    _originals.clear()
    for registry in (NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS):
        registry.pop(package.NAME, None)


def _lookup(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        import sae_lens

        raise DependencyError(
            f"sae_lens {sae_lens.__version__} has no {module}.{name}, which this package extends. "
            "It is made for sae-lens >=6.54,<7; see docs/architecture.md, 'The door'."
        ) from e


def _wrap_load_model(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load_model(model_class_name: str, *args: Any, **kwargs: Any) -> Any:
        from sae_lens_gemma4.models.loading import MODEL_CLASSES, STOCK_CLASSES, load_for_sae_lens

        if model_class_name in MODEL_CLASSES:
            return load_for_sae_lens(model_class_name, *args, **kwargs)
        try:
            return stock(model_class_name, *args, **kwargs)
        except ValueError as e:
            if str(e).startswith("Unknown model class"):
                raise UnknownNameError("model class", model_class_name, (*MODEL_CLASSES, *STOCK_CLASSES)) from e
            raise

    return load_model


def _wrap_directory(stock: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    @functools.wraps(stock)
    def get_pretrained_saes_directory() -> dict[str, Any]:
        directory = stock()
        from sae_lens_gemma4.catalogue.registry import releases

        for name, release in releases().items():
            if name not in directory:  # a row of stock's wins
                directory[name] = release.lookup()
                _our_rows.add(name)
        return directory

    for name in ("cache_clear", "cache_info"):
        setattr(get_pretrained_saes_directory, name, getattr(stock, name))
    return get_pretrained_saes_directory
