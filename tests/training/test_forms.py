"""The SAEs trained here against sae_lens's, and against the formulas written out."""

import copy

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

from sae_lens_gemma4.errors import ConfigError, SAEError, UnknownNameError
from sae_lens_gemma4.training.forms import FORMS, SETTLED, new_training_sae, settle_threshold, unit_decoder, with_k_aux
from tests.support import D_IN, D_SAE, trained

CLASSES = [MatryoshkaBatchTopKTrainingSAE, BatchTopKTrainingSAE, TopKTrainingSAE]
JUMPRELU = {"l0_coefficient": 1.0, "jumprelu_bandwidth": 0.1}


def ours_of(stock):
    sae = FORMS[stock.cfg.architecture()](copy.deepcopy(stock.cfg))
    sae.load_state_dict(stock.state_dict())
    settle_threshold(sae)
    return sae


def step(sae, x, dead):
    sae.zero_grad()
    output = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    output.loss.backward()
    return output, {name: p.grad for name, p in sae.named_parameters()}


@pytest.fixture
def x():
    return torch.randn(48, D_IN)


@pytest.fixture
def dead():
    return torch.arange(D_SAE) % 3 == 0


def variants():
    for cls in CLASSES:
        for rescale in (True, False):
            for per_width in (False, True)[: 1 + (cls is MatryoshkaBatchTopKTrainingSAE)]:
                settings = {"use_matryoshka_aux_loss": True} if per_width else {}
                yield pytest.param(cls, rescale, settings, id=f"{cls.__name__}-{rescale}-{per_width}")


@pytest.mark.parametrize(("cls", "rescale", "settings"), variants())
def test_without_k_aux_and_settled_steps_are_stock_s(x, dead, cls, rescale, settings):
    stock = trained(cls, rescale, **settings)
    ours = ours_of(stock)
    for _ in range(3):
        a, a_grads = step(stock, x, dead)
        b, b_grads = step(ours, x, dead)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.sae_out, b.sae_out)
        torch.testing.assert_close(a.feature_acts, b.feature_acts.to_dense())
        for name, grad in a_grads.items():
            assert float((b_grads[name] - grad).norm()) <= 1e-6 * float(grad.norm()), name
        if cls is not TopKTrainingSAE:
            torch.testing.assert_close(stock.topk_threshold, ours.topk_threshold, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("cls", "rescale", "settings"), variants())
