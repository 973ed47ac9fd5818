"""Each form against its author's arithmetic, read from a local folder by `SAE.load_from_disk(converter=)`."""

import io
import warnings

import pytest
import torch
from sae_lens import SAE

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue.formats import FORMS
from sae_lens_gemma4.errors import SAEError, UnknownNameError, UnstatedWarning
from sae_lens_gemma4.training.restore import inference_form, training_form
from tests.catalogue import checkpoints
from tests.catalogue.checkpoints import ALL, D_IN, D_SAE, FORM_OF, inputs

TOLERANCE = 1e-5


def written(folder, sample):
    for name, content in sample.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def assert_computes(sae, sample, tolerance=TOLERANCE):
    x = inputs(d_in=sae.cfg.d_in)
    latents = sample.encode(x)
    assert (latents != 0).any(-1).all() and (latents == 0).any()
    scale = latents.abs().max()
    assert torch.equal(sae.encode(x) != 0, latents != 0)
    assert (sae.encode(x) - latents).abs().max() <= tolerance * scale
    reconstruction = sample.decode(latents)
    assert (sae.decode(latents) - reconstruction).abs().max() <= tolerance * reconstruction.abs().max()
    assert (sae(x) - reconstruction).abs().max() <= tolerance * reconstruction.abs().max()


@pytest.mark.parametrize(
    ("name", "named"),
    [(name, named) for name in ALL for named in (True, False) if named or name != "ernos_code"],  # see: of two forms
)
def test_a_folder_in_each_form_computes_what_its_author_computes(tmp_path, name, named):
    sample = ALL[name](seed=3)
    form = FORM_OF.get(name, name)
    folder = written(tmp_path, sample)
    sae = SAE.load_from_disk(folder, converter=g4.converter(form if named else None, **sample.facts), dtype="float32")
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (D_IN, D_SAE)
    assert_computes(sae, sample)


def test_every_form_is_written_by_a_sample():
    assert {FORM_OF.get(name, name) for name in ALL} == set(FORMS)


@pytest.mark.parametrize("name", ALL)
def test_what_is_loaded_saves_as_sae_lens_and_computes_the_same(tmp_path, name):
    sample = ALL[name](seed=4)
    sae = SAE.load_from_disk(
        written(tmp_path / "theirs", sample), converter=g4.converter(FORM_OF.get(name, name), **sample.facts)
    )
    sae.save_model(tmp_path / "ours")
    again = SAE.load_from_disk(tmp_path / "ours")
    x = inputs().to(sae.dtype)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x), sae(x))
    assert again.cfg.to_dict() == sae.cfg.to_dict()


@pytest.mark.parametrize("d_in", [D_IN, D_SAE])
@pytest.mark.parametrize("name", sorted(ALL.keys() - {"sae_lens"}))
def test_square_and_wide_encoders_are_laid_out_by_the_form(tmp_path, name, d_in):
    sample = ALL[name](seed=5, d_in=d_in)
    facts = sample.facts | ({"encoder": "d_in d_sae"} if FORM_OF.get(name, name) == "plain" else {})
    sae = SAE.load_from_disk(
        written(tmp_path, sample), converter=g4.converter(FORM_OF.get(name, name), **facts), dtype="float32"
    )
    assert_computes(sae, sample)


def test_the_plain_form_is_laid_out_by_its_shapes(tmp_path):
    sample = checkpoints.plain(seed=6)
    content = torch.load(io.BytesIO(sample.files["sae_final.pt"]), weights_only=True)
    content["W_enc"], content["W_dec"] = content["W_enc"].T.contiguous(), content["W_dec"].T.contiguous()
    sample.files["sae_final.pt"] = checkpoints.pt(content)
    sae = SAE.load_from_disk(written(tmp_path, sample), converter=g4.converter(**sample.facts))
    assert_computes(sae, sample)


def test_a_square_plain_encoder_is_asked_about(tmp_path):
    sample = checkpoints.plain(seed=6, d_in=D_SAE)
    written(tmp_path, sample)
    with pytest.raises(SAEError, match=r"W_enc is square.*encoder='d_in d_sae'"):
        SAE.load_from_disk(tmp_path, converter=g4.converter(**sample.facts))


