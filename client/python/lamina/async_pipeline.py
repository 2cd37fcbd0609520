"""Pipelines for coroutines: nothing here holds up the event loop.

>>> import asyncio, lamina, numpy as np
>>> async def train(client):
...     stack = client.create_stack("async-example", batch_size=2, max_seq_length=8, hidden_size=16, heads=2,
...                                 num_hidden_layers=2, seed=1)
...     x = np.ones((2, 8, 16), np.float32)
...     async with client.apipeline(depth=8) as p:
...         forward = await p.forward(stack, x)       # it is on its way
...         y, _ = await forward                      # its result is here
...         await p.backward(stack, forward, 2 * y / y.size, input_grad=False)
...         step = await p.apply_gradients(stack, lr=1e-3, zero_gradients=True)
...         return (await step).applied
>>> with lamina.connect() as client:
...     asyncio.run(train(client))
...     client.delete_stack("async-example")
True
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Optional, Tuple, Type, Union

from lamina.pipeline import Pending, PendingForward, Pipeline
from lamina.stack import Context, Stack

if TYPE_CHECKING:
    from lamina.client import Client


class AsyncPipeline:
    """A Pipeline whose methods are coroutines; from Client.apipeline. It is open inside of `async with`.

    Each method takes what the Pipeline's method of its name takes, and gives its Pending once the call is on its way: that
    waits for room where `depth` calls are under way, and for the session's turn where others change something. Awaiting the
    Pending gives the result, or raises the call's error. Calls are made in the order in which their coroutines begin to
    run. Arrays given are not to be changed before the method is back.

    A task that is cancelled while it awaits a method: the call is not made, or, made already, asked to be cancelled, as by
    the Pending's cancel(). So is one whose Pending is awaited by a task that is cancelled, or by asyncio.wait_for when its
    time is over; with asyncio.shield(asyncio.wrap_future(pending)) it goes on.

    The `async with` block ends as a Pipeline's does: it waits for what is under way; after an exception what has not begun
    is cancelled.

    Threads: one event loop's, as its coroutines. It has a thread of its own that makes the calls.
    """

    def __init__(self, client: Client, timeout: Optional[float], depth: int) -> None:
        self._open: Callable[[], Pipeline] = functools.partial(Pipeline, client, timeout, depth)
        self._opened: Optional[Pipeline] = None
        self._caller = concurrent.futures.ThreadPoolExecutor(1, "lamina-apipeline")

    async def __aenter__(self) -> AsyncPipeline:
        """ValueError: depth. Unavailable: no daemon."""
        self._opened = await asyncio.wrap_future(self._caller.submit(self._open))
        return self

    async def __aexit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                        trace: Optional[TracebackType]) -> None:
        # Not on the caller's thread: a call that waits there for room is to end too.
        await asyncio.get_running_loop().run_in_executor(None, self._pipeline.__exit__, kind, error, trace)
        self._caller.shutdown(wait=False)

    @property
    def _pipeline(self) -> Pipeline:
        if self._opened is None:
            raise ValueError("this pipeline is not open: use it inside of `async with`")
        return self._opened

    async def wait(self, timeout: Optional[float] = None) -> None:
        """Pipeline.wait, for the calls whose methods are back. asyncio.TimeoutError: it took longer than `timeout`."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._pipeline.wait, timeout)
        except concurrent.futures.TimeoutError:
            raise asyncio.TimeoutError() from None

    async def forward(self, stack: Stack, x: Any, mask: Optional[Any] = None, lengths: Optional[Any] = None,
                      training: Optional[bool] = None, layers: Optional[Tuple[int, int]] = None,
                      out: Optional[Any] = None, cumulative_lengths: Optional[Any] = None, stream: Optional[int] = None,
                      timeout: Optional[float] = None) -> PendingForward:
        """Pipeline.forward."""
        return await self._make(self._pipeline.forward, stack, x, mask, lengths, training, layers, out, cumulative_lengths,
                                stream, timeout)

    async def backward(self, stack: Stack, context: Union[PendingForward, Context], dy: Any, input_grad: bool = True,
                       out: Optional[Any] = None, stream: Optional[int] = None,
                       timeout: Optional[float] = None) -> Pending:
        """Pipeline.backward."""
        return await self._make(self._pipeline.backward, stack, context, dy, input_grad, out, stream, timeout)

    async def apply_gradients(self, stack: Stack, lr: float, timeout: Optional[float] = None, **settings: Any) -> Pending:
        """Pipeline.apply_gradients."""
        return await self._make(functools.partial(self._pipeline.apply_gradients, stack, lr, timeout, **settings))

    async def zero_gradients(self, stack: Stack, timeout: Optional[float] = None) -> Pending:
        """Pipeline.zero_gradients."""
        return await self._make(self._pipeline.zero_gradients, stack, timeout)

    async def _make(self, method: Callable, *arguments: Any) -> Any:
        # One thread: calls keep their order.
        try:
            made = self._caller.submit(method, *arguments)
        except RuntimeError:
            raise ValueError("this pipeline was closed") from None
        try:
            return await asyncio.wrap_future(made)
        except asyncio.CancelledError:
            made.add_done_callback(_cancel_made)
            raise


def _cancel_made(made: concurrent.futures.Future) -> None:
    """Of a call that nobody waits for any more."""
    if not made.cancelled() and made.exception() is None:
        made.result().cancel()