def test_k_aux_of_half_of_d_in_is_what_stock_has(x, dead, cls, rescale, settings):
    stock = trained(cls, rescale, **settings)
    a, a_grads = step(stock, x, dead)
    b, b_grads = step(with_k_aux(ours_of(stock), D_IN // 2), x, dead)
    torch.testing.assert_close(a.losses, b.losses)
    torch.testing.assert_close(a_grads, b_grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k_aux", [1, 3, 20])
@pytest.mark.parametrize("cls", [BatchTopKTrainingSAE, TopKTrainingSAE])
def test_the_auxiliary_loss_written_out(x, dead, cls, k_aux):
    sae = with_k_aux(ours_of(trained(cls, aux_loss_coefficient=0.25)), k_aux)
    output, _ = step(sae, x, dead)
    n_dead, W_dec = int(dead.sum()), sae.W_dec.detach()
    total = 0.0
    for x_d, out_d in zip(x, output.sae_out.detach(), strict=True):
        pre = ((x_d - sae.b_dec) @ sae.W_enc + sae.b_enc).detach() * W_dec.norm(dim=1)
        told = sum(
            pre[i] * W_dec[i] / W_dec[i].norm()
            for i in sorted((i for i in range(D_SAE) if dead[i]), key=lambda i: -pre[i])[:k_aux]
        )
        total += float((told - (x_d - out_d)).square().sum())
    expected = 0.25 * min(1, n_dead / k_aux) * total / len(x)
    assert float(output.losses["auxiliary_reconstruction_loss"]) == pytest.approx(expected, rel=1e-4)


def test_the_auxiliary_loss_of_each_width_is_that_of_an_sae_cut_there(x, dead):
    sae = with_k_aux(ours_of(trained(use_matryoshka_aux_loss=True, rescale=False)), 3)
    output, _ = step(sae, x, dead)
    acts, hidden_pre = output.feature_acts.to_dense(), sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    expected = 0.0
    for start, width in ((0, 8), (8, 32)):
        out = acts[:, :width] @ sae.W_dec[:width] + sae.b_dec
        pre = hidden_pre[:, start:width].masked_fill(~dead[start:width], -torch.inf)
        kept = min(3, int(dead[start:width].sum()))
        top = pre.topk(kept)
        told = torch.einsum("nk,nkd->nd", top.values, sae.W_dec[start:width][top.indices])
        expected += min(1, int(dead[start:width].sum()) / 3) * float((told - (x - out)).square().sum(1).mean())
    assert float(output.losses["auxiliary_reconstruction_loss"]) == pytest.approx(expected, rel=1e-4)


def test_without_dead_latents_there_is_no_auxiliary_loss(x):
    sae = with_k_aux(ours_of(trained(TopKTrainingSAE)), 3)
    for mask in (None, torch.zeros(D_SAE, dtype=torch.bool)):
        assert float(step(sae, x, mask)[0].losses["auxiliary_reconstruction_loss"]) == 0


@pytest.mark.parametrize("cls", [MatryoshkaBatchTopKTrainingSAE, BatchTopKTrainingSAE])
def test_a_new_threshold_is_the_weighted_mean_of_what_was_seen(cls):
    stock = trained(cls, threshold=0.0, topk_threshold_lr=0.1)
    sae = ours_of(stock)
    sae.threshold_updates.zero_()
    seen = [3.0, 1.0, 2.0, 5.0]
    for value in seen:
        acts = torch.tensor([[value, 0.0, value + 1]])
        stock.update_topk_threshold(acts)
        sae.update_topk_threshold(acts)
    weights = [0.1 * 0.9 ** (len(seen) - 1 - i) for i in range(len(seen))]
    mean = sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)
    assert float(sae.topk_threshold) == pytest.approx(mean, rel=1e-12)
    assert float(stock.topk_threshold) == pytest.approx(mean * (1 - 0.9**4), rel=1e-12)
    assert sae.topk_threshold.dtype == torch.float64


def test_a_step_without_activations_does_not_count():
    sae = new_training_sae("batchtopk", D_IN, D_SAE, settings={"k": 4}, seed=0)
    sae.update_topk_threshold(torch.zeros(2, D_SAE))
    assert (sae.threshold_updates, float(sae.topk_threshold)) == (0, 0.0)
    sae.update_topk_threshold(torch.tensor([[0.0, 2.5]]))
    assert (sae.threshold_updates, float(sae.topk_threshold)) == (1, pytest.approx(2.5))


@pytest.mark.parametrize("cls", CLASSES)
def test_saved_folders_are_stock_s(tmp_path, cls):
    stock = trained(cls)
    for write in ("save_inference_model", "save_model"):
        for sae, name in ((stock, "stock"), (with_k_aux(ours_of(stock), 3), "ours")):
            getattr(sae, write)(tmp_path / write / name)
        for file in ("cfg.json", "sae_weights.safetensors"):
            assert (tmp_path / write / "ours" / file).read_bytes() == (tmp_path / write / "stock" / file).read_bytes()


SETTINGS = {
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [8, 32]},
    "batchtopk": {"k": 4, "decoder_init_norm": 0.3},
    "topk": {"k": 4, "apply_b_dec_to_input": False},
    "jumprelu": JUMPRELU,
}


@pytest.mark.parametrize("architecture", FORMS)
def test_a_new_sae_has_stock_s_weights_of_its_seed_and_touches_no_other_generator(architecture):
    before = torch.random.get_rng_state()
    sae = new_training_sae(architecture, D_IN, D_SAE, settings=SETTINGS[architecture], seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert getattr(sae, "threshold_updates", 0) == 0
    torch.manual_seed(7)
    stock = get_sae_training_class(architecture)[0](copy.deepcopy(sae.cfg))
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), stock.state_dict().values(), strict=True))
    other = new_training_sae(architecture, D_IN, D_SAE, settings=SETTINGS[architecture], seed=8)
    assert not torch.equal(sae.W_dec, other.W_dec)


