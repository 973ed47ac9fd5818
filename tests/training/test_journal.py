import json
import math
import sys
from types import SimpleNamespace

import pytest

from sae_lens_gemma4.errors import ConfigError
from sae_lens_gemma4.training.journal import Journal


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_rows_are_strict_json_and_a_resume_cuts_what_is_done_again(tmp_path):
    journal = Journal(tmp_path)
    journal.write("a", "training", {"step": 1, "ve": math.nan, "corpora": {"x": {"ve": 0.5}}})
    kept = journal.size
    journal.write("a", "training", {"step": 2, "ve": 0.25})
    journal.close()
    assert rows(tmp_path) == [
        {"sae": "a", "kind": "training", "step": 1, "ve": None, "corpora": {"x": {"ve": 0.5}}},
        {"sae": "a", "kind": "training", "step": 2, "ve": 0.25},
    ]
    again = Journal(tmp_path, keep=kept)
    again.write("b", "event", {"step": 2})
    again.close()
    assert [row["sae"] for row in rows(tmp_path)] == ["a", "b"]
    Journal(tmp_path).close()
    assert rows(tmp_path) == []


def test_tensorboard_gets_every_number_or_is_missed_in_words(tmp_path, monkeypatch):
    logged = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, *row):
            logged.append(row)

        def close(self):
            logged.append(self.folder)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    journal = Journal(tmp_path, loggers=["tensorboard"])
    journal.write("a", "training", {"step": 3, "ve": 0.5, "phase": "main"})
    journal.close()
    assert logged == [("a/training/ve", 0.5, 3), str(tmp_path / "tensorboard")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Journal(tmp_path, loggers=["tensorboard"])


def test_a_full_disk_is_said(tmp_path):
    journal = Journal(tmp_path)
    journal._file.close()
    journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ConfigError, match="/dev/full cannot be written: No space left"):
        journal.write("a", "training", {"step": 1})


def test_wandb_gets_every_number(tmp_path, monkeypatch):
    calls, logged = [], []

    class Run:
        def log(self, row):
            logged.append(row)

        def finish(self):
            calls.append("finish")

    monkeypatch.setattr("wandb.init", lambda **kwargs: calls.append(kwargs["project"]) or Run())
    journal = Journal(tmp_path, loggers=["wandb"], project="p", settings={"seed": 0})
    journal.write("a", "heldout", {"step": 3, "corpora": {"x": {"ve": 0.5, "verdict": None}}, "phase": "main"})
    journal.close()
    assert calls == ["p", "finish"]
    assert logged == [{"a/heldout/corpora/x/ve": 0.5, "a/step": 3}]
