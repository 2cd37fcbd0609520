"""Calls that are under way together on a pipeline: the same results as one after another, and what happens when one fails."""

import asyncio
import concurrent.futures
import gc
import os
import subprocess
import sys
import threading
import time

import grpc
import lamina
import numpy as np
import pytest
from daemon import ON_CPU, Daemon, wait_until

CONFIG = dict(batch_size=4, max_seq_length=16, hidden_size=32, heads=4, num_hidden_layers=3, seed=11, max_contexts=8)
DROPOUT = dict(attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
# Calls of tens of milliseconds, on a card too: while some are under way, what is behind them waits.
LONG = dict(batch_size=8, max_seq_length=128, hidden_size=256, heads=4, num_hidden_layers=6 if ON_CPU else 160, seed=1,
            max_contexts=4)
X = np.random.default_rng(5).standard_normal((4, 16, 32)).astype(np.float32)
DY = np.random.default_rng(6).standard_normal((4, 16, 32)).astype(np.float32)
LONG_X = np.random.default_rng(5).standard_normal((8, 128, 256)).astype(np.float32)


@pytest.fixture(params=["memfd", "inline"])
def either(daemon, request):
    with lamina.connect(daemon.target, transport=request.param) as c:
        yield c
        for stack in c.stacks():
            c.delete_stack(stack.name)


@pytest.fixture
def busy(client):
    """busy(p): an evaluation that takes a while is under way, and now others; returns the last."""
    stack = client.create_stack("long", **LONG)
    return lambda p, count=6: [p.forward(stack, LONG_X, training=False) for _ in range(count)][-1]


def contexts(client, stack):
    gc.collect()
    client.session.release_garbage()
    return stack.info().outstanding_contexts


def works(client, stack):
    """The client goes on synchronously: its sequence is in step, and no context is left over."""
    y, context = stack.forward(X)
    stack.backward(context, y)
    step = stack.info().step
    assert stack.apply_gradients(lr=1e-3, zero_gradients=True).step == step + 1
    assert contexts(client, stack) == 0


def step_by_step(stack, steps=4):
    results = []
    for i in range(steps):
        y, context = stack.forward(X * (i + 1))
        results += [y.copy(), stack.backward(context, DY).copy()]
        results.append(stack.apply_gradients(lr=1e-2, max_grad_norm=1.0, zero_gradients=i % 2 == 0).grad_norm)
    stack.zero_gradients()
    return results + list(stack.parameters().values()) + list(stack.gradients().values())


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(one, other) for one, other in zip(a, b))


# --- results ---


@pytest.mark.parametrize("depth", [1, 3, 32])
def test_the_same_bits_as_one_after_another(either, depth):
    expected = step_by_step(either.create_stack("t", **CONFIG, **DROPOUT))
    either.delete_stack("t")
    stack = either.create_stack("t", **CONFIG, **DROPOUT)
    pending = []
    with either.pipeline(depth=depth) as p:
        for i in range(4):
            f = p.forward(stack, X * (i + 1))
            b = p.backward(stack, f, DY)
            pending.append((f, b, p.apply_gradients(stack, lr=1e-2, max_grad_norm=1.0, zero_gradients=i % 2 == 0)))
        last = p.zero_gradients(stack)
    assert last.done() and last.result() is None
    found = []
    for f, b, a in pending:
        y, context = f.result()
        assert f.context is context and "spent" in repr(context)
        found += [y.copy(), b.result().copy(), a.result().grad_norm]
    assert a.result().step == 4 and stack.last_timing.compute_seconds > 0
    assert same(found + list(stack.parameters().values()) + list(stack.gradients().values()), expected)
    works(either, stack)


def test_steps_that_look_at_their_output(either):
    """A loss between forward and backward; contexts of forwards that are done."""
    stack = either.create_stack("t", **CONFIG)
    y, context = stack.forward(X)
    expected = stack.backward(context, y - DY).copy()
    norm = stack.apply_gradients(lr=1e-3).grad_norm
    either.delete_stack("t")
    stack = either.create_stack("t", **CONFIG)
    out = either.empty(X.shape)
    with either.pipeline() as p:
        y, context = p.forward(stack, X, out=out).result()
        assert y is out
        dx = p.backward(stack, context, y - DY)
        assert np.array_equal(dx.result(), expected) and p.apply_gradients(stack, lr=1e-3).result().grad_norm == norm
        f = p.forward(stack, X, lengths=[16, 3, 4, 1])
        f.result()
        assert p.backward(stack, f, DY, input_grad=False).result() is None
        with pytest.raises(lamina.NotFound):
            p.backward(stack, f, DY).result()
    works(either, stack)


