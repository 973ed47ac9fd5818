"""What it costs to feed several SAEs from one forward pass, against feeding the deepest one alone.

Both are streams of batches as training reads them, on the same text; the shallower layers ride along, and pay for a
copy of their activations and their share of the mixing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.stream import ActivationStream
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.models.bench import random_model
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.racing import race, ratio

TARGET = 1.1
"""The most that several may take, of what the deepest takes alone."""


@dataclass(frozen=True)
class HarvestBench:
    """What was run and what came out; times are those of one chunk of `tokens`, medians are of rounds."""

    hidden: int
    layers: list[int]
    tokens: int
    rounds: int
    threads: int
    device: str
    tokens_per_second: float
    ratio: float
    ratio_quartiles: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_harvest(
    hidden: int = 512,
    n_layers: int = 12,
    tokens: int = 4096,
    context: int = 256,
    rounds: int = 9,
    device: str = "cpu",
    seed: int = 0,
) -> HarvestBench:
    """Stream three layers (a sixth, a half and nearly the whole way up) and the last of these alone.

    Raises:
        ConfigError: sizes that make no model or no block, or a device that is not there.
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
    drawn = torch.randint(30, 2000, (blocks, context), generator=torch.Generator().manual_seed(seed))
    everything = torch.ones_like(drawn, dtype=torch.bool)
    text = Corpus(drawn, everything, torch.arange(blocks)[:, None].expand_as(drawn).clone(), "random tokens")

    def one_chunk(hook_names: list[str]) -> None:
        stream = ActivationStream(
            model, text, hook_names, batch_size=context, seed=seed, buffer_blocks=blocks, batch_blocks=4, device=device
        )
        for _ in range(blocks):
            next(stream)

    contestants: dict[str, Callable[[], None]] = {
        "all": lambda: one_chunk(hooks),
        "deepest": lambda: one_chunk(hooks[-1:]),
    }
    for run in contestants.values():
        run()
    times = race(contestants, rounds, device, seed)
    median, quartiles = ratio(times["all"], times["deepest"])
    speed = blocks * context / sorted(times["all"])[rounds // 2]
    return HarvestBench(
        hidden, layers, blocks * context, rounds, torch.get_num_threads(), device, speed, median, quartiles
    )
