"""`measure_downstream` against float64 by hand, one whole run a variant, and against sae_lens's `run_evals`."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens.evals import EvalConfig, _kl, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import Corpus, build_corpus
from sae_lens_gemma4.errors import ConfigError, DataError, SAEError, UnknownNameError
from sae_lens_gemma4.evaluation import downstream as module
from sae_lens_gemma4.evaluation import intervals
from sae_lens_gemma4.evaluation.downstream import measure_downstream, stock_keys
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

HOOK = "blocks.3.hook_resid_post"
SPLICED = ("sae", "zero", "mean")


def halved(x_td):
    return 0.5 * x_td.roll(1, dims=1) + 0.1


@torch.no_grad()
def by_hand(model, corpus, hook, reconstruct, mean_d, head=None, **arguments):
    """Of every position: its document, whether it is kept, CE by variant (None without a next token), KL by variant."""
    positions = {"excluded": [], "included": []}
    for tokens, keep, documents in zip(corpus.tokens_bp, corpus.keep_bp, corpus.document_bp, strict=True):
        _, cache = model.run_with_cache(tokens[None], names_filter=[hook], prepend_bos=False, **arguments)
        acts = cache[hook][0].flatten(1) if head is None else cache[hook][0][:, head]
        put = {"sae": reconstruct(acts), "zero": torch.zeros_like(acts), "mean": mean_d.to(acts).expand_as(acts)}
        for name, mask in (("excluded", keep), ("included", documents >= 0)):
            logp = {"model": model(tokens[None], prepend_bos=False, **arguments)[0].double().log_softmax(-1)}
            for variant, value in put.items():
                new = cache[hook].clone(memory_format=torch.contiguous_format)
                place = new[0].view(len(tokens), -1) if head is None else new[0, :, head]
                place[mask] = value[mask]
                hooks = [(hook, lambda _, hook, new=new: new)]
                logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks, prepend_bos=False, **arguments)
                logp[variant] = logits[0].double().log_softmax(-1)
            for p in mask.nonzero()[:, 0].tolist():
                follows = p + 1 < len(tokens) and documents[p + 1] >= 0
                ce = {v: -float(logp[v][p, tokens[p + 1]]) for v in logp} if follows else None
                kl = {v: float((logp["model"][p].exp() * (logp["model"][p] - logp[v][p])).sum()) for v in SPLICED}
                positions[name].append((int(documents[p]), ce, kl))
    return positions


def figures(positions):
    ce = {v: np.mean([ce[v] for _, ce, _ in positions if ce]) for v in ("model", *SPLICED)}
    kl = {v: np.mean([kl[v] for _, _, kl in positions]) for v in SPLICED}
    ce_damage = {v: ce[v] - ce["model"] for v in SPLICED}
    return {
        "ce": ce,
        "kl": kl,
        "ce_recovered": {
            a: (ce[a] - ce["sae"]) / ce_damage[a] if ce_damage[a] > 1e-6 else None for a in ("zero", "mean")
        },
        "kl_recovered": {a: (kl[a] - kl["sae"]) / kl[a] for a in ("zero", "mean")},
    }


def check(result, positions, rel=1e-5):
    for mask in ("excluded", "included"):
        assert result[mask]["n_tokens"] == len(positions[mask])
        for kind, expected in figures(positions[mask]).items():
            for name, value in expected.items():
                ours = result[mask][kind][name]
                assert ours is value is None or ours == pytest.approx(value, rel=rel, abs=1e-6), (mask, kind, name)


@pytest.fixture(scope="module")
def corpus(model):
    texts = ["def f(x):\n    return x + 1\n", "The list of all modules is sorted by name. " * 6, "import os\n"]
    return build_corpus(texts, model.tokenizer, context_size=20)


@pytest.fixture(scope="module")
@torch.no_grad()
def mean_d(model, corpus):
    _, cache = model.run_with_cache(corpus.tokens_bp, names_filter=[HOOK])
    return cache[HOOK][corpus.keep_bp].mean(0)


@pytest.fixture(scope="module")
def positions(model, corpus, sae, mean_d):
    return by_hand(model, corpus, HOOK, sae, mean_d)


@pytest.fixture(scope="module")
def sums(model, corpus, sae, mean_d):
    return measure_downstream(model, corpus, HOOK, sae, mean_d, progress=False)


def test_figures_are_those_of_a_plain_computation(sums, corpus, positions):
    assert (corpus.document_bp < 0).any() and (corpus.keep_bp != (corpus.document_bp >= 0)).any()
    result = sums.to_dict()
    check(result, positions)
    assert result["excluded"]["ce_recovered"]["zero"] > 0.5  # the figures of a trained model and SAE
    assert (result["n_tokens"], result["n_blocks"], result["resumed"]) == (corpus.n_tokens, corpus.n_blocks, True)
    assert result["excluded"]["intervals"] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("batch_blocks", [2, 99])
def test_batching_changes_nothing(sums, model, corpus, sae, mean_d, batch_blocks):
    other = measure_downstream(model, corpus, HOOK, sae, mean_d, batch_blocks=batch_blocks, progress=False)
    assert torch.equal(other.documents, sums.documents)
    torch.testing.assert_close(other.sums_gmc, sums.sums_gmc, rtol=1e-4, atol=1e-5)


def test_a_bridge_measures_the_same(sums, corpus, sae, mean_d):
    bridge = g4.load_model("gemma-4-demo", "Gemma4Bridge")
    other = measure_downstream(bridge, corpus, HOOK, sae, mean_d, progress=False)
    torch.testing.assert_close(other.sums_gmc, sums.sums_gmc, rtol=1e-4, atol=1e-4)


def test_run_evals_agrees_on_the_same_tokens(sae, model):
    built = build_corpus("embedded:text", model.tokenizer, context_size=64, split="heldout", max_tokens=2000)
    rows = built.tokens_bp[(built.document_bp >= 0).all(dim=1)][:16]
    store = ActivationsStore.from_sae(
        model, sae, Dataset.from_dict({"tokens": rows.tolist()}), context_size=64, streaming=False,
        store_batch_size_prompts=8, total_tokens=100,
    )  # fmt: skip
    stock, _ = run_evals(
        sae, store, model, ActivationScaler(),
        EvalConfig(batch_size_prompts=8, n_eval_reconstruction_batches=2, compute_kl=True, compute_ce_loss=True),
    )  # fmt: skip
    packed = build_corpus(rows, model.tokenizer, context_size=64)
    assert 0 < packed.n_tokens < rows.numel()
    ours = stock_keys(measure_downstream(model, packed, HOOK, sae, torch.zeros(96), progress=False).to_dict())
    for group, expected in ours.items():
        assert stock[group] == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def stock():
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=12, d_head=8, d_vocab=50, act_fn="gelu", device="cpu", seed=0,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    keep = torch.rand(3, 12) > 0.2
    corpus = Corpus(torch.randint(0, 50, (3, 12)), keep, torch.arange(3)[:, None].expand(3, 12), "random")
    return HookedTransformer(cfg), corpus, torch.randn(16)


@torch.no_grad()
def test_a_hooked_transformer(stock):
    stock, corpus, mean_d = stock
    for hook in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z"):  # the latter two heads, flattened
        result = measure_downstream(stock, corpus, hook, halved, mean_d, progress=False).to_dict()
        assert result["resumed"]
        check(result, by_hand(stock, corpus, hook, halved, mean_d))
    for head in (1, -2):
        of_head = measure_downstream(stock, corpus, hook, halved, mean_d[:8], head=head, progress=False).to_dict()
        check(of_head, by_hand(stock, corpus, hook, halved, mean_d[:8], head=head))
        assert of_head["excluded"]["kl"]["sae"] != pytest.approx(result["excluded"]["kl"]["sae"], rel=1e-2)


@torch.no_grad()
def test_zero_everywhere_ablates_all_positions_and_averages_over_those_that_count(stock):
    stock, corpus, mean_d = stock
    hook = "blocks.1.hook_resid_post"
    positions = by_hand(stock, corpus, hook, halved, mean_d)["included"]
    counted = [p for p, keep in zip(positions, corpus.keep_bp.flatten().tolist(), strict=True) if keep]
    ce, kl = np.mean([ce["zero"] for _, ce, _ in counted if ce]), np.mean([kl["zero"] for *_, kl in counted])
    result = measure_downstream(stock, corpus, hook, halved, mean_d, progress=False).to_dict()
    assert result["zero_everywhere"] == pytest.approx({"ce": ce, "kl": kl}, rel=1e-5)
    for mask in ("excluded", "included"):
        assert result[mask]["kl"]["zero"] != pytest.approx(kl, rel=1e-3)


def test_a_model_that_cannot_be_resumed_runs_whole_and_in_parts(monkeypatch):
    stock = HookedProxyLM(tiny_gemma4("ple"), tiny_tokenizer())
    corpus = build_corpus(["import os and sys " * 9], stock.tokenizer, context_size=12)
    hook, mean_d = "model.layers.2.post_feedforward_layernorm", torch.randn(64)
    runs = []
    stock.model.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    expected = by_hand(stock, corpus, hook, halved, mean_d)
    for n_variants, batches in ((9, [1, 6]), (4, [1, 4, 2])):
        monkeypatch.setattr(module, "RUN_BYTES", n_variants * 12 * 2048 * 4)
        runs.clear()
        result = measure_downstream(stock, corpus, hook, halved, mean_d, progress=False).to_dict()
        assert runs == batches * corpus.n_blocks
        assert not result["resumed"]
        check(result, expected)


def test_chunks_of_positions_change_nothing(sums, model, corpus, sae, mean_d, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 7 * 2048)
    other = measure_downstream(model, corpus, HOOK, sae, mean_d, progress=False)
    torch.testing.assert_close(other.sums_gmc, sums.sums_gmc, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_losses_of_a_bf16_model_are_float32(corpus):
    proxy = Gemma4ProxyLM(tiny_gemma4("ple").to(torch.bfloat16), tiny_tokenizer())
    result = measure_downstream(proxy, corpus, HOOK, halved, torch.zeros(64), progress=False).to_dict()
    check(result, by_hand(proxy, corpus, HOOK, halved, torch.zeros(64)), rel=1e-4)
    clean = proxy(corpus.tokens_bp)
    zero = proxy.run_with_hooks(corpus.tokens_bp, fwd_hooks=[(HOOK, lambda acts, hook: torch.zeros_like(acts))])
    real = corpus.document_bp >= 0
    in_bf16, in_float32 = (float(_kl(a, b)[real].mean()) for a, b in ((clean, zero), (clean.float(), zero.float())))
    assert result["included"]["kl"]["zero"] == pytest.approx(in_float32, rel=1e-4)
    assert in_bf16 != pytest.approx(in_float32, rel=1e-3)  # as sae_lens takes it


def test_isolated_documents_are_those_read_alone(model, sae, mean_d):
    texts = ["def f(x):\n    return x + 1\n", "import os and sys\n"]
    packed = build_corpus(texts, model.tokenizer, context_size=64)
    alone = Corpus.concat([build_corpus([text], model.tokenizer, context_size=64) for text in texts])
    assert (packed.n_blocks, alone.n_blocks) == (1, 2)
    isolated = measure_downstream(model, packed, HOOK, sae, mean_d, isolate_documents=True, progress=False)
    apart = measure_downstream(model, alone, HOOK, sae, mean_d, progress=False)
    together = measure_downstream(model, packed, HOOK, sae, mean_d, progress=False)
    kl = [module._COLUMNS.index(f"kl_{v}") for v in SPLICED]
    torch.testing.assert_close(isolated.sums_gmc[:, :, kl], apart.sums_gmc[:, :, kl], rtol=1e-4, atol=1e-5)
    assert (together.sums_gmc - isolated.sums_gmc)[1, 0, kl].abs().max() > 1e-2


def test_an_sae_that_changes_nothing_recovers_all(model, corpus, mean_d):
    result = measure_downstream(model, corpus, HOOK, lambda x: x, mean_d, progress=False).to_dict()
    for mask in ("excluded", "included"):
        assert result[mask]["ce"]["sae"] == pytest.approx(result[mask]["ce"]["model"], rel=1e-6)
        assert result[mask]["kl"]["sae"] == pytest.approx(0, abs=1e-6)
        recovered = [*result[mask]["ce_recovered"].values(), *result[mask]["kl_recovered"].values()]
        assert recovered == pytest.approx([1] * 4, abs=1e-5)


@pytest.fixture
def of_few(monkeypatch):
    """Intervals of as few documents and draws as can be followed by hand."""
    monkeypatch.setattr(intervals, "MIN_DOCUMENTS", 2)
    monkeypatch.setattr(intervals, "MIN_RESAMPLES", 1)


@pytest.mark.usefixtures("of_few")
def test_intervals_are_of_the_figures_on_documents_drawn(sums, positions):
    assert sums.documents.tolist() == [0, 1, 2]
    sampling = Sampling(resamples=20, seed=3, level=0.8)
    result, replicates = sums.to_dict(sampling), sums.replicates(sampling)
    for mask in ("excluded", "included"):
        drawn = [
            figures([p for p in positions[mask] for _ in range(int(row[p[0]]))]) for row in sampling.weights(3)
        ]  # fmt: skip
        for kind, named in figures(positions[mask]).items():
            for name, value in named.items():
                expected = torch.tensor([f[kind][name] for f in drawn], dtype=torch.float64)
                torch.testing.assert_close(replicates["downstream", mask, kind, name], expected, rtol=1e-4, atol=1e-6)
                interval = list(sampling.interval(value, expected))
                assert result[mask]["intervals"][kind][name] == pytest.approx(interval, rel=1e-4, abs=1e-6)
        assert result[mask]["ce"] == sums.to_dict()[mask]["ce"]
    assert sums.to_dict(Sampling(resamples=0))["excluded"]["intervals"] is None


def test_the_run_ends_with_the_first_whole_batch(model, corpus, sae, mean_d):
    kept = corpus.keep_bp.sum(1).tolist()
    for max_tokens, n_blocks in ((1, 1), (kept[0], 1), (kept[0] + 1, 2)):
        result = measure_downstream(model, corpus, HOOK, sae, mean_d, max_tokens=max_tokens, progress=False).to_dict()
        assert (result["n_blocks"], result["n_tokens"]) == (n_blocks, sum(kept[:n_blocks]))


@pytest.mark.usefixtures("of_few")
def test_figures_that_are_not_defined_are_none(model, sae, mean_d):
    """One token a block has no next token; a layer's part that is always zero does no damage where it is ablated."""
    corpus = build_corpus(torch.tensor([[40], [50]]), model.tokenizer, context_size=2)
    sums = measure_downstream(model, corpus, HOOK, sae, mean_d, progress=False)
    result = sums.to_dict(Sampling(resamples=20))
    assert set(result["excluded"]["ce"].values()) == {None} == set(result["excluded"]["ce_recovered"].values())
    assert result["excluded"]["intervals"]["ce"]["sae"] is None
    assert result["excluded"]["intervals"]["kl"]["sae"] is not None
    assert stock_keys(result)["model_performance_preservation"]["ce_loss_score"] is None

    silent = copy.deepcopy(tiny_gemma4("dense_keqv"))
    silent.model.language_model.layers[2].post_feedforward_layernorm.weight.data.zero_()
    proxy, tokens = Gemma4ProxyLM(silent, tiny_tokenizer()), torch.arange(100, 112)[None]
    corpus = build_corpus(tokens, proxy.tokenizer, context_size=12)
    ones = torch.ones(64)
    result = measure_downstream(proxy, corpus, "blocks.2.hook_mlp_out", lambda x: x + 1, ones, progress=False).to_dict()
    assert result["excluded"]["ce_recovered"]["zero"] is None is result["excluded"]["kl_recovered"]["zero"]
    assert result["excluded"]["kl_recovered"]["mean"] == pytest.approx(0, abs=1e-5)


