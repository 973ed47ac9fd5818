"""What a bench ran on: kind of device, name of the processor, versions of what is raced."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path

import torch

from sae_lens_gemma4.errors import ConfigError

_PACKAGES = ("torch", "triton", "sae-lens", "dictionary-learning", "eai-sparsify")
KINDS = ("cpu", "cuda")


def device_kind(device: str) -> str:
    """ "cpu" or "cuda"; `ConfigError` for a device that is neither, or not there."""
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise ConfigError(f"Device {device!r} cannot be used: {str(e).splitlines()[0]}") from e
    if kind not in KINDS:
        raise ConfigError(f"Device {device!r} is neither a CPU nor a CUDA device.")
    return kind


def package_versions() -> dict[str, str]:
    """Of the packages that are raced and what they run on; those that are not installed are left out."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def device_name(kind: str) -> str:
    """What the processor calls itself."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
