"""The documentation says what the package does: its tables, its pictures, its code and its example."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sae_lens_gemma4.catalogue.formats import FORMS
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.models.geometry import gemma4_geometry
from sae_lens_gemma4.models.hook_names import BLOCK_HOOKS
from sae_lens_gemma4.models.proxy import Gemma4ProxyLM
from sae_lens_gemma4.testing import VARIANTS, tiny_gemma4

ROOT = Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


ablation_tables = script("recipes/ablation_tables.py")  # the next one imports it
check_docs = script("recipes/check_docs.py")


def page(name: str) -> str:
    return str((check_docs.DOCS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", check_docs.PAGES)
def test_the_tables_are_up_to_date(name: str) -> None:
    assert page(name) == check_docs.with_tables(page(name)), "run: python recipes/check_docs.py --write"


def test_every_table_has_its_place() -> None:
    pages = "".join(page(name) for name in check_docs.PAGES)
    for name in check_docs.MADE:
        assert pages.count(f"<!-- {name} -->\n\n") == pages.count(f"\n\n<!-- end of {name} -->\n") == 1
    assert all(f"| `{name}` |" in pages for name in (*BLOCK_HOOKS, *FORMS))
    assert all(f"\n### {name}\n" in pages for name in releases())


@pytest.mark.parametrize(
    ("name", "told", "otherwise"),
    [
        ("models.md", "the keys this layer attends with", "keys"),
        ("releases.md", "| `k` | 64 |", "| `k` | 65 |"),
    ],
)
def test_tables_that_are_out_of_date_are_named_and_can_be_mended(
    name: str,
    told: str,
    otherwise: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = page(name)
    assert told in right
    monkeypatch.setattr(check_docs, "DOCS", tmp_path)
    monkeypatch.setattr(check_docs, "PAGES", (name,))
    monkeypatch.setattr(check_docs, "run_code", lambda *_: None)
    (tmp_path / name).write_text(right.replace(told, otherwise), encoding="utf-8")
    assert check_docs.main([]) == 1
    assert re.search(rf"docs/{name}: .* run: python recipes/check_docs\.py --write", capsys.readouterr().out)
    assert check_docs.main(["--write"]) == 0
    assert page(name) == right


def test_code_that_fails_is_reported_at_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_docs, "DOCS", tmp_path)
    monkeypatch.setattr(check_docs, "PAGES", ("models.md",))
    (tmp_path / "models.md").write_text("# Models\n\n```python\na = 1\n```\n\n```python\nassert a == 2\n```\n")
    assert check_docs.main([]) == 1
    assert 'models.md", line 8' in capsys.readouterr().err


@pytest.mark.parametrize("name", check_docs.PAGES)
def test_the_code_runs(name: str) -> None:
    assert torch.is_grad_enabled()
    check_docs.run_code(page(name), name)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_has_the_hooks_that_the_tables_say(variant: str) -> None:
    model = tiny_gemma4(variant)
    proxy = Gemma4ProxyLM(model)
    for layer in gemma4_geometry(model.config).layers:
        said = {name for name in BLOCK_HOOKS if check_docs.layers_with(name)[1](layer)}
        assert said == {name for name in BLOCK_HOOKS if f"blocks.{layer.index}.{name}" in proxy.hook_dict}


@pytest.mark.parametrize(("picture", "kind"), [("layer-dense-ple.svg", "ple"), ("layer-moe.svg", "moe")])
def test_a_picture_has_its_layer_s_hooks_each_once(picture: str, kind: str) -> None:
    elements = list(ElementTree.parse(ROOT / "docs" / picture).iter())
    drawn = [e.text for e in elements if e.get("class") == "hook"]
    assert sorted(map(str, drawn)) == sorted(name for name, hook in BLOCK_HOOKS.items() if hook.only in (None, kind))
    dots = [e for e in elements if e.tag.endswith("}circle") and e.get("class") != "sum"]
    assert len(dots) == len(drawn)


def test_the_example_routes_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    example = script("docs/route_a_token.py")
    with torch.random.fork_rng():
        before, after, (chosen, idle) = example.main()
    assert chosen in before.experts and idle not in before.experts
    assert after.experts == [idle if expert == chosen else expert for expert in before.experts]
    p = example.POSITION
    latents, logits = after.latents_pl - before.latents_pl, after.logits_pv - before.logits_pv
    assert latents[:p].abs().max() < 1e-4 and logits[:p].abs().max() < 1e-4
    assert latents[p].abs().max() > 0.5 and logits[p].abs().max() > 0.1
    assert f"{before.experts} -> {after.experts}" in capsys.readouterr().out


def test_what_the_ablation_tables_say_is_reckoned_from_the_rows():
    def row(experiment, variant, ve, curve=()):
        return {"experiment": experiment, "variant": variant, "shift": "gains", "ve": ve, "curve": curve}

    run = row("calibration", "all", {"text": 0.6, "chat": 0.9}, [[0, 0.1, None], [10, 0.7, 0.8], [20, 0.73, 0.91]])
    rows = [row("scratch", "lr 1", {"text": 0.8, "chat": 1.0}), row("scratch", "lr 2", {"text": 0.5, "chat": 2.0}), run]
    assert ablation_tables.scratch(rows, "gains")["variant"] == "lr 1"
    assert ablation_tables.share_of_scratch(rows, run) == pytest.approx(0.75)
    assert ablation_tables.tokens_to(rows, run) == 20
    assert ablation_tables.tokens_to(rows, run | {"curve": run["curve"][:2]}) is None


def test_the_page_says_of_continue_training_what_was_measured():
    """Issue by issue: what recovers, and what calibration saves, in every seed."""
    rows = json.loads((check_docs.DOCS / "ablations.json").read_text())
    runs = {(r["shift"], r["variant"], r["seed"]): r for r in rows if r["experiment"] == "calibration"}
    seeds = sorted({seed for *_, seed in runs})
    assert seeds == [0, 1, 2]
    for shift in ("tuned", "rescaled"):
        for seed in seeds:
            assert ablation_tables.share_of_scratch(rows, runs[shift, "all", seed]) >= 0.97
    for shift in ("rescaled", "mean", "gains"):
        for seed in seeds:
            calibrated, not_calibrated = (
                ablation_tables.tokens_to(rows, runs[shift, variant, seed]) for variant in ("all", "none")
            )
            assert calibrated is not None
            assert not_calibrated is None or calibrated <= not_calibrated / 2
