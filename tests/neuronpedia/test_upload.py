"""Uploads to a server that answers as Neuronpedia does, with the real client; `api_server` says how it fails."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_lens_gemma4.cli import uploading  # noqa: F401  (it adds its command)
from sae_lens_gemma4.cli.group import cli
from sae_lens_gemma4.errors import ConfigError, DataError, DependencyError, HubError, MismatchWarning
from sae_lens_gemma4.neuronpedia.site import BASE_URL, Patience, Site, SiteError
from sae_lens_gemma4.neuronpedia.upload import upload_neuronpedia
from tests.neuronpedia.api_server import Neuronpedia
from tests.neuronpedia.sample import write_dashboards

SOURCE = ("gemma-4-e4b", "21-matryoshka-res-65k")
QUICK = Patience(tries=12, first_s=0.001, longest_s=0.002, limited_longest_s=0.002, settle_s=0.02, timeout_s=10)

FORKER = """
import os, sys
from sae_lens_gemma4.neuronpedia.upload import upload_neuronpedia
for line in sys.stdin:
    folder, url = line.split()
    child = os.fork()
    if not child:
        upload_neuronpedia(folder, base_url=url, batch_size=4, progress=False)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def forker():
    """A process that has imported the package, and uploads in children that can be killed."""
    environment = {**os.environ, "NEURONPEDIA_API_KEY": "key-of-ann"}
    command = [sys.executable, "-c", FORKER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield process
    process.kill()
    process.wait(10)


@pytest.fixture
def site():
    with Neuronpedia() as site:
        yield site


@pytest.fixture
def folder(tmp_path):
    return write_dashboards(tmp_path / "dashboards")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "key-of-ann")


def upload(folder, site, **given):
    return upload_neuronpedia(
        folder, **{"base_url": site.url, "patience": QUICK, "progress": False, "batch_size": 4, **given}
    )


def written(folder):
    """The dashboards as the files have them."""
    files = [json.loads(path.read_text()) for path in folder.glob("batch-*.json")]
    return {f["feature_index"]: f for file in files for f in file["features"]}


def assert_each_is_there_once(site, folder, source=SOURCE):
    expected = {index: len(f["activations"]) for index, f in written(folder).items()}
    assert dict(site.examples_of(*source)) == expected
    assert sorted(int(index) for *place, index in site.latents if tuple(place) == source) == sorted(expected)


def test_what_arrives_is_what_the_dashboards_say(folder, site):
    done = upload(folder, site)
    assert_each_is_there_once(site, folder)
    for index, dashboard in written(folder).items():
        latent = site.latents[(*SOURCE, str(index))]
        assert latent["density"] == dashboard["frac_nonzero"]
        for name, sign in (("topLogits", "pos"), ("bottomLogits", "neg")):
            assert [pair["token"] for pair in latent[name]] == dashboard[f"{sign}_str"]
            assert [pair["value"] for pair in latent[name]] == dashboard[f"{sign}_values"]
        for sent, example in zip(latent["activations"], dashboard["activations"], strict=True):
            assert sent["tokens"] == example["tokens"] and sent["values"] == example["values"]
            assert sent["quantileMax"] == example["bin_max"] and sent["quantileMin"] == example["bin_min"]
            top = example["bin_contains"] == -1
            assert sent["quantileFraction"] == (None if top else example["bin_contains"])
    assert (done.sent, done.already_there, done.dead) == (18, 0, 2)
    assert done.url == site.url.removesuffix("api") + "/".join(SOURCE)


def test_the_set_is_made_once_and_used_again(folder, tmp_path, site):
    upload(folder, site, description="x" * 127 + "😀", url="https://huggingface.co/a/b")
    made = site.sets["gemma-4-e4b", "matryoshka-res-65k"]
    assert made["description"] == "x" * 127 + "…" and made["urls"] == ["https://huggingface.co/a/b"]
    upload(write_dashboards(tmp_path / "layer_7", layer=7), site)
    assert site.count("new set") == 1
    assert_each_is_there_once(site, tmp_path / "layer_7", ("gemma-4-e4b", "7-matryoshka-res-65k"))


