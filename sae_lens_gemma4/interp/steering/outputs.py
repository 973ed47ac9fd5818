"""What was generated, in a folder: one line an item and condition, written batch by batch.

Generation is the whole cost of a steering run, so what is there is never made again: a run that was killed goes on
after the last whole batch, and a line that it broke off in is dropped. Texts are kept and not verdicts, so that another
extractor reads the same answers anew. The direction and the norm that were added are kept with them: made anew on
another machine they may differ in the last digits, and with them the answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.result import write_json
from sae_lens_gemma4.interp.firings import differing, read_facts
from sae_lens_gemma4.interp.steering.generating import Output

FACTS, NORM, VECTOR, LINES = "steering.json", "norm.json", "vector.safetensors", "outputs.jsonl"
BATCH = "batch_items"


class Outputs:
    """The answers in a folder.

    Args:
        facts: what makes them these; a folder that was begun with others is refused. `batch_items` is among them where
            it has a say.

    Attributes:
        found: answers by condition's name and item's number.

    Raises:
        ConfigError: the folder holds another run, naming what differs, or cannot be written.
        DataError: a file in it cannot be read.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{self.folder} cannot be made: {e.strerror}.") from e
        there = self.folder / FACTS
        plain = json.loads(json.dumps(facts))
        if there.is_file():
            self._check(read_facts(there), plain)
        elif (self.folder / LINES).exists():
            raise DataError(f"{self.folder} holds {LINES} without {FACTS}: it is not known what run they are of.")
        else:
            write_json(plain, there)
        self.found: dict[tuple[str, int], Output] = {}
        self._end = self._read()

    def of(self, condition: str, n: int) -> list[Output]:
        """All `n` answers under a condition, in the order of the items."""
        return [self.found[condition, item] for item in range(n)]

    def norm(self) -> Mapping[str, Any] | None:
        """The norm that scales are shares of, where it was measured before."""
        path = self.folder / NORM
        return read_facts(path) if path.is_file() else None

    def keep_norm(self, mean: float, n_tokens: int) -> None:
        write_json({"mean": mean, "n_tokens": n_tokens}, self.folder / NORM)

    def vector(self) -> torch.Tensor | None:
        """The direction that was added before, float32 `[d]`.

        Raises:
            DataError: it cannot be read, or there are answers without it.
        """
        path = self.folder / VECTOR
        if not path.exists():
            if self.found:
                raise DataError(f"{self.folder} holds answers without {VECTOR}. Remove the folder and begin again.")
            return None
        try:
            return load_file(path)["vector"]
        except (OSError, SafetensorError, KeyError) as e:
            raise DataError(f"{path} cannot be read: {e}. Remove the folder and begin again.") from e

    def keep_vector(self, direction_d: torch.Tensor) -> None:
        path = self.folder / VECTOR
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(save({"vector": direction_d.contiguous()}))
            partial.replace(path)
        except OSError as e:
            raise ConfigError(f"{path} cannot be written: {e.strerror}.") from e

    def add(self, condition: str, outputs: Mapping[int, Output]) -> None:
        """Write a batch's answers by item; those that are there already stay as they are.

        Raises:
            ConfigError: they cannot be written.
        """
        new = {item: output for item, output in outputs.items() if (condition, item) not in self.found}
        lines = "".join(
            json.dumps({"condition": condition, "item": item, **output._asdict()}) + "\n"
            for item, output in new.items()
        ).encode()
        path = self.folder / LINES
        try:
            with path.open("r+b" if path.exists() else "wb") as file:
                file.seek(self._end)
                file.truncate()
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise ConfigError(f"{path} cannot be written: {e.strerror}.") from e
        self._end += len(lines)
        self.found.update({(condition, item): output for item, output in new.items()})

    def _check(self, there: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        differing(self.folder, *({k: v for k, v in facts.items() if k != BATCH} for facts in (there, ours)))
        if there.get(BATCH) != ours.get(BATCH):
            raise ConfigError(
                f"{self.folder} was begun with {BATCH} {there.get(BATCH)}, not {ours.get(BATCH)}. In 16 bits the "
                "rounding of a batch decides near ties between tokens, so answers made in other batches are not "
                f"comparable. Go on with {there.get(BATCH)}, or take another folder."
            )

    def _read(self) -> int:
        """Read the whole lines; return where they end."""
        path = self.folder / LINES
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror}.") from e
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                row = json.loads(line)
                key = (str(row["condition"]), int(row["item"]))
                self.found[key] = Output(str(row["text"]), int(row["n_tokens"]), bool(row["cut"]))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise DataError(f"Line {number} of {path} is no answer: {e}. Remove the folder and begin again.") from e
        return end
