"""What an upload sends: a folder of dashboards under its name, made to fit, in batches.

All of it is read once before anything is sent (`plan`). So a row that the API would refuse is known while nothing is on
the site yet, and an upload that goes on can tell whether it is still the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sae_lens_gemma4.errors import ConfigError, DataError, MismatchWarning, warn_caller
from sae_lens_gemma4.neuronpedia import limits
from sae_lens_gemma4.neuronpedia.explanations import Explanation, Explanations, ExplanationSource, labels_of
from sae_lens_gemma4.neuronpedia.folder import Dashboards, Feature
from sae_lens_gemma4.neuronpedia.limits import Changes, Row, encoded, fit
from sae_lens_gemma4.neuronpedia.listing import place_of
from sae_lens_gemma4.neuronpedia.names import SourceName
from sae_lens_gemma4.neuronpedia.package import sources_in


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
        dashboards_dir: a finished folder of dashboards, or one that has it as its subfolder `dashboards`.
        model_id, layer, set_name, suffix: where it goes; what is not given, the folder says. "" is no suffix.
        explanations: labels, as `read_explanations` takes them; `catalogue` is those of the folder's release.
        batch_size: most latents of a request.
        max_bytes: most bytes of a request.

    Raises:
        ConfigError: part of the name is said nowhere, or refused by Neuronpedia; a size that it does not take.
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
        if type(batch_size) is not int or not 1 <= batch_size <= limits.FEATURES:
            raise ConfigError(
                f"Neuronpedia takes batches of 1 to {limits.FEATURES} latents, not {batch_size!r} (batch_size)."
            )
        if type(max_bytes) is not int or max_bytes < 1:
            raise ConfigError(f"max_bytes must be a whole number above 0, not {max_bytes!r}.")
        self.dashboards = _found(Path(dashboards_dir))
        given = {"model_id": model_id, "layer": layer, "set_name": set_name, "suffix": suffix}
        self.name = place_of(self.dashboards, given)
        self._labels = _labels(self.dashboards, explanations)
        self._batch_size, self._max_bytes = batch_size, max_bytes
        around = {"modelId": self.name.model_id, "source": self.name.source_id, "features": []}
        self._frame = len(encoded(around))

    def batches(self, without: Collection[int] = ()) -> Iterator[list[Row]]:
        """Rows for one request after another, in the order of the files.

        Args:
            without: latents that are not sent.
        """
        for batch in self._batches(row for row in self._rows(Changes(), set()) if row["index"] not in without):
            yield [row for row, _ in batch]

    def plan(self, progress: bool = True) -> Plan:
        """Read and check all of it.

        Raises:
            DataError: a row that cannot be sent, a latent with two dashboards, or nothing to send.
        """
        changes, digest = Changes(), hashlib.sha256(str(self.name).encode())
        seen, without_examples = set[int](), set[int]()
        n_batches = n_bytes = n_labels = longest = 0
        for batch in self._batches(self._rows(changes, without_examples, "checking" if progress else None)):
            n_batches += 1
            n_bytes += self._frame + sum(len(text) + 1 for _, text in batch) - 1
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
            dead=len(without_examples.union(self.dashboards.dead) - seen),
            batches=n_batches,
            bytes=n_bytes,
            labels=n_labels,
            unsent_labels=sum(len(labels) for index, labels in self._labels.items() if index not in seen),
            longest_label=longest,
            changes=changes,
            content=digest.hexdigest(),
        )

    def _rows(self, changes: Changes, without_examples: set[int], shown: str | None = None) -> Iterator[Row]:
        files = self.dashboards.batches()
        for file in tqdm(files, shown, len(self.dashboards.files), disable=shown is None, unit="file"):
            for feature in file:
                row = fit(feature, self._labels_of(feature), changes)
                if row is None:
                    without_examples.add(feature["feature_index"])
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
            if self._frame + len(text) > self._max_bytes:
                raise DataError(
                    f"The dashboard of latent {row['index']} takes {len(text):,} bytes, and Neuronpedia takes "
                    f"{self._max_bytes:,} in one request. Make dashboards with fewer or shorter examples."
                )
            size, labels = size + len(text) + 1, labels + len(row["explanations"])
            full = len(batch) == self._batch_size or self._frame + size > self._max_bytes or labels > limits.LABELS
            if batch and full:
                yield batch
                batch, size, labels = [], len(text) + 1, len(row["explanations"])
            batch.append((row, text))
        if batch:
            yield batch


def _labels(dashboards: Dashboards, source: ExplanationSource | None) -> Explanations:
    labels = {} if source is None else labels_of(dashboards, source)
    if not labels and isinstance(source, str | Path):
        warn_caller(f"There is no label in {source}.", MismatchWarning)
    return labels


def _found(path: Path) -> Dashboards:
    try:
        return Dashboards.find(path)
    except DataError:
        if not (path / "dashboards").exists() and any(
            (source / "source.jsonl").is_file() for source in sources_in(path)
        ):
            raise DataError(
                f"{path} is an export, and an upload is of dashboards. upload-neuronpedia --offline packs it."
            ) from None
        raise
