import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.errors import ConfigError, DataError, MismatchWarning, SAEError
from sae_lens_gemma4.neuronpedia import writing
from sae_lens_gemma4.neuronpedia.dashboards import build_dashboards
from sae_lens_gemma4.neuronpedia.folder import Dashboards
from sae_lens_gemma4.neuronpedia.planning import (
    DecoderNormWarning,
    NoLogitsWarning,
    ShortCorpusWarning,
    plan_dashboards,
)
from sae_lens_gemma4.neuronpedia.writing import DashboardSettings, Writer
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer
from sae_lens_gemma4.training.saving import only_one
from tests.interp.plain import correlation, dense
from tests.support import RELEASE, SAE_ID

HOOK = "blocks.3.hook_resid_post"
pytestmark = pytest.mark.filterwarnings("ignore:Decoder rows have lengths")
KEYS = {  # of sae_dashboard 0.8's NeuronpediaDashboardFeature, whose constructor takes no others
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values",
    "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset",
    "activations", "decoder_weights_dist", "vector",
}  # fmt: skip


@pytest.fixture(scope="module")
def sae():
    return SAE.from_pretrained(RELEASE, SAE_ID)


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


@pytest.fixture(scope="module")
def corpus(model):
    return g4.build_corpus("embedded:text", model.tokenizer, context_size=32, max_tokens=1200)


@pytest.fixture(scope="module")
def built(sae, model, corpus, tmp_path_factory):
    return build_dashboards(sae, model, corpus, tmp_path_factory.mktemp("dashboards"), progress=False)


@pytest.fixture(scope="module")
def plain(sae, model, corpus):
    return dense(sae, model, HOOK, corpus)


@pytest.fixture(scope="module")
def counts(plain):
    return (plain[1] > 0).sum(dim=(0, 1))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_every_latent_has_a_dashboard_or_is_listed_as_dead(built, sae, counts):
    alive = counts.nonzero()[:, 0].tolist()
    assert [f["feature_index"] for f in built.features()] == built.latents["index"] == alive
    assert built.dead == (counts == 0).nonzero()[:, 0].tolist() and built.dead
    assert all(set(feature) == KEYS for feature in built.features())
    assert not (built.path / "firings").exists()


def test_figures_are_those_of_a_plain_computation(built, sae, model, corpus, plain, counts):
    x_bpd, z_bpf = plain
    x_td, z_tf = x_bpd[corpus.keep_bp], z_bpf[corpus.keep_bp]
    decoder = model.model.model
    logits_fv = (sae.W_dec * decoder.norm.weight) @ model.model.lm_head.weight.T
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    for latent in counts.topk(4).indices.tolist() + (counts == 1).nonzero()[:2, 0].tolist():
        found, z_t = built.feature(latent), z_tf[:, latent]
        assert found["frac_nonzero"] == pytest.approx(float((z_t > 0).sum()) / corpus.n_tokens, rel=1e-12)
        fired = z_t[z_t > 0].double()
        low = float(fired.min()) if len(fired) > 1 else 0.0
        heights, edges = torch.histogram(fired, 50, range=(low, float(fired.max())))
        assert np.abs(heights.numpy() - found["freq_hist_data_bar_heights"]).sum() <= 2
        assert found["freq_hist_data_bar_values"] == pytest.approx(((edges[1:] + edges[:-1]) / 2).tolist(), abs=1e-3)
        logit_v = logits_fv[latent].detach()
        top, bottom = logit_v.topk(10), logit_v.topk(10, largest=False)
        assert found["pos_values"] == pytest.approx(top.values.tolist(), abs=1e-3)
        assert found["neg_values"] == pytest.approx(bottom.values.tolist(), abs=1e-3)
        assert found["pos_str"] == model.tokenizer.convert_ids_to_tokens(top.indices.tolist())
        assert found["neg_str"] == model.tokenizer.convert_ids_to_tokens(bottom.indices.tolist())
        assert sum(found["logits_hist_data_bar_heights"]) == len(logit_v)
        bars, sides = torch.histogram(logit_v.double(), 50)
        assert np.abs(bars.numpy() - found["logits_hist_data_bar_heights"]).sum() <= 2
        assert found["logits_hist_data_bar_values"] == pytest.approx(((sides[1:] + sides[:-1]) / 2).tolist(), abs=1e-3)
        pairs = {d: correlation(z_t, x_td[:, d]) for d in range(96)}
        best = sorted(pairs, key=lambda d: -pairs[d][0])[:3]
        assert found["correlated_neurons_pearson"] == pytest.approx([pairs[d][0] for d in best], abs=1e-3)
        assert found["correlated_neurons_l1"] == pytest.approx([pairs[d][1] for d in best], abs=1e-3)
        assert found["correlated_neurons_indices"] == best
        row = sae.W_dec[latent].detach()
        assert found["neuron_alignment_indices"] == row.topk(3).indices.tolist()
        assert found["neuron_alignment_values"] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        shares = row.topk(3).values.abs() / row.abs().sum()
        assert found["neuron_alignment_l1"] == pytest.approx(shares.tolist(), abs=1e-3)
        assert (found["n_prompts_total"], found["n_tokens_in_prompt"]) == (corpus.n_blocks, 32)
        assert found["dataset"] == "embedded:text" and found["vector"] == found["decoder_weights_dist"] == []
        for g, r, cosine in zip(
            found["correlated_features_indices"],
            found["correlated_features_pearson"],
            found["correlated_features_l1"],
            strict=True,
        ):
            assert (r, cosine) == pytest.approx(correlation(z_t, z_tf[:, g]), abs=1e-3)
        cosine_g = (unit[latent] @ unit.T).detach()
        cosine_g[latent] = -2
        assert built.nearest["cosine"][latent] == pytest.approx(cosine_g.topk(10).values.tolist(), abs=1e-3)
        assert built.nearest["indices"][latent] == cosine_g.topk(10).indices.tolist()


