"""The tiny models are what they claim: every branch matters, every weight is drawn, only the seed decides."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
)

from sae_lens_gemma4.errors import UnknownNameError
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4, tiny_tokenizer

TOKENS = torch.arange(100, 124).view(2, 12)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model(TOKENS).logits
    return result


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    return getattr(model.model, "language_model", model.model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_float32_in_eval_mode_and_on_the_cpu(variant: str) -> None:
    start = time.perf_counter()
    model = tiny_gemma4(variant)
    assert time.perf_counter() - start < 5
    assert not any(m.training for m in model.modules())
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert logits(model).shape == (2, 12, 2048)


def test_classes_and_towers() -> None:
    assert type(tiny_gemma4("ple")) is Gemma4ForCausalLM
    assert type(tiny_gemma4("moe")) is Gemma4ForCausalLM
    multimodal, dense, unified = (tiny_gemma4(v) for v in ("ple_multimodal", "dense_keqv", "unified"))
    assert type(multimodal) is type(dense) is Gemma4ForConditionalGeneration
    assert type(unified) is Gemma4UnifiedForConditionalGeneration
    assert multimodal.model.vision_tower is not None
    assert multimodal.model.audio_tower is not None
    assert dense.model.vision_tower is None
    assert dense.model.embed_vision is None
    assert unified.model.embed_vision is not None
    assert not hasattr(unified.model, "vision_tower")


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_those_of_the_family_member(variant: str) -> None:
    layers = decoder(tiny_gemma4(variant)).layers
    assert [layer.self_attn.is_sliding for layer in layers] == [True, True, False] * 2
    assert [layer.self_attn.head_dim for layer in layers] == [16, 16, 32] * 2
    has_ple = variant in ("ple", "ple_multimodal")
    assert [hasattr(layer, "per_layer_input_gate") for layer in layers] == [has_ple] * 6
    assert [layer.self_attn.is_kv_shared_layer for layer in layers] == [False] * 3 + [has_ple] * 3
    assert [layer.mlp.up_proj.out_features for layer in layers] == [96] * 3 + [192 if has_ple else 96] * 3
    k_eq_v = variant in ("dense_keqv", "moe")
    assert [getattr(layer.self_attn, "v_proj", 0) is None for layer in layers] == [False, False, k_eq_v] * 2
    assert [hasattr(layer, "router") for layer in layers] == [variant == "moe"] * 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_seed_alone_decides_the_weights(variant: str) -> None:
    first = tiny_gemma4(variant).state_dict()
    torch.manual_seed(123)
    again, other = tiny_gemma4(variant, seed=0).state_dict(), tiny_gemma4(variant, seed=1).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    drawn = [k for k, _ in tiny_gemma4(variant).named_parameters()] + [k for k in first if k.endswith("layer_scalar")]
    assert [k for k in drawn if torch.equal(first[k], other[k])] == []


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny_gemma4("moe", seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_scalars_lie_away_from_one_and_differ(variant: str) -> None:
    scalars = [layer.layer_scalar.item() for layer in decoder(tiny_gemma4(variant)).layers]
    assert len(set(scalars)) == 6
    assert all(0.6 <= s <= 1.4 for s in scalars)
    assert max(abs(s - 1) for s in scalars) > 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_text_weight_moves_the_logits(variant: str) -> None:
    """Each parameter and layer_scalar, perturbed alone by a tenth of itself at random, by far more than rounding.

    Except the last layer_scalar, which the final norm undoes.
    """
    model = tiny_gemma4(variant)
    before = logits(model)
    text = decoder(model)
    tensors = dict(text.named_parameters()) | {k: b for k, b in text.named_buffers() if k.endswith("layer_scalar")}
    unmoved = []
    for name, tensor in tensors.items():
        original = tensor.detach().clone()
        with torch.no_grad():
            tensor.mul_(1 + 0.1 * torch.randn_like(tensor))
        if not (logits(model) - before).abs().max() > 1e-3:
            unmoved.append(name)
        tensor.data.copy_(original)
    assert unmoved == ["layers.5.layer_scalar"]
    assert torch.equal(logits(model), before)


def test_the_text_part_is_the_same_with_and_without_towers() -> None:
    assert torch.equal(logits(tiny_gemma4("ple")), logits(tiny_gemma4("ple_multimodal")))


@pytest.mark.parametrize(
    ("variant", "n_patches", "patch_size"), [("ple_multimodal", 16, 4), ("unified", 4, 8)], ids=lambda v: str(v)
)
def test_images_move_the_logits_after_them(variant: str, n_patches: int, patch_size: int) -> None:
    model, tokenizer = tiny_gemma4(variant), tiny_tokenizer()
    ids = tokenizer("<|image><|image|><|image|><|image|><|image|><image|>so", return_tensors="pt")["input_ids"]
    side = int(n_patches**0.5)
    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]

    @torch.no_grad()
    def run(pixels: torch.Tensor) -> torch.Tensor:
        is_image = (ids == model.config.image_token_id).long()
        out = model(input_ids=ids, pixel_values=pixels, image_position_ids=positions, mm_token_type_ids=is_image)
        result: torch.Tensor = out.logits
        return result

    difference = run(torch.rand(1, n_patches, 3 * patch_size**2)) - run(torch.rand(1, n_patches, 3 * patch_size**2))
    assert difference[0, :2].abs().max() == 0  # bos, <|image>
    assert difference[0, 6:].abs().amax(-1).min() > 0.1


def test_tokenizer_fits_the_models_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    config = tiny_gemma4("ple_multimodal").config
    assert len(tokenizer) == config.text_config.vocab_size == 2048
    named = {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"}
    named |= {"audio_token_id": "<|audio|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>"}
    assert {k: getattr(config, k) for k in named} == {k: tokenizer.convert_tokens_to_ids(t) for k, t in named.items()}
    ids = tokenizer("A list is a sequence.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == config.text_config.bos_token_id == 2
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A list is a sequence."


def test_unknown_variant() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown tiny_gemma4 variant 'dens_keqv'. Did you mean 'dense_keqv'"):
        tiny_gemma4("dens_keqv")
