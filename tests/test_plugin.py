"""The door opens, closes, and says so when sae_lens has moved what it wraps."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

import sae_lens_gemma4 as g4
from sae_lens_gemma4 import plugin
from sae_lens_gemma4.errors import DependencyError, UnknownNameError
from tests.support import RELEASE, SAE_ID


@pytest.fixture
def closed():
    """The door closed for the length of a test."""
    g4.unregister()
    yield
    g4.register()


def wrapped_objects():
    return [getattr(pkgutil.resolve_name(h), name) for name, holders in plugin.WRAPPED.items() for h in holders]


def test_unregister_puts_back_the_very_objects_and_rows():
    SAE.from_pretrained(RELEASE, SAE_ID)
    with_plugin = wrapped_objects()
    g4.unregister()
    try:
        stock = wrapped_objects()
        assert all(o.__module__.startswith("sae_lens.") for o in stock)
        assert not set(map(id, stock)) & set(map(id, with_plugin))
        directory = importlib.import_module("sae_lens.loading.pretrained_saes_directory")
        assert RELEASE not in directory.get_pretrained_saes_directory()
        assert "gemma4_package" not in NAMED_PRETRAINED_SAE_LOADERS
    finally:
        g4.register()
    assert SAE.from_pretrained(RELEASE, SAE_ID).cfg.d_in == 96


def test_registering_twice_wraps_once():
    before = wrapped_objects()
    g4.register()
    assert wrapped_objects() == before


@pytest.mark.usefixtures("closed")
def test_closed_door_twice_is_harmless():
    g4.unregister()


@pytest.mark.usefixtures("closed")
def test_a_moved_name_is_named_and_nothing_is_changed(monkeypatch):
    before = wrapped_objects()
    monkeypatch.delattr("sae_lens.saes.sae.get_pretrained_saes_directory")
    with pytest.raises(DependencyError, match=r"no sae_lens\.saes\.sae\.get_pretrained_saes_directory"):
        g4.register()
    monkeypatch.undo()
    assert wrapped_objects() == before


def test_what_is_wrapped_is_what_stock_uses():
    """An upgrade that imports one of the names into another module would go past the wrapper."""
    code = """
import importlib, pkgutil, sys, sae_lens
for module in pkgutil.walk_packages(sae_lens.__path__, "sae_lens."):
    importlib.import_module(module.name)
import sae_lens_gemma4.plugin as p
p.unregister()
for name, known in p.WRAPPED.items():
    original = getattr(pkgutil.resolve_name(known[0]), name)
    theirs = {m: mod for m, mod in sys.modules.items() if m.partition(".")[0] == "sae_lens"}
    holders = {m for m, mod in theirs.items() if getattr(mod, name, None) is original}
    assert holders == {h for h in known if ":" not in h}, (name, holders ^ set(known))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("closed")
def test_a_release_of_stock_with_our_name_wins_and_stays():
    stock = importlib.import_module("sae_lens.loading.pretrained_saes_directory")
    lookup = PretrainedSAELookup(RELEASE, "their/repo", "m", None, {}, {}, {}, {}, {}, None)
    stock.get_pretrained_saes_directory()[RELEASE] = lookup
    try:
        g4.register()
        assert stock.get_pretrained_saes_directory()[RELEASE] is lookup
        g4.unregister()
        assert stock.get_pretrained_saes_directory()[RELEASE] is lookup
    finally:
        g4.unregister()
        del stock.get_pretrained_saes_directory()[RELEASE]


def test_the_wrapped_directory_can_be_cleared_as_stock_s():
    stock = importlib.import_module("sae_lens.loading.pretrained_saes_directory")
    assert RELEASE in stock.get_pretrained_saes_directory()
    stock.get_pretrained_saes_directory.cache_clear()
    assert stock.get_pretrained_saes_directory.cache_info().currsize == 0
    assert RELEASE in stock.get_pretrained_saes_directory()


def test_a_model_class_that_only_stock_knows_is_stock_s():
    def stock(name, *args, **kwargs):
        if name == "FutureModel":
            return "loaded"
        raise ValueError(f"Unknown model class: {name}")

    load_model = plugin._wrap_load_model(stock)
    assert load_model("FutureModel", "m") == "loaded"
    with pytest.raises(UnknownNameError, match="'HookedTransformer'"):
        load_model("HookedTransfomer", "m")


def test_importing_is_cheap_and_parses_no_registry():
    code = """
import time, sae_lens
from sae_lens.loading import pretrained_saes_directory as d
start = time.process_time()
import sae_lens_gemma4
spent = time.process_time() - start
import sys
late = [m for m in ("sae_lens_gemma4.models.proxy", "sae_lens_gemma4.catalogue.registry", "plotly") if m in sys.modules]
assert not late, late
sae_lens_gemma4.unregister()
assert d.get_pretrained_saes_directory.cache_info().currsize == 0
assert spent < 0.3, spent
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_all_there():
    for name in g4.__all__:
        assert getattr(g4, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = g4.nonsense
