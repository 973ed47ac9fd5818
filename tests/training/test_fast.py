"""The fast architectures: sae_lens's own, in steps that compute only what they select."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch
from sae_lens import SAE, LoggingConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_gemma4
from sae_lens_gemma4.errors import SAEError, UnknownNameError
from sae_lens_gemma4.kernels.dispatch import SWITCH
from sae_lens_gemma4.training.fast import FAST, stock_form, stock_name
from sae_lens_gemma4.training.restore import load_sae
from sae_lens_gemma4.training.runner import ContinueTrainingRunner
from sae_lens_gemma4.training.state import load_trainer_state, trainer_state
from sae_lens_gemma4.training.trainer import SparseTrainer, _Later
from tests.support import config

D_IN, D_SAE, N = 24, 150, 64
SETTINGS = {
    "fast_topk": {"k": 5},
    "fast_batchtopk": {"k": 4.7},
    "fast_matryoshka_batchtopk": {"k": 5, "matryoshka_widths": [10, 70, D_SAE]},
}


def pair(name, dtype="float32", seed=0, **settings):
    """A fast SAE and stock's, with the same weights, none of them where training begins."""
    saes = []
    for architecture in (name, stock_name(name)):
        cls, config = get_sae_training_class(architecture)
        saes.append(cls(config(d_in=D_IN, d_sae=D_SAE, dtype=dtype, device="cpu", **SETTINGS[name] | settings)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for ours, stock in zip(*(sae.parameters() for sae in saes), strict=True):
            ours.copy_(stock + 0.05 * torch.randn(stock.shape, generator=g))
            stock.copy_(ours)
    return saes


def inputs(seed=0, n=N, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, D_IN, generator=g, dtype=dtype) + 0.3


def forward(sae, x, dead=None):
    return sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))


def gradients(sae, loss):
    sae.zero_grad()
    loss.backward()
    return {name: p.grad.double() for name, p in sae.named_parameters()}


def far(a, b):
    return float((a - b).norm() / b.norm())


def trainer_of(sae, cls, n=N, **settings):
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=100 * n,
        device="cpu", autocast=False, lr=1e-3, lr_end=1e-4, lr_scheduler_name="cosineannealing", lr_warm_up_steps=2,
        adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=n,
        dead_feature_window=3, feature_sampling_window=7, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return cls(cfg, sae, iter([inputs(seed=i, n=n) for i in range(200)]))


