"""The Python client's session when things go wrong: answers that get lost, a daemon that goes, clients that are dropped."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import lamina
import numpy as np
import pytest
from daemon import ON_CPU, ROOT, Daemon, wait_until
from lamina.v1 import session_service_pb2 as session_pb
from replaced import Replaced

CONFIG = dict(batch_size=4, max_seq_length=16, hidden_size=32, heads=4, num_hidden_layers=2, seed=11)
# Steps of tens of milliseconds, on a card too.
LONG = dict(batch_size=8, max_seq_length=128, hidden_size=256, heads=4, num_hidden_layers=6 if ON_CPU else 160, seed=1,
            max_contexts=3)
X = np.random.default_rng(5).standard_normal((4, 16, 32)).astype(np.float32)
LONG_X = np.random.default_rng(5).standard_normal((8, 128, 256)).astype(np.float32)


class Lost(grpc.RpcError):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "the answer was lost"


def lose_answers(monkeypatch, client, method, code, count):
    """The daemon runs the next `count` calls of a method, but the client hears `code` instead of their answers."""
    real = getattr(client._stubs.layer, method)
    left = [count]

    def call(request, timeout=None):
        answer = real(request, timeout=timeout)
        if left[0] > 0:
            left[0] -= 1
            raise Lost(code)
        return answer

    monkeypatch.setattr(client._stubs.layer, method, call)


def grads(stack):
    return np.concatenate([g.ravel() for g in stack.gradients().values()])


def test_a_repeated_backward_adds_its_gradients_once(client, monkeypatch):
    stack = client.create_stack("t", **CONFIG)
    y, context = stack.forward(X)
    stack.backward(context, y)
    once = grads(stack)
    stack.zero_gradients()
    y, context = stack.forward(X)
    lose_answers(monkeypatch, client, "Backward", grpc.StatusCode.UNAVAILABLE, 2)
    stack.backward(context, y)
    assert np.array_equal(grads(stack), once)
    lose_answers(monkeypatch, client, "ApplyGradients", grpc.StatusCode.UNAVAILABLE, 1)
    assert stack.apply_gradients(lr=1e-2).step == 1 and stack.info().step == 1


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"])
def test_a_mutation_that_ran_unheard_is_not_run_again(client, monkeypatch, code):
    stack = client.create_stack("t", **CONFIG)
    y, context = stack.forward(X)
    lose_answers(monkeypatch, client, "Backward", grpc.StatusCode[code], 1)
    with pytest.raises(lamina.LaminaError) as caught:
        stack.backward(context, y)
    assert caught.value.code.name == code
    once = grads(stack)
    assert np.any(once != 0)
    # The next mutation finds out, and takes the next number.
    assert stack.apply_gradients(lr=1e-2).step == 1
    with pytest.raises(lamina.NotFound):
        stack.backward(context, y)
    assert np.array_equal(grads(stack), once)


def test_a_forward_that_ran_unheard_leaves_no_context(client, monkeypatch):
    stack = client.create_stack("t", **CONFIG, max_contexts=1)
    lose_answers(monkeypatch, client, "Forward", grpc.StatusCode.DEADLINE_EXCEEDED, 1)
    with pytest.raises(lamina.DeadlineExceeded):
        stack.forward(X)
    assert stack.info().outstanding_contexts == 1
    stack.zero_gradients()  # settles it
    y, context = stack.forward(X)  # there is room
    stack.backward(context, y)
    assert stack.info().outstanding_contexts == 0


def test_lost_and_never_run(client, monkeypatch):
    stack = client.create_stack("t", **CONFIG)

    def call(request, timeout=None):
        raise Lost(grpc.StatusCode.DEADLINE_EXCEEDED)

    with monkeypatch.context() as patch:
        patch.setattr(client._stubs.layer, "Forward", call)
        for _ in range(3):
            with pytest.raises(lamina.DeadlineExceeded):
                stack.forward(X)
    y, context = stack.forward(X)
    stack.backward(context, y)
    assert stack.info().forward_count == 1


@pytest.mark.slow
def test_timeouts_of_real_steps(daemon):
    with lamina.connect(daemon.target) as client:
        stack = client.create_stack("long", **LONG)
        stack.forward(LONG_X, training=False)
        client.session._timeout = client.timeout = stack.last_timing.compute_seconds / 4
        for _ in range(3):
            with pytest.raises(lamina.DeadlineExceeded):
                stack.forward(LONG_X)
        client.session._timeout = client.timeout = None
        for _ in range(3):
            y, context = stack.forward(LONG_X)
            stack.backward(context, y, input_grad=False)
        client.session.release_garbage()
        assert stack.info().outstanding_contexts == 0
        client.delete_stack("long")


@pytest.mark.slow
def test_keyboard_interrupt_in_the_middle_of_steps(client):
    stack = client.create_stack("long", **LONG)
    stack.forward(LONG_X, training=False)
    step_seconds = stack.last_timing.compute_seconds

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for share in (0.05, 0.3, 0.9, 1.2, 2.0):
            try:
                signal.setitimer(signal.ITIMER_REAL, step_seconds * share)
                y, context = stack.forward(LONG_X)
                stack.backward(context, y)
                stack.apply_gradients(lr=1e-3)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted >= 2
    context = None
    # Whatever was interrupted: the sequence is in step again, and no context is left over.
    stack.zero_gradients()
    y, context = stack.forward(LONG_X)
    stack.backward(context, y)
    del context
    gc.collect()
    client.session.release_garbage()
    assert stack.info().outstanding_contexts == 0
    assert stack.apply_gradients(lr=1e-3).applied


def test_two_clients_train_one_stack_in_turns(daemon):
    """Gradients add up in the order of the calls, whosoever they are; contexts do not mix."""
    with lamina.connect(daemon.target) as a, lamina.connect(daemon.target) as b:
        stack_a = a.create_stack("shared", **CONFIG, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
        ya, ca = stack_a.forward(X)
        yb, cb = stack_a.forward(2 * X)
        da, db = stack_a.backward(ca, ya), stack_a.backward(cb, yb)
        alone = grads(stack_a)
        a.delete_stack("shared")
        stack_a = a.create_stack("shared", **CONFIG, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
        stack_b = b.stack("shared")
        za, ca = stack_a.forward(X)
        zb, cb = stack_b.forward(2 * X)
        assert np.array_equal(za, ya) and np.array_equal(zb, yb)
        assert np.array_equal(stack_a.backward(ca, za), da) and np.array_equal(stack_b.backward(cb, zb), db)
        assert np.array_equal(grads(stack_b), alone)
        stack_b.zero_gradients()
        assert not np.any(grads(stack_a))
        a.delete_stack("shared")


def test_threads_of_one_client(client):
    """Steps of many threads: every result is right, and every gradient counted once."""
    stack = client.create_stack("t", **CONFIG, max_contexts=16)
    y, context = stack.forward(X)
    stack.backward(context, y)
    once = grads(stack)
    stack.zero_gradients()
    wrong = []

    def work():
        for _ in range(10):
            z, context = stack.forward(X)
            if not np.array_equal(z, y):
                wrong.append("forward")
            stack.backward(context, z)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and np.allclose(grads(stack), 40 * once, rtol=1e-4, atol=1e-4 * np.abs(once).max())


def test_a_daemon_that_died_is_noticed_and_one_connects_again():
    with Daemon() as daemon:
        client = lamina.connect(daemon.target)
        stack = client.create_stack("t", **CONFIG)
        y, context = stack.forward(X)
        daemon.kill()
        wait_until(lambda: client.session.over() is not None)
        began = time.monotonic()
        for call in (lambda: stack.forward(X), lambda: stack.forward(X, training=False), lambda: stack.backward(context, y)):
            with pytest.raises(lamina.Unavailable, match="connect again"):
                call()
        assert time.monotonic() - began < 10
        assert y.shape == X.shape and np.all(np.isfinite(y))  # results stay readable
        daemon.start()
        client.close()
        with lamina.connect(daemon.target) as again:
            again.create_stack("t", **CONFIG).forward(X)
        with pytest.raises(ValueError, match="closed"):
            client.info()
        with pytest.raises(ValueError, match="closed"):
            stack.forward(X)


def test_dropped_clients_end_their_sessions(daemon):
    sessions = lambda: daemon.metrics()["lamina_sessions"]
    before = sessions()
    client = lamina.connect(daemon.target)
    kept = client.empty((4, 4))
    kept[:] = 1
    assert sessions() == before + 1
    del client
    gc.collect()
    wait_until(lambda: sessions() == before)
    assert np.all(kept == 1)
    program = f"""
