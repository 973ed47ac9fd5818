"""What an upload sends: a folder of dashboards under its name, made to fit, in batches.

All of it is read once before anything is sent (`plan`). So a row that the API would refuse is known while nothing is on
the site yet, and an upload that goes on can tell whether it is still the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.neuronpedia import limits
from sae_lens_gemma4.neuronpedia.folder import Dashboards, Feature
from sae_lens_gemma4.neuronpedia.limits import Changes, Row, encoded, fit
from sae_lens_gemma4.neuronpedia.names import SourceName

if TYPE_CHECKING:
    from sae_lens_gemma4.neuronpedia.explanations import Explanation, Explanations, ExplanationSource


@dataclass(frozen=True)
class Plan:
    """What will be sent.

    Attributes:
        latents: with a dashboard, all of which are sent.
        first, last: the lowest and the highest of them.
        dead: latents without one; the API takes none.
        batches: requests that carry latents.
        bytes: of all requests together.
        labels: sent.
        unsent_labels: of latents that are not sent.
        longest_label: in UTF-16 units, as it is sent.
        changes: what is not sent as it was.
        content: a digest of all that is sent.
    """

    name: SourceName
    latents: int
    first: int
    last: int
    dead: int
    batches: int
    bytes: int
    labels: int
    unsent_labels: int
    longest_label: int
    changes: Changes
    content: str


class Outgoing:
    """A folder of dashboards as batches for the API.

    Args:
        dashboards_dir: a finished folder of dashboards.
        model_id, layer, set_name, suffix: where it goes; what is not given, the folder says. "" is no suffix.
        explanations: labels, as `read_explanations` takes them; `catalogue` is those of the folder's release.
        batch_size: most latents of a request.
        max_bytes: most bytes of a request.

    Raises:
        ConfigError: part of the name is said nowhere, or refused by Neuronpedia; a batch size that it does not take.
        DataError: no folder of dashboards, or one that is not finished; labels that cannot be read.
    """

    def __init__(
        self,
        dashboards_dir: str | Path,
        *,
        model_id: str | None = None,
        layer: int | None = None,
        set_name: str | None = None,
        suffix: str | None = None,
        explanations: ExplanationSource | None = None,
        batch_size: int = limits.FEATURES,
        max_bytes: int = limits.BODY_BYTES,
    ) -> None:
        if not 1 <= batch_size <= limits.FEATURES:
            raise ConfigError(f"Neuronpedia takes batches of 1 to {limits.FEATURES} latents, not {batch_size}.")
        self.dashboards = Dashboards(dashboards_dir)
        given = {"model_id": model_id, "layer": layer, "sae_set": set_name, "sae_id_suffix": suffix}
        self.name = _name({k: self.dashboards.header[k] if v is None else v for k, v in given.items()}, self.dashboards)
        self._labels = {} if explanations is None else self._read(explanations)
        self._batch_size, self._max_bytes = batch_size, max_bytes

    def batches(self, without: Collection[int] = ()) -> Iterator[list[Row]]:
        """Rows for one request after another, in the order of the files.

        Args:
            without: latents that are not sent.
        """
        for batch in self._batches(row for row in self._rows(Changes()) if row["index"] not in without):
            yield [row for row, _ in batch]

    def plan(self, progress: bool = True) -> Plan:
        """Read and check all of it.

        Raises:
            DataError: a row that cannot be sent, a latent with two dashboards, or nothing to send.
        """
        changes, seen, digest = Changes(), set[int](), hashlib.sha256(str(self.name).encode())
        n_batches = n_bytes = n_labels = longest = 0
        for batch in self._batches(self._rows(changes, "checking" if progress else None)):
            n_batches += 1
            n_bytes += self._frame() + sum(len(text) + 1 for _, text in batch) - 1
            for row, text in batch:
                if row["index"] in seen:
                    raise DataError(f"{self.dashboards.path} has two dashboards of latent {row['index']}.")
                seen.add(row["index"])
                digest.update(text)
                n_labels += len(row["explanations"])
                longest = max([longest, *(len(e["text"].encode("utf-16-le")) // 2 for e in row["explanations"])])
        if not seen:
            raise DataError(f"No latent in {self.dashboards.path} ever fired: there is nothing to upload.")
        return Plan(
            name=self.name,
            latents=len(seen),
            first=min(seen),
            last=max(seen),
            dead=len((set(self.dashboards.dead) | self._without_examples) - seen),
            batches=n_batches,
            bytes=n_bytes,
            labels=n_labels,
            unsent_labels=sum(len(labels) for index, labels in self._labels.items() if index not in seen),
            longest_label=longest,
            changes=changes,
            content=digest.hexdigest(),
        )

    def _read(self, explanations: ExplanationSource) -> Explanations:
        from sae_lens_gemma4.neuronpedia.explanations import read_explanations  # with the catalogue

        sae = self.dashboards.settings.get("sae")
        known = sae if isinstance(sae, dict) else {}
        facts = {fact: known.get(fact) for fact in ("d_sae", "release", "sae_id")}
        return read_explanations(explanations, **facts)

    def _rows(self, changes: Changes, shown: str | None = None) -> Iterator[Row]:
        self._without_examples: set[int] = set()
        files = self.dashboards.batches()
        for file in tqdm(files, shown, len(self.dashboards.files), disable=shown is None, unit="file"):
            for feature in file:
                row = fit(feature, self._labels_of(feature), changes)
                if row is None:
                    self._without_examples.add(feature["feature_index"])
                else:
                    yield row

    def _labels_of(self, feature: Feature) -> Sequence[Explanation]:
        index = feature.get("feature_index") if isinstance(feature, dict) else None
        return self._labels.get(index, ()) if isinstance(index, int) else ()

    def _batches(self, rows: Iterator[Row]) -> Iterator[list[tuple[Row, bytes]]]:
        batch: list[tuple[Row, bytes]] = []
        size = labels = 0
        for row in rows:
            text = encoded(row)
            if self._frame() + len(text) > self._max_bytes:
                raise DataError(
                    f"The dashboard of latent {row['index']} takes {len(text):,} bytes, and Neuronpedia takes "
                    f"{self._max_bytes:,} in one request. Make dashboards with fewer or shorter examples."
                )
            size, labels = size + len(text) + 1, labels + len(row["explanations"])
            full = len(batch) == self._batch_size or self._frame() + size > self._max_bytes or labels > limits.LABELS
            if batch and full:
                yield batch
                batch, size, labels = [], len(text) + 1, len(row["explanations"])
            batch.append((row, text))
        if batch:
            yield batch

    def _frame(self) -> int:
        """Bytes of a request without its rows."""
        return len(encoded({"modelId": self.name.model_id, "source": self.name.source_id, "features": []}))


_SAID_BY = {"model_id": "model_id", "layer": "layer", "sae_set": "set_name"}


def _name(parts: dict[str, Any], dashboards: Dashboards) -> SourceName:
    if missing := [argument for part, argument in _SAID_BY.items() if parts[part] is None]:
        raise ConfigError(f"{dashboards.path} does not say {' and '.join(missing)}; state it.")
    texts = parts["model_id"], parts["sae_set"], parts["sae_id_suffix"] or ""
    if type(parts["layer"]) is not int or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{dashboards.path} says where it belongs in a form that is not understood; state it.")
    return SourceName(parts["model_id"], parts["layer"], parts["sae_set"], parts["sae_id_suffix"] or None)