def test_nothing_is_printed(folder, site, capsys):
    upload(folder, site)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "fault",
    [
        "429", "429 after 0", "500 before", "500 after", "503 before", "504 after", "cut before", "cut after", "html",
    ],
)  # fmt: skip
def test_each_latent_lands_once_whatever_fails(folder, site, fault):
    site.fail("upload", "ok", fault, "ok", fault, fault)
    site.fail("latent", "ok", "ok", fault)
    site.fail("set", fault)
    site.fail("new set", fault)
    done = upload(folder, site)
    assert_each_is_there_once(site, folder)
    assert done.sent == 18


FAULTS = ["ok", "429", "500 before", "500 after", "503 before", "504 after", "cut before", "cut after", "html"]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    uploads=st.lists(st.sampled_from(FAULTS), max_size=8),
    look_ups=st.lists(st.sampled_from(FAULTS), max_size=8),
    tries=st.integers(2, 9),
)
def test_each_latent_lands_once_whatever_fails_in_whatever_order(tmp_path_factory, uploads, look_ups, tries):
    folder = write_dashboards(tmp_path_factory.mktemp("dashboards"), d_sae=12)
    patience = Patience(tries, 99, 0.0, 0.0, 0.0, settle_s=0.0, timeout_s=10)
    with Neuronpedia() as site:
        site.fail("upload", *uploads)
        site.fail("latent", *look_ups)
        while True:
            try:
                upload(folder, site, patience=patience)
                break
            except SiteError:
                pass
        assert_each_is_there_once(site, folder)


def test_an_answer_that_comes_too_late_is_waited_for(folder, site):
    """The batch lands after the client gave up, and after it looked for it."""
    site.slow_s = 0.5
    site.fail("upload", "ok", "slow")
    upload(folder, site, patience=Patience(first_s=0.001, settle_s=2.0, timeout_s=0.15))
    assert site.late.wait(10)
    assert_each_is_there_once(site, folder)


def test_it_gives_up_after_some_tries_and_goes_on_when_called_again(folder, site):
    site.fail("upload", "ok", "ok", *["503 before"] * 3)
    with pytest.raises(SiteError, match=r"latent 9 to 13: .* answered 503: a page, .*the next call goes on from there"):
        upload(folder, site, patience=Patience(tries=3, first_s=0.001, settle_s=0.0))
    assert site.count("upload") == 5
    done = upload(folder, site)
    assert (done.sent, done.already_there) == (10, 8)
    assert_each_is_there_once(site, folder)


def test_a_batch_that_could_not_be_looked_up_is_not_sent_in_parts(folder, site):
    site.fail("upload", "500 after")
    site.fail("latent", "ok", "ok", "500 before", "500 before")
    with pytest.raises(SiteError, match=r"latent 0 to 4: .* answered 500"):
        upload(folder, site, patience=Patience(tries=2, first_s=0.001, settle_s=0.0))
    assert site.count("upload") == 1
    done = upload(folder, site)
    assert (done.sent, done.already_there) == (14, 4)
    assert_each_is_there_once(site, folder)


@pytest.mark.parametrize("when", ["hold before", "hold after", "hold, then commit"])
def test_a_killed_upload_goes_on_without_a_gap_or_a_double(folder, site, forker, when):
    site.fail("upload", "ok", "ok", when)
    print(folder, site.url, file=forker.stdin, flush=True)
    child = int(forker.stdout.readline())
    assert site.held.wait(60)
    os.kill(child, signal.SIGKILL)
    assert forker.stdout.readline() == "gone\n"
    threading.Timer(0.3, site.release.set).start()
    done = upload(folder, site, patience=Patience(first_s=0.001, settle_s=1.5))
    assert_each_is_there_once(site, folder)
    assert done.sent + done.already_there == 18
    assert done.already_there == (8 if when == "hold before" else 12)


def test_ctrl_c_leaves_a_ledger_that_the_next_call_goes_on_with(folder, site):
    def interrupt(_):
        raise KeyboardInterrupt

    site.fail("upload", "ok", "500 after", "ok")
    site.fail("latent", "ok", "ok", "503 before")
    with pytest.raises(KeyboardInterrupt):
        upload(folder, site, patience=Patience(sleep=interrupt))
    done = upload(folder, site)
    assert (done.sent, done.already_there) == (10, 8)
    assert_each_is_there_once(site, folder)


