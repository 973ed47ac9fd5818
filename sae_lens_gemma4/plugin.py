"""The door: the only module that changes anything inside another package.

What sae_lens offers a dict for is registered in it; what it reaches by a name imported into several modules is
wrapped under each of those names. `WRAPPED` lists them with their upstream lines. An upgrade that moves one
makes `register` raise a `DependencyError` that names it, rather than leave half a plugin behind.

Registering is cheap: models and catalogue are imported when first asked for, and sae_lens's directory of SAEs
(1.3 s to parse) is read when its reader first looks something up, as in stock.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any

from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS, NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class

from sae_lens_gemma4.catalogue import LOADER
from sae_lens_gemma4.errors import (
    CatalogueWarning,
    DataError,
    DependencyError,
    UnknownNameError,
    check_name,
    nearest,
    warn_caller,
)
from sae_lens_gemma4.training.fast import FAST

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
    # saes/sae.py:691, warns of a raw repository id with the first release of that repository
    "from_pretrained_with_cfg_and_sparsity": ("sae_lens.saes.sae:SAE",),
    # util.py:103, leaves turn markers among the tokens that count
    "get_special_token_ids": (
        "sae_lens.util",
        "sae_lens.training.activations_store",
        "sae_lens.evals",
        "sae_lens.analysis.hooked_sae_transformer",
        "sae_lens.multi_sae_training_runner",
    ),
    # tokenization_and_batching.py:143, renders ShareGPT's rows as empty turns
    "tokenize_with_chat_template": (
        "sae_lens.tokenization_and_batching",
        "sae_lens.training.activations_store",
        "sae_lens.pretokenize_runner",
    ),
    # training/activations_store.py:661, makes float32 of every activation
    "get_activations": ("sae_lens.training.activations_store:ActivationsStore",),
    # llm_sae_training_runner.py:276 and multi_sae_training_runner.py:602, keep whichever name of the hook was given
    "_set_sae_metadata": (
        "sae_lens.llm_sae_training_runner:LanguageModelSAETrainingRunner",
        "sae_lens.multi_sae_training_runner:MultiSAETrainingRunner",
    ),
}
"""What is wrapped, and every module or class that holds it."""
_originals: dict[tuple[str, str], tuple[Any, Any]] = {}
"""What was found and what was put there, by holder and name."""
_our_rows: set[str] = set()


def register() -> None:
    """Make Gemma 4 known to sae_lens. Twice is as good as once.

    Raises:
        DependencyError: the installed sae_lens does not have what this wraps; nothing is changed then.
    """
    if _originals:
        return
    found = {(holder, name): _lookup(holder, name) for name, holders in WRAPPED.items() for holder in holders}
    for name, holders in WRAPPED.items():
        if len({found[holder, name] for holder in holders if ":" not in holder}) > 1:
            raise DependencyError(f"sae_lens's {name} is already wrapped by another package in one of {holders}.")
    wrappers: dict[Any, Any] = {}  # one for each original, however many modules hold it
    for (holder, name), original in found.items():
        wrapper = wrappers.setdefault(original, _WRAPPERS[name](original))
        _originals[holder, name] = original, wrapper
        setattr(pkgutil.resolve_name(holder), name, wrapper)
    NAMED_PRETRAINED_SAE_LOADERS[LOADER] = _load_sae
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[LOADER] = _load_sae_config
    for architecture, classes in FAST.items():
        register_sae_training_class(architecture, *classes)


def unregister() -> None:
    """Leave sae_lens as it was before `register`."""
    if not _originals:
        return
    if _our_rows:
        stock, _ = _originals["sae_lens.loading.pretrained_saes_directory", "get_pretrained_saes_directory"]
        directory = stock()
        for name in _our_rows:
            directory.pop(name, None)
        _our_rows.clear()
    for (holder, name), (original, wrapper) in _originals.items():
        # What is not ours any more, another package has wrapped since: that stays.
        if inspect.getattr_static(pkgutil.resolve_name(holder), name) is wrapper:
            setattr(pkgutil.resolve_name(holder), name, original)
    _originals.clear()
    for registry in (NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS):
        registry.pop(LOADER, None)
    for architecture in FAST:
        SAE_TRAINING_CLASS_REGISTRY.pop(architecture, None)


def _lookup(holder: str, name: str) -> Any:
    try:
        return inspect.getattr_static(pkgutil.resolve_name(holder), name)
    except (ImportError, AttributeError) as e:
        import sae_lens

        raise DependencyError(
            f"sae_lens {sae_lens.__version__} has no {holder}.{name}, which this package extends. "
            "It is made for sae-lens >=6.54,<7; see docs/architecture.md, 'The door'."
        ) from e


def _load_sae(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> Any:
    from sae_lens_gemma4.catalogue.converter import Converter

    return Converter()(
        repo_id=repo_id,
        folder_name=folder_name,
        device=device,
        force_download=force_download,
        cfg_overrides=cfg_overrides,
    )


def _load_sae_config(*args: Any, **kwargs: Any) -> dict[str, Any]:
    from sae_lens_gemma4.catalogue.converter import Converter

    return Converter().config(*args, **kwargs)


def _wrap_from_pretrained(stock: Any) -> Any:
    @functools.wraps(stock.__func__)
    def from_pretrained_with_cfg_and_sparsity(cls: Any, release: str, sae_id: str, *args: Any, **kwargs: Any) -> Any:
        from sae_lens_gemma4.catalogue.registry import find

        directory = pkgutil.resolve_name("sae_lens.loading.pretrained_saes_directory:get_pretrained_saes_directory")()
        if release in _our_rows:
            check_name(f"SAE id of {release}", sae_id, directory[release].saes_map)
        close = [] if "/" in release or release in directory else nearest(release, directory, n=1)
        if _our_rows.intersection(close):
            raise UnknownNameError("SAE release", release, directory)
        known = find(release, sae_id) if release not in directory else None
        if known is None or known[0].name not in _our_rows:
            return stock.__func__(cls, release, sae_id, *args, **kwargs)
        registered, entry = known[0].name, known[1].id
        warn_caller(
            f"{sae_id} of the repository {release} has a name: SAE.from_pretrained({registered!r}, {entry!r}), "
            "which also sets what is known of its model and hook.",
            CatalogueWarning,
        )
        if known[0].form != "sae_lens" and kwargs.get("converter") is None:  # stock cannot read it
            release, sae_id = registered, entry
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are loading an SAE using the HuggingFace repo_id", UserWarning)
            return stock.__func__(cls, release, sae_id, *args, **kwargs)

    return classmethod(from_pretrained_with_cfg_and_sparsity)


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


def _is_gemma4(tokenizer: Any) -> bool:
    get_vocab = getattr(tokenizer, "get_vocab", None)
    return get_vocab is not None and "<|turn>" in get_vocab()


def _wrap_special_tokens(stock: Callable[..., list[int]]) -> Callable[..., list[int]]:
    @functools.wraps(stock)
    def get_special_token_ids(tokenizer: Any) -> list[int]:
        ids = stock(tokenizer)
        return sorted({*ids, *tokenizer.all_special_ids}) if _is_gemma4(tokenizer) else ids

    return get_special_token_ids


def _wrap_chat(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def tokenize_with_chat_template(conversation: Any, tokenizer: Any) -> Any:
        from sae_lens_gemma4.activations.chat import as_messages

        return stock(as_messages(conversation) if _is_gemma4(tokenizer) else conversation, tokenizer)

    return tokenize_with_chat_template


def _wrap_get_activations(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def get_activations(self: Any, batch_tokens: Any) -> Any:
        from sae_lens_gemma4.models.hook_names import has_no_batch_axis
        from sae_lens_gemma4.models.loading import is_ours

        if not is_ours(self.model):
            return stock(self, batch_tokens)
        if has_no_batch_axis(self.hook_name):
            raise DataError(f"{self.hook_name} has no batch axis: its rows cannot be told apart by document.")
        acts = stock(self, batch_tokens)
        if self.train_batch_size_tokens < 0:  # a cache is written in its config's dtype
            return acts
        return acts.to(next(self.model.parameters()).dtype)

    return get_activations


def _wrap_set_metadata(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def _set_sae_metadata(self: Any) -> None:
        from sae_lens_gemma4.models.hook_names import canonical_name, hf_name
        from sae_lens_gemma4.models.loading import is_ours

        stock(self)
        if not is_ours(self.model):
            return
        for sae in self.saes.values() if hasattr(self, "saes") else [self.sae]:
            metadata = sae.cfg.metadata
            metadata.hook_name, metadata.hf_hook_name = canonical_name(metadata.hook_name), hf_name(metadata.hook_name)

    return _set_sae_metadata


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "load_model": _wrap_load_model,
    "get_pretrained_saes_directory": _wrap_directory,
    "from_pretrained_with_cfg_and_sparsity": _wrap_from_pretrained,
    "get_special_token_ids": _wrap_special_tokens,
    "tokenize_with_chat_template": _wrap_chat,
    "get_activations": _wrap_get_activations,
    "_set_sae_metadata": _wrap_set_metadata,
}
