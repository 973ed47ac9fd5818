"""What is told of the catalogue: nothing that is stated may be missing, and nothing may be told otherwise."""

import inspect
import math
import re
from dataclasses import fields, replace

import pytest
import yaml
from sae_lens.loading import pretrained_saes_directory

from sae_lens_gemma4.catalogue import table
from sae_lens_gemma4.catalogue.registry import CAVEATS, SAEEntry, parse_release, releases
from sae_lens_gemma4.errors import ConfigError, UnknownNameError

ALL = releases()
ATAWFEEK = "gemma-4-e4b-it-res-matryoshka-atawfeek"
EMBEDDED = "gemma-4-demo-res-matryoshka-embedded"
PATHS = {name: r for name, r in ALL.items() if r.repo_type != "package" and all(sae.path is not None for sae in r.saes)}


def release(saes, **facts):
    stated = {"repo_id": "lab/saes", "repo_type": "model", "model": "m", "architecture": "topk"}
    return parse_release("r", stated | {"sources": {"default": "the card"}, "saes": saes} | facts)


def sae(layer, **facts):
    return {"id": f"layer_{layer}", "path": f"l{layer}", "hook": f"blocks.{layer}.hook_resid_post"} | facts


def rows(grid):
    return [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def test_the_summary_has_a_release_in_one_row():
    (row,) = rows(table.summary([ALL[ATAWFEEK]]))
    assert row == {
        "name": ATAWFEEK, "model": "gemma-4-E4B-it", "hook": "hook_resid_post", "layers": "7, 21, 35",
        "architecture": "matryoshka", "d_sae": "65,536", "k": "100", "l0": "93.7–101.9", "SAEs": "3",
        "repository": "atawfeek/gemma-4-e4b-it-saes", "licence": "Apache-2.0", "caveats": "conflict",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "written"),
    [([3], "3"), ([0, 1, 2, 3], "0–3"), ([4, 0, 1], "0, 1, 4"), ([1, 2, 3, 7, 9, 10, 11], "1–3, 7, 9–11")],
)
def test_layers_are_written_as_ranges(layers, written):
    assert rows(table.summary([release([sae(layer) for layer in layers])]))[0]["layers"] == written


def test_what_is_not_stated_is_a_dash():
    (row,) = rows(table.summary([release([{"id": "final", "path": "a.pt", "hook": "ln_final.hook_out"}])]))
    assert {row[c] for c in ("layers", "d_sae", "k", "l0", "licence")} == {"–"}
    assert row["hook"] == "ln_final.hook_out"


@pytest.mark.parametrize("width", [20, 60, 80, 100, 120, 160, 1000])
def test_columns_fit_a_console_and_are_whole(width):
    full = table.summary(ALL.values())
    grid = full.fitting(width, gap=2)
    assert [row[0] for row in grid.rows] == list(ALL)
    widest = sum(max(map(len, column)) + 2 for column in zip(grid.columns, *grid.rows, strict=True))
    assert widest <= max(width, 2 + max(map(len, ALL)))
    assert grid == full if width == 1000 else "repository" not in grid.columns
    assert [c for c in full.columns if c in grid.columns] == list(grid.columns)
    for i, column in enumerate(grid.columns):
        assert [row[i] for row in grid.rows] == [row[full.columns.index(column)] for row in full.rows]


def test_every_column_is_kept_where_there_is_room():
    for r in ALL.values():
        assert table.saes(r).fitting(10_000, gap=2) == table.saes(r)


def test_saes_that_differ_by_layer_alone_are_one_row():
    layered = [sae(layer, path=f"layer_{layer:02d}_s0/16", k=16) for layer in range(18)]
    (row,) = rows(table.saes(release(layered), compact=True))
    assert row == {"id": "layer_{layer}", "layers": "0–17", "path": "layer_{layer:02d}_s0/16"}
    odd = [*layered, sae(18, k=32)]
    assert [row["k"] for row in rows(table.saes(release(odd), compact=True))] == ["16", "32"]
    assert len(table.saes(release(odd)).rows) == 19


