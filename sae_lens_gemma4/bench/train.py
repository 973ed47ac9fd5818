"""Tokens a second from text to trained SAEs: one forward pass that stops after the deepest of three layers, and a step
of one SAE at each.

In every round each contestant goes through the same text once, its activations mixed in the same order: harvest alone,
our steps alone (on batches that are there), harvest with our steps, and harvest with sae_lens's. Shares are of the
whole with our steps; where harvest and steps overlap they add up to more than 1.

Weights are random, which costs what trained ones cost. Of gemma-4-E4B the shape is kept: 42 layers of 2,560, five of
six with a window of 512, heads of 256 and 512, the last 18 sharing keys and values, per-layer embeddings of 256. Its
numbers of heads (8, and 2 for keys and values) and its feed-forward width (10,240) were not read from the checkpoint.

Shapes: `n` tokens of a batch, `d` the model's width, `f` latents.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.activations.stream import ActivationStream, Batch
from sae_lens_gemma4.bench.contestants import CONTESTANTS, OURS, STOCK, Contestant, training_sae
from sae_lens_gemma4.bench.data import SIZES, Size, Start
from sae_lens_gemma4.bench.machine import device_kind, device_name, package_versions
from sae_lens_gemma4.bench.models import random_model
from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.errors import ConfigError, check_name
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

TARGET = 35_000
"""Tokens a second that are to be reached on a GPU at the seed's size."""


@dataclass(frozen=True)
class Scene:
    """A model, the layers that are read, and how.

    Attributes:
        chunks: of the text; each is `blocks` blocks of `context` tokens, mixed together.
        forward_blocks: of one forward pass.
    """

    make_model: Callable[[str], Any]
    layers: tuple[int, int, int]
    size: Size
    context: int
    blocks: int
    forward_blocks: int
    chunks: int
    rounds: int

    @property
    def tokens(self) -> int:
        return self.chunks * self.blocks * self.context


def _tiny(device: str) -> Any:
    return random_model(64, 6, seed=0).to(device)


def _e4b(device: str) -> Any:
    layers = 42
    settings: dict[str, Any] = {
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size": 2560,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 10_240,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(layers)],
        "sliding_window": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 18,
    }
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Gemma4TextConfig(**settings), dtype=torch.bfloat16).eval()


SCENES = {
    "tiny": Scene(_tiny, (1, 3, 4), Size(64, 1024, 256, 16, (256, 1024)), 64, 16, 4, 2, 5),
    "e4b": Scene(_e4b, (7, 21, 35), SIZES["seed"], 1024, 64, 16, 4, 3),
}
"""By the names that the command line has for them."""
USUAL = {"cpu": "tiny", "cuda": "e4b"}
"""The scene of a kind of device unless another is asked for."""


@dataclass(frozen=True)
class TrainBench:
    """What was run and what came out; seconds are those of `tokens` tokens, medians of rounds.

    Attributes:
        tokens_per_second: with our steps.
        harvest_share, steps_share: harvest alone, and our steps alone, as shares of harvest with our steps.
        by_ours: the time with sae_lens's steps as a multiple of that with ours, and the quartiles of rounds.
    """

    kind: str
    name: str
    scene: str
    size: Size
    layers: tuple[int, int, int]
    tokens: int
    rounds: int
    threads: int
    prefetch: bool
    versions: dict[str, str]
    seconds: dict[str, float]
    tokens_per_second: float
    harvest_share: float
    steps_share: float
    by_ours: float
    by_ours_quartiles: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Once:
    """A text that ends, so that nothing is read ahead for whoever comes next."""

    def __init__(self, text: Corpus) -> None:
        self._text = text

    def shards(self, start: dict[str, Any] | None) -> Iterator[tuple[Corpus, dict[str, Any] | None]]:  # noqa: ARG002
        yield self._text, None


