"""What is said of single features: labels and maximally activating examples of every release that has them.

Each author publishes them in a form of their own. Here all become one `FeatureLabel`; what an author states beyond it
stays beside it, and what nobody states is None. Most of these files are read whole. gemma-loupe's examples, 20 for
each of 49,152 features of each of 35 layers, go by in batches.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from sae_lens_gemma4.catalogue.files import Files, files_of
from sae_lens_gemma4.catalogue.label_schemas import SCHEMAS, Example, FeatureLabel, Piece, Schema, Source
from sae_lens_gemma4.catalogue.registry import SEARCH, SAEEntry, releases
from sae_lens_gemma4.errors import DataError, SAEError, check_name

__all__ = ["Example", "FeatureLabel", "iter_feature_labels", "load_feature_labels"]


def load_feature_labels(release: str, sae_id: str, features: Iterable[int] | None = None) -> dict[int, FeatureLabel]:
    """All labels of an SAE by feature, in ascending order. A feature that nobody labelled is not in it.

    Args:
        release: its name in the catalogue.
        sae_id: one of its SAEs.
        features: only these. Where examples lie in large files, this is what bounds the memory used.

    Raises:
        UnknownNameError: no such release or SAE.
        SAEError: it has no labels, or no such feature.
        HubError: a file cannot be fetched.
        DataError: a file is not what its author says it is; names the file and the record.
    """
    gathered: dict[int, list[FeatureLabel]] = {}
    for _, piece in _pieces(release, sae_id, features):
        gathered.setdefault(piece.index, []).append(piece)
    return {index: _whole(gathered[index]) for index in sorted(gathered)}


def iter_feature_labels(release: str, sae_id: str, features: Iterable[int] | None = None) -> Iterator[FeatureLabel]:
    """The same one by one, in the files' order; of a parquet file, one feature and one batch of rows are held.

    Arguments and errors are those of `load_feature_labels`. Names are checked at once, files as they are read.

    Raises:
        DataError: also where the rows of a feature do not lie together: when the feature comes back.
    """
    return _joined(_pieces(release, sae_id, features))


def _joined(pieces: Iterator[Piece]) -> Iterator[FeatureLabel]:
    run: list[FeatureLabel] = []
    begun = set()
    for where, piece in pieces:
        if run and run[0].index != piece.index:
            yield _whole(run)
            run = []
        if not run and piece.index in begun:
            raise DataError(
                f"{where}: feature {piece.index} comes back. load_feature_labels gathers rows so scattered."
            )
        begun.add(piece.index)
        run.append(piece)
    if run:
        yield _whole(run)


def _whole(pieces: list[FeatureLabel]) -> FeatureLabel:
    return replace(pieces[0], examples=tuple(example for piece in pieces for example in piece.examples))


def _pieces(release: str, sae_id: str, features: Iterable[int] | None) -> Iterator[Piece]:
    known = releases()
    found = known[check_name("release", release, known)]
    entry = found.sae(sae_id)
    if entry.labels is None:
        siblings = [sae.id for sae in found.saes if sae.labels]
        have = siblings or [name for name, other in known.items() if any(sae.labels for sae in other.saes)]
        kind = f"SAEs of {release}" if siblings else "Releases"
        raise SAEError(f"{release} has no labels of {sae_id}. {kind} that have some: {', '.join(have) or 'none'}.")
    schema = SCHEMAS[check_name("label schema", str(found.label_schema), SCHEMAS)]
    wanted = None if features is None else frozenset(map(operator.index, features))
    for index in wanted or ():
        if not _exists(index, entry):
            raise SAEError(f"{sae_id} of {release} has no feature {index}; its d_sae is {entry.d_sae}.")
    files = files_of(found)
    return _read(schema, files, _names(files, entry.labels, schema.suffixes), entry, wanted)


def _names(files: Files, labels: str, suffixes: tuple[str, ...]) -> list[str]:
    if not labels.startswith(SEARCH):
        return [labels]
    there = sorted(name for name in files.names() if name.endswith(suffixes))
    if not (found := [name for name in there if re.search(labels.removeprefix(SEARCH), name)]):
        have = ", ".join(there[:12]) or "none"
        kind = " or ".join(suffixes)
        raise SAEError(f"No {kind} file of {files.describe()} matches {labels.removeprefix(SEARCH)!r}, of: {have}.")
    return found


def _read(
    schema: Schema, files: Files, names: list[str], entry: SAEEntry, features: frozenset[int] | None
) -> Iterator[Piece]:
    seen = set()
    for name in names:
        for where, label in schema.parse(Source(files.fetch(name), files.describe(name), entry.hook, features)):
            if not _exists(label.index, entry):
                raise DataError(f"{where}: {entry.id} has no feature {label.index}; its d_sae is {entry.d_sae}.")
            if not schema.by_example:
                if label.index in seen:
                    raise DataError(f"{where}: feature {label.index} has been labelled before.")
                seen.add(label.index)
            if features is None or label.index in features:
                yield where, label


def _exists(index: int, entry: SAEEntry) -> bool:
    return 0 <= index < (entry.d_sae or 2**63)
