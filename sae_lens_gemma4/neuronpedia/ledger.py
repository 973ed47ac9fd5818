"""What was sent to Neuronpedia, written down so that no latent is sent twice.

Sending a latent again doubles its examples on the site, which tells nobody and offers no way to remove them. So a
batch is noted before it is sent and after it arrived. One that was noted as being sent when the process died, or when
no answer came, is looked up on the site first; the site stores a batch whole or not at all.

The file is JSON lines, on the disk before anything that relies on it happens. A line that a kill cut short is dropped:
then what it was to say had not begun, or is looked up. The file begins with the first batch, and one of which nothing
arrived is begun anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sae_lens_gemma4.errors import ConfigError, DataError

_SCHEMA = 1
_SENDING, _SENT, _NOT_SENT = "sending", "sent", "not sent"
_FIRST = b'{"schema": '
"""How a ledger begins."""


class Ledger:
    """The record of one upload.

    Attributes:
        sent: latents that are on the site.
        unclear: batches of which nobody knows whether they arrived, and when they were sent, by `time.time`.

    Args:
        path: its file, which need not be there.
        target: where the upload goes.
        content: a digest of all that it sends.

    Raises:
        ConfigError: the file cannot be read or, later, written.
        DataError: it is no ledger, or one of another upload.
    """

    def __init__(self, path: Path, target: str, content: str) -> None:
        self.path = path
        self.sent: set[int] = set()
        self.unclear: dict[tuple[int, ...], float] = {}
        self._header = {"schema": _SCHEMA, "target": target, "content": content}
        try:
            text = path.read_bytes() if path.exists() else b""
        except OSError as e:
            raise ConfigError(f"What is sent cannot be noted in {path}: {e.strerror}.") from e
        whole = text[: text.rfind(b"\n") + 1]
        found = self._lines(whole, text)
        for line in found[1:]:
            self._take(line)
        if self.sent or self.unclear:
            self._check(found[0])
            self._length = len(whole)
        else:
            self._length = 0

    def sending(self, indices: Sequence[int]) -> None:
        """Note that these are sent from now on."""
        self._note(_SENDING, indices)

    def arrived(self, indices: Sequence[int]) -> None:
        """Note that these are on the site."""
        self._note(_SENT, indices)

    def did_not_arrive(self, indices: Sequence[int]) -> None:
        """Note that these are not on the site, though they were sent."""
        self._note(_NOT_SENT, indices)

    def _note(self, state: str, indices: Sequence[int]) -> None:
        line = {"state": state, "indices": list(indices), "at": round(time.time(), 3)}
        try:
            self._write(line)
        except OSError as e:
            raise ConfigError(f"What is sent cannot be noted in {self.path}: {e.strerror}. Sending was stopped.") from e
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        try:
            state, batch, at = line["state"], tuple(map(int, line["indices"])), float(line["at"])
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{self.path} has a line that is none of a ledger: {line}.") from e
        if state == _SENDING:
            self.unclear[batch] = at
        else:
            self.unclear.pop(batch, None)
            self.sent.update(batch if state == _SENT else ())

    def _write(self, line: dict[str, Any]) -> None:
        """A line after those that count; what a kill cut short goes, and before the first all that was there."""
        lines = [line] if self._length else [self._header, line]
        text = b"".join(json.dumps(one).encode() + b"\n" for one in lines)
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._length)
            file.seek(self._length)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(text)

    def _lines(self, whole: bytes, text: bytes) -> list[dict[str, Any]]:
        """What a ledger's whole lines say."""
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError) as e:
            raise DataError(f"{self.path} is no ledger of an upload: {e}.") from e
        if not all(isinstance(line, dict) for line in lines) or not _FIRST.startswith(text[: len(_FIRST)]):
            raise DataError(f"{self.path} is no ledger of an upload.")
        if lines and (lines[0].get("schema") != _SCHEMA or lines[0].keys() != self._header.keys()):
            raise DataError(f"{self.path} is no ledger of an upload that this version can read.")
        return lines

    def _check(self, found: dict[str, Any]) -> None:
        if found["target"] != self._header["target"]:
            raise DataError(f"{self.path} is of an upload to {found['target']}, not to {self._header['target']}.")
        if found["content"] != self._header["content"]:
            raise DataError(
                f"{self.path} is of an upload of other content: the dashboards or the labels have changed since. The "
                "site replaces nothing that it has; send these under another set name, or restore what was there."
            )


@contextmanager
def only_upload(path: Path) -> Iterator[None]:
    """Keep other processes from the upload of this ledger.

    Raises:
        ConfigError: another process is at it, or its folder cannot be written.
    """
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        raise ConfigError(f"Another process is at the upload of {path.name}.") from e
    except OSError as e:
        raise ConfigError(f"What is sent cannot be noted in {path}: {e.strerror}.") from e
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()
