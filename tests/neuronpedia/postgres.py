"""Neuronpedia's tables in a real PostgreSQL, and rows that go in by its import's rules.

The tables are made from `tables.yaml`. What happens to a file is what apps/webapp/lib/db/import.ts and
apps/webapp/app/api/admin/import/route.ts of github.com/hijohnnylin/neuronpedia do with it, written anew: order, columns
by the first line, casts by PostgreSQL, what exists already is left alone, and Prisma's strictness for single rows.
"""

import gzip
import json
import subprocess
import tempfile
import warnings
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import yaml

TABLES = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text())
CREATOR = "clkht01d40000jv08hvalcvly"
METADATA = {
    "release.jsonl": ("SourceRelease", ["name"]),
    "model.jsonl": ("Model", ["id"]),
    "sourceset.jsonl": ("SourceSet", ["modelId", "name"]),
    "source.jsonl": ("Source", ["modelId", "id"]),
}
BATCHES = {"features": "Neuron", "activations": "Activation", "explanations": "Explanation"}
IMPORTED = [table for table, _ in METADATA.values()] + list(BATCHES.values())
LISTED = 1000
"""Names that one call for a folder's list answers with."""


class RefusedError(Exception):
    """A row that Prisma would not create."""


@contextmanager
def server():
    """A PostgreSQL of its own; yields how to connect to it.

    Not in pytest's folders: for root the server runs as another user, and a second pytest shuts those to others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a runtime folder that it does not use
        import pgserver

        with tempfile.TemporaryDirectory(prefix="np") as folder:
            for tries_left in (2, 1, 0):
                try:
                    running = pgserver.get_server(folder, cleanup_mode="stop")
                    break
                except subprocess.TimeoutExpired:  # after 10 s, on a busy machine; it goes on starting
                    if not tries_left:
                        raise
            try:
                yield running.get_uri()
            finally:
                running.cleanup()


@contextmanager
def database(uri, name, tables=TABLES):
    """A new database with the tables, and in it the account that imports belong to; yields a connection."""
    import psycopg

    with psycopg.connect(uri, autocommit=True) as first:
        first.execute(f'create database "{name}"')
    with psycopg.connect(uri, dbname=name, autocommit=True) as connection:
        connection.execute(";\n".join(statements(tables)))
        add_account(connection)
        yield connection


def add_account(connection):
    connection.execute(
        'insert into "User" (id, name, "emailUnsubscribeCode") values (%s, %s, %s)', (CREATOR, "bot", "none")
    )


def statements(tables):
    """The SQL that makes the tables; foreign keys come last, as they go round in circles."""
    yield "create extension if not exists vector"
    for name, values in tables["enums"].items():
        yield f'create type "{name}" as enum ({", ".join(map(repr, values))})'
    for name, table in tables["tables"].items():
        yield f'create table "{name}" ({", ".join(map(_column, table["columns"], table["columns"].values()))})'
        for columns in [table["primary"]] if "primary" in table else []:
            yield f'alter table "{name}" add primary key ({_names(columns)})'
        for columns in table.get("unique", []):
            yield f'create unique index on "{name}" ({_names(columns)})'
    for name, table in tables["tables"].items():
        for key in table.get("foreign", []):
            there = f'"{key["of"]}" ({_names(key["to"])})'
            yield f'alter table "{name}" add foreign key ({_names(key["columns"])}) references {there}'


def import_folder(connection, export):
    """All that lies in an export's folder, in the site's order."""
    export = Path(export)
    for file, (table, key) in METADATA.items():
        for line in filter(None, (export / file).read_text(encoding="utf-8").split("\n")):
            create(connection, table, key, json.loads(line))
    for folder, table in BATCHES.items():
        names = sorted(p.name for p in (export / folder).glob("*"))[:LISTED]
        for name in names:
            if name.endswith(".jsonl.gz"):
                with gzip.open(export / folder / name) as file:
                    insert_lines(connection, table, file.read().decode())


def create(connection, table, key, row):
    """One row, unless there is one with its key, as Prisma's `create` takes it.

    Raises:
        RefusedError: a key that is no column, a value of another type than its column's, or none where one is needed.
    """
    columns = TABLES["tables"][table]["columns"]
    there = " and ".join(f'"{name}" = %s' for name in key)
    if connection.execute(f'select 1 from "{table}" where {there}', [row[name] for name in key]).fetchone():
        return
    for name, value in row.items():
        if name not in columns:
            raise RefusedError(f"Unknown argument {name!r} of {table}")
        if not _is_of(value, columns[name]):
            raise RefusedError(f"{table}.{name} is {columns[name]} and not {value!r}")
    for name, column in columns.items():
        if name not in row and "not null" in column and "=" not in column:
            raise RefusedError(f"Argument {name!r} of {table} is missing")
    _insert(connection, table, list(row), json.dumps([row]))


def insert_lines(connection, table, text):
    """The lines of a file, with the columns that its first line and the table share."""
    text = text.replace("\\u0000", " ").strip()
    if table == "Activation":
        text = "\n".join(json.dumps(json.loads(line)) for line in text.split("\n") if line.strip())
    lines = text.split("\n")
    columns = [name for name in json.loads(lines[0]) if name in TABLES["tables"][table]["columns"]]
    for first in range(0, len(lines), 65_000):
        _insert(connection, table, columns, f"[{','.join(lines[first : first + 65_000])}]", " on conflict do nothing")


def counts(connection):
    """How many rows each table that is imported to has."""
    return {table: connection.execute(f'select count(*) from "{table}"').fetchone()[0] for table in IMPORTED}


def rows(connection, table, order, **where):
    """Rows as dictionaries."""
    said = " and ".join(f'"{name}" = %s' for name in where) or "true"
    cursor = connection.execute(f'select * from "{table}" where {said} order by "{order}"', list(where.values()))
    return [dict(zip([column.name for column in cursor.description], row, strict=True)) for row in cursor]


def _insert(connection, table, names, values, rest=""):
    types = {name: TABLES["tables"][table]["columns"][name].split(" = ")[0].removesuffix(" not null") for name in names}
    casts = ", ".join(f'"{name}" {_quoted(type_)}' for name, type_ in types.items())
    connection.execute(
        f'insert into "{table}" ({_names(names)}) select {_names(names)} from '
        f"jsonb_to_recordset(%s::jsonb) as t({casts}){rest}",
        [values],
    )


def _is_of(value, column):
    type_ = column.split(" = ")[0]
    if value is None:
        return "not null" not in type_ and not type_.endswith("[]")
    type_ = type_.removesuffix(" not null")
    if type_.endswith("[]"):
        return isinstance(value, list) and all(_is_of(one, f"{type_[:-2]} not null") for one in value)
    if type_.startswith("timestamp"):
        return isinstance(value, str) and datetime.fromisoformat(value.replace("Z", "+00:00")).tzinfo is not None
    if type_ in TABLES["enums"]:
        return value in TABLES["enums"][type_]
    kinds = {"text": str, "boolean": bool, "integer": int, "double precision": (int, float), "jsonb": (dict, list)}
    return isinstance(value, kinds[type_]) and (type_ == "boolean" or not isinstance(value, bool))


def _column(name, column):
    type_, has_default, default = column.partition(" = ")
    bare = type_.removesuffix(" not null")
    written = f'"{name}" {_quoted(bare)}{" not null" if bare != type_ else ""}'
    if not has_default:
        return written
    literal = {"now": "current_timestamp", "[]": f"array[]::{bare}", '""': "''"}.get(default, default)
    return f"{written} default {literal!r}" if bare in TABLES["enums"] else f"{written} default {literal}"


def _quoted(type_):
    return f'"{type_}"' if type_ in TABLES["enums"] else type_


def _names(columns):
    return ", ".join(f'"{name}"' for name in columns)