@pytest.mark.parametrize("kernels", ["cpu", "plain"])
@pytest.mark.parametrize("aux", ["none", "some", "all", "per_width"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_no_farther_from_float64_than_stock_s(
    name, aux, rescale, apply_b_dec, kernels, monkeypatch
):
    if aux == "per_width" and "matryoshka" not in name:
        return
    monkeypatch.setenv(SWITCH, kernels)
    settings = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply_b_dec}
    settings |= {"use_matryoshka_aux_loss": True} if aux == "per_width" else {}
    ours, stock = pair(name, **settings)
    exact = copy.deepcopy(stock).to(dtype=torch.float64)
    share = {"none": 0.0, "some": 0.05, "all": 1.0, "per_width": 0.4}[aux]
    dead = torch.rand(D_SAE, generator=torch.Generator().manual_seed(1)) < share
    x = inputs()
    outputs = [forward(sae, x.to(sae.dtype), dead) for sae in (ours, stock, exact)]
    a, b, c = outputs
    assert a.losses.keys() == b.losses.keys()
    for key in a.losses:
        assert float(a.losses[key].detach()) == pytest.approx(float(c.losses[key].detach()), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(a.feature_acts.to_dense(), b.feature_acts)
    torch.testing.assert_close(a.sae_out, b.sae_out)
    grads, theirs, true = (gradients(sae, o.loss) for sae, o in zip((ours, stock, exact), outputs, strict=True))
    for key, grad in grads.items():
        assert far(grad, true[key]) <= max(1e-6, far(theirs[key], true[key])), key


def test_each_loss_and_the_reconstruction_have_gradients_of_their_own():
    ours, stock = pair("fast_matryoshka_batchtopk")
    dead = torch.arange(D_SAE) % 3 == 0
    for part in ("mse_loss", "inner_mse_loss_10", "auxiliary_reconstruction_loss"):
        a, b = (gradients(sae, 3 * forward(sae, inputs(), dead).losses[part]) for sae in (ours, stock))
        assert all(far(a[key], b[key]) < 1e-5 or float(b[key].norm()) == 0 for key in a), part
    a, b = (gradients(sae, forward(sae, inputs()).sae_out.cos().sum()) for sae in (ours, stock))
    assert all(far(a[key], b[key]) < 1e-5 for key in a)
    output = forward(ours, inputs())
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        output.loss.backward()


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_steps_of_either_trainer_come_to_the_same(name):
    ours, stock = pair(name)
    start = copy.deepcopy(stock)
    fast, slow = trainer_of(ours, SparseTrainer), trainer_of(stock, SAETrainer)
    only_the_class = trainer_of(copy.deepcopy(ours), SAETrainer)
    for trainer in (fast, slow, only_the_class):
        for i in range(10):
            trainer.step(inputs(seed=i))
            trainer.n_training_steps += 1
    assert bool(slow.dead_neurons.any())  # the auxiliary loss was on
    for trainer in (fast, only_the_class):
        for key, weights in slow.sae.state_dict().items():
            moved = weights.double() - start.state_dict()[key].double()
            assert float((trainer.sae.state_dict()[key] - weights).norm()) < 1e-3 * float(moved.norm()) + 1e-7, key
        assert torch.equal(trainer.act_freq_scores, slow.act_freq_scores)
        assert torch.equal(trainer.n_forward_passes_since_fired, slow.n_forward_passes_since_fired)
        assert trainer.n_frac_active_samples == slow.n_frac_active_samples


def test_the_clipped_norm_is_one():
    ours, _ = pair("fast_topk")
    trainer = trainer_of(ours, SparseTrainer)
    loss = forward(ours, inputs()).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in ours.parameters()])
    trainer._clip(ours)
    assert float(trainer.optimizer.grad_scale) == pytest.approx(float(norm) + 1e-6) and float(norm) > 1
    for p in ours.parameters():
        p.grad.mul_(1e-3 / norm)
    trainer._clip(ours)
    assert float(trainer.optimizer.grad_scale) == 1