def test_painted_tokens_are_the_saes_own_activations(built, model, corpus, plain, counts):
    z_bpf, texts = plain[1], [model.tokenizer.convert_ids_to_tokens(row) for row in corpus.tokens_bp[:, 1:].tolist()]
    for feature in map(built.feature, counts.topk(6).indices.tolist()):
        z_bp = z_bpf[:, 1:, feature["feature_index"]]
        maxima = z_bp.amax(dim=1).sort(descending=True).values
        top = [a for a in feature["activations"] if a["bin_contains"] == -1]
        assert [max(a["values"]) for a in top] == pytest.approx(maxima[: len(top)].tolist(), abs=1e-3)
        assert len(top) == min(20, int((maxima > 0).sum()))
        shares = {}
        for activation in feature["activations"]:
            [block] = [b for b in range(len(texts)) if texts[b] == activation["tokens"]]
            np.testing.assert_allclose(activation["values"], z_bp[block], atol=1e-3)
            at, low, high = activation["qualifying_token_index"], activation["bin_min"], activation["bin_max"]
            if activation["bin_contains"] == -1:
                assert low == -1 and high == pytest.approx(float(maxima[0]), abs=1e-3)
                assert at == int(z_bp[block].argmax())
            else:
                assert low - 1e-3 <= activation["values"][at] <= high + 1e-3
                inside = ((z_bp > low) & (z_bp <= high)).sum()
                assert activation["bin_contains"] == pytest.approx(
                    float(inside) / corpus.n_tokens, abs=2 / corpus.n_tokens
                )
                shares[high] = activation["bin_contains"]
        assert sum(shares.values()) <= feature["frac_nonzero"] + 1e-9


def test_tokens_that_do_not_count_neither_fire_nor_are_counted(sae, model, corpus, tmp_path):
    masked = corpus.take(torch.arange(12))
    masked.keep_bp[:, 10:20] = False
    found = build_dashboards(sae, model, masked, tmp_path / "d", progress=False)
    z_tf = dense(sae, model, HOOK, masked)[1][masked.keep_bp]
    for feature in list(found.features())[:50]:
        fired = int((z_tf[:, feature["feature_index"]] > 0).sum())
        assert feature["frac_nonzero"] == fired / masked.n_tokens
        for activation in feature["activations"]:
            assert len(activation["values"]) == 31 and not any(activation["values"][9:19])


