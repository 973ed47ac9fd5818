"""`evaluate_sae` against a plain computation on the same activations, and against sae_lens's own `run_evals`."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.errors import SAEError, UnknownNameError
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae
from sae_lens_gemma4.training.restore import inference_form, load_sae, training_form
from tests.support import RELEASE, SAE_ID


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


@pytest.fixture(scope="module")
def sae():
    return load_sae(RELEASE, SAE_ID)


@pytest.fixture(scope="module")
def corpus(model):
    return build_corpus("embedded:text", model.tokenizer, context_size=64, split="heldout", max_tokens=4000)


@pytest.fixture(scope="module")
def evaluation(sae, model, corpus):
    return evaluate_sae(sae, model, corpus, batch_blocks=5, progress=False)


@pytest.fixture(scope="module")
def activations(model, corpus):
    _, cache = model.run_with_cache(corpus.tokens_bp, names_filter=["blocks.3.hook_resid_post"])
    return cache["blocks.3.hook_resid_post"][corpus.keep_bp].detach()


@torch.no_grad()
def test_figures_are_those_of_a_plain_computation(evaluation, sae, activations):
    pre = (activations - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = torch.where(pre > sae.threshold, pre.relu(), 0)
    x, x_hat = activations.double(), (acts @ sae.W_dec + sae.b_dec).double()
    sse = (x - x_hat).pow(2).sum(1)
    metrics = evaluation.metrics
    assert metrics.n_tokens == len(x)
    assert metrics.ve == pytest.approx(float(1 - sse.sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-5)
    assert metrics.l0 == pytest.approx(float((acts > 0).double().sum(1).mean()), rel=1e-3)
    assert metrics.dead == int((acts.sum(0) == 0).sum())
    density = evaluation.curves["log10_density"]
    assert sum(density["counts"]) == sae.cfg.d_sae - metrics.dead
    assert len(density["edges"]) == len(density["counts"]) + 1


def test_run_evals_agrees_on_the_same_tokens(sae, model, corpus):
    """sae_lens's explained variance and L0, on whole blocks that both read; both leave out BOS."""
    rows = corpus.tokens_bp[(corpus.document_bp >= 0).all(dim=1)][:32]
    store = ActivationsStore.from_sae(
        model, sae, Dataset.from_dict({"tokens": rows.tolist()}), context_size=64, streaming=False,
        store_batch_size_prompts=8, total_tokens=100,
    )  # fmt: skip
    stock, _ = run_evals(
        sae, store, model, ActivationScaler(),
        EvalConfig(batch_size_prompts=8, n_eval_sparsity_variance_batches=4, compute_variance_metrics=True,
                   compute_sparsity_metrics=True, compute_l2_norms=True),
    )  # fmt: skip
    ours = evaluate_sae(sae, model, rows, progress=False).metrics
    assert ours.ve == pytest.approx(stock["reconstruction_quality"]["explained_variance"], rel=1e-4)
    assert ours.l0 == pytest.approx(stock["sparsity"]["l0"], rel=1e-3)


def test_batching_changes_nothing(evaluation, sae, model, corpus):
    other = evaluate_sae(sae, model, corpus, batch_blocks=17, progress=False).metrics
    assert other.ve == pytest.approx(evaluation.metrics.ve, rel=1e-6)
    assert other.sse_share[0.01] == pytest.approx(evaluation.metrics.sse_share[0.01], rel=1e-6)


def test_the_record_says_what_was_measured(evaluation, corpus, tmp_path):
    evaluation.to_json(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["model"] == {"name": "gemma-4-demo", "class": "Gemma4ProxyLM"}
    assert data["corpus"]["hash"] == corpus.hash
    assert data["sae"]["hook_name"] == "blocks.3.hook_resid_post"
    assert data["metrics"]["ve"] == evaluation.metrics.ve
    assert data["versions"]["torch"] == torch.__version__
    evaluation.to_html(tmp_path / "r.html")
    assert f"{evaluation.metrics.ve:.3f}" in (tmp_path / "r.html").read_text()


def test_the_bridge_measures_the_same(evaluation, sae, corpus):
    bridge = g4.load_model("gemma-4-demo", "Gemma4Bridge")
    metrics = evaluate_sae(sae, bridge, corpus, progress=False).metrics
    assert metrics.ve == pytest.approx(evaluation.metrics.ve, rel=1e-4)


def test_a_training_sae_is_refused_and_its_saved_form_measured(evaluation, sae, model, corpus):
    training = training_form(sae)
    with pytest.raises(SAEError, match="inference_form"):
        evaluate_sae(training, model, corpus, progress=False)
    again = evaluate_sae(inference_form(training), model, corpus, progress=False).metrics
    assert again.ve == pytest.approx(evaluation.metrics.ve, rel=1e-5)


@torch.no_grad()
def test_an_sae_in_bf16_is_held_against_the_activations_not_their_rounding(sae, model, corpus, activations):
    half = copy.deepcopy(sae).to(dtype=torch.bfloat16)
    x, x_hat = activations.double(), half(activations).double()
    expected = 1 - (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert evaluate_sae(half, model, corpus, progress=False).metrics.ve == pytest.approx(float(expected), rel=1e-4)


def test_a_transcoder_is_refused(sae, model, corpus):
    transcoder = copy.deepcopy(sae)
    transcoder.cfg.metadata.hook_name_out = "blocks.3.hook_mlp_out"
    with pytest.raises(SAEError, match="transcoder"):
        evaluate_sae(transcoder, model, corpus, progress=False)


def test_what_does_not_fit_is_named(sae, model, corpus):
    with pytest.raises(UnknownNameError, match=r"blocks\.3\.hook_resid_post"):
        evaluate_sae(sae, model, corpus, hook_name="blocks.3.hook_resid_pst", progress=False)
    with pytest.raises(SAEError, match="256 wide; this SAE reads 96"):
        evaluate_sae(sae, model, corpus, hook_name="model.layers.1.mlp.gate_proj", progress=False)
