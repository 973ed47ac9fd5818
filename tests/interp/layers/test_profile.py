"""The profile against plain float64 loops over cached activations, and scikit-learn's cosines."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from sklearn.metrics.pairwise import cosine_similarity
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, DataError, ModelError
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.interp.layers import token_space
from sae_lens_gemma4.interp.layers.layer_sums import LayerSums
from sae_lens_gemma4.interp.layers.phases import find_phases
from sae_lens_gemma4.interp.layers.profile import profile_layers
from sae_lens_gemma4.interp.layers.token_space import TokenSpace, token_matrices
from sae_lens_gemma4.testing import tiny_gemma4, tiny_tokenizer

QUIET = {"progress": False}
LAYERS = range(6)


@pytest.fixture(scope="module")
def profile(model, corpus):
    return profile_layers(model, corpus, batch_blocks=5, nearest_tokens=10_000, keep_layer=3, **QUIET)


@pytest.fixture(scope="module")
def activations(model, corpus):
    """float64 `[t, d]` of each layer's output, one block a forward, tokens that count alone; and before the first."""
    names = ["hook_embed", *(f"blocks.{n}.hook_resid_post" for n in LAYERS)]
    rows = {name: [] for name in names}
    for tokens_p, keep_p in zip(corpus.tokens_bp, corpus.keep_bp, strict=True):
        _, cache = model.run_with_cache(tokens_p[None], names_filter=names, prepend_bos=False)
        for name in names:
            rows[name].append(cache[name][0][keep_p].double().numpy())
    return [np.concatenate(rows[name]) for name in names]


@pytest.fixture(scope="module")
def cosines(model, corpus, activations):
    """Of each token's activations at each hook with the whole vocabulary, by scikit-learn: `[l, t, v]`."""
    W_vd = model.model.get_input_embeddings().weight.detach().double().numpy()
    return [cosine_similarity(x_td, W_vd) for x_td in activations]


def test_cosines_and_recovery_are_those_of_plain_loops(profile, corpus, cosines):
    tokens = corpus.tokens_bp[corpus.keep_bp].numpy()
    assert [f.layer for f in profile.layers] == [None, *LAYERS] and profile.nearest_tokens == len(tokens)
    for figures, cosine_tv in zip(profile.layers, cosines, strict=True):
        assert figures.cosine == pytest.approx(cosine_tv[np.arange(len(tokens)), tokens].mean(), abs=1e-6)
        assert figures.nearest_cosine == pytest.approx(cosine_tv.max(axis=1).mean(), abs=1e-6)
        assert figures.recovered == pytest.approx((cosine_tv.argmax(axis=1) == tokens).mean(), abs=1e-12)
    assert profile.layers[0].recovered == 1.0 and profile.layers[0].cosine == pytest.approx(1.0, abs=1e-6)
    assert profile.layers[6].recovered < 0.5  # and the check above has something to tell apart


def test_norms_and_gamma_are_those_of_plain_loops(profile, activations):
    for figures, x_td in zip(profile.layers, activations, strict=True):
        norm_t = np.sqrt((x_td**2).sum(axis=1))
        assert figures.norm_mean == pytest.approx(norm_t.mean(), rel=1e-6)
        assert figures.norm_rms == pytest.approx(np.sqrt((norm_t**2).mean()), rel=1e-6)
        assert figures.norm_median == pytest.approx(np.median(norm_t), rel=1e-6)
        assert figures.mean_norm == pytest.approx(np.linalg.norm(x_td.mean(axis=0)), rel=1e-5)
        assert figures.gamma == pytest.approx(
            np.linalg.norm(x_td.mean(axis=0)) / np.linalg.norm(x_td.std(axis=0)), rel=1e-5
        )


def test_a_large_mean_leaves_the_spread_exact():
    x_td = torch.randn(3000, 16) + 3000  # γ is about 3000: squares of float32 would have nothing left of the spread
    sums = LayerSums(1, 1)
    for part_td in x_td.split(1100):
        sums.add(part_td, torch.nn.functional.normalize(torch.ones_like(part_td), dim=1))
        batch = SimpleNamespace(keep_bp=torch.ones(1, len(part_td), dtype=torch.bool))
        sums.close(torch.zeros(len(part_td), dtype=torch.int64), ["hook"], batch)
    x_td = x_td.double().numpy()
    expected = np.linalg.norm(x_td.mean(axis=0)) / np.linalg.norm(x_td.std(axis=0))
    assert sums.about_mean()[1][0] == pytest.approx(expected, rel=1e-4)