def test_a_finished_upload_asks_the_site_nothing_more(folder, site):
    upload(folder, site)
    asked = len(site.requests)
    done = upload(folder, site)
    assert (done.sent, done.already_there, len(site.requests)) == (0, 18, asked)


def test_a_line_that_a_kill_cut_short_is_dropped(folder, site):
    site.fail("upload", "ok", "ok", "400")
    with pytest.raises(SiteError):
        upload(folder, site)
    (ledger,) = folder.glob("uploaded-*.jsonl")
    ledger.write_bytes(ledger.read_bytes() + b'{"state": "sent", "indices": [' + b"9, " * 1000)
    upload(folder, site)
    assert_each_is_there_once(site, folder)
    assert all(json.loads(line) for line in ledger.read_text().splitlines())


def test_a_ledger_that_is_none_is_named(folder, site, tmp_path):
    for text in ("no json\n", "[1]\n", '{"schema": 9}\n'):
        (tmp_path / "state.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"state.jsonl is no ledger of an upload"):
            upload(folder, site, state=tmp_path / "state.jsonl")
    with pytest.raises(ConfigError, match=r"cannot be noted in .*state\.jsonl/inside\.jsonl"):
        upload(folder, site, state=tmp_path / "state.jsonl" / "inside.jsonl")
    assert site.count("upload") == 0


def test_dashboards_that_changed_since_are_refused(folder, site):
    site.fail("upload", "ok", "400")
    with pytest.raises(SiteError):
        upload(folder, site)
    with pytest.raises(DataError, match="other content: the dashboards or the labels have changed"):
        upload(folder, site, explanations={0: "a label"})
    write_dashboards(folder, seed=1)
    with pytest.raises(DataError, match="other content"):
        upload(folder, site)
    assert site.count("upload") == 2


def test_an_upload_that_sent_nothing_binds_the_next_to_nothing(folder, site):
    for wrong in ({"layer": 42}, {"suffix": "l0-34"}, {"api_key": "a-wrong-key"}):
        with pytest.raises((ConfigError, SiteError)):
            upload(folder, site, **wrong)
    assert not list(folder.glob("uploaded-*")) and not list(folder.glob(".*"))
    site.fail("upload", "400")
    with pytest.raises(SiteError):
        upload(folder, site)
    upload(folder, site, explanations={0: "a label"})
    assert_each_is_there_once(site, folder)
    assert len(site.explanations) == 1
    (ledger,) = folder.glob("uploaded-*")
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line.get("state", "header") for line in lines] == ["header", *["sending", "sent"] * 5]


def test_a_ledger_of_its_first_line_alone_is_begun_anew(folder, site, tmp_path):
    state = tmp_path / "state.jsonl"
    upload(folder, site, state=state)
    first = state.read_bytes().splitlines(keepends=True)[0]
    for content in (b"", first[:30], first, first + b'{"state": "sending", "ind' + b"9, " * 1000):
        state.write_bytes(content)
        write_dashboards(folder, seed=len(content))
        upload(folder, site, state=state, set_name=f"set-{len(content)}")
        assert_each_is_there_once(site, folder, (SOURCE[0], f"21-set-{len(content)}"))
        assert len(state.read_text().splitlines()) == 11


def test_a_file_of_something_else_is_not_taken_for_a_ledger(folder, site, tmp_path):
    state = tmp_path / "notes.json"
    for text in ('{"mine": 1}', "notes", '{"schema": 1}\n', '{"schema": 1, "content": {}}\n', "[" * 100_000 + "\n"):
        state.write_text(text)
        with pytest.raises(DataError, match=r"notes.json is no ledger of an upload"):
            upload(folder, site, state=state)
        assert state.read_text() == text
    assert not site.requests


def test_a_ledger_with_a_line_that_says_nothing_is_named(folder, site, tmp_path):
    upload(folder, site, state=tmp_path / "state.jsonl")
    whole = (tmp_path / "state.jsonl").read_text()
    for line in ("{}", '{"state": "sent", "indices": [[1]], "at": 0}', '{"state": "sent", "indices": [0], "at": "x"}'):
        (tmp_path / "state.jsonl").write_text(whole + line + "\n")
        with pytest.raises(DataError, match="has a line that is none of a ledger"):
            upload(folder, site, state=tmp_path / "state.jsonl")


