"""A published SAE becomes trainable again, and a training SAE takes the form it is published in.

sae_lens saves a batch top-k SAE as a JumpReLU: decoder norms folded in, one threshold for all latents. Stock's
`from_pretrained_path` takes such a folder for a JumpReLU *training* SAE, ignores the config asked for, and trains
the wrong thing without a word. Here the class comes from the metadata (`training_architecture`), the threshold
goes back where it came from, in float64, and what cannot be carried over exactly is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from sae_lens import SAE, SAEConfig, TrainingSAE
from sae_lens.loading import pretrained_saes_directory
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.util import str_to_dtype

from sae_lens_gemma4.catalogue.converter import converter
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.errors import Gemma4SAEError, SAEError, UnknownNameError, check_name, nearest
from sae_lens_gemma4.mapping import typed

T = TypeVar("T", bound=SAE[Any])
_SAVED_AS = {"matryoshka_batchtopk": "jumprelu", "batchtopk": "jumprelu", "topk": "topk"}
_MUST_BE_STATED = ("k", "rescale_acts_by_decoder_norm", "matryoshka_widths")
_FACTS = {
    "d_in", "d_sae", "dtype", "device", "metadata", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "decoder_init_norm",
}  # fmt: skip
"""Fields of a config that are the weights' own, and no settings."""
_UNIFORM = 1e-6  # relative spread of per-latent thresholds that one number may stand for
_UNIT = 1e-2  # how far from 1 the norms of folded decoder rows may be, bf16 included


