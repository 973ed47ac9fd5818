"""Two processes train what one trains: the same weights but for rounding, and the same bits in both."""

import dataclasses
import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sae_lens import SAE

import sae_lens_gemma4 as g4
from sae_lens_gemma4.activations.corpus import build_corpus
from sae_lens_gemma4.activations.harvest import forwards
from sae_lens_gemma4.activations.sources import Source
from sae_lens_gemma4.activations.stream import ActivationStream
from sae_lens_gemma4.errors import ConfigError, SAEError
from sae_lens_gemma4.kernels.ranks import ALONE, Ranks
from sae_lens_gemma4.training.config import Activations, Data, Monitoring, SAEForm
from sae_lens_gemma4.training.forms import new_training_sae
from sae_lens_gemma4.training.loop import Loop
from sae_lens_gemma4.training.parallel import check, for_reading
from sae_lens_gemma4.training.phases import Guard, Phase, Training
from sae_lens_gemma4.training.resampling import Resampling
from sae_lens_gemma4.training.runner import ContinueTrainingRunner
from sae_lens_gemma4.training.trainee import PlannedPhase, Trainee
from tests.support import config

WORLD, N, D, F, STEPS = 2, 64, 16, 96, 16
HOOKS = ["blocks.3.hook_resid_post", "blocks.1.hook_resid_post"]
SETTINGS = {
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [16, 48, F]},
    "batchtopk": {"k": 2.5},
    "topk": {"k": 1},
    "jumprelu": {"jumprelu_init_threshold": 0.6},
}


