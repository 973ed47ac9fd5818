"""The geometry against the modules that transformers builds, against what its attention reads, and by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    Gemma4AssistantConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    Gemma4VisionConfig,
    GPT2Config,
)
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified

from sae_lens_gemma4.errors import ModelError
from sae_lens_gemma4.models.geometry import GEMMA4_MODEL_TYPES, Geometry, gemma4_geometry, is_gemma4
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4


def decoder(model: Any) -> Any:
    return getattr(model.model, "language_model", model.model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_modules(variant: str) -> None:
    model = tiny_gemma4(variant)
    geometry = gemma4_geometry(model.config)
    layers = decoder(model).layers
    assert geometry.n_layers == len(geometry.layers) == len(layers) == 6
    assert geometry.d_model == decoder(model).embed_tokens.embedding_dim
    for i, (layer, module) in enumerate(zip(geometry.layers, layers, strict=True)):
        attention = module.self_attn
        assert layer.index == i
        assert layer.attention == ("sliding" if attention.is_sliding else "full")
        assert layer.head_dim == attention.q_norm.weight.numel()
        assert layer.n_heads * layer.head_dim == attention.q_proj.out_features == attention.o_proj.in_features
        assert (layer.kv_source != i) == attention.is_kv_shared_layer
        assert (layer.kv_source == i) == hasattr(attention, "k_proj")
        if layer.kv_source == i:
            assert layer.n_kv_heads * layer.head_dim == attention.k_proj.out_features
            assert layer.k_eq_v == (attention.v_proj is None)
        assert layer.has_ple == hasattr(module, "per_layer_input_gate")
        assert layer.is_moe == hasattr(module, "router")
        if layer.is_moe:
            assert layer.n_experts == module.router.proj.out_features
            hidden = torch.randn(5, geometry.d_model)
            assert layer.top_k == module.router(hidden)[2].shape[-1]
        else:
            assert (layer.n_experts, layer.top_k) == (0, 0)
        assert layer.d_mlp == module.mlp.up_proj.out_features
    sources = {layer.kv_source for layer in geometry.layers if layer.kv_source != layer.index}
    if sources:  # transformers 5.23 stores them where no layer shares too, or nowhere
        assert sources == {i for i, module in enumerate(layers) if module.self_attn.store_full_length_kv}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kv_source_against_the_keys_that_attention_reads(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share keys are handed one and the same tensor."""
    model = tiny_gemma4(variant)
    model.set_attn_implementation("eager")
    keys: dict[int, torch.Tensor] = {}
    modeling = modeling_gemma4_unified if variant == "unified" else modeling_gemma4
    eager = modeling.eager_attention_forward

    def spy(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys[module.layer_idx] = key
        return eager(module, query, key, *args, **kwargs)

    monkeypatch.setattr(modeling, "eager_attention_forward", spy)
    with torch.no_grad():
        model(torch.arange(5, 15)[None], use_cache=False)
    layers = gemma4_geometry(model.config).layers
    assert sorted(keys) == [layer.index for layer in layers]
    for layer in layers:
        assert layer.kv_source == min(i for i, key in keys.items() if key is keys[layer.index])
        assert keys[layer.index].shape == (1, layer.n_kv_heads, 10, layer.head_dim)


def pattern(n_layers: int, sliding_per_full: int) -> list[str]:
    """`sliding_per_full` sliding layers, then a full one, over and over."""
    kinds = ["sliding_attention"] * sliding_per_full + ["full_attention"]
    return [kinds[i % len(kinds)] for i in range(n_layers)]


def full_layers(geometry: Geometry) -> list[int]:
    return [layer.index for layer in geometry.layers if layer.attention == "full"]


def test_e2b() -> None:
    text = Gemma4TextConfig(
        hidden_size=1536, num_hidden_layers=35, num_kv_shared_layers=20, layer_types=pattern(35, 4),
        num_key_value_heads=1, intermediate_size=6144, use_double_wide_mlp=True,
    )  # fmt: skip
    geometry = gemma4_geometry(text)
    assert (geometry.n_layers, geometry.d_model) == (35, 1536)
    assert full_layers(geometry) == [4, 9, 14, 19, 24, 29, 34]
    for layer in geometry.layers:
        full, shared = layer.attention == "full", layer.index >= 15
        assert layer.head_dim == (512 if full else 256)
        assert layer.kv_source == ((14 if full else 13) if shared else layer.index)
        assert layer.d_mlp == (12288 if shared else 6144)
        assert (layer.n_kv_heads, layer.has_ple, layer.is_moe, layer.k_eq_v) == (1, True, False, False)


def test_e4b_in_its_composite() -> None:
    text = {"hidden_size": 2560, "num_hidden_layers": 42, "num_kv_shared_layers": 18, "num_key_value_heads": 2}
    config = Gemma4Config(text_config=text, vision_config={}, audio_config={})
    geometry = gemma4_geometry(config)
    assert (geometry.n_layers, geometry.d_model) == (42, 2560)
    assert full_layers(geometry) == [5, 11, 17, 23, 29, 35, 41]
    assert [layer.kv_source for layer in geometry.layers] == [
        *range(24),
        *[22, 22, 22, 22, 22, 23] * 3,
    ]
    assert all(layer.has_ple and layer.n_kv_heads == 2 for layer in geometry.layers)
    assert gemma4_geometry(Gemma4Config.from_dict(config.to_dict())) == geometry


def test_26b_a4b() -> None:
    text = Gemma4TextConfig(
        hidden_size=2816, num_hidden_layers=30, hidden_size_per_layer_input=0, num_attention_heads=16,
        num_key_value_heads=8, num_global_key_value_heads=2, attention_k_eq_v=True, intermediate_size=2112,
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704,
    )  # fmt: skip
    geometry = gemma4_geometry(Gemma4Config(text_config=text))
    assert full_layers(geometry) == [5, 11, 17, 23, 29]
    for layer in geometry.layers:
        full = layer.attention == "full"
        assert (layer.head_dim, layer.n_heads, layer.n_kv_heads) == ((512, 16, 2) if full else (256, 16, 8))
        assert layer.k_eq_v == full
        assert (layer.is_moe, layer.n_experts, layer.top_k, layer.d_mlp) == (True, 128, 8, 2112)
        assert (layer.kv_source, layer.has_ple) == (layer.index, False)


def test_31b() -> None:
    text = Gemma4TextConfig(
        hidden_size=5376, num_hidden_layers=60, hidden_size_per_layer_input=0, num_attention_heads=32,
        num_key_value_heads=16, num_global_key_value_heads=4, attention_k_eq_v=True, intermediate_size=21504,
    )  # fmt: skip
    geometry = gemma4_geometry(Gemma4Config(text_config=text))
    assert full_layers(geometry) == list(range(5, 60, 6))
    assert [layer.n_kv_heads for layer in geometry.layers] == [16, 16, 16, 16, 16, 4] * 10
    assert [layer.k_eq_v for layer in geometry.layers] == [False, False, False, False, False, True] * 10
    assert not any(layer.has_ple or layer.is_moe for layer in geometry.layers)


def test_12b() -> None:
    text = Gemma4UnifiedTextConfig(hidden_size=3840, num_hidden_layers=48, num_attention_heads=16)
    geometry = gemma4_geometry(Gemma4UnifiedConfig(text_config=text))
    assert (geometry.n_layers, geometry.d_model) == (48, 3840)
    assert geometry == gemma4_geometry(text)
    assert not any(layer.has_ple or layer.is_moe for layer in geometry.layers)


@pytest.mark.parametrize("k_eq_v", [False, True])
def test_configs_of_transformers_before_per_layer_config(k_eq_v: bool) -> None:
    """Up to 5.14 a text config has `global_head_dim` and `num_global_key_value_heads` themselves."""
    fields = {
        "num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_global_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64,
        "attention_k_eq_v": k_eq_v, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0, "enable_moe_block": False, "layer_types": pattern(12, 5),
    }  # fmt: skip
    old = SimpleNamespace(model_type="gemma4_text", **fields)
    old.get_text_config = lambda: old
    geometry = gemma4_geometry(old)
    assert geometry == gemma4_geometry(Gemma4TextConfig(**fields))
    assert [layer.head_dim for layer in geometry.layers] == [32, 32, 32, 32, 32, 64] * 2
    assert geometry.layers[5].n_kv_heads == (2 if k_eq_v else 4)
    old.num_kv_shared_layers = 7  # layers 0–4 are all sliding
    with pytest.raises(ModelError, match="Layer 5 shares keys and values, but no full_attention layer before layer 5"):
        gemma4_geometry(old)


def test_which_configs_are_gemma4() -> None:
    of_the_family = [Gemma4Config(), Gemma4TextConfig(), Gemma4UnifiedConfig(), Gemma4UnifiedTextConfig()]
    assert {config.model_type for config in of_the_family} == GEMMA4_MODEL_TYPES
    assert all(is_gemma4(config) for config in of_the_family)
    draft = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
    assistant = Gemma4AssistantConfig(text_config=draft)
    for other in (GPT2Config(), Gemma3TextConfig(), Gemma4VisionConfig(), assistant, None, "gemma4"):
        assert not is_gemma4(other)
        with pytest.raises(ModelError, match="This is not Gemma 4"):
            gemma4_geometry(other)
    with pytest.raises(ModelError, match=r"model_type 'gpt2' \(GPT2Config\)"):
        gemma4_geometry(GPT2Config())
