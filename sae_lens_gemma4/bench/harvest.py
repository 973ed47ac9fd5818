"""What it costs to feed SAEs: beside the bare forward, several layers beside one, ahead beside in turn, from disk.

All are streams of batches as training reads them, on the same text, and each figure is a ratio of two that took turns.
The shallower layers ride along with the deepest, and pay for a copy of their activations and their share of the mixing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae_lens_gemma4.activations.harvest import forwards
from sae_lens_gemma4.activations.stream import ActivationStream
from sae_lens_gemma4.bench.disk import CacheBench, Paired, bench_cache, random_text, step_like, steps
from sae_lens_gemma4.bench.models import random_model
from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

_BATCH_BLOCKS = 4
_BUFFER_BLOCKS = 64
"""Of a chunk that is read from a cache: the stream's own default."""
_CHUNKS = 8  # of a stream that is read ahead: the first cannot be, so that 16 / 9 is the most that it gives


@dataclass(frozen=True)
class HarvestBench:
    """What was run and what came out.

    Attributes:
        tokens: of a chunk.
        tokens_per_second: of the stream of three layers.
        layers_ratio: three layers by the deepest alone.
        forward: the bare forward of three layers by their stream: the share that no stream can save.
        prefetch: harvest and steps of about the same length, in turn by ahead.
    """

    hidden: int
    layers: list[int]
    tokens: int
    rounds: int
    threads: int
    device: str
    tokens_per_second: float
    layers_ratio: Paired
    forward: Paired
    prefetch: Paired
    cache: CacheBench

    @property
    def ratios(self) -> list[Paired]:
        return [self.layers_ratio, self.forward, self.prefetch, self.cache.read, self.cache.prefetch]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_harvest(
    hidden: int = 512,
    n_layers: int = 12,
    tokens: int = 4096,
    context: int = 256,
    rounds: int = 9,
    cache_gb: float = 1.0,
    folder: str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> HarvestBench:
    """Stream three layers of a random model (a sixth, a half and nearly the whole way up), and a cache in `folder`.

    Raises:
        ConfigError: sizes that make no model or no block, a device that is not there, a cache that cannot be written.
    """
    if hidden < 64 or hidden % 64 or n_layers < 6 or tokens < context or context < 2 or rounds < 1:
        raise ConfigError("hidden must be a multiple of 64, layers at least 6, tokens at least the context, rounds 1.")
    model: Any = Gemma4ProxyLM(random_model(hidden, n_layers, seed))
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise ConfigError(f"device {device!r} cannot be used: {str(e).splitlines()[0]}") from e
    layers = [n_layers // 6, n_layers // 2, n_layers - 2]
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    blocks = tokens // context
    text = random_text(blocks, context, seed)

    def stream(hook_names: list[str], buffer_blocks: int = blocks, prefetch: bool = False) -> ActivationStream:
        settings: dict[str, Any] = {
            "batch_size": context,
            "seed": seed,
            "batch_blocks": _BATCH_BLOCKS,
            "device": device,
        }
        return ActivationStream(model, text, hook_names, buffer_blocks=buffer_blocks, prefetch=prefetch, **settings)

    def forward() -> None:
        for _ in forwards(model, text, hooks, batch_blocks=_BATCH_BLOCKS):
            pass

    contestants: dict[str, Callable[[], None]] = {
        "all": partial(steps, partial(stream, hooks), id, blocks),
        "deepest": partial(steps, partial(stream, hooks[-1:]), id, blocks),
        "forward": forward,
    }
    for run in contestants.values():
        run()
    times = race(contestants, rounds, device, seed)
    chunk_seconds = statistics.median(times["all"])
    step = step_like(hidden, context, chunk_seconds / blocks, device)
    small = max(1, blocks // _CHUNKS)
    ways = {ahead: partial(steps, partial(stream, hooks, small, ahead), step, blocks) for ahead in (False, True)}
    stepped = race(ways, rounds, device, seed)
    return HarvestBench(
        hidden,
        layers,
        blocks * context,
        rounds,
        torch.get_num_threads(),
        device,
        blocks * context / chunk_seconds,
        Paired("three layers by the deepest alone", *ratio(times["all"], times["deepest"]), "≤ 1.1"),
        Paired("bare forward by three layers", *ratio(times["forward"], times["all"])),
        Paired("harvest and steps, in turn by ahead", *ratio(stepped[False], stepped[True])),
        bench_cache(hidden, context, max(blocks, _BUFFER_BLOCKS), cache_gb, folder, rounds, device),
    )
