import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_gemma4.errors import ConfigError, ModelError
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.models.rescale import rescale_residual_
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

TOKENS = torch.randint(30, 2000, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", ["ple", "ple_multimodal", "dense_keqv", "moe", "unified"])
@torch.no_grad()
def test_the_residual_is_scaled_and_the_function_is_not(variant):
    plain = Gemma4ProxyLM(tiny_gemma4(variant), tiny_tokenizer())
    scaled = Gemma4ProxyLM(rescale_residual_(tiny_gemma4(variant), 6.0), tiny_tokenizer())
    logits, cache = plain.run_with_cache(TOKENS)
    logits_scaled, cache_scaled = scaled.run_with_cache(TOKENS)
    torch.testing.assert_close(logits_scaled, logits, rtol=0, atol=2e-3)
    assert torch.equal(logits_scaled.argmax(-1), logits.argmax(-1))
    for i in range(plain.geometry.n_layers):
        name = f"blocks.{i}.hook_resid_post"
        torch.testing.assert_close(cache_scaled[name], 6 * cache[name], rtol=1e-3, atol=5e-2)


def test_only_sense_is_accepted():
    with pytest.raises(ConfigError, match="positive and finite"):
        rescale_residual_(tiny_gemma4("ple"), 0.0)
    with pytest.raises(ModelError, match="gpt2"):
        rescale_residual_(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10)), 2.0)
