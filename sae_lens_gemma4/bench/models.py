"""What the hooks cost: both model classes against a bare Hugging Face forward, as ratios from one run.

All harvest one layer's output and stop there. The bare forward has one raw torch hook that keeps the output and ends
the run, with the attention function that the class uses. The order within a round is drawn anew, so that a machine's
drift falls on all alike, and a ratio is the median over rounds of the bare time by the class's in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from sae_lens_gemma4.bench.racing import race, ratio
from sae_lens_gemma4.errors import ConfigError, ModelError
from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM

TARGETS = {"Gemma4ProxyLM": 0.97, "Gemma4Bridge": 0.90}
"""The least ratio that each class is to reach."""


@dataclass(frozen=True)
class Comparison:
    """One class against a bare forward, both with one attention function. Times are medians, in milliseconds."""

    model_class: str
    attention: str
    bare_ms: float
    class_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class ModelBench:
    """What was run, on what, and what came out."""

    hidden: int
    layers: int
    tokens: int
    stop_after_layer: int
    rounds: int
    threads: int
    device: str
    versions: dict[str, str]
    comparisons: list[Comparison]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_models(
    hidden: int = 512, layers: int = 12, tokens: int = 256, rounds: int = 40, device: str = "cpu", seed: int = 0
) -> ModelBench:
    """Time both classes against a bare forward on a random dense model with PLE and KV sharing.

    Raises:
        ConfigError: sizes that make no model, or a device that is not there.
    """
    if hidden < 64 or hidden % 64 or layers < 6 or tokens < 1 or rounds < 1:
        raise ConfigError("hidden must be a multiple of 64, layers at least 6, tokens and rounds at least 1.")
    last = layers - 2
    models: dict[str, Any] = {attention: random_model(hidden, layers, seed) for attention in ("sdpa", "eager")}
    try:
        for model in models.values():
            model.to(device)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise ConfigError(f"device {device!r} cannot be used: {str(e).splitlines()[0]}") from e
    models["eager"].set_attn_implementation("eager")
    input_ids = torch.randint(30, 2000, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    name = f"blocks.{last}.hook_resid_post"

    def harvest(model: Any) -> Callable[[], torch.Tensor]:
        return lambda: model.run_with_cache(input_ids, names_filter=[name], stop_at_layer=last + 1)[1][name]

    contestants = {
        ("bare", "sdpa"): lambda: bare_harvest(models["sdpa"], input_ids, last),
        ("bare", "eager"): lambda: bare_harvest(models["eager"], input_ids, last),
        ("Gemma4ProxyLM", "sdpa"): harvest(Gemma4ProxyLM(models["sdpa"])),
        ("Gemma4Bridge", "eager"): harvest(Gemma4Bridge.boot(models["eager"])),
        ("Gemma4Bridge", "sdpa"): harvest(Gemma4Bridge.boot(models["sdpa"], attn_implementation="sdpa")),
    }
    _check_alike(contestants)
    times = race(contestants, rounds, device, seed)
    comparisons = [
        _compare(model_class, attention, times["bare", attention], spent)
        for (model_class, attention), spent in times.items()
        if model_class != "bare"
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return ModelBench(hidden, layers, tokens, last, rounds, torch.get_num_threads(), str(device), versions, comparisons)


class _Ended(Exception):
    pass


def bare_harvest(model: Any, input_ids: torch.Tensor, layer: int) -> torch.Tensor:
    """A layer's output by one raw forward hook, which ends the run."""
    kept = []

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        kept.append(output)
        raise _Ended

    with model.model.layers[layer].register_forward_hook(keep), suppress(_Ended):
        model(input_ids=input_ids, use_cache=False)
    return kept[0]


@torch.no_grad()
def _check_alike(contestants: dict[tuple[str, str], Callable[[], torch.Tensor]]) -> None:
    """Run each a few times; `ModelError` if a class does not give what a bare forward gives."""
    for _ in range(3):
        outputs = {key: run() for key, run in contestants.items()}
    for (model_class, attention), output in outputs.items():
        if not torch.equal(output, outputs["bare", attention]):
            raise ModelError(f"{model_class} under {attention} attention does not give what a bare forward gives.")


def _compare(model_class: str, attention: str, bare: list[float], spent: list[float]) -> Comparison:
    bare_ms, class_ms = (1e3 * statistics.median(times) for times in (bare, spent))
    return Comparison(model_class, attention, bare_ms, class_ms, *ratio(bare, spent))


def random_model(hidden: int, layers: int, seed: int) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 2048,
        "vocab_size_per_layer_input": 2048,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "layer_types": [
            "full_attention" if n % 6 == 5 or n == layers - 1 else "sliding_attention" for n in range(layers)
        ],
        "sliding_window": 512,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
        "hidden_size_per_layer_input": 64,
        "num_kv_shared_layers": layers // 3 if layers >= 9 else 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma4ForCausalLM(Gemma4TextConfig(**settings)).eval()
