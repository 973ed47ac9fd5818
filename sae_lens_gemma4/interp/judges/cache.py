"""What a judge has answered, on disk: a run that was killed or is made again asks no answered question twice.

An SQLite file in a folder, because it is whole after a kill at any time and takes several processes at once. A question
is known by the SHA-256 of everything that its answer depends on. An answer is written before anybody uses it. One that
could not be used is counted, too: a question may be asked `1 + retries` times over all runs, so that one that is never
answered well does not cost something each time; more `retries` ask it again. Prompts and keys are not written.

Beside the answers stands what each judge has spent for them, so that a limit holds for the folder and not for a run.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens_gemma4.errors import ConfigError, DataError

FILE = "judge-answers.sqlite"
_VERSION = 1
_WAIT_S = 60.0
_TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, judge TEXT NOT NULL, text TEXT, "
    "refused INTEGER NOT NULL DEFAULT 0, reason TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS spent (judge TEXT PRIMARY KEY, calls INTEGER NOT NULL, input_tokens INTEGER NOT NULL, "
    "output_tokens INTEGER NOT NULL, assumed INTEGER NOT NULL) WITHOUT ROWID",
)


class Known(NamedTuple):
    """What is known of a question.

    Attributes:
        text: the model's reply, which was usable when it came; None where none was.
        refused: replies that were not.
        reason: of the last of these.
    """

    text: str | None
    refused: int
    reason: str | None


NOTHING = Known(None, 0, None)


class Spent(NamedTuple):
    """What requests used.

    Attributes:
        calls: requests that were, or may be, billed.
        input_tokens, output_tokens: as replies state them.
        assumed: of the calls, those that no reply tells the tokens of, which are entered with the most they can have.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    assumed: int = 0

    def plus(self, other: Spent, sign: int = 1) -> Spent:
        return Spent(*(a + sign * b for a, b in zip(self, other, strict=True)))


def key_of(identity: Mapping[str, Any], system: str, user: str) -> str:
    """SHA-256 of who is asked, by which settings, and of both messages."""
    content = json.dumps([dict(identity), system, user], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


class AnswerCache:
    """Answers in a folder, or in memory where it is None; any number of threads and processes may share a folder.

    Raises:
        ConfigError: the folder cannot be made or written.
        DataError: what is there is no such file, or of another version.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self._lock = threading.Lock()
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.path or ":memory:", timeout=_WAIT_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.OperationalError) as e:
            raise ConfigError(f"Answers cannot be kept in {folder}: {e}. Name a folder that can be written.") from e
        self._prepare()

    def get(self, key: str) -> Known:
        with self._lock, closing(self._run("SELECT text, refused, reason FROM answers WHERE key = ?", key)) as rows:
            row = rows.fetchone()
        return NOTHING if row is None else Known(*row)

    def put(self, key: str, judge: str, text: str) -> None:
        """Keep a usable reply; it is on the disk when this returns."""
        self._write(
            "INSERT INTO answers (key, judge, text) VALUES (?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET text = excluded.text",
            *(key, judge, text),
        )

    def refuse(self, key: str, judge: str, reason: str) -> None:
        """Count a reply that could not be used."""
        self._write(
            "INSERT INTO answers (key, judge, refused, reason) VALUES (?, ?, 1, ?) "
            "ON CONFLICT (key) DO UPDATE SET refused = refused + 1, reason = excluded.reason",
            *(key, judge, reason),
        )

    def spent(self, judge: str) -> Spent:
        """What a judge, by its identity, has spent in this folder, by all runs and with what is under way."""
        with self._lock:
            return self._spent(judge)

    def spend(self, judge: str, change: Spent, lacking: Callable[[Spent], str | None] | None = None) -> str | None:
        """Add to what a judge has spent, unless `lacking` says of what it has spent so far why not.

        No other process spends between the two. It is on the disk when this returns.

        Returns:
            What `lacking` said; None: it was added.
        """
        with self._lock:
            self._run("BEGIN IMMEDIATE").close()
            try:
                spent = self._spent(judge)
                reason = None if lacking is None else lacking(spent)
                if reason is None:
                    statement = "INSERT OR REPLACE INTO spent VALUES (?, ?, ?, ?, ?)"
                    self._run(statement, judge, *spent.plus(change)).close()
                self._run("COMMIT").close()
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
        return reason

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _prepare(self) -> None:
        try:
            self._db.execute("PRAGMA trusted_schema = OFF")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise DataError(f"{self.path} is of version {version}, not {_VERSION}: use another folder.")
            for table in _TABLES:
                self._db.execute(table)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")
            self._db.execute("SELECT key, judge, text, refused, reason FROM answers LIMIT 0")
            self._db.execute("SELECT judge, calls, input_tokens, output_tokens, assumed FROM spent LIMIT 0")
        except sqlite3.Error as e:
            self._db.close()
            raise self._error(e) from e
        except DataError:
            self._db.close()
            raise

    def _spent(self, judge: str) -> Spent:
        statement = "SELECT calls, input_tokens, output_tokens, assumed FROM spent WHERE judge = ?"
        with closing(self._run(statement, judge)) as rows:
            row = rows.fetchone()
        return Spent() if row is None else Spent(*row)

    def _write(self, statement: str, *values: str) -> None:
        with self._lock:
            self._run(statement, *values).close()

    def _run(self, statement: str, *values: str | int) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as e:
            raise self._error(e) from e

    def _error(self, e: sqlite3.Error) -> ConfigError | DataError:
        if isinstance(e, sqlite3.OperationalError):
            return ConfigError(f"{self.path} cannot be written: {e}. Free the disk or end what holds the file.")
        return DataError(f"{self.path} is no file of answers ({e}): move it away, or use another folder.")
