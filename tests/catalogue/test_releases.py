"""Every SAE of every release, served by a local hub in its author's layout and loaded by its name as users do.

A file's widths are small here, so the catalogue's d_in, d_sae and k do not fit: those warnings are expected.
"""

import json
import math
import warnings

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_saes_directory
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
from safetensors.torch import save

import sae_lens_gemma4 as g4
from sae_lens_gemma4.catalogue.registry import SHOWN, releases
from sae_lens_gemma4.errors import CaveatWarning, HubError, MismatchWarning, SAEError, UnknownNameError, UnstatedWarning
from sae_lens_gemma4.models.hook_names import canonical_name, hf_name
from tests.catalogue import checkpoints
from tests.catalogue.local_hub import local_hub, resuming
from tests.catalogue.test_formats import assert_computes

__all__ = ["local_hub"]
CAIO = "caiovicentino1/Gemma-4-E4B-SAE-L21-topk"
PUBLIC = {name: release for name, release in releases().items() if release.repo_type != "package"}


def sample_of(release, entry, seed):
    """What the author of this SAE would have written, small."""
    layer = entry.hook.split(".")[1] if entry.hook.startswith("blocks") else None
    k = 5
    if release.form == "sae_lens":
        return checkpoints.sae_lens(
            seed, hook_name=f"model.language_model.layers.{layer}", model_name=release.model, context_size=1024
        )
    if release.form == "dictionary_learning":
        kind = "mlp" if "mlp" in entry.hook else "resid_post"
        return checkpoints.dictionary_learning(seed, k=k, layer=int(layer), submodule=f"{kind}_layer_{layer}")
    if release.form == "log_threshold":
        return checkpoints.log_threshold(seed, layer=int(layer))
    if release.form == "plain":
        return checkpoints.plain(seed, k=k) if "caio" in release.name else checkpoints.solshine_scope(seed, k=k)
    makers = {
        "sparsify": checkpoints.sparsify, "normalised": checkpoints.normalised, "ernos": checkpoints.ernos_code,
        "linear": lambda seed: checkpoints.linear(seed, k=entry.k), "linear_encoder": checkpoints.skwra,
        None: lambda seed: checkpoints.linear(seed, k=entry.k),
    }  # fmt: skip
    return makers[release.form](seed)


def place(release, entry, sample):
    """The sample's files where the release has them; a release that states no path gets a likely one."""
    likely = {
        "gemma-4-31b-res-topk-adam1010": f"saes/layer_{entry.hook.split('.')[1]:0>2}/sae.pt",
        "gemma-4-e2b-it-res-topk-skwra": f"gemma-4-E2B-it/{entry.id[-6:]}/gemma-4-E2B-it-L30-d12288-{entry.id[-6:]}.pt",
        "gemma-4-e4b-it-res-topk-skwra": f"gemma-4-E4B-it/{entry.id[-6:]}/gemma-4-E4B-it-L30-d20480-{entry.id[-6:]}.pt",
        "gemma-4-31b-it-final-topk-ddasd": "gemma4_31b_fp8block_finaltoken_sae_final.safetensors",
    }
    path = entry.path if entry.path is not None else likely[release.name]
    if release.weights is not None:
        return {f"{path}/{name}".lstrip("/"): content for name, content in sample.files.items()}
    (weights,) = [c for n, c in sample.files.items() if not n.endswith(".json")]
    placed = {path: weights}
    if release.config:
        (placed[release.config],) = [c for n, c in sample.files.items() if n.endswith(".json")]
    return placed


def make(release, entry, seed=0):
    sample = sample_of(release, entry, seed)
    if release.name.endswith("ddasd"):
        sample = checkpoints.plain(
            seed, k=entry.k, d_sae=256, suffix=".safetensors", extra={"last_fired": torch.zeros(256, dtype=torch.long)}
        )
    return sample


