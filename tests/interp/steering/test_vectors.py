import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_lens_gemma4.errors import ConfigError, DataError, ModelError, SAEError, UnknownNameError
from sae_lens_gemma4.interp.steering.vectors import (
    SteeringVector,
    check_hook,
    check_vector,
    from_contrast,
    from_file,
    from_latent,
    mean_norm,
    random_direction,
)

HOOK = "blocks.3.hook_resid_post"


def test_a_vector_is_a_unit_direction_at_a_canonical_hook():
    vector = from_contrast(np.array([[3.0, 0, 4]]), "model.language_model.layers.3", "right − wrong")
    torch.testing.assert_close(vector.direction_d, torch.tensor([0.6, 0, 0.8]))
    assert (vector.hook_name, vector.origin) == (HOOK, "right − wrong")
    assert vector.hash == SteeringVector(torch.tensor([6.0, 0, 8]), HOOK, "").hash
    assert vector.hash != SteeringVector(torch.tensor([6.0, 0, 8]), "blocks.2.hook_resid_post", "").hash


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(4), "is zero and points nowhere"),
        (torch.tensor([1, float("nan")]), "not finite, first at dimension 1"),
        (torch.ones(2, 3), r"one row of numbers; x has shape \(2, 3\)"),
        (torch.ones(4, dtype=torch.bool), "dtype bool"),
    ],
)
def test_what_is_no_direction(values, message):
    with pytest.raises(DataError, match=message):
        SteeringVector(values, HOOK, "x")


def test_a_latents_decoder_row(sae):
    vector = from_latent(sae, 5)
    row = sae.W_dec[5].detach()
    torch.testing.assert_close(vector.direction_d, row / row.norm())
    assert vector.hook_name == HOOK
    with pytest.raises(SAEError, match="none of number 2048"):
        from_latent(sae, 2048)
    with pytest.raises(SAEError, match="none of number -1"):
        from_latent(sae, -1)


def test_files(tmp_path):
    row = torch.tensor([0.0, 3, 4])
    np.save(tmp_path / "v.npy", row.numpy())
    torch.save(row.bfloat16(), tmp_path / "v.pt")
    torch.save({"v": row}, tmp_path / "d.pt")
    save_file({"v": row, "w": row.flip(0)}, tmp_path / "v.safetensors")
    for name, tensor in (("v.npy", None), ("v.pt", None), ("d.pt", None), ("v.safetensors", "v")):
        torch.testing.assert_close(from_file(tmp_path / name, HOOK, tensor).direction_d, torch.tensor([0, 0.6, 0.8]))
    with pytest.raises(DataError, match="holds 2 tensors"):
        from_file(tmp_path / "v.safetensors", HOOK)
    with pytest.raises(UnknownNameError, match=r"tensor in v\.safetensors 'x'"):
        from_file(tmp_path / "v.safetensors", HOOK, "x")
    with pytest.raises(UnknownNameError, match="form of vector file"):
        from_file(tmp_path / "v.bin", HOOK)
    with pytest.raises(DataError, match="cannot be read as a vector"):
        from_file(tmp_path / "none.npy", HOOK)


class Runs:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_files_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Runs(), "v.pt")
    np.save("v.npy", np.array([Runs()], dtype=object), allow_pickle=True)
    for name in ("v.pt", "v.npy"):
        with pytest.raises(DataError, match="cannot be read"):
            from_file(name, HOOK)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "v.pt").read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read"):
        from_file("torn.pt", HOOK)
    assert not (tmp_path / "ran").exists()


def test_vector_and_model_must_fit(model):
    assert check_vector(SteeringVector(torch.ones(96), HOOK, "x"), model) == HOOK
    with pytest.raises(ModelError, match="has 64 dimensions and the model 96"):
        check_vector(SteeringVector(torch.ones(64), HOOK, "x"), model)
    with pytest.raises(ConfigError, match="residual stream's width"):
        check_vector(SteeringVector(torch.ones(96), "blocks.3.mlp.hook_post", "x"), model)
    with pytest.raises(UnknownNameError, match=r"blocks\.9\.hook_resid_post"):
        check_vector(SteeringVector(torch.ones(96), "blocks.9.hook_resid_post", "x"), model)
    with pytest.raises(ModelError, match="Gemma4ProxyLM or a Gemma4Bridge, not a Linear"):
        check_vector(SteeringVector(torch.ones(96), HOOK, "x"), torch.nn.Linear(1, 1))
    assert check_hook(model, "model.language_model.layers.3") == check_hook(model, HOOK) == HOOK
    with pytest.raises(ConfigError, match="residual stream's width"):
        check_hook(model, "blocks.3.mlp.hook_post")
    with pytest.raises(UnknownNameError, match=r"blocks\.9\.hook_resid_post"):
        check_hook(model, "blocks.9.hook_resid_post")


def test_mean_norm_counts_the_tokens_that_count(model, corpus):
    norms = []
    for tokens_p, keep_p in zip(corpus.tokens_bp, corpus.keep_bp, strict=True):
        _, cache = model.run_with_cache(tokens_p[None], names_filter=[HOOK])
        norms += cache[HOOK][0][keep_p].double().square().sum(-1).sqrt().tolist()
    found = mean_norm(model, corpus, HOOK, batch_blocks=5)
    assert found.n_tokens == len(norms) == corpus.n_tokens
    assert found.mean == pytest.approx(np.mean(norms), rel=1e-5)


def test_random_directions_are_seeded_and_even():
    drawn = torch.stack([random_direction(48, seed) for seed in range(300)])
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(300))
    torch.testing.assert_close(random_direction(48, 7), drawn[7])
    cosines = (drawn @ drawn.T)[~torch.eye(300, dtype=torch.bool)]
    assert float(cosines.square().mean()) == pytest.approx(1 / 48, rel=0.05)
