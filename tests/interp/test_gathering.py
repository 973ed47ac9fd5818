import os
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.interp import gathering
from sae_lens_gemma4.interp.firings import Firings, blocks_done
from sae_lens_gemma4.interp.gathering import gather_firings, needs, neuron_correlations
from tests.interp.conftest import HOOK
from tests.interp.plain import correlation, dense

FACTS = {"sae": "a", "model": "b", "corpus": "c"}


def gathered(sae, model, corpus, folder, **settings):
    settings = {"batch_blocks": 4, "progress": False} | settings
    return gather_firings(sae, model, HOOK, corpus, folder, FACTS, **settings)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shard", [2**25, 3000, 1])
def test_every_activation_is_found_by_latent(sae, model, corpus, plain, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(gathering, "SHARD_ACTIVATIONS", shard)
    firings = gathered(sae, model, corpus, tmp_path)
    assert len(firings.shards) == {2**25: 1, 3000: 3, 1: 6}[shard]
    z_tf = plain[1].flatten(0, 1)
    for first, end in ((0, 100), (2000, 2048)):
        for latent, firing in zip(range(first, end), firings.latents(first, end), strict=True):
            expected = z_tf[:, latent].nonzero()[:, 0]
            assert firing.token_e.tolist() == expected.tolist()
            np.testing.assert_allclose(firing.value_e, z_tf[expected, latent], rtol=1e-5, atol=1e-5)
    assert sum(len(f.token_e) for f in firings.latents(0, 2048)) == int((z_tf > 0).sum())


def test_correlations_with_the_hooks_dimensions_are_those_of_the_definition(sae, model, corpus, plain, tmp_path):
    x_bpd, z_bpf = plain
    firings = gathered(sae, model, corpus, tmp_path)
    x_td, z_tf = x_bpd[corpus.keep_bp], z_bpf[corpus.keep_bp]
    alive = z_tf.sum(dim=0).nonzero()[:5, 0].tolist()
    found = neuron_correlations(firings.sums, 0, 2048)
    for latent in alive:
        for d in (0, 40, 95):
            pearson, cosine = correlation(z_tf[:, latent], x_td[:, d])
            assert float(found.pearson_fd[latent, d]) == pytest.approx(pearson, abs=1e-5)
            assert float(found.cosine_fd[latent, d]) == pytest.approx(cosine, abs=1e-5)
    dead = int((z_tf.sum(dim=0) == 0).nonzero()[0, 0])
    assert not found.pearson_fd[dead].any() and not found.cosine_fd[dead].any()


def test_correlations_hold_where_the_mean_is_far_larger_than_what_varies(model, corpus, tmp_path):
    """Sums about zero would lose all digits in float32."""
    sums = gathering._Sums(JumpReLUSAE(JumpReLUSAEConfig(d_in=2, d_sae=3)))
    x_td = torch.randn(1000, 2) + 3e4
    z_tf = torch.relu(torch.randn(1000, 3) + (x_td[:, :1] - 3e4))
    for part in range(0, 1000, 250):
        rows = slice(part, part + 250)
        sums.add(gathering.ActiveLatents.of(z_tf[rows]), x_td[rows])
    found = neuron_correlations(sums.tensors(), 0, 3)
    for latent in range(3):
        for d in range(2):
            expected = correlation(z_tf[:, latent], x_td[:, d])
            got = float(found.pearson_fd[latent, d]), float(found.cosine_fd[latent, d])
            assert got == pytest.approx(expected, abs=2e-3)  # of x itself, float32 keeps 2e-3 here


def test_what_does_not_vary_correlates_with_nothing():
    sums = gathering._Sums(JumpReLUSAE(JumpReLUSAEConfig(d_in=3, d_sae=3)))
    x_td = torch.randn(2000, 3)
    x_td[:, 2] = 5.3
    z_tf = torch.stack([torch.full((2000,), 1.1), 1000 + 0.05 * x_td[:, 0], torch.relu(x_td[:, 0])], dim=1)
    for part in range(0, 2000, 100):
        sums.add(gathering.ActiveLatents.of(z_tf[part : part + 100]), x_td[part : part + 100])
    found = neuron_correlations(sums.tensors(), 0, 3)
    assert not found.pearson_fd[:2].any() and not found.pearson_fd[:, 2].any()
    assert float(found.pearson_fd[2, 0]) == pytest.approx(correlation(z_tf[:, 2], x_td[:, 0])[0], abs=1e-5)


def test_a_pass_that_was_stopped_goes_on_and_ends_the_same(sae, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "SHARD_ACTIVATIONS", 1)
    whole = gathered(sae, model, corpus, tmp_path / "whole")

    class Stopped(Exception):
        pass

    append, calls = Firings.append, []

    def stopping(self, *args):
        if len(calls) == 3:
            raise Stopped
        calls.append(append(self, *args))

    monkeypatch.setattr(Firings, "append", stopping)
    with pytest.raises(Stopped):
        gathered(sae, model, corpus, tmp_path / "stopped")
    monkeypatch.setattr(Firings, "append", append)
    again = gathered(sae, model, corpus, tmp_path / "stopped")
    assert [shard[1:] for shard in again.shards] == [shard[1:] for shard in whole.shards]
    assert all(same(a, b) for a, b in zip(again.latents(0, 2048), whole.latents(0, 2048), strict=True))
    assert set(again.sums) == set(whole.sums) and all(torch.equal(again.sums[k], whole.sums[k]) for k in whole.sums)
    assert sorted(p.name for p in again.folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())


def test_a_killed_process_leaves_nothing_half_written(sae, model, corpus, tmp_path):
    script = f"""
        import os, signal, sys
        import torch, sae_lens_gemma4 as g4
        from safetensors import torch as st
        from sae_lens import SAE
        from sae_lens_gemma4.interp import firings, gathering
        gathering.SHARD_ACTIVATIONS = 1
        real, calls = firings.save_file, []
        def save(tensors, path, metadata):
            calls.append(path)
            if len(calls) == 6:  # the third shard, after its sums
                open(path, "wb").write(b"half of a file")
                os.kill(os.getpid(), signal.SIGKILL)
            real(tensors, path, metadata)
        firings.save_file = save
        model = g4.load_model("gemma-4-demo", "Gemma4ProxyLM")
        corpus = g4.build_corpus("embedded:text", model.tokenizer, context_size=32, max_tokens=780)
        corpus = corpus.take(torch.arange(24))
        corpus.keep_bp[2] = False
        sae = SAE.from_pretrained("gemma-4-demo-res-matryoshka-embedded", "layer_3_width_2k_l0_16")
        gathering.gather_firings(sae, model, "{HOOK}", corpus, sys.argv[1], {FACTS}, batch_blocks=4, progress=False)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "killed")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert len(Firings(tmp_path / "killed", 2048, 32, FACTS).shards) == 2
    again, whole = (gathered(sae, model, corpus, tmp_path / name) for name in ("killed", "whole"))
    assert all(same(a, b) for a, b in zip(again.latents(0, 2048), whole.latents(0, 2048), strict=True))


def test_a_folder_of_something_else_is_refused(sae, model, corpus, tmp_path):
    gathered(sae, model, corpus, tmp_path)
    with pytest.raises(ConfigError, match="was begun with model 'b', not 'z'"):
        gather_firings(sae, model, HOOK, corpus, tmp_path, FACTS | {"model": "z"}, progress=False)


def test_a_shard_that_cannot_be_read_is_named(sae, model, corpus, tmp_path):
    firings = gathered(sae, model, corpus, tmp_path)
    firings.shards[0][0].write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"shard-00000\.safetensors cannot be read"):
        Firings(tmp_path, 2048, 32, FACTS)


def test_what_a_pass_takes_is_told(sae, model, corpus, plain, tmp_path):
    found = needs(sae, model, HOOK, corpus, batch_blocks=24)
    assert found.l0 == pytest.approx(float((plain[1] > 0).sum() / corpus.n_tokens))
    firings = gathered(sae, model, corpus, tmp_path)
    written = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert found.disk * 0.5 <= written <= found.disk * 1.1 and found.memory > written
    assert firings.n_blocks == blocks_done(tmp_path) == 24
    assert needs(sae, model, HOOK, corpus, done_blocks=24, batch_blocks=4).disk == 0


def test_blocks_that_count_nowhere_are_no_hindrance(sae, model, corpus, tmp_path):
    """Not even where they come first, or last."""
    masked = corpus.take(torch.arange(24))
    masked.keep_bp[:5] = False
    masked.keep_bp[20:] = False
    assert needs(sae, model, HOOK, masked, batch_blocks=2).l0 > 5
    firings = gathered(sae, model, masked, tmp_path, batch_blocks=2)
    expected = int((dense(sae, model, HOOK, masked)[1] > 0).sum())
    assert sum(len(f.token_e) for f in firings.latents(0, 2048)) == expected > 0
    again = gathered(sae, model, masked, tmp_path)
    assert again.shards == firings.shards


def test_shards_are_written_when_much_work_would_be_lost(sae, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "SHARD_SECONDS", 0)
    assert len(gathered(sae, model, corpus, tmp_path).shards) == 6
    assert [p.name for p in tmp_path.glob("sums-*")] == ["sums-00006.safetensors"]  # the older ones are of no use


@pytest.mark.parametrize(("bias", "weight"), [(-torch.inf, 3e38), (0.0, 1e38)])
def test_activations_that_are_not_finite_are_named(model, corpus, tmp_path, bias, weight):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=96, d_sae=4))
    sae.W_enc.data[:, 3], sae.b_enc.data[3] = weight, bias
    with pytest.raises(DataError, match="not finite, first those of latent 3"):
        gathered(sae, model, corpus, tmp_path)


def test_documents_can_be_kept_apart(sae, model, corpus, tmp_path):
    together = gathered(sae, model, corpus, tmp_path / "a")
    apart = gathered(sae, model, corpus, tmp_path / "b", isolate_documents=True)
    assert int(apart.sums["n"]) == int(together.sums["n"])
    assert not torch.equal(apart.sums["z_f"], together.sums["z_f"])


def test_shards_that_do_not_follow_each_other_are_refused(sae, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "SHARD_ACTIVATIONS", 1)
    gathered(sae, model, corpus, tmp_path)
    shutil.copy(tmp_path / "shard-00004.safetensors", tmp_path / "shard-00003.safetensors")
    with pytest.raises(DataError, match="does not begin where the one before"):
        Firings(tmp_path, 2048, 32, FACTS)