@pytest.mark.parametrize("name", PUBLIC)
def test_every_sae_of_a_release_loads_by_name_and_computes_what_its_author_computes(local_hub, name):
    release = PUBLIC[name]
    samples = {}
    for seed, entry in enumerate(release.saes):
        k = entry.k or 5
        samples[entry.id] = make(release, entry, seed)
        if release.form is None and k >= checkpoints.D_SAE and not name.endswith("ddasd"):
            samples[entry.id] = checkpoints.linear(seed, d_sae=4 * k, k=k)
        local_hub.add(release.repo_id, place(release, entry, samples[entry.id]), repo_type=release.repo_type)
    for entry in release.saes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sae, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(name, entry.id)
        assert_computes(sae, samples[entry.id])
        metadata = sae.cfg.metadata
        assert metadata.model_name == release.model
        assert metadata.hook_name == entry.hook == canonical_name(entry.hook)
        assert metadata.hf_hook_name == hf_name(entry.hook) is not None
        assert (metadata.release, metadata.sae_id) == (name, entry.id)
        assert metadata.repo_id == release.repo_id
        placed = place(release, entry, samples[entry.id])
        assert placed[metadata.hf_path] in samples[entry.id].files.values() and "json" not in metadata.hf_path
        assert metadata.neuronpedia_id == entry.neuronpedia
        assert metadata.exclude_special_tokens == entry.exclude_special_tokens
        for fact in ("context_size", "prepend_bos"):
            assert metadata[fact] == getattr(entry, fact) or (
                release.form == "sae_lens" and getattr(entry, fact) is None
            )
        if entry.apply_b_dec_to_input is not None:
            assert sae.cfg.apply_b_dec_to_input is entry.apply_b_dec_to_input
        assert (sparsity is not None) == (release.form == "sae_lens")
        assert cfg["device"] == "cpu" and sae.dtype == torch.float32


def test_the_catalogue_is_whole_and_each_row_is_one_place():
    assert sum(len(r.saes) for r in PUBLIC.values()) == 167
    assert len(PUBLIC) == 22
    places = [(r.repo_id, s.folder_name) for r in releases().values() for s in r.saes]
    assert len(places) == len(set(places))
    for name, release in PUBLIC.items():
        assert name.startswith(release.model.rsplit("/", 1)[-1].lower().removesuffix("-fp8-block"))
        assert release.repo_id.split("/")[0].lower().replace("_", "-") in name
        for entry in release.saes:
            assert canonical_name(entry.hook) == entry.hook
            if entry.d_sae:
                assert f"width_{entry.d_sae // 1000}k" in entry.id


def test_stock_sae_lens_sees_more_releases_and_nothing_else():
    directory = pretrained_saes_directory.get_pretrained_saes_directory()
    ours = {name: directory[name] for name in releases()}
    g4.unregister()
    try:
        stock = dict(pretrained_saes_directory.get_pretrained_saes_directory())
    finally:
        g4.register()
    assert not ours.keys() & stock.keys()
    again = pretrained_saes_directory.get_pretrained_saes_directory()
    assert {k: v for k, v in again.items() if k not in ours} == stock
    unknown = ours["gemma-4-31b-res-topk-adam1010"]
    assert all(math.isnan(v) for v in unknown.expected_var_explained.values())