def test_stock_s_fit_runs_to_its_end_and_logs(tmp_path):
    ours, _ = pair("fast_matryoshka_batchtopk")
    for cls in (SparseTrainer, SAETrainer):
        trainer = trainer_of(copy.deepcopy(ours), cls)
        output = trainer.step(inputs())
        logged = trainer.build_train_step_log_dict(output, 64)
        assert logged["metrics/l0"] == pytest.approx(5, abs=0.01)
        trainer.fit()
        trainer.save_checkpoint("here", tmp_path / cls.__name__)
        again = trainer_of(pair("fast_matryoshka_batchtopk")[0], cls)
        again.sae.load_weights_from_checkpoint(tmp_path / cls.__name__ / "here")
        again.load_trainer_state(tmp_path / cls.__name__ / "here")
        for t in (trainer, again):
            t.step(inputs(seed=99))
        for key, weights in trainer.sae.state_dict().items():
            torch.testing.assert_close(again.sae.state_dict()[key], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_files_are_stock_s_and_a_checkpoint_converts(name, tmp_path):
    ours, stock = pair(name)
    for sae, folder in ((ours, "ours"), (stock, "stock"), (stock_form(ours), "converted")):
        sae.save_inference_model(tmp_path / "inference" / folder)
        sae.save_model(tmp_path / "training" / folder)
    for kind, folder in (("inference", "ours"), ("training", "converted")):
        for file in ("cfg.json", "sae_weights.safetensors"):
            theirs = (tmp_path / kind / "stock" / file).read_bytes()
            assert (tmp_path / kind / folder / file).read_bytes() == theirs, (kind, file)
    facts = {f: json.loads((tmp_path / "training" / f / "cfg.json").read_text()) for f in ("ours", "stock")}
    assert facts["ours"].pop("architecture") == name and facts["stock"].pop("architecture") == stock_name(name)
    assert facts["ours"] == facts["stock"]
    again = TrainingSAE.load_from_disk(tmp_path / "training" / "ours")
    assert type(again) is FAST[name][0] and again.W_enc.stride() == (1, D_IN)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    for saved in (load_sae(tmp_path / "training" / "ours"), SAE.load_from_disk(tmp_path / "inference" / "ours")):
        torch.testing.assert_close(saved.encode(inputs()), load_sae(tmp_path / "training" / "stock").encode(inputs()))


def test_hooks_and_normalisations_get_stock_s_dense_pass():
    ours, stock = pair("fast_batchtopk")
    seen = []
    ours.add_hook("hook_sae_acts_pre", lambda acts, hook: seen.append(acts.shape))
    assert not forward(ours, inputs()).feature_acts.is_sparse and seen == [(N, D_SAE)]
    a, b = (gradients(sae, forward(sae, inputs()).loss) for sae in (ours, stock))
    assert all(torch.equal(a[key], b[key]) or far(a[key], b[key]) < 1e-6 for key in a)
    assert float(ours.topk_threshold) > 0
    ours.k_aux = 3
    with pytest.raises(SAEError, match="k_aux"):
        forward(ours, inputs())
    ours.reset_hooks()
    assert forward(ours, inputs()).feature_acts.is_sparse
    normalised, stock = pair("fast_topk", normalize_activations="layer_norm")
    assert torch.equal(forward(normalised, inputs()).loss, forward(stock, inputs()).loss)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("n", [1, 3])
def test_batches_of_any_size_and_zeros(name, n):
    for k in (1, D_SAE):
        ours, stock = pair(name, k=k)
        for x in (inputs(n=n), torch.zeros(n, D_IN)):
            a, b = forward(ours, x), forward(stock, x)
            torch.testing.assert_close(a.loss, b.loss)
            torch.testing.assert_close(a.feature_acts.to_dense(), b.feature_acts)
            if hasattr(ours, "topk_threshold"):
                torch.testing.assert_close(ours.topk_threshold, stock.topk_threshold, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", SETTINGS)
def test_other_dtypes(name, dtype):
    ours, stock = pair(name, dtype)
    dead = torch.arange(D_SAE) % 4 == 0
    exact = copy.deepcopy(stock).to(dtype=torch.float64)
    x = inputs().to(ours.dtype)
    a, c = forward(ours, x, dead), forward(exact, x.double(), dead)
    assert a.sae_out.dtype == ours.dtype
    assert float(a.loss.detach()) == pytest.approx(float(c.loss.detach()), rel=1e-5)
    grads, true = gradients(ours, a.loss), gradients(exact, c.loss)
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-9
    assert all(far(grads[key], true[key]) < tolerance for key in grads)
    assert all(p.grad.dtype == ours.dtype for p in ours.parameters())
    if hasattr(ours, "topk_threshold"):
        assert ours.topk_threshold.dtype == torch.float64


def test_autocast_costs_no_digit():
    ours, stock = pair("fast_matryoshka_batchtopk")
    plain = forward(ours, inputs()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(forward(ours, inputs()).loss, plain)
        assert not torch.equal(forward(stock, inputs()).loss, plain)


def test_weights_that_are_not_finite_make_the_loss_none():
    ours, _ = pair("fast_batchtopk")
    with torch.no_grad():
        ours.W_enc[3, 7] = torch.nan
    before = ours.topk_threshold.clone()
    assert forward(ours, inputs()).loss.isnan() and torch.equal(ours.topk_threshold, before)


def test_what_a_step_keeps_is_small():
    """Autograd keeps nothing of [tokens, latents]."""
    sizes = []
    ours, _ = pair("fast_matryoshka_batchtopk")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        output = forward(ours, inputs())
    assert sum(sizes) == 0 and isinstance(output.loss.grad_fn, object)
    loss = output.losses["mse_loss"].grad_fn.next_functions[0][0].loss
    kept = loss.error_nmd.numel() + sum(t.numel() for t in (*loss.rows, loss.token_e, loss.decoded_e))
    assert kept < 3 * N * D_IN + (3 * N + 1) + 3 * 5 * N + 1 < N * D_SAE


def test_the_door_opens_and_closes():
    assert FAST.items() <= SAE_TRAINING_CLASS_REGISTRY.items()
    sae_lens_gemma4.unregister()
    try:
        assert not FAST.keys() & SAE_TRAINING_CLASS_REGISTRY.keys()
    finally:
        sae_lens_gemma4.register()
    assert get_sae_training_class("batchtopk")[0] is BatchTopKTrainingSAE


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="there is a GPU, where these kernels run anyway")
@pytest.mark.parametrize("name", SETTINGS)
def test_triton_s_kernels_make_the_same_step(name, monkeypatch):
    pytest.importorskip("triton")
    dead = torch.arange(D_SAE) % 40 == 0
    sae, results = pair(name)[0], []
    for kernels in ("cpu", "triton"):
        monkeypatch.setenv(SWITCH, kernels)
        trainer = trainer_of(copy.deepcopy(sae), SparseTrainer, n=8)
        trainer.n_forward_passes_since_fired[dead] = 10
        for seed in (0, 1):
            loss = trainer.step(inputs(seed=seed, n=8)).loss
        results.append((trainer.sae, trainer.act_freq_scores, loss))
    (a, a_scores, a_loss), (b, b_scores, b_loss) = results
    torch.testing.assert_close(a_loss, b_loss)
    assert torch.equal(a_scores, b_scores)
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_may_be_compiled(name):
    ours, _ = pair(name)
    plain = forward(ours, inputs()).loss
    compiled = torch.compile(ours.training_forward_pass, backend="eager")
    assert torch.equal(compiled(TrainStepInput(inputs(), {}, None, 0, False)).loss, plain)


@pytest.mark.parametrize("before", [SAETrainer, SparseTrainer])
@pytest.mark.parametrize("class_before", [0, 1])
def test_any_trainer_s_checkpoint_is_gone_on_with(before, class_before, tmp_path):
    """Of stock's class and trainer too, whose moments lie in another order and whose Adam is not fused."""
    saes = pair("fast_batchtopk")
    first = trainer_of(saes[class_before], before)
    for seed in range(5):
        first.step(inputs(seed=seed))
    first.save_trainer_state(tmp_path)
    second = trainer_of(pair("fast_batchtopk")[0], SparseTrainer)
    second.sae.load_state_dict(first.sae.state_dict())
    second.load_trainer_state(tmp_path)
    third = trainer_of(pair("fast_batchtopk")[0], SparseTrainer)
    load_trainer_state(third, trainer_state(first))
    for trainer in (first, second, third):
        for seed in range(5, 8):
            trainer.step(inputs(seed=seed))
    for key, weights in first.sae.state_dict().items():
        for trainer in (second, third):
            torch.testing.assert_close(trainer.sae.state_dict()[key], weights, rtol=1e-4, atol=1e-6)


def test_a_dead_latent_of_zeros_gets_a_gradient():
    ours, stock = pair("fast_topk")
    dead = torch.arange(D_SAE) % 3 == 0
    for sae in (ours, stock):
        with torch.no_grad():
            sae.W_enc[:, dead] = 0
            sae.b_enc[dead] = 0
    a, b = (gradients(sae, forward(sae, inputs(), dead).loss) for sae in (ours, stock))
    assert float(b["W_enc"][:, dead].norm()) > 0  # ties: which of the zeros are used is not stock's choice
    assert float(a["W_enc"][:, dead].norm()) == pytest.approx(float(b["W_enc"][:, dead].norm()), rel=0.3)
    assert far(a["W_dec"], b["W_dec"]) < 1e-6


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("parameter", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_nothing_that_is_not_finite_goes_unseen(parameter, rescale):
    ours, _ = pair("fast_batchtopk", rescale_acts_by_decoder_norm=rescale)
    with torch.no_grad():
        getattr(ours, parameter).T[5] = torch.nan
    output = forward(ours, inputs())
    assert output.loss.isnan()
    assert any(grad.isnan().any() for grad in gradients(ours, output.loss).values())


def test_torch_s_own_hooks_are_seen_and_inputs_have_no_gradient():
    ours, _ = pair("fast_topk")
    seen = []
    handle = ours.hook_sae_acts_post.register_forward_hook(lambda *args: seen.append(args[2].shape))
    forward(ours, inputs())
    assert seen == [(N, D_SAE)]
    handle.remove()
    with pytest.raises(SAEError, match="detach"):
        forward(ours, inputs().requires_grad_())


def test_a_count_is_of_a_tensor_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    counted = torch.zeros(4)
    later = _Later(torch.tensor(3), counted)
    assert later.is_of(counted) and later.get() == 3 and not later.is_of(counted.clone())
    counted[2] = 0
    assert not later.is_of(counted)


def test_kernels_that_do_not_exist_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv(SWITCH, "tritn")
    with pytest.raises(UnknownNameError, match="'triton'"):
        ContinueTrainingRunner(config(tmp_path / "run"), progress=False).run()
    assert not (tmp_path / "run").exists()