import sys; sys.path.insert(0, {str(ROOT / 'client/python')!r})
import lamina, numpy as np
client = lamina.connect({daemon.target!r})
x = client.empty((4, 4))
client.session.ping()
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert time.monotonic() - began < 20
    wait_until(lambda: sessions() == before)


def test_many_clients_leave_no_descriptors_and_threads(daemon):
    def once():
        with lamina.connect(daemon.target) as client:
            client.empty((8, 8))[:] = 1

    once()
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(15):
        once()
    gc.collect()
    wait_until(lambda: threading.active_count() <= threads + 1)
    # gRPC keeps a few of its own for a while.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 6)


# --- which way tensors go ---


def test_transport_by_choice(daemon, monkeypatch):
    monkeypatch.setenv("LAMINA_TRANSPORT", "inline")
    with lamina.connect(daemon.target) as client:
        assert client.transport == "inline"
    with lamina.connect(daemon.target, transport="memfd") as client:
        assert client.transport == "memfd"
    monkeypatch.setenv("LAMINA_TRANSPORT", "pigeon")
    with pytest.raises(ValueError, match="pigeon"):
        lamina.connect(daemon.target)


def test_without_a_broker_tensors_go_inline():
    with Daemon("--inline-cap", "64kb", broker="none") as daemon:
        with pytest.raises(lamina.Unavailable, match="broker"):
            lamina.connect(daemon.target, transport="memfd").session
        with lamina.connect(daemon.target) as client:
            assert client.transport == "inline"
            stack = client.create_stack("t", **CONFIG)
            out = client.empty(X.shape)
            y, context = stack.forward(X, out=out)
            assert y is out and np.array_equal(y, stack.forward(X, training=False)[0])
            stack.backward(context, y)
            assert daemon.metrics()["lamina_regions"] == 0
            # All parameters are more than one message may carry; each alone is not.
            values = {n: p + 1 for n, p in stack.parameters().items()}
            assert sum(v.nbytes for v in values.values()) > 65536
            stack.set_parameters(values)
            assert all(np.array_equal(values[n], p) for n, p in stack.parameters().items())
            # Mistakes are found before the first message goes.
            for bad, error in (({"layers.1.nothing": np.ones(32, np.float32)}, lamina.NotFound),
                               ({"layers.1.norm_b": np.ones(31, np.float32)}, lamina.InvalidArgument)):
                with pytest.raises(error, match=next(iter(bad))):
                    stack.set_parameters({**{n: p * 0 for n, p in values.items()}, **bad})
            assert all(np.array_equal(values[n], p) for n, p in stack.parameters().items())
            parts = {"layers.0.attn_qw": np.zeros((32, 32), np.float32), "layers.0.attn_vb": np.zeros(32, np.float32)}
            stack.set_parameters({**values, **parts})
            assert not np.any(stack.parameters(["layers.0.attn_qw"])["layers.0.attn_qw"])
            with pytest.raises(lamina.InvalidArgument, match="inline_data"):
                client.create_stack("wide", **dict(CONFIG, hidden_size=64, max_seq_length=128)).forward(
                    np.ones((4, 128, 64), np.float32))


