"""The benchmarks of kernels and of stacks, run at tiny shapes on the CPU: that they run, and that their figures agree with
one another. BENCH_BIN names the folder of the binaries; build/release/bin by default."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("BENCH_BIN", ROOT / "build/release/bin"))
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


def run(*command, code=0):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code, done.stderr
    return done


def check_times(times):
    assert 0 < times["min"] <= times["median"] <= times["max"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "kernels.json"
    run(sys.executable, ROOT / "bench/kernels", "--device", "cpu", "--shapes", "2,16,64,4,128,2;1,24,32,2,64,3", "--dtype", "fp32,bf16",
        "--reps", 3, "--unordered", "--binary", BIN / "kernel_bench", "--json", file)
    return json.loads(file.read_text())


def test_a_run_says_what_it_ran_on(kernels):
    assert list(kernels)[:4] == ["device", "driver", "date", "commit"] and kernels["device"] and kernels["driver"] is None
    assert all(c["product_tflops"] > 0 and c["copy_tbs"] > 0 for c in kernels["ceilings"])


def test_every_op_is_timed(kernels):
    ops = {row["op"].split()[0].rstrip(",") for row in kernels["rows"]}
    assert ops == {"Linear", "LinearInputGrad", "LinearWeightGrad", "Gelu", "GeluBackward", "LayerNorm", "LayerNormBackward",
                   "DropoutAddNorm", "DropoutAddNormBackward", "Attention", "AttentionBackward", "Cast", "GradientStats",
                   "AdamW", "Lamb"}
    assert {row["op"] for row in kernels["rows"] if row["unordered"]} == {
        row["op"] for row in kernels["rows"] if any(part in row["op"] for part in ("LinearWeightGrad", "Backward", "dbias"))}


def test_rates_and_floors_follow_from_times(kernels):
    ceilings = {c["dtype"]: c for c in kernels["ceilings"]}
    for row in kernels["rows"]:
        check_times(row["us"])
        ceiling = ceilings[row["dtype"]]
        assert row["gbs"] == pytest.approx(row["bytes"] / row["us"]["median"] / 1e3)
        assert row["tflops"] == pytest.approx(row["flops"] / row["us"]["median"] / 1e6)
        floor = max(row["flops"] / ceiling["product_tflops"], row["bytes"] / ceiling["copy_tbs"]) / 1e6
        assert row["floor_us"] == pytest.approx(floor)
        assert row["share"] == pytest.approx(floor / row["us"]["median"])
        assert row["copy_us"] is None if row["flops"] else row["copy_us"] > 0


def test_a_linear_moves_its_operands_once(kernels):
    (row,) = [r for r in kernels["rows"] if r["op"] == "Linear fc2" and r["seq"] == 16 and r["dtype"] == "fp32"]
    t, k, n = 32, 128, 64
    assert row["bytes"] == 4 * (t * k + n * k + t * n)
    assert row["flops"] == 2 * t * k * n


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_layer_is_the_sum_of_its_calls(kernels, pre_norm):
    sums = [s for s in kernels["layer_sums"] if s["pre_layer_norm"] == pre_norm]
    assert len(sums) == 4
    for layer in sums:
        rows = [r for r in kernels["rows"] if not r["unordered"] and (r["seq"], r["dtype"]) == (layer["seq"], layer["dtype"])]
        calls = "calls_pre_norm" if pre_norm else "calls_post_norm"
        assert sum(r[calls] for r in rows) == 18  # as layer.cc makes them, forward and backward
        assert layer["us"] == pytest.approx(sum(r[calls] * r["us"]["median"] for r in rows))
        assert layer["floor_us"] == pytest.approx(sum(r[calls] * r["floor_us"] for r in rows))


def test_settings_against_each_other(tmp_path):
    run(sys.executable, ROOT / "bench/modes", "--device", "cpu", "--case", "3,16,64,4,128,2:2..16", "--dtype", "fp32", "--rounds", 2,
        "--binary", BIN / "stack_bench", "--json", tmp_path / "m.json")
    (row,) = json.loads((tmp_path / "m.json").read_text())["rows"]
    sides = row["sides"]
    for side in sides.values():
        check_times(side["ms"])
    assert sides["plain"]["time_ratio_to_plain"] == 1
    assert sides["activation_checkpointing"]["plan_bytes"] < sides["gelu_checkpoint"]["plan_bytes"] < sides["plain"]["plan_bytes"]
    # All tokens of three sequences of 16, against those that were drawn.
    full = sides["plain"]["tokens_per_second"] * sides["plain"]["ms"]["median"] / 1e3
    assert full == pytest.approx(48, rel=0.5)
    for name in ("packed", "packed full"):
        assert sides[name]["rate_ratio_to_padded"] == pytest.approx(
            sides[name]["tokens_per_second"] / sides["padded"]["tokens_per_second"])


def test_drawn_lengths_are_the_same_sequences_however_they_are_laid_out():
    config = {"batch_size": 3, "max_seq_length": 16, "hidden_size": 64, "heads": 4, "intermediate_size": 128, "num_hidden_layers": 1,
              "dtype": "fp32"}
    commands = [f"create {json.dumps(config)}", *(f"run 6 {how} 2 9 5" for how in ("padded", "packed", "filled"))]
    done = subprocess.run([str(BIN / "stack_bench")], input="\n".join(commands) + "\n", capture_output=True, text=True, env=ENVIRONMENT)
    padded, packed, filled = (json.loads(line)["tokens"] for line in done.stdout.splitlines()[2:])
    assert padded == packed and all(6 <= tokens <= 27 for tokens in padded)
    assert all(48 - 3 < tokens <= 48 for tokens in filled)


@pytest.mark.parametrize("words, said", [
    ("run 1 packed 0 4 1", "lengths must be in 1..16"), ("run 1 padded 5 4 1", "the lower first"),
    ("run 1 packed 1 17 1", "lengths must be in 1..16"), ("run 1 ragged 1 2 3", "padded|packed|filled"), ("run", "how many steps")])
def test_a_stacks_program_says_what_is_wrong(words, said):
    config = {"batch_size": 2, "max_seq_length": 16, "hidden_size": 64, "heads": 4, "intermediate_size": 128, "num_hidden_layers": 1,
              "dtype": "fp32"}
    done = subprocess.run([str(BIN / "stack_bench")], input=f"create {json.dumps(config)}\n{words}\nrun 1 packed 1 16 7\n",
                          capture_output=True, text=True, env=ENVIRONMENT)
    _, created, answer, after = map(json.loads, done.stdout.splitlines())
    assert created == {} and said in answer["error"]
    assert len(after["tokens"]) == 1 and 2 <= after["tokens"][0] <= 32  # and goes on


def test_optimizers_go_over_the_layers_of_their_shape(tmp_path):
    run(sys.executable, ROOT / "bench/kernels", "--device", "cpu", "--shapes", ";".join(f"1,8,64,2,128,{n}" for n in (1, 2, 3)), "--dtype", "fp32",
        "--reps", 1, "--ops", "^AdamW", "--binary", BIN / "kernel_bench", "--json", tmp_path / "k.json")
    one, two, three = (row["bytes"] for row in json.loads((tmp_path / "k.json").read_text())["rows"])
    assert three - two == two - one >= 28 * (4 * 64 * 64 + 2 * 64 * 128 + 9 * 64 + 128)  # seven fp32 a parameter, read or written


def test_ops_can_be_chosen(tmp_path):
    shown = run(sys.executable, ROOT / "bench/kernels", "--device", "cpu", "--shapes", "1,8,16,2,32", "--dtype", "fp32", "--reps", 1,
                "--ops", "^LayerNorm$", "--binary", BIN / "kernel_bench", "--json", tmp_path / "k.json").stdout
    chosen = json.loads((tmp_path / "k.json").read_text())
    assert [row["op"] for row in chosen["rows"]] == ["LayerNorm"] and chosen["layer_sums"] == []
    assert chosen["rows"][0]["layers"] == 24 and "LayerNorm " in shown and "share" in shown


@pytest.mark.parametrize("flags, words", [
    (["--shapes", "1,8,16,2"], "is not B,S,H,A,I"), (["--shapes", "1,8,16,2,32,2,2"], "is not B,S,H,A,I"), (["--shapes", "1,8,16,3,32"], "divisor"),
    (["--shapes", "1,8,16,2,32,0"], "is not B,S,H,A,I"), (["--dtype", "int8"], "int8"), (["--device", "tpu"], "tpu"),
    (["--sustained", 0.1], "no energy counter of cpu")])
def test_what_kernels_refuses(tmp_path, flags, words):
    done = run(sys.executable, ROOT / "bench/kernels", "--device", "cpu", "--binary", BIN / "kernel_bench", "--json", tmp_path / "k.json",
               *flags, code=1)
    assert words in done.stderr and not (tmp_path / "k.json").exists()


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    file = tmp_path_factory.mktemp("stacks") / "stacks.json"
    run(sys.executable, ROOT / "bench/stack", "--device", "cpu", "--shapes", "2,16,64,4,128,2;1,24,32,2,64,1", "--dtype", "fp32",
        "--order", "pre,post", "--rounds", 2, "--flags", "gelu_checkpoint", "--binary", BIN / "stack_bench", "--json", file)
    return file


def test_both_sides_of_a_stack_are_timed(stacks):
    result = json.loads(stacks.read_text())
    assert {"device", "driver", "date", "commit", "ceilings", "rows"} <= result.keys()
    assert result["ceilings"]["product_tflops"] > 0 and result["ceilings"]["copy_tbs"] > 0
    assert len(result["rows"]) == 8  # shapes x orders x directions
    for row in result["rows"]:
        assert row["failures"] == {} and row["flags"] == ["gelu_checkpoint"]
        check_times(row["ours_ms"])
        assert row["peers"]["eager"] > 0
        assert row["speedup"]["eager"] == pytest.approx(row["peers"]["eager"] / row["ours_ms"]["median"])
        assert row["share_of_ceiling"] == pytest.approx(row["tflops"] / result["ceilings"]["product_tflops"])
        assert row["peak_bytes"]["ours"] > 0
    forward, both = result["rows"][:2]
    assert (forward["direction"], both["direction"]) == ("forward", "forward_backward")
    assert forward["ours_ms"]["median"] < both["ours_ms"]["median"]
    assert forward["flops"] == 2 * (2 * 32 * (4 * 64 * 64 + 2 * 64 * 128) + 4 * 2 * 16 * 16 * 64)
    assert both["flops"] == 3 * forward["flops"]
    assert forward["tflops"] == pytest.approx(forward["flops"] / forward["ours_ms"]["median"] / 1e9)


def test_a_side_that_fails_is_noted_and_the_rest_goes_on(tmp_path):
    run(sys.executable, ROOT / "bench/stack", "--device", "cpu", "--shapes", "1,9000,8,1,8,1;1,8,16,2,32,1", "--dtype", "fp32",
        "--peers", "none", "--rounds", 1, "--binary", BIN / "stack_bench", "--json", tmp_path / "s.json")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["ours_ms"] is None for row in rows] == [True, True, False, False]
    assert "max_seq_length" in rows[0]["failures"]["ours"]


def test_plot(stacks, tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib" in run(sys.executable, ROOT / "bench/plot", stacks, code=2).stderr
        return
    run(sys.executable, ROOT / "bench/plot", stacks, "--out", tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_observing_a_step_is_cheap():
    cost = json.loads(run(BIN / "observe", "--seconds", 0.2, "--output", "json").stdout)  # it exits with 1 above 1 % of 1 ms
    assert 0 < cost["share_of_1_ms_step"] < 0.01
    assert cost["scrapes"] > 0


@pytest.mark.parametrize("words, said", [
    (("--device", "cpu"), "cpu is no GPU"), (("--dropout", "0.1,1"), "[0, 1)"), (("--reps", 0), "at least 1"),
    (("--shapes", "4,512,16"), "--shapes"), (("--shapes", "4,512,0,64"), "--shapes")])
def test_attention_beside_others_says_what_is_wrong(words, said):
    assert said in run(sys.executable, ROOT / "bench/attention", *words, code=2).stderr


def test_an_attention_that_fails_is_noted_beside_those_that_do_not(script, monkeypatch, tmp_path, capsys):
    attention = script("attention")
    asked = []

    def time_ours(args, one, dropout):
        return {"forward": 2.5, "backward": 7.5}, {"device": "a card", "uuid": ""}

    def time_peer(torch, args, one, dropout, backend):
        asked.append((one["seq"], dropout, backend))
        if backend == "CUDNN_ATTENTION":
            raise RuntimeError("no plan\nand more of it")
        return {"forward": 5.0, "backward": 10.0}

    torch = types.SimpleNamespace(__version__="2.0", cuda=types.SimpleNamespace(
        is_available=lambda: True, set_device=lambda device: None, empty_cache=lambda: None))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(attention, "time_ours", time_ours)
    monkeypatch.setattr(attention, "time_peer", time_peer)
    monkeypatch.setattr(sys, "argv", ["attention", "--shapes", "2,64,4,32;1,128,4,32", "--dropout", "0.1", "--json", str(tmp_path / "a.json")])
    attention.main()
    assert asked == [(seq, 0.1, name) for seq in (64, 128) for name in attention.PEERS.values()]
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 2 and rows[0]["batch"] == 2 and rows[0]["ours_us"] == {"forward": 2.5, "backward": 7.5}
    assert rows[0]["peers_us"] == {"flash": {"forward": 5.0, "backward": 10.0}, "cudnn": None, "efficient": {"forward": 5.0, "backward": 10.0}}
    assert rows[0]["failures"] == {"cudnn": "no plan"}
    forward = next(line for line in capsys.readouterr().out.splitlines() if "forward" in line)
    assert forward.split() == ["2", "64", "4", "32", "0.1", "forward", "2.5", "5.0", "failed", "5.0"]


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_our_attention_is_the_ops_of_that_name(script, dropout):
    args = types.SimpleNamespace(device="cpu", dtype="fp32", reps=1, binary=BIN / "kernel_bench")
    ours, said = script("attention").time_ours(args, dict(batch=1, seq=8, heads=2, head_dim=8), dropout)
    assert ours.keys() == {"forward", "backward"} and min(ours.values()) > 0
    assert len(said["rows"]) == 2  # nothing else was timed


def test_our_attention_that_fails_is_told(script, tmp_path):
    failing = tmp_path / "kernel_bench"
    failing.write_text("#!/bin/sh\necho '{\"rows\": [{\"op\": \"Attention\", \"error\": \"no memory\"}]}' >\"${14}\"\n")
    failing.chmod(0o755)
    args = types.SimpleNamespace(device="cpu", dtype="fp32", reps=1, binary=failing)
    with pytest.raises(SystemExit, match="Attention at .*'seq': 8.*: no memory"):
        script("attention").time_ours(args, dict(batch=1, seq=8, heads=2, head_dim=8), 0)


@pytest.fixture(scope="module")
def trace(script):
    return script("trace")


def test_a_trace_is_of_what_follows_the_last_pause(trace):
    pause = 100_000_000
    lines = [f"{begin} {end} {name}\n" for begin, end, name in (
        (0, 5_000, "warm_up"), (pause, pause + 1_000, "warm_up"),
        (2 * pause + 4_000, 2 * pause + 10_000, "second kernel<int, 2>"), (2 * pause + 1_000, 2 * pause + 3_000, "first"),
        (2 * pause + 10_000, 2 * pause + 14_000, "first"), (2 * pause + 16_000, 2 * pause + 22_000, "second kernel<int, 2>"))]
    records = trace.read_records(lines)
    assert [name for _, _, name in records] == ["first", "second kernel<int, 2>"] * 2
    step = trace.summary(records, 2)
    assert step["ms"] == pytest.approx(0.0105) and step["gaps_ms"] == pytest.approx(0.0015) and step["gap_us"] == pytest.approx(1.0)
    second, first = step["kernels"]
    assert second["kernel"] == "second kernel<int, 2>" and second["calls"] == 1 and second["ms"] == pytest.approx(0.006)
    assert first["us"] == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_kernels_that_run_side_by_side_leave_no_gap(trace):
    step = trace.summary([(0, 10_000, "long"), (2_000, 4_000, "short"), (11_000, 12_000, "short")], 1)
    assert step["gaps_ms"] == pytest.approx(0.001) and step["ms"] == pytest.approx(0.012)


@pytest.mark.parametrize("name, own", [
    ("_ZN6lamina4cuda46_GLOBAL__N__2e9bbc32_13_column_sum_cu_578cf39722FinishColumnSumsKernelENS", "FinishColumnSumsKernel"),
    ("_ZN6lamina4cuda39_GLOBAL__N__550bdea4_7_cast_cu_bf9c4c4a10CastKernelIf13__nv_bfloat16Li8EE", "CastKernel"),
    ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT"), ("[fill]", "[fill]")])
def test_a_traced_kernel_has_its_own_name(trace, name, own):
    assert trace.short(name) == own


@pytest.mark.parametrize("words, said", [
    (("--device", "cpu"), "cpu is no GPU"), (("--steps", 0), "at least 1"), (("--flags", "fast"), "choose from"),
    (("--lengths", "5"), "LOW..HIGH"), (("--shape", "1,2"), "--shape")])
def test_a_trace_says_what_is_wrong(words, said):
    assert said in run(sys.executable, ROOT / "bench/trace", *words, code=2).stderr


def test_nothing_recorded_is_an_error(trace):
    with pytest.raises(SystemExit, match="libcupti"):
        trace.read_records([])