def bench_train(
    scene_name: str,
    device: str,
    *,
    chunks: int | None = None,
    rounds: int | None = None,
    prefetch: bool | None = None,
    seed: int = 0,
) -> TrainBench:
    """Race harvest and steps, apart and together.

    Args:
        scene_name: of `SCENES`.
        chunks, rounds: the scene's, if None.
        prefetch: whether the next chunk is read while steps are taken; on CUDA alone, if None.

    Raises:
        UnknownNameError: no such scene.
        ConfigError: numbers that make no sense, or a device that is not there.
    """
    scene = SCENES[check_name("model size", scene_name, SCENES)]
    kind = device_kind(device)
    chunks, rounds = chunks or scene.chunks, rounds or scene.rounds
    if min(chunks, rounds) < 1:
        raise ConfigError("chunks and rounds must be at least 1.")
    prefetch = kind == "cuda" if prefetch is None else prefetch
    text, model = _text(chunks * scene.blocks, scene.context, seed), Gemma4ProxyLM(scene.make_model(device))
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in scene.layers]

    def stream() -> ActivationStream:
        return ActivationStream(
            model, _Once(text), hooks, batch_size=scene.size.batch, seed=seed, buffer_blocks=scene.blocks,
            batch_blocks=scene.forward_blocks, device=device, prefetch=prefetch,
        )  # fmt: skip

    first = next(held := stream())
    held.close()
    starts = {hook: _start(scene.size, device, first[hook], seed) for hook in hooks}
    trained = {name: {h: CONTESTANTS[name](s, "float32") for h, s in starts.items()} for name in (OURS, STOCK)}
    batches = text.n_tokens // scene.size.batch

    def harvest(take: Callable[[Batch], None]) -> Callable[[], None]:
        def run() -> None:
            for batch in stream():
                take(batch)

        return run

    def steps_alone() -> None:
        for _ in range(batches):
            _steps(trained[OURS], first)

    contestants: dict[str, Callable[[], None]] = {
        "harvest": harvest(lambda _: None),
        "steps": steps_alone,
        "both": harvest(lambda batch: _steps(trained[OURS], batch)),
        "sae_lens": harvest(lambda batch: _steps(trained[STOCK], batch)),
    }
    for name in trained:
        _steps(trained[name], first)
    contestants["harvest"]()
    times = race(contestants, rounds, device, seed)
    seconds = {name: statistics.median(spent) for name, spent in times.items()}
    by_ours, quartiles = ratio(times["sae_lens"], times["both"])
    return TrainBench(
        kind, device_name(kind), scene_name, scene.size, scene.layers, batches * scene.size.batch, rounds,
        torch.get_num_threads(), prefetch, package_versions(), seconds,
        tokens_per_second=batches * scene.size.batch / seconds["both"],
        harvest_share=ratio(times["harvest"], times["both"])[0],
        steps_share=ratio(times["steps"], times["both"])[0],
        by_ours=by_ours,
        by_ours_quartiles=quartiles,
    )  # fmt: skip


def _steps(trained: dict[str, Contestant], batch: Batch) -> None:
    with torch.enable_grad():
        for hook, one in trained.items():
            one.step(batch[hook])


def _text(blocks: int, context: int, seed: int) -> Corpus:
    """Random tokens that every Gemma 4 tokenizer has, each block a document."""
    drawn = torch.randint(30, 2000, (blocks, context), generator=torch.Generator().manual_seed(seed))
    documents = torch.arange(blocks)[:, None].expand_as(drawn).clone()
    return Corpus(drawn, torch.ones_like(drawn, dtype=torch.bool), documents, "random tokens")


def _start(size: Size, device: str, x_nd: torch.Tensor, seed: int) -> Start:
    """A new SAE of sae_lens, centred."""
    nothing = Start(size, device, {}, torch.zeros(size.d_sae, device=device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = training_sae(STOCK, nothing).state_dict()
    return Start(size, device, state | {"b_dec": x_nd.mean(dim=0)}, nothing.since_fired_f)