@pytest.mark.parametrize("name", [n for n, r in PUBLIC.items() if r.form is None])
@pytest.mark.parametrize(
    "form", ["plain", "linear", "linear_b_dec", "linear_encoder", "dictionary_learning", "sparsify"]
)
def test_a_release_of_unknown_layout_is_recognised_in_whatever_form_it_comes(local_hub, name, form):
    release = PUBLIC[name]
    entry = release.saes[0]
    k = entry.k
    trained_as = {"topk": True} if form == "dictionary_learning" else {}
    sample = checkpoints.ALL[form](seed=1, k=k, d_sae=2 * k, **trained_as)
    file = "x.safetensors" if name.endswith("ddasd") else "x.pt"
    sample.files = {file: checkpoints.packed(checkpoints.tensors_of(sample), file)}
    local_hub.add(release.repo_id, place(release, entry, sample), repo_type=release.repo_type)
    subtract = form not in ("linear", "linear_encoder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sae = SAE.from_pretrained(name, entry.id, converter=g4.converter(apply_b_dec_to_input=subtract))
    assert_computes(sae, sample)


def test_an_unknown_layout_that_stays_unknown_says_what_it_found_and_what_to_do(local_hub):
    files = {"sae/layer_07.pt": checkpoints.pt({"E": torch.zeros(4, 3)}), "gemma4_sae_features.json": b"[]"}
    local_hub.add("Adam1010/gemma-4-31b-sae-features", files, repo_type="dataset")
    with pytest.raises(SAEError, match=r"layer_07\.pt is of no form known here. It holds: E \[4, 3\].*converter\("):
        SAE.from_pretrained("gemma-4-31b-res-topk-adam1010", "layer_7_width_43k_l0_64")
    with pytest.raises(SAEError, match=r"No files of Adam1010.* match .*8.*, of: sae/layer_07\.pt"):
        SAE.from_pretrained("gemma-4-31b-res-topk-adam1010", "layer_8_width_43k_l0_64")


@pytest.mark.parametrize("name", [n for n, r in PUBLIC.items() if any(c.kind in SHOWN for c in r.caveats)])
def test_the_caveats_that_matter_are_warned_of_at_the_users_own_line(local_hub, name):
    release = PUBLIC[name]
    entry = release.saes[0]
    local_hub.add(release.repo_id, place(release, entry, make(release, entry)), repo_type=release.repo_type)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            SAE.from_pretrained(name, entry.id)
        except SAEError:  # too few latents for k
            assert release.form is None
    (shown,) = [w for w in caught if w.category is CaveatWarning]
    assert shown.filename == __file__
    for caveat in release.caveats:
        assert (caveat.text in str(shown.message)) == (caveat.kind in SHOWN)


def test_atawfeeks_metadata_is_not_the_base_models(local_hub):
    name, sae_id = "gemma-4-e4b-it-res-matryoshka-atawfeek", "layer_21_width_65k_l0_100"
    release = PUBLIC[name]
    sample = make(release, release.sae(sae_id))
    assert json.loads(sample.files["runner_cfg.json"])["model_name"] == "google/gemma-4-E4B"
    local_hub.add(release.repo_id, place(release, release.sae(sae_id), sample))
    with pytest.warns(MismatchWarning):
        sae = SAE.from_pretrained(name, sae_id)
    assert sae.cfg.metadata.model_name == "google/gemma-4-E4B-it"
    assert not [r for r in local_hub.requests if "runner_cfg" in r[1]]


def test_a_config_that_names_another_model_or_hook_is_a_named_warning(local_hub):
    name, sae_id = "gemma-4-e4b-it-res-matryoshka-atawfeek", "layer_21_width_65k_l0_100"
    release = PUBLIC[name]
    sample = checkpoints.sae_lens(model_name="gemma-4-4b", hook_name="blocks.20.hook_resid_post")
    local_hub.add(release.repo_id, place(release, release.sae(sae_id), sample))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = SAE.from_pretrained(name, sae_id)
    told = [str(w.message) for w in caught if w.category is MismatchWarning]
    assert any("states model_name 'gemma-4-4b'" in t for t in told)
    assert any("states hook_name 'blocks.20.hook_resid_post'" in t for t in told)
    assert any("has d_in 12; the catalogue states 2560" in t for t in told)
    assert any("has d_sae 32; the catalogue states 65536" in t for t in told)
    assert sae.cfg.metadata.hook_name == "blocks.21.hook_resid_post"


def test_the_layer_45_mlp_is_the_modules_output():
    release = PUBLIC["gemma-3-27b-it-mlp-batchtopk-uzaymacar"]
    assert {s.hook for s in release.saes} == {"blocks.45.mlp.hook_out"}
    assert hf_name("blocks.45.mlp.hook_out") == "model.language_model.layers.45.mlp"


def test_a_raw_repository_id_goes_on_working_and_its_warning_names_the_right_release(local_hub):
    release = PUBLIC["gemma-4-31b-res-matryoshka-decoderesearch"]  # the last of three with that repository
    entry = release.saes[0]
    sample = make(release, entry, 3)
    local_hub.add(release.repo_id, place(release, entry, sample))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = SAE.from_pretrained(release.repo_id, entry.path)
    (told,) = [w for w in caught if issubclass(w.category, UserWarning) and "repository" in str(w.message)]
    assert f"SAE.from_pretrained('{release.name}', '{entry.id}')" in str(told.message)
    assert told.filename == __file__
    assert not [w for w in caught if "You are loading an SAE using" in str(w.message)]
    assert_computes(sae, sample)
    assert sae.cfg.metadata.hook_name == "model.language_model.layers.30"  # as stock has it: nothing changes


def test_stock_reads_the_root_of_a_repository_as_a_dot(local_hub):
    """As a row of sae_lens's list has it for Neuronpedia's server."""
    sample = checkpoints.sae_lens(4, hook_name="blocks.3.hook_resid_post", model_name="google/gemma-4-E2B")
    local_hub.add("lab/one-sae", sample.files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sae = SAE.from_pretrained("lab/one-sae", ".")
    assert_computes(sae, sample)
    assert "/lab/one-sae/resolve/main/cfg.json" in {path for _, path, _ in local_hub.requests}


def test_a_raw_repository_id_that_stock_cannot_read_is_read(local_hub):
    release = PUBLIC["gemma-4-e4b-res-topk-caiovicentino1"]
    sample = make(release, release.saes[0])
    local_hub.add(release.repo_id, place(release, release.saes[0], sample))
    with pytest.warns(UserWarning, match="has a name: SAE.from_pretrained"):
        sae = SAE.from_pretrained(release.repo_id, "sae_final.pt")
    assert_computes(sae, sample)


def test_any_repository_is_read_by_a_converter_datasets_too(local_hub):
    sample = checkpoints.linear(seed=4)
    local_hub.add("lab/new-saes", {f"deep/{n}": c for n, c in sample.files.items()}, repo_type="dataset")
    sae = SAE.from_pretrained("lab/new-saes", "deep", converter=g4.converter(repo_type="dataset", k=5))
    assert_computes(sae, sample)
    with pytest.raises(HubError, match=r"no model repository lab/new-saes"):
        SAE.from_pretrained("lab/new-saes", "deep", converter=g4.converter(k=5))


def test_a_revision_can_be_pinned(local_hub):
    old, new = checkpoints.linear(seed=1), checkpoints.linear(seed=2)
    first = local_hub.add("lab/saes", old.files)
    local_hub.add("lab/saes", new.files)
    pinned = SAE.from_pretrained("lab/saes", "", converter=g4.converter(k=5, revision=first))
    assert_computes(pinned, old)
    assert_computes(SAE.from_pretrained("lab/saes", "", converter=g4.converter(k=5)), new)
    with pytest.raises(HubError, match="lab/saes has no revision 'v9'"):
        SAE.from_pretrained("lab/saes", "", converter=g4.converter(k=5, revision="v9"))


def test_a_config_is_read_without_the_weights(local_hub):
    release = PUBLIC["gemma-4-e2b-res-topk-rhizomatous"]
    entry = release.saes[17]
    sample = checkpoints.sparsify(d_in=64, d_sae=4096)  # a megabyte, beyond one read-ahead
    local_hub.add(release.repo_id, place(release, entry, sample))
    with pytest.warns(MismatchWarning):
        cfg = load_sae_config_from_huggingface(release.name, entry.id)
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["k"]) == ("topk", 64, 4096, 5)
    assert cfg["metadata"]["hook_name"] == "blocks.17.hook_resid_post"
    ranges = [r for _, path, r in local_hub.requests if path.endswith("sae.safetensors") and r]
    assert ranges and all(int(r.split("-")[1]) < 200_000 for r in ranges)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda hub: None, r"The hub has no model repository caiovicentino1/Gemma-4-E4B-SAE-L21-topk"),
        (
            lambda hub: hub.add(
                "caiovicentino1/Gemma-4-E4B-SAE-L21-topk", {"sae_finale.pt": b"", "sae_final.json": b"{}"}
            ),
            r"has no file sae_final\.pt. Did you mean 'sae_finale\.pt'",
        ),
        (
            lambda hub: (hub.add(CAIO, checkpoints.plain().files), hub.gate(CAIO)),
            "is gated: ask for access",
        ),
        (lambda hub: hub.stop(), r"is not in the cache, and the hub cannot be reached|cannot be read from the hub"),
    ],
)
def test_a_repository_that_cannot_be_read_is_one_error_that_names_it(local_hub, break_it, message):
    break_it(local_hub)
    with pytest.raises(HubError, match=message) as caught:
        SAE.from_pretrained("gemma-4-e4b-res-topk-caiovicentino1", "layer_21_width_32k_l0_128")
    assert "caiovicentino1/Gemma-4-E4B-SAE-L21-topk" in str(caught.value)
    with pytest.raises(HubError, match="caiovicentino1"):
        SAE.from_pretrained("gemma-4-e4b-res-topk-caiovicentino1", "layer_21_width_32k_l0_128", force_download=True)


