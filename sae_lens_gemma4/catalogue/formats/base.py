"""What every file form is made of: the tensors that came, the weights that go to sae_lens, and how keys are told apart.

A form is recognised by the keys of its tensors, and laid out by their shapes: biases have one dimension each, so they
say which axis of a matrix is which. Where d_in equals d_sae the form's own convention decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sae_lens_gemma4.errors import SAEError

BOOKKEEPING = {
    "last_fired", "num_tokens_since_fired", "n_forward_passes_since_fired", "step", "n_steps", "tokens_seen",
}  # fmt: skip
"""Tensors of a training run that an SAE does not need."""
LINEAR = {"encoder": "d_sae d_in", "decoder": "d_in d_sae"}
"""How nn.Linear lays its weights out."""


@dataclass(frozen=True)
class Weights:
    """An SAE as sae_lens lays it out: W_enc [d_in, d_sae], W_dec [d_sae, d_in], biases and threshold vectors."""

    architecture: str
    """sae_lens's name of the class that computes what the author's code computes."""
    tensors: dict[str, torch.Tensor]
    apply_b_dec_to_input: bool | None
    """None where the form leaves it open."""
    k: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Further fields of sae_lens's config."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the files themselves say of model, hook and training, by sae_lens's names."""


@dataclass(frozen=True)
class Form:
    """One way in which an SAE lies on disk."""

    name: str
    title: str
    keys: tuple[str, ...]
    convert: Callable[[Checkpoint], Weights] = field(repr=False)
    optional: tuple[str, ...] = ()
    marks: Callable[[Checkpoint], bool] = field(default=lambda _: True, repr=False)
    """Whether what is stated beside the tensors fits, where keys alone do not tell two forms apart."""

    def fits(self, checkpoint: Checkpoint) -> bool:
        present = checkpoint.tensors.keys() - BOOKKEEPING
        required = set(self.keys)
        return required <= present <= required | set(self.optional) and self.marks(checkpoint)


@dataclass(frozen=True)
class Checkpoint:
    """What was read of one SAE's files. Its tensors are on the meta device where only headers were read."""

    where: str
    tensors: dict[str, torch.Tensor]
    stated: Mapping[str, Any]
    """The config file's content, and numbers and texts from the weights file."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the catalogue or the caller states; it wins over the files where the files leave something open."""
    folder: str = ""
    """The folder's name within its repository, which some forms put the hook into."""

    def laid_out(
        self,
        W_enc: str,
        W_dec: str,
        b_enc: str,
        b_dec: str,
        *,
        encoder: str = "d_in d_sae",
        decoder: str = "d_sae d_in",
    ) -> dict[str, torch.Tensor]:
        """The four tensors as sae_lens lays them out, from their keys in the file. Transposed views are cheap.

        Args:
            encoder, decoder: how the matrices lie by the form's convention, which decides where they are square.

        Raises:
            SAEError: one of them is missing, or their shapes do not fit together.
        """
        encoder_bias, decoder_bias = self.vector(b_enc), self.vector(b_dec)
        d_in, d_sae = decoder_bias.shape[0], encoder_bias.shape[0]
        return {
            "W_enc": self._matrix(W_enc, d_in, d_sae, transposed=encoder == "d_sae d_in"),
            "W_dec": self._matrix(W_dec, d_sae, d_in, transposed=decoder == "d_in d_sae"),
            "b_enc": encoder_bias,
            "b_dec": decoder_bias,
        }

    def _matrix(self, key: str, rows: int, columns: int, transposed: bool) -> torch.Tensor:
        tensor = self.need(key)
        found = tuple(tensor.shape)
        if rows == columns and found == (rows, columns):
            return tensor.T if transposed else tensor
        if found == (rows, columns):
            return tensor
        if found == (columns, rows):
            return tensor.T
        raise SAEError(
            f"{self.where}: {key} has shape {list(found)}; "
            f"by the biases it should be {[rows, columns]} or its transpose."
        )

    def take(self, key: str) -> torch.Tensor | None:
        """A tensor, if there is one. The checkpoint gives it away, so that its memory can go."""
        return self.tensors.pop(key, None)

    def need(self, key: str) -> torch.Tensor:
        """A tensor that must be there."""
        tensor = self.take(key)
        if tensor is None:
            raise SAEError(f"{self.where} has no tensor {key}. It holds: {self.found()}.")
        return tensor

    def vector(self, key: str) -> torch.Tensor:
        """A tensor that must be there, of one dimension."""
        tensor = self.need(key)
        if tensor.ndim != 1:
            raise SAEError(f"{self.where}: {key} has shape {list(tensor.shape)}, not one dimension.")
        return tensor

    def scalar(self, key: str) -> float | None:
        """A number that lies in a tensor of one element; None if there is none, or only its header was read."""
        tensor = self.take(key)
        if tensor is None or tensor.is_meta:
            return None
        if tensor.numel() != 1:
            raise SAEError(f"{self.where}: {key} has shape {list(tensor.shape)}, not a single number.")
        return float(tensor.item())

    def section(self, name: str) -> Mapping[str, Any]:
        """An object within the config; empty if there is none."""
        section = self.stated.get(name)
        return section if isinstance(section, Mapping) else {}

    def states_k(self) -> bool:
        """Whether anything but a tensor states how many latents are kept."""
        return any(source.get(name) is not None for source, name in self._k_sources())

    def _k_sources(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        yield from ((self.stated, name) for name in ("k", "topk", "top_k"))
        yield self.section("trainer"), "k"
        yield self.facts, "k"

    def k(self) -> int | None:
        """How many latents are kept: from the weights, else the config, else as the catalogue or the caller states."""
        value: Any = self.scalar("k")
        for source, name in self._k_sources():
            value = source.get(name) if value is None else value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
            raise SAEError(f"{self.where}: k is {value!r}, not a positive whole number.")
        return int(value)

    def found(self) -> str:
        """Keys and shapes, as errors list them."""
        return ", ".join(f"{key} {list(t.shape)}" for key, t in sorted(self.tensors.items())[:16]) or "no tensors"


def topk(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], k: int | None, b_dec: bool | None) -> Weights:
    """A TopK SAE, whose `k` somebody must state."""
    if k is None and not tensors["W_enc"].is_meta:
        raise SAEError(
            f"{checkpoint.where}: it is a TopK SAE by its form, and nobody states k. "
            "Pass converter=sae_lens_gemma4.converter(k=…), or name another form: converter('…')."
        )
    for name in ("activation", "activation_fn", "activation_fn_str", "architecture"):
        stated = checkpoint.stated.get(name)
        if isinstance(stated, str) and "topk" not in stated.lower().replace("_", ""):
            raise SAEError(f"{checkpoint.where}: its config states {name} {stated!r}; by its form it would be TopK.")
    details = {"k": k, "rescale_acts_by_decoder_norm": False}
    metadata = {"training_architecture": "topk", "training_architecture_details": details}
    return Weights("topk", tensors, b_dec, k, {"rescale_acts_by_decoder_norm": False}, metadata)


def jumprelu(tensors: dict[str, torch.Tensor], threshold: float | torch.Tensor | None, b_dec: bool | None) -> Weights:
    """A JumpReLU SAE with one threshold [d_sae], or one number for all latents (None where only a header was read)."""
    b_enc = tensors["b_enc"]
    if not isinstance(threshold, torch.Tensor):
        number = math.nan if threshold is None else threshold
        threshold = torch.full_like(b_enc, number, dtype=torch.promote_types(b_enc.dtype, torch.float32))
    return Weights("jumprelu", tensors | {"threshold": threshold}, b_dec)
