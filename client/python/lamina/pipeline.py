"""Asynchronous calls: many under way at once, over one stream, run by the daemon in the order in which they were made.

A synchronous step waits a round trip between its calls; on a pipeline the next ones wait in the daemon while one runs.

>>> import lamina, numpy as np
>>> with lamina.connect(transport="memfd") as client:
...     stack = client.create_stack("pipeline-example", batch_size=2, max_seq_length=8, hidden_size=16, heads=2,
...                                 num_hidden_layers=2, seed=1)
...     x = np.ones((2, 8, 16), np.float32)
...     with client.pipeline() as p:
...         lower = p.forward(stack, x, layers=(0, 1))           # returns at once
...         upper = p.forward(stack, lower, layers=(1, 2))       # its input need not be there yet
...         y, _ = upper.result()                                # waits for both
...         dy = p.backward(stack, upper, 2 * y / y.size)
...         _ = p.backward(stack, lower, dy, input_grad=False)
...         step = p.apply_gradients(stack, lr=1e-3, zero_gradients=True)
...     client.delete_stack("pipeline-example")                  # the end of the block waited for the rest
>>> step.result().applied
True

In a coroutine a call can be awaited, `y, context = await p.forward(stack, x)`, but making it blocks while `depth` others are
under way, or while it waits for its turn to change something: lamina.async_pipeline does not.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import queue
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Deque, Generator, List, Optional, Sequence, Tuple, Type, Union

import grpc
import numpy as np

from lamina.device import Done
from lamina.errors import (Cancelled, DeadlineExceeded, FailedPrecondition, Internal, LaminaError, Unavailable,
                           Unimplemented, from_number, from_rpc)
from lamina.session import Lost, Session
from lamina.stack import Call, Context, Stack
from lamina.turns import Condition
from lamina.v1 import layer_service_pb2 as pb

if TYPE_CHECKING:
    from lamina.client import Client

# The daemon leaves messages unread while this many calls wait; a cancel is to get through.
_DEEPEST = 63


class Pending(concurrent.futures.Future):
    """A call on a pipeline: a concurrent.futures.Future of what the Stack's method of that name returns; can be awaited.

    output: the array that its result will land in, whose contents are there once it is done; None where tensors travel
    inside messages, and for calls without one. The errors that result() raises are the Stack's method's, and
    FailedPrecondition for a call that needs one that failed.

    Threads: any. Callbacks (add_done_callback) run in the pipeline's own thread: they are not to wait for other calls,
    nor to make any.
    """

    def __init__(self, stream: _Stream, call: Call, context_from: Optional[PendingForward] = None,
                 needs: Sequence[Pending] = ()) -> None:
        super().__init__()
        self._condition = Condition()  # instead of the base's own
        self.output = call.output
        self._stream = stream
        self._mutation = call.mutation
        self._id = 0  # once sent
        self._cancelling = False
        self._done: Optional[Done] = None  # of a call with device memory: what the daemon's stream leaves behind
        # What follows is held only until it is answered.
        self._call: Optional[Call] = call
        self._message: Any = pb.ExecuteRequest(**{call.field: call.request})
        self._context_from = context_from  # whose context it spends; kept from being released
        self._needs: Sequence[Pending] = tuple(needs)  # whose outputs or context it takes

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    def cancel(self) -> bool:
        """Asks the daemon not to run it if it has not begun; returns whether it was asked. The answer still comes:
        Cancelled, or the result. Mutations behind a cancelled one fail (see Pipeline)."""
        return self._stream.cancel(self)

    def wait_on_stream(self, stream: Optional[int] = None) -> Any:
        """Of a call whose tensors are in device memory: has a CUDA stream of this process wait for the result, without
        waiting here, and returns `output`. What is enqueued on the stream afterwards finds the result there, unless the
        call fails: then result() says so, and what was enqueued has worked with what was there before. stream: the
        driver's handle; None: the one that the call's input came with. ValueError: no device memory."""
        call, done = self._call, self._done
        if call is None or done is None:  # done, or too many under way to number
            if self.output is None or isinstance(self.output, np.ndarray):
                raise ValueError("wait_on_stream: the call's result is not in device memory")
            self.result()
            return self.output
        assert call.stream is not None
        done.wait_on(call.stream if stream is None else stream)
        return self.output

    @property
    def _request(self) -> Any:
        assert self._call is not None
        return getattr(self._message, self._call.field)

    def _close(self, result: Any, error: Optional[BaseException]) -> None:
        """The end, in one way or the other."""
        self._call = self._message = self._context_from = None
        self._needs = ()
        if self._done is not None:
            self._done.over()  # also where it failed: no stream is to wait for ever
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(result)


class PendingForward(Pending):
    """A forward on a pipeline: result() is (y, Context), or (y, None) of an evaluation.

    context: the Context once it is done. Dropped unused, it is released in the daemon, as any Context.
    """

    context: Optional[Context] = None

    def _close(self, result: Any, error: Optional[BaseException]) -> None:
        if error is None:
            self.context = result[1]
        super()._close(result, error)

    def _spent(self) -> None:
        if self.context is not None:
            self.context._spent()


def _again(error: LaminaError) -> LaminaError:
    """The same error, to be raised in another place."""
    return type(error)(error.message, error.code)


class _Stream:
    """One Execute stream: numbers calls, sends them, and ends each Pending when its answer comes.

    Threads: any; one of its own reads the answers. It knows neither the Pipeline nor the client, so that their end can
    end it.
    """

    def __init__(self, session: Session, execute: Callable, depth: int, timeout: Optional[float]) -> None:
        self._session = session
        self._depth = depth
        self._mutating = threading.Lock()  # before _state: mutations are sent one after another
        self._state = Condition()  # guards what follows
        self._under_way: Deque[Pending] = collections.deque()  # sent, not answered; with mutations: the turn is this one's
        self._ending = 0  # futures that are about to be done
        self._sequence = 0  # the last one sent
        self._applied = 0  # the last one that ran
        self._failed: Optional[LaminaError] = None  # the first failure since the last wait: a mutation's, or the stream's
        self._closed = False
        self._over: Optional[LaminaError] = None  # why the stream has ended
        self._last_id = 0
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()  # None: no more
        self._rpc = execute(iter(self.outbox.get, None), timeout=timeout)
        self._reader = threading.Thread(target=self._read, name="lamina-pipeline", daemon=True)
        self._reader.start()

    # --- sending ---

    def submit(self, pending: Pending) -> None:
        """Sends a call; waits while `depth` are under way, and for a mutation while others have the session's turn. It
        ends at once where the stream has ended, or a mutation before it failed. ValueError: closed."""
        if not pending._mutation:
            with self._state:
                if self._ready(pending):
                    self._send(pending)
            return
        with self._mutating:
            while not self._join(pending):
                try:
                    first = self._session.begin_run(self)
                    if first is None:
                        self._send_alone(pending)
                        return
                    with self._state:
                        if self._ready(pending):
                            self._sequence, self._applied = first - 1, first - 1
                            self._send(pending)
                finally:
                    if pending._id == 0:  # not sent
                        self._session.drop_run(self)
                return

    def _join(self, pending: Pending) -> bool:
        """Sends a mutation behind others that are under way; False where there are none."""
        with self._state:
            if not self._ready(pending):
                return True
            if not self._has_mutations():
                return False
            self._send(pending)
            return True

    def _has_mutations(self) -> bool:
        """Needs _state."""
        return any(pending._mutation for pending in self._under_way)

    def _ready(self, pending: Pending) -> bool:
        """Waits until there is room for another call. False: it has ended instead. Needs _state."""
        self._state.wait_for(lambda: len(self._under_way) < self._depth or self._closed or self._over is not None)
        if self._closed:
            raise ValueError("this pipeline was closed")
        if self._over is not None:
            kind = Unimplemented if isinstance(self._over, Unimplemented) else Unavailable
            pending._close(None, kind(f"not sent: this pipeline's stream has ended ({self._over})"))
            return False
        if pending._mutation and self._failed is not None:
            pending._close(None, FailedPrecondition(
                f"not sent: a mutation before it failed ({self._failed}); after wait() the pipeline takes more"))
            return False
        return True

    def _send(self, pending: Pending) -> None:
        """Needs _state."""
        if pending._mutation:
            self._sequence += 1
            pending._request.mutation.session_id = self._session.id
            pending._request.mutation.sequence = self._sequence
        pending._id = pending._message.id = self._next_id()
        self._under_way.append(pending)
        self.outbox.put(pending._message)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _send_alone(self, pending: Pending) -> None:
        """The first mutation after one whose answer was lost, by whomever: an RPC of its own, which finds out whether that
        one ran. Needs _mutating, and that no mutation is under way."""
        with self._state:
            self._state.wait_for(lambda: not self._under_way)
        call, request = pending._call, pending._request
        assert call is not None
        source = pending._context_from
        if source is not None and source.context is not None:
            request.context_id = source.context.id  # it was pending when this was asked for
        mutate = self._session.mutate_with_room if call.field == "forward" else self._session.mutate
        try:
            result = call.finish(mutate(call.method, request, call.keep))
        except LaminaError as error:
            self.refuse(pending, error)
        else:
            pending._close(result, None)

    def refuse(self, pending: Pending, error: LaminaError) -> None:
        """Ends a call that was not sent; mutations after it are refused like after one that failed."""
        if pending._mutation:
            with self._state:
                self._failed = self._failed or error
        pending._close(None, error)

    def cancel(self, pending: Pending) -> bool:
        """See Pending.cancel."""
        with self._state:
            if self._closed or self._over is not None or pending not in self._under_way:
                return False
            if not pending._cancelling:
                pending._cancelling = True
                self.outbox.put(pb.ExecuteRequest(id=self._next_id(), cancel=pending._id))
            return True

    def wait(self, timeout: Optional[float]) -> None:
        """See Pipeline.wait."""
        with self._state:
            if not self._state.wait_for(lambda: not self._under_way and self._ending == 0, timeout):
                raise concurrent.futures.TimeoutError()
            failed, self._failed = self._failed, None
        if failed is not None:
            raise _again(failed)

    def close(self, cancel: bool) -> None:
        """No more calls; waits for those under way, or has them cancelled."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self.outbox.put(None)
        if cancel:
            self._rpc.cancel()
        if threading.current_thread() is self._reader:
            return
        try:
            self._reader.join()
        except BaseException:  # KeyboardInterrupt: whoever wants to leave does not wait for what waits
            self._rpc.cancel()
            raise

    # --- answers ---

    def _read(self) -> None:
        error: LaminaError = Unavailable("the daemon ended the stream")
        try:
            for answer in self._rpc:
                self._answered(answer)
        except grpc.RpcError as e:
            error = from_rpc(e)
            if isinstance(error, Unimplemented):
                error = Unimplemented("this daemon has no pipelines: it is older than this client")
        except Exception as e:  # what comes can't be understood: no more of it
            self._rpc.cancel()
            error = Internal(f"the pipeline's answers can't be read: {e!r}")
        self._ended(self._told(error))

    def _told(self, error: LaminaError) -> LaminaError:
        reason = self._session.over()
        return error if reason is None else Unavailable(f"{reason}; the call heard {error}")

    def _answered(self, answer: pb.ExecuteResponse) -> None:
        with self._state:
            pending = self._under_way[0]  # no one else takes any out
        if pending._id != answer.id:
            raise ValueError(f"answer {answer.id} instead of {pending._id}")
        call = pending._call
        assert call is not None
        result, error = None, None
        if answer.code != 0:
            error = self._told(from_number(answer.code, answer.message, answer.request_id or None))
        else:
            try:
                result = call.finish(getattr(answer, call.field))
            except Exception as e:
                error = e
        with self._state:
            self._under_way.popleft()
            self._ending += 1
            if pending._mutation:
                if answer.code == 0:
                    self._applied = pending._request.mutation.sequence
                elif self._failed is None:
                    self._failed = error
                if not self._has_mutations():
                    # After a failure the daemon refused all that had been sent behind: the failed one's is next.
                    self._session.end_run(self, self._applied + 1)
            elif error is None:
                # The daemon refuses a mutation behind a failed one by itself, but ran this over what was in the memory.
                bad = next((n for n in pending._needs if n.exception() is not None), None)
                if bad is not None:
                    result, error = None, _unfounded(bad)
            self._state.notify_all()
        pending._close(result, error)
        with self._state:
            self._ending -= 1
            self._state.notify_all()

    def _ended(self, error: LaminaError) -> None:
        self.outbox.put(None)  # lets gRPC's thread go
        with self._state:
            self._over = error
            if self._under_way or not self._closed:
                self._failed = self._failed or error
            lost, self._under_way = list(self._under_way), collections.deque()
            self._ending += len(lost)
            self._state.notify_all()
        unsettled: List[Lost] = []
        for pending in lost:
            call = pending._call
            assert call is not None
            if pending._mutation:
                unsettled.append(Lost(call.method, pending._request, call.keep))
            elif self._session.over() is None:
                self._session.quarantine(call.keep)  # it may be running
            del call
        for pending in lost:
            pending._close(None, _again(error))
        if unsettled:
            self._session.end_run(self, self._applied + 1, unsettled)
        else:
            self._session.drop_run(self)  # whoever took it was interrupted
        with self._state:
            self._ending -= len(lost)
            self._state.notify_all()


