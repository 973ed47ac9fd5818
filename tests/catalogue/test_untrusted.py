"""Files of strangers: whatever they hold, the answer is an SAE that fits together or one error that names the file."""

import copy
import io
import json
import os
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue.registry import releases
from sae_lens_gemma4.catalogue.tensors import _STAND_INS, read_header
from sae_lens_gemma4.errors import Gemma4SAEError, SAEError, UnknownNameError
from tests.catalogue import checkpoints
from tests.catalogue.checkpoints import ALL, D_IN, D_SAE, FORM_OF, inputs, packed, tensors_of, weights_name
from tests.catalogue.local_hub import local_hub
from tests.catalogue.test_formats import assert_computes, written

__all__ = ["local_hub"]
SAMPLES = {name: make(seed=1) for name, make in ALL.items()}


# --- ways to corrupt bytes, tensors and configs; each takes what is there and two random numbers


def _at(content, where):
    return int(where * len(content))


BYTES = {
    "truncated": lambda c, a, b: c[: _at(c, a)],
    "flipped": lambda c, a, b: c[: (i := _at(c, a))] + bytes([c[i] ^ (1 << int(b * 8))]) + c[i + 1 :] if c else c,
    "many flipped": lambda c, a, b: bytes(x ^ (i % 251 == int(a * 251)) * 255 for i, x in enumerate(c)),
    "header flipped": lambda c, a, b: c[: (i := int(a * min(len(c), 200)))] + bytes([int(b * 256)]) + c[i + 1 :],
    "zeroed": lambda c, a, b: c[: (i := _at(c, a))] + bytes(n := int(b * (len(c) - i))) + c[i + n :],
    "doubled": lambda c, a, b: c + c,
    "grown": lambda c, a, b: c[: (i := _at(c, a))] + os.urandom(1 + int(b * 64)) + c[i:],
    "noise": lambda c, a, b: bytes(int(x * a * 7 + b * 255) % 256 for x in range(int(b * 400))),
    "empty": lambda c, a, b: b"",
    "a pickle": lambda c, a, b: b"cos\nsystem\n(S'exit 1'\ntR.",
}


def _cell(value):
    def change(t, a, b):
        t = t.clone()
        if t.is_floating_point() and t.numel():
            t.view(-1)[int(a * t.numel())] = value
        return t

    return change


TENSORS = {
    "transposed": lambda t, a, b: t.T.clone() if t.ndim == 2 else t[None],
    "shorter": lambda t, a, b: t[: int(a * t.shape[0])].clone() if t.ndim else t[None],
    "narrower": lambda t, a, b: t[..., : int(a * t.shape[-1])].clone() if t.ndim else t,
    "flat": lambda t, a, b: t.reshape(-1),
    "deeper": lambda t, a, b: t[..., None],
    "a number": lambda t, a, b: torch.tensor(a),
    "empty": lambda t, a, b: t.reshape(-1)[:0],
    "nan": _cell(float("nan")),
    "infinite": _cell(float("inf")),
    "integers": lambda t, a, b: (t * 10).to(torch.int64),
    "bools": lambda t, a, b: t > 0,
    "float8": lambda t, a, b: t.to(torch.float8_e4m3fn),
    "half": lambda t, a, b: t.half() if t.is_floating_point() else t,
    "double": lambda t, a, b: t.double(),
    "negative": lambda t, a, b: -t - 1,
}
JUNK = [None, True, -1, 0, 3.5, 10**30, "x", "", [], [1], {}, {"k": 1}, float("nan"), float("inf"), "float32", "topk"]


