"""A run that is killed goes on, and ends in the same bits as one that was not."""

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from sae_lens import SAE

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.training.config import Activations, ContinueTrainingConfig, Monitoring
from sae_lens_gemma4.training.loop import Loop
from sae_lens_gemma4.training.phases import Guard, Phase, Training
from sae_lens_gemma4.training.resampling import Resampling
from sae_lens_gemma4.training.runner import ContinueTrainingRunner
from tests.support import config

CODE = """
import sys
from sae_lens_gemma4.training.config import ContinueTrainingConfig
from sae_lens_gemma4.training.runner import ContinueTrainingRunner
ContinueTrainingRunner(ContinueTrainingConfig.from_yaml(sys.argv[1]), progress=False).run(resume=True)
"""


def whole(output, **parts):
    """A run with all that a checkpoint has to hold: resampling, watched events, a second phase from the best state."""
    phases = [
        Phase(tokens=40 * 256, lr=1e-3, warm_up_steps=5, resampling=Resampling(every_steps=16, share=0.2)),
        Phase(name="polish", tokens=8 * 256, lr=1e-4, start="best"),
    ]
    return config(
        output,
        activations=Activations(batch_size=256, buffer_blocks=8),
        training=Training(phases=phases, dead_after_steps=10, guard=Guard(window_steps=6)),
        monitoring=Monitoring(log_every=2, evaluate_every=20, checkpoint_every=7),
        **parts,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return ContinueTrainingRunner(whole(tmp_path_factory.mktemp("whole") / "run"), progress=False).run()


def assert_same(result_path, uninterrupted):
    theirs, ours = (SAE.load_from_disk(path / "sae") for path in (result_path, uninterrupted.path))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    a, b = (json.loads((path / "sae" / "result.json").read_text()) for path in (result_path, uninterrupted.path))
    for key in ("history", "events", "evaluations", "tokens", "calibration"):
        assert a[key] == b[key], key
    logs = [
        [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for path in (result_path, uninterrupted.path)
    ]
    assert logs[0] == logs[1]
    assert not (result_path / "checkpoints").exists()


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("after", [1, 12, 24])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(uninterrupted, tmp_path, after):
    cfg = whole(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(cfg.to_yaml())
    child = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path / "recipe.yaml")], env={**os.environ})
    try:
        deadline = time.monotonic() + 240
        while lines(tmp_path / "run" / "log.jsonl") < after and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "run" / "sae").exists()
    result = ContinueTrainingRunner(cfg, progress=False).run(resume=True)
    assert_same(result.path, uninterrupted)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["loop.Loop._checkpoint", "loop.Loop._measure", "runner.finish", "finishing._result"])
def test_stopped_between_two_steps_it_goes_on_too(uninterrupted, tmp_path, monkeypatch, where):
    """Twice: the second stop comes after a resume."""
    cfg = whole(tmp_path / "run")
    module, *path = where.split(".")
    original = functools.reduce(getattr, path, importlib.import_module(f"sae_lens_gemma4.training.{module}"))
    calls = []

    def stop(*args):
        calls.append(where)
        if len(calls) in (2, 3) or (module != "loop" and len(calls) == 1):
            raise Stop
        return original(*args)

    monkeypatch.setattr(f"sae_lens_gemma4.training.{where}", stop)
    for _ in range(4):
        try:
            result = ContinueTrainingRunner(cfg, progress=False).run(resume=True)
            break
        except Stop:
            continue
    assert len(calls) >= 2
    assert_same(result.path, uninterrupted)


def test_a_resume_wants_the_same_run(tmp_path, monkeypatch):
    cfg = whole(tmp_path / "run")
    monkeypatch.setattr("sae_lens_gemma4.training.runner.finish", lambda _: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        ContinueTrainingRunner(cfg, progress=False).run()
    for changed, message in (
        (dataclasses.replace(cfg, seed=4), r"recipe\.seed was 3 and is 4"),
        (
            dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, name="gemma-4-demo-it")),
            r"recipe\.model\.name",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            ContinueTrainingRunner(changed, progress=False).run(resume=True)
    with pytest.raises(ConfigError, match="holds a run"):
        ContinueTrainingRunner(cfg, progress=False).run()
    monitoring = dataclasses.replace(cfg.monitoring, log_every=7)  # changes no weight, so it may differ
    with pytest.raises(Stop):
        ContinueTrainingRunner(dataclasses.replace(cfg, monitoring=monitoring), progress=False).run(resume=True)


def test_a_run_that_fails_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    cfg = whole(tmp_path / "run")
    train = Loop._train

    def poisoned(self, sae, x_nd):
        if self.step == 26:
            with torch.no_grad():
                sae.trainee.sae.W_enc.fill_(float("nan"))
        train(self, sae, x_nd)

    monkeypatch.setattr(Loop, "_train", poisoned)
    with pytest.raises(DataError, match="at step 26"):
        ContinueTrainingRunner(cfg, progress=False).run()
    checkpoints = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert checkpoints == ["step_000000021"]
    monkeypatch.undo()
    assert isinstance(ContinueTrainingConfig.from_yaml(tmp_path / "run" / "recipe.yaml"), ContinueTrainingConfig)
