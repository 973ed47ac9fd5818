"""The files of an export, and how Neuronpedia's import can take them.

The import lists a folder by one call that answers with 1,000 names at most (lib/utils/s3.ts): few files. It unpacks
each in memory and sends up to 65,000 lines of it to PostgreSQL as one JSON value (lib/db/import.ts), of which that
takes 256 MB: small ones.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lens_gemma4.errors import DataError
from sae_lens_gemma4.neuronpedia.cells import line

SINGLE: dict[str, str] = {"release.jsonl": "name", "model.jsonl": "id", "sourceset.jsonl": "name", "source.jsonl": "id"}
"""The files of one row, and the column that names the row."""
BATCHES: tuple[str, ...] = ("features", "activations", "explanations")
"""The folders of files of many rows."""
BATCH_NAME = re.compile(r"batch-(0|[1-9][0-9]*)\.jsonl\.gz")
UPSTREAM = "pretrained_saes.yaml"
"""None of the import's files, which passes it over: the row of sae_lens's list that an inference server needs."""
MAX_FILES, MAX_BYTES = 1000, 128 * 2**20
"""Of a folder, and of a file before it is packed."""
_GZIP_LEVEL = 5


def latents_per_file(d_sae: int | None) -> int:
    """How many latents share a file, so that a folder has some 500; of a width that nobody knows, a million fit."""
    return 1024 if d_sae is None else 128 * max(1, math.ceil(d_sae / 2**16))


class RowFiles:
    """`batch-N.jsonl.gz` of one folder, each begun when there is a row for it: the import fails on an empty one."""

    def __init__(self, folder: Path, latents_per_file: int) -> None:
        self.folder, self.latents_per_file = folder, latents_per_file
        self.rows = self.files = self._latents = self._bytes = 0
        self._file: gzip.GzipFile | None = None

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """The rows of one latent."""
        if self._latents == self.latents_per_file:
            self.close()
        self._latents += 1
        for row in rows:
            data = line(row)
            if self._bytes + len(data) > MAX_BYTES:
                self.close()
            if self._file is None:
                self._file = self._next()
            self._file.write(data)
            self._bytes += len(data)
        self.rows += len(rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._latents, self._bytes = None, 0, 0

    def _next(self) -> gzip.GzipFile:
        if self.files == MAX_FILES:
            raise DataError(
                f"{self.folder.name} would need more than the {MAX_FILES:,} files that the import lists. Make the "
                "dashboards with fewer or shorter examples."
            )
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"batch-{self.files}.jsonl.gz"
        self.files += 1
        return gzip.GzipFile(path, "wb", _GZIP_LEVEL, mtime=0)

    def __enter__(self) -> RowFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