@pytest.mark.parametrize("training", [True, False])
def test_layers_one_by_one_without_waiting(client, training):
    whole, parts = client.create_stack("whole", **CONFIG), client.create_stack("parts", **CONFIG)
    y, context = whole.forward(X, training=training)
    with client.pipeline() as p:
        forwards = [X]
        for i in range(3):
            forwards.append(p.forward(parts, forwards[-1], layers=(i, i + 1), training=training))
        if training:
            grad = DY
            for f in forwards[:0:-1]:
                grad = p.backward(parts, f, grad)
        assert np.array_equal(forwards[-1].result()[0], y) and forwards[-1].result()[0] is forwards[-1].output
    if training:
        assert np.array_equal(grad.result(), whole.backward(context, DY))
        assert same(list(whole.gradients().values()), list(parts.gradients().values()))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_types_through_layers(client, dtype):
    stack = client.create_stack("t", **dict(CONFIG, dtype=dtype))
    x = lamina.from_float32(X, dtype)
    y, _ = stack.forward(x, training=False)
    with client.pipeline() as p:
        half = p.forward(stack, x, layers=(0, 2), training=False)
        assert np.array_equal(p.forward(stack, half, layers=(2, 3), training=False).result()[0], y)


def test_packed(either):
    stack = either.create_stack("t", **CONFIG)
    lengths = [16, 3, 9]
    x, offsets = lamina.packing.pack(X[:3], lengths)
    y, context = stack.forward(x, cumulative_lengths=offsets)
    dx = stack.backward(context, y)
    with either.pipeline() as p:
        f = p.forward(stack, x, cumulative_lengths=offsets)
        assert np.array_equal(f.result()[0], y) and np.array_equal(p.backward(stack, f, y).result(), dx)


@pytest.mark.slow
def test_many_are_under_way_and_answered_in_order(either):
    stack = either.create_stack("long", **LONG)
    expected = stack.forward(LONG_X, training=False)[0].copy()
    order = []
    with either.pipeline() as p:
        pending = [p.forward(stack, LONG_X, training=False) for _ in range(10)]
        assert sum(not f.done() for f in pending) >= 5
        for i, f in enumerate(pending):
            f.add_done_callback(lambda _, i=i: order.append(i))
        p.wait()
        assert all(f.done() for f in pending) and order == list(range(10))
    assert all(np.array_equal(f.result()[0], expected) for f in pending)


def test_without_shared_memory_a_result_can_not_be_passed_on(daemon):
    with lamina.connect(daemon.target, transport="inline") as client:
        stack = client.create_stack("inline", **CONFIG)
        with client.pipeline() as p:
            f = p.forward(stack, X, layers=(0, 1))
            assert f.output is None
            for call in (lambda: p.forward(stack, f, layers=(1, 2)), lambda: p.backward(stack, f, f)):
                with pytest.raises(ValueError, match="shared memory"):
                    call()
            p.backward(stack, f, DY)
        works(client, stack)
        client.delete_stack("inline")


def test_mistakes_are_raised_at_once(client, daemon):
    stack = client.create_stack("t", **CONFIG)
    for depth in (0, 64):
        with pytest.raises(ValueError, match="depth"):
            client.pipeline(depth=depth)
    with client.pipeline() as p, client.pipeline() as q:
        e = p.forward(stack, X, training=False)
        with pytest.raises(ValueError, match="evaluation"):
            p.backward(stack, e, DY)
        with pytest.raises(ValueError, match="no array"):
            p.forward(stack, p.zero_gradients(stack))
        with pytest.raises(ValueError, match="one of mask"):
            p.forward(stack, X, mask=np.zeros((4, 16)), lengths=[1] * 4)
        with pytest.raises(ValueError, match="optimizer"):
            p.apply_gradients(stack, lr=1, optimizer="sgd")
        with pytest.raises(TypeError):
            p.forward(stack, X.astype(np.int32))
        with lamina.connect(daemon.target) as other, pytest.raises(ValueError, match="another client"):
            p.forward(other.stack("t"), X)
        f = p.forward(stack, X)
        f.result()
        q.backward(stack, f, f).result()  # it is done: an array and a context like others
    for call in (lambda: p.forward(stack, X), lambda: p.zero_gradients(stack)):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert not e.cancel()
    p.close()
    works(client, stack)


