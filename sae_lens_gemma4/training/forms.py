"""The SAEs that are trained here: sae_lens's own classes with two things of theirs set free.

sae_lens fixes the auxiliary loss at d_in / 2 dead latents a token, where recipes state a number, and starts the moving
average of a batch top-k threshold at 0 without debiasing it, so that a new SAE saved after 20 steps has an L0 of 134 in
the place of 8. Config classes, architecture names and files are sae_lens's; without `k_aux`, and once the threshold is
settled, so is every bit of what is computed.

Shapes: `n` tokens, `d` d_in, `f` latents.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    JumpReLUTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,
    TopKTrainingSAE,
    TrainingSAE,
)
from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import get_sae_training_class

from sae_lens_gemma4.errors import SAEError, check_name
from sae_lens_gemma4.mapping import typed
from sae_lens_gemma4.training.sparse_step import SparseBatchStep, SparseStep

SETTLED = 2**31
"""Updates after which a running threshold is a plain moving average; what a threshold that was given counts as."""
_FACTS = {"d_in", "d_sae", "dtype", "device", "metadata", "normalize_activations", "reshape_activations"}
"""Fields of a config that are said elsewhere, or that SAEs trained here do not have."""
OF_THE_WEIGHTS = {"apply_b_dec_to_input", "decoder_init_norm"}
"""Fields that come with weights that exist, and are settings only where there are none yet."""


class TopKForm(SparseStep, TopKTrainingSAE):
    """sae_lens's TopK."""


class _DebiasedThreshold(SparseBatchStep):
    """The running threshold as a mean of what was seen (Adam's debiasing), from the first step on."""

    threshold_updates: torch.Tensor
    """Updates so far. Part of the state, as the threshold is, but not of saved folders: these stay sae_lens's."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("threshold_updates", torch.tensor(0), persistent=False)

    @torch.no_grad()
    def follow_threshold(self, smallest: torch.Tensor) -> None:
        rate, smallest = self.cfg.topk_threshold_lr, smallest.to(self.topk_threshold.dtype)
        if rate == 0:
            return
        seen = smallest.isfinite()
        self.threshold_updates = self.threshold_updates + seen
        share = rate / (1 - (1 - rate) ** self.threshold_updates.double())
        moved = (1 - share) * self.topk_threshold + share * smallest
        self.topk_threshold = torch.where(seen, moved, self.topk_threshold)


class BatchTopKForm(_DebiasedThreshold, BatchTopKTrainingSAE):
    """sae_lens's BatchTopK."""


class MatryoshkaForm(_DebiasedThreshold, MatryoshkaBatchTopKTrainingSAE):
    """sae_lens's Matryoshka BatchTopK."""


FORMS: dict[str, type[TrainingSAE[Any]]] = {
    "matryoshka_batchtopk": MatryoshkaForm,
    "batchtopk": BatchTopKForm,
    "topk": TopKForm,
    "jumprelu": JumpReLUTrainingSAE,
}
"""What each architecture is trained as."""


def setting_names(architecture: str) -> set[str]:
    """The fields of an architecture's config that a recipe may state; `UnknownNameError` for one not trained here."""
    check_name("trainable architecture", architecture, FORMS)
    return get_type_hints(get_sae_training_class(architecture)[1]).keys() - _FACTS


def checked_settings(architecture: str, settings: Mapping[str, Any], known: set[str] | None = None) -> dict[str, Any]:
    """`settings` by name and type, as copies.

    Raises:
        UnknownNameError: one that is not among `known` (all of the architecture's, if None).
        ConfigError: one of the wrong type.
    """
    known = setting_names(architecture) if known is None else known
    hints = get_type_hints(get_sae_training_class(architecture)[1])
    for name in settings:
        check_name(f"setting of {architecture}", name, known)
    return {
        name: typed(hints[name], copy.deepcopy(value), f"setting {name} of {architecture}")
        for name, value in settings.items()
    }


