import json
import struct
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sae_lens_gemma4.catalogue.files import commit_in_cache
from tests.catalogue.local_hub import CHUNK, local_hub, resuming

__all__ = ["local_hub"]

REPO = "lab/saes"
WEIGHTS = bytes(range(256)) * 20
CONFIG = b'{"d_sae": 16}'
FILES = {"README.md": b"# SAEs\n", "layer_1/cfg.json": CONFIG, "layer_1/sae.pt": WEIGHTS}


def read(*args, **kwargs):
    return Path(hf_hub_download(*args, **kwargs)).read_bytes()


def transfers(hub, name):
    """The Range of every GET that reached a file's content."""
    direct = name.endswith((".json", ".md"))
    return [
        span
        for method, path, span in hub.requests
        if method == "GET" and path.endswith("/" + name) and (direct or path.startswith("/storage/"))
    ]


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_file_arrives_as_it_was_added(local_hub, repo_type, tmp_path):
    (tmp_path / "rows").write_bytes(WEIGHTS)
    sha = local_hub.add(REPO, {**FILES, "data/rows é.parquet": tmp_path / "rows"}, repo_type=repo_type)
    for name, content in {**FILES, "data/rows é.parquet": WEIGHTS}.items():
        path = Path(hf_hub_download(REPO, name, repo_type=repo_type))
        assert path.read_bytes() == content
        assert path.is_relative_to(tmp_path / "huggingface") and sha in path.parts
    assert len(transfers(local_hub, "sae.pt")) == len(transfers(local_hub, "cfg.json")) == 1


def test_a_repository_of_another_type_is_another_repository(local_hub):
    local_hub.add(REPO, {"a.json": b"1"}, repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(REPO, "a.json")


def test_a_revision_is_pinned_by_name_and_by_sha(local_hub):
    first = local_hub.add(REPO, {"a.json": b"1", "a.pt": b"one"})
    local_hub.add(REPO, {"a.json": b"2"}, revision="refs/pr/1")
    local_hub.add(REPO, {"a.json": b"3"})
    assert read(REPO, "a.json", revision=first) == b"1"
    assert read(REPO, "a.json", revision="refs/pr/1") == b"2"
    assert read(REPO, "a.json") == b"3"
    assert read(REPO, "a.pt") == b"one"


@pytest.mark.parametrize("name", ["a.json", "a.pt"])
def test_a_cached_file_is_transferred_again_only_when_it_changed(local_hub, name):
    local_hub.add(REPO, {name: b"1"})
    assert read(REPO, name) == read(REPO, name) == b"1"
    assert len(transfers(local_hub, name)) == 1
    local_hub.add(REPO, {"other.json": b"{}"})
    assert read(REPO, name) == b"1"
    assert len(transfers(local_hub, name)) == 1
    sha = local_hub.add(REPO, {name: b"2"})
    assert read(REPO, name) == b"2"
    assert len(transfers(local_hub, name)) == 2
    local_hub.requests.clear()
    assert read(REPO, name, revision=sha) == b"2"
    assert local_hub.requests == []


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_listings(local_hub, repo_type):
    sha = local_hub.add(REPO, FILES, repo_type=repo_type)
    local_hub.add(REPO, {"only/here.pt": b"1"}, repo_type=repo_type, revision="v1")
    api = HfApi()
    assert api.list_repo_files(REPO, repo_type=repo_type) == sorted(FILES)
    assert huggingface_hub.list_repo_files(REPO, repo_type=repo_type, revision="v1") == ["only/here.pt"]
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, repo_type=repo_type)}
    assert list(tree) == ["README.md", "layer_1"] and not hasattr(tree["layer_1"], "size")
    inside = [entry.path for entry in api.list_repo_tree(REPO, "layer_1", repo_type=repo_type)]
    assert inside == ["layer_1/cfg.json", "layer_1/sae.pt"]
    info = api.repo_info(REPO, repo_type=repo_type, files_metadata=True)
    assert info.sha == sha and info.siblings[2].lfs.size == len(WEIGHTS)
    found = api.get_paths_info(REPO, ["layer_1/sae.pt", "layer_1", "absent"], repo_type=repo_type, revision=sha)
    assert [entry.path for entry in found] == ["layer_1", "layer_1/sae.pt"]
    assert found[1].lfs.sha256 == info.siblings[2].lfs.sha256
    with pytest.raises(EntryNotFoundError, match="absent does not exist"):
        list(api.list_repo_tree(REPO, "absent", repo_type=repo_type))


@pytest.mark.parametrize(("repo_type", "root"), [("model", REPO), ("dataset", f"datasets/{REPO}")])
def test_a_few_bytes_are_read_without_the_rest(local_hub, repo_type, root):
    large = bytes(1_000_000) + b"here" + bytes(1_000_000)
    local_hub.add(REPO, {"shard/rows.parquet": large}, repo_type=repo_type)
    with HfFileSystem().open(f"{root}/shard/rows.parquet", block_size=16) as file:
        assert file.size == len(large)
        file.seek(1_000_000)
        assert file.read(4) == b"here"
    spans = [span.removeprefix("bytes=").split("-") for span in transfers(local_hub, "rows.parquet")]
    assert spans and all(int(last) - int(first) < 100 for first, last in spans)
    assert HfFileSystem().glob(f"{root}/*/*.parquet") == [f"{root}/shard/rows.parquet"]


