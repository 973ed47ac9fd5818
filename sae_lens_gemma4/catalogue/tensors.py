"""Weights files as data: tensors by key, and what else a file states. Nothing in a file is ever executed.

safetensors files and torch's zip files are mapped, not copied, so that reading costs what touching the bytes costs.
As with safetensors' own `load_file`, a file must then not be written over in place while its tensors are in use.
`.pt` files go through torch's restricted unpickler. One public release wraps its weights with a config object of its
own class; such a class is read into an inert stand-in, and any other is refused.
"""

from __future__ import annotations

import json
import re
import reprlib
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from sae_lens_gemma4.errors import SAEError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
_ALLOWING = threading.Lock()  # what torch allows in pickles, it allows to a whole process
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


class _Stated:
    """An inert stand-in for a config object in a pickle: it has the object's fields and nothing else."""


_STAND_INS: list[Any] = [(_Stated, name) for name in ("sae.sae_model.SAEConfig", "sae_model.SAEConfig")]
"""Of SKwra/toolcalling-sae, whose `TopKSAE.save` pickles its config (github.com/SKURA502/agent-sae)."""


@dataclass(frozen=True)
class Contents:
    """What a weights file holds. From a header alone, tensors are on torch's meta device: shapes and dtypes."""

    tensors: dict[str, torch.Tensor]
    stated: dict[str, Any] = field(default_factory=dict)
    """Numbers and texts that lie beside the tensors."""


def read(path: Path, where: str) -> Contents:
    """All of a weights file, mapped where its form allows.

    Raises:
        SAEError: not a weights file, truncated, or one that would execute code; `where` names it.
    """
    with _as_sae_error(where):
        _refuse_pointer(path, where)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                return Contents({key: f.get_tensor(key) for key in f.keys()})  # noqa: SIM118  (not a dict)
        contents = _flattened(_unpickled(path, mmap=_can_be_mapped(path)), where)
        for key, tensor in contents.tensors.items():
            if tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
                raise SAEError(f"{where}: {key} has shape {list(tensor.shape)} and not so many numbers.")
        return contents


def read_header(file: BinaryIO, name: str, where: str) -> Contents:
    """Keys, shapes and dtypes of a weights file, from as few of its bytes as its form allows.

    Raises:
        SAEError: as `read`.
    """
    with _as_sae_error(where):
        if name.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise SAEError(f"{where} is not a safetensors file: its header would be {length} bytes long.")
            header = json.loads(file.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            return Contents(
                {k: torch.empty(v["shape"], dtype=_DTYPES[v["dtype"]], device="meta") for k, v in entries.items()}
            )
        return _flattened(_unpickled(file, map_location="meta"), where)


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        SAEError: it does not.
    """
    with _as_sae_error(where):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise SAEError(f"{where} holds a JSON {type(content).__name__}, not an object.")
    return content


def _refuse_pointer(path: Path, where: str) -> None:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise SAEError(f"{where} is a git-lfs pointer, not the file: fetch it with git lfs pull, or from the hub.")


def _can_be_mapped(path: Path) -> bool:
    """Whether the zip's records are as long as the storages that the pickle speaks of; mapping trusts that they are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        records = [r for r in archive.infolist() if "/data/" in r.filename]
    tensors = list(_tensors_in(_unpickled(path, map_location="meta")))
    if any(t.layout is not torch.strided for t in tensors):
        return False
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    stored = all(r.compress_type == zipfile.ZIP_STORED for r in records)
    return stored and sorted(storages.values()) == sorted(r.file_size for r in records)


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors_in(value)


def _unpickled(file: Path | BinaryIO, map_location: str = "cpu", mmap: bool | None = None) -> Any:
    with _ALLOWING, torch.serialization.safe_globals(_STAND_INS):
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)


@contextmanager
def _as_sae_error(where: str) -> Iterator[None]:
    """Parsers of untrusted files raise what they happen to; the caller gets one class that names the file."""
    try:
        yield
    except SAEError:
        raise
    except FileNotFoundError as e:
        raise SAEError(f"There is no file {where}.") from e
    except SafetensorError as e:
        raise SAEError(f"{where} is not a whole safetensors file: {e}") from e
    except Exception as e:
        if unsafe := re.search(r"GLOBAL (\S+)|Unsupported class \S+", str(e)):
            raise SAEError(
                f"{where} is refused: to read it would run code of its own ({unsafe[0].removeprefix('GLOBAL ')}). "
                "Only tensors, numbers and texts are read."
            ) from e
        reason = (str(e).strip().splitlines() or ["no reason given"])[0][:200]
        raise SAEError(f"{where} cannot be read: {type(e).__name__}: {reason}") from e


def _flattened(content: Any, where: str) -> Contents:
    """Tensors by key from a state dict, or from the one state dict within a checkpoint."""
    if not isinstance(content, Mapping):
        raise SAEError(f"{where} holds a {type(content).__name__}, not a dict of tensors.")
    if strange := [k for k in content if not isinstance(k, str)]:
        raise SAEError(f"{where} has the key {reprlib.repr(strange[0])}, which is no text.")
    tensors = {k: v.detach() for k, v in content.items() if isinstance(v, torch.Tensor)}
    if odd := [k for k, v in tensors.items() if v.layout is not torch.strided or v.is_quantized]:
        raise SAEError(f"{where}: {odd[0]} is sparse or quantised; only plain tensors are read.")
    stated = {k: v for k, v in content.items() if isinstance(v, bool | int | float | str)}
    inner = {k: v for k, v in content.items() if isinstance(v, Mapping) and _holds_matrix(v)}
    for value in content.values():
        if isinstance(value, _Stated):
            stated |= vars(value)
    if _holds_matrix(tensors) or not inner:
        return Contents(tensors, stated)
    if len(inner) > 1:
        raise SAEError(f"{where} holds several sets of weights: {', '.join(map(str, inner))}.")
    ((_, only),) = inner.items()
    nested = _flattened(only, where)
    return Contents(nested.tensors, stated | nested.stated)


def _holds_matrix(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(v, torch.Tensor) and v.ndim == 2 for v in mapping.values())
