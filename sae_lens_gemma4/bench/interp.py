"""What readings of all layers and all latents cost beside reading the text once.

The model is a random Gemma 4 in the proportions of the 31B: 60 layers, an MLP four times as wide as the stream, heads
1.5 times, and 48 tokens of vocabulary for each dimension of it. *Forward* runs it up to the last layer's output and
keeps nothing else; the profile and the item means do the same and read every layer. What the profile's product with the
vocabulary costs depends on the share of the tokens that is drawn for it: here one in 64, as 2,048 of 131,072.

Contexts of latents are measured on the embedded model, with an SAE of random directions: one pass over the text, and
what follows it for all latents.

All of a race run in each round, in an order drawn anew; a ratio is the median over rounds, with quartiles.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.harvest import forwards, harvest
from sae_lens_gemma4.bench.dashboards import HOOK, MODEL, active_sae
from sae_lens_gemma4.bench.disk import Paired, random_text
from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.examples import Examples, ExampleSettings
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.interp.item_means import item_means
from sae_lens_gemma4.interp.layers.profile import profile_layers
from sae_lens_gemma4.models.geometry import text_decoder
from sae_lens_gemma4.models.loading import load_model
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

PROFILE_TARGET = 1.3
"""The most of the forward's time."""
DRAWN = 64
"""One token of so many is compared with the vocabulary."""
_BATCH_BLOCKS = 4
_VOCABULARY = 48
_HEAD = 64
_L0, _CONTEXT = 100, 128


@dataclass(frozen=True)
class ExamplesBench:
    """Contexts of all latents after one pass.

    Attributes:
        fired: latents that fire.
        text_reads: how often the model saw each token, for all latents.
        pass_seconds: of reading the text, to the last activation on disk.
        latent_ms: of what follows, for each latent that fires.
        by_pass: what follows, for all latents, by the pass. It grows with the latents, the pass with the text.
    """

    d_sae: int
    fired: int
    tokens: int
    text_reads: float
    pass_seconds: float
    latent_ms: float
    by_pass: Paired


