"""Saving so that a folder is complete or absent: written beside its place, then renamed into it.

Ctrl-C or a full disk leaves what was there before. Only a kill between the two renames of a replacement leaves a gap,
and then both versions beside it, under names that begin with a dot. Nothing that is not an SAE is ever replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from sae_lens import TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError
from safetensors.torch import save_file

from sae_lens_gemma4.errors import ConfigError

RECIPE_FILENAME, LOG_FILENAME, CHECKPOINTS = "recipe.yaml", "log.jsonl", "checkpoints"
_LOCK = ".lock"
OF_A_RUN = {RECIPE_FILENAME, LOG_FILENAME, CHECKPOINTS, "tensorboard", "wandb", "README.md"}


def check_place(folder: str | Path, *, keep: str | Path | None = None) -> Path:
    """Raise `ConfigError` if an SAE cannot be saved as `folder` without losing something that is not one.

    A folder may be replaced if it is empty or an SAE itself; a file, another folder, and `keep` (the SAE that a run
    starts from) may not. The parent is created, and tried.
    """
    folder = Path(folder).resolve()
    if keep is not None and folder == Path(keep).resolve():
        raise ConfigError(f"Output {folder} is the SAE that the run starts from; it would be replaced.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Output {folder} is a file.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SAE_CFG_FILENAME).is_file():
        raise ConfigError(f"Output {folder} is a folder with other things in it; they would be lost.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as e:
        raise ConfigError(f"Output {folder} cannot be written: {e.strerror}.") from e
    return folder


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill an empty folder, then put that folder in the place of `folder`, replacing what is there.

    Raises:
        ConfigError: what is there must not be replaced, or nothing can be written (`check_place`), as on a full disk.
    """
    folder = check_place(folder)
    with replacing(folder) as partial:
        write(partial)
    return folder


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write to, which takes its place when all went well. Whether what is there may
    be replaced is for the caller to know.

    Raises:
        ConfigError: nothing can be written there; what was there before is kept.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}.") from e
    replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("r+b") as handle:
                    os.fsync(handle.fileno())
        partial.chmod(0o755)  # mkdtemp's folders are private
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except BaseException as e:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError | SafetensorError):
            reason = getattr(e, "strerror", None) or e
            raise ConfigError(f"{folder} cannot be written: {reason}. What was there before is kept.") from e
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def save_sae(sae: TrainingSAE[Any], folder: str | Path) -> Path:
    """Save in sae_lens's inference form: what `SAE.load_from_disk` reads, with or without this package."""

    def write(partial: Path) -> None:
        sae.save_inference_model(partial)

    return write_folder(folder, write)


def save_sparsity(folder: Path, frequency_f: torch.Tensor) -> None:
    """Beside an SAE's weights, how often each latent fires `[d_sae]`: log10, and −10 for never, as sae_lens has it."""
    log10_f = (frequency_f.double() + 1e-10).log10().float().contiguous().cpu()
    save_file({"sparsity": log10_f}, folder / SPARSITY_FILENAME)


def check_run_folder(folder: str | Path, *, resume: bool, replace: bool, keep: Iterable[str | Path] = ()) -> Path:
    """The place of a run, if a run can be put there and nothing is lost but an older run, and that only by `replace`.

    Args:
        resume: a run may be in it, and goes on.
        replace: a run may be in it, and is removed (by `clear_run_folder`).
        keep: files and folders that the run reads, which must not lie in what is removed.

    Raises:
        ConfigError: it cannot be written, holds a run that neither goes on nor is replaced, or holds other things.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Output {folder} is a file.")
    entries = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")] if folder.is_dir() else []
    others = [p.name for p in entries if not _is_of_a_run(p)]
    if entries and not resume and (others or not (folder / LOG_FILENAME).is_file()):
        named = f" ({', '.join(others[:3])})" if others else ""
        raise ConfigError(f"Output {folder} is a folder with other things in it{named}; they would be lost.")
    if entries and not resume and not replace:
        raise ConfigError(f"Output {folder} holds a run. Resume it, replace it, or give this one another folder.")
    if entries and resume and not (folder / LOG_FILENAME).is_file():
        raise ConfigError(f"Output {folder} holds no run to resume, and is not empty.")
    for path in map(Path, keep):
        if path.resolve().is_relative_to(folder) and not resume:
            raise ConfigError(f"The run starts from {path}, which lies in its output {folder}: it would be replaced.")
    place = folder if folder.exists() else folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise ConfigError(f"Output {folder} cannot be written: {e.strerror}.") from e
    return folder


def clear_run_folder(folder: Path) -> None:
    """Remove an older run's files, as `check_run_folder` allowed."""
    for entry in folder.iterdir():
        if entry.name != _LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the operating system lets go of it when this one dies.

    Raises:
        ConfigError: another process is at this run.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        raise ConfigError(f"Another process is at the run in {folder}.") from e
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


def _is_of_a_run(path: Path) -> bool:
    return path.name in OF_A_RUN or (path / SAE_CFG_FILENAME).is_file()
