"""The file for Neuronpedia's team: made of an export that is whole, and of no other."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from sae_lens_gemma4.cli import uploading  # noqa: F401  (it adds its command)
from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.neuronpedia.package import pack_for_import

MODEL, SOURCE = "gemma-4-e4b", "21-matryoshka-res-65k"
PLACE = {"modelId": MODEL, "layer": SOURCE}


def rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def write_export(root, source=SOURCE, n_files=2, labels=True):
    """An export by hand: `n_files` of three latents, with two examples each."""
    folder, place = root / MODEL / source, {"modelId": MODEL, "layer": source}
    rows(folder / "release.jsonl", [{"name": "matryoshka"}])
    rows(folder / "model.jsonl", [{"id": MODEL, "layers": 42}])
    rows(folder / "sourceset.jsonl", [{"name": "matryoshka-res-65k", "modelId": MODEL}])
    rows(folder / "source.jsonl", [{"id": source, "modelId": MODEL}])
    for n in range(n_files):
        latents = [str(i) for i in range(3 * n, 3 * n + 3)]
        rows(folder / "features" / f"batch-{n}.jsonl.gz", [{**place, "index": i, "frac_nonzero": 0.5} for i in latents])
        examples = [{**place, "index": i, "id": f"{i}-{k}"} for i in latents for k in (0, 1)]
        rows(folder / "activations" / f"batch-{n}.jsonl.gz", examples)
        if labels:
            rows(folder / "explanations" / f"batch-{n}.jsonl.gz", [{**place, "index": latents[0], "description": "é"}])
    return root


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "export")


def pack(export, out=None):
    return pack_for_import(export, out, progress=False)


def contents(tar):
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened.getmembers()}


def test_the_package_holds_the_export_byte_for_byte_and_says_so(export):
    (export / MODEL / SOURCE / "pretrained_saes.yaml").write_text("a: row\n")
    (export / MODEL / SOURCE / "features" / ".batch-9.jsonl.gz.partial").write_text("half")
    (export / MODEL / "notes.txt").write_text("no part of it")
    out = pack(export)
    assert out == export.parent / "export.tar"
    found = contents(out)
    manifest = {file["path"]: file for file in json.loads(found.pop("MANIFEST.json"))["files"]}
    readme = found.pop("README.txt").decode()
    kinds = ("features", "activations", "explanations")
    names = ["release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl", "pretrained_saes.yaml"]
    names += [f"{kind}/batch-{n}.jsonl.gz" for kind in kinds for n in (0, 1)]
    assert set(found) == set(manifest) == {f"exports/{MODEL}/{SOURCE}/{name}" for name in names}
    for path, data in found.items():
        assert data == (export / path.removeprefix("exports/")).read_bytes()
        assert manifest[path]["bytes"] == len(data)
        assert manifest[path]["sha256"] == hashlib.sha256(data).hexdigest()
    n_rows = {name: manifest[f"exports/{MODEL}/{SOURCE}/{name}"]["rows"] for name in names}
    assert n_rows == {
        **dict.fromkeys(names[:4], 1), "pretrained_saes.yaml": None,
        **{f"{kind}/batch-{n}.jsonl.gz": count for kind, count in zip(kinds, (3, 6, 1), strict=True) for n in (0, 1)},
    }  # fmt: skip
    assert f"model {MODEL}, source {SOURCE}: 6 features, 12 activations, 2 explanations;" in readme
    assert "s3://neuronpedia-datasets/v1/" in readme and f"modelId={MODEL}&sourceId={SOURCE}" in readme


def test_the_same_export_is_the_same_file(export, tmp_path):
    first = pack(export, tmp_path / "a.tar").read_bytes()
    shutil.copytree(export, tmp_path / "copy" / "elsewhere")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert pack(tmp_path / "copy" / "elsewhere", tmp_path / "b.tar").read_bytes() == first
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == ["README.txt", "MANIFEST.json", *sorted(m.name for m in members[2:])]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_one_source_or_several_go_in(export, tmp_path):
    one = contents(pack(export / MODEL / SOURCE, tmp_path / "one.tar"))
    assert one == contents(pack(export / MODEL, tmp_path / "model.tar"))
    assert one == contents(pack(export, tmp_path / "whole.tar"))
    write_export(export, "22-matryoshka-res-65k__l0-34", labels=False)
    both = contents(pack(export))
    assert set(one) < set(both)
    assert b"source 22-matryoshka-res-65k__l0-34: 6 features, 12 activations, 0 explanations;" in both["README.txt"]


def test_an_export_beside_its_dashboards_is_found(export, tmp_path):
    whole = contents(pack(export, tmp_path / "whole.tar"))
    job = tmp_path / "job"
    (job / "dashboards").mkdir(parents=True)
    shutil.move(export, job / "exports")
    assert contents(pack(job)) == whole
    assert (tmp_path / "job.tar").is_file()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-9])


def test_what_is_missing_or_broken_is_named_and_no_file_is_left(export, tmp_path):
    here = export / MODEL / SOURCE
    features, activations = here / "features", here / "activations"
    latent = {**PLACE, "index": "0", "frac_nonzero": 0.5}
    one = features / "batch-1.jsonl.gz"
    cases = [
        (lambda: (here / "model.jsonl").unlink(), r"not whole: model.jsonl is missing in"),
        (lambda: (here / "source.jsonl").write_text(""), r"source.jsonl has no rows"),
        (lambda: rows(here / "source.jsonl", [{"id": SOURCE}] * 2), r"source.jsonl should have one row, of 21-matry"),
        (lambda: rows(here / "source.jsonl", [{"id": "2-x"}]), r"one row, of 21-matryoshka-res-65k; it has \['2-x'\]"),
        (lambda: rows(here / "model.jsonl", [{"id": "gemma-4-e2b"}]), r"of gemma-4-e4b; it has \['gemma-4-e2b'\]"),
        (lambda: rows(here / "sourceset.jsonl", [{}]), r"one row, of matryoshka-res-65k; it has \[None\]"),
        (lambda: rows(here / "release.jsonl", [{"name": ""}]), r"one row, of a release"),
        (lambda: shutil.rmtree(features), r"not whole: .*features has no batch-N.jsonl.gz"),
        (lambda: shutil.rmtree(activations), r"not whole: .*activations has no batch-N.jsonl.gz"),
        (lambda: rows(features / "batch-3.jsonl.gz", [latent]), r"features has no batch-2.jsonl.gz, and has batch-3"),
        (lambda: (activations / "batch-0.jsonl.gz").unlink(), r"activations has no batch-0.jsonl.gz, and has batch-1"),
        (lambda: (activations / "batch-1.jsonl.gz").unlink(), r"has no activations of latent 3, which fires"),
        (lambda: one.unlink(), r"activations/batch-1.jsonl.gz has a row of latent 3, and the export has no such"),
        (lambda: cut_short(activations / "batch-1.jsonl.gz"), r"activations/batch-1.jsonl.gz cannot be unpacked"),
        (lambda: one.write_text("{}"), r"features/batch-1.jsonl.gz cannot be unpacked"),
        (lambda: one.write_bytes(gzip.compress(b"{}\n{no")), r"batch-1.jsonl.gz, line 2, is no JSON"),
        (lambda: one.write_bytes(gzip.compress(b'{"a": NaN}')), r"line 1, is no JSON: NaN"),
        (lambda: one.write_bytes(gzip.compress(b"[1]")), r"line 1, is no row"),
        (lambda: one.write_bytes(gzip.compress(b"\n")), r"batch-1.jsonl.gz has no rows"),
        (lambda: rows(one, [{**latent, "index": "x"}]), r"has a row of latent 'x', which is no number"),
        (lambda: rows(one, [latent]), r"batch-1.jsonl.gz has a latent that the export has"),
        (lambda: rows(one, [{**latent, "index": "3"}, {**PLACE, "index": "4"}]), r"columns \(frac_nonzero\)"),
        (lambda: rows(activations / "batch-1.jsonl.gz", [{**PLACE, "layer": "2-x"}]), r"has a row of another source"),
        (lambda: shutil.rmtree(export / MODEL), r"is no export: it has no folder \{modelId\}/\{sourceId\}"),
    ]
    for n, (damage, message) in enumerate(cases):
        shutil.rmtree(export)
        write_export(export)
        damage()
        with pytest.raises(DataError, match=message):
            pack(export, tmp_path / f"{n}.tar")
    assert not list(tmp_path.glob("*.tar*")) and not list(tmp_path.glob(".*"))


def test_a_folder_of_more_files_than_the_import_sees_is_refused(export, tmp_path):
    write_export(export, n_files=1001)
    with pytest.raises(DataError, match=r"features has 1,001 files, and Neuronpedia's import sees 1,000"):
        pack(export)
    write_export(tmp_path / "more", n_files=1000, labels=False)
    assert len(contents(pack(tmp_path / "more"))) == 2006


def test_a_package_that_cannot_be_written_leaves_the_old_one(export, tmp_path, monkeypatch):
    old = pack(export)
    before = old.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match=r"export.tar cannot be written: No space left on device"):
        pack(export)
    assert old.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["export", "export.tar"]
    with pytest.raises(ConfigError, match="is a folder; name the file to write"):
        pack(export, tmp_path)


def test_what_is_no_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        pack(tmp_path / "nowhere")


def test_the_command_packs(export, tmp_path):
    out = tmp_path / "for_the_team.tar"
    result = CliRunner().invoke(cli, ["upload-neuronpedia", str(export), "--offline", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"{out}: {out.stat().st_size:,} bytes. README.txt in it says how it is imported." in result.stdout
    assert len(contents(out)) == 12


def test_the_check_against_the_sites_database_names_what_is_no_export_at_once(export, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "check_neuronpedia.py"
    (export / MODEL / SOURCE / "source.jsonl").unlink()
    for place, missing in (
        (tmp_path / "nope", "release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl"),
        (export / MODEL / SOURCE, "source.jsonl"),
    ):
        done = subprocess.run([sys.executable, recipe, tmp_path, place], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"{place} is no export, {{modelId}}/{{sourceId}}: it has no {missing}\n"
