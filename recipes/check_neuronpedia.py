"""Hold an export, and what the tests know of Neuronpedia's database, against Neuronpedia's own migrations.

python recipes/check_neuronpedia.py CHECKOUT EXPORT    # of github.com/hijohnnylin/neuronpedia; what was exported

The migrations run on a PostgreSQL of their own (pip install pgserver "psycopg[binary]"). What they made is compared
with tests/neuronpedia/tables.yaml, and the keys of rows with Prisma's schema; then the export is imported, twice.
Exit status 1 if anything differs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.neuronpedia import postgres  # noqa: E402

COLUMNS = """
select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped order by a.attname
"""
UNIQUE = """
select i.indisprimary, array(select a.attname::text from unnest(i.indkey) with ordinality k(n, o)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.n order by k.o) as columns
from pg_index i where i.indrelid = %s::regclass and i.indisunique order by columns
"""
FOREIGN = """
select c.confrelid::regclass::text, array(select a.attname::text from unnest(c.conkey) with ordinality k(n, o)
    join pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.n order by k.o) as columns,
    array(select a.attname::text from unnest(c.confkey) with ordinality k(n, o)
    join pg_attribute a on a.attrelid = c.confrelid and a.attnum = k.n order by k.o)
from pg_constraint c where c.conrelid = %s::regclass and c.contype = 'f' order by columns
"""
LABELS = "select e.enumlabel from pg_enum e join pg_type t on t.oid = e.enumtypid where t.typname = %s order by 1"


def shape(connection: Any, table: str) -> dict[str, Any]:
    """What a table is: columns, unique keys, foreign keys to tables that are listed."""
    name = f'"{table}"'
    foreign = [key for key in connection.execute(FOREIGN, [name]) if key[0].strip('"') in postgres.TABLES["tables"]]
    return {
        "columns": list(connection.execute(COLUMNS, [name])),
        "unique keys": list(connection.execute(UNIQUE, [name])),
        "foreign keys": foreign,
    }


def scalars(schema: str, model: str) -> set[str]:
    """The fields of a model that Prisma's `create` takes a plain value for: those whose type is no model."""
    models = set(re.findall(r"^model (\w+) \{", schema, re.MULTILINE))
    body = re.search(rf"^model {model} \{{(.*?)^\}}", schema, re.MULTILINE | re.DOTALL)
    assert body is not None
    fields = re.findall(r"^  (\w+)\s+(\w+)", body[1], re.MULTILINE)
    return {name for name, kind in fields if kind not in models}


def check(checkout: Path, export: Path) -> list[str]:
    """What is not as it should be, a line each; prints what is."""
    if missing := [file for file in postgres.METADATA if not (export / file).is_file()]:
        return [f"{export} is no export, {{modelId}}/{{sourceId}}: it has no {', '.join(missing)}"]
    import psycopg

    prisma = checkout / "apps" / "webapp" / "prisma"
    migrations = sorted(prisma.glob("migrations/*/migration.sql"))
    if not migrations:
        return [f"{prisma} has no migrations"]
    wrong = []
    with postgres.server() as uri, psycopg.connect(uri, autocommit=True) as theirs:
        for migration in migrations:
            theirs.execute(migration.read_text(encoding="utf-8"))  # type: ignore[arg-type]
        print(f"{len(migrations)} migrations ran.")
        with postgres.database(uri, "listed") as ours:
            for table in postgres.TABLES["tables"]:
                here, there = shape(ours, table), shape(theirs, table)
                for part in here:
                    if here[part] != there[part]:
                        odd = [x for x in here[part] + there[part] if (x in here[part]) != (x in there[part])]
                        wrong.append(f"tables.yaml: {part} of {table} differ: {odd}")
            for enum in postgres.TABLES["enums"]:
                if list(ours.execute(LABELS, [enum])) != list(theirs.execute(LABELS, [enum])):
                    wrong.append(f"tables.yaml: {enum} has other values")
        print(f"{len(postgres.TABLES['tables'])} tables compared with tables.yaml.")
        schema = (prisma / "schema.prisma").read_text(encoding="utf-8")
        for file, (table, _) in postgres.METADATA.items():
            row = json.loads((export / file).read_text(encoding="utf-8"))
            if unknown := set(row) - scalars(schema, table):
                wrong.append(f"{file}: Prisma's {table} has no {', '.join(sorted(unknown))}")
        print(f"Keys of {len(postgres.METADATA)} rows compared with schema.prisma.")
        postgres.add_account(theirs)
        postgres.import_folder(theirs, export)
        once = postgres.counts(theirs)
        postgres.import_folder(theirs, export)
        if (twice := postgres.counts(theirs)) != once:
            wrong.append(f"A second import changed the number of rows: {once}, then {twice}")
        print("Imported:", ", ".join(f"{n:,} of {table}" for table, n in once.items()))
    return wrong


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    wrong = check(*map(Path, sys.argv[1:]))
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
