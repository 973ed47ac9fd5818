import pytest

from sae_lens_gemma4.models.hook_names import Site, canonical_name, hf_name, site_of


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("model.language_model.layers.21", "blocks.21.hook_resid_post"),
        ("model.layers.3", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_pre"),
        ("model.language_model.layers.0.mlp", "blocks.0.mlp.hook_out"),
        ("model.layers.7.post_feedforward_layernorm", "blocks.7.hook_mlp_out"),
        ("model.layers.7.self_attn.o_proj", "model.language_model.layers.7.self_attn.o_proj"),
        ("model.norm", "ln_final.hook_out"),
        ("lm_head", "lm_head"),
    ],
)
def test_canonical_name(given, canonical):
    assert canonical_name(given) == canonical
    assert canonical_name(canonical) == canonical


def test_sites_say_which_side():
    assert site_of("blocks.2.hook_resid_pre") == Site("layers.2", "in")
    assert site_of("blocks.2.hook_resid_post") == Site("layers.2", "out")
    assert site_of("model.layers.2.mlp.gate_proj") == Site("layers.2.mlp.gate_proj", "out")
    assert site_of("blocks.2.hook_nothing") is None
    assert site_of("hook_nothing") is None


@pytest.mark.parametrize(
    "name", ["blocks.2.hook_resid_post", "blocks.2.hook_mlp_out", "ln_final.hook_out", "hook_embed"]
)
def test_the_hf_name_of_an_output_leads_back(name):
    path = hf_name(name)
    assert path is not None
    assert path.startswith("model.language_model.")
    assert canonical_name(path) == name


def test_an_input_has_no_hf_name():
    assert hf_name("blocks.2.hook_resid_pre") is None
    assert hf_name("blocks.2.nothing") is None
