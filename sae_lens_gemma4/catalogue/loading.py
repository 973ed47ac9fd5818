"""From an SAE's files to what sae_lens makes an SAE of: a config and a state dict.

The files are read in their form, what is known of model and hook is set beside the weights, and what does not fit
together is refused. The class that the config names, made on the meta device, says which tensors of which shapes there
must be, so that an SAE that loads is one that runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, __version__
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.util import str_to_dtype

from sae_lens_gemma4.catalogue.formats import Checkpoint, Weights, form_of
from sae_lens_gemma4.catalogue.locating import METADATA, Located
from sae_lens_gemma4.catalogue.tensors import read, read_header, read_json
from sae_lens_gemma4.errors import Gemma4SAEError, HubError, MismatchWarning, SAEError, UnstatedWarning, warn_caller
from sae_lens_gemma4.models.hook_names import canonical_name, hf_name

ARCHITECTURES = {
    "topk": {"topk"}, "batchtopk": {"jumprelu", "topk"}, "matryoshka": {"jumprelu"},
    "jumprelu": {"jumprelu", "standard"},
}  # fmt: skip
"""What an SAE was trained as, and the classes of sae_lens that compute it at inference."""
_WIDTHS = {
    "d_in": ("d_in", "d_model", "activation_dim", "input_dim"),
    "d_sae": ("d_sae", "dict_size", "n_features", "num_latents", "d_hidden"),
}
"""What authors' configs call the widths."""
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load(located: Located, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the state dict, in the dtype and on the device of `overrides` or of the file.

    Raises:
        SAEError, HubError: the files cannot be had, read, or put together; names the file.
    """
    weights = convert(located, checkpoint_of(located))
    cfg = _config(located, weights, overrides)
    dtype, device = str_to_dtype(cfg["dtype"]), str(cfg["device"])
    state = {}
    for name in list(weights.tensors):  # one at a time, so that a copy's source can go
        tensor = weights.tensors.pop(name)
        state[name] = _settled(tensor, dtype, device)
        if not _is_finite(state[name]):
            cast = "" if tensor.dtype == dtype else f" in {cfg['dtype']}"
            raise SAEError(f"{located.where}: {name} has entries that are not finite{cast}.")
    return cfg, state


def load_config(located: Located, overrides: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """The config alone, from the header of the weights file: nothing else of it is transferred.

    Args:
        checkpoint: what the header holds, where it has been read; its tensors are used up.

    Raises:
        SAEError, HubError: as `load`.
    """
    checkpoint = checkpoint_of(located, header_only=True) if checkpoint is None else checkpoint
    return _config(located, convert(located, checkpoint), overrides)


def log_sparsity(located: Located, cfg: Mapping[str, Any]) -> torch.Tensor | None:
    """log₁₀ of the latents' firing frequencies [d_sae], which sae_lens may save beside the weights."""
    if located.form not in (None, "sae_lens"):
        return None
    name = f"{located.weights.rpartition('/')[0]}/{SPARSITY_FILENAME}".lstrip("/")
    try:
        path = located.files.fetch(name)
    except (HubError, SAEError):
        return None
    sparsity = read(path, located.files.describe(name)).tensors.get("sparsity")
    if sparsity is None or sparsity.shape != (cfg["d_sae"],):
        raise SAEError(f"{located.files.describe(name)} is not the log sparsity of {cfg['d_sae']} latents.")
    return sparsity.to(cfg["device"])


def checkpoint_of(located: Located, header_only: bool = False) -> Checkpoint:
    """What the files hold; with `header_only` the tensors are shapes and dtypes, on the meta device."""
    if header_only:
        with located.files.open(located.weights) as file:
            contents = read_header(file, located.weights, located.where)
    else:
        contents = read(located.files.fetch(located.weights), located.where)
    config: dict[str, Any] = {}
    if located.config is not None:
        config = read_json(located.files.fetch(located.config), located.files.describe(located.config))
    folder = located.weights.rpartition("/")[0] or Path(located.files.describe()).name
    return Checkpoint(located.where, dict(contents.tensors), config | contents.stated, located.facts, folder)


def convert(located: Located, checkpoint: Checkpoint) -> Weights:
    """The form's own conversion. Whatever a foreign config makes it stumble over is one error."""
    form = form_of(checkpoint, located.form)
    if form.name != "sae_lens":
        _refuse_what_is_no_sae(checkpoint)
    try:
        weights = form.convert(checkpoint)
    except Gemma4SAEError:
        raise
    except Exception as e:
        raise SAEError(f"{located.where} and its config do not make an SAE of form {form.name}: {e!r}") from e
    for name, tensor in weights.tensors.items():
        if tensor.dtype not in _DTYPES:
            raise SAEError(f"{located.where}: {name} would be of {tensor.dtype}, which is no type of weights.")
    _check_widths(checkpoint, weights.tensors.get("W_enc"))
    return weights


def _refuse_what_is_no_sae(checkpoint: Checkpoint) -> None:
    """What a config may state that no form but sae_lens's own computes."""
    stated = checkpoint.stated
    for name in ("type", "sae_type", "architecture"):
        if re.search("transc|crossc", str(stated.get(name, "")), re.IGNORECASE):
            raise SAEError(f"{checkpoint.where}: its config states {name} {stated[name]!r}, which is no SAE.")
    if stated.get("normalize_activations") not in (None, False, "none"):
        raise SAEError(
            f"{checkpoint.where}: its config states normalize_activations {stated['normalize_activations']!r}, "
            "which this form does not have."
        )


def _check_widths(checkpoint: Checkpoint, W_enc: torch.Tensor | None) -> None:
    """Shapes that contradict the config."""
    if W_enc is None or W_enc.ndim != 2:
        raise SAEError(f"{checkpoint.where}: W_enc has not two dimensions.")
    for (width, names), found in zip(_WIDTHS.items(), W_enc.shape, strict=True):
        for section in (checkpoint.stated, checkpoint.section("trainer")):
            for name in names:
                if section.get(name) not in (None, 0, found):
                    stated = f"its config states {name} {section[name]!r}"
                    raise SAEError(f"{checkpoint.where}: {stated}; {width} of the weights is {found}.")


def _config(located: Located, weights: Weights, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """sae_lens's config of this SAE, checked against the class that it names."""
    W_enc = weights.tensors["W_enc"]
    cfg: dict[str, Any] = {
        "architecture": weights.architecture,
        "d_in": W_enc.shape[0],
        "d_sae": W_enc.shape[1],
        "dtype": str(W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": _subtracts_b_dec(located, weights),
        "normalize_activations": "none",
        "reshape_activations": "none",
        **weights.settings,
        **({"k": weights.k} if weights.k is not None else {}),
        **{k: v for k, v in overrides.items() if k != "neuronpedia_id"},
    }
    cfg["metadata"] = _metadata(located, weights, overrides)
    _check_statements(located, cfg, weights)
    _check_fits(located.where, cfg, weights.tensors)
    return cfg


def _subtracts_b_dec(located: Located, weights: Weights) -> bool:
    """What a config says stands; what a form merely has by convention yields to the catalogue and the caller."""
    stated = located.facts.get("apply_b_dec_to_input")
    if "apply_b_dec_to_input" in weights.settings or (stated is None and weights.apply_b_dec_to_input is not None):
        return bool(weights.settings.get("apply_b_dec_to_input", weights.apply_b_dec_to_input))
    if stated is not None:
        return bool(stated)
    b_dec = weights.tensors["b_dec"]
    if b_dec.is_meta or bool(b_dec.any()):
        warn_caller(
            f"{located.where}: nobody states whether b_dec is subtracted from the input. It is taken to be, as in Gao "
            "et al.; converter=sae_lens_gemma4.converter(apply_b_dec_to_input=False) says otherwise.",
            UnstatedWarning,
        )
    return True


def _metadata(located: Located, weights: Weights, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What sae_lens keeps beside an SAE. The catalogue's word on model and hook is the last one."""
    facts = located.facts
    ours = {name: facts[name] for name in ("model_name", "hook_name", *METADATA) if name in facts}
    metadata = {"sae_lens_version": __version__, "sae_lens_training_version": None} | weights.metadata | ours
    if hook := metadata.get("hook_name"):
        metadata["hook_name"] = canonical_name(str(hook))
        metadata["hf_hook_name"] = hf_name(metadata["hook_name"])
    if (neuronpedia := overrides.get("neuronpedia_id")) is not None:
        metadata["neuronpedia_id"] = neuronpedia
    if located.release is not None and located.entry is not None:
        metadata |= {"release": located.release.name, "sae_id": located.entry.id, "repo_id": located.release.repo_id}
        if located.release.repo_type != "package":
            metadata["hf_path"] = located.weights
        if located.entry.dataset is not None:
            metadata.setdefault("dataset_path", located.entry.dataset)
    for name in ("model_name", "hook_name"):
        theirs, mine = weights.metadata.get(name), ours.get(name)
        if theirs and mine and not _same(name, str(theirs), str(mine)):
            warn_caller(
                f"{located.where}: its config states {name} {theirs!r}; the catalogue's {mine!r} is used.",
                MismatchWarning,
            )
    return metadata


def _same(name: str, theirs: str, mine: str) -> bool:
    if name == "hook_name":
        return canonical_name(theirs) == canonical_name(mine)
    return theirs.rsplit("/", 1)[-1].lower() == mine.rsplit("/", 1)[-1].lower()


def _check_statements(located: Located, cfg: Mapping[str, Any], weights: Weights) -> None:
    """What the catalogue states otherwise is said; what the caller states otherwise is refused."""
    details = weights.metadata.get("training_architecture_details") or {}
    found = {name: cfg.get(name) for name in ("d_in", "d_sae", "apply_b_dec_to_input")}
    found["k"] = cfg.get("k", details.get("k"))
    if found["k"] is not None and not (type(found["k"]) is int and 1 <= found["k"] <= cfg["d_sae"]):
        raise SAEError(f"{located.where}: k is {found['k']!r}, and d_sae {cfg['d_sae']}.")
    for name, value in found.items():
        by_hand, stated = located.by_hand.get(name), getattr(located.entry, name, None)
        if value is not None and by_hand not in (None, value):
            raise SAEError(f"{located.where} states {name} {value}; the converter was told {by_hand}.")
        if value is not None and by_hand is None and stated not in (None, value):
            warn_caller(f"{located.where} has {name} {value}; the catalogue states {stated}.", MismatchWarning)
    trained = located.facts.get("architecture")
    if trained is not None and cfg["architecture"] not in ARCHITECTURES.get(trained, {cfg["architecture"]}):
        message = f"{located.where} makes a {cfg['architecture']} SAE; it is stated to be {trained}."
        if "architecture" in located.by_hand:
            raise SAEError(message)
        warn_caller(message, MismatchWarning)


def _check_fits(where: str, cfg: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """The SAE's class, made on the meta device, says which tensors of which shapes it needs."""
    try:
        config = SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict({**cfg, "device": "meta"})
        sae_class: Any = SAE.get_sae_class_for_architecture(cfg["architecture"])
        wanted = sae_class(config).state_dict()
    except Exception as e:
        raise SAEError(f"{where}: sae_lens cannot make an SAE of its config: {type(e).__name__}: {e}") from e
    if missing := wanted.keys() - tensors.keys():
        raise SAEError(f"{where} has no {', '.join(sorted(missing))}, which a {cfg['architecture']} SAE needs.")
    if extra := tensors.keys() - wanted.keys():
        raise SAEError(f"{where} has {', '.join(sorted(extra))}, which a {cfg['architecture']} SAE does not.")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise SAEError(
                f"{where}: {name} has shape {list(tensor.shape)}; "
                f"by its config it should be {list(wanted[name].shape)}."
            )


def _settled(tensor: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor as the SAE will keep it: untouched where it is so already, else copied once."""
    if tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor.to(device)
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Without a copy: a sum is finite unless an entry is not, or it overflows (float16 may); then the extremes tell."""
    if math.isfinite(tensor.sum().item()):
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))