def load_sae(
    release_or_path: str | Path, sae_id: str | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> SAE[Any]:
    """An SAE from a folder or weights file of any form known here, or from a release or hub repository by its id.

    Raises:
        UnknownNameError: neither a folder nor a release, or a release without such an SAE.
        SAEError: files that cannot be read, with the folder or repository.
        HubError: files that cannot be downloaded.
    """
    name, path = str(release_or_path), Path(release_or_path)
    if sae_id is None and path.exists():
        with _readable(str(path)):
            return SAE.load_from_disk(path, device=device, dtype=dtype, converter=converter())
    directory = pretrained_saes_directory.get_pretrained_saes_directory()
    if name in directory:
        known = list(directory[name].saes_map)
        if sae_id is None:
            raise SAEError(f"Release {name} needs an SAE id, one of: {', '.join(known[:8])}.")
        check_name(f"SAE id of {name}", sae_id, known)
    elif "/" not in name or path.exists() or sae_id is None:
        raise UnknownNameError("SAE release or folder", name, directory if nearest(name, directory) else releases())
    assert sae_id is not None
    with _readable(f"{sae_id} of {directory[name].repo_id if name in directory else name}"):
        return SAE.from_pretrained(name, sae_id, device=device, dtype=dtype)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Whatever stock meets while it downloads and parses, as one `SAEError` that names what was read."""
    try:
        yield
    except Gemma4SAEError:
        raise
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else ""
        raise SAEError(f"SAE {what} cannot be read: {type(e).__name__}: {reason}") from e


def restore_training_sae(
    release_or_path: str | Path,
    sae_id: str | None = None,
    *,
    architecture: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    **overrides: Any,
) -> TrainingSAE[Any]:
    """A trainable SAE from a published one. Source and errors as `load_sae`, the rest as `training_form`."""
    sae = load_sae(release_or_path, sae_id, device=device)
    return training_form(sae, architecture=architecture, dtype=dtype, **overrides)


@torch.no_grad()
def training_form(
    sae: SAE[Any], *, architecture: str | None = None, dtype: str | None = None, **overrides: Any
) -> TrainingSAE[Any]:
    """The training SAE that computes what `sae` computes.

    The running threshold of a batch top-k SAE starts at the published one, in float64, rather than at 0, from where
    it takes some 200 steps. Lost for good are decoder norms that were folded in, Adam's moments and firing counts.

    Args:
        architecture: how to train it, if its metadata does not say or says otherwise.
        dtype: of the weights; the SAE's own if None.
        overrides: settings of that architecture's training (`k`, `matryoshka_widths`, …). One that neither the SAE
            nor the caller states is asked for, never filled with a default.

    Raises:
        SAEError: the architecture cannot be restored from this SAE, a setting is missing or cannot be used, or
            thresholds differ between latents, which the one threshold of a batch top-k SAE cannot carry.
        UnknownNameError: an override that is no setting of the architecture.
        ConfigError: an override of the wrong type.
    """
    metadata = sae.cfg.metadata
    architecture = architecture or metadata.training_architecture
    if architecture is None:
        raise SAEError(f"The SAE does not say how it was trained; pass architecture=, one of {', '.join(_SAVED_AS)}.")
    check_name("restorable architecture", architecture, _SAVED_AS)
    if sae.cfg.architecture() != _SAVED_AS[architecture]:
        published = _SAVED_AS[architecture]
        raise SAEError(f"A {architecture} SAE is restored from a {published} SAE, not a {sae.cfg.architecture()} one.")
    if sae.cfg.normalize_activations != "none":
        raise SAEError(f"The SAE normalises activations ({sae.cfg.normalize_activations}); that is not trained here.")
    training_class, config_class = get_sae_training_class(architecture)
    hints = get_type_hints(config_class)
    for key, value in overrides.items():
        check_name(f"setting of {architecture}", key, hints.keys() - _FACTS)
        overrides[key] = typed(hints[key], copy.deepcopy(value), f"setting {key} of {architecture}")
    stated = {f.name: getattr(sae.cfg, f.name) for f in fields(sae.cfg) if f.name in hints}
    stated |= {k: v for k, v in (metadata.training_architecture_details or {}).items() if k in hints}
    settings = stated | {"metadata": copy.deepcopy(metadata)} | overrides
    missing = [name for name in _MUST_BE_STATED if name in hints and name not in settings]
    if missing:
        raise SAEError(f"Neither the SAE nor the caller states {', '.join(missing)}, which {architecture} needs.")
    if not 0 < settings["k"] <= sae.cfg.d_sae:
        raise SAEError(f"k must lie in 1..{sae.cfg.d_sae} (d_sae), not {settings['k']}.")
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    if _SAVED_AS[architecture] == "jumprelu":
        state["topk_threshold"] = _one_threshold(state.pop("threshold"))
        if settings["rescale_acts_by_decoder_norm"]:
            _check_unit_norm(state["W_dec"])
    if dtype is not None:
        settings["dtype"] = dtype
        weights = {k: v.to(str_to_dtype(dtype)) for k, v in state.items() if k != "topk_threshold"}
        state |= weights
    try:
        return _filled(training_class, config_class(**settings), state)
    except (ValueError, TypeError, RuntimeError) as e:
        raise SAEError(f"A {architecture} SAE cannot be made with these settings: {e}") from e


def _check_unit_norm(W_dec: torch.Tensor) -> None:
    norm_f = W_dec.float().norm(dim=1)
    if (norm_f - 1).abs().max() > _UNIT:
        raise SAEError(
            "rescale_acts_by_decoder_norm is folded in when an SAE is saved, which leaves decoder rows of norm 1; "
            f"these go from {norm_f.min():.3g} to {norm_f.max():.3g}. Pass rescale_acts_by_decoder_norm=False."
        )


def _one_threshold(threshold_f: torch.Tensor) -> torch.Tensor:
    threshold_f = threshold_f.double()
    low, high = threshold_f.aminmax()
    if (high - low) > _UNIFORM * high.abs():
        raise SAEError(
            f"Thresholds differ between latents ({low:.4g} to {high:.4g}): a batch top-k SAE has one for all."
        )
    return threshold_f[0].clone()


@torch.no_grad()
def inference_form(sae: TrainingSAE[Any]) -> SAE[Any]:
    """The SAE as it would be saved and loaded again (JumpReLU for batch top-k), as a copy in memory."""
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    config = copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict())
    return _filled(get_sae_class(config["architecture"])[0], SAEConfig.from_dict(config), state)


def _filled(cls: type[T], cfg: Any, state: dict[str, torch.Tensor]) -> T:
    """An SAE made of `state` alone: nothing is drawn at random or held twice, as in stock's `load_from_disk`."""
    device, cfg.device = cfg.device, "meta"
    sae = cls(cfg)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state, assign=True)
    return sae.to(device=device)
