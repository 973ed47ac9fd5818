"""`interp label` by two models behind servers: whole, stopped in every way, and with a budget that runs out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sae_lens_gemma4.interp import gathering
from sae_lens_gemma4.studies import reading
from tests.interp.judges.llm_server import KEY
from tests.studies.recipes import ROOT, arguments, call, check_page, result, small

FEW = ("selection.n=5", "calibration=false", "probes=null", "examples.n_top=4", "examples.n_quantile=4")
FOUND = ("selection", "labels", "verification", "agreement", "confidence", "shown", "examples", "profile")


def found(document):
    """What a result says of labels, without what it took to get there."""
    return {key: document[key] for key in FOUND}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A folder in which the text has been read and profiled, and nobody asked."""
    folder = tmp_path_factory.mktemp("read") / "run"
    small("label", folder, *FEW)
    return folder


@pytest.fixture
def folder(read, tmp_path):
    """The same, of its own: the files are linked."""
    for part in ("dashboards/firings", ""):
        (tmp_path / "run" / part).mkdir(parents=True, exist_ok=True)
        for file in (read / part).iterdir():
            if file.is_file() and file.name not in ("result.json", "report.html", "recipe.yaml"):
                os.link(file, tmp_path / "run" / part / file.name)
    return tmp_path / "run"


@pytest.fixture
def reads_nothing(monkeypatch):
    """The text is there already: no test here needs the model to read it."""

    def fail(*args, **kwargs):
        raise AssertionError("the text was read again")

    monkeypatch.setattr(reading, "profile_layers", fail)
    monkeypatch.setattr(gathering, "harvest", fail)


def test_two_models_label_and_a_second_run_asks_and_reads_nothing(judges, folder, reads_nothing):
    one, other, changes = judges
    document = small("label", folder, *FEW, *changes)
    assert document["labels"]["judges"] == ["judge-openai", "judge-anthropic"]
    asked = [(len(server.requests), record) for server, record in zip((one, other), document["judges"], strict=True)]
    for n, record in asked:
        assert n == record["calls"] and 5 < n <= 5 + 2 * 5 and record["unanswered"] == 0
    for server in (one, other):
        assert set(server.answered.values()) == {1}
    for said in document["labels"]["labels"].values():
        assert said["judge-openai"] == said["judge-anthropic"] and said["judge-openai"]["label"].startswith("token")
    assert document["verification"]["judges"]["judge-openai"]["scorer"] == "judge-anthropic"
    check_page(folder)
    everything = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    assert KEY.encode() not in everything

    files = {file.name: file.read_bytes() for file in (folder / "labels").iterdir()}
    again = small("label", folder, *FEW, *changes)
    assert found(again) == found(document)
    assert [len(one.requests), len(other.requests)] == [n for n, _ in asked]
    assert all(record["calls"] == 0 and record["cached"] == record["questions"] for record in again["judges"])
    assert {file.name: file.read_bytes() for file in (folder / "labels").iterdir()} == files


def test_a_plan_says_how_many_questions_there_are(judges, folder):
    one, other, changes = judges
    code, out, err = call(*arguments("label", folder, *FEW, *changes), "--dry-run")
    assert code == 0, err
    assert not one.requests and not other.requests
    small("label", folder, *FEW, *changes)
    for server, name in ((one, "judge-openai"), (other, "judge-anthropic")):
        (said,) = [sentence for sentence in out.splitlines() if sentence.startswith(f"{name}: ")]
        assert said.startswith(f"{name}: 15 questions") and len(server.requests) <= 15 and " USD, " in said


def test_a_budget_that_runs_out_is_one_line_and_a_larger_one_goes_on(judges, folder, reads_nothing):
    one, other, changes = judges
    code, _, err = call(*arguments("label", folder, *FEW, *changes, "judges.0.max_calls=3"))
    assert code == 2 and "Traceback" not in err
    (said,) = [row for row in err.splitlines() if row.startswith("Error: ")]
    assert "max_calls is 3" in said and "raise max_calls and run it once more" in said
    assert len(one.requests) == 3 and not (folder / "result.json").exists()
    small("label", folder, *FEW, *changes, "judges.0.max_calls=100")
    assert set(one.answered.values()) == set(other.answered.values()) == {1}


def test_dollars_that_run_out(judges, folder):
    _, other, changes = judges
    code, _, err = call(*arguments("label", folder, *FEW, *changes, "judges.1.max_usd=0.00001"))
    assert code == 2 and "max_usd is 1e-05" in err and not other.requests


def test_a_server_that_refuses_the_key_is_one_line(judges, folder):
    one, _, changes = judges
    one.fail(*["401"] * 4)
    code, _, err = call(*arguments("label", folder, *FEW, *changes))
    assert code == 2 and "API key" in err and KEY not in err and "Traceback" not in err


def test_answers_that_are_none_are_counted_and_not_made_up(judges, folder):
    one, _, changes = judges
    reply = one.reply
    one.reply = lambda system, user: "I would rather not." if '"fires"' in user else reply(system, user)
    document = small("label", folder, *FEW, *changes)
    assert document["labels"]["unanswered"] == {"judge-openai": 5, "judge-anthropic": 0}
    assert all(said["judge-openai"] is None for said in document["labels"]["labels"].values())
    rows = [json.loads(row) for row in (folder / "labels" / "labels.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == {"judge-anthropic"}
    assert document["judges"][0]["unanswered"] == 5


def await_both(server, n, process=None):
    """Until both of a judge's calls are held, so that what was answered before has been kept."""
    deadline = time.monotonic() + 120
    while len(server.requests) < n and time.monotonic() < deadline:
        assert process is None or process.poll() is None, process.stdout.read().decode()[-2000:]
        time.sleep(0.02)


def test_control_c_then_a_kill_then_the_end(judges, folder, tmp_path):
    """No question that was answered is asked twice, and the result is that of a run that nobody stopped."""
    one, other, changes = judges
    one.stops_after = 2

    def interrupt():
        await_both(one, 2 + 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    code, _, err = call(*arguments("label", folder, *FEW, *changes))
    assert code == 130 and "Stopped. The same command goes on from here." in err and "Traceback" not in err
    assert sum(one.answered.values()) == 2 and not (folder / "result.json").exists()

    one.stops_after, other.stops_after = None, 4
    one.release.set()
    command = [sys.executable, "-m", "sae_lens_gemma4.cli", *map(str, arguments("label", folder, *FEW, *changes))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    await_both(other, 4 + 2, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and sum(other.answered.values()) == 4
    assert not (folder / "result.json").exists()

    other.stops_after = None
    other.release.set()
    document = small("label", folder, *FEW, *changes)
    assert set(one.answered.values()) == set(other.answered.values()) == {1}
    whole = small("label", tmp_path / "whole", *FEW, *changes)
    assert found(document) == found(whole) and result(folder) == document
    assert (folder / "labels" / "labels.jsonl").read_bytes() == (tmp_path / "whole/labels/labels.jsonl").read_bytes()
