"""How things end: clients that die or fall silent, the daemon's own stop, a crash and its checkpoint."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import grpc
import lamina
import numpy as np
import pytest
from daemon import ROOT, Daemon, wait_until
from lamina.v1 import config_service_pb2 as cpb
from lamina.v1 import layer_service_pb2 as lpb
from lamina.v1 import session_service_pb2 as spb
from raw import SHAPE, Raw, refused

CONFIG = dict(batch_size=4, max_seq_length=16, hidden_size=32, heads=4, num_hidden_layers=2, attn_dropout_ratio=0.1,
              hidden_dropout_ratio=0.1, seed=11)


LOOP = """
import sys, numpy as np
sys.path.insert(0, {path!r})
import lamina
client = lamina.connect({target!r})
stack = client.stack("shared")
x = client.empty((4, 16, 32), "fp32")
x[:] = 1
print("running", flush=True)
contexts = []
while True:
    y, context = stack.forward(x, training=True)
    contexts.append(context)
    if len(contexts) > 2:
        stack.backward(contexts.pop(0), y)
"""


def holdings(daemon):
    """What clients hold in the daemon."""
    metrics = daemon.metrics()
    return {series: metrics[series] for series in ("lamina_sessions", "lamina_contexts", "lamina_regions", "lamina_region_bytes")}


def test_a_client_killed_mid_step_leaves_nothing_behind():
    with Daemon("--lease", "5") as daemon, lamina.connect(daemon.target) as survivor:
        stack = survivor.create_stack("shared", **CONFIG, max_contexts=16)
        x = np.ones((4, 16, 32), np.float32)
        before = stack.forward(x, training=False)[0].copy()
        holdings_before = holdings(daemon)
        for _ in range(3):
            child = subprocess.Popen(
                [sys.executable, "-c", LOOP.format(path=str(ROOT / "client/python"), target=daemon.target)],
                stdout=subprocess.PIPE, env={**os.environ})
            assert child.stdout.readline() == b"running\n"
            time.sleep(0.3)
            child.kill()
            child.wait()
            assert np.array_equal(stack.forward(x, training=False)[0], before)
        # A session is no longer counted while its last call still runs, which holds the rest.
        wait_until(lambda: holdings(daemon) == holdings_before)
        assert stack.info().outstanding_contexts == 0


def test_a_client_that_hangs_loses_its_session_and_others_do_not_notice():
    with Daemon("--lease", "2") as daemon, lamina.connect(daemon.target) as survivor:
        stack = survivor.create_stack("shared", **CONFIG, max_contexts=16)
        x = np.ones((4, 16, 32), np.float32)
        y, context = stack.forward(x)
        holdings_before = holdings(daemon)
        child = subprocess.Popen(
            [sys.executable, "-c", LOOP.format(path=str(ROOT / "client/python"), target=daemon.target)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
        assert child.stdout.readline() == b"running\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: daemon.metrics()['lamina_sessions_ended_total{reason="keep_alive_silent"}'] == 1)
        wait_until(lambda: holdings(daemon) == holdings_before)
        stack.backward(context, y)
        child.send_signal(signal.SIGCONT)
        _, error = child.communicate(timeout=60)
        # Its call's answer may come before what its KeepAlive stream has to say.
        assert child.returncode == 1 and (b"this session has ended" in error or b"no such session" in error), error


def test_a_silent_session_ends_with_its_lease():
    with Daemon("--lease", "2") as daemon:  # longer than a busy machine takes for these calls
        raw = Raw(daemon.target)
        raw.stack()
        raw.forward()
        raw.region()
        assert raw.lease == 2
        time.sleep(3.5)
        with refused("NOT_FOUND", "session"):
            raw.region()
        assert raw.describe().outstanding_contexts == 0
        metrics = daemon.metrics()
        assert metrics["lamina_regions"] == 0 and metrics["lamina_sessions"] == 0
        assert 'reason=lease_expired' in daemon.log()


def test_a_keep_alive_stream_that_falls_silent_ends_the_session():
    with Daemon("--lease", "2") as daemon:  # longer than a busy machine takes to the first message
        raw = Raw(daemon.target)

        def one_then_silence():
            yield spb.KeepAliveRequest(session_id=raw.session)
            time.sleep(6)

        stream = raw.sessions.KeepAlive(one_then_silence())
        assert next(stream).applied_sequence == 0
        with refused("DEADLINE_EXCEEDED", "lease"):
            next(stream)
        wait_until(lambda: daemon.metrics()["lamina_sessions"] == 0)


def test_region_is_unmapped_after_release_although_a_client_maps_it():
    with Daemon() as daemon:
        raw = Raw(daemon.target)
        region = raw.region(1 << 20)
        memory = raw.mapped(region)
        maps = lambda: open(f"/proc/{daemon.process.pid}/maps").read().count("lamina-region")
        assert maps() == 1
        raw.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=raw.session, region_id=region.region_id))
        assert maps() == 0 and daemon.metrics()["lamina_region_bytes"] == 0
        memory[0] = 1  # the client's own mapping lives on
        raw.close()


def test_caps_of_sessions_and_regions():
    with Daemon("--session-cap", "2", "--region-cap", "3", "--region-cap-bytes", "65536") as daemon:
        a, b = Raw(daemon.target), Raw(daemon.target)
        with refused("RESOURCE_EXHAUSTED", "2"):
            Raw(daemon.target)
        regions = [a.region(4096) for _ in range(3)]
        with refused("RESOURCE_EXHAUSTED", "3"):
            a.region(4096)
        a.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=a.session, region_id=regions[0].region_id))
        with refused("RESOURCE_EXHAUSTED", "65536"):
            a.region(65536)
        a.region(65536 - 8192)
        a.close()
        b.close()


def test_sigterm_drains_saves_and_exits_with_0():
    with Daemon("--final-checkpoint") as daemon:
        with lamina.connect(daemon.target) as client:
            stack = client.create_stack("kept", **CONFIG)
            x = np.ones((4, 16, 32), np.float32)
            y, context = stack.forward(x, training=True)
            stack.backward(context, y)
            stack.apply_gradients(lr=1e-2)
            weights = stack.parameters()
            channel = grpc.insecure_channel(daemon.target)
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            assert next(watch) == b"\x08\x01"  # SERVING
            daemon.process.send_signal(signal.SIGTERM)
            assert next(watch) == b"\x08\x02"  # NOT_SERVING, and from now on or a moment later:
            # Cancelled: the daemon was at its end before it came to refuse a call, as on a busy machine.
            with pytest.raises((lamina.Unavailable, lamina.Cancelled)):
                while True:
                    stack.forward(x, training=False)
        assert daemon.process.wait(30) == 0
        assert "event=draining" in daemon.log() and "event=stopped in_order=true" in daemon.log()
        daemon.start()
        with lamina.connect(daemon.target) as client:
            stack = client.load_checkpoint("kept")
            assert all(np.array_equal(weights[n], p) for n, p in stack.parameters().items())
            assert stack.info().step == 1


@pytest.mark.slow
def test_a_running_step_finishes_while_draining():
    with Daemon() as daemon:
        client = lamina.connect(daemon.target)
        stack = client.create_stack("busy", batch_size=8, max_seq_length=128, hidden_size=256, heads=4,
                                    num_hidden_layers=16)
        x = client.empty((8, 128, 256))
        x[:] = np.random.default_rng(0).standard_normal(x.shape)
        results = []
        thread = threading.Thread(target=lambda: results.append(stack.forward(x)[0]))
        thread.start()
        wait_until(lambda: any(name.startswith("grpc_server_started_total") and '"Forward"' in name and count == 1
                               for name, count in daemon.metrics().items()))
        time.sleep(0.05)  # it was counted when it came, and is let in a moment later
        daemon.process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert daemon.process.wait(60) == 0
        assert len(results) == 1 and np.all(np.isfinite(results[0])) and np.std(results[0]) > 0.1
        client.close()


def test_a_second_signal_stops_at_once():
    with Daemon() as daemon:
        raw = Raw(daemon.target)
        raw.stack(hidden_size=768, heads=12)
        stream = raw.config.StreamParameters(cpb.StreamParametersRequest(stack="s"))
        next(stream)  # the rest is not read, so the call stays
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "event=draining" in daemon.log())
        assert daemon.process.poll() is None
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(5) == 1 and "event=stopped_at_once" in daemon.log()
        raw.channel.close()


def train(stack, x, steps):
    losses = []
    for _ in range(steps):
        y, context = stack.forward(x, training=True)
        losses.append(float((y.astype(np.float64) ** 2).mean()))
        stack.backward(context, (2 * y / y.size).astype(np.float32))
        stack.apply_gradients(lr=1e-2, weight_decay=0.01, max_grad_norm=1.0, zero_gradients=True)
    return losses


def test_a_killed_run_goes_on_bit_for_bit_from_its_checkpoint(tmp_path):
    x = np.random.default_rng(3).standard_normal((4, 16, 32)).astype(np.float32)
    with Daemon() as daemon, lamina.connect(daemon.target) as client:
        uninterrupted = train(client.create_stack("run", **CONFIG), x, 8)
    with Daemon(checkpoints=tmp_path) as daemon:
        client = lamina.connect(daemon.target)
        stack = client.create_stack("run", **CONFIG)
        first = train(stack, x, 4)
        stack.save()
        train(stack, x, 2)  # lost
        daemon.process.kill()
        daemon.process.wait()
        daemon.start()
        with lamina.connect(daemon.target) as again:
            resumed = train(again.load_checkpoint("run"), x, 4)
    assert first + resumed == uninterrupted


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    config = dict(CONFIG, hidden_size=512, heads=8, num_hidden_layers=6)
    with Daemon(checkpoints=tmp_path) as daemon:
        client = lamina.connect(daemon.target)
        stack = client.create_stack("big", **config)
        stack.save()
        old = (tmp_path / "big.safetensors").read_bytes()
        stack.set_parameters({"layers.0.norm_b": np.ones(512, np.float32)})
        thread = threading.Thread(target=lambda: _ignore(stack.save))
        thread.start()
        time.sleep(0.03)
        daemon.process.kill()
        daemon.process.wait()
        thread.join(30)
        # Whole either way: the old one, or the new one where the rename was faster.
        daemon.start()
        with lamina.connect(daemon.target) as again:
            loaded = again.load_checkpoint("big").parameters(["layers.0.norm_b"])["layers.0.norm_b"]
        if (tmp_path / "big.safetensors").read_bytes() == old:
            assert np.all(loaded == 0)
        else:
            assert np.all(loaded == 1)


def _ignore(call):
    try:
        call()
    except lamina.LaminaError:
        pass


@pytest.mark.slow
def test_calls_beyond_the_queue_are_refused():
    with Daemon("--queue-capacity", "1") as daemon:
        client = lamina.connect(daemon.target)
        stack = client.create_stack("busy", batch_size=8, max_seq_length=128, hidden_size=256, heads=4, num_hidden_layers=6)
        x = np.ones((8, 128, 256), np.float32)
        outcomes = []

        def run():
            try:
                stack.forward(x, training=False)
                outcomes.append("ran")
            except lamina.ResourceExhausted as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "ran" in outcomes and any("queue" in o for o in outcomes), outcomes
        client.close()


def test_deadlines_before_the_start_change_nothing(raw):
    raw.stack()
    request = raw.forward_request()
    with pytest.raises(grpc.RpcError) as caught:
        raw.layer.Forward(request, timeout=1e-6)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    # Either it never began, or it was done once: the repeat tells.
    answer = raw.layer.Forward(request)
    raw.took()
    assert raw.describe().forward_count == 1 and answer.context_id


@pytest.mark.parametrize("arguments, words", [
    (["--listen", "0.0.0.0:0"], "--insecure"), (["--listen", "nonsense"], "HOST:PORT"), (["--device", "tpu"], "tpu"),
    (["--final-checkpoint"], "--checkpoints"),
    (["--queue-capacity", "0"], "queue-capacity"), (["--no-such-flag"], "no-such-flag")])
def test_mistakes_on_the_command_line(tmp_path, arguments, words):
    from daemon import BINARY

    command = [BINARY, *arguments] + ([] if "--listen" in arguments else ["--listen", f"unix:{tmp_path}/s"])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_two_daemons_do_not_share_a_socket(daemon):
    from daemon import BINARY

    done = subprocess.run([BINARY, "--listen", daemon.target, "--metrics", "none"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "in use" in done.stderr
    port = daemon.tcp
    done = subprocess.run([BINARY, "--listen", port, "--metrics", "none"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "in use" in done.stderr


def test_settings_from_the_environment(tmp_path):
    from daemon import BINARY

    environment = {**os.environ, "LAMINA_LISTEN": f"unix:{tmp_path}/e.sock,127.0.0.1:0", "LAMINA_METRICS": "none",
                   "LAMINA_DEVICE": "cpu", "LAMINA_LOG_FORMAT": "json", "LAMINA_INLINE_CAP": "64kb"}
    process = subprocess.Popen([BINARY], env=environment, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    import json

    event = json.loads(line)
    assert "event=ready" in event["message"] and re.search(r"e\.sock,127\.0\.0\.1:\d+", event["message"])
    with lamina.connect(f"unix:{tmp_path}/e.sock") as client:
        assert client.info().inline_cap_bytes == 65536 and client.transport == "memfd"
    process.terminate()
    assert process.wait(30) == 0
