"""bench/remote at tiny shapes on the CPU: that it runs, that its figures agree with one another, and that what it times is
what it says. BENCH_BIN names the folder of the binaries; build/release/bin by default."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("BENCH_BIN", ROOT / "build/release/bin"))
REMOTE = ROOT / "bench/remote"
STEPS = {"in_process_ms": 10, "memfd_ms": 2, "memfd_blocking_ms": 10, "per_layer_pipelined_ms": 2}  # figures of two turns
ON_A_GPU = ["device_region_ms", "device_region_fenced_ms", "device_region_blocking_ms"]
ROUND_TRIPS = ["rpc_empty", "region_roundtrip", "execute_roundtrip"]


def remote(*arguments):
    return subprocess.run([sys.executable, REMOTE, "--device", "cpu", "--binaries", BIN, *arguments], capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def module(script):
    return script("remote")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_figures(tmp_path, dtype):
    done = remote("--shape", "2,16,32,4,64,3", "--dtype", dtype, "--rounds", "2", "--calls", "120", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"device", "driver", "date", "commit"} <= result.keys()
    assert (result["backend"], result["shape"]["layers"], result["shape"]["dtype"]) == ("cpu", 3, dtype)
    assert list(result["missing"]) == ON_A_GPU
    assert all(result[name] is None and "GPU" in result["missing"][name] for name in ON_A_GPU)
    for name, count in STEPS.items():
        spread = result["spread_ms"][name]
        assert 0 < spread["min"] <= result[name] <= spread["max"] and spread["count"] == count
        assert name in done.stdout
    for name in list(STEPS)[1:]:
        assert result["share_of_in_process"][name] == pytest.approx(result["in_process_ms"] / result[name])
    for name in ROUND_TRIPS:
        trip = result["round_trips_us"][name]
        assert 0 < trip["p10"] <= trip["median"] <= trip["p90"]
        assert trip["count"] == 150  # 120, rounded up to 50s
        assert result[f"{name}_us"] == trip["median"]
        assert ("compute_median" in trip) == (name != "rpc_empty")
    for name in ROUND_TRIPS[1:]:
        assert result["ratio_to_empty"][f"{name}_us"] == pytest.approx(result[f"{name}_us"] / result["rpc_empty_us"])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_by_calls_of_their_own_do_the_same_step(module, layers):
    """Without dropout, so that one step is as the other: the input's gradient has come through all of it."""
    config = {**module.shape(f"2,8,16,2,32,{layers}"), "dtype": "fp32", "pre_layer_norm": True, "dropout": 0.0}
    with module.Daemon(device="cpu") as daemon, module.lamina.connect(daemon.target) as client:
        remote = module.Remote(client, module.create_stack(client, config), config, on_device=False)
        remote.whole()
        whole = remote.dx.copy()
        weights = client.stack("remote").gradients()
        remote.dx[:] = 0
        with client.pipeline() as pipeline:
            remote.per_layer(pipeline).result()
        assert np.abs(whole).max() > 0
        np.testing.assert_array_equal(remote.dx, whole)
        for name, gradient in client.stack("remote").gradients().items():
            np.testing.assert_allclose(gradient, 2 * weights[name], rtol=1e-6, atol=1e-7, err_msg=name)
        assert client.stack("remote").info().outstanding_contexts == 0


def test_queued_steps_are_the_same_steps_and_all_of_them_run(module):
    config = {**module.shape("2,8,16,2,32,2"), "dtype": "fp32", "pre_layer_norm": True, "dropout": 0.0}
    with module.Daemon(device="cpu") as daemon, module.lamina.connect(daemon.target) as client:
        stack = module.create_stack(client, config)
        remote = module.Remote(client, stack, config, on_device=False)
        remote.whole()
        whole = remote.dx.copy()
        remote.dx[:] = 0
        gradients = stack.gradients()
        with client.pipeline() as pipeline:
            figures = module.pipelined(remote.queued, pipeline, 5)
        assert len(figures) == 1 and figures[0] > 0
        np.testing.assert_array_equal(remote.dx, whole)
        steps = 1 + module.WARM_STEPS + 5
        assert stack.info().forward_count == steps
        for name, gradient in stack.gradients().items():
            np.testing.assert_allclose(gradient, steps * gradients[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_device_regions_are_missing_for_the_reason_that_holds(module):
    class Device:
        def __init__(self, backend, why):
            self.info = lambda: type("Info", (), {"backend": backend})
            self.transport = "inline"
            self.why_no_device = why

    class InProcess:
        def run(self, steps):
            return [2.0] * steps

    for device, reason in [(Device("cpu", "the daemon offers none"), module.NO_GPU),
                           (Device("cuda", "the cap is 0"), "the cap is 0")]:
        times, missing = module.measure_steps(device, InProcess(), {}, 2)
        assert missing["device_region_ms"] == reason
        assert "shares no memory" in missing["memfd_ms"] and "shares no memory" in missing["per_layer_pipelined_ms"]
        assert times == {"in_process_ms": [2.0] * 10}


def test_what_is_wrong_is_said(tmp_path):
    for arguments, words in {("--shape", "1,2,3"): "--shape", ("--rounds", "0"): "--rounds", ("--dtype", "int8"): "--dtype"}.items():
        done = remote(*arguments)
        assert done.returncode == 2 and words in done.stderr
    done = subprocess.run([BIN / "round_trip", "--target", f"unix:{tmp_path}/nobody"], capture_output=True, text=True)
    assert done.returncode == 1 and "round_trip: " in done.stderr and done.stdout == ""