def test_numbers_that_are_not_the_layer_do_not_stand_for_it():
    two = [sae(layer, id=f"layer_{layer}_run_{run}", path=f"p{run}") for layer, run in ((1, 4), (2, 7))]
    assert [row["id"] for row in rows(table.saes(release(two), compact=True))] == ["layer_1_run_4", "layer_2_run_7"]


@pytest.mark.parametrize("name", ALL)
def test_compact_rows_stand_for_just_the_saes_there_are(name):
    def numbers(layers):
        for first, last in re.findall(r"(\d+)(?:–(\d+))?", layers) or [("0", "0")]:  # a dash: outside the layers
            yield from range(int(first), int(last or first) + 1)

    def filled(template, layer):
        return re.sub(r"\{layer(?::(\w+))?\}", lambda found: format(layer, found[1] or ""), template)

    written = [
        (filled(row["id"], layer), filled(row["path"], layer))
        for row in rows(table.saes(ALL[name], compact=True))
        for layer in numbers(row["layers"])
    ]
    assert sorted(written) == sorted((entry.id, entry.folder_name) for entry in ALL[name].saes)


@pytest.mark.parametrize("name", ALL)
def test_a_section_has_every_fact_source_and_caveat(name):
    r, text = ALL[name], table.section(ALL[name]).replace(r"\|", "|")
    assert text.startswith(f"### {name}\n\n{r.description}\n\n")
    for sentence in (*r.sources.values(), *(c.text for c in r.caveats), *([r.url] if r.url else [])):
        assert sentence in text
    for fact in ("model", "architecture", "form", "revision", "weights", "config", "label_schema", "licence"):
        assert getattr(r, fact) is None or f"| `{fact}` | {getattr(r, fact)} |" in text
    not_stated = re.findall(r"`(\w+)`", text.partition("Not stated by anybody: ")[2].partition("\n")[0])
    for field in fields(SAEEntry):
        values = [getattr(entry, field.name) for entry in r.saes]
        if field.name in ("id", "hook", "path", "search", "labels"):
            continue
        for value in values:
            if value is not None:
                assert f" {table.shown(value)} |" in text or f"`{value}`" in text
                assert field.name not in not_stated
        expected = field.name not in ("encoder", "neuronpedia")
        assert (field.name in not_stated) == (expected and set(map(repr, values)) == {"None"})
    assert ("licence" in not_stated) == (r.licence is None)