def test_a_ledger_of_another_source_is_refused(folder, site, tmp_path):
    upload(folder, site, state=tmp_path / "state.jsonl")
    with pytest.raises(DataError, match=r"is of an upload to .*21-matryoshka-res-65k, not to .*22-matryoshka"):
        upload(folder, site, state=tmp_path / "state.jsonl", layer=22)


def test_latents_that_are_there_without_a_ledger_are_not_sent_again(folder, site):
    upload(folder, site)
    next(folder.glob("uploaded-*.jsonl")).unlink()
    with pytest.raises(ConfigError, match=r"has latents already \(0, 19\), and this ledger did not send them"):
        upload(folder, site)
    assert_each_is_there_once(site, folder)


def test_two_uploads_at_once_are_one_too_many(folder, site):
    site.fail("upload", "hold after")
    first = threading.Thread(target=upload, args=(folder, site))
    first.start()
    assert site.held.wait(10)
    with pytest.raises(ConfigError, match="Another process is at the upload"):
        upload(folder, site)
    site.release.set()
    first.join()
    assert_each_is_there_once(site, folder)
    assert not list(folder.glob(".*"))


def test_a_refusal_is_final_and_says_what_the_site_said(folder, site):
    site.fail("upload", "400")
    with pytest.raises(SiteError, match=r"answered 400: this must be a `number` type \(at features\[0\]\.density\)"):
        upload(folder, site)
    assert site.count("upload") == 1


def test_what_the_site_says_does_nothing_to_a_terminal(folder, site):
    site.add_set("matryoshka-res-65k", user="bob\x1b[31m")
    with pytest.raises(ConfigError) as raised:
        upload(folder, site)
    assert str(raised.value).isprintable()
    site.fail("model", "escape")
    with pytest.raises(SiteError, match=r"answered 400: no .*such thing") as raised:
        upload(folder, site, set_name="another")
    assert str(raised.value).isprintable()


def test_a_wrong_key_is_final_and_never_shown(folder, site):
    with pytest.raises(SiteError, match=r"does not know this API key. You find yours at") as raised:
        upload(folder, site, api_key="a-secret-key")
    assert site.count("new set") == 1 and site.count("upload") == 0
    assert "a-secret-key" not in str(raised.value) and isinstance(raised.value, HubError)
    with pytest.raises(ConfigError, match="characters that no key has") as raised:
        upload(folder, site, api_key="a-secret\nkey")
    assert "secret" not in str(raised.value)


def test_a_missing_key_or_client_is_named_before_anything_is_read(folder, site, monkeypatch):
    monkeypatch.setitem(sys.modules, "neuronpedia.np_feature", None)
    with pytest.raises(DependencyError, match=r'pip install "sae-lens-gemma4\[neuronpedia\]"'):
        upload(folder, site)
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    with pytest.raises(ConfigError, match=r"set NEURONPEDIA_API_KEY. You find yours at neuronpedia.org/account"):
        upload(folder, site)


@pytest.mark.parametrize("reason", [TypeError("pydantic 1 is too old"), RuntimeError("no such backend")])
def test_a_client_that_cannot_be_imported_is_named_with_its_reason(folder, site, monkeypatch, reason):
    def broken(name):
        raise reason

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(
        DependencyError, match=rf"neuronpedia\]\". The one here fails with {type(reason).__name__}: {reason}"
    ):
        upload(folder, site)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": "4"}, "batches of 1 to 128 latents, not '4' .batch_size"),
        ({"batch_size": 1.5}, "batches of 1 to 128 latents, not 1.5 .batch_size"),
        ({"batch_size": True}, "batches of 1 to 128 latents, not True .batch_size"),
        ({"max_bytes": "x"}, "max_bytes must be a whole number above 0, not 'x'"),
        ({"max_bytes": 0}, "max_bytes must be a whole number above 0, not 0"),
        ({"base_url": 5}, "base_url must be a text, not of type int"),
        ({"api_key": 5}, "api_key must be a text, not of type int"),
        ({"description": ["a"]}, "description must be a text, not of type list"),
        ({"url": 5}, "url must be a text, not of type int"),
        ({"url": "my page"}, "'my page' is no web address .url. that a set can have"),
    ],
)
def test_what_is_of_a_wrong_kind_is_named_before_anything_is_asked_or_made(folder, site, wrong, message):
    with pytest.raises(ConfigError, match=message):
        upload(folder, site, model_id="gemma-4-x", new_model=True, **wrong)
    assert not site.requests


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "neuronpedia.org", "http://key@127.0.0.1", ""])
def test_an_address_that_is_none_is_named(folder, site, url):
    if url:
        with pytest.raises(ConfigError, match=r"is no address of an API, such as https://www.neuronpedia.org/api"):
            upload(folder, site, base_url=url)
    with pytest.raises(ConfigError, match="is not encrypted"):
        upload(folder, site, base_url="http://neuronpedia.example/api")
    assert BASE_URL.startswith("https://")