def test_each_place_of_the_corpus_has_its_cosine(profile, corpus, cosines):
    tokens = corpus.tokens_bp[corpus.keep_bp].numpy()
    keep = corpus.keep_bp.flatten().numpy()
    assert profile.cosine_by_place.dtype == np.float32 and profile.cosine_by_place.shape == keep.shape
    np.testing.assert_array_equal(np.isnan(profile.cosine_by_place), ~keep)
    own_t = cosines[4][np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(profile.cosine_by_place[keep], own_t, atol=1e-6)


def test_intervals_draw_documents(model):
    """By hand: means weighted by document, on the draws of `Sampling`, at layer 2; documents differ in length."""
    text = text_of(2048)
    text.keep_bp[3, 4:] = False
    found = profile_layers(model, text, **QUIET)
    _, cache = model.run_with_cache(text.tokens_bp, names_filter=["blocks.2.hook_resid_post"], prepend_bos=False)
    W_vd = model.model.get_input_embeddings().weight.detach().numpy()
    tokens, document_t = text.tokens_bp[text.keep_bp].numpy(), text.document_bp[text.keep_bp].numpy()
    cosine_tv = cosine_similarity(cache["blocks.2.hook_resid_post"][text.keep_bp].detach().double().numpy(), W_vd)
    sampling = Sampling()
    for name, value_t in {
        "cosine": cosine_tv[np.arange(len(tokens)), tokens],
        "recovered": (cosine_tv.argmax(axis=1) == tokens).astype(float),
    }.items():
        weights_rt = sampling.weights(10).numpy()[:, document_t]
        draws_r = torch.from_numpy((weights_rt * value_t).sum(axis=1) / weights_rt.sum(axis=1))
        expected = sampling.interval(float(value_t.mean()), draws_r)
        # one draw takes every document once: whether it ties with the value, or misses by rounding, moves an end a bit
        assert getattr(found.layers[3], name).interval == pytest.approx(expected, abs=2e-4)
        assert expected[1] - expected[0] > 0.01
    assert profile_layers(model, text, sampling=Sampling(0), **QUIET).layers[3].cosine.interval is None


def test_phases_are_those_of_the_layers_curve(profile):
    curve = [float(f.cosine) for f in profile.layers[1:]]
    assert profile.phases.bic_k == find_phases(np.array(curve), shuffles=0).bic_k
    assert profile.phases.phases[-1].last == 5


def test_drawn_tokens_are_spread_seeded_and_as_many_as_asked(model, corpus):
    runs = [profile_layers(model, corpus, nearest_tokens=50, seed=s, **QUIET).to_dict() for s in (1, 1, 2)]
    assert runs[0] == runs[1] and runs[0]["layers"]["recovered"] != runs[2]["layers"]["recovered"]
    assert runs[0]["nearest_tokens"] == 50 and runs[0]["seed"] == 1
    assert runs[0]["layers"]["cosine"] == runs[2]["layers"]["cosine"]  # of all tokens
    none = profile_layers(model, corpus, nearest_tokens=0, **QUIET)
    assert none.layers[2].recovered is None and none.layers[2].norm_median is None and none.cosine_by_place is None
    assert none.layers[2].cosine == runs[0]["layers"]["cosine"][2]


def test_batches_and_parts_of_the_vocabulary_change_nothing(model, corpus, profile, monkeypatch):
    monkeypatch.setattr(token_space, "_VOCABULARY", 300)
    monkeypatch.setattr(token_space, "_ROWS", 70)
    monkeypatch.setattr(token_space, "_HELD", 7 * 96 * 90)
    other = profile_layers(model, corpus, batch_blocks=2, nearest_tokens=10_000, **QUIET)
    for ours, theirs in zip(profile.layers, other.layers, strict=True):
        for name in ("cosine", "nearest_cosine", "recovered", "norm_mean", "gamma"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5)


def test_the_record_is_plain_data(profile, corpus):
    record = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
    assert (record["schema"], record["kind"], record["tied"]) == (1, "layer_profile", True)
    assert {len(values) for values in record["layers"].values()} == {7}
    assert record["corpus"] == json.loads(json.dumps(corpus.facts())) and record["model"]["name"] == "gemma-4-demo"
    assert record["layers"]["unembedding_recovered"] == [None] * 7
    assert len(record["model"]["fingerprint"]) == 16 and "2510.15511" in record["definitions"]["sipit"]
    low, high = record["layers"]["cosine_interval"][3] or (-1, 1)
    assert low <= record["layers"]["cosine"][3] <= high


def text_of(vocabulary, n_blocks=10, context=12):
    tokens_bp = torch.randint(30, vocabulary, (n_blocks, context), generator=torch.Generator().manual_seed(0))
    document_bp = torch.arange(n_blocks)[:, None].expand_as(tokens_bp).clone()
    keep_bp = torch.ones_like(tokens_bp, dtype=torch.bool)
    keep_bp[:, 0] = False
    return Corpus(tokens_bp, keep_bp, document_bp, "random")


@pytest.mark.parametrize("variant", ["ple_multimodal", "moe"])
def test_every_class_that_hooks_the_model_gives_the_same(variant):
    """Both classes of this package, and sae_lens's own proxy by module paths where it can."""
    hf, text = tiny_gemma4(variant), text_of(2048)
    hooked = [g4.Gemma4ProxyLM(hf, tiny_tokenizer()), g4.Gemma4Bridge.boot(tiny_gemma4(variant), tiny_tokenizer())]
    hooked.append(HookedProxyLM(hf, tiny_tokenizer()))
    profiles = [profile_layers(model, text, sampling=Sampling(0), **QUIET) for model in hooked]
    for other in profiles[1:]:
        for ours, theirs in zip(profiles[0].layers, other.layers, strict=True):
            assert ours.cosine == pytest.approx(theirs.cosine, abs=1e-4)
            assert ours.recovered == pytest.approx(theirs.recovered, abs=0.02)
    assert all(p.tied and p.layers[0].recovered == 1.0 for p in profiles)


def test_an_untied_unembedding_is_compared_where_asked():
    hf = tiny_gemma4("moe")
    hf.lm_head.weight = torch.nn.Parameter(torch.randn(2048, 64, generator=torch.Generator().manual_seed(1)))
    model, text = g4.Gemma4ProxyLM(hf, tiny_tokenizer()), text_of(2048)
    plain = profile_layers(model, text, **QUIET)
    asked = profile_layers(model, text, unembedding=True, **QUIET)
    assert plain.tied is False and plain.layers[3].unembedding_cosine is None
    _, cache = model.run_with_cache(text.tokens_bp, names_filter=["blocks.2.hook_resid_post"], prepend_bos=False)
    x_td = cache["blocks.2.hook_resid_post"][text.keep_bp].detach().numpy()
    tokens = text.tokens_bp[text.keep_bp].numpy()
    cosine_tv = cosine_similarity(x_td, hf.lm_head.weight.detach().numpy())
    figures = asked.layers[3]
    assert figures.unembedding_cosine == pytest.approx(cosine_tv[np.arange(len(tokens)), tokens].mean(), abs=1e-5)
    assert figures.unembedding_nearest_cosine == pytest.approx(cosine_tv.max(axis=1).mean(), abs=1e-5)
    assert figures.unembedding_recovered == pytest.approx((cosine_tv.argmax(axis=1) == tokens).mean())
    assert figures.nearest_cosine == plain.layers[3].nearest_cosine


def test_a_hooked_transformer_has_its_embeddings_elsewhere():
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=12,
        d_head=8,
        d_vocab=100,
        act_fn="gelu",
        seed=0,
        positional_embedding_type="rotary",
    )
    model, text = HookedTransformer(config), text_of(100)
    found = profile_layers(model, text, **QUIET)
    assert found.layers[0].recovered == 1.0 and found.tied is False and len(found.layers) == 3
    with torch.no_grad():
        _, cache = model.run_with_cache(text.tokens_bp, prepend_bos=False)
    x_td = cache["blocks.1.hook_resid_post"][text.keep_bp].numpy()
    own_td = model.W_E.detach()[text.tokens_bp[text.keep_bp]].numpy()
    by_hand = (x_td * own_td).sum(1) / np.linalg.norm(x_td, axis=1) / np.linalg.norm(own_td, axis=1)
    assert found.layers[2].cosine == pytest.approx(by_hand.mean(), abs=1e-6)


