"""Saving so that a folder is complete or absent: written beside its place, then renamed into it.

Ctrl-C or a full disk leaves what was there before. Only a kill between the two renames of a replacement leaves a gap,
and then both versions beside it, under names that begin with a dot. Nothing that is not an SAE is ever replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SPARSITY_FILENAME
from safetensors.torch import save_file

from sae_lens_gemma4.errors import ConfigError

RECIPE_FILENAME = "recipe.yaml"


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
        ConfigError: what is there must not be replaced, or nothing can be written (`check_place`).
    """
    folder = check_place(folder)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    try:
        write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("r+b") as handle:
                    os.fsync(handle.fileno())
        partial.chmod(0o755)  # mkdtemp's folders are private
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def save_sae(
    sae: TrainingSAE[Any],
    folder: str | Path,
    *,
    log10_sparsity_f: torch.Tensor | None = None,
    recipe: str | None = None,
) -> Path:
    """Save in sae_lens's inference form: what `SAE.load_from_disk` reads, with or without this package.

    Args:
        log10_sparsity_f: log10 of each latent's firing frequency `[d_sae]`, as sae_lens saves it.
        recipe: YAML that repeats the run, kept beside the weights.
    """

    def write(partial: Path) -> None:
        sae.save_inference_model(partial)
        if log10_sparsity_f is not None:
            save_file({"sparsity": log10_sparsity_f.float().contiguous().cpu()}, partial / SPARSITY_FILENAME)
        if recipe is not None:
            (partial / RECIPE_FILENAME).write_text(recipe, encoding="utf-8")

    return write_folder(folder, write)