def _unfounded(needed: Pending) -> FailedPrecondition:
    return FailedPrecondition(f"it takes what a call that failed was to give: {needed.exception()}")


def _discard_again(session: Session, request: pb.ReleaseContextRequest, pending: concurrent.futures.Future) -> None:
    """After a release that the daemon may not have heard of."""
    if isinstance(pending.exception(), (Unavailable, DeadlineExceeded, Cancelled)):
        session.discard(request.stack, request.context_id)


class Pipeline:
    """Calls of one client that are under way together, on a stream; from Client.pipeline. Use as a context manager, or
    call close().

    Each method takes what the Stack's method of its name takes, the stack first, and returns a Pending at once. The
    daemon runs the calls in the order in which they were made. Where `depth` calls are under way, the next one waits
    until one is answered. ValueError and TypeError for what is wrong here, and errors of shared memory, are raised by
    the method; all else is raised by the Pending.

    x, dy: an array, or a Pending of this pipeline whose output lies in shared memory (Pending.output): a call can be made
    before its input is there. Arrays that lie in shared memory (Client.empty, results) are read when the call runs: they
    are not to be changed before it is done; others are copied at once. A mutation whose input is the output of an
    evaluation waits for that.

    Mutations (training forwards, backwards, apply_gradients, zero_gradients) depend on each other: after one that failed,
    was cancelled or came too late, all later ones of the pipeline fail with FailedPrecondition and change nothing, until
    wait() was called. Evaluations go on. While mutations are under way, those of others in this client (the Stack's
    methods, another pipeline) wait until there are none.

    timeout (of a call): seconds, within which it must begin, else DeadlineExceeded; the client's own does not apply here.
    Where the stream itself breaks or its time is over, what is under way ends with Unavailable or DeadlineExceeded and may
    have run, once; what is asked for later ends with Unavailable, and one makes another pipeline. Of a broken connection
    the session may survive the break (Client's resume_grace): wait() returns when it is settled which mutations ran.
    Contexts of forwards that ran unheard are released; Stack.info says how many steps were applied.

    Threads: any.
    """

    def __init__(self, client: Client, timeout: Optional[float], depth: int) -> None:
        if not 1 <= depth <= _DEEPEST:
            raise ValueError(f"depth: {depth} must be 1..{_DEEPEST}")
        self._client = client
        self._session = client.session
        self._stream = _Stream(self._session, client._stubs.layer.Execute, depth, timeout)
        # One that is dropped says so; what is under way goes on.
        weakref.finalize(self, self._stream.outbox.put, None).atexit = False

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self._stream.close(cancel=kind is not None)

    def close(self) -> None:
        """Takes no more calls and waits for those under way. Raises none of their errors. Idempotent.

        The end of a `with` block does it; after an exception what has not begun is cancelled instead.
        """
        self._stream.close(cancel=False)

    def wait(self, timeout: Optional[float] = None) -> None:
        """Waits until nothing is under way; raises the error of the first mutation that failed since the last wait, or
        of the stream where that broke. Either way mutations are taken again, unless the stream has ended.
        concurrent.futures.TimeoutError: it took longer than `timeout` seconds."""
        self._stream.wait(timeout)

    def forward(self, stack: Stack, x: Any, mask: Optional[Any] = None, lengths: Optional[Any] = None,
                training: Optional[bool] = None, layers: Optional[Tuple[int, int]] = None,
                out: Optional[Any] = None, cumulative_lengths: Optional[Any] = None, stream: Optional[int] = None,
                timeout: Optional[float] = None) -> PendingForward:
        """Stack.forward: result (y, Context), or (y, None) in evaluation. Contexts that nobody holds any more are released
        before it; ResourceExhausted for want of room for another is not tried again."""
        self._check(stack)
        self._release_garbage()
        x, needs = self._given("x", x)
        call = stack._forward_call(x, mask, lengths, training, layers, out, cumulative_lengths, stream)
        pending = PendingForward(self._stream, call, needs=needs)
        self._number(pending, call)
        self._submit(pending, timeout)
        return pending

    def backward(self, stack: Stack, context: Union[PendingForward, Context], dy: Any, input_grad: bool = True,
                 out: Optional[Any] = None, stream: Optional[int] = None, timeout: Optional[float] = None) -> Pending:
        """Stack.backward: result dx, or None without input_grad. context: also a forward of this pipeline, which need not
        have run. ValueError: an evaluation, which has none, or another pipeline's that is not done."""
        self._check(stack)
        dy, needs = self._given("dy", dy)
        source = context if isinstance(context, PendingForward) else None
        held: Optional[Context] = None if isinstance(context, PendingForward) else context
        if source is not None:
            if not source._mutation:
                raise ValueError("context: an evaluation keeps none")
            self._check_reach("context", source)
            held = source.context if source.done() else None
        spent = (source or context)._spent
        call = stack._backward_call("" if held is None else held.id, spent, dy, input_grad, out, stream)
        pending = Pending(self._stream, call, source, needs if source is None else (*needs, source))
        if held is None and source is not None:
            pending._message.context_of = source._id
        self._number(pending, call)
        self._submit(pending, timeout)
        return pending

    def apply_gradients(self, stack: Stack, lr: float, timeout: Optional[float] = None, **settings: Any) -> Pending:
        """Stack.apply_gradients, with its settings by name: result Applied. stack.loss_scale changes when it is done."""
        self._check(stack)
        pending = Pending(self._stream, stack._apply_call(lr, **settings))
        self._submit(pending, timeout)
        return pending

    def zero_gradients(self, stack: Stack, timeout: Optional[float] = None) -> Pending:
        """Stack.zero_gradients: result None."""
        self._check(stack)
        pending = Pending(self._stream, stack._zero_call())
        self._submit(pending, timeout)
        return pending

    def _release_garbage(self) -> None:
        """Releases what was discarded, on the stream."""
        session = self._session
        for request in list(session.take_garbage()):
            pending = Pending(self._stream, Call(self._client._stubs.layer.ReleaseContext, "release_context", request,
                                                 False, lambda answer: None))
            pending.add_done_callback(functools.partial(_discard_again, session, request))
            try:
                self._stream.submit(pending)
            except ValueError as error:  # closed
                pending._close(None, Unavailable(str(error)))

    def _number(self, pending: Pending, call: Call) -> None:
        """Has the daemon's stream say when a result in device memory is there."""
        pool = self._session.device_pool() if call.stream is not None and call.output is not None else None
        if pool is not None:
            pending._done = pool.fences.done(pending._request.done)

    def _check(self, stack: Stack) -> None:
        if stack._client is not self._client:
            raise ValueError("stack: a handle of another client")

    def _check_reach(self, name: str, pending: Pending) -> None:
        if pending._stream is not self._stream and not pending.done():
            raise ValueError(f"{name}: a call of another pipeline that is not done")

    def _given(self, name: str, value: Any) -> Tuple[Any, Sequence[Pending]]:
        """The array that a caller means, and the calls that it waits for."""
        if not isinstance(value, Pending):
            return value, ()
        self._check_reach(name, value)
        if value.output is None:
            why = ("without shared memory (the inline transport) there is no array before the result is there: pass that"
                   if self._session.pool is None else "the call gives no array")
            raise ValueError(f"{name}: {why}")
        return value.output, (value,)

    def _submit(self, pending: Pending, timeout: Optional[float]) -> None:
        if timeout is not None:
            pending._message.timeout_seconds = timeout
        for need in pending._needs:
            if pending._mutation and not need._mutation:
                need.exception()  # waits
            if need.done() and need.exception() is not None:
                self._stream.refuse(pending, _unfounded(need))
                return
        self._stream.submit(pending)
