"""What is asked of any model: how many layers it has, and by which hook its first layer is entered."""

from types import SimpleNamespace

import pytest
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.errors import ModelError
from sae_lens_gemma4.models.interface import entry_hook, n_layers_of
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer


@pytest.mark.parametrize("variant", ["ple_multimodal", "moe"])
def test_layers_and_entry_of_the_classes_of_this_package(variant):
    hf = tiny_gemma4(variant)
    for model in (g4.Gemma4ProxyLM(hf, tiny_tokenizer()), g4.Gemma4Bridge.boot(hf, tiny_tokenizer())):
        assert n_layers_of(model) == hf.config.get_text_config().num_hidden_layers
        assert entry_hook(model) == "blocks.0.hook_resid_pre"


def test_layers_and_entry_of_a_hooked_transformer():
    config = HookedTransformerConfig(n_layers=3, d_model=8, n_ctx=4, d_head=4, d_vocab=10, act_fn="gelu")
    model = HookedTransformer(config)
    assert n_layers_of(model) == 3 and entry_hook(model) == "blocks.0.hook_resid_pre"


def test_the_embeddings_are_the_entry_where_nothing_else_is():
    assert entry_hook(SimpleNamespace(hook_dict={"hook_embed": None})) == "hook_embed"


def test_what_a_model_does_not_say_is_named():
    with pytest.raises(ModelError, match="SimpleNamespace does not say how many layers"):
        n_layers_of(SimpleNamespace(cfg=SimpleNamespace()))
    with pytest.raises(ModelError, match=r"no hook for what enters its first layer: blocks\.0\.hook_resid_pre or"):
        entry_hook(SimpleNamespace(hook_dict={"blocks.1.hook_resid_pre": None}))