def test_another_daemons_broker_at_the_same_path():
    """As a client meets it whose daemon is on another host, while one of its own host has the same broker path."""
    with Daemon() as here, Daemon() as there:
        client = lamina.connect(there.tcp)
        create = client._stubs.session.CreateSession

        def elsewhere(request, timeout=None):
            answer = create(request, timeout=timeout)
            answer.broker_path = here.broker
            return answer

        client._stubs = client._stubs._replace(session=Replaced(client._stubs.session, CreateSession=elsewhere))
        assert client.transport == "inline"
        assert there.metrics()["lamina_regions"] == 0
        client.create_stack("t", **CONFIG).forward(X)
        client.close()


# --- shared memory ---


def test_memory_is_given_back_where_the_cap_is_reached():
    with Daemon("--region-cap", "3") as daemon, lamina.connect(daemon.target) as client:
        for n in range(1, 12):  # each needs a region of its own
            client.empty((n, 1 << 20))[:] = n
        assert daemon.metrics()["lamina_regions"] <= 3
        held = [client.empty((1 << 20,)) for _ in range(3)]
        for i, array in enumerate(held):
            array[:] = i
        with pytest.raises(lamina.ResourceExhausted, match="3"):
            client.empty((2, 1 << 20))
        assert [float(a[0]) for a in held] == [0, 1, 2] and [float(a[-1]) for a in held] == [0, 1, 2]
        del held, array
        assert client.trim() == 3 * (4 << 20) and daemon.metrics()["lamina_regions"] == 0
        client.empty((2, 1 << 20))


