"""What a run writes down while it goes on: one JSON object a line, and TensorBoard or wandb beside it.

sae_lens logs to wandb or nowhere. The file needs no account, is read with one line of pandas, and takes part in a
resume: what was written after the checkpoint is cut off, because those steps are taken again.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.saving import LOG_FILENAME

_WANDB_ID = ".wandb-run"


def check_loggers(loggers: list[str]) -> None:
    """Raise `ConfigError` for a logger that is not installed."""
    if "tensorboard" in loggers:
        _summary_writer()


class Journal:
    """Rows by SAE and step.

    Args:
        run: the run's folder.
        keep: bytes of an older journal to go on from; 0 for a new one.
        loggers: "tensorboard", "wandb" or both, besides the file.
        settings: the recipe, for wandb.

    Raises:
        ConfigError: a logger that is not installed; later, a file that cannot be written.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int = 0,
        loggers: list[str] | None = None,
        project: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._file = (run / LOG_FILENAME).open("ab", buffering=0)
        self._file.truncate(keep)
        self._tensorboard, self._wandb = None, None
        if "tensorboard" in (loggers or []):
            self._tensorboard = _summary_writer()(str(run / "tensorboard"))
        if "wandb" in (loggers or []):
            self._wandb = _wandb(run, project, settings, resumes=keep > 0)

    def write(self, sae: str, kind: str, row: Mapping[str, Any]) -> None:
        """One row: `kind` is what it is of, as "training", "heldout" or "event"; `row` has at least its step."""
        line = json.dumps({"sae": sae, "kind": kind, **plain(row)}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
        except OSError as e:
            raise ConfigError(f"{self._file.name} cannot be written: {e.strerror or e}.") from e
        numbers = {f"{sae}/{kind}/{key}": value for key, value in _flat(row).items() if key != "step"}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log({**numbers, f"{sae}/step": row["step"]})

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def plain(value: Any) -> Any:
    """`value` without what strict JSON has no word for: numbers that are none become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + key] = value
    return numbers


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ConfigError("The logger tensorboard is not installed: pip install tensorboard.") from e
    return SummaryWriter


def _wandb(run: Path, project: str | None, settings: Mapping[str, Any] | None, resumes: bool) -> Any:
    """The wandb run of this folder; a new one unless the run is resumed."""
    import wandb

    known = run / _WANDB_ID
    name = known.read_text().strip() if resumes and known.is_file() else uuid.uuid4().hex[:12]
    known.write_text(name)
    try:
        return wandb.init(
            project=project, name=run.name, config=dict(settings or {}), dir=str(run), id=name, resume="allow"
        )
    except (wandb.Error, OSError) as e:
        raise ConfigError(f"wandb cannot be used: {e}") from e
