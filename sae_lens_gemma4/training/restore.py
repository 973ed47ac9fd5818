"""A published SAE becomes trainable again, and a training SAE takes the form it is published in.

sae_lens saves a batch top-k SAE as a JumpReLU: decoder norms folded in, one threshold for all latents. Stock's
`from_pretrained_path` takes such a folder for a JumpReLU *training* SAE, ignores the config asked for, and trains
the wrong thing without a word. Here the class comes from the metadata (`training_architecture`), the threshold
goes back where it came from, in float64, and what cannot be carried over exactly is refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from sae_lens import SAE, SAEConfig, TrainingSAE
from sae_lens.constants import DTYPE_MAP, SAE_CFG_FILENAME
from sae_lens.loading import pretrained_saes_directory
from sae_lens.registry import get_sae_class, get_sae_training_class

from sae_lens_gemma4.catalogue.converter import converter
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.errors import Gemma4SAEError, SAEError, UnknownNameError, check_name, nearest
from sae_lens_gemma4.training.fast import FAST
from sae_lens_gemma4.training.forms import (
    FORMS,
    OF_THE_WEIGHTS,
    checked_settings,
    setting_names,
    settle_threshold,
    training_config,
    with_k_aux,
)
from sae_lens_gemma4.training.saving import write_folder

T = TypeVar("T", bound=SAE[Any])
_SAVED_AS = {"matryoshka_batchtopk": "jumprelu", "batchtopk": "jumprelu", "topk": "topk", "jumprelu": "jumprelu"}
_RESCALE = "rescale_acts_by_decoder_norm"
_MUST_BE_STATED = (
    "k", _RESCALE, "matryoshka_widths", "l0_coefficient", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
)  # fmt: skip
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
            if _in_training_form(path):
                return inference_form(TrainingSAE.load_from_disk(path, device=device, dtype=dtype))
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


def _in_training_form(path: Path) -> bool:
    """Whether this is a folder of `write_training_folder`, or a checkpoint of stock's, that has another saved form."""
    try:
        config = json.loads((path / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    architecture = str(config.get("architecture")) if isinstance(config, dict) else ""
    return architecture in FAST or _SAVED_AS.get(architecture, architecture) != architecture


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
    **settings: Any,
) -> TrainingSAE[Any]:
    """A trainable SAE from a published one. Source and errors as `load_sae`, the rest as `training_form`."""
    check_name("dtype", dtype, DTYPE_MAP)
    sae = load_sae(release_or_path, sae_id, device=device, dtype="float64" if "64" in dtype else "float32")
    return training_form(sae, architecture=architecture, dtype=dtype, **settings)


@torch.no_grad()
def training_form(
    sae: SAE[Any],
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    k_aux: int | None = None,
    absorb_thresholds: bool = False,
    **overrides: Any,
) -> TrainingSAE[Any]:
    """The training SAE that computes what `sae` computes.

    The running threshold of a batch top-k SAE starts at the published one, in float64, rather than at 0, from where
    it takes some 200 steps. Lost for good are decoder norms that were folded in, Adam's moments and firing counts.

    Args:
        architecture: how to train it, if its metadata does not say or says otherwise.
        dtype: of the weights; the SAE's own if None.
        k_aux: dead latents that the auxiliary loss uses a token; d_in / 2 if None.
        absorb_thresholds: where the architecture has one threshold for all and these differ, take them into the
            weights. The function stays the same; activations are scaled by c/θ (c the mean threshold), so a batch's
            top-k chooses by activation over threshold, not by activation, and `rescale_acts_by_decoder_norm` is off.
        overrides: settings of that architecture's training (`k`, `matryoshka_widths`, …). One that neither the SAE
            nor the caller states is asked for, never filled with a default.

    Raises:
        SAEError: the architecture cannot be restored from this SAE, a setting is missing or cannot be used, or
            thresholds differ between latents, which the one threshold of a batch top-k SAE cannot carry.
        UnknownNameError: an override that is no setting of the architecture, or a dtype.
        ConfigError: an override of the wrong type.
    """
    architecture = _architecture(sae, architecture)
    if sae.cfg.normalize_activations != "none":
        raise SAEError(f"The SAE normalises activations ({sae.cfg.normalize_activations}); that is not trained here.")
    known = setting_names(architecture) - OF_THE_WEIGHTS
    overrides = checked_settings(architecture, overrides, known)
    details = sae.cfg.metadata.training_architecture_details or {}
    stated = {f.name: getattr(sae.cfg, f.name) for f in fields(sae.cfg)} | details
    config_fields = {f.name for f in fields(get_sae_training_class(architecture)[1])}
    settings = {key: copy.deepcopy(value) for key, value in stated.items() if key in config_fields} | overrides
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    if architecture == "jumprelu":
        state["threshold"] = state["threshold"].float().clamp(min=0)  # here the threshold alone does what ReLU does
    elif "threshold" in state:
        if absorb_thresholds and not _uniform(state["threshold"]):
            _absorb_thresholds(state, overrides)
            settings[_RESCALE] = False
        state["topk_threshold"] = _one_threshold(state.pop("threshold"))
    missing = [name for name in _MUST_BE_STATED if name in known and name not in settings]
    if missing:
        raise SAEError(f"Neither the SAE nor the caller states {', '.join(missing)}, which {architecture} needs.")
    if settings.get(_RESCALE, False) != getattr(sae.cfg, _RESCALE, False):
        _check_unit_norm(state["W_dec"], settings[_RESCALE])
    if dtype is not None:
        check_name("dtype", dtype, DTYPE_MAP)
        settings["dtype"] = dtype
        state |= {k: v.to(DTYPE_MAP[dtype]) for k, v in state.items() if "threshold" not in k}
    cfg = training_config(architecture, settings, k_aux)
    try:
        restored = _filled(FORMS[architecture], cfg, state)
    except (ValueError, RuntimeError) as e:
        raise SAEError(f"A {architecture} SAE cannot be made with these settings: {e}") from e
    settle_threshold(restored)
    return with_k_aux(restored, k_aux)


def _architecture(sae: SAE[Any], asked: str | None) -> str:
    """How an SAE of this form is trained: as asked, as it says, or in the only way there is."""
    published = sae.cfg.architecture()
    fitting = [name for name, saved in _SAVED_AS.items() if saved == published]
    if not fitting:
        raise SAEError(f"A {published} SAE cannot be trained on; of these forms one can: {', '.join(FORMS)}.")
    architecture = asked or sae.cfg.metadata.training_architecture or (fitting[0] if len(fitting) == 1 else None)
    if architecture is None:
        raise SAEError(f"The SAE does not say how it was trained; pass architecture=, one of {', '.join(fitting)}.")
    check_name("restorable architecture", architecture, _SAVED_AS)
    if architecture not in fitting:
        saved = _SAVED_AS[architecture]
        raise SAEError(f"A {architecture} SAE is restored from a {saved} SAE, not a {published} one.")
    return architecture


def _check_unit_norm(W_dec: torch.Tensor, rescale: bool) -> None:
    norm_f = W_dec.float().norm(dim=1)
    if (norm_f - 1).abs().max() > _UNIT:
        raise SAEError(
            f"{_RESCALE}={rescale} is not how this SAE computes. Between the two only decoder rows of norm 1 make no "
            f"difference, and these go from {norm_f.min():.3g} to {norm_f.max():.3g}. Pass {_RESCALE}={not rescale}."
        )


def _uniform(threshold_f: torch.Tensor) -> bool:
    low, high = threshold_f.double().aminmax()
    return bool((high - low) <= _UNIFORM * high.abs())


def _one_threshold(threshold_f: torch.Tensor) -> torch.Tensor:
    if not _uniform(threshold_f):
        low, high = threshold_f.aminmax()
        raise SAEError(
            f"Thresholds differ between latents ({low:.4g} to {high:.4g}): a batch top-k SAE has one for all. "
            "Pass absorb_thresholds=True to take them into the weights."
        )
    return threshold_f[0].double().clone()


def _absorb_thresholds(state: dict[str, torch.Tensor], overrides: Mapping[str, Any]) -> None:
    """One threshold for all, c, and the same function: latent i reads θᵢ/c times less and writes as much more."""
    threshold_f = state["threshold"].double()
    if (n := int((threshold_f <= 0).sum())) > 0:
        raise SAEError(f"{n} of {len(threshold_f)} thresholds are 0 or less, which no scale of the weights can absorb.")
    if overrides.get(_RESCALE):
        raise SAEError(f"Absorbed thresholds are in the decoder's norms: {_RESCALE}=True would take them out again.")
    scale_f = threshold_f / threshold_f.mean()
    factors = {"W_enc": 1 / scale_f, "b_enc": 1 / scale_f, "W_dec": scale_f[:, None]}
    state |= {name: (state[name].double() * factor).to(state[name].dtype) for name, factor in factors.items()}
    state["threshold"] = threshold_f.mean().expand_as(threshold_f)


def write_training_folder(sae: TrainingSAE[Any], folder: str | Path) -> Path:
    """Write what stock's `from_pretrained_path` loads into the class that it is, metadata included.

    Stock casts the threshold to the weights' dtype, in whose bfloat16 its moving average stands still, ignores the
    `cfg.sae` beside the path, and knows no `k_aux`.

    Raises:
        ConfigError: what is there must not be replaced, or nothing can be written.
    """

    def write(partial: Path) -> None:
        sae.save_model(partial)

    return write_folder(folder, write)


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