# --- what fails ---


def test_an_error_in_the_middle(either):
    stack = either.create_stack("t", **CONFIG)
    y, _ = stack.forward(X, training=False)
    with either.pipeline() as p:
        good = p.forward(stack, X)
        bad = p.forward(stack, X, layers=(2, 9))
        behind = [p.backward(stack, good, DY), p.backward(stack, bad, DY), p.apply_gradients(stack, lr=1e-2),
                  p.zero_gradients(stack)]
        evaluation = p.forward(stack, X, training=False)
        assert np.array_equal(good.result()[0], y) and np.array_equal(evaluation.result()[0], y)
        with pytest.raises(lamina.InvalidArgument, match="layers"):
            bad.result()
        assert bad.context is None
        # Whether they had been sent when the failure was heard makes no difference.
        for pending in behind + [p.zero_gradients(stack), p.forward(stack, X)]:
            with pytest.raises(lamina.FailedPrecondition):
                pending.result()
        assert np.array_equal(p.forward(stack, X, training=False).result()[0], y)
        assert stack.info().step == 0 and "spent" not in repr(good.context)
        stack.zero_gradients()  # nothing is under way: others have their turn
        with pytest.raises(lamina.InvalidArgument, match="layers"):
            p.wait()
        p.wait()
        dx = p.backward(stack, good, DY)
        assert p.apply_gradients(stack, lr=1e-2).result().step == 1 and dx.result().shape == X.shape
    del bad, behind, pending
    works(either, stack)


def test_a_backward_of_a_forward_that_failed(client):
    stack = client.create_stack("t", **CONFIG)
    with client.pipeline() as p:
        f = p.forward(stack, X, layers=(2, 9))
        with pytest.raises(lamina.FailedPrecondition):
            p.backward(stack, f, DY).result()
        with pytest.raises(lamina.InvalidArgument):
            p.wait()
        with pytest.raises(lamina.FailedPrecondition):  # of the forward itself, now
            p.backward(stack, f, DY).result()
        with pytest.raises(lamina.FailedPrecondition):
            p.wait()
        with client.pipeline() as q, pytest.raises(lamina.FailedPrecondition):
            q.backward(stack, f, DY).result()
        p.zero_gradients(stack).result()
    works(client, stack)


def test_nothing_is_made_of_an_input_that_is_not_there(client, busy):
    stack = client.create_stack("t", **CONFIG)
    with client.pipeline() as p:
        busy(p)
        bad = p.forward(stack, X, training=False, layers=(2, 9))
        second = p.forward(stack, bad, training=False)
        third = p.forward(stack, second, training=False)
        train = p.forward(stack, second)  # waits for it
        assert second.done()
        after = p.zero_gradients(stack)
        for pending in (second, third, train, after, p.forward(stack, bad, training=False)):
            with pytest.raises(lamina.FailedPrecondition):
                pending.result()
        assert stack.info().forward_count == 0
        with pytest.raises(lamina.FailedPrecondition):
            p.wait()
        p.zero_gradients(stack).result()
    works(client, stack)


def test_cancel(client, busy):
    stack = client.create_stack("t", **CONFIG)
    with client.pipeline() as p:
        busy(p)
        evaluation, f = p.forward(stack, X, training=False), p.forward(stack, X)
        b = p.backward(stack, f, DY)
        last = p.forward(stack, X, training=False)
        assert evaluation.cancel() and f.cancel() and f.cancel() and not f.done()
        for pending, error in ((evaluation, lamina.Cancelled), (f, lamina.Cancelled), (b, lamina.FailedPrecondition)):
            with pytest.raises(error):
                pending.result()
        assert last.result()[0].shape == X.shape and not last.cancel() and not f.cancel()
    assert stack.info().forward_count == 0
    works(client, stack)


def test_a_call_that_may_not_wait_so_long(client, busy):
    stack = client.create_stack("t", **CONFIG)
    with client.pipeline() as p:
        busy(p, 10)
        short, long = p.forward(stack, X, timeout=1e-3), p.forward(stack, X, training=False, timeout=60)
        with pytest.raises(lamina.DeadlineExceeded):
            short.result()
        assert long.result()[0].shape == X.shape
        with pytest.raises(lamina.InvalidArgument, match="timeout"):
            p.forward(stack, X, training=False, timeout=-1.0).result()
    assert stack.info().forward_count == 0
    works(client, stack)


