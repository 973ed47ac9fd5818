"""Directions to steer with, and how long the activations are that they are added to.

A scale means something only against the length of what it is added to, so vectors are of length one and scales are
shares of the mean norm at the hook. A vector of another width, of zeros, or with a NaN in it would steer nothing or
everything and still give a table; it is refused before the first token.

Shapes: `d` the hook's width, `t` tokens that count.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sae_lens import SAE
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.harvest import harvest
from sae_lens_gemma4.errors import ConfigError, DataError, ModelError, SAEError, check_name
from sae_lens_gemma4.models.geometry import Geometry
from sae_lens_gemma4.models.hook_names import RESID, canonical_name, hook_of
from sae_lens_gemma4.models.interface import HookedModel, require_hook

FORMS = (".safetensors", ".npy", ".pt")
_RANDOM = 0x57EE2


class Norm(NamedTuple):
    """The mean Euclidean norm of the activations at a hook, over so many tokens."""

    mean: float
    n_tokens: int


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction at a hook.

    Args:
        direction_d: of any length but zero; kept as float32 of length one, on the CPU.
        hook_name: where it is added, by any of the hook's names; kept as the canonical one.
        origin: what it is, in words, for reports.

    Raises:
        DataError: it is not one row of numbers, not finite, or zero.
    """

    direction_d: torch.Tensor
    hook_name: str
    origin: str

    def __post_init__(self) -> None:
        given = torch.as_tensor(self.direction_d).detach().cpu()
        row_d = given.squeeze()
        if row_d.ndim != 1 or row_d.is_complex() or row_d.dtype == torch.bool:
            raise DataError(
                f"A steering vector is one row of numbers; {self.origin} has shape {tuple(given.shape)} and "
                f"dtype {str(given.dtype).removeprefix('torch.')}."
            )
        row_d = row_d.double()
        if not row_d.isfinite().all():
            bad = int((~row_d.isfinite()).nonzero()[0])
            raise DataError(f"The steering vector ({self.origin}) is not finite, first at dimension {bad}.")
        length = float(row_d.norm())
        if not length > 0:
            raise DataError(
                f"The steering vector ({self.origin}) is zero and points nowhere: two groups with equal means, or a "
                "dead latent, give no direction."
            )
        object.__setattr__(self, "direction_d", (row_d / length).float())
        object.__setattr__(self, "hook_name", canonical_name(self.hook_name))

    @property
    def hash(self) -> str:
        return vector_hash(self.hook_name, self.direction_d)


def vector_hash(hook_name: str, direction_d: torch.Tensor) -> str:
    """First 16 hex digits of the SHA-256 of hook and direction."""
    digest = hashlib.sha256(hook_name.encode())
    digest.update(direction_d.numpy().tobytes())
    return digest.hexdigest()[:16]


def from_contrast(
    difference_d: npt.NDArray[np.floating] | torch.Tensor, hook_name: str, origin: str = "a difference of means"
) -> SteeringVector:
    """The direction from one group's mean activation to another's (Contrastive Activation Addition, Rimsky et al.
    2023, arXiv 2312.06681); errors as `SteeringVector`."""
    return SteeringVector(torch.as_tensor(difference_d), hook_name, origin)


def from_latent(sae: SAE[Any], latent: int, hook_name: str | None = None) -> SteeringVector:
    """The decoder row of a latent, at the SAE's own hook unless another is given.

    Raises:
        SAEError: it has no such latent, or does not say where it reads.
        DataError: as `SteeringVector`.
    """
    if not 0 <= latent < sae.cfg.d_sae:
        raise SAEError(f"The SAE has latents 0 to {sae.cfg.d_sae - 1:,}, and none of number {latent}.")
    hook = hook_name or sae.cfg.metadata.hook_name
    if not hook:
        raise SAEError("The SAE does not say at which hook it reads: pass hook_name.")
    return SteeringVector(sae.W_dec[latent], hook, f"the decoder row of latent {latent}")


