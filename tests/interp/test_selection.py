import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from sae_lens_gemma4.activations.corpus import Corpus
from sae_lens_gemma4.errors import ConfigError, DataError, UnknownNameError
from sae_lens_gemma4.evaluation.reading import ActiveLatents
from sae_lens_gemma4.interp.firings import Firings
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.interp.selection import BANDS, Selection, select_latents
from sae_lens_gemma4.mapping import from_mapping
from tests.interp.conftest import HOOK

SIZE, N_BLOCKS, D_SAE = 8, 40, 30


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dense activations of latents from never to always firing, and what a pass would have left of them."""
    rng = np.random.default_rng(0)
    tokens_bp = torch.from_numpy(rng.integers(1, 50, size=(N_BLOCKS, SIZE)))
    keep_bp = torch.from_numpy(rng.random((N_BLOCKS, SIZE)) > 0.1)
    corpus = Corpus(tokens_bp, keep_bp, torch.arange(N_BLOCKS)[:, None].expand(-1, SIZE).contiguous(), "made")
    share_f = np.concatenate([[0, 1], np.geomspace(0.01, 0.5, D_SAE - 2)])
    z_tf = rng.gamma(2, size=(N_BLOCKS * SIZE, D_SAE)) * (rng.random((N_BLOCKS * SIZE, D_SAE)) < share_f)
    z_tf = torch.from_numpy(z_tf).float() * keep_bp.flatten()[:, None]
    z_tf[:, 20] = z_tf[:, 19]  # equals
    firings = Firings(tmp_path_factory.mktemp("firings"), D_SAE, SIZE, {})
    token_a, latent_a = z_tf.nonzero().unbind(dim=1)
    firings.append(ActiveLatents(token_a, latent_a, z_tf[token_a, latent_a]), N_BLOCKS, {})
    cosine_n = rng.uniform(-0.1, 0.9, size=N_BLOCKS * SIZE).astype(np.float32)
    cosine_n[rng.random(len(cosine_n)) < 0.2] = np.nan
    return corpus, firings, z_tf.numpy(), cosine_n


def candidates(made, least, most):
    corpus, _, z_tf, _ = made
    count_f = (z_tf > 0).sum(axis=0)
    return [f for f in range(D_SAE) if count_f[f] >= least and count_f[f] <= most * corpus.n_tokens]


def place_in(values, value):
    """Its rank from below; equals share the mean of theirs."""
    below, equal = sum(v < value for v in values), sum(v == value for v in values)
    return below + (equal + 1) / 2


def test_divergence_by_plain_loops(made):
    corpus, firings, z_tf, cosine_n = made
    keep_n = corpus.keep_bp.flatten().numpy()
    usual = np.mean([float(c) for c, keep in zip(cosine_n, keep_n, strict=True) if keep and not math.isnan(c)])
    divergence, active = {}, {}
    for f in candidates(made, 5, 0.4):
        above = below = total = 0.0
        n = 0
        for z, c in zip(z_tf[:, f].tolist(), cosine_n.tolist(), strict=True):
            n, total = n + (z > 0), total + z
            if z > 0 and not math.isnan(c):
                above, below = above + z * (usual - c), below + z
        divergence[f], active[f] = above / below, total / n * math.log(1 + n)
    m = len(divergence)
    assert m > 12
    score = {
        f: (place_in(divergence.values(), divergence[f]) + place_in(active.values(), active[f])) / (2 * m)
        for f in divergence
    }
    asked = Selection(rule="divergence", n=12, min_firings=5, max_density=0.4)
    found = select_latents(firings, corpus, asked, cosine_by_place=cosine_n)
    assert found.indices == sorted(score, key=lambda f: (-score[f], f))[:12]
    assert score[19] == score[20]
    for row in found.facts["by_latent"]:
        f = row["index"]
        assert found.score_by_index[f] == pytest.approx(score[f])
        assert row["divergence"] == pytest.approx(divergence[f]) and row["activity"] == pytest.approx(active[f])
        assert row["firings"] == (z_tf[:, f] > 0).sum()
    assert found.facts["left"]["candidates"] == m and found.facts["taken"] == 12


def test_latents_that_fire_far_from_token_space_are_found(made):
    """Planted: the cosine is low where latent 12 fires."""
    corpus, firings, z_tf, _ = made
    cosine_n = np.where(z_tf[:, 12] > 0, 0.1, 0.8) + np.random.default_rng(1).normal(0, 0.01, len(z_tf))
    asked = Selection(rule="divergence", n=50, min_firings=5, max_density=0.4)
    rows = select_latents(firings, corpus, asked, cosine_by_place=cosine_n).facts["by_latent"]
    assert max(rows, key=lambda row: row["divergence"])["index"] == 12


def test_equals_are_taken_by_their_index(made):
    corpus, firings, _, _ = made
    scores = {f: 1.0 if f % 2 else -1.0 for f in range(D_SAE)}
    asked = Selection(rule="contrast", n=6, min_firings=5, max_density=0.4)
    assert select_latents(firings, corpus, asked, scores=scores).indices == candidates(made, 5, 0.4)[:6]


@pytest.mark.parametrize("as_array", [False, True])
def test_contrast_takes_the_largest_absolute_scores(made, as_array):
    corpus, firings, _, _ = made
    score_f = np.random.default_rng(3).normal(size=D_SAE)
    score_f[7] = np.nan
    score_f[15] = -np.inf
    given = score_f if as_array else {f: score_f[f] for f in range(D_SAE) if f not in (7, 9)}
    left = [f for f in candidates(made, 5, 0.4) if f != 7 and (as_array or f != 9)]
    asked = Selection(rule="contrast", n=8, min_firings=5, max_density=0.4)
    found = select_latents(firings, corpus, asked, scores=given)
    assert found.indices == sorted(left, key=lambda f: -abs(score_f[f]))[:8]
    assert found.indices[0] == 15 and found.to_dict()["scores"][0] is None
    assert all(found.score_by_index[f] == score_f[f] for f in found.indices)
    assert found.facts["left"]["candidates"] == len(left)


def test_density_draws_from_each_band_alike(made):
    corpus, firings, z_tf, _ = made
    left = candidates(made, 2, 0.6)
    log_m = np.log10((z_tf[:, left] > 0).sum(axis=0) / corpus.n_tokens)
    width = (log_m.max() - log_m.min()) / BANDS
    band = {f: min(int((x - log_m.min()) / width), BANDS - 1) for f, x in zip(left, log_m, strict=True)}
    sizes = Counter(band.values())
    asked = Selection(rule="density", n=12, min_firings=2, max_density=0.6)
    found = select_latents(firings, corpus, asked)
    assert found.indices == sorted(set(found.indices)) and len(found.indices) == 12
    taken = Counter(band[f] for f in found.indices)
    most = max(taken.values())
    assert all(taken[b] >= min(size, most - 1) for b, size in sizes.items())  # one more round at most
    reported = found.facts["log10_density_bands"]
    assert [b["candidates"] for b in reported] == [sizes[b] for b in range(BANDS)]
    assert [b["taken"] for b in reported] == [taken[b] for b in range(BANDS)]
    for f in found.indices:
        assert found.score_by_index[f] == pytest.approx(math.log10((z_tf[:, f] > 0).sum() / corpus.n_tokens))


def test_the_seed_decides_what_density_draws(made):
    corpus, firings, _, _ = made
    draws = [
        tuple(select_latents(firings, corpus, Selection(n=8, seed=seed, min_firings=2, max_density=0.6)).indices)
        for seed in (0, 0, 1, 2, 3)
    ]
    assert draws[0] == draws[1] and len(set(draws)) > 1


def test_all_takes_every_candidate_and_given_takes_what_it_is_given(made):
    corpus, firings, z_tf, _ = made
    asked = Selection(rule="all", n=1, min_firings=5, max_density=0.4)
    found = select_latents(firings, corpus, asked)
    assert found.indices == candidates(made, 5, 0.4) and found.score_by_index == {}
    found = select_latents(firings, corpus, Selection(rule="given", latents=[9, 0, 1]))
    assert found.indices == [9, 0, 1] and found.facts["fire"] == 2
    assert [row["firings"] for row in found.facts["by_latent"]] == [int((z_tf[:, f] > 0).sum()) for f in (9, 0, 1)]


def test_more_than_there_are_is_all_of_them(made):
    corpus, firings, _, _ = made
    found = select_latents(firings, corpus, Selection(n=500, min_firings=5, max_density=0.4))
    assert found.indices == candidates(made, 5, 0.4)
    assert found.facts["settings"]["n"] == 500 and found.facts["taken"] == len(found.indices)


@pytest.mark.parametrize("rule", ["divergence", "density", "contrast", "all", "given"])
def test_what_was_selected_is_plain_data(made, rule):
    corpus, firings, _, cosine_n = made
    asked = Selection(rule=rule, n=3, min_firings=5, max_density=0.4, latents=[4, 2] if rule == "given" else None)
    found = select_latents(firings, corpus, asked, cosine_by_place=cosine_n, scores=np.arange(D_SAE) / 7)
    data = found.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["schema"], data["kind"], data["rule"]) == (1, "selection", rule)
    assert len(data["scores"]) == len(data["indices"]) == len(data["facts"]["by_latent"])
    assert data["facts"]["settings"]["seed"] == 0


def test_what_cannot_be_selected_is_named(made):
    corpus, firings, _, cosine_n = made
    with pytest.raises(ConfigError, match="keep_layer"):
        select_latents(firings, corpus, Selection(rule="divergence"))
    with pytest.raises(ConfigError, match="needs a score of each latent"):
        select_latents(firings, corpus, Selection(rule="contrast"))
    with pytest.raises(ConfigError, match="no latent 30"):
        select_latents(firings, corpus, Selection(rule="given", latents=[30]))
    with pytest.raises(ConfigError, match="no latent 31"):
        select_latents(firings, corpus, Selection(rule="contrast"), scores={31: 1.0})
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        select_latents(firings, corpus, Selection(rule="contrast"), scores=np.zeros(3))
    with pytest.raises(DataError, match=r"shape \(5,\)"):
        select_latents(firings, corpus, Selection(rule="divergence"), cosine_by_place=cosine_n[:5])
    with pytest.raises(DataError, match="No cosine was measured"):
        select_latents(firings, corpus, Selection(rule="divergence"), cosine_by_place=cosine_n * np.nan)
    with pytest.raises(DataError, match="infinite"):
        select_latents(firings, corpus, Selection(rule="divergence"), cosine_by_place=cosine_n * np.inf)
    n = corpus.n_tokens
    with pytest.raises(DataError, match=rf"Of 30, 29 fire on the {n} tokens read; 1 of these on {n - 9} or more; 0 "):
        select_latents(firings, corpus, Selection(min_firings=n - 9))
    with pytest.raises(DataError, match="0 of these have a score"):
        select_latents(firings, corpus, Selection(rule="contrast", min_firings=5), scores={0: 3.0})


@pytest.mark.parametrize(
    ("setting", "error", "match"),
    [
        ({"rule": "densty"}, UnknownNameError, "density"),
        ({"n": 0}, ConfigError, "n must be an integer of at least 1"),
        ({"min_firings": 0}, ConfigError, "min_firings"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"max_density": 0.0}, ConfigError, "max_density"),
        ({"max_density": float("nan")}, ConfigError, "max_density"),
        ({"rule": "given"}, ConfigError, "needs latents"),
        ({"rule": "given", "latents": []}, ConfigError, "needs latents"),
        ({"latents": [1]}, ConfigError, "takes no latents"),
    ],
)
def test_settings_that_select_nothing_are_refused(setting, error, match):
    with pytest.raises(error, match=match):
        Selection(**setting)


def test_settings_are_read_from_a_recipe():
    found = from_mapping(Selection, {"rule": "given", "latents": [3, 1]}, "select")
    assert found.latents == [3, 1]


def test_on_the_embedded_model(sae, model, corpus, plain, tmp_path):
    firings = gather_firings(sae, model, HOOK, corpus, tmp_path, {}, batch_blocks=8, progress=False)
    x_bpd, z_bpf = plain
    embedding_vd = model.model.get_input_embeddings().weight.detach()
    cosine_n = torch.nn.functional.cosine_similarity(x_bpd, embedding_vd[corpus.tokens_bp], dim=-1).flatten().numpy()
    asked = Selection(rule="divergence", n=10, min_firings=5, max_density=0.3)
    found = select_latents(firings, corpus, asked, cosine_by_place=cosine_n)
    assert len(found.indices) == 10
    count_f = (z_bpf > 0).sum(dim=(0, 1))
    usual = cosine_n[corpus.keep_bp.flatten()].mean()
    expected = []
    for row in found.facts["by_latent"]:
        assert abs(row["firings"] - int(count_f[row["index"]])) <= 1  # on the threshold
        z_n = z_bpf[..., row["index"]].flatten().numpy()
        expected.append(float((z_n * (usual - cosine_n)).sum() / z_n.sum()))
    np.testing.assert_allclose([row["divergence"] for row in found.facts["by_latent"]], expected, atol=2e-3)
    assert spearmanr(expected, [row["divergence"] for row in found.facts["by_latent"]]).statistic > 0.98