def test_padding_is_not_shown_and_a_first_token_that_is_no_bos_is(sae, model, tmp_path):
    texts = [
        "A short text about cats and dogs.",
        "Another one, which is a good deal longer than the first of the two is.",
    ]
    for bos, opening in ((True, 1), (False, 0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            corpus = g4.build_corpus(texts, model.tokenizer, context_size=40, packed=False, bos=bos)
        lengths = {int(n) - opening for n in (corpus.document_bp >= 0).sum(dim=1)}
        found = build_dashboards(sae, model, corpus, tmp_path / str(bos), progress=False)
        shown = {len(a["tokens"]) for f in found.features() for a in f["activations"]}
        assert shown <= lengths and len(shown) == 2
        assert all(len(a["tokens"]) == len(a["values"]) for f in found.features() for a in f["activations"])
        assert not any("<pad>" in a["tokens"] for f in found.features() for a in f["activations"])


@pytest.mark.parametrize("stage", ["firings", "batch-1", "batch-15", "last"])
def test_a_call_that_was_stopped_anywhere_ends_with_the_same_files(
    built, sae, model, corpus, tmp_path, monkeypatch, stage
):
    class Stopped(Exception):
        pass

    def stop_at(name):
        real = writing.write_text

        def write(text, path):
            if name in str(path):
                raise Stopped
            real(text, path)

        return write

    if stage == "firings":
        monkeypatch.setattr(Writer, "__init__", lambda *_: (_ for _ in ()).throw(Stopped))
    elif stage == "last":
        monkeypatch.setattr(writing, "write_json", lambda *_: (_ for _ in ()).throw(Stopped))
    else:
        monkeypatch.setattr(writing, "write_text", stop_at(stage))
    with pytest.raises(Stopped):
        build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    with pytest.raises(DataError, match=r"goes on where it was stopped|no folder of dashboards"):
        Dashboards(tmp_path / "d")
    monkeypatch.undo()
    again = build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    assert contents(again.path) == contents(built.path)


def test_a_finished_folder_is_opened_and_not_made_again(built, sae, model, corpus):
    before = {p: p.stat().st_mtime_ns for p in built.path.iterdir()}
    assert build_dashboards(sae, model, corpus, built.path, progress=False).dead == built.dead
    assert before == {p: p.stat().st_mtime_ns for p in built.path.iterdir()}


def test_activations_that_a_kill_left_beside_finished_dashboards_are_removed(built, sae, model, corpus, tmp_path):
    shutil.copytree(built.path, tmp_path / "d")
    (tmp_path / "d" / "firings").mkdir()
    (tmp_path / "d" / "firings" / "shard-00000.safetensors").write_bytes(b"x")
    build_dashboards(sae, model, corpus, tmp_path / "d", keep_firings=True, progress=False)
    assert (tmp_path / "d" / "firings").is_dir()
    build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    assert not (tmp_path / "d" / "firings").exists()


def test_a_folder_of_other_dashboards_is_refused_and_stays(built, sae, model, corpus, tmp_path):
    before = contents(built.path)
    with pytest.raises(ConfigError, match=r"dashboard\.n_strongest 20, not 5"):
        build_dashboards(sae, model, corpus, built.path, settings=DashboardSettings(n_strongest=5), progress=False)
    with pytest.raises(ConfigError, match=r"corpus\.\w+ .* not "):
        build_dashboards(sae, model, corpus.take(torch.arange(8)), built.path, progress=False)
    assert contents(built.path) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(built.path / "batch-0.json", foreign)
    with pytest.raises(ConfigError, match="made by something else"):
        build_dashboards(sae, model, corpus, foreign, progress=False)


@pytest.mark.parametrize("kept", [0, 0.5, -1, -5], ids=["nothing", "half", "without its end", "without its last line"])
def test_a_batch_that_is_not_all_there_is_made_again(built, sae, model, corpus, tmp_path, kept):
    """As after a power cut: what is there is not taken for what was to be there."""
    folder = tmp_path / "d"
    build_dashboards(sae, model, corpus, folder, keep_firings=True, progress=False)
    facts = json.loads((folder / "run_settings.json").read_text())
    (folder / "run_settings.json").write_text(json.dumps(facts | {"complete": False}))
    text = (folder / "batch-3.json").read_bytes()
    lines = text.split(b"\n")
    cut = {0: b"", 0.5: text[: len(text) // 2], -1: text[:-3], -5: b"\n".join(lines[:-3]) + b"\n"}[kept]
    (folder / "batch-3.json").write_bytes(cut)
    again = build_dashboards(sae, model, corpus, folder, progress=False)
    assert contents(again.path) == contents(built.path) and again.dead == built.dead


def test_a_finished_folder_that_has_lost_something_is_refused(built, sae, model, corpus, tmp_path):
    for change in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-400])):
        folder = tmp_path / "d"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(built.path, folder)
        change(folder / "batch-3.json")
        with pytest.raises(DataError, match=r"batch-3\.json"):
            Dashboards(folder)
        with pytest.raises(DataError, match=r"batch-3\.json"):
            build_dashboards(sae, model, corpus, folder, progress=False)


def test_two_processes_do_not_work_in_one_folder(sae, model, corpus, tmp_path):
    with only_one(tmp_path), pytest.raises(ConfigError, match="Another process"):
        build_dashboards(sae, model, corpus, tmp_path, progress=False)
    assert build_dashboards(sae, model, corpus, tmp_path, progress=False).dead


def test_what_fails_before_the_text_is_read_leaves_no_folder(sae, model, corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"GB are needed for activations and dashboards, and 0\.00 GB are free"):
        build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    monkeypatch.undo()
    with pytest.raises(SAEError, match="is 96 wide; this SAE reads 8"):
        build_dashboards(random_sae(8, 8, HOOK), model, corpus, tmp_path / "d", progress=False)
    with pytest.raises(ConfigError, match="batch_blocks must be at least 1"):
        build_dashboards(sae, model, corpus, tmp_path / "d", batch_blocks=0, progress=False)
    assert not (tmp_path / "d").exists()


def test_what_it_costs_is_told_and_holds(sae, model, corpus, tmp_path):
    plan = plan_dashboards(sae, model, corpus)
    cost = plan.cost(tmp_path / "not" / "there")
    made = build_dashboards(sae, model, corpus, tmp_path / "d", keep_firings=True, progress=False)
    written = sum(p.stat().st_size for p in made.files)
    assert written <= cost.dashboards and cost.memory > 0
    kept = sum(p.stat().st_size for p in (made.path / "firings").iterdir())
    assert kept <= cost.firings * 1.1
    assert "Disk: up to" in plan.sentence(cost)
    assert plan.cost(tmp_path / "d").firings == 0


def test_activations_may_lie_on_another_disk(built, sae, model, corpus, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "firings").symlink_to(tmp_path / "elsewhere")
    made = build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert contents(made.path) == contents(built.path)


def test_bos_is_shown_where_it_counts(sae, model, tmp_path):
    """Else an example would be shown without the token that it was chosen for."""
    corpus = g4.build_corpus(
        "embedded:text", model.tokenizer, context_size=32, max_tokens=600, exclude_special_tokens=False
    )
    found = build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    for f in found.features():
        for a in f["activations"]:
            assert a["tokens"][0] == "<bos>" and len(a["tokens"]) == 32
            assert a["values"][a["qualifying_token_index"]] > 0


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_settings_that_cannot_be_read_are_named(sae, model, corpus, tmp_path, text):
    (tmp_path / "run_settings.json").write_text(text)
    with pytest.raises(DataError, match=r"run_settings\.json .*Remove its folder"):
        build_dashboards(sae, model, corpus, tmp_path, progress=False)


def test_a_place_that_is_a_file_is_named(sae, model, corpus, tmp_path):
    (tmp_path / "d").write_text("")
    with pytest.raises(ConfigError, match="d is a file"):
        build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)