def paths_in(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from paths_in(inner, (*path, key))


def corrupt(sample, way, a, b, c):
    """A copy of the sample's files with one thing wrong."""
    files = dict(sample.files)
    name = weights_name(sample)
    kind, what = way
    if kind == "bytes":
        target = sorted(n for n in files if n not in ("runner_cfg.json", "checkpoint_full.pt"))[
            int(c * 0.999 * len(files)) % 2
        ]
        files[target] = BYTES[what](files[target], a, b)
    elif kind == "tensor":
        tensors = dict(tensors_of(sample))
        keys = [k for k, t in tensors.items() if isinstance(t, torch.Tensor)]
        key = keys[int(c * len(keys))]
        if what == "missing":
            del tensors[key]
        elif what == "renamed":
            tensors[f"{key}.x"] = tensors.pop(key)
        elif what == "not a tensor":
            tensors[key] = "W"
        else:
            tensors[key] = TENSORS[what](tensors[key], a, b)
        files[name] = packed(tensors, name)
    else:
        configs = [n for n in files if n.endswith(".json") and n != "runner_cfg.json"]
        if not configs:
            files["cfg.json"] = json.dumps([1, 2] if a < 0.5 else {"k": JUNK[int(b * len(JUNK))]}).encode()
            return files
        config = json.loads(files[configs[0]])
        if what == "a list":
            config = [config]
        elif what == "not there":
            del files[configs[0]]
            return files
        else:
            *parents, last = list(paths_in(config))[int(c * len(list(paths_in(config))))]
            inner = config
            for parent in parents:
                inner = inner[parent]
            if what == "missing key":
                del inner[last]
            else:
                inner[last] = copy.deepcopy(JUNK[int(a * len(JUNK))])
        files[configs[0]] = json.dumps(config).encode()
    return files


WAYS = (
    [("bytes", w) for w in BYTES]
    + [("tensor", w) for w in (*TENSORS, "missing", "renamed", "not a tensor")]
    + [("config", w) for w in ("a list", "not there", "missing key", "junk", "junk", "junk")]
)
UNIT = st.floats(0, 0.999)


@settings(max_examples=900, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(SAMPLES)), way=st.sampled_from(WAYS), named=st.booleans(), a=UNIT, b=UNIT, c=UNIT)
def test_a_corrupted_checkpoint_is_one_error_or_an_sae_that_fits(name, way, named, a, b, c):
    sample = SAMPLES[name]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, content in corrupt(sample, way, a, b, c).items():
            Path(folder, file).write_bytes(content)
        converter = g4.converter(FORM_OF.get(name, name) if named else None, **sample.facts)
        try:
            sae = SAE.load_from_disk(folder, converter=converter, dtype="float32")
        except Gemma4SAEError as e:
            answer = str(e)
        else:
            answer = None
    if answer is not None:
        assert folder in answer and "\n" not in answer, answer
        return
    assert sae.W_enc.shape == (sae.cfg.d_in, sae.cfg.d_sae) == sae.W_dec.T.shape
    assert all(torch.isfinite(p).all() for p in sae.parameters())
    x = torch.randn(3, sae.cfg.d_in)
    assert sae.encode(x).shape == (3, sae.cfg.d_sae)
    assert sae(x).shape == x.shape


def test_there_are_enough_ways():
    assert len(WAYS) * len(SAMPLES) >= 450  # and each with random places and values


MARK = os.path.join(tempfile.gettempdir(), "executed-by-a-pickle")


class Evil:
    def __reduce__(self):
        return os.mkdir, (MARK,)


def test_a_file_that_would_execute_code_is_refused_and_nothing_runs(tmp_path):
    assert not os.path.exists(MARK)
    for legacy in (False, True):
        buffer = io.BytesIO()
        torch.save({"W_enc": torch.zeros(2, 3), "x": Evil()}, buffer, _use_new_zipfile_serialization=not legacy)
        (tmp_path / "sae.pt").write_bytes(buffer.getvalue())
        with pytest.raises(SAEError, match=r"sae\.pt is refused: to read it would run code of its own \(posix.mkdir\)"):
            SAE.load_from_disk(tmp_path, converter=g4.converter())
        assert not os.path.exists(MARK)


def test_a_whole_module_that_was_pickled_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 4), tmp_path / "sae.pt")
    with pytest.raises(SAEError, match=r"refused.*torch\.nn\.modules\.linear\.Linear"):
        SAE.load_from_disk(tmp_path, converter=g4.converter())


def test_a_config_object_of_skwras_class_is_read_and_has_no_methods(tmp_path):
    written(tmp_path, checkpoints.skwra())
    sae = SAE.load_from_disk(tmp_path, converter=g4.converter(), dtype="float32")
    assert sae.cfg.k == 5  # from the pickled config, whose class is nowhere to be imported
    stand_in, _ = _STAND_INS[0]
    assert [n for n in vars(stand_in) if not n.startswith("__")] == []


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("plain", lambda f: f | {"sae_final.pt": f["sae_final.pt"][:900]}, r"sae_final\.pt cannot be read: .*zip"),
        ("sparsify", lambda f: f | {"sae.safetensors": f["sae.safetensors"][:400]}, r"sae\.safetensors is not a whole"),
        ("sparsify", lambda f: f | {"cfg.json": b"[1]"}, r"cfg\.json holds a JSON list, not an object"),
        ("sparsify", lambda f: f | {"cfg.json": b'{"k": '}, r"cfg\.json cannot be read: JSONDecodeError"),
        (
            "sparsify",
            lambda f: f | {"cfg.json": b'{"k": 5, "d_in": 13, "num_latents": 32}'},
            "states d_in 13; d_in of the weights is 12",
        ),
        ("sparsify", lambda f: f | {"cfg.json": b'{"k": 33}'}, "k is 33, and d_sae 32"),
        ("sparsify", lambda f: f | {"cfg.json": b'{"k": "many"}'}, "k is 'many', not a positive whole number"),
        ("sparsify", lambda f: f | {"cfg.json": b"{}"}, "nobody states k"),
    ],
)
def test_the_error_says_what_is_wrong(tmp_path, form, change, message):
    sample = SAMPLES[form]
    for name, content in change(dict(sample.files)).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SAEError, match=message):
        SAE.load_from_disk(tmp_path, converter=g4.converter(**sample.facts))


