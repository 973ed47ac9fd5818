"""Which kernels a device gets.

`SAE_LENS_GEMMA4_KERNELS` takes one set for all devices, when one is suspected: `plain` computes everything densely with
torch alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Protocol, cast

import torch

from sae_lens_gemma4.errors import check_name
from sae_lens_gemma4.kernels.pattern import Pattern
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.kernels.selection import Selection

SWITCH = "SAE_LENS_GEMMA4_KERNELS"
_MODULES = {"plain": "plain", "cpu": "cpu", "triton": "gpu"}


class Kernels(Protocol):
    """A module of kernels; see `cpu.py` for what they take and return."""

    def sums(self, pattern: Pattern, weight_e: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor: ...

    def dots(self, pattern: Pattern, left_rd: torch.Tensor, table_cd: torch.Tensor) -> torch.Tensor: ...

    def batch_topk(
        self,
        x_nd: torch.Tensor,
        W_fd: torch.Tensor,
        b_f: torch.Tensor,
        scale_f: torch.Tensor | None,
        k_total: int,
        bound: torch.Tensor | float | None = None,
        ranks: Ranks = ALONE,
    ) -> Selection: ...

    def row_topk(
        self,
        x_nd: torch.Tensor,
        W_fd: torch.Tensor,
        b_f: torch.Tensor,
        scale_f: torch.Tensor | None,
        k: int,
        latents: torch.Tensor | None = None,
        *,
        positive: bool,
    ) -> Selection: ...


def kernels_for(device: torch.device, dtype: torch.dtype = torch.float32, ranks: Ranks = ALONE) -> Kernels:
    """The kernels of a device: those that the environment asks for, else the fastest that it has.

    Args:
        dtype: of what is computed. Triton's kernels are for float32 and less; float64 has `plain`'s.
        ranks: who selects together. Triton's selection is for one process alone; several have `plain`'s.

    Raises:
        UnknownNameError: the environment asks for kernels that do not exist.
    """
    name = os.environ.get(SWITCH, "auto")
    if name == "auto":
        has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        name = "cpu" if device.type == "cpu" else "triton" if has_triton else "plain"
    check_name(SWITCH, name, ["auto", *_MODULES])
    if name == "triton" and (ranks.world > 1 or dtype == torch.float64):
        name = "plain"
    return cast(Kernels, importlib.import_module(f"sae_lens_gemma4.kernels.{_MODULES[name]}"))