def test_the_index_is_where_the_dashboards_are(built):
    for row in range(0, len(built.latents["index"]), 97):
        index = built.latents["index"][row]
        feature = built.feature(index)
        assert feature["feature_index"] == index
        assert built.latents["max"][row] == max(max(a["values"]) for a in feature["activations"])
        assert built.latents["logit"][row] == feature["pos_str"][0]
    with pytest.raises(SAEError, match="it never fired"):
        built.feature(built.dead[0])
    with pytest.raises(SAEError, match="no such latent"):
        built.feature(2048)


def random_sae(d_in, d_sae, hook_name, **metadata):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae))
    for p in sae.parameters():
        torch.nn.init.normal_(p, std=0.3)
    sae.threshold.data.fill_(0.5)
    sae.cfg.metadata.hook_name = hook_name
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    return sae


@pytest.mark.parametrize(
    ("variant", "hook", "d_in", "logits"),
    [
        ("moe", "blocks.1.moe.hook_experts_out", 64, True),
        ("moe", "blocks.1.moe.hook_router_logits", None, False),
        ("moe", "blocks.2.hook_mlp_out", 64, True),
        ("ple", "blocks.1.hook_ple_out", 64, True),
        ("ple", "blocks.1.attn.hook_z", 64, True),
        ("ple", "model.language_model.layers.2", 64, True),
        ("unified", "ln_final.hook_out", 64, True),
    ],
)
@pytest.mark.parametrize("model_class", [g4.Gemma4ProxyLM, g4.Gemma4Bridge.boot])
def test_any_site_of_any_shape_has_dashboards(variant, hook, d_in, logits, model_class, tmp_path):
    model = model_class(tiny_gemma4(variant), tiny_tokenizer())
    if d_in is None:
        d_in = model.run_with_cache(torch.tensor([[2, 5]]), names_filter=[hook])[1][hook].shape[-1]
    corpus = g4.build_corpus(torch.randint(3, 2000, (10, 16)), model.tokenizer, context_size=16)
    sae = random_sae(d_in, 24, hook)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    assert logits != any(issubclass(w.category, NoLogitsWarning) for w in said)
    features = list(found.features())
    assert features and all(bool(f["pos_str"]) == logits for f in features)
    assert found.header["layer"] == (5 if hook.startswith("ln") else int(hook.split(".")[-1 if "model" in hook else 1]))
    _, cache = model.run_with_cache(corpus.tokens_bp, names_filter=[hook], prepend_bos=False)
    x = cache[hook].flatten(2)
    z_bpf = torch.where(corpus.keep_bp[..., None], sae.encode(x), 0)
    for f in features[:4]:
        assert f["frac_nonzero"] * corpus.n_tokens == pytest.approx(int((z_bpf[..., f["feature_index"]] > 0).sum()))