@pytest.mark.slow
def test_the_pipelines_own_time_is_over(client):
    stack = client.create_stack("long", **LONG)
    stack.forward(LONG_X, training=False)
    step_seconds = stack.last_timing.compute_seconds
    for share in (3, 5):
        p = client.pipeline(timeout=step_seconds * share)
        pending = []
        for _ in range(10):
            f = p.forward(stack, LONG_X)
            pending += [f, p.backward(stack, f, LONG_X, input_grad=False)]
        outcomes = [pending_one.exception() for pending_one in pending]
        assert any(isinstance(o, lamina.DeadlineExceeded) for o in outcomes)
        with pytest.raises(lamina.DeadlineExceeded):
            p.wait()
        with pytest.raises(lamina.Unavailable, match="not sent"):
            p.forward(stack, LONG_X).result()
        p.close()
        del f, pending
        # Whatever of it ran: the sequence is in step, and no context is left over.
        with client.pipeline() as q:
            q.zero_gradients(stack)
            f = q.forward(stack, LONG_X)
            q.backward(stack, f, LONG_X)
            assert q.apply_gradients(stack, lr=1e-4).result().applied
        del f
        assert contexts(client, stack) == 0


def test_an_exception_in_the_block_cancels_what_waits(client, busy):
    stack = client.create_stack("t", **CONFIG)
    with pytest.raises(ZeroDivisionError), client.pipeline() as p:
        busy(p, 20)
        f = p.forward(stack, X)
        1 / 0
    with pytest.raises(lamina.Cancelled):
        f.result()
    works(client, stack)


@pytest.mark.slow
def test_a_killed_daemon_fails_what_is_under_way():
    with Daemon() as daemon:
        client = lamina.connect(daemon.target)
        stack = client.create_stack("long", **LONG)
        p = client.pipeline()
        done = p.forward(stack, LONG_X, training=False)
        y = done.result()[0]
        pending = [p.forward(stack, LONG_X, training=i > 2) for i in range(6)]
        pending += [p.backward(stack, pending[-1], LONG_X), p.apply_gradients(stack, lr=1.0)]
        daemon.kill()
        began = time.monotonic()
        assert isinstance(pending[-1].exception(), lamina.Unavailable)
        assert all(f.exception() is None or isinstance(f.exception(), lamina.Unavailable) for f in pending)
        with pytest.raises(lamina.Unavailable):
            p.forward(stack, LONG_X).result()
        with pytest.raises(lamina.Unavailable):
            p.wait()
        p.close()
        wait_until(lambda: client.session.over() is not None)
        with pytest.raises(lamina.Unavailable, match="connect again"):
            stack.zero_gradients()  # the turn was given back
        assert time.monotonic() - began < 20 and np.all(np.isfinite(y))
        daemon.start()
        client.close()
        with lamina.connect(daemon.target) as again:
            works(again, again.create_stack("t", **CONFIG))


def test_a_closed_client_ends_its_pipelines(daemon):
    client = lamina.connect(daemon.target)
    stack = client.create_stack("long", **LONG)
    p = client.pipeline()
    pending = [p.forward(stack, LONG_X) for _ in range(3)]
    client.close()
    assert isinstance(pending[-1].exception(30), lamina.LaminaError)
    p.close()
    with lamina.connect(daemon.target) as other:
        other.delete_stack("long")


# --- turns and threads ---


def test_depth_makes_calls_wait(client):
    stack = client.create_stack("long", **LONG)
    with client.pipeline(depth=2) as p:
        pending = []
        for _ in range(5):
            pending.append(p.forward(stack, LONG_X, training=False))
            assert sum(not f.done() for f in pending) <= 3  # one may be answered and about to be done
        assert pending[2].done()


@pytest.mark.slow
def test_a_mutation_waits_for_a_busy_pipeline(client, busy):
    stack = client.create_stack("t", **CONFIG)
    with client.pipeline() as p, client.pipeline() as q:
        busy(p)
        f = p.forward(stack, X)
        b = p.backward(stack, f, DY)
        stack.zero_gradients()
        assert f.done() and b.exception(1) is None
        busy(p)
        f = p.forward(stack, X)
        b = q.backward(stack, f.result()[1], DY)  # p has no mutation under way any more
        a = p.apply_gradients(stack, lr=1e-3)  # nor has q, once it is its turn
        assert b.result().shape == X.shape and a.result().step == 1
        e = busy(p)
        stack.zero_gradients()  # evaluations have no turn
        assert not e.done() or not ON_CPU
    works(client, stack)