def test_a_key_is_not_sent_on_to_another_place(folder, site):
    site.fail("set", "redirect")
    with pytest.raises(SiteError, match=r"sends on to https://elsewhere.example/api; if you trust that"):
        upload(folder, site)


def test_a_server_that_is_not_there_is_tried_some_times(folder, site):
    waited = []
    site.__exit__()
    with pytest.raises(SiteError, match=r"No answer from 127.0.0.1"):
        upload(folder, site, patience=Patience(tries=4, first_s=2, longest_s=5, sleep=waited.append))
    assert len(waited) == 3
    assert all(longest / 2 <= wait <= longest for wait, longest in zip(waited, (2, 4, 5), strict=True))


def test_the_site_says_how_long_to_wait(folder, site):
    waited = []
    patience = Patience(first_s=0.5, limited_longest_s=1, tries=1, sleep=waited.append)
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    site.fail("upload", "429 after 7", "429", "429 after 99999", "429", f"429 after {in_a_minute}")
    upload(folder, site, patience=patience)
    assert waited[0] == 7 and 0.5 <= waited[1] <= 1 and waited[2] == 3600 and 0.5 <= waited[3] <= 1
    assert 55 < waited[4] <= 60


def test_a_model_that_the_site_does_not_know_is_named_or_made(folder, site):
    with pytest.raises(ConfigError, match=r"has no model 'gemma-4-x'. Its team adds models on request \(support@"):
        upload(folder, site, model_id="gemma-4-x")
    upload(folder, site, model_id="gemma-4-x", new_model=True)
    made = site.models["gemma-4-x"]
    assert (made["layers"], made["displayName"]) == (42, "gemma-4-E4B")
    assert made["website"] == "https://huggingface.co/google/gemma-4-E4B"
    assert_each_is_there_once(site, folder, ("gemma-4-x", SOURCE[1]))


def test_a_model_without_a_number_of_layers_is_not_made(tmp_path, site):
    folder = write_dashboards(tmp_path, model={"name": "somewhere/model"})
    with pytest.raises(
        ConfigError, match=r"needs the number of layers, 1 to 127, and the dashboards’ settings say None"
    ):
        upload(folder, site, model_id="gemma-4-x", new_model=True)
    assert site.count("new model") == 0


def test_a_set_of_somebody_else_is_named(folder, site):
    site.add_set("matryoshka-res-65k", user="bob")
    with pytest.raises(ConfigError, match="The set matryoshka-res-65k of gemma-4-e4b is bob’s, and only who made it"):
        upload(folder, site)
    site.add_set("matryoshka-res-65k", user="bob", visibility="PUBLIC")  # only an upload tells
    with pytest.raises(SiteError, match="answers so, too, where the set is not yours; it is bob’s"):
        upload(folder, site, patience=Patience(tries=2, first_s=0.001))
    assert not site.examples


def test_a_layer_that_the_site_has_no_source_for_is_named_before_a_set_is_made(folder, site):
    with pytest.raises(ConfigError, match=r"has 42 layers of gemma-4-e4b.*Is the layer right?"):
        upload(folder, site, layer=42)
    site.models["gemma-4-e4b"]["layers"] = 0
    with pytest.raises(ConfigError, match=r"has 0 layers of gemma-4-e4b.*Its team can mend that"):
        upload(folder, site)
    assert not site.sets