def test_a_training_folder_of_sae_lens_is_told_apart(tmp_path):
    sample = SAMPLES["sae_lens"]
    config = json.loads(sample.files["cfg.json"]) | {"architecture": "matryoshka_batchtopk"}
    written(tmp_path, sample)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(
        UnknownNameError, match=r"architecture in the config of .*'matryoshka_batchtopk'.*save_inference_model"
    ):
        SAE.load_from_disk(tmp_path, converter=g4.converter())


def test_a_corrupt_download_is_named_and_does_not_spoil_the_cache(local_hub):
    name, sae_id = "gemma-4-e4b-res-topk-caiovicentino1", "layer_21_width_32k_l0_128"
    repo = releases()[name].repo_id
    good = checkpoints.plain()
    local_hub.add(repo, good.files | {"sae_final.pt": good.files["sae_final.pt"][:-200]})
    with pytest.raises(SAEError, match=f"{repo}/sae_final.pt cannot be read"):
        SAE.from_pretrained(name, sae_id)
    local_hub.add(repo, good.files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_computes(SAE.from_pretrained(name, sae_id), good)


def test_nothing_is_read_that_is_not_needed(tmp_path):
    """The optimizer's state beside an SAE may be gigabytes, and nobody asked for it."""
    sample = checkpoints.log_threshold()
    written(tmp_path, sample)
    (tmp_path / "checkpoint_full.pt").chmod(0)
    sae = SAE.load_from_disk(tmp_path, converter=g4.converter())
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (D_IN, D_SAE)


TOPK = {"apply_b_dec_to_input": True}


def changed(sample, config=None, drop=(), **tensors):
    """The sample with other tensors and other words in its config."""
    name = weights_name(sample)
    there = {k: v for k, v in tensors_of(sample).items() if k not in drop} | tensors
    files = {name: packed(there, name)}
    if config is not None:
        (told,) = [n for n in sample.files if n.endswith(".json") and n != "runner_cfg.json"] or ["config.json"]
        files[told] = json.dumps(json.loads(sample.files.get(told, b"{}")) | config).encode()
    return files


REFUSED = {
    "a transcoder of sparsify": ("sparsify", {"config": {"transcode": True}}, "transcoder or skip connection"),
    "groupmax": ("sparsify", {"config": {"activation": "groupmax"}}, "states activation 'groupmax'"),
    "expansion as a text": ("sparsify", {"config": {"num_latents": 0, "expansion_factor": "x"}}, "states x times"),
    "a wrong expansion": ("sparsify", {"config": {"num_latents": 0, "expansion_factor": 32}}, "states 32 times"),
    "another class": (
        "dictionary_learning", {"config": {"trainer": {"dict_class": "GatedAutoEncoder"}}}, "a GatedAutoEncoder of",
    ),
    "another width": (
        "dictionary_learning", {"config": {"trainer": {"dict_class": "BatchTopKSAE", "dict_size": 33}}}, "dict_size 33",
    ),
    "no threshold": ("dictionary_learning", {"drop": ["threshold"], "config": {}}, "encodes with a threshold"),
    "a k that is none": (
        "dictionary_learning", {"config": {"trainer": {"dict_class": "AutoEncoderTopK", "k": -5}}, "drop": ["k"]},
        "k is -5, not a positive",
    ),
    "no class": ("dictionary_learning", {"config": {"trainer": {}}}, r"architecture='batchtopk'\), or 'topk'"),
    "a scale of nought": (
        "normalised", {"normalization.activation_scale": torch.tensor([0.0])}, "activation_scale is not positive",
    ),
    "scales of some": ("normalised", {"normalization.activation_scale": torch.ones(3)}, r"scale \[3\] do not fit"),
    "a scaling factor": ("sae_lens", {"config": {}, "scaling_factor": torch.ones(32)}, "of sae_lens before 6"),
    "another d_sae": ("sae_lens", {"config": {"d_sae": 7}}, "states d_sae 7; d_sae of the weights is 32"),
    "a tensor too many": ("sae_lens", {"config": {}, "W_skip": torch.ones(12, 12)}, "has W_skip, which a jumprelu SAE"),
    "a tensor too few": ("sae_lens", {"config": {}, "drop": ["threshold"]}, "has no threshold, which a jumprelu SAE"),
    "a tensor too long": ("sae_lens", {"config": {}, "threshold": torch.ones(33)}, r"\[33\]; by its config .* \[32\]"),
    "not a number": ("sae_lens", {"config": {}, "b_enc": torch.full((32,), torch.nan)}, "b_enc has entries that"),
    "infinity": ("plain", {"config": {}, "W_dec": torch.full((32, 12), torch.inf)}, "W_dec has entries that"),
    "another k": ("plain", {"config": {}, "k": 33}, "k is 33, and d_sae 32"),
    "normalised inputs": ("plain", {"config": {"normalize_activations": "layer_norm"}}, "normalize_activations 'l"),
    "a plain transcoder": ("plain", {"config": {"type": "transcoder"}}, "states type 'transcoder', which is no SAE"),
    "another d_model": ("plain", {"config": {"d_model": 999}, "drop": ["d_model"]}, "states d_model 999; d_in"),
    "relu": ("plain", {"config": {"activation": "relu"}}, "states activation 'relu'; by its form it would be TopK"),
    "no encoder": ("plain", {"config": {}, "drop": ["W_enc"]}, "has no tensor W_enc. It holds: W_dec"),
    "sparse": ("plain", {"config": {}, "W_enc": torch.eye(12, 32).to_sparse()}, "W_enc is sparse or quantised"),
    "no numbers": ("plain", {"config": {}, "W_enc": torch.empty(12, 32, device="meta")}, "not so many numbers"),
    "one number": ("plain", {"config": {}, "W_enc": torch.ones(1).expand(12, 32)}, "not so many numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(tmp_path, case):
    form, change, message = REFUSED[case]
    for name, content in changed(SAMPLES[form], **change).items():
        (tmp_path / name).write_bytes(content)
    facts = SAMPLES[form].facts if form != "dictionary_learning" else {}
    with pytest.raises(SAEError, match=message):
        SAE.load_from_disk(tmp_path, converter=g4.converter(form, **facts))


@pytest.mark.parametrize("keys", [{1: torch.ones(2, 3)}, {None: torch.ones(2, 3), "a": torch.ones(2)}])
def test_keys_that_are_no_texts(tmp_path, keys):
    torch.save(keys, tmp_path / "sae.pt")
    with pytest.raises(SAEError, match="which is no text"):
        SAE.load_from_disk(tmp_path, converter=g4.converter())


def test_a_header_that_claims_gigabytes_is_not_read():
    with pytest.raises(SAEError, match="its header would be 1099511627776 bytes long"):
        read_header(io.BytesIO((2**40).to_bytes(8, "little") + b"{}"), "a.safetensors", "a.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", r"sae\.pt cannot be read: "),
    ],
)
def test_a_download_that_is_something_else_is_not_said_to_run_code(tmp_path, content, message):
    (tmp_path / "sae.pt").write_bytes(content)
    with pytest.raises(SAEError, match=message) as caught:
        SAE.load_from_disk(tmp_path, converter=g4.converter())
    assert "run code" not in str(caught.value)


def rezipped(content, compression=zipfile.ZIP_STORED, shorten=None):
    """A torch file with its records written again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for record in old.infolist():
            data = old.read(record)
            new.writestr(
                record.filename, data[: len(data) // 2] if record.filename.endswith(f"data/{shorten}") else data
            )
    return buffer.getvalue()


def test_a_record_that_is_too_short_is_not_filled_with_its_neighbours_bytes(tmp_path):
    content = rezipped(SAMPLES["plain"].files["sae_final.pt"], shorten="0")
    (tmp_path / "sae_final.pt").write_bytes(content)
    with pytest.raises(SAEError, match="cannot be read"):
        SAE.load_from_disk(tmp_path, converter=g4.converter(k=5, **TOPK))


def test_a_file_that_was_compressed_is_read(tmp_path):
    content = rezipped(SAMPLES["plain"].files["sae_final.pt"], zipfile.ZIP_DEFLATED)
    (tmp_path / "sae_final.pt").write_bytes(content)
    assert_computes(SAE.load_from_disk(tmp_path, converter=g4.converter(**TOPK)), SAMPLES["plain"])


def test_a_statement_by_hand_that_the_file_contradicts_is_an_error(tmp_path):
    written(tmp_path / "plain", SAMPLES["plain"])
    with pytest.raises(SAEError, match="states k 5; the converter was told 9"):
        SAE.load_from_disk(tmp_path / "plain", converter=g4.converter(k=9, **TOPK))
    with pytest.raises(SAEError, match="makes a topk SAE; it is stated to be jumprelu"):
        SAE.load_from_disk(tmp_path / "plain", converter=g4.converter(architecture="jumprelu", **TOPK))
    written(tmp_path / "sae_lens", SAMPLES["sae_lens"])
    with pytest.raises(SAEError, match="states apply_b_dec_to_input True; the converter was told False"):
        SAE.load_from_disk(tmp_path / "sae_lens", converter=g4.converter(apply_b_dec_to_input=False))


def test_the_weights_own_k_comes_before_the_configs(tmp_path):
    for name, content in changed(SAMPLES["plain"], config={"k": 9}, k=5).items():
        (tmp_path / name).write_bytes(content)
    assert SAE.load_from_disk(tmp_path, converter=g4.converter(**TOPK)).cfg.k == 5


def test_a_config_that_speaks_of_b_dec_is_believed(tmp_path):
    sample = checkpoints.plain(subtract=False)
    for name, content in changed(sample, config={"apply_b_dec_to_input": False}, k=5).items():
        (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_computes(SAE.load_from_disk(tmp_path, converter=g4.converter()), sample)


def test_numbers_too_large_for_the_dtype_asked_for_are_not_blamed_on_the_file(tmp_path):
    for name, content in changed(SAMPLES["plain"], b_enc=torch.full((32,), 1e6), k=5).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SAEError, match="not finite in float16"):
        SAE.load_from_disk(tmp_path, converter=g4.converter(**TOPK), dtype="float16")


def test_a_fold_in_half_precision_is_done_in_single(tmp_path):
    """The file's bfloat16 numbers are exact as float32; folding must not round them again."""
    state = {k: v.bfloat16() for k, v in tensors_of(SAMPLES["normalised"]).items()}
    (tmp_path / "sae_weights.safetensors").write_bytes(packed(state, ".safetensors"))
    sae = SAE.load_from_disk(tmp_path, converter=g4.converter(), dtype="float32")
    mean, scale = state["normalization.activation_mean"].float(), state["normalization.activation_scale"].float()
    bias, encoder = state["sae.decoder_bias"].float(), state["sae.encoder.weight"].float()
    x = inputs()
    pre = torch.nn.functional.linear((x - mean) / scale - bias, encoder, state["sae.encoder.bias"].float())
    latents = pre.relu() * (pre > state["sae.inference_threshold"].float())
    assert (sae.encode(x) - latents).abs().max() <= 1e-5 * latents.abs().max()


def test_the_gate_of_ernos_takes_what_is_just_at_it(tmp_path):
    """pre ≥ 0.001, where sae_lens keeps what exceeds a threshold."""
    state = tensors_of(SAMPLES["ernos_code"])
    state = {k: torch.zeros_like(v) for k, v in state.items()} | {"b_enc": torch.full((32,), 0.001)}
    state["b_enc"][0] = torch.nextafter(torch.tensor(0.001), torch.tensor(0.0))
    (tmp_path / "gemma4_sae_1m.safetensors").write_bytes(packed(state, ".safetensors"))
    latents = SAE.load_from_disk(tmp_path, converter=g4.converter("ernos")).encode(torch.zeros(1, 12))
    assert (latents > 0).tolist() == [[False] + [True] * 31]


def test_threads_that_load_at_once_do_not_refuse_each_other(tmp_path):
    written(tmp_path, checkpoints.skwra())

    def k(_):
        return SAE.load_from_disk(tmp_path, converter=g4.converter(), dtype="float32").cfg.k

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(k, range(80))) == {5}


def test_a_local_file_is_read_without_a_walk_through_its_folders(tmp_path, monkeypatch):
    written(tmp_path, SAMPLES["plain"])
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("walked"))
    assert_computes(SAE.load_from_disk(tmp_path / "sae_final.pt", converter=g4.converter(**TOPK)), SAMPLES["plain"])
