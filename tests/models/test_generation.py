"""Steering while generating: what acts at every step acts as if each step had run the whole sequence anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae_lens_gemma4.models.bridge import Gemma4Bridge
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer
from tests.models.forms import random_sae

PROMPT = torch.randint(30, 2000, (1, 12), generator=torch.Generator().manual_seed(4))
POST = "blocks.4.hook_resid_post"  # in "ple" a layer that shares keys and values
STEPS = 6


def proxy(variant: str) -> Gemma4ProxyLM:
    model = tiny_gemma4(variant)
    model.set_attn_implementation("eager")
    return Gemma4ProxyLM(model, tiny_tokenizer())


def bridge(variant: str) -> Gemma4Bridge:
    return Gemma4Bridge.boot(tiny_gemma4(variant), tiny_tokenizer())


def hf_generate(model: Any) -> torch.Tensor:
    return model.hf_generate(PROMPT, max_new_tokens=STEPS, do_sample=False, stop_at_eos=False, return_type="tokens")


def own_generate(model: Any) -> torch.Tensor:
    settings = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    return model.generate(PROMPT, max_new_tokens=STEPS, **settings)


def proxy_generate(model: Any) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)


WAYS: dict[str, tuple[Callable[[str], Any], Callable[[Any], torch.Tensor]]] = {
    "bridge.generate": (bridge, own_generate),
    "bridge.hf_generate": (bridge, hf_generate),
    "proxy.generate": (proxy, proxy_generate),
}
each = pytest.mark.parametrize(
    ("variant", "way"), [pytest.param(v, w, id=f"{v}-{n}") for v in VARIANTS for n, w in WAYS.items()]
)


@torch.no_grad()
def greedy(model: Any) -> torch.Tensor:
    """Without a cache: every step runs the whole sequence."""
    tokens = PROMPT
    for _ in range(STEPS):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@each
def test_a_vector_added_at_every_step(variant: str, way: Any) -> None:
    make, generate = way
    model = make(variant)
    plain = generate(model)
    assert torch.equal(plain, greedy(model))
    vector = 20 * torch.randn(64, generator=torch.Generator().manual_seed(5))
    with model.hooks(fwd_hooks=[(POST, lambda value, hook: value + vector)]):
        steered, expected = generate(model), greedy(model)
    assert torch.equal(steered, expected)
    assert not torch.equal(steered, plain)
    assert torch.equal(generate(model), plain)


@each
def test_hooks_see_every_position_once(variant: str, way: Any) -> None:
    """transformers' own shows KV-shared layers the prompt's last position only."""
    make, generate = way
    model = make(variant)
    seen: dict[str, list[torch.Tensor]] = {}
    names = [f"blocks.{n}.hook_resid_post" for n in (0, 4, 5)]
    keep = [(name, lambda v, hook, name=name: seen.setdefault(name, []).append(v.clone())) for name in names]
    with model.hooks(fwd_hooks=keep):
        tokens = generate(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:, :-1], names_filter=names)
    for name in names:
        assert [v.shape[1] for v in seen[name]] == [12] + [1] * (STEPS - 1)
        torch.testing.assert_close(torch.cat(seen[name], dim=1), cache[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("generate", [own_generate, hf_generate])
def test_an_sae_spliced_in_and_a_latent_set(variant: str, generate: Callable[[Any], torch.Tensor]) -> None:
    model, sae = bridge(variant), random_sae(POST)
    plain = generate(model)
    with model.saes(sae):
        spliced, expected = generate(model), greedy(model)
        assert torch.equal(spliced, expected)

        def set_latent(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            acts[..., 7] = 100.0
            return acts

        with model.hooks(fwd_hooks=[(f"{POST}.hook_sae_acts_post", set_latent)]):
            steered, expected = generate(model), greedy(model)
            assert torch.equal(steered, expected)
    assert not torch.equal(spliced, plain)
    assert not torch.equal(steered, spliced)
    assert torch.equal(generate(model), plain)


def test_what_transformers_alone_would_show() -> None:
    """If this fails, transformers computes whole prompts there again, and the guard is not needed any more."""
    model = tiny_gemma4("ple")
    if not hasattr(model.model, "_maybe_slice_kv_shared_inputs"):
        pytest.skip("This transformers does not save that work yet.")
    widths: list[int] = []
    model.model.layers[4].register_forward_hook(lambda _m, _a, out: widths.append(out.shape[1]))
    model.generate(PROMPT, max_new_tokens=2, do_sample=False)
    assert widths == [1, 1]