@pytest.mark.parametrize("pipelines", [1, 2])
def test_threads(client, pipelines):
    """Steps of many threads, on one pipeline or two and beside them: every result is right, every gradient counted."""
    stack = client.create_stack("t", **dict(CONFIG, max_contexts=64))
    y, context = stack.forward(X)
    dx = stack.backward(context, y).copy()
    once = np.concatenate([g.ravel() for g in stack.gradients().values()])
    stack.zero_gradients()
    wrong = []

    def work(p, wait):
        for _ in range(10):
            f = p.forward(stack, X)
            b = p.backward(stack, f, y)
            if wait and not (np.array_equal(f.result()[0], y) and np.array_equal(b.result(), dx)):
                wrong.append("pipeline")

    def work_alone():
        for _ in range(10):
            z, context = stack.forward(X)
            if not np.array_equal(z, y):
                wrong.append("alone")
            stack.backward(context, z)

    opened = [client.pipeline(depth=6) for _ in range(pipelines)]
    threads = [threading.Thread(target=work, args=(opened[i % pipelines], i < 3)) for i in range(4)]
    threads.append(threading.Thread(target=work_alone))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for p in opened:
        p.wait()
        p.close()
    assert not wrong
    assert np.allclose(np.concatenate([g.ravel() for g in stack.gradients().values()]), 50 * once, rtol=1e-4,
                       atol=1e-4 * np.abs(once).max())
    works(client, stack)


@pytest.mark.slow
def test_asyncio(client, busy):
    stack = client.create_stack("t", **CONFIG)
    expected = stack.forward(X, training=False)[0].copy()

    async def step(p):
        y, context = await p.forward(stack, X)
        dx = await asyncio.wrap_future(p.backward(stack, context, DY))
        return y, dx

    async def main():
        with client.pipeline() as p:
            results = await asyncio.gather(*(step(p) for _ in range(5)))
            assert all(np.array_equal(y, expected) and np.array_equal(dx, results[0][1]) for y, dx in results)
            with pytest.raises(lamina.InvalidArgument):
                await p.forward(stack, X, training=False, layers=(2, 9))
            busy(p, 10)
            late = p.forward(stack, X, training=False)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(late), 0.01)
            with pytest.raises(lamina.Cancelled):  # asyncio's cancel went on to the daemon
                late.result()

    asyncio.run(main())
    works(client, stack)


def test_futures_of_the_standard_library(client):
    stack = client.create_stack("t", **CONFIG)
    with client.pipeline() as p:
        pending = [p.forward(stack, X, training=False) for _ in range(4)]
        done, rest = concurrent.futures.wait(pending, timeout=30)
        assert len(done) == 4 and not rest and set(concurrent.futures.as_completed(pending)) == done


# In a process of its own, which says where it stands rather than stand there for ever.
INTERRUPTED = """
import faulthandler, gc, random, signal, sys
import lamina
import numpy as np

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
faulthandler.dump_traceback_later(100, exit=True)
random.seed(1)
x = np.random.default_rng(5).standard_normal((4, 16, 32)).astype(np.float32)
with lamina.connect(sys.argv[1]) as client:
    stack = client.create_stack("interrupted", batch_size=4, max_seq_length=16, hidden_size=32, heads=4, seed=1,
                                num_hidden_layers=2, max_contexts=4)
    y, context = stack.forward(x)
    stack.backward(context, y)
    ignored = 0
    for _ in range(int(sys.argv[2])):
        try:
            with client.pipeline(depth=4) as p:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-4, 4e-3))
                for _ in range(200):
                    forward = p.forward(stack, x)
                    backward = p.backward(stack, forward, x)
                p.wait()
            ignored += 1  # the interrupt came to a callback of a weak reference, from which nothing is raised
        except KeyboardInterrupt:
            pass
        forward = backward = None
        stack.zero_gradients()
        z, context = stack.forward(x)
        assert np.array_equal(z, y)
        stack.backward(context, z)
    assert ignored < int(sys.argv[2]) / 4
    context = None
    gc.collect()
    client.session.release_garbage()
    assert stack.info().outstanding_contexts == 0 and stack.apply_gradients(lr=1e-3).applied
    client.delete_stack("interrupted")
"""