def training_config(architecture: str, settings: Mapping[str, Any], k_aux: int | None = None) -> Any:
    """The config of sae_lens's class; `settings` are all its fields.

    Raises:
        SAEError: values that cannot be used together, or a `k_aux` where there is no auxiliary loss.
    """
    d_sae, k, rate = settings["d_sae"], settings.get("k", 1), settings.get("topk_threshold_lr", 0)
    if not 0 < k <= d_sae:
        raise SAEError(f"k must lie in 1..{d_sae} (d_sae), not {k}.")
    if not 0 <= rate <= 1:
        raise SAEError(f"topk_threshold_lr must lie in 0..1, not {rate}.")
    if k_aux is not None and (architecture == "jumprelu" or k_aux < 1):
        raise SAEError(f"k_aux must be 1 or more, for an architecture that has it: not {k_aux} for {architecture}.")
    try:
        return get_sae_training_class(architecture)[1](**settings)
    except (ValueError, TypeError) as e:
        raise SAEError(f"A {architecture} SAE cannot be made with these settings: {e}") from e


def new_training_sae(
    architecture: str,
    d_in: int,
    d_sae: int,
    *,
    k_aux: int | None = None,
    settings: Mapping[str, Any],
    seed: int,
    dtype: str = "float32",
    device: str = "cpu",
) -> TrainingSAE[Any]:
    """An SAE with sae_lens's initial weights, drawn on the CPU from `seed` and from nothing else.

    Args:
        k_aux: dead latents that the auxiliary loss uses a token; d_in / 2 if None.
        settings: fields of the architecture's config. `k` and `matryoshka_widths` have no default worth having and
            must be stated; the others are sae_lens's unless stated.

    Raises:
        UnknownNameError, ConfigError: an architecture, dtype or setting that does not exist, or of the wrong type.
        SAEError: one that is missing or cannot be used.
    """
    check_name("dtype", dtype, DTYPE_MAP)
    stated = checked_settings(architecture, settings)
    missing = sorted({"k", "matryoshka_widths"} & setting_names(architecture) - stated.keys())
    if missing:
        raise SAEError(f"A new {architecture} SAE needs {' and '.join(missing)}.")
    cfg = training_config(architecture, stated | {"d_in": d_in, "d_sae": d_sae, "dtype": dtype, "device": "cpu"}, k_aux)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            sae = FORMS[architecture](cfg)
        except ValueError as e:
            raise SAEError(f"A {architecture} SAE cannot be made with these settings: {e}") from e
    return with_k_aux(sae, k_aux).to(device=device)


def with_k_aux(sae: TrainingSAE[Any], k_aux: int | None) -> TrainingSAE[Any]:
    """`sae`, with that many dead latents a token in its auxiliary loss."""
    if isinstance(sae, SparseStep):
        sae.k_aux = k_aux
    return sae


def settle_threshold(sae: TrainingSAE[Any]) -> None:
    """Let the running threshold, where there is one, count as found: it moves at its own rate from here on."""
    if isinstance(sae, _DebiasedThreshold):
        sae.threshold_updates.fill_(SETTLED)


@torch.no_grad()
def unit_decoder(sae: TrainingSAE[Any], optimizer: torch.optim.Optimizer) -> None:
    """Bring every row of the decoder to norm 1, in place. Rows of zeros stay so.

    Where the form leaves norms free (`rescale_acts_by_decoder_norm`, JumpReLU), they go into encoder, bias and
    thresholds: the function is kept, and Adam's moments follow their parameters. Where it does not, rows are projected,
    as in the TopK papers (2406.04093, A.1), which changes the function by whatever the norms had come to.
    """
    norm_f = sae.W_dec.norm(dim=1)
    norm_f = torch.where(norm_f > 0, norm_f, 1)
    if not (sae.cfg.architecture() == "jumprelu" or sae.cfg.rescale_acts_by_decoder_norm):
        sae.W_dec.div_(norm_f[:, None])
        return
    factors = {"W_dec": 1 / norm_f[:, None], "W_enc": norm_f, "b_enc": norm_f, "threshold": norm_f}
    for name, parameter in sae.named_parameters():
        if name in factors:
            moments = optimizer.state.get(parameter, {})
            parameter.mul_(factors[name])
            for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                if moment in moments:
                    moments[moment].div_(factors[name] ** power)
