"""SAEs that this package carries, in sae_lens's own form: no hub, so stock's loader for folders reads them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, sae_lens_disk_loader
from safetensors.torch import load_file

NAME = "gemma4_package"


def _folder(repo_id: str, folder_name: str) -> Path:
    return Path(str(files(repo_id) / folder_name))


def load(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,  # noqa: ARG001  (there is nothing to download)
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    """A `PretrainedSaeHuggingfaceLoader`; `repo_id` is the name of a Python package."""
    folder = _folder(repo_id, folder_name)
    cfg, state = sae_lens_disk_loader(folder, device, cfg_overrides)
    sparsity = folder / SPARSITY_FILENAME
    return cfg, state, load_file(sparsity, device=device)["sparsity"] if sparsity.exists() else None


def load_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,  # noqa: ARG001  (there is nothing to download)
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A `PretrainedSaeConfigHuggingfaceLoader`."""
    return get_sae_lens_config_from_disk(_folder(repo_id, folder_name), device, cfg_overrides)
