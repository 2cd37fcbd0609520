"""What holds a session in the daemon: its KeepAlive stream, and another one when that breaks."""

from __future__ import annotations

import collections
import queue
import threading
import time
from typing import Any, Callable, Deque, Optional

import grpc

from lamina.errors import Cancelled, LaminaError, NotFound, Unavailable, from_rpc
from lamina.turns import Condition
from lamina.v1 import session_service_pb2 as pb

# A call that the daemon did not answer is asked again this many times, waiting twice as long each time.
_RETRIES = 5
_FIRST_WAIT = 0.05
_LONGEST_WAIT = 1.0  # between two streams that break before they are answered
_SLOWEST_ANSWER = 60.0  # seconds, to a keep-alive message
_LONGEST_BEAT = 10.0  # seconds between two messages: what is on the way may forget a connection that is silent

# How a stream ends that broke; any other status is the daemon's own word about the session.
_BREAKS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)


class Lease:
    """A session's lease, from its making until `over` says why it has ended.

    One KeepAlive stream holds it. When that breaks, another one is opened, on whatever connection gRPC makes, until one
    is answered or `grace` seconds are over.

    Threads: any; one of its own runs the streams.
    """

    def __init__(self, keep_alive: Callable, session_id: str, lease_seconds: float, grace: float) -> None:
        """keep_alive: the stub's method. grace: as the daemon granted it."""
        self._keep_alive = keep_alive
        self._session_id = session_id
        self.grace = grace
        self.beat = min(lease_seconds / 3, _LONGEST_BEAT)  # seconds; how often to ping
        self._left = threading.Event()
        self._changed = Condition()  # guards what follows
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()  # the stream's messages; None: no more
        self._unanswered: Deque[int] = collections.deque()  # the stream's, by what they answer of `_asked`
        self._asked = 1  # pings; the first stream's first message is one
        self._answered = 0  # of those
        self._applied = 0
        self._held = False  # the stream was answered and has not ended
        self._waiting: Any = None  # a stream that was not answered yet, and is not the first
        self._streams = 0  # that were answered
        self._breaks = 0  # streams that ended
        self._over: Optional[str] = None
        threading.Thread(target=self._keep, name="lamina-keepalive", daemon=True).start()
        try:
            self._await_answer(1)
        except BaseException:
            self.leave()
            self.hang_up()
            raise

    # --- what others ask ---

    def over(self) -> Optional[str]:
        """Why the session has ended, in words; None while it lives, or may live: its stream broke, and the grace lasts."""
        over = self._over
        return None if over is None else f"this session has ended ({over}): its regions and contexts are gone, connect again"

    @property
    def held(self) -> bool:
        """Whether a stream stands, as far as is known here."""
        return self._held

    @property
    def breaks(self) -> int:
        """How many streams have ended."""
        return self._breaks

    def settle(self) -> None:
        """Waits while it is open whether the session can be resumed."""
        with self._changed:
            self._changed.wait_for(lambda: self._held or self._over is not None, self.grace + _SLOWEST_ANSWER)

    def ping(self) -> int:
        """The last applied sequence, from the daemon; of a stream that breaks, from the next one. Unavailable when the
        session has ended."""
        with self._changed:
            self._asked += 1
            number = self._asked
            self._unanswered.append(number)
            self._outbox.put(pb.KeepAliveRequest())
        return self._await_answer(number)

    def leave(self) -> None:
        """From now on a stream's end is not to be mended."""
        self._left.set()

    def hang_up(self) -> None:
        """Ends the stream, in order, and with it the session. Does not wait."""
        with self._changed:
            self._outbox.put(None)
            waiting = self._waiting
        if waiting is not None:
            waiting.cancel()

    def wait_until_over(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over is not None, seconds)

    # --- streams ---

    def _await_answer(self, number: int) -> int:
        seconds = self.grace + _SLOWEST_ANSWER
        with self._changed:
            answered = self._changed.wait_for(lambda: self._answered >= number or self._over is not None, seconds)
            if self._over is not None:
                raise Unavailable(str(self.over()))
            if not answered:
                raise Unavailable(f"the daemon did not answer the session's keep-alive for {seconds:g} s")
            return self._applied

    def _keep(self) -> None:
        broke: Optional[LaminaError] = None  # how the last stream that was answered ended
        since, wait = time.monotonic(), _FIRST_WAIT
        while True:
            before = self._streams
            error = self._hold(None if broke is None else since + self.grace - time.monotonic())
            now = time.monotonic()
            if broke is None or self._streams > before:
                broke, since, wait = error, now, _FIRST_WAIT
            if self._left.is_set():
                reason = "closed"
                break
            if error.code not in _BREAKS or self.grace <= 0:
                reason = str(error)
                break
            if now - since >= self.grace:
                reason = f"its connection broke and was not back within {self.grace:g} s: {broke}"
                break
            self._left.wait(min(wait, since + self.grace - now))
            wait = min(2 * wait, _LONGEST_WAIT)
        with self._changed:
            self._over = reason
            self._changed.notify_all()

    def _hold(self, patience: Optional[float]) -> LaminaError:
        """One stream, from its first message to its end; returns how that came. patience: seconds to wait for its first
        answer, and for a connection; None: no connection is waited for, and the answer for ever."""
        outbox: queue.SimpleQueue = queue.SimpleQueue()
        outbox.put(pb.KeepAliveRequest(session_id=self._session_id))
        giving_up: Optional[threading.Timer] = None
        try:
            with self._changed:
                if self._left.is_set():
                    return Cancelled("closed")
                self._outbox = outbox
                # Its first answer is one to all that was asked before.
                self._unanswered = collections.deque([self._asked])
                # gRPC looks for a connection for as long as a call waits for one.
                answers = self._keep_alive(iter(outbox.get, None), wait_for_ready=patience is not None)
                if patience is not None:
                    self._waiting = answers
                    giving_up = threading.Timer(max(patience, 0), answers.cancel)
                    giving_up.daemon = True
                    giving_up.start()
            for answer in answers:
                if giving_up is not None:
                    giving_up.cancel()
                with self._changed:
                    self._waiting = None
                    self._answered = self._unanswered.popleft()
                    self._applied = answer.applied_sequence
                    self._streams += not self._held
                    self._held = True
                    self._changed.notify_all()
            return NotFound("it was deleted")
        except grpc.RpcError as error:
            return from_rpc(error)
        except ValueError as error:  # the channel was closed under it
            self._left.set()
            return Cancelled(str(error))
        finally:
            outbox.put(None)  # lets gRPC's thread go
            if giving_up is not None:
                giving_up.cancel()
            with self._changed:
                self._held = False
                self._waiting = None
                self._breaks += 1
                self._changed.notify_all()


def call_with_retries(call: Callable, request: Any, timeout: Optional[float] = None, lease: Optional[Lease] = None) -> Any:
    """Runs an RPC that is safe to repeat: again where the daemon could not be reached. LaminaError.

    A few times; what fails because the lease's stream broke is not counted while the grace lasts. Unavailable with the
    reason where the session has ended.
    """
    wait, tries = _FIRST_WAIT, 0
    began = time.monotonic()
    while True:
        breaks = 0 if lease is None else lease.breaks
        try:
            return call(request, timeout=timeout)
        except grpc.RpcError as error:
            unreached = error.code() == grpc.StatusCode.UNAVAILABLE
            if lease is not None:
                if unreached or error.code() == grpc.StatusCode.NOT_FOUND:
                    lease.settle()
                reason = lease.over()
                if reason is not None:
                    raise Unavailable(f"{reason}; the call heard {from_rpc(error)}") from None
            if not unreached:
                raise from_rpc(error) from None
            if tries >= _RETRIES:
                raise from_rpc(error) from None
            time.sleep(wait)  # within which the stream's reader hears of a break too
            if lease is not None and lease.breaks != breaks and time.monotonic() - began < lease.grace:
                wait = _FIRST_WAIT
            else:
                tries += 1
                wait *= 2