def test_tables_of_the_page_are_whole():
    text = table.page(ALL.values())
    assert all(f"\n### {name}\n" in text and f"| [{name}](#{name}) |" in text for name in ALL)
    assert all(f"- **{kind}**: {meaning}" in text for kind, meaning in CAVEATS.items())
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) == 1 + 2 * len(ALL)
    for block in blocks:
        assert len({len(cells(line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize("name", ALL)
def test_the_console_is_told_every_fact_and_source(name):
    r, text = ALL[name], table.in_words(ALL[name])
    assert all(source in text for source in r.sources.values())
    assert all(f"{c.kind}: {c.text}" in text for c in r.caveats)
    assert all(f"  {fact.name}: {fact.value}" in text for fact in table.facts(r))
    assert table.how_to_load(r) in text


def test_the_way_to_load_works():
    namespace = {}
    exec(table.how_to_load(ALL[EMBEDDED]), namespace)
    assert namespace["sae"].cfg.d_sae == 2048


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("ATAWFEEK", [ATAWFEEK]),
        (EMBEDDED, [EMBEDDED]),
        ("base_only", ["gemma-4-e4b-res-matryoshka-decoderesearch"]),
        ("google/gemma-3", ["gemma-3-27b-it-mlp-batchtopk-uzaymacar", "gemma-3-27b-it-res-batchtopk-uzaymacar"]),
        ("", list(ALL)),
    ],
)
def test_a_pattern_matches_name_author_model_and_caveat(pattern, found):
    assert [r.name for r in table.matching(pattern)] == found


def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'atawfek'\. Did you mean 'atawfeek'"):
        table.matching("atawfek")
    with pytest.raises(UnknownNameError, match=r"'zzz'\. Known: gemma-"):
        table.matching("zzz")


@pytest.mark.parametrize("name", PATHS)
def test_stock_reads_the_upstream_entry_as_the_release(name, tmp_path, monkeypatch):
    (tmp_path / "pretrained_saes.yaml").write_text(table.upstream_yaml(PATHS[name]))
    monkeypatch.setattr(pretrained_saes_directory, "files", lambda package: tmp_path)
    row = inspect.unwrap(pretrained_saes_directory.get_pretrained_saes_directory)()[name]
    ours = PATHS[name].lookup()
    assert (row.release, row.repo_id, row.model) == (ours.release, ours.repo_id, ours.model)
    assert list(row.saes_map.items()) == list(ours.saes_map.items())
    stock = PATHS[name].form == "sae_lens"
    assert row.conversion_func == (None if stock else ours.conversion_func)
    for theirs, mine, absent in ((row.expected_var_explained, ours.expected_var_explained, 1.0),
                                 (row.expected_l0, ours.expected_l0, 0.0)):  # fmt: skip
        assert theirs == {sae_id: absent if math.isnan(value) else value for sae_id, value in mine.items()}
    assert {sae_id: slug for sae_id, slug in row.neuronpedia_id.items() if slug} == ours.neuronpedia_id
    assert (row.norm_scaling_factor, row.config_overrides) == (ours.norm_scaling_factor, ours.config_overrides)


def test_an_upstream_entry_has_stock_s_keys_in_their_order():
    text = table.upstream_yaml(ALL["gemma-4-e4b-res-matryoshka-decoderesearch"])
    assert text.startswith("gemma-4-e4b-res-matryoshka-decoderesearch:\n  model: google/gemma-4-E4B\n  repo_id: ")
    assert "\n  saes:\n  - id: layer_7_width_65k_l0_100\n    path: gemma-4-e4b/btk-mat-layer-7-k-100\n" in text
    assert "    neuronpedia: gemma-4-e4b/21-matryoshka-res-65k\n" in text
    assert "l0:" not in text
    (entry,) = yaml.safe_load(table.upstream_yaml(ALL["gemma-4-e2b-res-topk-rhizomatous"])).values()
    assert list(entry) == ["conversion_func", "model", "repo_id", "saes"]


@pytest.mark.parametrize(
    "facts",
    [{"weights": "sae_weights.pt"}, {"config": "config.json"}, {"revision": "abc"}, {"repo_type": "dataset"},
     {"form": "plain"}],
)  # fmt: skip
def test_what_stock_cannot_read_names_the_plugin_s_loader(facts):
    stock = release([sae(1)], form="sae_lens", weights="sae_weights.safetensors", config="cfg.json")
    assert "conversion_func" not in table.upstream_yaml(stock)
    text = table.upstream_yaml(replace(stock, **facts))
    assert text.startswith("# sae_lens has no loader 'gemma4'; import sae_lens_gemma4 registers it.\nr:\n")
    assert "\n  conversion_func: gemma4\n" in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (EMBEDDED, "lies in this package"),
        ("gemma-4-31b-res-topk-adam1010", r"none is stated for layer_0_\w+, layer_1_\w+, layer_2_\w+ and 57 more\. .*"
         "--verify gemma-4-31b-res-topk-adam1010"),
    ],
)  # fmt: skip
def test_what_has_no_path_is_no_entry_and_says_why(name, reason):
    with pytest.raises(ConfigError, match=reason):
        table.upstream_yaml(ALL[name])