def test_what_does_not_fit_is_named(model, corpus, sae, mean_d):
    def measure(hook=HOOK, reconstruct=sae, mean=mean_d, of=model, **settings):
        measure_downstream(of, corpus, hook, reconstruct, mean, progress=False, **settings)

    with pytest.raises(UnknownNameError, match=r"blocks\.3\.hook_resid_post"):
        measure("blocks.3.hook_resid_pots")
    with pytest.raises(DataError, match=r"layers\.1\.experts is \(20, 64\), not \[block, pos"):
        measure("model.layers.1.experts", of=Gemma4ProxyLM(tiny_gemma4("moe"), tiny_tokenizer()))
    with pytest.raises(SAEError, match=r"96 wide; the mean is \(64,\)"):
        measure(mean=torch.zeros(64))
    with pytest.raises(SAEError, match=r"its reconstruction is \(20, 64\)"):
        measure(reconstruct=lambda x: x[:, :64])
    with pytest.raises(DataError, match=r"Predictions around .* not finite, first in document 0"):
        measure(reconstruct=lambda x: x * torch.nan)
    broken = tiny_gemma4("ple")
    broken.model.layers[3].layer_scalar.fill_(torch.nan)
    with pytest.raises(DataError, match=r"Activations at blocks\.3\.hook_resid_post are not finite"):
        measure(of=Gemma4ProxyLM(broken, tiny_tokenizer()))
    with pytest.raises(ConfigError, match="isolate_documents needs Gemma4Bridge or Gemma4ProxyLM, not HookedProxyLM"):
        measure(of=HookedProxyLM(tiny_gemma4("ple"), tiny_tokenizer()), isolate_documents=True)
    with pytest.raises(ConfigError, match="batch_blocks must be at least 1"):
        measure(batch_blocks=0)
