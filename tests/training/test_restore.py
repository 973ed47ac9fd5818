"""Restored SAEs against the SAE that was saved, before it was saved."""

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    StandardSAE,
    StandardSAEConfig,
    TopKTrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput

from sae_lens_gemma4.errors import ConfigError, SAEError, UnknownNameError
from sae_lens_gemma4.training.restore import inference_form, load_sae, restore_training_sae, training_form
from tests.catalogue import checkpoints
from tests.support import D_IN, D_SAE, trained


@pytest.fixture
def x():
    return torch.randn(64, D_IN)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("cls", [MatryoshkaBatchTopKTrainingSAE, BatchTopKTrainingSAE, TopKTrainingSAE])
def test_a_saved_sae_comes_back_as_its_own_class_and_computes_the_same(tmp_path, x, cls, rescale):
    sae = trained(cls, rescale)
    sae.save_inference_model(tmp_path)
    back = restore_training_sae(tmp_path)
    assert type(back) is cls
    assert back.cfg.k == 4
    assert back.cfg.rescale_acts_by_decoder_norm is rescale
    assert back.cfg.metadata.author_note == {"kept": [1, 2]}
    torch.testing.assert_close(back.encode(x) @ back.W_dec, _normed(sae.encode(x), sae, rescale), atol=1e-5, rtol=1e-5)
    step = TrainStepInput(x, {}, None, 0, False)
    assert float(back.training_forward_pass(step).loss) == pytest.approx(
        float(sae.training_forward_pass(step).loss), rel=1e-5
    )
    if cls is MatryoshkaBatchTopKTrainingSAE:
        assert back.cfg.matryoshka_widths == [8, 32]


def _normed(acts, sae, rescale):
    return acts @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True) if rescale else sae.W_dec)


def test_the_threshold_is_carried_in_float64(tmp_path):
    trained(threshold=0.7).save_inference_model(tmp_path)
    for dtype in ("float32", "bfloat16"):
        sae = restore_training_sae(tmp_path, dtype=dtype)
        assert sae.topk_threshold.dtype == torch.float64
        assert float(sae.topk_threshold) == pytest.approx(0.7, rel=1e-6)
        assert str(sae.W_enc.dtype) == f"torch.{dtype}"


def test_stock_restores_another_class_which_is_why_this_exists(tmp_path):
    from sae_lens import TrainingSAE

    trained().save_inference_model(tmp_path)
    assert type(TrainingSAE.load_from_disk(tmp_path)).__name__ == "JumpReLUTrainingSAE"


@pytest.mark.parametrize("rescale", [True, False])
def test_inference_form_is_what_saving_and_loading_gives(tmp_path, x, rescale):
    sae = trained(rescale=rescale)
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    ours = inference_form(sae)
    sae.save_inference_model(tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    assert type(ours) is type(theirs) is JumpReLUSAE
    assert torch.equal(ours.encode(x), theirs.encode(x))
    assert torch.equal(ours(x), theirs(x))
    assert ours.cfg.to_dict() == theirs.cfg.to_dict()
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())


def test_round_trips_do_not_drift(x):
    first = inference_form(trained())
    sae = first
    for _ in range(5):
        sae = inference_form(training_form(sae))
    torch.testing.assert_close(sae(x), first(x), atol=2e-6, rtol=1e-6)


def test_settings_can_be_overridden_and_typos_are_named(tmp_path):
    trained().save_inference_model(tmp_path)
    back = restore_training_sae(tmp_path, k=9, matryoshka_widths=[16, 32])
    assert (back.cfg.k, back.cfg.matryoshka_widths) == (9, [16, 32])
    with pytest.raises(UnknownNameError, match="'matryoshka_widths'"):
        restore_training_sae(tmp_path, matryoshka_width=[16, 32])
    with pytest.raises(UnknownNameError, match="'batchtopk'"):
        restore_training_sae(tmp_path, architecture="batch_topk")


def test_thresholds_of_their_own_are_refused():
    sae = inference_form(trained())
    with torch.no_grad():
        sae.threshold[3] *= 2
    with pytest.raises(SAEError, match=r"0\.7 to 1\.4"):
        training_form(sae)


def test_an_sae_that_says_too_little_is_refused_with_what_it_lacks():
    bare = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(SAEError, match="architecture="):
        training_form(bare)
    with pytest.raises(SAEError, match="states k, rescale_acts_by_decoder_norm, matryoshka_widths, which"):
        training_form(bare, architecture="matryoshka_batchtopk")
    with pytest.raises(SAEError, match="states rescale_acts_by_decoder_norm, which"):
        training_form(bare, architecture="batchtopk", k=3)
    with pytest.raises(SAEError, match="from a jumprelu SAE, not a standard one"):
        training_form(StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)), architecture="batchtopk")
    with pytest.raises(SAEError, match="from a topk SAE, not a jumprelu one"):
        training_form(bare, architecture="topk")


def test_rescaling_by_norms_that_were_never_folded_in_is_refused(x):
    """Measured upstream: 5.6 latents a token differ, silently."""
    sae = inference_form(trained(rescale=False))
    with pytest.raises(SAEError, match="Pass rescale_acts_by_decoder_norm=False"):
        training_form(sae, rescale_acts_by_decoder_norm=True)
    back = inference_form(training_form(sae))
    assert torch.equal(back.encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"k": "many"}, ConfigError, "setting k of .* must be float"),
        ({"k": 0}, SAEError, r"1\.\.32"),
        ({"k": 33}, SAEError, r"1\.\.32"),
        ({"matryoshka_widths": [30, 8]}, SAEError, "strictly increasing"),
        ({"matryoshka_widths": 8}, ConfigError, "must be a list"),
        ({"rescale_acts_by_decoder_norm": "no"}, ConfigError, "must be bool"),
        ({"d_sae": 64}, UnknownNameError, "setting"),
        ({"metadata": {}}, UnknownNameError, "setting"),
        ({"normalize_activations": "layer_norm"}, UnknownNameError, "setting"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        training_form(inference_form(trained()), **settings)


def test_an_sae_that_normalises_is_refused():
    sae = inference_form(trained())
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(SAEError, match="layer_norm"):
        training_form(sae)


def test_sources_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(UnknownNameError, match="gemma-4-demo-res-matryoshka-embedded"):
        load_sae("gemma-4-demo-res-matryoska-embedded", "x")
    with pytest.raises(UnknownNameError, match="layer_3_width_2k_l0_16"):
        load_sae("gemma-4-demo-res-matryoshka-embedded", "layer_3_width_1k_l0_61")
    with pytest.raises(SAEError, match="needs an SAE id, one of: layer_3"):
        load_sae("gemma-4-demo-res-matryoshka-embedded")
    with pytest.raises(UnknownNameError, match="gemma-scope-2b-pt-res"):
        load_sae("gemma-scope-2b-pt-re", "x")
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(SAEError, match="has no weights file"):
        load_sae(tmp_path)
    with pytest.raises(SAEError, match="layer_1 of some-author/some-repo cannot be read"):
        load_sae("some-author/some-repo", "layer_1")
    with pytest.raises(SAEError, match=r"blocks\.0\.hook_resid_pre of .*/.* cannot be read"):
        load_sae("gpt2-small-res-jb", "blocks.0.hook_resid_pre")


def test_a_folder_or_file_of_a_stranger_is_a_source(tmp_path):
    sample = checkpoints.dictionary_learning()
    for name, content in sample.files.items():
        (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / "ae.pt"):
        restored = restore_training_sae(source)
        assert restored.cfg.architecture() == "batchtopk"
        assert (restored.cfg.k, restored.topk_threshold) == (5, 3.0)
