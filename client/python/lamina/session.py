"""A session with the daemon: its lease, its mutation sequence, its way of moving tensors."""

import collections
import queue
import threading
import time

import grpc
import numpy as np

from lamina import dtypes
from lamina.errors import LaminaError, Unavailable, from_rpc, translated
from lamina.regions import RegionPool, region_request
from lamina.v1 import layer_service_pb2 as layer_pb
from lamina.v1 import session_service_pb2 as pb
from lamina.v1 import tensor_pb2

# A call that the daemon did not answer is asked again this many times, waiting twice as long each time.
_RETRIES = 5
_FIRST_WAIT = 0.05


def call_with_retries(call, request, timeout=None):
    """Runs an RPC that is safe to repeat. LaminaError."""
    wait = _FIRST_WAIT
    for attempt in range(_RETRIES + 1):
        try:
            return call(request, timeout=timeout)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or attempt == _RETRIES:
                raise from_rpc(error) from None
            time.sleep(wait)
            wait *= 2


class Session:
    """Opened lazily by Client. Threads: any; mutations run one after another."""

    def __init__(self, stubs, client_name, transport):
        self._stubs = stubs
        opened = call_with_retries(stubs.session.CreateSession, pb.CreateSessionRequest(client_name=client_name))
        self.id = opened.session_id
        self._lease = opened.lease_seconds
        self._mutations = threading.Lock()
        self._next_sequence = 1
        self._uncertain = False  # a mutation's outcome is unknown: ask before the next one
        self._garbage = collections.deque()  # (stack, context id) that will get no Backward
        self._outbox = queue.SimpleQueue()
        self._applied = queue.SimpleQueue()
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lamina-keepalive", daemon=True)
        self._keeper.start()
        self._pings = threading.Lock()
        with self._pings:
            self._answer()  # to the stream's first message: the lease is bound to the stream from here on
        self._ticker = threading.Thread(target=self._tick, name="lamina-tick", daemon=True)
        self._ticker.start()
        self.pool = None
        if transport != "inline" and opened.broker_path:
            try:
                pool = RegionPool(self._create_region, opened.broker_path, self.id)
                pool.empty(1, "fp32")  # whether the broker lets us
                self.pool = pool
            except Unavailable:
                if transport == "memfd":
                    raise
        elif transport == "memfd":
            raise Unavailable("the daemon offers no broker socket, so no regions")

    # --- lease ---

    def _keep(self):
        def messages():
            yield pb.KeepAliveRequest(session_id=self.id)
            while True:
                message = self._outbox.get()
                if message is None:
                    return
                yield message

        try:
            for answer in self._stubs.session.KeepAlive(messages()):
                self._applied.put(answer.applied_sequence)
        except grpc.RpcError:
            pass  # the next call says what is wrong
        self._applied.put(None)

    def _tick(self):
        while not self._closed.wait(self._lease / 3):
            try:
                self.ping()
                self.release_garbage()
            except LaminaError:
                return

    def ping(self):
        """The last applied sequence, from the daemon. Unavailable when the KeepAlive stream is gone."""
        with self._pings:
            self._outbox.put(pb.KeepAliveRequest())
            return self._answer()

    def _answer(self):
        applied = self._applied.get()
        if applied is None:
            self._applied.put(None)
            raise Unavailable("the session has ended: the daemon stopped or lost this client")
        return applied

    def close(self):
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._stubs.session.DeleteSession(pb.DeleteSessionRequest(session_id=self.id), timeout=5)
        except grpc.RpcError:
            pass  # the daemon is gone, and the session with it
        self._outbox.put(None)
        self._keeper.join(timeout=5)

    # --- mutations ---

    def mutate(self, call, request, timeout=None):
        """Runs a mutation exactly once: a repeat after a lost answer carries the same sequence. LaminaError."""
        with self._mutations:
            if self._uncertain:
                self._next_sequence = self.ping() + 1
                self._uncertain = False
            request.mutation.session_id = self.id
            request.mutation.sequence = self._next_sequence
            try:
                answer = call_with_retries(call, request, timeout)
            except LaminaError as error:
                self._uncertain = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED,
                                                 grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
                raise
            except BaseException:  # KeyboardInterrupt too
                self._uncertain = True
                raise
            self._next_sequence += 1
            return answer

    # --- contexts that nobody will use ---

    def discard(self, stack, context_id):
        """Releases a context soon; may be called from a finalizer."""
        self._garbage.append((stack, context_id))

    def release_garbage(self):
        while self._garbage:
            try:
                stack, context_id = self._garbage.popleft()
            except IndexError:
                return
            try:
                self._stubs.layer.ReleaseContext(
                    layer_pb.ReleaseContextRequest(stack=stack, session_id=self.id, context_id=context_id))
            except grpc.RpcError:
                pass  # spent, or gone with its stack

    # --- tensors ---

    def _create_region(self, size_bytes):
        with translated():
            return self._stubs.session.CreateRegion(region_request(self.id, size_bytes)).region.region_id

    def empty(self, shape, dtype):
        """An array that calls can read and write without a copy, or a plain one without regions."""
        if self.pool is None:
            return np.empty(shape, dtypes.numpy_type(dtype))
        return self.pool.empty(shape, dtype)

    def tensor(self, array, dtype):
        """(message, array to keep alive) for an array of the type's numpy dtype: in place where it lies in a region,
        copied into one or into the message else."""
        message = tensor_pb2.Tensor(dtype=dtypes.to_proto(dtype), shape=array.shape)
        if self.pool is None:
            message.inline_data = np.ascontiguousarray(array).tobytes()
            return message, array
        place = None
        if array.flags.c_contiguous and array.size:
            place = self.pool.find(array.__array_interface__["data"][0], array.nbytes)
        if place is None:
            copy = self.pool.empty(array.shape, dtype)
            copy[...] = array
            array = copy
            place = self.pool.find(array.__array_interface__["data"][0], array.nbytes)
        message.slice.region_id, message.slice.offset_bytes = place
        message.slice.size_bytes = array.nbytes
        return message, array

    def target(self, shape, dtype, out=None):
        """(message, array that will hold the result or None for inline)."""
        message = tensor_pb2.TensorTarget()
        if self.pool is None:
            message.inline.SetInParent()
            return message, None
        if out is None:
            out = self.pool.empty(shape, dtype)
        place = None
        if out.flags.c_contiguous:
            place = self.pool.find(out.__array_interface__["data"][0], out.nbytes)
        if place is None:
            raise ValueError("out: must be an array from Client.empty")
        message.slice.region_id, message.slice.offset_bytes = place
        message.slice.size_bytes = out.nbytes
        return message, out

    @staticmethod
    def result(message, array):
        """The array that a result landed in."""
        if array is not None:
            return array
        dtype = dtypes.numpy_type(dtypes.from_proto(message.dtype))
        return np.frombuffer(bytearray(message.inline_data), dtype).reshape(tuple(message.shape))
