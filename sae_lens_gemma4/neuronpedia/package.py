"""An export for Neuronpedia's team as one file that they can check and import.

The import of a public instance is for its administrators, who copy the files into their bucket and name the source.
It says little when something is amiss: a file that is not there is an exception half-way, and an example of a latent
that is not there fails its whole file. So a package is made only of an export that is whole.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.neuronpedia.names import SourceName
from sae_lens_gemma4.neuronpedia.row_files import BATCH_NAME, BATCHES, MAX_FILES, SINGLE, UPSTREAM

_PLACES = ("", "[!.]*/", "[!.]*/[!.]*/", "exports/[!.]*/[!.]*/")
"""Where a source lies in a folder that is named as an export."""


@dataclass(frozen=True)
class Packed:
    """A file of a package: its path in it, its size and SHA-256 as it lies there, and its rows if it has rows."""

    path: str
    bytes: int
    sha256: str
    rows: int | None


def pack_for_import(export_dir: str | Path, out: str | Path | None = None, *, progress: bool = True) -> Path:
    """Check an export and write it as one tar file, the same bytes for the same export.

    The tar has `README.txt`, `MANIFEST.json` (each file with its size, SHA-256 and rows) and the export as
    `exports/{modelId}/{sourceId}/…`, without files that are no part of one.

    Args:
        export_dir: one or more `{modelId}/{sourceId}/` lie in it, or in its subfolder `exports`; or it is such a
            `{modelId}` or `{sourceId}`.
        out: the file, replaced if it is there; the export's name with `.tar` if None.

    Returns:
        The file.

    Raises:
        DataError: no export, or one that is not whole; says what is missing or cannot be read.
        ConfigError: the file cannot be written.
    """
    export_dir = Path(export_dir)
    if not export_dir.is_dir():
        raise DataError(f"{export_dir} is no folder.")
    out = export_dir.resolve().with_name(f"{export_dir.resolve().name}.tar") if out is None else Path(out)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write.")
    if not (sources := sources_in(export_dir)):
        raise DataError(
            f"{export_dir} is no export: it has no folder {{modelId}}/{{sourceId}} with {', '.join(SINGLE)}. "
            "sae-lens-gemma4 export-neuronpedia makes one."
        )
    root = sources[0].parent.parent
    packed: dict[str, list[Packed]] = {}
    for folder in sources:
        packed[f"{folder.parent.name}/{folder.name}"] = list(_checked(folder, progress))
    manifest = {"files": [asdict(file) for files in packed.values() for file in files]}
    texts = {
        "README.txt": _readme(packed).encode(),
        "MANIFEST.json": (json.dumps(manifest, indent=1) + "\n").encode(),
    }
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for name, text in texts.items():
                    tar.addfile(_entry(name, len(text)), io.BytesIO(text))
                for name in sorted(one.path for files in packed.values() for one in files):
                    path = root.joinpath(*name.split("/")[1:])
                    with path.open("rb") as source:
                        tar.addfile(_entry(name, path.stat().st_size), source)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as e:
        raise ConfigError(f"The package {out} cannot be written: {e.strerror or e}.") from e
    finally:
        partial.unlink(missing_ok=True)
    return out


def sources_in(folder: Path) -> list[Path]:
    """The folders `{modelId}/{sourceId}` of exports in a folder, whole or not; none if it has none."""
    for place in _PLACES:
        found = {path.parent for name in (*SINGLE, *BATCHES) for path in folder.resolve().glob(place + name)}
        if found:
            return sorted(found)
    return []


def _checked(folder: Path, progress: bool) -> Iterator[Packed]:
    """Each file of a source, once it has been read through."""
    name = SourceName.parse(f"{folder.parent.name}/{folder.name}")
    if missing := [file for file in SINGLE if not (folder / file).is_file()]:
        raise DataError(f"The export of {name} is not whole: {', '.join(missing)} is missing in {folder}.")
    whose = {"release.jsonl": None, "model.jsonl": name.model_id}
    whose |= {"sourceset.jsonl": name.set_name, "source.jsonl": name.source_id}
    for file, key in SINGLE.items():
        rows, packed = _read(folder / file, name)
        named = [row.get(key) for row in rows]
        if len(rows) != 1 or not named[0] or named[0] != (whose[file] or named[0]):
            raise DataError(f"{folder / file} should have one row, of {whose[file] or 'a release'}; it has {named}.")
        yield packed
    if (folder / UPSTREAM).is_file():
        yield _packed(folder / UPSTREAM, _bytes(folder / UPSTREAM), name, None)
    latents, firing, shown = set[str](), set[str](), set[str]()
    for kind in BATCHES:
        files = _batches(folder / kind, needed=kind != "explanations")
        for path in tqdm(files, f"checking {kind}", disable=not progress, unit="file"):
            rows, packed = _read(path, name)
            _check_rows(rows, path, name)
            found = {str(row["index"]) for row in rows}
            if kind != "features" and not found <= latents:
                stray = min(found - latents)
                raise DataError(f"{path} has a row of latent {stray}, and the export has no such latent.")
            if kind == "features":
                if len(found) < len(rows) or found & latents:
                    raise DataError(f"{path} has a latent that the export has already.")
                latents |= found
                firing |= {str(row["index"]) for row in rows if row.get("frac_nonzero")}
            if kind == "activations":
                shown |= found
            yield packed
    if silent := sorted(firing - shown, key=int):
        raise DataError(f"The export is not whole: {folder} has no activations of latent {silent[0]}, which fires.")


def _check_rows(rows: list[dict[str, Any]], path: Path, name: SourceName) -> None:
    for row in rows:
        if (row.get("modelId"), row.get("layer")) != (name.model_id, name.source_id):
            raise DataError(f"{path} has a row of another source than {name}.")
        if not re.fullmatch(r"\d{1,9}", str(row.get("index"))):
            raise DataError(f"{path} has a row of latent {row.get('index')!r}, which is no number.")
        if row.keys() != rows[0].keys():
            other = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise DataError(
                f"{path} has rows of different columns ({other}); the import takes those of the first alone."
            )


def _batches(folder: Path, needed: bool) -> list[Path]:
    """The batches of a folder in their order."""
    numbers = {int(match[1]): path for path in folder.glob("*") if (match := BATCH_NAME.fullmatch(path.name))}
    if needed and not numbers:
        raise DataError(f"The export is not whole: {folder} has no batch-N.jsonl.gz.")
    if len(numbers) > MAX_FILES:
        raise DataError(f"{folder} has {len(numbers):,} files, and Neuronpedia's import sees {MAX_FILES:,} of them.")
    last = max(numbers, default=-1)
    if gaps := sorted(set(range(last)) - set(numbers)):
        raise DataError(f"The export is not whole: {folder} has no batch-{gaps[0]}.jsonl.gz, and has batch-{last}.")
    return [numbers[number] for number in sorted(numbers)]


def _read(path: Path, name: SourceName) -> tuple[list[dict[str, Any]], Packed]:
    """The rows of a file, and what the manifest says of it."""
    data = _bytes(path)
    try:
        text = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} cannot be unpacked: {e}. Make the export again.") from e
    rows = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, parse_constant=_refuse)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{path}, line {number}, is no JSON: {e}. Make the export again.") from e
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}, is no row.")
            rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows, and the import fails on a file without.")
    return rows, _packed(path, data, name, len(rows))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}.") from e


def _packed(path: Path, data: bytes, name: SourceName, rows: int | None) -> Packed:
    inside = f"{path.parent.name}/{path.name}" if path.suffix == ".gz" else path.name
    return Packed(f"exports/{name}/{inside}", len(data), hashlib.sha256(data).hexdigest(), rows)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON's")


def _entry(name: str, size: int) -> tarfile.TarInfo:
    """A file's header, with nothing of this machine or hour."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry


def _readme(packed: dict[str, list[Packed]]) -> str:
    lines = ["Sparse autoencoders for Neuronpedia, in the form that its import reads.", ""]
    for source, files in packed.items():
        rows = {kind: sum(f.rows or 0 for f in files if f"/{kind}/" in f.path) for kind in BATCHES}
        counts = ", ".join(f"{n:,} {kind}" for kind, n in rows.items())
        model_id, source_id = source.split("/")
        size = f"{sum(f.bytes for f in files):,} bytes in {len(files)} files"
        lines.append(f"  model {model_id}, source {source_id}: {counts}; {size}")
    lines += [
        "",
        "To import: copy what is in exports/ to v1/ of the datasets bucket (s3://neuronpedia-datasets/v1/),",
        "so that a source lies at v1/{modelId}/{sourceId}/, and import it in the admin panel, or by",
        "",
        *(f"  GET /api/admin/import?modelId={m}&sourceId={s}" for m, s in (source.split("/") for source in packed)),
        "",
        "The import leaves rows that are there already as they are, so that it can be run again. Explanations have no",
        "embeddings.",
        "",
        f"{UPSTREAM} is no part of the import: it is the row that an inference server needs in sae_lens.",
        "MANIFEST.json has the size, SHA-256 and number of rows of each file.",
        "Made by sae-lens-gemma4 from dashboards in sae-dashboard's form.",
        "",
    ]
    return "\n".join(lines)