@resuming
def test_a_broken_download_leaves_the_cache_usable(local_hub):
    release = PUBLIC["gemma-4-e4b-res-topk-caiovicentino1"]
    entry = release.saes[0]
    sample = make(release, entry)
    local_hub.add(release.repo_id, place(release, entry, sample))
    local_hub.cut(release.repo_id, "sae_final.pt", after=2000)
    with pytest.warns(MismatchWarning):
        sae = SAE.from_pretrained(release.name, entry.id)  # resumed by the client
    assert_computes(sae, sample)
    assert any(r == "bytes=2000-" for _, _, r in local_hub.requests)


def test_without_a_network_the_cache_is_enough(local_hub):
    release = PUBLIC["gemma-4-31b-res-topk-adam1010"]  # needs a listing of the repository
    entry = release.saes[0]
    sample = checkpoints.linear(k=64, d_sae=128)
    local_hub.add(release.repo_id, place(release, entry, sample), repo_type="dataset")
    with pytest.warns(MismatchWarning):
        SAE.from_pretrained(release.name, entry.id)
    local_hub.stop()
    with pytest.warns(MismatchWarning):
        assert_computes(SAE.from_pretrained(release.name, entry.id), sample)


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'gemma-4-e4b-res-topk-caiovicentino1'"):
        SAE.from_pretrained("gemma-4-e4b-res-topk-caiovicentino", "layer_21_width_32k_l0_128")
    with pytest.raises(UnknownNameError, match="'layer_21_width_32k_l0_128'"):
        SAE.from_pretrained("gemma-4-e4b-res-topk-caiovicentino1", "layer_21_width_32k")
    with pytest.raises(ValueError, match="not found in pretrained SAEs directory"):  # stock's own
        SAE.from_pretrained("gpt2-smal-res-jb", "blocks.0.hook_resid_pre")