def test_a_new_sae_is_of_the_dtype_asked_for_and_knows_its_k_aux():
    sae = new_training_sae("topk", D_IN, D_SAE, settings={"k": 4}, seed=0, dtype="bfloat16", k_aux=5)
    assert (sae.W_dec.dtype, sae.cfg.dtype, sae.k_aux) == (torch.bfloat16, "bfloat16", 5)


@pytest.mark.parametrize(
    ("architecture", "settings", "more", "error", "message"),
    [
        ("topk_", {"k": 4}, {}, UnknownNameError, "'topk'"),
        ("topk", {"k": 4, "aux_loss_coeficient": 1}, {}, UnknownNameError, "'aux_loss_coefficient'"),
        ("topk", {"k": 4, "normalize_activations": "layer_norm"}, {}, UnknownNameError, "setting"),
        ("topk", {"k": "four"}, {}, ConfigError, "must be int"),
        ("topk", {}, {}, SAEError, "needs k"),
        ("topk", {"k": 33}, {}, SAEError, r"1\.\.32"),
        ("topk", {"k": 4}, {"k_aux": 0}, SAEError, "k_aux"),
        ("topk", {"k": 4}, {"dtype": "bfloat61"}, UnknownNameError, "'bfloat16'"),
        ("batchtopk", {"k": 4, "topk_threshold_lr": -1}, {}, SAEError, r"0\.\.1"),
        ("matryoshka_batchtopk", {}, {}, SAEError, "needs k and matryoshka_widths"),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [16, 8, 32]}, {}, SAEError, "strictly increasing"),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic"}, {}, SAEError, "target_l0"),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "stepp"}, {}, UnknownNameError, "'step'"),
        ("jumprelu", {}, {"k_aux": 4}, SAEError, "k_aux"),
    ],
)
def test_a_new_sae_that_cannot_be_made_is_refused(architecture, settings, more, error, message):
    with pytest.raises(error, match=message):
        new_training_sae(architecture, D_IN, D_SAE, settings=settings, seed=0, **more)


def with_moments(sae, x):
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    sae.training_forward_pass(TrainStepInput(x, {"l0": 1.0}, None, 0, False)).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("architecture", FORMS)
def test_a_unit_decoder_keeps_the_function_where_norms_are_free(x, architecture):
    sae = new_training_sae(architecture, D_IN, D_SAE, settings=SETTINGS[architecture], seed=1)
    optimizer = with_moments(sae, x)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
        before, norm = sae(x), sae.W_dec.norm(dim=1)
    moments = copy.deepcopy({name: optimizer.state[p] for name, p in sae.named_parameters()})
    unit_decoder(sae, optimizer)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae(x), before, atol=1e-5, rtol=1e-4)
    after = {name: optimizer.state[p] for name, p in sae.named_parameters()}
    torch.testing.assert_close(after["W_dec"]["exp_avg"], moments["W_dec"]["exp_avg"] * norm[:, None])
    torch.testing.assert_close(after["W_enc"]["exp_avg"], moments["W_enc"]["exp_avg"] / norm)
    torch.testing.assert_close(after["W_enc"]["exp_avg_sq"], moments["W_enc"]["exp_avg_sq"] / norm**2)
    assert torch.equal(after["b_dec"]["exp_avg"], moments["b_dec"]["exp_avg"])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_unit_decoder_is_projected_where_norms_count(x, cls):
    sae = ours_of(trained(cls, rescale=False))
    optimizer = with_moments(sae, x)
    with torch.no_grad():
        sae.W_dec[3] = 0
    before = copy.deepcopy(sae)
    unit_decoder(sae, optimizer)
    live = torch.arange(D_SAE) != 3
    torch.testing.assert_close(sae.W_dec[live], (before.W_dec / before.W_dec.norm(dim=1, keepdim=True))[live])
    assert (sae.W_dec[3] == 0).all()
    assert torch.equal(sae.W_enc, before.W_enc)


def test_settling_is_for_good():
    sae = new_training_sae("batchtopk", D_IN, D_SAE, settings={"k": 4}, seed=0)
    settle_threshold(sae)
    assert sae.threshold_updates == SETTLED
    sae.update_topk_threshold(torch.tensor([[4.0]]))
    assert float(sae.topk_threshold) == pytest.approx(0.04)
