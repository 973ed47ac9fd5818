"""A run as data: what a recipe file may say, checked before anything is loaded.

Recipes are YAML with the same names as these dataclasses. A key that does not exist is answered with the nearest
that does; a value of the wrong kind is named with its place in the file.

One run trains one SAE or several, of one model on one stream of activations. What belongs to an SAE (`warm_start`,
`sae`, `calibration`, `training`, `gate`) stands once for all; an entry of `saes` says what differs in that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from sae_lens.constants import DTYPE_MAP

from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.mapping import from_mapping, from_yaml
from sae_lens_gemma4.training.calibration import Calibration
from sae_lens_gemma4.training.phases import Gate, Training, positive
from sae_lens_gemma4.training.saving import OF_A_RUN

if TYPE_CHECKING:
    from sae_lens_gemma4.models.interface import HookedModel

_LAYER = "{layer}"


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The SAE to start from: a release and an id, or the path of a folder or file of any form that can be read.

    `absorb_thresholds` takes thresholds that differ between latents into the weights, where the architecture has one
    threshold for all (`training_form`).
    """

    release: str | None = None
    sae_id: str | None = None
    path: str | None = None
    absorb_thresholds: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.release is None) or (self.release is not None and self.sae_id is None):
            raise ConfigError("A warm start needs either `release` and `sae_id`, or `path`.")
        if self.path is not None and self.sae_id is not None:
            raise ConfigError("`sae_id` goes with `release`; a `path` is that of one SAE.")

    @property
    def source(self) -> dict[str, str | None]:
        return {"release": self.release, "sae_id": self.sae_id, "path": self.path}