def test_a_suffix_cannot_be_made_by_self_service_and_can_be_used_where_it_is(folder, site):
    with pytest.raises(ConfigError, match=r"65k__l0-34 cannot be made by self-service: .*one source a layer, 21-matry"):
        upload(folder, site, suffix="l0-34")
    assert not site.sets
    site.add_set("matryoshka-res-65k")
    with pytest.raises(ConfigError, match="has no source 21-matryoshka-res-65k__l0-34"):
        upload(folder, site, suffix="l0-34")
    sources = site.sets["gemma-4-e4b", "matryoshka-res-65k"]["sources"]
    sources.append({**sources[21], "id": "21-matryoshka-res-65k__l0-34"})
    upload(folder, site, suffix="l0-34")
    assert_each_is_there_once(site, folder, ("gemma-4-e4b", "21-matryoshka-res-65k__l0-34"))


def test_what_is_given_beats_the_folder_and_what_neither_says_is_asked_for(tmp_path, site):
    folder = write_dashboards(tmp_path, sae_set=None, sae_id_suffix="l0-34")
    with pytest.raises(ConfigError, match="does not say set_name; state it"):
        upload(folder, site)
    with pytest.raises(ConfigError, match=r"refuses the set name 'My_Set'.*'my-set' would do"):
        upload(folder, site, set_name="My_Set")
    assert not site.requests
    upload(folder, site, set_name="my-set", layer=3, suffix="")
    assert_each_is_there_once(site, folder, ("gemma-4-e4b", "3-my-set"))


def test_labels_go_along_and_those_of_dead_latents_are_counted(folder, site):
    done = upload(folder, site, explanations={0: "cats", 3: "never fired", 5: ["dogs", "hounds"]})
    sent = [(e["index"], e["text"]) for e in site.explanations]
    assert sorted(sent) == [(0, "cats"), (5, "dogs"), (5, "hounds")]
    assert (done.labels, done.unsent_labels) == (3, 1)
    with pytest.raises(DataError, match="there is no latent 20; they are 0 to 19"):
        upload(folder, site, explanations={20: "none"})


def test_a_file_without_a_label_is_warned_of(folder, site, tmp_path):
    (tmp_path / "labels.csv").write_text("index,label\n")
    with pytest.warns(MismatchWarning, match=r"There is no label in .*labels\.csv\."):
        done = upload(folder, site, explanations=tmp_path / "labels.csv")
    assert done.labels == 0


def test_a_batch_has_at_most_128_latents_and_the_bytes_that_the_site_takes(tmp_path, site):
    folder = write_dashboards(tmp_path, d_sae=140, per_file=1000, dead=())
    upload(folder, site, batch_size=128)
    assert [len(body["features"]) for body in site.bodies()] == [128, 12]
    site.largest = 0
    upload(folder, site, batch_size=128, layer=2, max_bytes=100_000)
    assert 95_000 < site.largest <= 100_000
    with pytest.raises(ConfigError, match="takes batches of 1 to 128 latents, not 129"):
        upload(folder, site, batch_size=129, layer=3)
    with pytest.raises(DataError, match=r"The dashboard of latent 0 takes .* bytes, and Neuronpedia takes 1,000"):
        upload(folder, site, layer=3, max_bytes=1_000)


@pytest.mark.parametrize("what", ["latents", "bytes"])
def test_a_batch_that_is_too_much_for_the_site_is_halved(tmp_path, site, what):
    folder = write_dashboards(tmp_path, d_sae=40, dead=())
    site.most_latents, site.most_bytes = (6, 10**9) if what == "latents" else (128, 25_000)
    upload(folder, site, batch_size=16, patience=Patience(tries=2, first_s=0.001, settle_s=0.0))
    assert_each_is_there_once(site, folder)
    sizes = Counter(len(body["features"]) for body in site.bodies())
    assert sizes[16] <= 2 and sizes[1] == 0 and sizes[4] >= 8, sizes  # found out once, not with each batch


def test_a_folder_where_nothing_fired_is_named(tmp_path, site):
    folder = write_dashboards(tmp_path, d_sae=4, dead=range(4))
    with pytest.raises(DataError, match=r"No latent in .* ever fired"):
        upload(folder, site)


def test_a_latent_with_two_dashboards_is_named(folder, site):
    (folder / "batch-7.json").write_text((folder / "batch-0.json").read_text())
    with pytest.raises(DataError, match="has two dashboards of latent 0"):
        upload(folder, site)
    assert not site.requests


def test_one_broken_row_stops_the_upload_before_it_begins(folder, site):
    path = folder / "batch-2.json"
    broken = json.loads(path.read_text())
    broken["features"][-1]["activations"][2]["values"][5] = float("nan")
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError, match="dashboard of latent 19 cannot be uploaded: a value of it is nan"):
        upload(folder, site)
    assert not site.requests


