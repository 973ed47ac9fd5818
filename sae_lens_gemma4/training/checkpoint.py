"""Checkpoints: a run's whole state as safetensors and JSON, complete or absent.

sae_lens's checkpoints hold a pickle (`trainer_state.pt`), are written in place, and forget where in the text the run
was. Here each is written beside its place and renamed into it, an older one is removed only after that, and the state
of the text is part of it: a run that is killed at any moment goes on from the newest and computes the same bits.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.saving import CHECKPOINTS, write_folder
from sae_lens_gemma4.training.state import State

SCHEMA = 1
_NAME = re.compile(r"step_(\d{9})")
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run at one step.

    Attributes:
        step: batches taken from the stream.
        stream: `Position.to_dict` of the next row.
        log: bytes of the journal that were written by then.
        seconds: spent until then.
        facts: what must be the same when the run goes on: recipe, text, model.
        trainees: the state of each SAE, by name.
    """

    step: int
    stream: dict[str, Any]
    log: int
    seconds: float
    facts: dict[str, Any]
    trainees: Mapping[str, State]


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write it under `run`, and remove those that it replaces.

    Raises:
        ConfigError: it cannot be written; older ones are kept.
    """
    folder = run / CHECKPOINTS / f"step_{checkpoint.step:09d}"

    def write(partial: Path) -> None:
        for name, state in checkpoint.trainees.items():
            save_file({k: t.contiguous() for k, t in state.tensors.items()}, partial / f"{name}.safetensors")
        known = {k: getattr(checkpoint, k) for k in ("step", "stream", "log", "seconds", "facts")}
        trainees = {name: state.facts for name, state in checkpoint.trainees.items()}
        text = json.dumps({"schema": SCHEMA, **known, "trainees": trainees})  # NaN is allowed: JSON of our own
        (partial / _STATE).write_text(text, encoding="utf-8")

    write_folder(folder, write)
    for other in (run / CHECKPOINTS).iterdir():  # older ones, and what a kill left half written
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def load_checkpoint(run: Path, device: str = "cpu") -> Checkpoint | None:
    """The newest complete one under `run`, or None.

    Raises:
        ConfigError: it cannot be read, or another version of this package wrote it.
    """
    folders = _complete(run)
    if not folders:
        return None
    folder = folders[-1]
    try:
        data = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ConfigError(f"Checkpoint {folder} has schema {data['schema']}; this version reads {SCHEMA}.")
        trainees = {
            name: State(load_file(folder / f"{name}.safetensors", device=device), facts)
            for name, facts in data["trainees"].items()
        }
        known = {k: data[k] for k in ("step", "stream", "log", "seconds", "facts")}
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"Checkpoint {folder} cannot be read: {type(e).__name__}: {e}") from e
    return Checkpoint(**known, trainees=trainees)


def remove_checkpoints(run: Path) -> None:
    """All of them; one that is half removed must not look like one."""
    if (run / CHECKPOINTS).is_dir():
        going = run / f".{CHECKPOINTS}.removed"
        shutil.rmtree(going, ignore_errors=True)
        (run / CHECKPOINTS).rename(going)
        shutil.rmtree(going, ignore_errors=True)


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as it will be read back."""
    return cast("dict[str, Any]", json.loads(json.dumps(value, default=str)))


def check_same(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a run that goes on would not be the one that was stopped, naming what differs."""
    differences = list(_differences(was, now, ""))
    if differences:
        shown = "; ".join(differences[:4]) + ("; …" if len(differences) > 4 else "")
        raise ConfigError(f"The run that was stopped is another one: {shown}. Give this one a folder of its own.")


def _differences(was: Any, now: Any, where: str) -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in dict.fromkeys((*was, *now))
            for line in _differences(was.get(key), now.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if was == now else [f"{where} was {was!r} and is {now!r}"]


def _complete(run: Path) -> list[Path]:
    """Checkpoints by step. What is being written has a name that begins with a dot."""
    place = run / CHECKPOINTS
    return sorted(p for p in place.iterdir() if _NAME.fullmatch(p.name)) if place.is_dir() else []