def from_file(path: str | Path, hook_name: str, tensor: str | None = None) -> SteeringVector:
    """A vector in a file: .safetensors, .npy, or .pt. Nothing in a file is run.

    Args:
        tensor: which one, where a file holds several.

    Raises:
        DataError: the file cannot be read, holds several tensors, or as `SteeringVector`.
        UnknownNameError: no tensor of that name, or no known form of file.
    """
    path = Path(path)
    check_name("form of vector file", path.suffix, FORMS)
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        elif path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, EOFError) as e:
        raise DataError(f"{path} cannot be read as a vector: {e}") from e
    except Exception as e:  # weights_only's own refusal is pickle.UnpicklingError, and a torn file may raise anything
        raise DataError(f"{path} cannot be read as tensors alone: {str(e).splitlines()[0]}") from e
    if isinstance(found, dict):
        if tensor is None and len(found) != 1:
            raise DataError(f"{path} holds {len(found)} tensors ({', '.join(map(str, [*found][:8]))}): say which one.")
        found = found[check_name(f"tensor in {path.name}", tensor, map(str, found)) if tensor else next(iter(found))]
    if not isinstance(found, torch.Tensor):
        raise DataError(f"{path} holds a {type(found).__name__}, not a tensor.")
    return SteeringVector(found, hook_name, f"the file {path.name}")


def check_hook(model: HookedModel, hook_name: str) -> str:
    """The name by which `model` knows a hook that can be steered; cheap, nothing is run.

    Raises:
        ModelError: not a model of this package.
        ConfigError: a hook that is not as wide as the residual stream.
        UnknownNameError: the model has no such hook.
    """
    _geometry(model)
    name = require_hook(model, hook_name)
    hook = hook_of(name)
    if hook is None or hook.shape != RESID:
        raise ConfigError(f"{hook_name} is not a hook of the residual stream's width, as hook_resid_post is.")
    return name


def check_vector(vector: SteeringVector, model: HookedModel) -> str:
    """The name by which `model` knows the vector's hook.

    Raises:
        ModelError: a model of another width than the vector; else as `check_hook`.
    """
    name, width = check_hook(model, vector.hook_name), _geometry(model).d_model
    if len(vector.direction_d) != width:
        raise ModelError(
            f"The steering vector ({vector.origin}) has {len(vector.direction_d):,} dimensions and the model "
            f"{width:,}: it was made for another model."
        )
    return name


def _geometry(model: Any) -> Geometry:
    geometry = getattr(model, "geometry", None)
    if isinstance(geometry, Geometry):
        return geometry
    raise ModelError(f"Steering needs a Gemma4ProxyLM or a Gemma4Bridge, not a {type(model).__name__}: see load_model.")


def random_direction(d: int, seed: int) -> torch.Tensor:
    """A direction drawn evenly from the sphere: float32 `[d]` of length one."""
    drawn_d = np.random.default_rng([_RANDOM, seed]).standard_normal(d)
    return torch.from_numpy(drawn_d / np.linalg.norm(drawn_d)).float()


def mean_norm(model: HookedModel, corpus: Corpus, hook_name: str, *, batch_blocks: int = 8) -> Norm:
    """The mean norm at a hook over the tokens of `corpus` that count.

    BOS should not be among them: its norm is many times that of any other token.

    Raises:
        UnknownNameError: a hook that the model does not have.
        DataError: activations that are not finite, or all zero.
    """
    total, n = 0.0, 0
    for batch in harvest(model, corpus, [hook_name], batch_blocks=batch_blocks):
        norm_t = torch.linalg.vector_norm(batch.acts[hook_name].float(), dim=-1)
        total, n = total + float(norm_t.sum(dtype=torch.float64)), n + len(norm_t)
    if not total > 0:
        raise DataError(f"The activations at {hook_name} are zero on {corpus.name!r}: no scale can be a share of that.")
    return Norm(total / n, n)
