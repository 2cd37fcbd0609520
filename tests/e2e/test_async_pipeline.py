"""Pipelines from coroutines: the same results, and the event loop goes on whatever the daemon does."""

import asyncio
import time

import lamina
import numpy as np
import pytest
from test_pipeline import CONFIG, DY, LONG, LONG_X, X, contexts, works


@pytest.fixture
def stack(client):
    return client.create_stack("t", **CONFIG)


def test_a_step_and_its_steps_at_a_time(client, stack):
    y, context = stack.forward(X)
    y, dx = y.copy(), stack.backward(context, DY).copy()

    async def step(p):
        forward = await p.forward(stack, X)
        result, context = await forward
        return result, await (await p.backward(stack, context, DY))

    async def main():
        async with client.apipeline() as p:
            for result, gradient in await asyncio.gather(*(step(p) for _ in range(6))):
                assert np.array_equal(result, y) and np.array_equal(gradient, dx)
            # Without a result in between.
            lower = await p.forward(stack, X, layers=(0, 1))
            upper = await p.forward(stack, lower, layers=(1, 3))
            gradient = await p.backward(stack, upper, DY)
            await p.backward(stack, lower, gradient, input_grad=False)
            applied = await p.apply_gradients(stack, lr=1e-3)
            zeroed = await p.zero_gradients(stack)
            await p.wait()
            assert np.array_equal((await upper)[0], y) and (await applied).applied and await zeroed is None

    asyncio.run(main())
    works(client, stack)


def test_errors_are_the_calls_own(client, stack):
    async def main():
        async with client.apipeline() as p:
            evaluation = await p.forward(stack, X, training=False)
            with pytest.raises(ValueError, match="keeps none"):
                await p.backward(stack, evaluation, DY)
            wrong = await p.forward(stack, X, training=False, layers=(2, 9))
            with pytest.raises(lamina.InvalidArgument):
                await wrong
            failed = await p.forward(stack, X, training=True, layers=(2, 9))
            behind = await p.zero_gradients(stack)
            with pytest.raises(lamina.InvalidArgument):
                await p.wait()
            with pytest.raises(lamina.InvalidArgument):
                await failed
            with pytest.raises(lamina.FailedPrecondition):
                await behind
            await (await p.zero_gradients(stack))
        with pytest.raises(ValueError, match="closed"):
            await p.zero_gradients(stack)
        with pytest.raises(ValueError, match="depth"):
            async with client.apipeline(depth=99):
                pass
        with pytest.raises(ValueError, match="async with"):
            await client.apipeline().zero_gradients(stack)

    asyncio.run(main())
    works(client, stack)


def test_the_loop_goes_on_while_there_is_no_room(client, stack):
    long = client.create_stack("long", **LONG)
    beats = []

    async def heart():
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.002)

    async def main():
        beating = asyncio.ensure_future(heart())
        async with client.apipeline(depth=2) as p:
            calls = [await p.forward(long, LONG_X, training=False) for _ in range(5)]
            assert not calls[-1].done() and len(beats) > 5  # those before it were waited for
            await p.wait()
            assert all(call.done() for call in calls)
            calls = [await p.forward(long, LONG_X, training=False) for _ in range(2)]
            with pytest.raises(asyncio.TimeoutError):
                await p.wait(timeout=1e-4)
        assert all(call.done() for call in calls)  # the block's end waited
        beating.cancel()

    asyncio.run(main())
    assert len(beats) > 20


def test_what_is_cancelled_is_cancelled_in_the_daemon(client, stack):
    long = client.create_stack("long", **LONG)

    async def main():
        async with client.apipeline(depth=2) as p:
            for _ in range(2):
                last = await p.forward(long, LONG_X, training=False)
            # Waits for room, and never is made, or is taken back.
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(p.forward(stack, X), 1e-3)
            try:
                await p.wait()
            except lamina.Cancelled:
                pass
            assert (await (await p.forward(stack, X)))[1] is not None
        async with client.apipeline() as p:
            for _ in range(4):
                last = await p.forward(long, LONG_X, training=False)
            late = await p.forward(stack, X)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(late), 1e-3)
            with pytest.raises(lamina.Cancelled):
                late.result()
            await last
            with pytest.raises(lamina.Cancelled):
                await p.wait()
        with pytest.raises(KeyError, match="mine"):
            async with client.apipeline() as p:
                for _ in range(6):
                    last = await p.forward(long, LONG_X, training=False)
                raise KeyError("mine")
        with pytest.raises(lamina.Cancelled):
            await last

    asyncio.run(main())
    assert contexts(client, stack) == 0
    works(client, stack)