@pytest.mark.parametrize("padding", [0, 200_000])
def test_a_safetensors_header_is_read_without_the_tensors(local_hub, padding):
    entry = {"dtype": "F32", "shape": [1000, 250], "data_offsets": [0, 1_000_000]}
    header = json.dumps({"__metadata__": {"note": " " * padding}, "W_dec": entry}).encode()
    local_hub.add(REPO, {"sae.safetensors": struct.pack("<Q", len(header)) + header + bytes(1_000_000)})
    metadata = HfApi().parse_safetensors_file_metadata(REPO, "sae.safetensors")
    assert metadata.tensors["W_dec"].shape == [1000, 250]
    header_only = [f"bytes=8-{len(header) + 7}"] if padding else []
    assert transfers(local_hub, "sae.safetensors") == ["bytes=0-100000", *header_only]


@pytest.mark.parametrize(
    ("arguments", "error", "status"),
    [
        (("lab/absent", "cfg.json"), RepositoryNotFoundError, 401),
        ((REPO, "absent.json"), RemoteEntryNotFoundError, 404),
        ((REPO, "cfg.json", "absent"), RevisionNotFoundError, 404),
        ((REPO, "cfg.json", "0" * 40), RevisionNotFoundError, 404),
    ],
)
def test_what_is_absent_is_named(local_hub, arguments, error, status):
    local_hub.add(REPO, {"cfg.json": CONFIG})
    repo, name, *revision = arguments
    with pytest.raises(error) as caught:
        hf_hub_download(repo, name, revision=revision[0] if revision else None)
    assert type(caught.value) is error
    assert caught.value.response.status_code == status
    assert str(caught.value).startswith(f"{status} Client Error.")
    assert f"{local_hub.url}/{repo}/resolve/" in str(caught.value)


def test_the_listings_name_what_is_absent_too(local_hub):
    local_hub.add(REPO, FILES)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().list_repo_files("lab/absent")
    with pytest.raises(RevisionNotFoundError):
        HfApi().repo_info(REPO, revision="absent")
    with pytest.raises(FileNotFoundError, match="repository not found"):
        HfFileSystem().open("lab/absent/a.pt")
    with pytest.raises(FileNotFoundError):
        HfFileSystem().open(f"{REPO}/absent.pt")


@pytest.mark.parametrize(
    ("token", "status", "message"), [(None, 401, "Please log in"), ("hf_x", 403, "not in the authorized list")]
)
def test_a_gated_repository_is_listed_and_refuses_its_files(local_hub, token, status, message):
    local_hub.add(REPO, FILES)
    local_hub.gate(REPO)
    with pytest.raises(GatedRepoError, match=message) as caught:
        hf_hub_download(REPO, "layer_1/sae.pt", token=token)
    assert isinstance(caught.value, RepositoryNotFoundError)
    assert caught.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        HfApi().parse_safetensors_file_metadata(REPO, "layer_1/sae.pt", token=token)
    assert HfApi().list_repo_files(REPO, token=token) == sorted(FILES)
    assert HfApi().repo_info(REPO, token=token).gated == "manual"


def test_what_was_cached_before_the_gate_stays_readable(local_hub):
    local_hub.add(REPO, FILES)
    hf_hub_download(REPO, "layer_1/sae.pt")
    local_hub.gate(REPO)
    assert read(REPO, "layer_1/sae.pt") == WEIGHTS


@resuming
def test_a_broken_transfer_resumes_where_it_was_cut(local_hub):
    local_hub.add(REPO, FILES)
    local_hub.cut(REPO, "layer_1/sae.pt", after=2 * CHUNK)
    local_hub.cut(REPO, "layer_1/sae.pt", after=CHUNK + 500)
    assert read(REPO, "layer_1/sae.pt") == WEIGHTS
    assert transfers(local_hub, "sae.pt") == [None, f"bytes={2 * CHUNK}-", f"bytes={3 * CHUNK}-"]


@resuming
def test_the_cache_is_usable_after_a_download_that_failed(local_hub, tmp_path):
    local_hub.add(REPO, FILES)
    local_hub.cut(REPO, "layer_1/sae.pt", after=CHUNK)
    for _ in range(5):
        local_hub.cut(REPO, "layer_1/sae.pt", after=0)
    with pytest.raises(Exception, match="peer closed connection") as caught:
        hf_hub_download(REPO, "layer_1/sae.pt")
    assert not isinstance(caught.value, (OSError, HfHubHTTPError))
    assert not [path for path in (tmp_path / "huggingface").rglob("*") if path.name.startswith("sae.pt")]
    assert read(REPO, "layer_1/sae.pt") == WEIGHTS


@resuming
def test_a_hub_that_is_gone_leaves_the_cache(local_hub):
    local_hub.add(REPO, FILES)
    hf_hub_download(REPO, "layer_1/sae.pt")
    local_hub.stop()
    assert read(REPO, "layer_1/sae.pt") == WEIGHTS
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "layer_1/cfg.json")


def test_the_commit_of_what_was_downloaded_is_known(local_hub):
    assert commit_in_cache(REPO) is None
    sha = local_hub.add(REPO, {"a.json": b"1"})
    read(REPO, "a.json")
    assert commit_in_cache(REPO) == sha
    local_hub.add(REPO, {"a.json": b"2"})
    assert commit_in_cache(REPO) == sha  # what was read, not what is there now
    assert commit_in_cache(REPO, revision="0" * 40) == "0" * 40