@pytest.mark.parametrize("hook", ["blocks.1.mlp.hook_out", "blocks.2.hook_resid_post", "model.layers.2"])
def test_gemma_3_as_sae_lens_loads_it_has_dashboards(hook, tmp_path):
    """The catalogue has SAEs on it, by TransformerLens's names, of which a plain transformers model knows none."""
    from sae_lens.load_model import HookedProxyLM
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    hf = Gemma3ForCausalLM(config).eval()
    model, sae = HookedProxyLM(hf, tiny_tokenizer()), random_sae(16, 24, hook)
    sae.cfg.metadata.model_name = "google/gemma-3-27b-it"
    corpus = g4.build_corpus(torch.randint(3, 2000, (10, 16)), model.tokenizer, context_size=16)
    found = build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    path = "model.layers.1.mlp" if "mlp" in hook else "model.layers.2"
    z_bpf = torch.where(corpus.keep_bp[..., None], sae.encode(model.run_with_cache(corpus.tokens_bp)[1][path]), 0)
    assert found.header["model_id"] == "gemma-3-27b-it"
    for f in found.features():
        assert f["frac_nonzero"] * corpus.n_tokens == pytest.approx(int((z_bpf[..., f["feature_index"]] > 0).sum()))
        assert len(f["pos_str"]) == 10


def test_another_model_than_the_release_s_is_warned_of_and_named(sae, tmp_path):
    model = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")
    corpus = g4.build_corpus("embedded:text", model.tokenizer, context_size=16, max_tokens=100)
    with pytest.warns(MismatchWarning, match="dashboards of another model, gemma-4-demo-it, than"):
        found = build_dashboards(sae, model, corpus, tmp_path / "d", progress=False)
    assert found.header["model_id"] == "gemma-4-demo-it"


def test_another_s_tokens_are_refused(sae, model, corpus, tmp_path):
    theirs = replace(corpus, origin=replace(corpus.origin, tokenizer="0123456789abcdef"))
    with pytest.raises(DataError, match="another tokenizer"):
        build_dashboards(sae, model, theirs, tmp_path / "d", progress=False)
    with pytest.raises(DataError, match="token id 2048"):
        build_dashboards(sae, model, torch.tensor([[2, 2048, 5]]), tmp_path / "d", progress=False)