@dataclass(frozen=True, kw_only=True)
class SAEForm:
    """What the SAE is. With a warm start all of it is the base SAE's, unless said otherwise.

    Attributes:
        hook_name: where it reads; `{layer}` stands for the layer of an entry of `saes`.
        architecture: of sae_lens's training SAEs that this package can continue.
        d_sae: latents; for a new SAE only.
        settings: fields of the architecture's config (`k`, `matryoshka_widths`, …).
        k_aux: dead latents that the auxiliary loss uses a token; half of d_in if None, as in sae_lens.
        dtype: of the weights; the base SAE's, or float32.
        device: on which it is trained; the model's if None.
    """

    hook_name: str | None = None
    architecture: str | None = None
    d_sae: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    k_aux: int | None = None
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        positive(self, "sae", "d_sae", "k_aux")
        if self.dtype is not None:
            check_name("dtype", self.dtype, DTYPE_MAP)
        if self.device is not None:
            _check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model whose activations are learned: a name or path, and the class that hooks it."""

    name: str
    class_name: str = "Gemma4ProxyLM"
    device: str = "cpu"
    dtype: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_name("dtype", self.dtype, DTYPE_MAP)
        _check_device(self.device)

    def load(self) -> HookedModel:
        """The model itself; errors as `load_for_sae_lens`."""
        from sae_lens_gemma4.models.loading import load_for_sae_lens  # slow; a recipe is checked without it

        kwargs = self.kwargs | ({"dtype": self.dtype} if self.dtype else {})
        return load_for_sae_lens(self.class_name, self.name, self.device, kwargs)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training text, held-out text and the context both are put into. Held-out text must not be in training.

    Attributes:
        bos: open every block and every document with BOS, if the tokenizer has one.
        packed: documents end to end; else whole documents, each in blocks of its own.
        isolate_documents: documents packed into one block do not see each other.
        shard_blocks: read the training text so many blocks at a time, over and over, instead of holding all of it.
            `tokens` of a source are then its share of the mixture and no limit; all sources say them or none.
        cache: a folder in which the tokens of the training text are kept for the next run.
    """

    train: list[Source]
    heldout: list[Source]
    context_size: int = 1024
    exclude_special_tokens: bool = True
    bos: bool = True
    packed: bool = True
    isolate_documents: bool = False
    shard_blocks: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("train", "heldout"):
            if not getattr(self, name):
                raise ConfigError(f"data.{name} must name at least one source.")
        positive(self, "data", "shard_blocks")
        if self.context_size < 2:
            raise ConfigError(f"data.context_size must be at least 2 (BOS and one token), not {self.context_size}.")
        if self.shard_blocks is not None and self.cache is not None:
            raise ConfigError("data.cache keeps a text that is held whole; with data.shard_blocks none is.")


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How activations are made and mixed, the same for all SAEs of a run.

    Attributes:
        batch_size: tokens a step.
        buffer_blocks: blocks whose tokens are mixed with each other.
        batch_blocks: blocks a forward pass.
        dtype: of batches and of the cache. Chunks are held in the model's, and SAEs are trained in their own.
        cache: a folder in which the activations of the whole training text are kept, for epochs and later runs.
        max_skipped: share of tokens whose activations may be no numbers; these are left out and counted.
    """

    batch_size: int = 4096
    buffer_blocks: int = 64
    batch_blocks: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: str | None = None
    max_skipped: float = 1e-3

    def __post_init__(self) -> None:
        positive(self, "activations", "batch_size", "buffer_blocks", "batch_blocks")
        if not 0 <= self.max_skipped < 1:
            raise ConfigError(f"activations.max_skipped must lie in 0..1, not {self.max_skipped}.")


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """What is written down while a run goes on. `log.jsonl` always is.

    Attributes:
        log_every: steps between rows of the training stream's figures.
        evaluate_every: steps between evaluations on held-out text; None for the end alone.
        evaluate_tokens: of each held-out corpus, its first so many, for these; None for all.
        checkpoint_every: steps between checkpoints, from which a killed run goes on.
        downstream_tokens: tokens of each held-out corpus on which the finished SAE's effect on the model's predictions
            is measured; None for all.
        loggers: where rows go besides.
        wandb_project: needed for wandb.
    """

    log_every: int = 20
    evaluate_every: int | None = None
    evaluate_tokens: int | None = None
    checkpoint_every: int = 500
    downstream_tokens: int | None = 0
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        positive(self, "monitoring", "log_every", "evaluate_every", "evaluate_tokens", "checkpoint_every")
        if ("wandb" in self.loggers) != (self.wandb_project is not None):
            raise ConfigError("monitoring.wandb_project goes with the logger wandb, and wandb with a project.")


@dataclass(frozen=True, kw_only=True)
class SAERun:
    """One SAE of a run, everything said."""

    name: str
    layer: int | None
    warm_start: WarmStart | None
    sae: SAEForm
    calibration: Calibration | None
    training: Training
    gate: Gate | None


_OF_AN_SAE = tuple(f.name for f in fields(SAERun) if f.name not in ("name", "layer"))


@dataclass(frozen=True, kw_only=True)
class ContinueTrainingConfig:
    """A whole run: which SAEs, on which model, on which text, how, and where to. A recipe is this as YAML.

    Attributes:
        output: folder of the run; each SAE gets a folder of its own in it.
        warm_start: the SAE to start from; without one the SAE is new.
        calibration: fits an SAE to the activations before its first step; None for not.
        gate: what must hold before an SAE may be published.
        saes: entries with a `layer`, a `name`, or both, and what of `warm_start`, `sae`, `calibration`, `training` and
            `gate` differs in that SAE. One SAE, as the rest says, where there are none.
    """

    model: Model
    data: Data
    training: Training
    output: str
    warm_start: WarmStart | None = None
    sae: SAEForm = SAEForm()
    calibration: Calibration | None = field(default_factory=Calibration)
    gate: Gate | None = None
    activations: Activations = Activations()
    monitoring: Monitoring = Monitoring()
    saes: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2**63 - 1, not {self.seed}.")
        if self.activations.cache is not None and self.data.shard_blocks is not None:
            raise ConfigError("activations.cache keeps a text that is held whole; with data.shard_blocks none is.")
        for part, cache in (("activations", self.activations.cache), ("data", self.data.cache)):
            if cache is not None and Path(cache).resolve().is_relative_to(Path(self.output).resolve()):
                raise ConfigError(f"{part}.cache lies in the output, which a new run clears; keep it elsewhere.")
        if self.monitoring.evaluate_every is None and any(run.training.needs_best for run in self.runs()):
            raise ConfigError("A phase that starts from the best state needs monitoring.evaluate_every: which is best?")
        names = [run.name for run in self.runs()]
        if len(set(names)) < len(names):
            raise ConfigError(f"Two SAEs of a run have one name: {', '.join(names)}.")

    def runs(self) -> list[SAERun]:
        """Each SAE of the run with what it takes from the whole.

        Raises:
            ConfigError, UnknownNameError: an entry of `saes` that cannot be read, with its place.
        """
        return [self._run(entry, f"saes[{i}]") for i, entry in enumerate(self.saes or [{}])]

    def _run(self, entry: Mapping[str, Any], where: str) -> SAERun:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where} must be a mapping such as {{layer: 21}}, not {entry!r}.")
        for key in entry:
            check_name(f"key in {where}", key, ("layer", "name", *_OF_AN_SAE))
        layer = entry.get("layer")
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise ConfigError(f"{where}.layer must be the number of a layer, not {layer!r}.")
        name = entry.get("name", "sae" if layer is None else f"layer_{layer}")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ConfigError(f"{where}.name becomes a folder: letters, digits, '.', '_' and '-' only, not {name!r}.")
        if name in OF_A_RUN:
            raise ConfigError(f"{where}.name {name!r} is that of one of the run's own files.")
        whole = {key: None if (part := getattr(self, key)) is None else asdict(part) for key in _OF_AN_SAE}
        own = {key: value for key, value in entry.items() if key in _OF_AN_SAE}
        merged = _at_layer(_over(whole, own), layer, where)
        run = from_mapping(SAERun, merged | {"name": name, "layer": layer}, where)
        if run.warm_start is None and (missing := [n for n in ("architecture", "d_sae") if not getattr(run.sae, n)]):
            raise ConfigError(f"A new SAE needs sae.{' and sae.'.join(missing)}; or a warm_start.")
        if run.warm_start is None and run.sae.hook_name is None:
            raise ConfigError("A new SAE needs sae.hook_name.")
        if run.warm_start is not None and run.sae.d_sae is not None:
            raise ConfigError("sae.d_sae is for new SAEs; one that is continued has its own.")
        return run

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


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(f"Device {device!r} cannot be used ({reason}). Another is stated as `device`, as cpu.") from e


def _over(below: Any, above: Any) -> Any:
    """`above` laid over `below`, mapping by mapping."""
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}
    return above


def _at_layer(value: Any, layer: int | None, where: str) -> Any:
    """`value` with the layer's number in the place of `{layer}` in every text."""
    if isinstance(value, Mapping):
        return {key: _at_layer(v, layer, where) for key, v in value.items()}
    if isinstance(value, list):
        return [_at_layer(v, layer, where) for v in value]
    if isinstance(value, str) and _LAYER in value:
        if layer is None:
            raise ConfigError(f"{where}.layer is missing: {value!r} needs it.")
        return value.replace(_LAYER, str(layer))
    return value