@pytest.mark.parametrize("subtract", [True, False])
def test_b_dec_that_nobody_speaks_of_is_subtracted_with_a_warning(tmp_path, subtract):
    sample = checkpoints.plain(seed=8, subtract=subtract)
    written(tmp_path, sample)
    with pytest.warns(UnstatedWarning, match="whether b_dec is subtracted"):
        sae = SAE.load_from_disk(tmp_path, converter=g4.converter())
    assert sae.cfg.apply_b_dec_to_input
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stated = SAE.load_from_disk(tmp_path, converter=g4.converter(apply_b_dec_to_input=subtract))
    assert_computes(stated, sample)


def test_no_warning_of_a_b_dec_that_is_zero(tmp_path):
    content = torch.load(io.BytesIO(checkpoints.plain().files["sae_final.pt"]), weights_only=True)
    content["b_dec"] *= 0
    (tmp_path / "sae.pt").write_bytes(checkpoints.pt(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAE.load_from_disk(tmp_path, converter=g4.converter())


def test_the_keys_of_two_forms(tmp_path):
    """ErnOSAgent's code has the plain form's keys and no k: not taken for either until it is named."""
    sample = checkpoints.ernos_code(seed=9)
    written(tmp_path, sample)
    with pytest.raises(SAEError, match=r"gemma4_sae_1m.safetensors: .*nobody states k.*converter\('…'\)"):
        SAE.load_from_disk(tmp_path, converter=g4.converter())
    assert_computes(SAE.load_from_disk(tmp_path, converter=g4.converter("ernos")), sample)


def test_a_form_that_does_not_fit_lists_what_was_found(tmp_path):
    (tmp_path / "sae.pt").write_bytes(checkpoints.pt({"A": torch.zeros(3, 4), "b": torch.zeros(3)}))
    with pytest.raises(SAEError, match=r"sae\.pt is of no form known here. It holds: A \[3, 4\], b \[3\].*converter"):
        SAE.load_from_disk(tmp_path, converter=g4.converter())
    with pytest.raises(SAEError, match=r"has no tensor encoder\.bias. It holds: A \[3, 4\]"):
        SAE.load_from_disk(tmp_path, converter=g4.converter("sparsify"))


def test_a_tensor_that_no_form_has_is_not_dropped_in_silence(tmp_path):
    sample = checkpoints.plain(extra={"W_skip": torch.zeros(D_IN, D_IN)})
    with pytest.raises(SAEError, match=r"no form.*W_skip \[12, 12\]"):
        SAE.load_from_disk(written(tmp_path, sample), converter=g4.converter())


def test_bookkeeping_of_a_training_run_is(tmp_path):
    sample = checkpoints.plain(extra={"last_fired": torch.zeros(D_SAE, dtype=torch.long)})
    sae = SAE.load_from_disk(written(tmp_path, sample), converter=g4.converter(apply_b_dec_to_input=True))
    assert_computes(sae, sample)


def test_a_single_file_is_a_path(tmp_path):
    sample = checkpoints.plain(seed=2)
    written(tmp_path, sample)
    (tmp_path / "other.pt").write_bytes(b"")
    sae = SAE.load_from_disk(tmp_path / "sae_final.pt", converter=g4.converter(apply_b_dec_to_input=True))
    assert_computes(sae, sample)
    with pytest.raises(SAEError, match=r"several weights files: other\.pt, sae_final\.pt"):
        SAE.load_from_disk(tmp_path, converter=g4.converter())
    with pytest.raises(SAEError, match=r"There is no file or folder .*nowhere"):
        SAE.load_from_disk(tmp_path / "nowhere", converter=g4.converter())


def test_facts_by_hand_become_metadata(tmp_path):
    sample = checkpoints.linear(seed=2)
    sae = SAE.load_from_disk(
        written(tmp_path, sample),
        converter=g4.converter(
            k=5, model_name="google/gemma-4-E2B-it", hook_name="model.language_model.layers.17", context_size=512
        ),
    )
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hf_hook_name) == (
        "blocks.17.hook_resid_post",
        "model.language_model.layers.17",
    )
    assert (metadata.model_name, metadata.context_size) == ("google/gemma-4-E2B-it", 512)
    assert metadata.sae_lens_training_version is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"form": "sparsfy"}, UnknownNameError, "Did you mean 'sparsify'"),
        ({"repo_type": "data"}, UnknownNameError, "'dataset'"),
        ({"kk": 3}, UnknownNameError, "fact of an SAE 'kk'"),
        ({"k": 3.5}, SAEError, "k must be a positive whole number, not 3.5"),
        ({"k": True}, SAEError, "k must be a positive whole number"),
        ({"k": -3}, SAEError, "k must be a positive whole number"),
        ({"encoder": "d_sae"}, UnknownNameError, "layout of W_enc 'd_sae'"),
        ({"architecture": "top"}, UnknownNameError, "Did you mean 'topk'"),
        ({"exclude_special_tokens": 2}, SAEError, "True, False or a list of token ids, not 2"),
    ],
)
def test_a_converter_answers_a_wrong_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        g4.converter(**arguments)


