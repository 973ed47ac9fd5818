"""The benches compare like with like, count right and say what did not run. Speed itself is not tested here."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sae_lens.saes.sae import TrainStepInput

from sae_lens_gemma4.bench import accuracy, contestants, train
from sae_lens_gemma4.bench.ceilings import COPY_BYTES, roofline, step_bytes
from sae_lens_gemma4.bench.contestants import CONTESTANTS, OURS, OURS_IN_STOCK, STOCK, Contestant, NotHereError
from sae_lens_gemma4.bench.data import DEAD_WINDOW, Batches, Size, size, warmed_up
from sae_lens_gemma4.bench.memory import memory
from sae_lens_gemma4.bench.quality import bench_quality
from sae_lens_gemma4.bench.step import bench_step
from sae_lens_gemma4.bench.targets import ONE, TARGETS, TWO, circumstances, figures, markdown, races, table
from sae_lens_gemma4.cli import cli
from sae_lens_gemma4.errors import ConfigError, UnknownNameError

SMALL = Size(d_in=16, d_sae=128, batch=32, k=4, widths=(32, 128))
MIB = 2**20


@pytest.fixture(scope="module")
def batches() -> Batches:
    return Batches(SMALL, "cpu", seed=0)


@pytest.fixture(scope="module")
def start(batches):
    return warmed_up(SMALL, "cpu", batches, steps=3)


@pytest.fixture(scope="module")
def measured():
    threads = torch.get_num_threads()
    result = bench_step(SMALL, "cpu", threads=[1, 2], precisions=["float32"], rounds=2, warm_steps=2, whole_runs=0)
    assert torch.get_num_threads() == threads
    return json.loads(json.dumps(result.to_dict()))


def test_every_contestant_is_raced_or_named(measured):
    assert [run["threads"] for run in measured["runs"]] == [1, 2]
    for run in measured["runs"]:
        assert [(race["precision"], race["dead"]) for race in run["races"]] == [("float32", False), ("float32", True)]
        for race in run["races"]:
            entries = {entry["name"]: entry for entry in race["entries"]}
            assert sorted([*entries, *race["missing"]]) == sorted(CONTESTANTS)
            assert {STOCK, OURS, OURS_IN_STOCK} <= entries.keys()
            assert all(entry["seconds"] > 0 and entry["by_ours"] > 0 for entry in entries.values())
            assert entries[OURS]["by_ours"] == 1
            assert (race["roofline_seconds"] is None) == (race["ours_by_roofline"] is None) == race["dead"]
        assert run["selection"]["whole"] > 0 and run["ceilings"]["copy_gbs"] > 0
    assert {row["dead"] for row in measured["memory"]} == {row["dead"] for row in measured["accuracy"]} == {True, False}


def test_the_tables_hold_what_was_measured(measured):
    head, *rows = table([measured])
    assert head == ["work", ONE, "target", TWO, "target", "GPU", "target"]
    assert [row[0] for row in rows] == [target.work for target in TARGETS]
    assert {row[5] for row in rows} == {"no GPU here"}
    head, *rows = races(measured["runs"][0])
    assert head == ["", "float32, alive", "float32, half dead"]
    assert len(rows) == len(CONTESTANTS) and all(len(row) == 3 for row in rows)
    assert len(markdown([head, *rows]).splitlines()) == len(rows) + 2
    assert circumstances(measured, measured["runs"][0]).startswith(f"{ONE} (")


def outcome(kind="cpu", stock=10.0, compiled=None, apart=1e-9, ours64=1e-9, stock64=1e-8):
    """What `bench step` says of a machine, as far as the tables read it."""

    def entry(name, by_ours):
        quartiles = [by_ours - 1, by_ours + 1]
        return {"name": name, "note": "", "seconds": by_ours, "by_ours": by_ours, "by_ours_quartiles": quartiles}

    entries = [entry(STOCK, stock), entry(OURS, 1.0), *([entry(contestants.COMPILED, compiled)] if compiled else [])]
    race = {"precision": "float32", "dead": False, "entries": entries, "missing": {}}
    race |= {"ours_by_roofline": 1.5, "ours_by_roofline_quartiles": [1.4, 1.7]}
    difference = {"loss": 0.0, "gradients": {"W_enc": 0.0}}
    accuracy = {"ours_from_stock": difference | {"gradients": {"W_enc": 0.0, "b_dec": apart}}}
    accuracy |= {f"{who}_from_float64": difference | {"gradients": {"b_dec": off}}
                 for who, off in (("ours", ours64), ("stock", stock64))}  # fmt: skip
    memory_rows = [{"name": name, "dead": False, "peak_bytes": b} for name, b in ((STOCK, 100), (OURS, 20))]
    run = {"threads": 1, "races": [race, race | {"dead": True}], "selection": {"alone": None}}
    quality = [{"apart": 1e-4}, {"apart": 3e-3}]
    return {"kind": kind, "memory": memory_rows, "accuracy": [accuracy], "quality": quality, "runs": [run]}


def row(work, **facts):
    kind = facts.get("kind", "cpu")
    rows = table([outcome(**facts)])
    at = rows[0].index("GPU" if kind == "cuda" else ONE)
    return next(r for r in rows if r[0] == work)[at : at + 2]


def test_a_target_is_reached_or_missed():
    assert row("full step", stock=10.0) == ["10 (9–11) ✓", "≥ 10"]
    assert row("full step", stock=9.5) == ["9.5 (8.5–10.5) ✗", "≥ 10"]
    assert row("peak memory above weights, gradients, Adam") == ["0.2 ✓", "≤ 0.3"]
    assert row("full step, by the roofline sum", kind="cuda") == ["1.5 (1.4–1.7) ✓", "≤ 1.6"]
    assert row("held-out VE after a whole run, apart from sae_lens's") == ["0.003 ✗", "≤ 0.002"]
    assert row("selection alone, by torch.topk and scatter") == ["–", "≥ 4"]


def test_the_gpu_races_stock_at_its_best_and_as_it_comes():
    facts = {"kind": "cuda", "stock": 12.0, "compiled": 4.0}
    assert row("full step", **facts)[0] == "4 (3–5) ✗"
    assert row("full step, as both come", **facts)[0] == "12 (11–13) ✓"
    assert row("half of the latents dead", **facts)[0] == "4 (3–5) ✓"


def test_gradients_may_differ_where_ours_are_the_nearer_ones():
    assert row("gradients, the same", apart=2e-6)[0] == "2e-06 ✓"
    assert row("gradients, the same", apart=2e-6, ours64=3e-8)[0] == "2e-06 ✗"
    found = outcome(apart=2e-6)
    assert figures(found, found["runs"][0])["gradients"].value == 2e-6


def test_end_to_end_stands_beside_the_steps():
    rows = table([outcome()], [{"kind": "cuda", "threads": 16, "tokens_per_second": 36_000.4}])
    assert rows[-1] == ["end to end, tokens a second", "–", "–", "36,000 ✓", "≥ 35,000"]


def test_the_roofline_sum():
    assert step_bytes(2, 3, 4) == 4 * 8 + 32 * (2 * 12 + 4 + 3)
    half = COPY_BYTES["cpu"] // 4096  # 512 times the step's 1024 bytes, read and written
    assert roofline(2, 3, 4, "cpu", [2.0, 0.0], [8.0, half]) == [2 + 8 * 512 / COPY_BYTES["cpu"], 0.125]


def test_memory_counts_torch_numpy_and_what_is_kept():
    weight = torch.nn.Parameter(torch.zeros(MIB // 4))
    state = []

    def step(_):
        scratch = torch.empty(3 * MIB, dtype=torch.uint8), np.ones(2 * MIB, dtype=np.uint8)
        del scratch
        weight.grad = torch.zeros_like(weight)
        if not state:  # two moments, and a buffer of 4 MiB for later steps
            state.extend([torch.zeros_like(weight), torch.zeros_like(weight), np.ones(4 * MIB, dtype=np.uint8)])
        weight.grad = None

    found = memory(lambda: Contestant("x", "", step, [weight]), torch.zeros(1), "cpu", dead=False)
    assert found.static_bytes == 4 * MIB
    assert found.peak_bytes == pytest.approx((3 + 2 - 1 + 4) * MIB, abs=MIB // 4)


def test_batches_are_drawn_anew_and_again_from_a_seed(batches):
    again = Batches(SMALL, "cpu", seed=0)
    assert torch.equal(again[2], batches[2]) and not torch.equal(again[1], again[2])
    assert again[0].shape == (32, 16)


def test_half_of_the_latents_are_dead_and_stay_so(start, batches, monkeypatch):
    dead = start.half_dead(batches[0], seed=1)
    assert int(dead.dead_f.sum()) == 64 and not start.dead_f.any()
    pre_nf = (batches[0] - dead.state["b_dec"]) @ dead.state["W_enc"] + dead.state["b_enc"]
    assert pre_nf[:, dead.dead_f].max() < 1e-5
    assert torch.equal(dead.state["b_enc"][~dead.dead_f], start.state["b_enc"][~dead.dead_f])
    seen = []
    for name, trainer in ((STOCK, contestants.SAETrainer), (OURS, contestants.SparseTrainer)):
        taken = trainer._train_step
        monkeypatch.setattr(
            trainer, "_train_step", lambda self, t=taken, **k: seen.append(int(self.dead_neurons.sum())) or t(self, **k)
        )
        one = CONTESTANTS[name](dead, "float32")
        for number in range(2):
            one.step(batches[number])
    assert seen == [64] * 4 and DEAD_WINDOW > 2


def test_all_begin_with_the_same_function(start, batches):
    W_dec_fd, W_enc_df, b_enc_f = contestants._folded(start)
    sae = contestants.training_sae(STOCK, start)
    _, expected_nf = sae.encode_with_hidden_pre(batches[0])
    torch.testing.assert_close((batches[0] - sae.b_dec) @ W_enc_df + b_enc_f, expected_nf)
    torch.testing.assert_close(W_dec_fd.norm(dim=1), torch.ones(128))
    assert float(sae.topk_threshold) > 0


def test_who_is_not_here_is_named(start, monkeypatch):
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: None)
    for name in ("dictionary_learning", "sparsify"):
        with pytest.raises(NotHereError, match="not installed"):
            CONTESTANTS[name](start, "float32")
    with pytest.raises(NotHereError, match="does not run here: no kernel"), contestants.here_or_named("sparsify"):
        raise RuntimeError("no kernel\nat all")
    with pytest.raises(RuntimeError, match="a defect of ours"), contestants.here_or_named(OURS):
        raise RuntimeError("a defect of ours")


def test_differences_are_relative_and_selections_are_counted():
    def step(loss, grad, selected):
        return accuracy._Step(torch.tensor(loss), {"W": torch.tensor(grad)}, torch.tensor(selected))

    found = accuracy._difference(step(3.0, [3.0, 8.0], [1, 2, 3]), step(4.0, [3.0, 4.0], [2, 3, 5]))
    assert found == accuracy.Difference(loss=0.25, gradients={"W": 0.8}, selected_apart=2)


def test_accuracy_is_of_float32_against_float64(start, batches):
    found = accuracy.accuracy(start, batches, 4, dead=False)
    x_nd = batches[4 + found.batches - 1]
    sae = contestants.training_sae(STOCK, start).double()
    step_input = TrainStepInput(x_nd.double(), {}, None, 0, False)
    sae.training_forward_pass(step_input).loss.backward()
    exact = sae.W_enc.grad
    sae = contestants.training_sae(STOCK, start)
    sae.training_forward_pass(replace(step_input, sae_in=x_nd)).loss.backward()
    expected = float((sae.W_enc.grad.double() - exact).norm() / exact.norm())
    assert 0 < found.stock_from_float64.gradients["W_enc"] == pytest.approx(expected, rel=1e-3)
    assert found.ours_from_stock.loss < 1e-6


def test_a_batch_is_looked_for_on_which_all_select_the_same(start, batches, monkeypatch):
    selected = iter([[1, 2], [1, 2], [1, 3], [1, 2], [1, 2], [1, 2]])  # of sae_lens, ours and float64

    def step(*_):
        return accuracy._Step(torch.tensor(1.0), {"W": torch.ones(1)}, torch.tensor(next(selected)))

    monkeypatch.setattr(accuracy, "_step", step)
    assert accuracy.accuracy(start, batches, 0, dead=True).batches == 2


def test_what_cannot_be_run_is_named():
    with pytest.raises(UnknownNameError, match="'seed'"):
        size("sed")
    assert size("cpu", d_sae=1024).widths == (64, 256, 512, 1024)
    for wrong in ({"widths": (8, 4)}, {"widths": (8, 16)}, {"k": 8192}, {"batch": 0}):
        with pytest.raises(ConfigError, match=r"widths must rise|must be positive"):
            size("cpu", **wrong)
    with pytest.raises(UnknownNameError, match="'float32'"):
        bench_step(SMALL, "cpu", precisions=["float3"])
    with pytest.raises(UnknownNameError, match="'sparsify'"):
        bench_step(SMALL, "cpu", contestants=["sparsfy"])
    with pytest.raises(ConfigError, match="at least 1"):
        bench_step(SMALL, "cpu", threads=[0])
    for device, message in (("cpuu", "'cpuu' cannot be used"), ("meta", "neither a CPU nor a CUDA device")):
        with pytest.raises(ConfigError, match=message):
            bench_step(SMALL, device)
    with pytest.raises(UnknownNameError, match="'tiny'"):
        train.bench_train("tny", "cpu")


def test_whole_runs_of_either_trainer_are_compared():
    (run,) = bench_quality(1, tokens=10 * 512, heldout_tokens=500)
    assert (run.seed, run.tokens) == (0, 5120)
    assert run.start.keys() == run.ours.keys() == run.stock.keys() == {"text", "chat"}
    for name in run.start:
        assert run.start[name] + 0.2 < run.ours[name] and run.ours[name] == pytest.approx(run.stock[name], abs=2e-3)
    assert run.apart == max(abs(run.ours[name] - run.stock[name]) for name in run.ours) > 0


@pytest.fixture
def smaller(monkeypatch):
    scene = replace(train.SCENES["tiny"], size=Size(64, 128, 32, 4, (32, 128)), context=16, blocks=4, forward_blocks=2)
    monkeypatch.setitem(train.SCENES, "tiny", scene)


@pytest.mark.parametrize("prefetch", [False, True])
def test_harvest_and_steps_are_raced_on_the_same_text(smaller, monkeypatch, prefetch):
    seen = []
    steps = train._steps
    monkeypatch.setattr(train, "_steps", lambda trained, batch: seen.append(batch) or steps(trained, batch))
    r = train.bench_train("tiny", "cpu", chunks=2, rounds=1, prefetch=prefetch)
    assert (r.tokens, r.layers, r.prefetch) == (2 * 4 * 16, (1, 3, 4), prefetch)
    assert len(seen) == 2 + 3 * 4  # one each to begin with; then four batches by steps alone, ours and sae_lens's
    assert r.tokens_per_second == pytest.approx(128 / r.seconds["both"])
    assert min(r.harvest_share, r.steps_share, r.by_ours) > 0
    assert {name for name, s in r.seconds.items() if s > 0} == {"harvest", "steps", "both", "sae_lens"}


def test_the_large_scene_has_the_model_s_shape():
    model = train._e4b("meta")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_kv_shared_layers) == (2560, 42, 18)
    assert [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"] == list(range(5, 42, 6))
    assert model.dtype == torch.bfloat16
    assert train.SCENES["e4b"].tokens % train.SCENES["e4b"].size.batch == 0


def test_from_the_command_line(smaller):
    sizes = ["--d-in", "16", "--d-sae", "128", "--batch", "32", "--k", "4", "--rounds", "2", "--warm-steps", "2"]
    fewer = ["--threads", "1", "--precision", "float32", "--against", "sae_lens", "--whole-runs", "0"]
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(cli, ["bench", "step", *sizes, *fewer, "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "no GPU here" in shown.output and "this package" in shown.output and "GFLOP/s" in shown.output
    as_json = CliRunner().invoke(cli, ["bench", "step", *sizes, *fewer, "--device", "cpu", "--json"])
    (result,) = json.loads(as_json.stdout)
    assert result["size"] == {"d_in": 16, "d_sae": 128, "batch": 32, "k": 4, "widths": [8, 32, 64, 128]}
    run = ["bench", "train", "--device", "cpu", "--rounds", "1", "--chunks", "1"]
    assert "tokens/s" in CliRunner().invoke(cli, run).output
    assert json.loads(CliRunner().invoke(cli, [*run, "--json"]).stdout)["tokens"] == 64
    wrong = CliRunner().invoke(cli, ["bench", "step", "--threads", "one"])
    assert wrong.exit_code == 2 and "'one' is not numbers with commas between them" in wrong.output
