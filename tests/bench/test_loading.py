"""The bench writes files as their authors do, loads what it wrote, and cleans up. Speed itself is not tested here."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load, save_file

import sae_lens_gemma4 as g4
from sae_lens_gemma4.bench import loading
from sae_lens_gemma4.bench.loading import LAYOUTS
from sae_lens_gemma4.catalogue.formats import FORMS
from sae_lens_gemma4.errors import ConfigError, SAEError, UnknownNameError
from tests.catalogue import checkpoints

D_SAE, D_IN = 64, 16
SAMPLES = {
    "plain, .pt": "plain",
    "plain, .safetensors": "plain_safetensors",
    "ernos, the code's keys": "ernos_code",
    "ernos, the card's keys": "ernos_card",
}
"""The hand-written checkpoint of each layout, where it is not called as the layout is."""


def in_this_process(*arguments: Any) -> dict[str, Any]:
    return loading.measure(*json.loads(json.dumps(arguments)))


def tensors_of(data: bytes, suffix: str, folder: Path) -> dict[str, torch.Tensor]:
    if suffix == ".safetensors":
        return load(data)
    (folder / "sample.pt").write_bytes(data)
    content = torch.load(folder / "sample.pt", weights_only=True)
    content = content.get("state_dict", content)
    return {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}


def test_every_form_is_measured() -> None:
    assert {layout.form for layout in LAYOUTS.values()} == set(FORMS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_its_authors(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    arguments = {"decoder_bias": True} if name == "ernos, the card's keys" else {}
    sample = checkpoints.ALL[SAMPLES.get(name, name)](d_in=D_IN, d_sae=D_SAE, **arguments)
    suffix = Path(layout.file).suffix
    data = next(
        data for file, data in sample.files.items() if file.endswith(suffix) and not file.startswith("sparsity")
    )
    with torch.serialization.safe_globals([(checkpoints.SAEConfig, "sae.sae_model.SAEConfig")]):
        theirs = tensors_of(data, suffix, tmp_path)
    loading.write(layout, tmp_path / "ours", D_SAE, D_IN)
    ours = tensors_of((tmp_path / "ours" / layout.file).read_bytes(), suffix, tmp_path)
    assert {k: list(v.shape) for k, v in ours.items()} == {k: list(v.shape) for k, v in theirs.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_loaded_is_what_was_written(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    written = loading.write(layout, tmp_path, D_SAE, D_IN)
    sae = SAE.load_from_disk(tmp_path, converter=g4.converter(layout.form, **layout.facts))
    W_enc, W_dec, b_enc, b_dec = (written[key] for key in list(layout.tensors)[:4])
    turned = W_enc.shape[0] == D_SAE, W_dec.shape[0] == D_IN
    assert layout.transposes == any(turned)
    W_enc, W_dec = W_enc.T if turned[0] else W_enc, W_dec.T if turned[1] else W_dec
    if layout.form == "normalised":
        mean, scale = written["normalization.activation_mean"], written["normalization.activation_scale"]
        W_enc, W_dec, b_dec = W_enc / scale, W_dec * scale, mean + scale * b_dec
    assert torch.equal(sae.W_enc, W_enc)
    assert torch.equal(sae.W_dec, W_dec)
    assert torch.equal(sae.b_enc, b_enc)
    assert torch.allclose(sae.b_dec, b_dec, rtol=1e-6, atol=0)
    x = torch.randn(8, D_IN)
    pre = (x - b_dec if sae.cfg.apply_b_dec_to_input else x) @ W_enc + b_enc
    if sae.cfg.architecture() == "topk":
        latents = checkpoints.keep_largest(pre.relu(), loading.K)
    elif sae.cfg.architecture() == "standard":
        latents = pre.relu()
    else:
        latents = pre.relu() * (pre > sae.threshold)
    torch.testing.assert_close(sae.encode(x), latents)
    torch.testing.assert_close(sae.decode(latents), latents @ W_dec + b_dec)


@pytest.mark.parametrize("touch", loading.TOUCHES)
def test_results_are_whole_and_nothing_is_left(touch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_in_a_process", in_this_process)
    results = []
    for result in loading.bench_loading(D_SAE, D_IN, 1, touch=touch, folder=tmp_path):
        assert not list(tmp_path.iterdir())
        results.append(json.loads(json.dumps(result.to_dict())))
    assert [r["layout"] for r in results] == list(LAYOUTS)
    for r in results:
        assert r["weights_bytes"] >= 4 * (2 * D_SAE * D_IN + D_SAE + D_IN)
        assert (r["repeats"], r["touch"], r["threads"]) == (1, touch, torch.get_num_threads())
        assert 0 < r["ready_seconds"] <= r["seconds"] and r["reference_seconds"] > 0
        assert r["ratio"] == pytest.approx(r["reference_seconds"] / r["seconds"])
        assert r["ready_ratio"] == pytest.approx(r["reference_seconds"] / r["ready_seconds"])
        assert r["peak_target"] == (2.2 if r["transposes"] else 1.3)


def test_each_layout_is_loaded_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself would spend its time on imports, so its program is run here."""
    programs = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        programs.append(command[:3])
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        with redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
            exec(command[2], {})
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", run)
    first, second = loading.bench_loading(D_SAE, D_IN, 2, layouts=["linear", "sparsify"], folder=tmp_path)
    assert (first.layout, first.transposes, first.repeats) == ("linear", True, 2)
    assert second.layout == "sparsify"
    assert [command[:2] for command in programs] == 2 * [[sys.executable, "-c"]]


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert loading._spread([0.5, 1.0, 0.8, 2.0, 0.9]) == (0.9, (0.8, 1.0))
    assert loading._spread([0.7]) == (0.7, (0.7, 0.7))


def test_both_touches_reach_every_byte() -> None:
    tensor = torch.zeros(3, 5)
    loading.TOUCHES["write"](tensor)
    assert (tensor.view(torch.uint8) == 255).all()
    loading.TOUCHES["read"](tensor)


def test_writing_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    loading._timed(lambda: list(loading.load_file(tmp_path / "a.safetensors").values()), loading.TOUCHES["write"])
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_no_peak_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_resident", lambda name: None)
    assert loading._peak(lambda: [torch.zeros(4)], loading.TOUCHES["read"]) is None


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> dict[str, Any]:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_in_a_process", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(loading.bench_loading(D_SAE, D_IN, 1, folder=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_load_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nSAEError: no W_enc\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SAEError, match=r"form sae_lens failed: SAEError: no W_enc"):
        loading._in_a_process("somewhere", "sae_lens")


def test_what_cannot_be_run_is_named(tmp_path: Path) -> None:
    for wrong in ({"d_sae": 8}, {"d_in": 65536}, {"repeats": 0}):
        with pytest.raises(ConfigError, match="d_sae must be at least 32 and not d_in"):
            next(loading.bench_loading(**wrong))
    with pytest.raises(UnknownNameError, match="'sparsify'"):
        next(loading.bench_loading(layouts=["sparsfy"]))
    with pytest.raises(UnknownNameError, match="Known: read, write"):
        next(loading.bench_loading(touch="x"))
    with pytest.raises(ConfigError, match=r"The files need .* GB; there are"):
        next(loading.bench_loading(d_sae=10**9, folder=tmp_path))
