"""A run as data: what a recipe file may say, checked before anything is loaded.

Recipes are YAML with the same names as these dataclasses. A key that does not exist is answered with the
nearest that does; a value of the wrong kind is named with its place in the file.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from sae_lens.constants import DTYPE_MAP

from sae_lens_gemma4.errors import ConfigError, UnknownNameError, check_name

T = TypeVar("T")


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
class Source:
    """Text: whatever `build_corpus` reads by name, a split of it, and how many tokens to take."""

    dataset: str
    split: str = "train"
    tokens: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"tokens of {self.dataset} must be at least 1, not {self.tokens}.")


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
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(f"Recipe {path} cannot be read: {e.strerror}.") from e
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(f"Recipe {path} is not YAML: {str(e).splitlines()[0]}.") from e
        return from_mapping(cls, data, "recipe")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_yaml(self) -> str:
        """The recipe that `from_yaml` reads; `ConfigError` where a value made in Python has no YAML form."""
        try:
            return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as e:
            raise ConfigError(f"The configuration cannot be kept as a recipe: {' '.join(map(str, e.args))}.") from e


def from_mapping(cls: type[T], data: Any, where: str) -> T:
    """Make a dataclass of plain data, strictly: unknown keys, missing keys and wrong kinds are errors in words."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a mapping, not {_kind(data)}.")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in data:
        if key not in known:
            raise UnknownNameError(f"key in {where}", key, known)
    missing = [n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return cls(**{key: typed(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`: a dataclass, `list[...]`, `dict[str, Any]`, `X | None`, a `Literal` or a plain type.

    Raises:
        ConfigError: it is none; `where` says which value.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (h for h in get_args(hint) if h is not type(None))
    if is_dataclass(hint):
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        return check_name(where, value, get_args(hint))
    if get_origin(hint) is list:
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{where} must be a list with at least one entry, not {_kind(value)}.")
        return [typed(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    plain = get_origin(hint) or hint
    if plain is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a text
        except ValueError:
            pass
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{where} must be {plain.__name__}, not {_kind(value)} ({value!r}).")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
