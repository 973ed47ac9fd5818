"""One run in several processes, as torchrun starts them: which process this is, and where it may write.

A batch is cut into as many parts as there are processes; each computes its own part's gradients, and all take the same
step. So all have the same weights at all times, and rank 0 alone has to keep them: the others' output is a folder that
does not last.

A rank that fails brings the others down by torchrun; nobody waits in vain for one that is still alive.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.training.config import ContinueTrainingConfig

_PATIENCE = timedelta(days=7)
"""A rank waits for another that builds a cache; whether it is alive is torchrun's to know."""


def leads() -> bool:
    """Whether this process is the one that says and publishes what a run left; true without torchrun."""
    return not dist.is_torchelastic_launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(cfg: ContinueTrainingConfig) -> Iterator[Ranks]:
    """The processes that torchrun, or `torch.distributed` before this, started for a run; without either, this one.

    Under torchrun the device `cuda` is the one of the process's local rank.

    Raises:
        ConfigError: settings that several processes cannot have.
    """
    starts = not dist.is_initialized() and dist.is_torchelastic_launched()
    if starts:
        backend = "gloo"
        if torch.device(cfg.model.device).type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=_PATIENCE)
    ranks = ALONE
    if dist.is_initialized():
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    check(cfg, ranks.world)
    yield ranks
    if starts:  # after an error the others may be waiting still: this process ends, and with it theirs
        dist.destroy_process_group()


def check(cfg: ContinueTrainingConfig, world: int) -> None:
    """Raise `ConfigError` for a run that so many processes cannot share."""
    if world == 1:
        return
    if cfg.activations.batch_size % world:
        raise ConfigError(
            f"activations.batch_size is {cfg.activations.batch_size}, which {world} processes cannot share evenly; "
            f"take a multiple of {world}."
        )
    devices = {"model.device": cfg.model.device} | {f"sae.device of {run.name}": run.sae.device for run in cfg.runs()}
    for name, device in devices.items():
        if device is not None and (torch.device(device).index is not None or device != cfg.model.device):
            raise ConfigError(
                f"{name} is {device!r}; several processes need model and SAEs on one device, cpu or cuda, of which "
                "each takes its own."
            )


def for_reading(ranks: Ranks) -> Ranks:
    """The same ranks with a group of their own, for another thread."""
    return ranks if ranks.group is None else Ranks(ranks.rank, ranks.world, dist.new_group(timeout=_PATIENCE))


@contextmanager
def output(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """Where this rank may write: `folder` for rank 0, and what lasts no longer than this for the others."""
    if ranks.leads:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sae_lens_gemma4-") as own:
        yield Path(own)
