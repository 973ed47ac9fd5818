"""What was generated, in a folder: one line an item and condition, written batch by batch.

Generation is the whole cost of a steering run, so what is there is never made again: a run that was killed goes on
after the last whole batch, and a line that it broke off in is dropped. Texts are kept and not verdicts, so that another
extractor reads the same answers anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.result import write_json
from sae_lens_gemma4.interp.firings import differing, read_facts
from sae_lens_gemma4.interp.steering.generating import Output

FACTS, NORM, LINES = "steering.json", "norm.json", "outputs.jsonl"


class Outputs:
    """The answers in a folder.

    Args:
        facts: what makes them these; a folder that was begun with others is refused.

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
            differing(self.folder, read_facts(there), plain)
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