def test_b_dec_that_the_release_does_not_speak_of_is_a_warning(local_hub):
    release = PUBLIC["gemma-4-e2b-res-batchtopk-solshine"]
    sample = make(release, release.saes[0])
    local_hub.add(release.repo_id, place(release, release.saes[0], sample))
    with pytest.warns(UnstatedWarning, match=r"sae_weights\.pt: nobody states whether b_dec"):
        SAE.from_pretrained(release.name, release.saes[0].id)


@pytest.mark.network
@pytest.mark.parametrize("name", PUBLIC)
def test_the_real_repository_has_what_the_catalogue_says(name):
    from sae_lens_gemma4.catalogue.verify import verify

    assert [d for d in verify(PUBLIC[name]) if d.kind != "new"] == []


@pytest.mark.parametrize(
    ("keys", "architecture"),
    [
        (("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"), "topk"),
        (("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), "topk"),
        (("encoder.weight", "encoder.bias", "decoder.weight"), None),
    ],
)
def test_a_topk_release_never_becomes_another_sae_in_silence(local_hub, keys, architecture):
    """Adam1010's layout is not stated, its k is: whatever arrives keeps 64 latents, or is refused."""
    release = PUBLIC["gemma-4-31b-res-topk-adam1010"]
    d_in, d_sae = 12, 128
    shapes = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae), "W_enc": (d_in, d_sae)}
    shapes |= {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    state = {key: torch.randn(shapes.get(key, (d_sae,))) for key in keys}
    local_hub.add(release.repo_id, {"layer_00.pt": checkpoints.pt(state)}, repo_type="dataset")
    if architecture is None:
        with pytest.raises(SAEError, match="no form known here"):
            SAE.from_pretrained(release.name, release.saes[0].id)
        return
    with pytest.warns(UnstatedWarning, match="whether b_dec is subtracted"):
        sae = SAE.from_pretrained(release.name, release.saes[0].id)
    assert (sae.cfg.architecture(), sae.cfg.k) == (architecture, 64)


def test_a_file_of_another_architecture_than_stated_is_a_named_warning(local_hub):
    release = PUBLIC["gemma-4-e4b-it-res-matryoshka-atawfeek"]
    sample = checkpoints.sae_lens()
    cfg = json.loads(sample.files["cfg.json"]) | {"architecture": "standard"}
    state = {k: v for k, v in checkpoints.tensors_of(sample).items() if k != "threshold"}
    sample.files |= {"cfg.json": json.dumps(cfg).encode(), "sae_weights.safetensors": save(state)}
    local_hub.add(release.repo_id, place(release, release.saes[0], sample))
    with pytest.warns(MismatchWarning, match="makes a standard SAE; it is stated to be matryoshka"):
        SAE.from_pretrained(release.name, release.saes[0].id)


def test_force_download_asks_the_hub_again(local_hub):
    release = PUBLIC["gemma-4-e4b-res-topk-caiovicentino1"]
    local_hub.add(release.repo_id, place(release, release.saes[0], make(release, release.saes[0])))

    def transfers(**kwargs):
        before = len(local_hub.requests)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SAE.from_pretrained(release.name, release.saes[0].id, **kwargs)
        return [path for method, path, _ in local_hub.requests[before:] if method == "GET" and "storage" in path]

    assert [len(transfers()), len(transfers()), len(transfers(force_download=True))] == [1, 0, 1]


@resuming
def test_without_a_network_a_config_is_that_of_the_revision_asked_for(local_hub):
    old, new = checkpoints.linear(seed=1, d_in=10), checkpoints.linear(seed=2, d_in=14)
    first = local_hub.add("lab/saes", old.files)
    local_hub.add("lab/saes", new.files)
    for revision in (first, None):
        SAE.from_pretrained("lab/saes", "", converter=g4.converter(k=5, revision=revision))
    local_hub.stop()
    widths = [g4.converter(k=5, revision=r).config("lab/saes", "")["d_in"] for r in (first, None)]
    assert widths == [10, 14]


def test_a_config_of_a_dataset_repository_is_read_from_headers_and_no_sparsity_is_asked_for(local_hub):
    release = PUBLIC["gemma-4-e2b-it-res-jumprelu-juiceb0xc0de"]
    entry = release.saes[9]
    sample = checkpoints.log_threshold(layer=9)
    local_hub.add(release.repo_id, place(release, entry, sample), repo_type="dataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = load_sae_config_from_huggingface(release.name, entry.id)
        SAE.from_pretrained(release.name, entry.id)
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("jumprelu", 12, 32)
    assert cfg["metadata"]["final_metrics"]["ev"] == 0.9768
    assert not [path for _, path, _ in local_hub.requests if "sparsity" in path or "checkpoint_full" in path]
