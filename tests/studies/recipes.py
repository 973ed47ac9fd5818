"""The recipes of `interp`, made small, and the command line as a function that fixtures of any scope can call."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml

from sae_lens_gemma4 import cli
from sae_lens_gemma4.report.html import render

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "interp"
DATA = ("demo-items", "demo-questions", "demo-pairs", "prompt-pairs")
STUDIES = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in DATA]

_TESTED = ("text.prompts=128", "sampling.resamples=200")
_PROFILE = ("profile.prompts=16", "profile.nearest_tokens=64", "profile.sampling.resamples=200")
SMALL = {
    "profile": ("text.prompts=16", "profile.nearest_tokens=64", "profile.sampling.resamples=200"),
    "label": (*_TESTED, *_PROFILE, "selection.n=12", "listing=null"),
    "verify": _TESTED,
    "probe": ("probing.scrambles=1", "probing.sampling.resamples=200"),
    "contrast": ("contrast.permutations=199", "contrast.splits=5", "contrast.sampling.resamples=200"),
    "steer": ("steering.scales=[0.3]", "steering.n_random=2", "items.n=12", "steering.max_new_tokens=6"),
    "lens": ("items.n=4", "lens.positions=last", "lens.sampling.resamples=200"),
}


def kind_of(recipe):
    return recipe.rpartition("-")[2]


def call(*args):
    """Exit code, output and errors of a command, run where the recipes' paths begin."""
    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(ROOT)
    try:
        with (
            mock.patch.object(sys, "argv", ["sae-lens-gemma4", *map(str, args)]),
            mock.patch.dict(os.environ, COLUMNS="160"),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
    finally:
        os.chdir(here)
    return end.value.code or 0, out.getvalue(), err.getvalue()


def arguments(kind, folder, *changes, recipe=None):
    sets = [part for change in (*SMALL[kind], *changes) for part in ("--set", change)]
    return ["interp", kind, RECIPES / f"{recipe or f'demo-{kind}'}.yaml", *sets, "--out", folder]


def small(kind, folder, *changes, recipe=None):
    """A demo recipe, made small, to its end: its result."""
    code, out, err = call(*arguments(kind, folder, *changes, recipe=recipe))
    assert code == 0, err
    assert str(folder / "report.html") in out
    return result(folder)


def result(folder):
    def no_constant(name):
        raise AssertionError(f"result.json has {name}")

    return json.loads((folder / "result.json").read_text(), parse_constant=no_constant)


def check_page(folder):
    """One file without anything from elsewhere, made of this result."""
    page = (folder / "report.html").read_text()
    assert page == render(result(folder))
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert not [mark for mark in ('src="http', "src='http", "<link", "@import", "url(http") if mark in page]


def stated(recipe):
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