def test_arrays_do_not_overlap_and_live_with_their_views(client):
    generator = np.random.default_rng(0)
    views = []
    for i in range(300):
        shape = tuple(generator.integers(1, 30, generator.integers(1, 4)))
        dtype = ("fp32", "bf16", "fp16", "int32")[i % 4]
        array = client.empty(tuple(map(int, shape)), dtype)
        assert array.ctypes.data % 64 == 0 and array.flags.writeable and array.shape == shape
        array[...] = i
        if i % 3:
            views.append((i, array.reshape(-1)[-1:]))  # the array itself goes, its last element stays
    assert all(int(v[0]) == i for i, v in views)


def test_empty_names_its_mistakes(client):
    assert client.empty((0, 4)).shape == (0, 4) and client.empty(3, np.float16).dtype == np.float16
    for shape in ((-1,), (2, -2)):
        with pytest.raises(ValueError, match="negative"):
            client.empty(shape)
    with pytest.raises(TypeError):
        client.empty((1.5,))
    with pytest.raises(ValueError, match="float64"):
        client.empty((1,), np.float64)
    with pytest.raises(lamina.ResourceExhausted, match="size_bytes"):
        client.empty((9 << 30,), "int32")
    stack = client.create_stack("t", **CONFIG)
    for out in (client.empty((4, 16, 31)), client.empty(X.shape, "int32"), np.empty_like(X)):
        with pytest.raises(ValueError, match="out"):
            stack.forward(X, training=False, out=out)
    with pytest.raises(TypeError, match="lengths"):
        stack.forward(X, training=False, lengths=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="lengths"):
        stack.forward(X, training=False, lengths=[2**32 + 1, 1, 1, 1])


@pytest.mark.parametrize("grace", [0, 60])
def test_a_session_that_somebody_deletes(daemon, grace):
    with lamina.connect(daemon.target, resume_grace=grace) as client:
        client.empty((4,))
        with lamina.connect(daemon.target) as other:
            other._stubs.session.DeleteSession(session_pb.DeleteSessionRequest(session_id=client.session.id))
        wait_until(lambda: client.session.over() is not None)
        with pytest.raises(lamina.Unavailable, match="it was deleted.*connect again"):
            client.session.ping()


def test_a_client_that_closes_leaves_no_failed_call():
    with Daemon() as d:
        with lamina.connect(d.target) as client:
            client.empty((4,))
        wait_until(lambda: "event=session_ended" in d.log())
        with lamina.connect(d.target) as client:  # what came of the first one's stream is written by then
            assert client.info().backend
        assert "event=rpc_failed" not in d.log(), d.log()