def batch(step):
    """The second half, which is rank 1's, is larger than the first and lies elsewhere."""
    x_nd = torch.randn(N, D, generator=torch.Generator().manual_seed(step))
    x_nd[N // 2 :] = 3 * x_nd[N // 2 :] + 1
    return x_nd


def trained(architecture, ranks):
    """A trainee after its steps: with an auxiliary loss from the third step on, and latents resampled."""
    sae = new_training_sae(architecture, D, F, settings=SETTINGS[architecture], seed=0)
    phase = Phase(tokens=STEPS * N, lr=1e-3, resampling=Resampling(every_steps=8))
    training = Training(phases=[phase], dead_after_steps=2, guard=Guard(window_steps=4), unit_decoder_every=5)
    trainee = Trainee("t", sae, training, [PlannedPhase(phase, STEPS, None)], N, 0, ranks)
    losses = []
    for step in range(STEPS):
        output = trainee.train(batch(step)[ranks.parts(N)[ranks.rank]])
        losses.append({name: float(loss) for name, loss in output.losses.items()})
        trainee.record(output)
    return {"state": trainee.state(), "losses": losses}


def recipe(output, **parts):
    """A whole run: resampling that is judged, held-out figures that decide, checkpoints."""
    phases = [
        Phase(tokens=12 * 256, lr=1e-3, warm_up_steps=2, resampling=Resampling(every_steps=6, share=0.2)),
        Phase(name="polish", tokens=4 * 256, lr=1e-4, start="best"),
    ]
    return config(
        output,
        activations=Activations(batch_size=256, buffer_blocks=7, batch_blocks=2, **parts),
        training=Training(phases=phases, dead_after_steps=3, guard=Guard(window_steps=3)),
        monitoring=Monitoring(log_every=2, evaluate_every=6, checkpoint_every=5, downstream_tokens=64),
        data=Data(
            context_size=64,
            train=[Source(dataset="embedded:chat", tokens=3_000)],
            heldout=[Source(dataset="embedded:chat", split="heldout", tokens=500, name="chat")],
        ),
    )


def streamed(ranks):
    """Batches read ahead at two hooks, one of which is given up, and how many batches of blocks were run for them."""
    model = g4.load_model("gemma-4-demo-it", "Gemma4ProxyLM")
    corpus = build_corpus("embedded:chat", model.tokenizer, context_size=64, max_tokens=1500)
    n_run = 0

    def counted(*args, **settings):
        nonlocal n_run
        for batch in forwards(*args, **settings):
            n_run += 1
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_lens_gemma4.activations.reading.forwards", counted)
        settings = {"batch_size": 100, "seed": 1, "buffer_blocks": 8, "batch_blocks": 2, "prefetch": True}
        stream = ActivationStream(model, corpus, HOOKS, **settings, ranks=for_reading(ranks))
        batches = [next(stream) for _ in range(8)]
        stream.drop(HOOKS[1])
        batches += [next(stream) for _ in range(8)]
        stream.settle()
        position = stream.position
        stream.close()
    return {"batches": batches, "n_run": n_run, "position": position}


class Stop(Exception):
    """What ends a run in the middle."""


def stopped(cfg, step):
    """A run that ends after its checkpoint at `step`."""

    class Stopped(Loop):
        def _after_step(self, active):
            super()._after_step(active)
            if self.step == step:
                raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_lens_gemma4.training.runner.Loop", Stopped)
        with pytest.raises(Stop):
            ContinueTrainingRunner(cfg, progress=False).run()


def work(rank, folder):
    """All that needs two processes, in one start of them; each writes what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    ranks = Ranks(rank, WORLD, dist.group.WORLD)
    found = {architecture: trained(architecture, ranks) for architecture in SETTINGS} | {"stream": streamed(ranks)}

    hooked = new_training_sae("batchtopk", D, F, settings={"k": 2}, seed=0)
    hooked.hook_sae_acts_post.add_hook(lambda acts, hook: None)
    phase = Phase(tokens=N, lr=1e-3)
    trainee = Trainee("t", hooked, Training(phases=[phase]), [PlannedPhase(phase, 1, None)], N, 0, ranks)
    with pytest.raises(SAEError, match="in several processes"):
        trainee.train(batch(0))

    cfg = recipe(f"{folder}/run", cache=f"{folder}/cache")
    stopped(cfg, 12)
    dist.barrier()
    run = ContinueTrainingRunner(cfg, progress=False).run(resume=True)
    found["run"] = {"path": run.path, "state": run.only.sae.state_dict(), "history": run.only.history}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["sae_lens_gemma4.training.runner"])  # imported once for all
    mp.start_processes(work, (str(folder),), nprocs=WORLD, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return ContinueTrainingRunner(recipe(tmp_path_factory.mktemp("alone") / "run"), progress=False).run()


@pytest.mark.parametrize("architecture", SETTINGS)
def test_steps_are_those_of_one_process(both, architecture):
    one, (first, second) = trained(architecture, ALONE), (found[architecture] for found in both)
    for name, tensor in one["state"].tensors.items():
        torch.testing.assert_close(first["state"].tensors[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(first["state"].tensors[name], second["state"].tensors[name]), name
    assert first["losses"] == second["losses"]
    for ours, theirs in zip(first["losses"], one["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    facts, theirs = first["state"].facts, one["state"].facts
    assert facts == second["state"].facts
    assert [event["kind"] for event in facts["events"]] == [event["kind"] for event in theirs["events"]]
    assert "resampling" in [event["kind"] for event in facts["events"]]
    for ours, row in zip(facts["history"], theirs["history"], strict=True):
        assert [*ours.values()] == [
            v if v is None or isinstance(v, str) else pytest.approx(v, rel=1e-4) for v in row.values()
        ]
    assert facts["n_training_samples"] == theirs["n_training_samples"] == STEPS * N
    assert architecture == "jumprelu" or any(row["auxiliary_reconstruction_loss"] > 0 for row in first["losses"])


def test_forwards_are_shared_and_batches_are_those_of_one_process(both):
    one = streamed(ALONE)
    counts = [found["stream"]["n_run"] for found in both]
    assert one["n_run"] == 21  # five chunks of four are shared; one of a single batch is read by both
    assert counts == [11, 11]
    for found in both:
        got = found["stream"]
        assert got["position"] == one["position"]
        for ours, theirs in zip(got["batches"], one["batches"], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_was_stopped_and_resumed_is_that_of_one_process(both, alone):
    first, second = (found["run"] for found in both)
    assert first["path"] == second["path"]
    saved = SAE.load_from_disk(first["path"] / "sae").state_dict()
    for key, tensor in alone.only.sae.state_dict().items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
        assert torch.equal(first["state"][key], second["state"][key])
        assert torch.equal(saved[key], first["state"][key])
    assert first["history"] == second["history"]
    assert [row["tokens"] for row in first["history"]] == [row["tokens"] for row in alone.only.history]
    assert [row["ve"] for row in first["history"]] == pytest.approx([row["ve"] for row in alone.only.history], rel=1e-4)
    document = json.loads((first["path"] / "sae" / "result.json").read_text())
    assert [event["kind"] for event in document["events"]] == [event["kind"] for event in alone.only.events]
    assert "resampling" in [event["kind"] for event in document["events"]]


def test_rank_0_alone_writes_and_each_row_once(folder, both, alone):
    path = both[0]["run"]["path"]
    assert path == folder / "run"
    written, theirs = (sorted(file.relative_to(run) for file in run.rglob("*")) for run in (path, alone.path))
    assert written == theirs
    ours, theirs = ((run / "log.jsonl").read_text().splitlines() for run in (path, alone.path))
    assert [json.loads(row)["step"] for row in ours] == [json.loads(row)["step"] for row in theirs]


def test_what_several_processes_cannot_share_is_refused(tmp_path):
    cfg = recipe(tmp_path)
    check(cfg, 2)
    with pytest.raises(ConfigError, match="batch_size is 256, which 3 processes cannot share"):
        check(cfg, 3)
    with pytest.raises(ConfigError, match=r"sae\.device of sae is 'meta'"):
        check(dataclasses.replace(cfg, sae=SAEForm(device="meta")), 2)
    check(dataclasses.replace(cfg, sae=SAEForm(device="meta")), 1)


def test_a_device_of_an_sae_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="Device 'cuda:77' cannot be used"):
        SAEForm(device="cuda:77")