def test_a_text_shorter_than_asked_for_is_warned_of(sae, model, tmp_path):
    with pytest.warns(ShortCorpusWarning, match="of 24,576 that were asked for"):
        found = build_dashboards(sae, model, ["One text.", "And one more."], tmp_path / "d", progress=False)
    assert found.settings["n_prompts_total"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = build_dashboards(
            sae, model, "embedded:text", tmp_path / "e", n_prompts=5, context_size=16, progress=False
        )
    assert found.settings["n_prompts_total"] == 5 and found.settings["n_tokens_in_prompt"] == 16


def test_an_sae_of_nobody_has_no_set_yet_and_takes_the_name_it_is_given(model, corpus, tmp_path):
    sae = random_sae(96, 8, HOOK)
    found = build_dashboards(sae, model, corpus, tmp_path / "a", progress=False)
    assert found.header == {"model_id": "gemma-4-demo", "layer": 3, "sae_set": "", "sae_id_suffix": None}
    found = build_dashboards(sae, model, corpus, tmp_path / "b", set_name="mine-res-8", progress=False)
    assert found.header["sae_set"] == "mine-res-8"
    with pytest.raises(ConfigError, match=r"refuses the set name 'My Set'.* 'my-set' would do"):
        build_dashboards(sae, model, corpus, tmp_path / "c", set_name="My Set", progress=False)


def test_weights_that_are_not_finite_are_named(model, corpus, tmp_path):
    sae = random_sae(96, 8, HOOK)
    sae.W_dec.data[5, 3] = torch.nan
    with pytest.raises(SAEError, match="W_dec of the SAE holds NaN"):
        build_dashboards(sae, model, corpus, tmp_path / "a", progress=False)
    sae.W_dec.data[5, 3] = torch.inf
    with pytest.raises(SAEError, match="decoder row of latent 5 is not finite"):
        build_dashboards(sae, model, corpus, tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


def test_logits_that_are_not_finite_name_the_latent(corpus, tmp_path):
    model = g4.load_model("gemma-4-demo", "Gemma4ProxyLM")
    model.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.detach().clone())
    model.model.lm_head.weight.data[7] = torch.inf
    with pytest.raises(DataError, match=r"Latent \d+ has logits that are not finite"):
        build_dashboards(random_sae(96, 8, HOOK), model, corpus, tmp_path / "a", progress=False)


def test_decoder_rows_that_neuronpedia_s_server_would_fold_are_warned_of(model, corpus, tmp_path):
    """Folded beforehand, activations are those that the server computes: multiplied by the rows' lengths."""
    sae = random_sae(96, 8, HOOK)
    norm_f = sae.W_dec.norm(dim=1).tolist()
    with pytest.warns(DecoderNormWarning, match="these dashboards do not"):
        plain = build_dashboards(sae, model, corpus, tmp_path / "a", progress=False)
    sae.fold_W_dec_norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = build_dashboards(sae, model, corpus, tmp_path / "b", progress=False)
    assert plain.latents["index"] == folded.latents["index"]
    for index, before, after in zip(plain.latents["index"], plain.latents["max"], folded.latents["max"], strict=True):
        assert after == pytest.approx(before * norm_f[index], rel=1e-3)


def test_no_folder_has_more_files_than_neuronpedia_s_import_lists():
    for d_sae, per_file in ((65_536, 128), (131_072, 132), (1_000_000, 1000)):
        writer = Writer.__new__(Writer)
        writer.sae = type("S", (), {"cfg": type("C", (), {"d_sae": d_sae})})
        assert writer.per_file == per_file and -(-d_sae // per_file) <= 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_strongest", 0), ("n_each", -1), ("cofiring_tokens", 0), ("seed", -1), ("n_strongest", 2.5)],
)
def test_settings_that_make_no_dashboard_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be an integer of at least"):
        DashboardSettings(**{name: value})


def test_small_activations_keep_their_digits():
    assert writing._rounded([0.012345, 0.0]) == [0.0123, 0.0]
    assert writing._rounded([123.45678]) == [123.457] and writing._rounded([]) == []
