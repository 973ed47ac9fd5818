"""A run as data: what a recipe file may say, checked before anything is loaded.

Recipes are YAML with the same names as these dataclasses. A key that does not exist is answered with the
nearest that does; a value of the wrong kind is named with its place in the file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from sae_lens.constants import DTYPE_MAP

from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.mapping import from_yaml


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The SAE to start from: a release and an id, or the path of a folder in sae_lens's form.

    `architecture` and `settings` override what its metadata says of its training (`k`, `matryoshka_widths`, …).
    """

    release: str | None = None
    sae_id: str | None = None
    path: str | None = None
    architecture: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.release is None) or (self.release is not None and self.sae_id is None):
            raise ConfigError("A warm start needs either `release` and `sae_id`, or `path`.")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model whose activations are learned: a name or path, and the class that hooks it."""

    name: str
    class_name: str = "Gemma4ProxyLM"
    hook_name: str | None = None  # the base SAE's own by default
    device: str = "cpu"
    dtype: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_name("dtype", self.dtype, DTYPE_MAP)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ConfigError(f"Device {self.device!r} cannot be used: {str(e).splitlines()[0]}") from e


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training text, held-out text and the context both are packed to. Held-out text must not be in training.

    With `isolate_documents`, documents packed into one block do not see each other.
    """

    train: list[Source]
    heldout: list[Source]
    context_size: int = 1024
    exclude_special_tokens: bool = True
    isolate_documents: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast. The defaults are those of the public run in which this was first done.

    Attributes:
        tokens: tokens to see in all, epochs included.
        batch_size: tokens a step.
        lr, lr_end, warm_up_steps: Adam's rate, its end after cosine decay (lr / 10 if None), linear warm-up.
        dead_after_steps: steps without firing after which a latent gets the auxiliary loss.
        buffer_blocks: blocks whose activations are mixed before they are served.
        batch_blocks: blocks a forward pass.
        log_every: steps between rows of the history.
    """

    tokens: int
    batch_size: int = 4096
    lr: float = 1e-4
    lr_end: float | None = None
    warm_up_steps: int = 0
    dead_after_steps: int = 1000
    buffer_blocks: int = 64
    batch_blocks: int = 16
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "dead_after_steps", "buffer_blocks", "batch_blocks", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} must be at least 1, not {getattr(self, name)}.")
        if self.lr <= 0:
            raise ConfigError(f"training.lr must be positive, not {self.lr}.")
        if self.tokens < self.batch_size:
            raise ConfigError(f"training.tokens ({self.tokens}) is less than one batch ({self.batch_size}).")
        if self.lr_end is not None and self.lr_end < 0:
            raise ConfigError(f"training.lr_end must not be negative, as {self.lr_end} is.")
        if not 0 <= self.warm_up_steps < self.steps:
            raise ConfigError(f"training.warm_up_steps ({self.warm_up_steps}) leaves none of {self.steps} steps.")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_size


@dataclass(frozen=True, kw_only=True)
class ContinueTrainingConfig:
    """A whole run: from which SAE, on which model, on which text, how, and where to. A recipe is this as YAML."""

    warm_start: WarmStart
    model: Model
    data: Data
    training: Training
    output: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2**63 - 1, not {self.seed}.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> ContinueTrainingConfig:
        """Read a recipe.

        Raises:
            ConfigError: no such file, not YAML, or a value that cannot be used, with its place.
            UnknownNameError: a key that does not exist.
        """
        return from_yaml(cls, path, "recipe")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_yaml(self) -> str:
        """The recipe that `from_yaml` reads; `ConfigError` where a value made in Python has no YAML form."""
        try:
            return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as e:
            raise ConfigError(f"The configuration cannot be kept as a recipe: {' '.join(map(str, e.args))}.") from e
