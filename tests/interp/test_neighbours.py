import numpy as np
import pytest
import torch

from sae_lens_gemma4.interp import neighbours
from sae_lens_gemma4.interp.gathering import gather_firings
from sae_lens_gemma4.interp.neighbours import Cofiring, aligned_neurons, nearest_decoders, unit_rows
from tests.interp.conftest import HOOK
from tests.interp.plain import correlation


def test_nearest_decoders_are_those_of_greatest_cosine():
    W_gd = torch.randn(40, 6)
    W_gd[7] = 0
    W_gd[9] = -W_gd[3] * 5
    W_gd[11] = W_gd[3] * 2
    found = nearest_decoders(unit_rows(W_gd), 2, 12, 4)
    for latent in range(2, 12):
        cosines = [
            float(torch.nn.functional.cosine_similarity(W_gd[latent], W_gd[g], dim=0)) if g != latent else -2.0
            for g in range(40)
        ]
        expected = sorted(range(40), key=lambda g: -cosines[g])[:4]
        if latent != 7:
            assert found.index_fk[latent - 2].tolist() == expected
        assert found.value_fk[latent - 2].tolist() == pytest.approx([cosines[g] for g in expected], abs=1e-6)
    assert found.index_fk[1, 0] == 11 and 9 not in found.index_fk[1]


def test_there_are_no_more_neighbours_than_other_latents():
    assert nearest_decoders(unit_rows(torch.randn(3, 4)), 0, 3, 10).index_fk.shape == (3, 2)


def test_aligned_neurons_are_the_greatest_components_and_shares_of_l1():
    row = torch.tensor([[0.5, -3.0, 2.0, 0.25, 1.0], [0.0] * 5])
    found = aligned_neurons(row, 3)
    assert found.index_fk[0].tolist() == [2, 4, 0] and found.value_fk[0].tolist() == [2.0, 1.0, 0.5]
    assert found.share_fk[0].tolist() == pytest.approx([2 / 6.75, 1 / 6.75, 0.5 / 6.75])
    assert not found.share_fk[1].any()


@pytest.mark.parametrize("most_tokens", [10**6, 250])
def test_latents_that_fire_together_are_found_by_definition(sae, model, corpus, plain, tmp_path, most_tokens):
    firings = gather_firings(sae, model, HOOK, corpus, tmp_path, {"of": "this"}, progress=False)
    cofiring = Cofiring(firings, corpus, most_tokens)
    if most_tokens >= corpus.n_tokens:
        blocks = torch.arange(24)
    else:
        n = most_tokens * 24 // corpus.n_tokens
        blocks = torch.from_numpy(np.unique(np.linspace(0, 23, n).round().astype(int)))
        assert 150 < cofiring.n_tokens <= most_tokens + corpus.context_size
    z_tf = plain[1][blocks][corpus.keep_bp[blocks]]
    assert cofiring.n_tokens == len(z_tf)
    counts = (z_tf > 0).sum(dim=0)
    for latent in counts.topk(3).indices.tolist() + (counts == 2).nonzero()[:2, 0].tolist():
        together = ((z_tf[:, [latent]] > 0) & (z_tf > 0)).any(dim=0).nonzero()[:, 0].tolist()
        figures = {g: correlation(z_tf[:, latent], z_tf[:, g]) for g in together if g != latent}
        found = cofiring.correlated(latent, 5)
        best = sorted(figures.values(), reverse=True)[:5]
        assert found.pearson_k == pytest.approx([pearson for pearson, _ in best], abs=1e-5)
        for g, pearson, cosine in zip(*found, strict=True):
            assert (pearson, cosine) == pytest.approx(figures[g], abs=1e-5)


def test_an_sae_that_fires_everywhere_is_sampled_less(sae, model, corpus, plain, tmp_path, monkeypatch):
    firings = gather_firings(sae, model, HOOK, corpus, tmp_path, {"of": "this"}, progress=False)
    assert firings.n_activations == int((plain[1] > 0).sum())
    monkeypatch.setattr(neighbours, "MOST_ACTIVATIONS", firings.n_activations // 4)
    assert corpus.n_tokens / 8 < Cofiring(firings, corpus, 10**6).n_tokens < corpus.n_tokens / 3


def test_a_latent_that_fires_with_nobody_has_no_companions(sae, model, corpus, plain, tmp_path):
    firings = gather_firings(sae, model, HOOK, corpus, tmp_path, {"of": "this"}, progress=False)
    dead = int((plain[1].sum(dim=(0, 1)) == 0).nonzero()[0, 0])
    assert Cofiring(firings, corpus, 10**6).correlated(dead, 3) == ([], [], [])
