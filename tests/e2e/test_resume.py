"""Connections that break, through a proxy that breaks them: sessions go on, and every step is done once."""

import gc
import signal
import subprocess
import sys
import threading
import time

import grpc
import lamina
import lamina.client
import numpy as np
import pytest
from daemon import ROOT, Daemon, wait_until
from lamina.v1 import session_service_pb2 as spb
from proxy import CuttingProxy, Proxy
from raw import refused
from replaced import Replaced

CONFIG = dict(batch_size=4, max_seq_length=16, hidden_size=32, heads=4, num_hidden_layers=2, seed=11, max_contexts=6)
DROPOUT = dict(attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
X = np.random.default_rng(5).standard_normal((4, 16, 32)).astype(np.float32)
DY = np.random.default_rng(6).standard_normal((4, 16, 32)).astype(np.float32)


@pytest.fixture
def proxy(daemon):
    p = Proxy(int(daemon.tcp.rsplit(":")[1]))
    yield p
    p.close()


@pytest.fixture
def stack_of(daemon):
    """stack_of(client): a handle of a stack that is made, and in the end deleted, on a connection that nobody breaks."""
    with lamina.connect(daemon.target) as steady:
        made = []

        def stack(client, **settings):
            made.append(f"resume-{len(made)}")
            steady.create_stack(made[-1], **{**CONFIG, **settings})
            return client.stack(made[-1])

        yield stack
        for name in made:
            steady.delete_stack(name)


def sessions(daemon):
    """What the metrics say of sessions: {reason or "after" of a resumption: how many}, and of those alive."""
    found = {"live": 0.0, "adrift": 0.0}
    for series, value in daemon.metrics().items():
        if series.startswith(("lamina_sessions_ended_total", "lamina_sessions_resumed_total")):
            found[series.split('"')[1]] = value
    found["live"] = daemon.metrics()["lamina_sessions"]
    found["adrift"] = daemon.metrics()["lamina_sessions_adrift"]
    return found


def difference(after, before):
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def train(stack, steps):
    """The losses; two micro-batches a step, whose contexts overlap."""
    losses = []
    for step in range(steps):
        y, first = stack.forward(X * (1 + step % 3))
        z, second = stack.forward(DY)
        losses += [float((y.astype(np.float64) ** 2).mean()), float((z.astype(np.float64) ** 2).mean())]
        dx = stack.backward(first, (2 * y / y.size).astype(np.float32))
        losses.append(float(np.abs(dx.astype(np.float64)).sum()))
        stack.backward(second, (2 * z / z.size).astype(np.float32), input_grad=False)
        assert stack.apply_gradients(lr=1e-2, weight_decay=0.01, max_grad_norm=1.0, zero_gradients=True).step == step + 1
    return losses


def same_weights(a, b):
    a, b = a.parameters(), b.parameters()
    return all(np.array_equal(a[name], b[name]) for name in a)


# --- cuts at random ---


@pytest.mark.parametrize("transport, between", [("memfd", (300, 6000)), ("inline", (500, 80000))])
def test_training_through_cuts_is_the_same_to_the_bit(daemon, stack_of, transport, between):
    steps = 15
    with lamina.connect(daemon.tcp, transport=transport) as client:
        straight = stack_of(client, **DROPOUT)
        expected = train(straight, steps)
        before = sessions(daemon)
        flaky_proxy = CuttingProxy(int(daemon.tcp.rsplit(":")[1]), between)
        with lamina.connect(flaky_proxy.target, transport=transport, resume_grace=30) as flaky:
            stack = stack_of(flaky, **DROPOUT)
            assert flaky.transport == transport
            flaky_proxy.armed = True
            found = train(stack, steps)
            flaky_proxy.armed = False
            assert found == expected and same_weights(stack, straight)
            info = stack.info()
            assert (info.step, info.forward_count, info.outstanding_contexts) == (steps, 2 * steps, 0)
            assert flaky.session.ping() == 5 * steps  # the watermark: each mutation once
            assert flaky_proxy.cuts >= 10, f"{flaky_proxy.cuts} cuts: too few to say anything"
            changes = difference(sessions(daemon), before)
            assert changes.pop("live") == 1
            assert changes.pop("break", 0) + changes.pop("takeover", 0) >= 5
            assert changes == {}, "one session all the time"
        flaky_proxy.close()


def test_pipelines_through_cuts(daemon, stack_of):
    """A pipeline ends with its connection. What it did is known afterwards, and another one of the session goes on."""
    steps = 8

    def step(p, stack):
        for x in (X, DY, X + DY):
            f = p.forward(stack, x)
            p.backward(stack, f, DY, input_grad=False)
        return p.apply_gradients(stack, lr=1e-2, max_grad_norm=1.0, zero_gradients=True)

    with lamina.connect(daemon.tcp) as client:
        straight = stack_of(client)
        with client.pipeline() as p:
            for _ in range(steps):
                step(p, straight)
        flaky_proxy = CuttingProxy(int(daemon.tcp.rsplit(":")[1]), (1500, 9000))
        with lamina.connect(flaky_proxy.target, transport="memfd", resume_grace=30) as flaky:
            stack = stack_of(flaky)
            flaky.empty((1 << 18,))
            flaky_proxy.armed = True
            broken = 0
            p = flaky.pipeline()
            while (done := stack.info().step) < steps:
                try:
                    assert step(p, stack).result().step == done + 1
                except lamina.Unavailable:
                    broken += 1
                    p.close()
                    p = flaky.pipeline()
                    if stack.info().step == done:
                        stack.zero_gradients()  # of the step that begins anew
            flaky_proxy.armed = False
            p.close()
            assert broken >= 3 and same_weights(stack, straight)
            gc.collect()
            flaky.session.release_garbage()
            assert stack.info().outstanding_contexts == 0
        flaky_proxy.close()


# --- cuts between two calls, and under one ---


@pytest.mark.parametrize("reset", [False, True])
def test_contexts_and_arrays_outlive_a_connection(daemon, proxy, stack_of, reset):
    before = sessions(daemon)
    with lamina.connect(proxy.target, transport="memfd") as client:
        stack = stack_of(client, **DROPOUT)
        twin = stack_of(client, **DROPOUT)
        y, context = twin.forward(X)
        expected = twin.backward(context, DY).copy()
        x = client.empty(X.shape)
        x[:] = X
        z, context = stack.forward(x)
        proxy.cut(reset)
        assert np.array_equal(z, y)
        assert np.array_equal(stack.backward(context, DY), expected)
        wait_until(lambda: client.session.lease.breaks == 1 and client.session.lease.held)
        proxy.cut(reset)
        x[:] = DY  # still the memory that the daemon reads
        assert np.array_equal(stack.forward(x, training=False)[0], twin.forward(DY, training=False)[0])
        wait_until(lambda: client.session.lease.breaks == 2 and client.session.lease.held)
        changes = difference(sessions(daemon), before)
        assert changes.pop("break", 0) + changes.pop("takeover", 0) == 2 and changes == {"live": 1}
    wait_until(lambda: difference(sessions(daemon), before).get("deleted") == 1)


def test_a_call_waits_for_the_connection(proxy, stack_of):
    with lamina.connect(proxy.target) as client:
        stack = stack_of(client)
        y, context = stack.forward(X)
        proxy.down()
        results = []
        calls = (lambda: stack.backward(context, DY), lambda: stack.forward(X, training=False)[0], stack.parameters,
                 stack.info, client.info, lambda: client.empty((3 << 20,)))
        threads = [threading.Thread(target=lambda call=call: results.append(call())) for call in calls]
        for thread in threads:
            thread.start()
        time.sleep(2.5)  # longer than calls are repeated where there is nothing to resume
        assert not results
        proxy.up()
        for thread in threads:
            thread.join(30)
        assert len(results) == len(threads)
        assert stack.apply_gradients(lr=1e-3).step == 1


def test_memory_that_was_made_unheard_is_given_back(daemon, proxy, stack_of):
    with lamina.connect(proxy.target, transport="memfd") as client:
        client.session
        before = daemon.metrics()["lamina_regions"]
        real = client.session._stubs.session.CreateRegion
        lost = []

        class Cut(grpc.RpcError):
            def code(self):
                return grpc.StatusCode.UNAVAILABLE

            def details(self):
                return "cut"

        def create(request, timeout=None):
            answer = real(request, timeout=timeout)
            if len(lost) < 2:
                lost.append(answer)
                proxy.cut()
                raise Cut
            return answer

        stubs = client.session._stubs
        client.session._stubs = stubs._replace(session=Replaced(stubs.session, CreateRegion=create))
        array = client.empty((3 << 20,))
        array[:] = 1
        assert len(lost) == 2 and daemon.metrics()["lamina_regions"] == before + 1
        del array


def test_a_connection_that_stands_still_is_left_for_another(daemon, proxy, stack_of, monkeypatch):
    """As behind a router that forgot it: nobody is told. The daemon, which still has the old stream, gives it up."""
    monkeypatch.setattr(lamina.client, "_TCP_CHANNEL", [(name, 600) for name, _ in lamina.client._TCP_CHANNEL])
    before = sessions(daemon)
    with lamina.connect(proxy.target, transport="memfd") as client:
        stack = stack_of(client, **DROPOUT)
        y, context = stack.forward(X)
        proxy.freeze()
        assert stack.backward(context, DY).shape == X.shape
        assert stack.apply_gradients(lr=1e-3).step == 1
        wait_until(lambda: client.session.lease.held)
        changes = difference(sessions(daemon), before)
        changes.pop("break", None)  # on a busy machine an answer to a ping may be late
        assert changes.pop("takeover") >= 1 and changes == {"live": 1}
        assert stack.info().forward_count == 1
    wait_until(lambda: difference(sessions(daemon), before).get("deleted") == 1)


# --- and what does not go on ---


def test_when_the_grace_is_over_the_session_is(daemon, proxy, stack_of):
    before, memory = sessions(daemon), daemon.metrics()
    client = lamina.connect(proxy.target, transport="memfd", resume_grace=1)
    stack = stack_of(client)
    y, context = stack.forward(X)
    assert client.session.lease.grace == 1
    proxy.down()
    began = time.monotonic()
    with pytest.raises(lamina.Unavailable, match="not back within 1 s.*connect again"):
        stack.backward(context, DY)
    assert 0.9 < time.monotonic() - began < 15
    wait_until(lambda: difference(sessions(daemon), before) == {"grace_over": 1})
    held = ("lamina_regions", "lamina_region_bytes", "lamina_contexts")  # perhaps a moment longer than the session lives
    wait_until(lambda: all(daemon.metrics()[series] == memory[series] for series in held))
    proxy.up()
    began = time.monotonic()
    with pytest.raises(lamina.Unavailable, match="connect again"):
        stack.backward(context, DY)
    assert time.monotonic() - began < 5
    assert np.all(np.isfinite(y))  # its memory stays readable
    client.close()
    with lamina.connect(proxy.target) as again:
        assert again.stack(stack.name).info().forward_count == 1


def test_a_session_that_is_gone_is_known_at_once(daemon, proxy, stack_of):
    with lamina.connect(proxy.target, resume_grace=60) as client:
        stack = stack_of(client)
        stack.zero_gradients()
        proxy.down()
        with lamina.connect(daemon.target) as other:
            other._stubs.session.DeleteSession(spb.DeleteSessionRequest(session_id=client.session.id))
        proxy.up()
        with pytest.raises(lamina.Unavailable, match="NOT_FOUND.*connect again"):
            stack.forward(X)


def test_a_client_that_closes_while_it_has_no_connection(daemon, proxy):
    before = sessions(daemon)
    client = lamina.connect(proxy.target)
    client.empty((4, 4))
    proxy.down()
    wait_until(lambda: client.session.lease.breaks == 1 and sessions(daemon)["adrift"] == 1)
    closing = threading.Thread(target=client.close)
    closing.start()
    proxy.up()
    closing.join(20)
    changes = difference(sessions(daemon), before)
    changes.pop("break", None)  # its stream may have been faster
    assert changes == {"deleted": 1}
    # Where it does not come back, the end of the grace is the session's.
    client = lamina.connect(proxy.target, resume_grace=0.5)
    client.empty((4, 4))
    proxy.down()
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 8
    wait_until(lambda: difference(sessions(daemon), before).get("grace_over") == 1)


CLIENT = """
import sys; sys.path.insert(0, {path!r})
import lamina
client = lamina.connect({target!r}, resume_grace={grace})
client.empty((4, 4))
print("running", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("grace, reason", [(0, "keep_alive_broken"), (1, "grace_over")])
def test_a_killed_process_is_waited_for_as_long_as_it_asked(daemon, grace, reason):
    before, regions = sessions(daemon), daemon.metrics()["lamina_regions"]
    program = CLIENT.format(path=str(ROOT / "client/python"), target=daemon.tcp, grace=grace)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert child.stdout.readline() == b"running\n"
    child.kill()
    child.wait()
    wait_until(lambda: difference(sessions(daemon), before) == {reason: 1} and daemon.metrics()["lamina_regions"] == regions)


def test_what_is_asked_for_and_granted(daemon):
    with lamina.connect(daemon.target) as here, lamina.connect(daemon.tcp) as there, \
            lamina.connect(daemon.target, resume_grace=3) as asked, lamina.connect(daemon.tcp, resume_grace=0) as not_asked:
        graces = [c.session.lease.grace for c in (here, there, asked, not_asked)]
        assert graces == [0, 10, 3, 0]
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="resume_grace"):
            lamina.connect(daemon.tcp, resume_grace=wrong)


def test_a_daemon_that_grants_none_or_stops():
    with Daemon("--resume-grace-cap", "0") as daemon:
        proxy = Proxy(int(daemon.tcp.rsplit(":")[1]))
        with lamina.connect(proxy.target) as client:
            stack = client.create_stack("s", **CONFIG)
            assert client.session.lease.grace == 0
            proxy.cut()
            wait_until(lambda: client.session.over() is not None)
            with pytest.raises(lamina.Unavailable, match="connect again"):
                stack.forward(X)
        wait_until(lambda: sessions(daemon)["keep_alive_broken"] == 1)
        proxy.close()
    with Daemon() as daemon:
        client = lamina.connect(daemon.tcp, resume_grace=30)
        stack = client.create_stack("s", **CONFIG)
        stack.forward(X)
        daemon.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert daemon.process.wait(30) == 0 and time.monotonic() - began < 10
        assert "reason=shutdown" in daemon.log() and "keep_alive_broken" not in daemon.log()
        daemon.start()  # on another port: nobody there knows the session
        client.close()


# --- the stream by itself ---


def test_resuming_without_the_librarys_help(daemon, raw):
    """What a client in another language does."""
    opened = raw.sessions.CreateSession(spb.CreateSessionRequest(resume_grace_seconds=20))
    assert opened.resume_grace_seconds == 20
    raw.session = opened.session_id
    raw.stack()
    hello = spb.KeepAliveRequest(session_id=opened.session_id)
    quiet = threading.Event()

    def one_message():
        yield hello
        quiet.wait(30)

    first = raw.sessions.KeepAlive(one_message())
    assert next(first).applied_sequence == 0
    context = raw.forward().context_id
    first.cancel()
    wait_until(lambda: sessions(daemon)["adrift"] == 1)
    second = raw.sessions.KeepAlive(one_message())
    assert next(second).applied_sequence == 1
    third = raw.sessions.KeepAlive(one_message())
    assert next(third).applied_sequence == 1
    with refused("ABORTED", "took over"):
        next(second)
    raw.backward(context)
    with refused("INVALID_ARGUMENT", "resume_grace_seconds: -1"):
        raw.sessions.CreateSession(spb.CreateSessionRequest(resume_grace_seconds=-1))
    assert "event=session_resumed" in daemon.log() and opened.session_id not in daemon.log()
    quiet.set()  # the streams' last messages: the session ends
    wait_until(lambda: sessions(daemon)["live"] == 1)
