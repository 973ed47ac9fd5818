"""Hold the pages of `docs` to the package: their tables are made from the data, and their code runs.

python recipes/check_docs.py            # exit status 1 if the tables are not up to date or a block fails
python recipes/check_docs.py --write    # put the tables in, then run the code
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ablation_tables import tables

from sae_lens_gemma4.bench import targets
from sae_lens_gemma4.catalogue import table
from sae_lens_gemma4.catalogue.formats import FORMS
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.models.geometry import LayerGeometry
from sae_lens_gemma4.models.hook_names import BLOCK_HOOKS, HF_PREFIX, MODEL_HOOKS, Hook, bridge_path, hf_name, site_of

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    "continue-training.md",
    "evaluation.md",
    "interp.md",
    "models.md",
    "neuronpedia.md",
    "performance.md",
    "releases.md",
)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

LAYERS: dict[str, tuple[str, Callable[[LayerGeometry], bool]]] = {
    "all": ("all", lambda _: True),
    "ple": ("with PLE", lambda layer: layer.has_ple),
    "moe": ("with experts", lambda layer: layer.is_moe),
    "attn.hook_k": ("with keys of their own", lambda layer: layer.kv_source == layer.index),
    "attn.hook_v": ("with a `v_proj`", lambda layer: layer.kv_source == layer.index and not layer.k_eq_v),
}
"""Which layers have a hook, in words and as a rule: by its `only`, or, for two of them, by its name."""


def layers_with(name: str) -> tuple[str, Callable[[LayerGeometry], bool]]:
    """The layers that have a hook of `BLOCK_HOOKS`; tests/test_docs.py holds the rule against the models."""
    return LAYERS[name if name in LAYERS else BLOCK_HOOKS[name].only or "all"]


def hook_tables() -> str:
    """The two tables of `docs/models.md`."""
    lines = [
        "",
        "In layer `N`; every name begins with `blocks.N.`, and an HF path with `model.language_model.layers.N`.",
    ]
    lines += ["", "| name | what it is | shape | path in a bridge | HF module | layers |", "|---|---|---|---|---|---|"]
    for name, hook in BLOCK_HOOKS.items():
        lines.append(_row("blocks.N.", name, hook, f"{HF_PREFIX}layers.N", layers_with(name)[0]))
    lines += ["", "In the model: HF paths begin with `model.language_model`, but for `lm_head`."]
    lines += ["", "| name | what it is | shape | path in a bridge | HF module | models |", "|---|---|---|---|---|---|"]
    for name, hook in MODEL_HOOKS.items():
        lines.append(_row("", name, hook, HF_PREFIX.rstrip("."), LAYERS[hook.only or "all"][0]))
    return "\n".join([*lines, "", ""])


def _row(prefix: str, name: str, hook: Hook, hf_prefix: str, where: str) -> str:
    number = name if not prefix else f"blocks.0.{name}"
    path = bridge_path(number).replace("blocks.0.", "")
    site, module = site_of(number), hf_name(number)
    if module is not None:
        module = module.removeprefix(hf_prefix.replace(".N", ".0"))
        hf = f"`{module}`" if module else "the layer"
    elif site is not None:
        inside = site.path.removeprefix("layers.0")
        hf = f"input of `{inside}`" if inside else "input of the layer"
    else:
        hf = "–"
    shape = f"[{hook.shape.replace(' ', ', ')}]"
    return f"| `{name}` | {hook.meaning} | {shape} | {'' if path == name else f'`{path}`'} | {hf} | {where} |"


def forms() -> str:
    """The forms of SAE files, for `docs/releases.md`."""
    rows = tuple((f"`{form.name}`", form.title) for form in FORMS.values())
    return f"\n{table.Grid(('form', 'what it is'), rows).markdown()}\n\n"


def catalogue() -> str:
    """The releases, for `docs/releases.md`."""
    return f"\n{table.page(releases().values())}\n"


def ablations() -> str:
    """What each part of continue-training is worth, for `docs/continue-training.md`."""
    return tables(DOCS / "ablations.json")


def performance() -> str:
    """What a step costs, for `docs/performance.md`: of all that `bench step` and `bench train` wrote as JSON."""
    steps, trains = (
        [json.loads(path.read_text(encoding="utf-8")) for path in sorted(DOCS.glob(f"performance-{bench}*.json"))]
        for bench in ("step", "train")
    )
    return f"\n{targets.page([device for devices in steps for device in devices], trains)}\n\n"


MADE: dict[str, Callable[[], str]] = {
    "ablations": ablations,
    "hook tables": hook_tables,
    "performance": performance,
    "forms": forms,
    "releases": catalogue,
}
"""What stands between `<!-- name -->` and `<!-- end of name -->`, by that name."""


def with_tables(page: str) -> str:
    """The page with the tables as they should be."""
    for name, make in MADE.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if start in page:
            page = page[: page.index(start)] + start + make() + page[page.index(end) :]
    return page


def run_code(page: str, name: str) -> None:
    """Run the page's Python blocks, in order and in one namespace; an error's traceback has the page's line."""
    namespace: dict[str, Any] = {"__name__": name}
    with torch.enable_grad():  # puts back what the page sets
        for block in _PYTHON.finditer(page):
            lines_before = page.count("\n", 0, block.start(1))
            exec(compile("\n" * lines_before + block[1], str(DOCS / name), "exec"), namespace)


def check(name: str, write: bool) -> bool:
    """Whether a page is as it should be; says what is wrong with it."""
    page = (DOCS / name).read_text(encoding="utf-8")
    wanted = with_tables(page)
    if page != wanted and not write:
        print(f"docs/{name}: its tables are not up to date; run: python recipes/check_docs.py --write")
        return False
    if page != wanted:
        (DOCS / name).write_text(wanted, encoding="utf-8")
    try:
        run_code(wanted, name)
    except Exception:
        traceback.print_exc()
        print(f"docs/{name}: the code fails at the line above; mend the page or the package.")
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the pages of docs: their tables and their code.")
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    write = parser.parse_args(arguments).write
    checked = [check(name, write) for name in PAGES]
    return 0 if all(checked) else 1


if __name__ == "__main__":
    sys.exit(main())