def test_dashboards_beside_their_export_are_found_and_an_export_is_told_from_them(folder, site, tmp_path):
    place = tmp_path / "exports" / SOURCE[0] / SOURCE[1]
    place.mkdir(parents=True)
    (place / "source.jsonl").write_text("{}\n")
    for export in (place, place.parent, tmp_path / "exports"):
        with pytest.raises(DataError, match=r"is an export, and an upload is of dashboards. .* --offline packs it"):
            upload(export, site)
    upload(tmp_path, site)
    assert_each_is_there_once(site, folder)
    assert len(list(folder.glob("uploaded-*"))) == 1
    (folder / "run_settings.json").write_text('{"schema": 1}')
    with pytest.raises(DataError, match="are not finished"):
        upload(tmp_path, site)
    with pytest.raises(DataError, match=r"nowhere is no folder of dashboards"):
        upload(tmp_path / "nowhere", site)


def run(*args):
    return CliRunner().invoke(cli, ["upload-neuronpedia", *map(str, args)], catch_exceptions=False)


def test_a_dry_run_says_what_would_be_sent_without_key_client_or_network(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "neuronpedia.np_feature", None)
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    (tmp_path / "labels.json").write_text(json.dumps({"0": "x" * 600, "3": "dead"}))
    result = run(folder, "--dry-run", "--batch-size", 8, "--labels", tmp_path / "labels.json")
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if not line.startswith("checking")]
    assert lines[0] == "gemma-4-e4b/21-matryoshka-res-65k: 18 latents, 0 to 19; 2 dead left out."
    assert lines[1].startswith("3 requests, ")
    assert lines[2] == "1 labels; 1 left out, of latents without a dashboard."
    assert lines[3] == "The longest label has 512 of 512 characters."
    assert lines[4] == "1 labels cut to 512 characters."
    assert lines[5].startswith("Nothing was sent.")
    assert not list(folder.glob("uploaded-*"))


def test_the_dry_run_counts_the_bytes_that_are_sent(folder, site):
    upload(folder, site, batch_size=8)
    sizes = [len(json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()) for body in site.bodies()]
    result = run(folder, "--dry-run", "--batch-size", 8)
    assert f"3 requests, {sum(sizes):,} bytes in all." in result.stdout


def test_the_command_uploads_and_says_where_to_look(folder, site):
    result = run(folder, "--base-url", site.url, "--layer", 5)
    assert result.exit_code == 0
    assert "gemma-4-e4b/5-matryoshka-res-65k: 18 latents sent, 0 were there, 2 dead left out." in result.stdout
    assert result.stdout.rstrip().endswith("/gemma-4-e4b/5-matryoshka-res-65k")
    assert_each_is_there_once(site, folder, ("gemma-4-e4b", "5-matryoshka-res-65k"))


def test_the_command_says_what_is_not_sent_of_labels(folder, site, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"0": {"label": "cats", "notes": "a person"}, "1": "dogs"}))
    for more in (["--dry-run"], ["--base-url", site.url]):
        result = run(folder, "--labels", tmp_path / "labels.json", *more)
        assert "\n1 labels sent without who or what stated them.\n" in result.stdout


def test_ctrl_c_says_how_to_go_on(folder, site, monkeypatch):
    send, calls = Site.upload, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        send(*args)

    monkeypatch.setattr(Site, "upload", interrupted)
    command = (folder, "--base-url", site.url, "--batch-size", 4)
    result = run(*command)
    assert result.exit_code == 1 and "\nStopped. The same command goes on from here.\n" in result.stderr
    assert len(site.latents) == 8 and not list(folder.glob(".*"))
    monkeypatch.setattr("sae_lens_gemma4.neuronpedia.upload.Patience", lambda: QUICK)
    assert "10 latents sent, 8 were there" in run(*command).stdout
    assert_each_is_there_once(site, folder)


def test_what_is_of_uploads_does_not_go_with_offline(folder, tmp_path):
    result = run(folder, "--offline", tmp_path / "x.tar", "--model-id", "gemma-4-e4b")
    assert result.exit_code == 2 and "--model-id is of uploads" in result.output
