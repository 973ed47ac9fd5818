import math
from pathlib import Path

import pytest
import torch

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.checkpoint import (
    Checkpoint,
    as_json,
    check_same,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from sae_lens_gemma4.training.state import State


def checkpoint(step, value=0.0):
    state = State({"sae.W": torch.full((2, 3), value)}, {"ve": math.pi * value, "nan": math.nan})
    return Checkpoint(step, {"chunk": 1}, 17, 2.5, {"recipe": {"seed": 0}}, {"layer_3": state})


def test_the_newest_complete_one_is_read_back_exactly(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, checkpoint(99, 1.0))
    save_checkpoint(tmp_path, checkpoint(1000, 0.1))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001000"]
    read = load_checkpoint(tmp_path)
    assert (read.step, read.stream, read.log, read.seconds) == (1000, {"chunk": 1}, 17, 2.5)
    state = read.trainees["layer_3"]
    assert torch.equal(state.tensors["sae.W"], torch.full((2, 3), 0.1))
    assert state.facts["ve"] == math.pi * 0.1 and math.isnan(state.facts["nan"])
    remove_checkpoints(tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae_lens_gemma4.training.checkpoint.save_file", full)
    with pytest.raises(ConfigError, match=r"step_000000002 cannot be written: No space left on device"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert load_checkpoint(tmp_path).step == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]


def test_what_a_kill_leaves_half_written_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    half = tmp_path / "checkpoints" / ".step_000000002.partial-x"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert load_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("damage", ["{", '{"schema": 0}', '{"schema": 1}'])
def test_a_damaged_one_is_named(tmp_path, damage):
    folder = save_checkpoint(tmp_path, checkpoint(1))
    (folder / "state.json").write_text(damage)
    with pytest.raises(ConfigError, match="step_000000001"):
        load_checkpoint(tmp_path)
    (folder / "state.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_another_run_is_not_gone_on_with():
    was = as_json({"recipe": {"seed": 0, "training": {"phases": [{"lr": 1e-4}]}}, "text": "a", "path": Path("x")})
    check_same(was, as_json({**was}))
    now = {**was, "recipe": {"seed": 1, "training": {"phases": [{"lr": 1e-3}]}}}
    with pytest.raises(ConfigError, match=r"recipe\.seed was 0 and is 1; recipe\.training\.phases was .* and is"):
        check_same(was, now)
