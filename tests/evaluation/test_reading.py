"""Chunks and sums of decoder rows against sae_lens's own `encode` and `decode`, for every architecture it has."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class

from sae_lens_gemma4.evaluation import reading
from sae_lens_gemma4.evaluation.reading import ActiveLatents, decodes_linearly, read, reconstruct

D_IN, D_SAE = 12, 64
SEQUENCES = {"temporal"}  # reads a token in its context
TOKENWISE = sorted(name for name in SAE_CLASS_REGISTRY if "transcoder" not in name and name not in SEQUENCES)
SETTINGS = {"topk": {"k": 5}, "abstopk": {"k": 5}}


def built(architecture, dtype="float32", sparsity=1.0, **settings):
    """An SAE with every parameter away from its start; the larger `sparsity`, the fewer latents are active."""
    cls, config = get_sae_class(architecture)
    sae = cls(config(d_in=D_IN, d_sae=D_SAE, dtype=dtype, **SETTINGS.get(architecture, {}), **settings))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
            if name == "threshold":
                p.copy_(p.abs() * sparsity)
            elif name in ("b_enc", "b_gate", "b_mag"):
                p.sub_(sparsity)
    return sae


def tokens(n=37):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2)) + 0.5


@pytest.fixture(params=[D_SAE, 5 * D_SAE, 2**25], ids=["token by token", "chunks of 5", "one chunk"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_LATENTS", request.param)


@torch.no_grad()
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("architecture", TOKENWISE)
def test_every_architecture_is_read_as_it_reads_itself(architecture):
    for sparsity in (0.0, 4.0):
        sae, x = built(architecture, sparsity=sparsity), tokens()
        acts = sae.encode(x)
        acts = acts.to_dense() if acts.is_sparse else acts
        readings = list(read(sae, x))
        assert torch.equal(torch.cat([r.x_td for r in readings]), x)
        torch.testing.assert_close(torch.cat([r.x_hat_td for r in readings]), sae.decode(acts), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reconstruct(sae, x), sae(x), rtol=1e-5, atol=1e-5)
        again, start = torch.zeros_like(acts), 0
        for r in readings:
            again[r.active.token_a + start, r.active.latent_a] = r.active.value_a
            start += len(r.x_td)
        torch.testing.assert_close(again, acts, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("architecture", TOKENWISE)
def test_nested_widths_are_decodings_of_the_first_latents(architecture):
    sae, x, widths = built(architecture), tokens(), [8, 9, D_SAE]
    readings = list(read(sae, x, widths))
    ours = torch.cat([r.x_hat_wtd for r in readings], dim=1)
    acts = sae.encode(x)
    acts = acts.to_dense() if acts.is_sparse else acts
    for width, x_hat in zip(widths, ours, strict=True):
        masked = acts.clone()
        masked[:, width:] = 0
        torch.testing.assert_close(x_hat, sae.decode(masked), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([r.x_hat_td for r in readings]), ours[-1])


@torch.no_grad()
@pytest.mark.parametrize(("sparsity", "some"), [(-1.0, True), (0.0, True), (100.0, False)])
def test_sums_of_rows_and_products_agree(sparsity, some, monkeypatch):
    sae, x = built("jumprelu", sparsity=sparsity), tokens()
    assert bool(sae.encode(x).any()) is some
    first = torch.where(torch.arange(D_SAE) < 9, sae.encode(x), 0)
    for below in (0.0, 2.0):  # never, always sums of rows
        monkeypatch.setattr(reading, "_SPARSE_BELOW", below)
        torch.testing.assert_close(reconstruct(sae, x), sae(x), rtol=1e-5, atol=1e-5)
        [one] = read(sae, x, [9])
        torch.testing.assert_close(one.x_hat_wtd, sae.decode(first)[None], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.x_hat_td, sae(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_what_normalises_in_use_normalises_here(normalize, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_LATENTS", 5 * D_SAE)
    sae, x = built("jumprelu", normalize_activations=normalize), tokens()
    assert not decodes_linearly(sae)
    torch.testing.assert_close(reconstruct(sae, x), sae(x), rtol=1e-5, atol=1e-5)
    nested = torch.cat([r.x_hat_wtd for r in read(sae, x, [8, D_SAE])], dim=1)
    for width, x_hat in zip((8, D_SAE), nested, strict=True):
        acts = sae.encode(x)
        acts[:, width:] = 0
        torch.testing.assert_close(x_hat, sae.decode(acts), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.usefixtures("chunked")
def test_hooks_on_reconstructions_and_latents_count():
    sae, x = built("jumprelu"), tokens()
    plain = sae(x)
    sae.hook_sae_recons.add_hook(lambda value, hook: value * 2)
    torch.testing.assert_close(reconstruct(sae, x), 2 * plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next(read(sae, x[:1], [D_SAE])).x_hat_wtd[0], 2 * plain[:1], rtol=1e-5, atol=1e-5)
    sae.reset_hooks()
    sae.hook_sae_acts_post.add_hook(lambda value, hook: value * 0)
    torch.testing.assert_close(reconstruct(sae, x), sae.b_dec.expand(len(x), -1))


@torch.no_grad()
def test_a_bf16_sae_reads_float32_activations_as_it_does_in_use():
    sae, x = built("jumprelu", dtype="bfloat16"), tokens()
    [one] = read(sae, x)
    assert one.x_td.dtype == torch.float32 and one.x_hat_td.dtype == torch.bfloat16
    exact = sae.encode(x).double() @ sae.W_dec.double() + sae.b_dec.double()
    assert (one.x_hat_td.double() - exact).norm() <= 1.5 * (sae(x).double() - exact).norm()


def test_active_latents_are_read_off_dense_and_sparse_alike():
    acts = torch.tensor([[0.0, 2, 0], [0, 0, 0], [-1, 0, 3]])
    for form in (acts, acts.to_sparse()):
        active = ActiveLatents.of(form)
        assert [part.tolist() for part in active] == [[0, 2, 2], [1, 0, 2], [2, -1, 3]]


def test_no_tokens_give_one_empty_reading():
    sae = built("standard")
    assert isinstance(sae, SAE) and reconstruct(sae, torch.zeros(0, D_IN)).shape == (0, D_IN)