def test_rows_of_zeros_are_nobody_s_nearest_and_twins_are_both():
    W_vd = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, -1.0]])
    space = TokenSpace(W_vd)
    x_rd = torch.nn.functional.normalize(torch.tensor([[3.0, 0.0], [-1.0, 1.0]]), dim=1)
    assert space.nearest(x_rd).tolist() == pytest.approx([1.0, -(0.5**0.5)])  # not 0, which the zeros would give
    assert space.rows(torch.tensor([0, 2])).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("near", [0.0, 0.3, 0.9])
def test_candidates_of_sixteen_bits_hold_the_nearest(dtype, near, monkeypatch):
    """Against float64, of rows that have nothing to do with the vocabulary, and of such as are near to a token."""
    monkeypatch.setattr(token_space, "_VOCABULARY", 700)
    monkeypatch.setattr(token_space, "_ROWS", 90)
    monkeypatch.setattr(token_space, "_RECHECKED", 32)
    generator = torch.Generator().manual_seed(1)
    W_vd = torch.randn(3000, 256, generator=generator).to(dtype)
    W_vd[[0, 5, 2999]] = 0
    W_vd[700:1400] = 0  # a whole part
    x_rd = torch.nn.functional.normalize(torch.randn(200, 256, generator=generator), dim=1)
    own_rd = torch.nn.functional.normalize(W_vd[1500:1700].float(), dim=1)
    x_rd = torch.nn.functional.normalize(near * own_rd + (1 - near) * x_rd, dim=1)
    space, plain = TokenSpace(W_vd, candidates=True), TokenSpace(W_vd)
    assert space.candidates and not plain.candidates  # on the CPU
    nonzero = W_vd.any(dim=1).numpy()
    cosine_rv = cosine_similarity(x_rd.double().numpy(), W_vd.double().numpy()[nonzero])
    np.testing.assert_allclose(space.nearest(x_rd), cosine_rv.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(space.nearest(x_rd), plain.nearest(x_rd), atol=1e-6)
    # and the product of 16 bits by itself would not do
    halves = (x_rd.to(dtype) @ torch.nn.functional.normalize(W_vd.float(), dim=1).to(dtype).T).float().amax(dim=1)
    assert np.abs(halves - cosine_rv.max(axis=1)).max() > 1e-5


def test_candidates_are_few_and_none_of_an_empty_vocabulary():
    rows_rd = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    assert TokenSpace(torch.zeros(4, 8), candidates=True).nearest(rows_rd).tolist() == [-np.inf] * 5
    W_vd = torch.randn(3, 8)
    few = TokenSpace(W_vd, candidates=True).nearest(rows_rd)
    np.testing.assert_allclose(few, cosine_similarity(rows_rd.numpy(), W_vd.numpy()).max(axis=1), atol=1e-6)


def test_a_profile_by_candidates_is_that_by_whole_products(monkeypatch):
    model, text = g4.Gemma4ProxyLM(tiny_gemma4("moe").to(torch.bfloat16), tiny_tokenizer()), text_of(2048)
    whole = profile_layers(model, text, **QUIET).to_dict()["layers"]
    real, made = TokenSpace.__init__, []

    def forced(self, weight_vd, candidates=None):
        real(self, weight_vd, True)
        made.append(self)

    monkeypatch.setattr(TokenSpace, "__init__", forced)
    found = profile_layers(model, text, **QUIET).to_dict()["layers"]
    assert made and made[0].candidates
    assert found["nearest_cosine"] == pytest.approx(whole["nearest_cosine"], abs=1e-6)
    assert found["recovered"] == whole["recovered"] and found["recovered"][0] == 1.0 > found["recovered"][-1]


def test_bfloat16_is_profiled_in_float32():
    models = [
        g4.Gemma4ProxyLM(tiny_gemma4("moe").to(dtype), tiny_tokenizer()) for dtype in (torch.bfloat16, torch.float32)
    ]
    half, full = (profile_layers(model, text_of(2048), **QUIET) for model in models)
    assert half.layers[0].cosine == pytest.approx(1, abs=1e-4) and half.layers[0].recovered == 1.0
    assert half.layers[2].cosine == pytest.approx(full.layers[2].cosine, abs=0.02)


def test_the_forward_stops_before_the_unembedding(monkeypatch):
    hf = tiny_gemma4("ple")
    monkeypatch.setattr(hf.lm_head, "forward", lambda *_: pytest.fail("the unembedding ran"))
    assert profile_layers(g4.Gemma4ProxyLM(hf, tiny_tokenizer()), text_of(2048), **QUIET).layers[0].recovered == 1.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_blocks": 0}, "batch_blocks must be at least 1"),
        ({"nearest_tokens": -1}, "not negative, unlike 4, -1 and 0"),
        ({"seed": -1}, "not negative"),
        ({"keep_layer": 6}, r"layers 0\.\.5, not 6"),
        ({"keep_layer": -1}, r"layers 0\.\.5, not -1"),
    ],
)
def test_settings_that_cannot_be_used_are_named(model, corpus, settings, match):
    with pytest.raises(ConfigError, match=match):
        profile_layers(model, corpus, **settings, **QUIET)


def test_activations_that_are_not_finite_are_named():
    hf = tiny_gemma4("ple")
    with torch.no_grad():
        hf.model.layers[2].layer_scalar.fill_(torch.nan)
    with pytest.raises(DataError, match=r"blocks\.2\.hook_resid_post are not finite, first in document 0 of 'random'"):
        profile_layers(g4.Gemma4ProxyLM(hf, tiny_tokenizer()), text_of(2048), **QUIET)


def test_a_model_whose_embeddings_cannot_be_found_is_named():
    with pytest.raises(ModelError, match=r"token embeddings of this SimpleNamespace cannot be found"):
        token_matrices(SimpleNamespace())