@pytest.mark.slow
def test_keyboard_interrupts_in_the_middle(daemon):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, daemon.target, "200"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_an_interrupt_leaves_on_its_way():
    """A lock that was taken, and not yet by the block; a turn that nobody came to use."""
    from lamina.turns import Condition, Turn

    condition = Condition()
    acquire = condition.__enter__
    assert not hasattr(acquire, "__code__")  # no function in Python, in which an interrupt may come
    with condition:
        assert condition._is_owned()
    assert not condition._is_owned()
    with pytest.raises(KeyError), condition:
        raise KeyError
    assert not condition._is_owned()
    release = condition._release_save

    def interrupted():
        release()
        raise KeyboardInterrupt

    condition._release_save = interrupted
    with pytest.raises(KeyboardInterrupt), condition:
        condition.wait()
    assert not condition._is_owned()
    turn, mine, other = Turn(), object(), object()
    turn.take(mine)
    turn.take(mine)
    turn.give_back(other)
    waiting = threading.Thread(target=turn.take, args=(other,))
    waiting.start()
    time.sleep(0.02)
    assert turn.is_of(mine) and waiting.is_alive()
    turn.give_back(mine)
    waiting.join(10)
    assert turn.is_of(other)


# --- contexts and answers that get lost ---


def test_dropped_results_release_their_contexts(client):
    stack = client.create_stack("t", **dict(CONFIG, max_contexts=3))
    with client.pipeline() as p:
        for _ in range(20):
            p.forward(stack, X)
            p.wait()  # with nobody to hold its context it goes; three have room
        kept = p.forward(stack, X)
        kept.result()
        assert contexts(client, stack) == 1
        b = p.backward(stack, kept, DY)
        del kept
        assert b.result().shape == X.shape and contexts(client, stack) == 0
        many = [p.forward(stack, X) for _ in range(4)]
        with pytest.raises(lamina.ResourceExhausted):
            many[-1].result()
        del many
        assert contexts(client, stack) == 0
    works(client, stack)


def test_a_dropped_pipeline_runs_what_it_was_given(client):
    stack = client.create_stack("t", **CONFIG)
    threads = lambda: [t for t in threading.enumerate() if t.name == "lamina-pipeline"]
    before = len(threads())
    p = client.pipeline()
    f = p.forward(stack, X)
    b = p.backward(stack, f, DY)
    del p
    gc.collect()
    assert b.result(30).shape == X.shape
    wait_until(lambda: len(threads()) == before)
    works(client, stack)


class Lost(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self):
        return "the answer was lost"


@pytest.mark.parametrize("ran", [True, False])
def test_a_pipeline_after_a_mutation_that_was_not_heard_of(client, monkeypatch, ran):
    stack = client.create_stack("t", **CONFIG)
    real = client._stubs.layer.Forward

    lose = [True]

    def call(request, timeout=None):
        if not lose:
            return real(request, timeout=timeout)
        if ran:
            real(request, timeout=timeout)
        raise Lost

    monkeypatch.setattr(client._stubs.layer, "Forward", call)
    with pytest.raises(lamina.DeadlineExceeded):
        stack.forward(X)
    lose.clear()
    with client.pipeline() as p:
        pending = []
        for _ in range(2):
            f = p.forward(stack, X)
            pending += [f, p.backward(stack, f, DY), p.apply_gradients(stack, lr=1e-3)]
        assert [one.exception() for one in pending] == [None] * 6 and pending[-1].result().step == 2
    assert stack.info().forward_count == 2 + ran
    works(client, stack)


def test_a_forward_that_ran_unheard_leaves_no_context(client):
    stack = client.create_stack("t", **CONFIG)
    p = client.pipeline()
    p.zero_gradients(stack).result()
    stream = p._stream
    heard = stream._answered

    def deaf(answer):
        if answer.id > 2:
            raise ValueError("not to be read")
        heard(answer)

    stream._answered = deaf
    pending = [p.forward(stack, X) for _ in range(4)]
    assert [type(one.exception()) for one in pending[1:]] == [lamina.Internal] * 3
    assert pending[0].exception() is None
    p.close()
    del pending
    works(client, stack)
