"""A folder of dashboards as data: sae-dashboard's batches, and what this package writes beside them.

    batch-N.json           sae-dashboard 0.8's form: a header and the dashboards of some latents
    skipped_indexes.json   the latents that never fired
    run_settings.json      SAE, model, text and settings they were made with
    latents.json           columns over latents for the viewer: where a dashboard lies, and what a list shows of it
    nearest.json           of every latent, dead ones too, those whose decoder rows are most like its own

The viewer, the export and the upload read through this module. A folder that sae-dashboard wrote has no `latents.json`
and other settings; its batches are then read whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from sae_lens_gemma4.errors import DataError, SAEError

SETTINGS, SKIPPED = "run_settings.json", "skipped_indexes.json"
LATENTS, NEAREST = "latents.json", "nearest.json"
COLUMNS = ("index", "density", "max", "token", "logit", "file", "offset", "length")
SCHEMA = 1
_KINDS = {"features": dict, "skipped_indexes": int}
_SHAPE: dict[str, tuple[type, ...]] = {
    "model_id": (str, NoneType),
    "layer": (int, NoneType),
    "sae_set": (str, NoneType),
    "sae_id_suffix": (str, NoneType),
    "sae": (dict,),
    "sae.release": (str, NoneType),
    "sae.sae_id": (str, NoneType),
    "sae.d_in": (int,),
    "sae.d_sae": (int,),
    "sae.hook_name": (str,),
    "sae.config": (dict, NoneType),
    "sae.config.metadata": (dict, NoneType),
    "model": (dict,),
    "model.name": (str, NoneType),
    "model.n_layers": (int, NoneType),
    "model.d_model": (int, NoneType),
    "model.d_mlp": (int, NoneType),
    "corpus": (dict,),
    "n_tokens": (int,),
    "n_prompts_total": (int,),
    "n_tokens_in_prompt": (int,),
}
"""What our settings hold, as far as it is relied on."""
_IN_WORDS = {dict: "object", int: "integer", str: "text"}
Feature = dict[str, Any]
"""One latent's dashboard, by sae-dashboard's names (docs/neuronpedia.md)."""
HEADER = ("model_id", "layer", "sae_set", "sae_id_suffix")


class Dashboards:
    """A finished folder of dashboards.

    Attributes:
        settings: what `run_settings.json` holds; of another's folder, what that one wrote.
        header: `model_id`, `layer`, `sae_set`, `sae_id_suffix`.
        dead: latents that never fired, ascending.

    Raises:
        DataError: no folder of dashboards, one that is not finished, or a file that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = sorted(self.path.glob("batch-*.json"), key=_number) if self.path.is_dir() else []
        if not (self.files or (self.path / SKIPPED).is_file()):
            raise DataError(f"{self.path} is no folder of dashboards: it has no batch-N.json.")
        self.settings: dict[str, Any] = self._read(SETTINGS) if (self.path / SETTINGS).is_file() else {}
        if self.ours and not self.settings.get("complete"):
            raise DataError(
                f"The dashboards in {self.path} are not finished. The call that made them goes on where it was stopped."
            )
        if self.ours:
            self._check_settings()
        skipped = self._read(SKIPPED, "skipped_indexes") if (self.path / SKIPPED).is_file() else {}
        self.dead: list[int] = sorted(skipped.get("skipped_indexes", []))
        self.header: dict[str, Any] = {name: self._read_header().get(name) for name in HEADER}
        if self.ours:
            self._check_files()

    @staticmethod
    def find(path: str | Path) -> Dashboards:
        """The dashboards in a folder, or in its subfolder `dashboards`. Errors as the constructor's."""
        inner = Path(path) / "dashboards"
        return Dashboards(inner if _holds_dashboards(inner) and not _holds_dashboards(path) else path)

    @property
    def ours(self) -> bool:
        """Whether this package made them."""
        return self.settings.get("schema") == SCHEMA

    def batches(self) -> Iterator[list[Feature]]:
        """The dashboards of one file after another, in order of their latents."""
        for file in self.files:
            yield self._read(file.name, "features")["features"]

    def features(self) -> Iterator[Feature]:
        for batch in self.batches():
            yield from batch

    @cached_property
    def latents(self) -> dict[str, list[Any]]:
        """Columns over the latents that have a dashboard: `index`, `density`, `max`, `token` (the one that fires most),
        `logit` (the token promoted most); and in our own folders `file`, `offset` and `length`."""
        if (self.path / LATENTS).is_file():
            return self._read_latents()
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS[:-2]}
        for file in self.files:
            for feature in self._read(file.name, "features")["features"]:
                for name, value in summary(feature).items():
                    columns[name].append(value)
                columns["file"].append(file.name)
        return columns

    def feature(self, index: int) -> Feature:
        """One latent's dashboard.

        Raises:
            SAEError: there is none of this latent.
            DataError: its file cannot be read, or has another in its place.
        """
        row = self._row_of.get(index)
        if row is None:
            why = "it never fired on this text" if index in set(self.dead) else "there is no such latent"
            raise SAEError(f"Latent {index} has no dashboard in {self.path}: {why}.")
        columns = self.latents
        name = columns["file"][row]
        if "offset" not in columns:
            found = self._read(name, "features")["features"]
            return next(f for f in found if f["feature_index"] == index)
        offset, length = columns["offset"][row], columns["length"][row]
        feature = self._parsed(self._bytes(name, offset, length), name)
        if feature.get("feature_index") != index:
            raise DataError(f"{self.path / name} has not latent {index} where {LATENTS} says. Make the folder again.")
        return feature

    @cached_property
    def nearest(self) -> dict[str, list[list[Any]]]:
        """`indices` and `cosine`: for each latent of the SAE, by its index, a row, best first. Empty if not there."""
        columns: dict[str, Any] = {"indices": [], "cosine": []}
        found = self._read(NEAREST) if (self.path / NEAREST).is_file() else columns
        for name in columns:
            rows = found.get(name)
            if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
                raise DataError(f"{self.path / NEAREST} has no list of {name}, each a list, as it should.")
        return found

    @cached_property
    def _row_of(self) -> dict[int, int]:
        return {index: row for row, index in enumerate(self.latents["index"])}

    def _check_settings(self) -> None:
        for place, kinds in _SHAPE.items():
            found: Any = self.settings
            for key in place.split("."):
                found = None if found is None else found.get(key)  # what lies around it has been checked
            if type(found) not in kinds:
                what, where = "nothing" if found is None else repr(found)[:40], self.path / SETTINGS
                raise DataError(f"{where}: {place} is {what}, and no {_IN_WORDS[kinds[0]]}. Make the dashboards again.")

    def _read_latents(self) -> dict[str, list[Any]]:
        found = self._read(LATENTS)
        columns = [found.get(name) for name in COLUMNS]
        if not all(isinstance(column, list) for column in columns) or len({len(c or ()) for c in columns}) > 1:
            raise DataError(f"{self.path / LATENTS} has not the columns {', '.join(COLUMNS)}, as long as each other.")
        for name, kind in (("index", int), ("offset", int), ("length", int), ("file", str)):
            if not set(map(type, found[name])) <= {kind}:
                raise DataError(f"{self.path / LATENTS} has a column {name} of something else than {_IN_WORDS[kind]}s.")
        return found

    def _check_files(self) -> None:
        """What `latents.json` tells of is there: a file may have been lost since."""
        if not (self.path / LATENTS).is_file():
            raise DataError(f"{self.path} has no {LATENTS}. Make the folder again.")
        columns, ends = self.latents, dict[str, int]()
        for name, offset, length in zip(columns["file"], columns["offset"], columns["length"], strict=True):
            ends[name] = max(ends.get(name, 0), offset + length)
        sizes = {file.name: file.stat().st_size for file in self.files}
        for name, end in ends.items():
            if sizes.get(name, 0) < end:
                raise DataError(f"{self.path / name} is gone, or shorter than {LATENTS} says. Make the folder again.")

    def _read_header(self) -> dict[str, Any]:
        if self.ours:
            return self.settings
        return self._read(self.files[0].name, "features") if self.files else self._read(SKIPPED)

    def _read(self, name: str, needed: str | None = None) -> dict[str, Any]:
        found = self._parsed(self._bytes(name), name)
        if needed is not None:
            entries, kind = found.get(needed), _KINDS[needed]
            if not isinstance(entries, list) or not all(type(entry) is kind for entry in entries):
                raise DataError(f"{self.path / name} has no list of {needed}, each {kind.__name__}, as it should.")
        return found

    def _bytes(self, name: str, offset: int = 0, length: int = -1) -> bytes:
        try:
            with (self.path / name).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as e:
            raise DataError(f"{self.path / name} cannot be read: {e.strerror}.") from e

    def _parsed(self, text: bytes, name: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{self.path / name} is not whole, or no JSON: {e}. Remove it and make it again.") from e
        if not isinstance(found, dict):
            raise DataError(f"{self.path / name} does not hold an object.")
        return found


def summary(feature: Feature) -> dict[str, Any]:
    """What a list shows of a dashboard: the columns of `Dashboards.latents` without its place."""
    activations = feature["activations"]
    top = max(activations, key=lambda a: max(a["values"]), default=None)
    return {
        "index": feature["feature_index"],
        "density": feature["frac_nonzero"],
        "max": None if top is None else max(top["values"]),
        "token": None if top is None else top["tokens"][top["values"].index(max(top["values"]))],
        "logit": feature["pos_str"][0] if feature["pos_str"] else None,
    }


def _holds_dashboards(folder: str | Path) -> bool:
    return any(Path(folder).glob("batch-*.json")) or (Path(folder) / SKIPPED).is_file()


def _number(path: Path) -> int:
    match = re.search(r"\d+", path.name)
    return int(match[0]) if match else -1
