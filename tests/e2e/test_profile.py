"""--profile: the last steps as a trace that Perfetto opens."""

import json
import signal
import subprocess

import lamina
import numpy as np
import pytest
from daemon import BINARY, Daemon, wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def train(daemon, steps=3):
    with lamina.connect(daemon.target) as client:
        stack = client.create_stack("profiled", batch_size=2, max_seq_length=16, hidden_size=32, heads=2, num_hidden_layers=2)
        x = np.ones((2, 16, 32), np.float32)
        with client.pipeline() as pipeline:
            for _ in range(steps):
                y, context = stack.forward(x, lengths=np.array([16, 10], np.int32), training=True)
                stack.backward(context, y)
                stack.apply_gradients(lr=1e-3, zero_gradients=True)
            pipeline.forward(stack, x, training=False).result()
        client.delete_stack("profiled")


def slices(trace, category):
    return [e for e in trace["traceEvents"] if e.get("cat") == category and e["ph"] == "X"]


def check(trace, count):
    """That it is what Perfetto takes: known phases, named rows, slices that nest."""
    assert set(trace) == {"displayTimeUnit", "otherData", "traceEvents"} and trace["otherData"]["began_unix_seconds"] > 1.7e9
    events = trace["traceEvents"]
    assert {e["ph"] for e in events} <= {"M", "X", "b", "e"}
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"device", "queue"}
    assert all(e["ts"] >= 0 for e in events if "ts" in e)
    steps = slices(trace, "step")
    assert len(steps) == count
    assert [s["args"]["step"] for s in steps] == list(range(steps[0]["args"]["step"], steps[0]["args"]["step"] + count))
    for before, after in zip(steps, steps[1:]):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3, "steps overlap"
    phases = slices(trace, "phase")
    assert {p["name"] for p in phases} <= {"input", "compute", "output"}
    for phase in phases:
        assert any(s["ts"] - 1e-3 <= phase["ts"] and phase["ts"] + phase["dur"] <= s["ts"] + s["dur"] + 1e-3 for s in steps), "a phase outside its step"
    waits = [e for e in events if e.get("cat") == "queue"]
    assert sorted(e["id"] for e in waits if e["ph"] == "b") == sorted(e["id"] for e in waits if e["ph"] == "e")
    return steps


def test_a_file_is_written_on_the_signal_and_at_the_end(tmp_path):
    file = tmp_path / "trace.json"
    with Daemon("--profile", str(file)) as daemon:
        train(daemon)
        assert not file.exists()
        daemon.process.send_signal(signal.SIGUSR1)
        wait_until(file.exists)
        steps = check(json.loads(file.read_text()), 10)
        assert [s["name"] for s in steps] == ["forward_training", "backward", "apply"] * 3 + ["forward_eval"]
        forward = steps[0]["args"]
        assert forward["stack"] == "profiled" and forward["tokens"] == 32 and forward["padding_tokens"] == 6 and forward["samples"] == 2
        assert forward["flops_per_second"] > 0 and forward["session"] > 0
        assert len(forward["request_id"]) == 16 and "." in steps[-1]["args"]["request_id"]
        train(daemon, 1)
        assert daemon.stop() == 0
        check(json.loads(file.read_text()), 14)
        assert daemon.log().count("event=profile_written") == 2
        assert [f.name for f in tmp_path.iterdir()] == ["trace.json"]  # no drafts


def test_a_folder_gets_a_file_each_time(tmp_path):
    with Daemon("--profile", str(tmp_path), "--profile-steps", "4") as daemon:
        train(daemon)
        daemon.process.send_signal(signal.SIGUSR1)
        first = tmp_path / f"laminad-{daemon.process.pid}-10.json"
        wait_until(first.exists)
        check(json.loads(first.read_text()), 4)
        train(daemon)
        assert daemon.stop() == 0
        assert {f.name for f in tmp_path.iterdir()} == {first.name, f"laminad-{daemon.process.pid}-20.json"}


def test_the_clients_trace_is_in_it(tmp_path):
    file = tmp_path / "trace.json"
    with Daemon("--profile", str(file)) as daemon:
        import raw as raw_module
        from lamina.v1 import layer_service_pb2 as layer_pb

        raw = raw_module.Raw(daemon.target)
        with lamina.connect(daemon.target) as client:
            client.create_stack("s", batch_size=1, max_seq_length=4, hidden_size=8, heads=1, num_hidden_layers=1)
        x = raw.tensor(np.ones((1, 4, 8), np.float32))
        raw.layer.Forward(layer_pb.ForwardRequest(session_id=raw.session, stack="s", input=x, training=False),
                          metadata=(("traceparent", PARENT), ("x-request-id", "mine")))
        raw.close()
        assert daemon.stop() == 0
    (step,) = check_file(file)
    assert step["args"]["trace_id"] == PARENT.split("-")[1] and step["args"]["request_id"] == "mine"


def check_file(file):
    return check(json.loads(file.read_text()), 1)


def test_without_it_the_signal_does_no_harm():
    with Daemon() as daemon:
        daemon.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "event=no_profile" in daemon.log())
        with lamina.connect(daemon.target) as client:
            assert client.info().version


@pytest.mark.parametrize("path, words", (("/nowhere/trace.json", "there is no folder /nowhere"), ("/proc/trace.json", "the folder /proc can't be written: ")))
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, path, words):
    done = subprocess.run([BINARY, "--listen", f"unix:{tmp_path}/d.sock", "--metrics", "none", "--profile", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and f"exit_code=5 reason=\"--profile {path}: " in done.stderr and words in done.stderr
    assert not (tmp_path / "d.sock").exists()


def test_a_disk_that_fails_is_told_and_nothing_else_stops(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    with Daemon("--profile", str(folder / "trace.json")) as daemon:
        folder.rmdir()
        daemon.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "event=profile_failed" in daemon.log())
        train(daemon, 1)