@dataclass(frozen=True)
class InterpBench:
    """What was run and what came out.

    Attributes:
        nearest_tokens: drawn for the product with the vocabulary.
        forward_seconds: the median.
        profile: the profile of all layers by the forward; `profile_without_vocabulary` draws no tokens.
        contrast: item means at all layers by the forward.
    """

    hidden: int
    layers: int
    vocabulary: int
    tokens: int
    nearest_tokens: int
    rounds: int
    threads: int
    device: str
    forward_seconds: float
    profile: Paired
    profile_without_vocabulary: Paired
    contrast: Paired
    examples: ExamplesBench

    @property
    def ratios(self) -> list[Paired]:
        return [self.profile, self.profile_without_vocabulary, self.contrast, self.examples.by_pass]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_interp(
    hidden: int = 256,
    n_layers: int = 60,
    tokens: int = 4096,
    context: int = 256,
    d_sae: int = 16_384,
    prompts: int = 128,
    rounds: int = 3,
    device: str = "cpu",
    seed: int = 0,
) -> InterpBench:
    """Race the readings of all layers against the forward alone, and of all latents against the pass.

    Args:
        prompts: of 128 tokens, for the contexts of latents.

    Raises:
        ConfigError: sizes that make no model, text or SAE, or a device that is not there.
    """
    if hidden < _HEAD or hidden % _HEAD or n_layers < 6 or context < 2 or tokens < context or min(rounds, prompts) < 1:
        raise ConfigError(
            f"hidden must be a multiple of {_HEAD}, layers at least 6, tokens at least the context, and rounds and "
            "prompts at least 1."
        )
    if d_sae <= _L0:
        raise ConfigError(f"d_sae must be more than {_L0}, of which about so many fire, not {d_sae}.")
    model: Any = Gemma4ProxyLM(deep_model(hidden, n_layers, seed))
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise ConfigError(f"device {device!r} cannot be used: {str(e).splitlines()[0]}") from e
    text = random_text(tokens // context, context, seed)
    hooks = [f"blocks.{n}.hook_resid_post" for n in range(n_layers)]
    nearest = max(1, text.n_tokens // DRAWN)
    quiet: dict[str, Any] = {"batch_blocks": _BATCH_BLOCKS, "progress": False}

    def forward() -> None:
        for _ in forwards(model, text, hooks[-1:], batch_blocks=_BATCH_BLOCKS):
            pass

    contestants: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "profile": lambda: profile_layers(model, text, nearest_tokens=nearest, sampling=Sampling(), **quiet),
        "without": lambda: profile_layers(model, text, nearest_tokens=0, sampling=Sampling(), **quiet),
        "contrast": lambda: item_means(model, text, hooks, **quiet),
    }
    for run in contestants.values():
        run()
    times = race(contestants, rounds, device, seed)
    return InterpBench(
        hidden=hidden,
        layers=n_layers,
        vocabulary=_VOCABULARY * hidden,
        tokens=text.n_tokens,
        nearest_tokens=nearest,
        rounds=rounds,
        threads=torch.get_num_threads(),
        device=str(device),
        forward_seconds=statistics.median(times["forward"]),
        profile=_paired("profile of all layers by forward", times, "profile", f"≤ {PROFILE_TARGET}"),
        profile_without_vocabulary=_paired("the same, no token compared with the vocabulary", times, "without"),
        contrast=_paired("item means at all layers by forward", times, "contrast"),
        examples=bench_examples(d_sae, prompts, rounds, device, seed),
    )


@torch.no_grad()
def bench_examples(d_sae: int, prompts: int, rounds: int, device: str, seed: int) -> ExamplesBench:
    """Time the pass over the text, and the contexts of all latents from what it left."""
    model: Any = load_model(MODEL, "Gemma4ProxyLM", device)
    whole = build_corpus("embedded:text", model.tokenizer, context_size=_CONTEXT, max_tokens=prompts * _CONTEXT)
    corpus = whole.take(torch.arange(min(prompts, whole.n_blocks)))
    x_td = torch.cat([batch.acts[HOOK] for batch in harvest(model, corpus, [HOOK])])
    sae = active_sae(x_td, d_sae, _L0, seed)
    seen: list[int] = []
    embedding = text_decoder(model.model).embed_tokens
    with tempfile.TemporaryDirectory(prefix="examples-") as made:
        folder = Path(made) / "firings"

        def read() -> Any:
            shutil.rmtree(folder, ignore_errors=True)
            return gather_firings(sae, model, HOOK, corpus, folder, {}, progress=False)

        def show() -> int:
            firings = gather_firings(sae, model, HOOK, corpus, folder, {}, progress=False)
            shown = Examples(firings, corpus, ExampleSettings(seed=seed)).of(range(d_sae))
            return sum(bool(latent.activity.n_active) for latent in shown)

        with embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel())):
            read()
            fired = show()
        times = race({"pass": read, "examples": show}, rounds, device, seed)
    latent_ms = 1e3 * statistics.median(times["examples"]) / max(1, fired)
    reads = sum(seen) / corpus.tokens_bp.numel()
    by_pass = Paired("contexts of all latents by the pass", *ratio(times["examples"], times["pass"]))
    return ExamplesBench(d_sae, fired, corpus.n_tokens, reads, statistics.median(times["pass"]), latent_ms, by_pass)


def deep_model(hidden: int, n_layers: int, seed: int) -> Any:
    """A random dense Gemma 4, float32: every sixth layer attends fully, with twice as wide heads and K = V."""
    heads = max(1, 3 * hidden // (2 * _HEAD))
    heads -= heads % 2 if heads > 1 else 0
    settings: dict[str, Any] = {
        "vocab_size": _VOCABULARY * hidden,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": n_layers,
        "layer_types": ["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(n_layers)],
        "sliding_window": 512,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": _HEAD,
        "global_head_dim": 2 * _HEAD,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma4ForCausalLM(Gemma4TextConfig(**settings)).eval()


def _paired(what: str, times: dict[str, list[float]], name: str, target: str | None = None) -> Paired:
    return Paired(what, *ratio(times[name], times["forward"]), target)