def test_what_the_files_say_of_hook_and_model_is_kept(tmp_path):
    """Each form's config in its author's words, as sae_lens's metadata."""
    folder = tmp_path / "language_model.layers.17"
    metadata = SAE.load_from_disk(written(folder, checkpoints.sparsify()), converter=g4.converter()).cfg.metadata
    assert metadata.hook_name == "blocks.17.hook_resid_post"
    folder = tmp_path / "juice"
    sample = checkpoints.log_threshold(layer=9)
    metadata = SAE.load_from_disk(written(folder, sample), converter=g4.converter()).cfg.metadata
    assert (metadata.hook_name, metadata.model_name) == ("blocks.9.hook_resid_post", "google/gemma-4-E2B-it")
    folder = tmp_path / "dl"
    metadata = SAE.load_from_disk(
        written(folder, checkpoints.dictionary_learning()), converter=g4.converter()
    ).cfg.metadata
    assert (metadata.hook_name, metadata.context_size) == ("blocks.45.hook_resid_post", 2048)
    assert metadata.training_architecture == "batchtopk"
    sample = checkpoints.dictionary_learning(submodule="mlp_layer_45")
    metadata = SAE.load_from_disk(written(tmp_path / "mlp", sample), converter=g4.converter()).cfg.metadata
    assert metadata.hook_name is None  # what an mlp of theirs is, the config does not say


@pytest.mark.parametrize("name", sorted(set(ALL) - {"sae_lens", "ernos_code", "ernos_card", "log_threshold"}))
def test_what_is_loaded_can_be_trained_on(tmp_path, name):
    """k, threshold and inner widths arrive where continued training looks for them."""
    sample = ALL[name](seed=3)
    sae = SAE.load_from_disk(
        written(tmp_path, sample), converter=g4.converter(FORM_OF.get(name, name), **sample.facts), dtype="float32"
    )
    trainable = training_form(sae)
    assert trainable.cfg.k == 5
    if "matryoshka" in name:
        assert trainable.cfg.matryoshka_widths == [8, D_SAE]
    x = inputs()
    if sae.cfg.architecture() == "topk":
        assert torch.equal(trainable.encode(x), sae.encode(x))
    else:
        assert trainable.topk_threshold == sae.threshold[0]
        assert torch.equal(inference_form(trainable).encode(x), sae.encode(x))


def test_a_threshold_is_not_rounded_to_the_weights_half_precision(tmp_path):
    sample = checkpoints.dictionary_learning()
    state = checkpoints.tensors_of(sample) | {"threshold": torch.tensor(1.3)}
    for key in ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"):
        state[key] = state[key].bfloat16()
    sample.files["ae.pt"] = checkpoints.pt(state)
    sae = SAE.load_from_disk(written(tmp_path, sample), converter=g4.converter(), dtype="float32")
    assert (sae.threshold == torch.tensor(1.3)).all()


def test_dictionary_learnings_topk_subtracts_b_dec_and_says_so(tmp_path):
    sample = checkpoints.dictionary_learning(topk=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_computes(SAE.load_from_disk(written(tmp_path, sample), converter=g4.converter()), sample)
