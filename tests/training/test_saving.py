from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.saving import check_place, save_sae, write_folder
from tests.support import trained


def test_what_is_saved_is_what_stock_loads(tmp_path):
    sae = trained()
    path = save_sae(sae, tmp_path / "a" / "sae", log10_sparsity_f=torch.full((32,), -2.0), recipe="seed: 1\n")
    assert names(path) == ["cfg.json", "recipe.yaml", "sae_weights.safetensors", "sparsity.safetensors"]
    assert SAE.load_from_disk(path).cfg.metadata.author_note == {"kept": [1, 2]}
    assert (path / "recipe.yaml").read_text() == "seed: 1\n"


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

    with pytest.raises(error):
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
