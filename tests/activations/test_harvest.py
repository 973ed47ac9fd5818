import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.activations.harvest import finite_rows, harvest
from sae_lens_gemma4.errors import DataError, UnknownNameError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]


@pytest.fixture(scope="module")
def proxy():
    return Gemma4ProxyLM(tiny_gemma4("ple"), tiny_tokenizer())


@pytest.fixture(scope="module")
def corpus(proxy):
    return build_corpus(["import os and sys " * 9, "def f(x): return x"], proxy.tokenizer, context_size=12)


@torch.no_grad()
def test_one_pass_gives_every_hook_the_tokens_that_count(proxy, corpus):
    batches = list(harvest(proxy, corpus, HOOKS, batch_blocks=2))
    layers = proxy.model.model.layers
    seen = {}
    handles = [
        layers[1].register_forward_hook(lambda _m, _a, out: seen.__setitem__(HOOKS[0], out)),
        layers[2].post_feedforward_layernorm.register_forward_hook(lambda _m, _a, out: seen.__setitem__(HOOKS[1], out)),
    ]
    proxy.model(input_ids=corpus.tokens_bp, use_cache=False)
    for handle in handles:
        handle.remove()
    for hook in HOOKS:
        ours = torch.cat([b.acts[hook] for b in batches])
        torch.testing.assert_close(ours, seen[hook][corpus.keep_bp], rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([b.tokens_t for b in batches]), corpus.tokens_bp[corpus.keep_bp])
    assert torch.equal(torch.cat([b.document_t for b in batches]), corpus.document_bp[corpus.keep_bp])
    positions = torch.arange(12).expand_as(corpus.tokens_bp)[corpus.keep_bp]
    assert torch.equal(torch.cat([b.position_t for b in batches]), positions)


def test_layers_beyond_the_deepest_hook_do_not_run(proxy, corpus):
    ran = []
    layers = proxy.model.model.layers
    handles = [layer.register_forward_hook(lambda *_a, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    list(harvest(proxy, corpus, HOOKS, batch_blocks=99))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2]


def test_activations_keep_the_model_s_dtype(corpus):
    proxy = Gemma4ProxyLM(tiny_gemma4("ple").to(torch.bfloat16), tiny_tokenizer())
    assert next(harvest(proxy, corpus, HOOKS)).acts[HOOKS[0]].dtype == torch.bfloat16


def test_any_model_of_sae_lens_is_harvested():
    cfg = HookedTransformerConfig(n_layers=2, d_model=8, n_ctx=12, d_head=4, d_vocab=50, act_fn="relu", device="cpu")
    model = HookedTransformer(cfg)
    tokens = torch.randint(5, 50, (3, 12))
    corpus = build_corpus(tokens, tiny_tokenizer(), context_size=12, exclude_special_tokens=False)
    batch = next(harvest(model, corpus, ["blocks.0.hook_resid_post"]))
    _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(batch.acts["blocks.0.hook_resid_post"], cache["blocks.0.hook_resid_post"].flatten(0, 1))


def test_an_unknown_hook_is_named_before_the_first_forward(proxy, corpus):
    with pytest.raises(UnknownNameError, match=r"blocks\.1\.hook_resid_post"):
        next(harvest(proxy, corpus, ["blocks.1.hook_resid_pots"]))


def test_a_module_without_a_row_for_each_position_is_named():
    proxy = Gemma4ProxyLM(tiny_gemma4("moe"), tiny_tokenizer())
    corpus = build_corpus(["import os and sys " * 9], proxy.tokenizer, context_size=12)
    with pytest.raises(DataError, match=r"layers\.1\.experts is .*, not \[block, pos"):
        next(harvest(proxy, corpus, ["model.layers.1.experts"]))


def test_either_name_is_the_key_that_was_asked_for(proxy, corpus):
    acts = next(harvest(proxy, corpus, ["model.layers.1", "blocks.1.hook_resid_post"])).acts
    assert torch.equal(acts["model.layers.1"], acts["blocks.1.hook_resid_post"])


def test_activations_that_are_not_finite_are_named(corpus):
    model = tiny_gemma4("ple")
    model.model.layers[1].layer_scalar.fill_(float("nan"))
    with pytest.raises(DataError, match=r"blocks\.1\.hook_resid_post are not finite, first in document 0"):
        list(harvest(Gemma4ProxyLM(model, tiny_tokenizer()), corpus, [HOOKS[0]]))
    other = build_corpus(["def f(x): return x"], tiny_tokenizer(), context_size=12, name="other")
    last = Corpus.concat([corpus, other]).take(torch.tensor([-1]))
    with pytest.raises(DataError, match="first in document 0 of 'other'"):
        list(harvest(Gemma4ProxyLM(model, tiny_tokenizer()), last, [HOOKS[0]]))


def test_they_are_handed_over_as_they_are_where_that_is_asked_for(corpus):
    model = tiny_gemma4("ple")
    model.model.layers[1].layer_scalar.fill_(float("nan"))
    batch = next(harvest(Gemma4ProxyLM(model, tiny_tokenizer()), corpus, [HOOKS[0]], require_finite=False))
    assert batch.acts[HOOKS[0]].isnan().all() and len(batch.acts[HOOKS[0]]) == len(batch.tokens_t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_finite_without_nan_and_infinity_however_large(dtype):
    largest = torch.finfo(dtype).max
    acts = torch.tensor([[0, 1], [float("nan"), 9], [9, float("nan")], [float("-inf"), 0], [largest, -largest]])
    assert finite_rows(acts.to(dtype)[:, :, None]).tolist() == [True, False, False, False, True]
