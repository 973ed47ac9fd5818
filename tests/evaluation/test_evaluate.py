"""`evaluate_sae` against a plain computation on the same activations, and against sae_lens's own `run_evals`."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.errors import ConfigError, DataError, MismatchWarning, SAEError, UnknownNameError
from sae_lens_gemma4.evaluation import reading
from sae_lens_gemma4.evaluation.downstream import measure_downstream
from sae_lens_gemma4.evaluation.evaluate import evaluate_sae, evaluate_saes
from sae_lens_gemma4.evaluation.identity import model_fingerprint, sae_hash
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.measuring import density_histogram
from sae_lens_gemma4.evaluation.result import write_text
from sae_lens_gemma4.report import render_evaluation
from sae_lens_gemma4.training.restore import inference_form, training_form


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
    assert metrics.never_fired[len(x)] == metrics.dead
    assert metrics.never_fired[1024] == int((acts[:1024].sum(0) == 0).sum())
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
    ours = evaluate_sae(sae, model, rows, progress=False)
    for group, figures in ours.to_stock().items():
        assert figures.keys() <= stock[group].keys()
        for name, value in figures.items():
            assert value == pytest.approx(stock[group][name], rel=1e-3), name
    assert sum(map(len, ours.to_stock().values())) == 9


def test_batching_changes_nothing(evaluation, sae, model, corpus):
    other = evaluate_sae(sae, model, corpus, batch_blocks=17, progress=False).metrics
    assert other.ve == pytest.approx(evaluation.metrics.ve, rel=1e-6)
    assert other.sse_share[0.01] == pytest.approx(evaluation.metrics.sse_share[0.01], rel=1e-6)


def test_the_record_says_what_was_measured(evaluation, sae, model, corpus, tmp_path):
    evaluation.to_json(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["model"].pop("fingerprint") == model_fingerprint(model)
    assert data["model"] == {"name": "gemma-4-demo", "class": "Gemma4ProxyLM", "dtype": "float32"}
    assert data["sae"]["hash"] == sae_hash(sae)
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


def test_a_transcoder_is_one_whatever_its_metadata_say(model, corpus):
    transcoder = Transcoder(TranscoderConfig(d_in=96, d_sae=32, d_out=96, apply_b_dec_to_input=False))
    transcoder.cfg.metadata.hook_name_out = None
    with pytest.raises(SAEError, match="transcoder"):
        evaluate_sae(transcoder, model, corpus, hook_name="blocks.3.hook_resid_post", progress=False)


def test_an_sae_that_reads_sequences_is_refused(model, corpus):
    config = TemporalSAEConfig(d_in=96, d_sae=96, n_heads=1, bottleneck_factor=1)
    with pytest.raises(SAEError, match="reads sequences"):
        evaluate_sae(TemporalSAE(config), model, corpus, hook_name="blocks.3.hook_resid_post", progress=False)


def test_what_does_not_fit_is_named(sae, model, corpus):
    with pytest.warns(MismatchWarning), pytest.raises(UnknownNameError, match=r"blocks\.3\.hook_resid_post"):
        evaluate_sae(sae, model, corpus, hook_name="blocks.3.hook_resid_pst", progress=False)
    with pytest.warns(MismatchWarning, match="at"), pytest.raises(SAEError, match="256 wide; this SAE reads 96"):
        evaluate_sae(sae, model, corpus, hook_name="model.layers.1.mlp.gate_proj", progress=False)


@pytest.fixture(scope="module")
def chat(model):
    tuned = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")
    return tuned, build_corpus("embedded:chat", tuned.tokenizer, context_size=64, split="heldout", max_tokens=3000)


def at_layer(sae, layer):
    """A different SAE for another hook: it reconstructs worse, which is all that matters here."""
    other = copy.deepcopy(sae)
    other.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        other.threshold *= 1.5
    return other


def test_several_saes_and_layers_take_one_forward_and_measure_as_alone(sae, chat):
    tuned, corpus = chat
    saes = {"three": sae, "three, other": at_layer(sae, 3), "five": at_layer(sae, 5)}
    runs = []
    original = tuned.run_with_cache
    tuned.run_with_cache = lambda *args, **kwargs: runs.append(kwargs["names_filter"]) or original(*args, **kwargs)
    try:
        together = evaluate_saes(saes, tuned, corpus, progress=False, sampling=Sampling(resamples=50))
    finally:
        del tuned.run_with_cache
    assert len(runs) == -(-corpus.n_blocks // 16)
    assert all(sorted(names) == ["blocks.3.hook_resid_post", "blocks.5.hook_resid_post"] for names in runs)
    for name, other in saes.items():
        alone = evaluate_sae(other, tuned, corpus, progress=False, sampling=Sampling(resamples=50))
        assert alone.to_dict()["metrics"] == together[name].to_dict()["metrics"]
        assert alone.to_dict()["intervals"] == together[name].to_dict()["intervals"]


@torch.no_grad()
@pytest.mark.parametrize("chunk_tokens", [37, 4000])
def test_groups_widths_and_documents_are_plain_computations_on_their_tokens(sae, chat, monkeypatch, chunk_tokens):
    monkeypatch.setattr(reading, "CHUNK_LATENTS", chunk_tokens * sae.cfg.d_sae)
    tuned, corpus = chat
    evaluation = evaluate_sae(sae, tuned, corpus, progress=False)
    result = evaluation.to_dict()
    _, cache = tuned.run_with_cache(corpus.tokens_bp, names_filter=["blocks.3.hook_resid_post"])
    keep = corpus.keep_bp
    x = cache["blocks.3.hook_resid_post"][keep]
    acts = sae.encode(x)
    sse = (x.double() - sae.decode(acts).double()).square().sum(1)

    def ve(chosen, sse=sse):
        part = x[chosen].double()
        return float(1 - sse[chosen].sum() / (part - part.mean(0)).square().sum())

    def nmse(chosen, sse=sse):
        return float(sse[chosen].sum() / x[chosen].double().square().sum())

    document = corpus.document_bp[keep]
    without_one = [float(sse[document != d].mean()) for d in document.unique()]
    assert evaluation.replicates["mse"][1000:].tolist() == pytest.approx(without_one, rel=1e-5)
    position = torch.arange(64).expand_as(keep)[keep]
    rows = {row["name"]: row for row in result["groups"]["position"]}
    assert list(rows) == ["1", "2–3", "4–7", "8–15", "16–31", "32–63"]
    for name, row in rows.items():
        low, _, high = name.partition("–")
        inside = (position >= int(low)) & (position <= int(high or low))
        assert row["n_tokens"] == int(inside.sum())
        assert row["ve"] == pytest.approx(ve(inside), rel=1e-5)
        assert row["nmse"] == pytest.approx(nmse(inside), rel=1e-5)
        assert row["l0"] == pytest.approx(float((acts[inside] != 0).double().sum(1).mean()), rel=1e-6)
        assert row["sse_share"] == pytest.approx(float(sse[inside].sum() / sse.sum()), rel=1e-6)
    role = corpus.role_bp[keep]
    assert {row["name"] for row in result["groups"]["role"]} == {corpus.roles[r] for r in role.unique().tolist()}
    for row in result["groups"]["role"]:
        assert row["ve"] == pytest.approx(ve(role == corpus.roles.index(row["name"])), rel=1e-5)
    assert [row["width"] for row in result["widths"]] == [128, 512, 2048]
    for row in result["widths"]:
        first = acts.clone()
        first[:, row["width"] :] = 0
        error = (x.double() - sae.decode(first).double()).square().sum(1)
        assert row["ve"] == pytest.approx(ve(slice(None), error), rel=1e-5)
        assert row["nmse"] == pytest.approx(nmse(slice(None), error), rel=1e-5)
        assert row["l0"] == pytest.approx(float((first != 0).double().sum(1).mean()), rel=1e-6)
    assert result["widths"][-1]["ve"] == pytest.approx(result["metrics"]["ve"], rel=1e-9)


def test_a_latents_rate_at_the_edge_of_two_bins_is_in_the_upper_one():
    """Of 1,000 tokens thirty bins are a tenth of a decade wide; ten tokens are 10⁻², where the eleventh begins."""
    snapshot = SimpleNamespace(n=1000, fired_f=torch.tensor([0, 1, 10, 10, 1000]))
    counts = density_histogram(snapshot)["counts"]
    assert {i: c for i, c in enumerate(counts) if c} == {0: 1, 10: 2, 29: 1}


def test_what_mean_ablation_puts_in_is_the_mean_of_all_that_was_measured(sae, model, corpus, activations):
    result = evaluate_sae(sae, model, corpus, downstream_tokens=300, sampling=Sampling(0), progress=False).downstream
    settings = {"max_tokens": 300, "progress": False}
    hook = "blocks.3.hook_resid_post"
    expected = measure_downstream(model, corpus, hook, sae, activations.mean(0), **settings).to_dict()
    assert result["n_tokens"] < 0.2 * corpus.n_tokens
    for mask in ("excluded", "included"):
        assert result[mask]["kl"] == pytest.approx(expected[mask]["kl"], rel=1e-4)


def of_head(head, hook="blocks.1.attn.hook_z", d_in=4):
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=32, device="cpu"))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = hook, head
    return sae


@pytest.fixture(scope="module")
def with_heads():
    cfg = HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=32, d_head=4, d_vocab=50, act_fn="gelu", seed=0)
    tokens = torch.randint(0, 50, (8, 32), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(8)[:, None].expand_as(tokens).clone() + 10**12  # numbers, not places
    return HookedTransformer(cfg), Corpus(tokens, torch.ones_like(tokens).bool(), documents, "random")


@torch.no_grad()
@pytest.mark.parametrize("head", [0, 2, -1])
def test_an_sae_of_one_head_is_measured_and_spliced_in_there(with_heads, head):
    stock, corpus = with_heads
    sae, settings = of_head(head), {"sampling": Sampling(100), "progress": False}
    result = evaluate_sae(sae, stock, corpus, downstream_tokens=None, **settings)
    _, cache = stock.run_with_cache(corpus.tokens_bp)
    x = cache["blocks.1.attn.hook_z"][:, :, head].flatten(0, 1).double()
    expected = 1 - (x - sae(x.float()).double()).square().sum() / (x - x.mean(0)).square().sum()
    assert result.metrics.ve == pytest.approx(float(expected), rel=1e-5)
    assert result.metrics.mse.interval is not None

    def splice(value, hook):
        value[:, :, head] = sae(value[:, :, head])
        return value

    logp, spliced = (
        logits[:, :-1].double().log_softmax(-1).gather(-1, corpus.tokens_bp[:, 1:, None])
        for logits in (stock(corpus.tokens_bp), stock.run_with_hooks(
            corpus.tokens_bp, fwd_hooks=[("blocks.1.attn.hook_z", splice)]))
    )  # fmt: skip
    ce = result.downstream["excluded"]["ce"]
    assert (ce["model"], ce["sae"]) == pytest.approx((-float(logp.mean()), -float(spliced.mean())), rel=1e-5)


def test_a_head_that_is_not_there_is_named_at_the_first_batch(with_heads):
    stock, corpus = with_heads
    for sae, message in (
        (of_head(4), "has 4 heads; this SAE reads head 4"),
        (of_head(2, "blocks.1.hook_resid_pre", 16), "not divided into heads; this SAE reads head 2"),
    ):
        with pytest.raises(SAEError, match=message):
            evaluate_sae(sae, stock, corpus, batch_blocks=1, downstream_tokens=9, progress=False)


def test_metadata_that_cannot_be_read_are_refused_before_any_forward(sae, model, corpus, monkeypatch):
    monkeypatch.setattr(type(model), "run_with_cache", None)
    for field, value in (("k", "sixteen"), ("matryoshka_widths", ["a"])):
        other = copy.deepcopy(sae)
        other.cfg.metadata.training_architecture_details[field] = value
        with pytest.raises(SAEError, match=field):
            evaluate_sae(other, model, corpus, progress=False)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_text("old", tmp_path / "report.json")
    with pytest.raises(UnicodeEncodeError):
        write_text("new \ud800", tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == "old"
    (tmp_path / "folder").mkdir()
    for path, reason in ((tmp_path / "folder", "Is a directory"), (tmp_path / "none" / "x", "No such file")):
        with pytest.raises(ConfigError, match=f"{path.name} cannot be written: {reason}"):
            write_text("new", path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "folder"}


def test_a_misfit_is_named_with_its_cause(sae):
    rescaled = g4.load_model("gemma-4-demo-it-rescaled", "Gemma4ProxyLM")
    corpus = build_corpus("embedded:chat", rescaled.tokenizer, context_size=64, split="heldout", max_tokens=2000)
    diagnosis = evaluate_sae(sae, rescaled, corpus, progress=False).diagnosis
    assert (diagnosis["verdict"], diagnosis["cause"], diagnosis["norm_screen"]) == ("misfit", "scale", None)
    scale = next(trial for trial in diagnosis["trials"] if trial["correction"] == "scale")
    assert 4 < scale["factor"] < 7 and scale["ve"] > 0.7
    assert "0.5" in diagnosis["reason"]


@torch.no_grad()
def spoil(sae, model, corpus, every=1000):
    """An SAE with one loud latent that no ordinary token wakes, and a hook that makes one token in `every` wake it.

    These tokens get the median norm, so that nothing but their error is unusual: the public finding in kind.
    """
    _, cache = model.run_with_cache(corpus.tokens_bp, names_filter=["blocks.3.hook_resid_post"])
    x_td = cache["blocks.3.hook_resid_post"][corpus.keep_bp]
    odd_d = torch.linalg.svd(x_td - x_td.mean(0), full_matrices=False).Vh[-1]  # where activations vary least
    norm = x_td.norm(dim=1).median()
    loud = copy.deepcopy(sae)
    loud.W_enc[:, 0], loud.b_enc[0], loud.threshold[0] = odd_d, 0, 0.5 * norm
    loud.W_dec[0] = 25 * odd_d
    chosen = corpus.keep_bp.nonzero()[every // 2 :: every]
    blocks = iter(torch.arange(corpus.n_blocks).split(16))

    def hook(acts_bpd, hook):
        here = next(blocks)
        for block, position in chosen[torch.isin(chosen[:, 0], here)].tolist():
            acts_bpd[block - int(here[0]), position] = norm * odd_d
        return acts_bpd

    return loud, hook, len(chosen)


def test_constructed_outliers_are_told_from_a_misfit_and_no_norm_screen_sees_them(sae, model, tmp_path):
    corpus = build_corpus("embedded:text", model.tokenizer, context_size=64, split="heldout", max_tokens=20_000)
    loud, hook, n = spoil(sae, model, corpus)
    healthy = evaluate_sae(loud, model, corpus, progress=False).metrics
    model.add_hook("blocks.3.hook_resid_post", hook)
    try:
        result = evaluate_sae(loud, model, corpus, progress=False)
    finally:
        model.reset_hooks()
    metrics = result.metrics
    assert healthy.verdict == "healthy" and metrics.verdict == "outlier-dominated"
    assert metrics.ve < 0.3 and metrics.ve_without_top_sse[0.001] == pytest.approx(healthy.ve, abs=0.02)
    assert metrics.sse_share[0.001] > 0.6
    assert metrics.ve_without_top_norm[0.001] == pytest.approx(metrics.ve, abs=0.02)
    assert all(ve == pytest.approx(metrics.ve, abs=0.02) for ve in metrics.ve_without_high_norm.values())
    assert result.diagnosis["norm_screen"] is False
    worst = result.outliers["tokens"][0]
    assert result.outliers["count"] >= n - 1
    assert worst["norm_rank"] > 0.2 * metrics.n_tokens and worst["sse_rank"] == 1
    result.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "outlier-dominated" in page and "norm" in page


def test_bad_input_is_named(sae, model, corpus):
    with pytest.raises(ConfigError, match="no SAE"):
        evaluate_saes({}, model, corpus)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens(["quokka"])
    other = build_corpus(["some text, and some more of it"] * 9, tokenizer, context_size=16)
    with pytest.raises(DataError, match="another tokenizer"):
        evaluate_sae(sae, model, other, progress=False)
    foreign = dataclasses.replace(corpus, tokens_bp=corpus.tokens_bp + 5000, origin=None)
    with pytest.raises(DataError, match="token id"):
        evaluate_sae(sae, model, foreign, progress=False)
    with pytest.raises(ConfigError, match="resamples"):
        Sampling(resamples=-1)


def test_without_a_tokenizer_texts_are_numbers_and_traits_that_need_one_are_not_defined(sae, model, corpus):
    class Untold:
        tokenizer = None

        def __getattr__(self, name):
            return getattr(model, name)

    result = evaluate_sae(sae, Untold(), corpus, progress=False, sampling=Sampling(resamples=0))
    worst = result.outliers["tokens"][0]
    assert worst["text"] == f"#{worst['token_id']}" and worst["special"] is None and worst["delimiter"] is None
    assert result.outliers["shares"]["special"] == {"top": None, "all": None}
    assert 0 < result.outliers["shares"]["repeat"]["all"] < 1
    assert "not defined" in render_evaluation(result.to_dict())
