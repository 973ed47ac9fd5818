"""Restored SAEs against the SAE that was saved, before it was saved."""

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput

from sae_lens_gemma4.errors import ConfigError, SAEError, UnknownNameError
from sae_lens_gemma4.training.forms import FORMS, TopKForm
from sae_lens_gemma4.training.restore import (
    inference_form,
    load_sae,
    restore_training_sae,
    training_form,
    write_training_folder,
)
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
    assert isinstance(back, cls)
    assert type(back) is FORMS[back.cfg.architecture()]
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


@pytest.fixture
def own_thresholds():
    """A matryoshka SAE as saved, whose thresholds differ by a factor of eight."""
    sae = inference_form(trained())
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(0.2, 1.6, D_SAE))
    return sae


def test_thresholds_of_their_own_are_refused(own_thresholds):
    with pytest.raises(SAEError, match=r"0\.2 to 1\.6.*absorb_thresholds=True"):
        training_form(own_thresholds)


def test_thresholds_of_their_own_are_absorbed_into_the_same_function(own_thresholds, x):
    sae = training_form(own_thresholds, absorb_thresholds=True)
    assert float(sae.topk_threshold) == pytest.approx(0.9)
    assert sae.cfg.rescale_acts_by_decoder_norm is False
    back = inference_form(sae)
    assert (back.threshold == back.threshold[0]).all()
    torch.testing.assert_close(back(x), own_thresholds(x), atol=1e-5, rtol=1e-5)
    scale = torch.linspace(0.2, 1.6, D_SAE) / 0.9
    torch.testing.assert_close(back.encode(x) * scale, own_thresholds.encode(x), atol=1e-5, rtol=1e-5)


def test_absorbing_leaves_one_threshold_for_all_alone():
    sae = inference_form(trained())
    restored = training_form(sae, absorb_thresholds=True)
    assert restored.cfg.rescale_acts_by_decoder_norm is True
    assert torch.equal(restored.W_enc, sae.W_enc)


def test_what_cannot_be_absorbed_is_refused(own_thresholds):
    with pytest.raises(SAEError, match="would take them out again"):
        training_form(own_thresholds, absorb_thresholds=True, rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        own_thresholds.threshold[:3] = 0
    with pytest.raises(SAEError, match="3 of 32 thresholds are 0 or less"):
        training_form(own_thresholds, absorb_thresholds=True)


JUMPRELU = {"l0_coefficient": 2.0, "jumprelu_bandwidth": 0.1, "jumprelu_sparsity_loss_mode": "step"}


def test_a_jumprelu_is_restored_with_its_thresholds(own_thresholds, x):
    with torch.no_grad():
        own_thresholds.threshold[0] = -1.0
    sae = training_form(own_thresholds, architecture="jumprelu", dtype="bfloat16", **JUMPRELU)
    assert sae.threshold.dtype == torch.float32
    sae = training_form(own_thresholds, architecture="jumprelu", **JUMPRELU)
    assert type(sae) is JumpReLUTrainingSAE
    assert torch.equal(sae.encode(x), own_thresholds.encode(x))
    assert torch.equal(inference_form(sae)(x), own_thresholds(x))
    assert sae.cfg.metadata.training_architecture == "jumprelu"
    assert sae.cfg.l0_coefficient == 2.0
    with pytest.raises(SAEError, match="k_aux"):
        training_form(own_thresholds, architecture="jumprelu", k_aux=4, **JUMPRELU)


@pytest.mark.parametrize("cls", [MatryoshkaBatchTopKTrainingSAE, BatchTopKTrainingSAE, TopKTrainingSAE])
def test_stock_goes_on_from_a_training_folder(tmp_path, x, cls):
    """What stock's runner does with `from_pretrained_path`, in the class that it does it with."""
    trained(cls).save_inference_model(tmp_path / "published")
    ours = restore_training_sae(tmp_path / "published", k=6)
    write_training_folder(ours, tmp_path / "training")
    theirs = TrainingSAE.load_from_disk(tmp_path / "training", "cpu")
    assert type(theirs) is cls
    assert theirs.cfg.k == 6
    assert theirs.cfg.metadata.author_note == {"kept": [1, 2]}
    assert torch.equal(theirs.encode(x), ours.encode(x))
    if cls is not TopKTrainingSAE:
        assert float(theirs.topk_threshold) == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("cls", [MatryoshkaBatchTopKTrainingSAE, TopKTrainingSAE])
def test_a_training_folder_is_a_source_too(tmp_path, x, cls):
    sae = trained(cls)
    sae.save_model(tmp_path)
    torch.testing.assert_close(load_sae(tmp_path)(x), inference_form(sae)(x))
    assert isinstance(restore_training_sae(tmp_path), cls)


def test_an_sae_that_says_too_little_is_refused_with_what_it_lacks():
    bare = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(SAEError, match="architecture="):
        training_form(bare)
    with pytest.raises(SAEError, match="states k, rescale_acts_by_decoder_norm, matryoshka_widths, which"):
        training_form(bare, architecture="matryoshka_batchtopk")
    with pytest.raises(SAEError, match="states rescale_acts_by_decoder_norm, which"):
        training_form(bare, architecture="batchtopk", k=3)
    with pytest.raises(SAEError, match="from a topk SAE, not a jumprelu one"):
        training_form(bare, architecture="topk")
    with pytest.raises(SAEError, match="states l0_coefficient, jumprelu_bandwidth, jumprelu_sparsity_loss_mode, which"):
        training_form(bare, architecture="jumprelu")
    with pytest.raises(SAEError, match="A standard SAE cannot be trained on"):
        training_form(StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)), architecture="batchtopk")


def test_a_form_with_one_way_to_train_it_need_not_be_named():
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5))
    assert type(training_form(sae)) is TopKForm


def test_rescaling_by_norms_that_were_never_folded_in_is_refused(x):
    """Measured upstream: 5.6 latents a token differ, silently."""
    sae = inference_form(trained(rescale=False))
    with pytest.raises(SAEError, match="Pass rescale_acts_by_decoder_norm=False"):
        training_form(sae, rescale_acts_by_decoder_norm=True)
    back = inference_form(training_form(sae))
    assert torch.equal(back.encode(x), sae.encode(x))
    topk = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5, rescale_acts_by_decoder_norm=True))
    with pytest.raises(SAEError, match="Pass rescale_acts_by_decoder_norm=True"):
        training_form(topk, rescale_acts_by_decoder_norm=False)


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
        ({"topk_threshold_lr": 1.5}, SAEError, r"0\.\.1"),
        ({"dtype": "float23"}, UnknownNameError, "'float32'"),
        ({"k_aux": 0}, SAEError, "k_aux must be 1 or more"),
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
