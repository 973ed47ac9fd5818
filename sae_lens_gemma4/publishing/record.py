"""What a run left with an SAE, read back: everything a card says and an upload needs is in these two files.

A card written by hand says what its author remembers. One that is made of `cfg.json` and `result.json` alone can be
made again by anybody who has the folder, and can say nothing that was not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from sae_lens_gemma4.errors import ConfigError, SAEError, check_name
from sae_lens_gemma4.models.hook_names import layer_of
from sae_lens_gemma4.training.gate import gate_sentence
from sae_lens_gemma4.training.records import RESULT_FILENAME, SCHEMA
from sae_lens_gemma4.training.saving import RECIPE_FILENAME

CARD_FILENAME = "README.md"
UPLOADED = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RESULT_FILENAME, RECIPE_FILENAME)
"""What of an SAE's folder belongs in a repository, where it is there; what else lies in it stays here."""
_NEEDED = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, RESULT_FILENAME)
_FIELDS = ("name", "hook_name", "d_sae", "model", "data", "phases", "events", "history", "before", "after")


@dataclass(frozen=True)
class Record:
    """One SAE's folder, `cfg.json` and `result.json`."""

    folder: Path
    cfg: dict[str, Any]
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.result["name"])

    @property
    def metadata(self) -> dict[str, Any]:
        return dict(self.cfg.get("metadata") or {})

    @property
    def files(self) -> list[Path]:
        """What is uploaded."""
        return [self.folder / name for name in UPLOADED if (self.folder / name).is_file()]

    @property
    def measured(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each held-out corpus by name, and what was measured on it in the end."""
        yield from self.result["after"].items()

    @property
    def passed(self) -> bool:
        return bool(self.result.get("gate") and self.result["gate"]["passed"])

    @property
    def gate(self) -> str:
        """Whether its gate holds, in a sentence."""
        return gate_sentence(self.result.get("gate"))


def read_record(folder: str | Path) -> Record:
    """Read one SAE's folder.

    Raises:
        SAEError: a file that is missing or cannot be read, or of another version; with its place.
    """
    folder = Path(folder)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise SAEError(f"{folder} is not the folder of an SAE that a run has finished: it has no {', '.join(missing)}.")
    cfg, result = _read(folder / SAE_CFG_FILENAME), _read(folder / RESULT_FILENAME)
    if result.get("schema") != SCHEMA or result.get("kind") != "training":
        found = f"{result.get('kind')!r}, schema {result.get('schema')!r}"
        raise SAEError(f"{folder / RESULT_FILENAME} is {found}; this version publishes 'training', schema {SCHEMA}.")
    if absent := [name for name in _FIELDS if name not in result]:
        raise SAEError(f"{folder / RESULT_FILENAME} lacks {', '.join(absent)}.")
    if not result["after"]:
        raise SAEError(f"{folder / RESULT_FILENAME} has no held-out figures: nothing is known of this SAE.")
    return Record(folder, cfg, result)


def read_records(folders: Iterable[str | Path]) -> list[Record]:
    """Several, which go into one repository: of one model, each with a name of its own, by layer.

    Raises:
        SAEError: as `read_record`.
        ConfigError: none, two of one name, or of different models.
    """
    records = [read_record(folder) for folder in folders]
    if not records:
        raise ConfigError("There is no SAE to publish.")
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two SAEs have one name: {', '.join(names)}. In a repository each has a folder of its own.")
    models = list(dict.fromkeys(str(record.result["model"]["name"]) for record in records))
    if len(models) > 1:
        raise ConfigError(f"These SAEs are of different models, {', '.join(models)}: publish them one by one.")
    return sorted(records, key=_order)


def find_folders(run: str | Path, names: Sequence[str] = ()) -> list[Path]:
    """The SAE folders of a run's folder, or that folder itself; with `names`, those alone.

    Raises:
        ConfigError: there are none.
        UnknownNameError: a name that none has.
    """
    run = Path(run)
    inside = sorted(p.parent for p in run.glob(f"*/{RESULT_FILENAME}") if not p.parent.name.startswith("."))
    folders = [run] if (run / RESULT_FILENAME).is_file() else inside
    if not folders:
        raise ConfigError(f"{run} holds no SAE that a run has finished (no {RESULT_FILENAME}, nor a folder with one).")
    by_name = {folder.name: folder for folder in folders}
    for name in names:
        check_name(f"SAE of {run}", name, by_name)
    return [by_name[name] for name in dict.fromkeys(names)] or folders


def require_gate(records: Sequence[Record]) -> None:
    """Raise `SAEError` where a gate does not hold or was not asked for, with each check that fails."""
    refused = [f"{record.name}: {record.gate}" for record in records if not record.passed]
    if refused:
        raise SAEError(
            f"Only SAEs whose gate holds are uploaded, unless asked for ungated. {' '.join(refused)} Nothing was sent."
        )


class Part(NamedTuple):
    """A text, and the SAEs that it holds for; "" for all."""

    names: str
    text: str

    def __str__(self) -> str:
        return f"{self.names}: {self.text}" if self.names else self.text

    def titled(self, title: str) -> str:
        return f"{title} of {self.names}: {self.text}" if self.names else f"{title}: {self.text}"


def shared(records: Sequence[Record], write: Callable[[Record], str | Sequence[str]]) -> list[Part]:
    """The texts that `write` has for each, said once for all for which they are the same."""
    names: dict[str, list[str]] = {}
    for record in records:
        texts = write(record)
        for text in [texts] if isinstance(texts, str) else texts:
            names.setdefault(text, []).append(record.name)
    return [Part("" if len(who) == len(records) else ", ".join(who), text) for text, who in names.items()]


def is_on_hub(name: str) -> bool:
    """Whether a name reads like a repository's, and is not a folder here."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def place(name: str | None) -> str:
    """A repository or dataset as it is; of a file or folder of somebody's machine, its own name alone."""
    if not name:
        return "texts in memory"
    return name if is_on_hub(name) or name.startswith("embedded:") else PurePath(name).name


def _order(record: Record) -> tuple[float, str]:
    layer = layer_of(record.result["hook_name"])
    return (float("inf") if layer is None else layer, record.name)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SAEError(f"{path} cannot be read: {e}") from e
    if not isinstance(data, dict):
        raise SAEError(f"{path} is not a JSON object.")
    return data
