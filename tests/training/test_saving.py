import math
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.saving import (
    check_place,
    check_run_folder,
    clear_run_folder,
    only_one,
    save_sae,
    save_sparsity,
    write_folder,
)
from tests.support import trained


def test_what_is_saved_is_what_stock_loads(tmp_path):
    sae = trained()
    path = save_sae(sae, tmp_path / "a" / "sae")
    save_sparsity(path, torch.tensor([0.25, 0.0]))
    assert names(path) == ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
    assert SAE.load_from_disk(path).cfg.metadata.author_note == {"kept": [1, 2]}
    saved = load_file(path / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(saved, torch.tensor([math.log10(0.25), -10.0]))


def a_run(folder):
    (folder / "layer_3").mkdir(parents=True)
    for name in ("log.jsonl", "recipe.yaml", "layer_3/cfg.json"):
        (folder / name).write_text(name)
    return folder


def test_a_run_is_put_where_nothing_is_lost(tmp_path):
    ask = {"resume": False, "replace": False}
    assert check_run_folder(tmp_path / "new" / "run", **ask) == tmp_path / "new" / "run"
    assert not (tmp_path / "new" / "run").exists()
    run = a_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run"):
        check_run_folder(run, **ask)
    with pytest.raises(ConfigError, match=r"starts from .*layer_3, which lies in its output"):
        check_run_folder(run, resume=False, replace=True, keep=[run / "layer_3"])
    check_run_folder(run, resume=True, replace=False, keep=[run / "layer_3"])
    check_run_folder(run, resume=False, replace=True)
    assert names(run) == ["layer_3", "log.jsonl", "recipe.yaml"]  # nothing goes before all was checked
    clear_run_folder(run)
    assert names(run) == []


def test_what_is_no_run_is_never_replaced(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "cfg.json").write_text("an SAE, not a run")
    for name, message in (
        ("run", "other things in it .thesis.tex"),
        ("file", "is a file"),
        ("weights", "other things"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_run_folder(tmp_path / name, resume=False, replace=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        check_run_folder(tmp_path / "file" / "x", resume=False, replace=False)


def write(*names):
    """A writer of these files."""
    return lambda folder: [(folder / name).write_text(name) for name in names]


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_an_sae_is_replaced_as_a_whole(tmp_path):
    write_folder(tmp_path / "x", write("cfg.json", "old"))
    write_folder(tmp_path / "x", write("cfg.json", "new"))
    assert names(tmp_path / "x") == ["cfg.json", "new"]
    assert names(tmp_path) == ["x"]


def test_what_is_no_sae_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name, message in (("file", "is a file"), ("folder", "other things in it"), ("file/x", "cannot be written")):
        with pytest.raises(ConfigError, match=message):
            write_folder(tmp_path / name, lambda _: pytest.fail("written"))
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path / "folder") == ["notes.txt"]
    (tmp_path / "base").mkdir()
    with pytest.raises(ConfigError, match="the run starts from"):
        check_place(tmp_path / "base", keep=str(tmp_path / "base"))
    assert check_place(tmp_path / "new" / "sae") == tmp_path / "new" / "sae"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, error, existing):
    if existing:
        write_folder(tmp_path / "x", write("cfg.json", "old"))

    def half(partial):
        (partial / "half").write_text("half")
        raise error

    with pytest.raises(ConfigError if error is OSError else error):
        write_folder(tmp_path / "x", half)
    assert names(tmp_path) == (["x"] if existing else [])
    if existing:
        assert names(tmp_path / "x") == ["cfg.json", "old"]


def test_an_interrupt_between_the_two_renames_puts_the_old_one_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "x", write("cfg.json", "old"))
    rename = Path.rename

    def interrupted(self, target):
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "x", write("cfg.json", "new"))
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["cfg.json", "old"]


def test_a_resume_leaves_what_else_lies_there(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "train.log").write_text("mine")
    check_run_folder(run, resume=True, replace=False)
    (run / "log.jsonl").unlink()
    with pytest.raises(ConfigError, match="no run to resume"):
        check_run_folder(run, resume=True, replace=False)


def test_one_process_at_a_time(tmp_path):
    with only_one(tmp_path), pytest.raises(ConfigError, match="Another process is at the run"), only_one(tmp_path):
        pytest.fail("both are in")
    with only_one(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_full_disk_is_said_whoever_meets_it(tmp_path):
    def full(_):
        raise SafetensorError("No space left on device")

    with pytest.raises(ConfigError, match="x cannot be written: No space left"):
        write_folder(tmp_path / "x", full)
