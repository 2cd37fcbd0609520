"""A session with the daemon: its lease, its mutation sequence, its way of moving tensors."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import mmap
import threading
from typing import Any, Callable, Deque, Iterator, List, Optional, Sequence, Set, Tuple

import grpc
import numpy as np

from lamina import dtypes
from lamina.errors import (AlreadyExists, Cancelled, DeadlineExceeded, LaminaError, ResourceExhausted, Unavailable)
from lamina.lease import Lease, call_with_retries
from lamina.cuda import CudaError, shared_device
from lamina.device import DeviceArray, Given, StreamFences
from lamina.regions import DevicePool, RegionPool, map_region
from lamina.turns import Turn
from lamina.v1 import config_service_pb2 as config_pb
from lamina.v1 import layer_service_pb2 as layer_pb
from lamina.v1 import session_service_pb2 as pb
from lamina.v1 import tensor_pb2

_LONGEST_FAREWELL = 5.0  # seconds
_RESUME_GRACE = 10.0  # seconds, that a session over TCP asks for


def usual_grace(target: str) -> float:
    """How long, in seconds, a session is to outlive its connection to `target` by default: over TCP the network may have
    broken it; a Unix socket breaks with its process alone, whose memory should be free at once."""
    return 0.0 if on_this_host(target) else _RESUME_GRACE


def on_this_host(target: str) -> bool:
    """Whether it is a Unix socket."""
    return target.startswith(("unix:", "unix-abstract:"))


def _may_have_run(error: BaseException) -> bool:
    """Whether the daemon may have done the call that ended so; every other status says that nothing has changed."""
    return not isinstance(error, LaminaError) or isinstance(error, (Unavailable, DeadlineExceeded, Cancelled)) or (
        error.code == grpc.StatusCode.UNKNOWN)


@dataclasses.dataclass
class Lost:
    """A mutation whose answer never came. call: the RPC that sends it by itself; request: with its sequence; keep: its
    arrays, which the daemon may still be using."""

    call: Callable
    request: Any
    keep: Sequence[Any]


class Session:
    """Opened lazily by Client. Threads: any; mutations run one after another."""

    def __init__(self, stubs: Any, client_name: str, transport: Optional[str], timeout: Optional[float],
                 resume_grace: float) -> None:
        """resume_grace: seconds that the session is to outlive a broken connection; the daemon may grant less."""
        self._stubs = stubs
        self._timeout = timeout
        request = pb.CreateSessionRequest(client_name=client_name, resume_grace_seconds=resume_grace)
        opened = call_with_retries(stubs.session.CreateSession, request, timeout)
        self.id: str = opened.session_id
        self._turn = Turn()  # a mutation's, or a pipeline's that has some under way
        self._next_sequence = 1
        self._lost: List[Lost] = []  # mutations that may have taken _next_sequence or one above
        self._quarantine: List[Any] = []  # arrays that the daemon may be using until the session ends
        self._garbage: Deque[Tuple[str, str]] = collections.deque()  # (stack, context) that will get no Backward
        self._creating = threading.Lock()  # one region after another: what a lost answer left is found by elimination
        self._regions: Set[str] = set()  # ids of those that are ours and known to be there
        self._closed = threading.Event()
        self.pool: Optional[RegionPool] = None
        self.inline_cap = 0  # bytes; set where there is no pool
        self._broker_path: str = opened.broker_path
        self._wanted_transport = transport
        self._device_opening = threading.Lock()
        self._device_pool: Optional[DevicePool] = None
        self.no_device: Optional[str] = None  # why there are no device regions; None: there are, or nobody has asked
        # From here on the session lives by its stream.
        self.lease = Lease(stubs.session.KeepAlive, self.id, opened.lease_seconds, opened.resume_grace_seconds)
        try:
            threading.Thread(target=self._tick, name="lamina-tick", daemon=True).start()
            if transport != "inline":
                self.pool = self._open_pool(opened.broker_path, insist=transport in ("memfd", "device"))
            if self.pool is None:
                info = call_with_retries(stubs.config.GetServerInfo, config_pb.GetServerInfoRequest(), timeout, self.lease)
                self.inline_cap = info.inline_cap_bytes
            if transport == "device" and self.device_pool() is None:
                raise Unavailable(f"no device regions: {self.no_device}")
        except BaseException:
            self.abandon()
            raise

    def _open_pool(self, broker_path: str, insist: bool) -> Optional[RegionPool]:
        try:
            if not broker_path:
                raise Unavailable("the daemon offers no broker socket, so no regions")
            pool = RegionPool(self._create_region, self._release_region, broker_path, self.id)
            pool.empty(1, "fp32")  # whether the broker is here and lets us
            return pool
        except LaminaError:
            if insist:
                raise
            return None

    def device_pool(self) -> Optional[DevicePool]:
        """The pool of device memory, opened at first use; None where there is none, for the reason in `no_device`."""
        if self._device_pool is not None or self.no_device is not None:
            return self._device_pool
        with self._device_opening:
            if self._device_pool is None and self.no_device is None:
                try:
                    self._device_pool = self._open_device_pool()
                except (LaminaError, CudaError) as error:
                    self.no_device = str(error)
        return self._device_pool

    def _open_device_pool(self) -> DevicePool:
        if self._wanted_transport in ("memfd", "inline"):
            raise Unavailable(f"transport {self._wanted_transport!r} was asked for")
        if self.pool is None:
            raise Unavailable("this process shares no memory with the daemon")
        info = call_with_retries(self._stubs.config.GetServerInfo, config_pb.GetServerInfoRequest(), self._timeout,
                                 self.lease)
        if tensor_pb2.TRANSPORT_DEVICE not in info.transports:
            raise Unavailable("the daemon offers none" + (": it runs on the CPU" if info.backend == "cpu" else ""))
        device, why = shared_device(info.device_uuid)
        if device is None:
            raise Unavailable(why)
        page = self._create_region(mmap.PAGESIZE)
        try:
            fences = StreamFences(device, map_region(self._broker_path, self.id, page), page)
            pool = DevicePool(functools.partial(self._create_region, kind=pb.REGION_KIND_DEVICE), self._release_region,
                              self._broker_path, self.id, device, fences)
            pool.empty(1, "fp32")  # whether its memory can be mapped here
            return pool
        except BaseException:
            self._release_region(page)
            raise

    # --- lease ---

    def _tick(self) -> None:
        while not self._closed.wait(self.lease.beat):
            try:
                self.ping()
                self.release_garbage()
            except LaminaError:
                if self.over() is not None:
                    return  # the next call says what is wrong

    def over(self) -> Optional[str]:
        """Why the session has ended, in words; None while it lives or may be resumed."""
        return self.lease.over()

    def ping(self) -> int:
        """The last applied sequence, from the daemon. Unavailable when the session has ended."""
        return self.lease.ping()

    def close(self) -> None:
        """Ends the session in the daemon. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self.over() is None:
            self.lease.leave()
            # Where the connection is broken and the session waits for another, so does this, for a moment.
            for patient in (False, True) if self.lease.grace > 0 else (False,):
                try:
                    self._stubs.session.DeleteSession(pb.DeleteSessionRequest(session_id=self.id),
                                                      timeout=_LONGEST_FAREWELL, wait_for_ready=patient)
                    break
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        break  # the daemon is gone, and the session with it
        self.lease.hang_up()
        self.lease.wait_until_over(_LONGEST_FAREWELL)

    def abandon(self) -> None:
        """Ends the session without waiting: the keep-alive stream's end is the session's. For finalizers."""
        self._closed.set()
        self.lease.leave()
        self.lease.hang_up()

    # --- calls ---

    def read(self, call: Callable, request: Any, keep: Sequence[Any] = ()) -> Any:
        """Runs a call that changes nothing, again where it was not answered. keep: arrays that it names. LaminaError."""
        try:
            return call_with_retries(call, request, self._timeout, self.lease)
        except BaseException as error:
            if keep and _may_have_run(error) and self.over() is None:
                self.quarantine(keep)  # it may still be running
            raise

    def quarantine(self, arrays: Sequence[Any]) -> None:
        """Keeps arrays that the daemon may be using until the session ends."""
        self._quarantine.extend(arrays)

    def mutate(self, call: Callable, request: Any, keep: Sequence[Any] = ()) -> Any:
        """Runs a mutation exactly once: a repeat after a lost answer carries the same sequence. LaminaError.

        A mutation whose answer stays lost (timeout, KeyboardInterrupt) leaves open whether it ran. Its sequence is then
        the next mutation's: the daemon waits for a first user of it that still runs, says ALREADY_EXISTS if that one did
        run (the following sequence is right, then), and turns the first away if it comes later.
        """
        holder = object()
        try:
            self._turn.take(holder)
            request.mutation.session_id = self.id
            while True:
                request.mutation.sequence = self._next_sequence
                try:
                    answer = call_with_retries(call, request, self._timeout, self.lease)
                    self._next_sequence += 1
                    self._lost.clear()
                    return answer
                except AlreadyExists:
                    if all(one.request.mutation.sequence != self._next_sequence for one in self._lost):
                        raise
                    self._drop_lost(self._next_sequence)
                    continue
                except BaseException as error:  # KeyboardInterrupt too
                    if _may_have_run(error):
                        copy = type(request)()
                        copy.CopyFrom(request)
                        self._lost.append(Lost(call, copy, keep))
                    raise
        finally:
            self._turn.give_back(holder)

    def begin_run(self, holder: object) -> Optional[int]:
        """Takes the mutations' turn until end_run or drop_run, for mutations that go out without waiting for each other's
        answers; returns the first one's sequence. None, and no turn, while it is open whether that one was used: a call of
        `mutate` finds out. Waits while others have the turn."""
        self._turn.take(holder)
        if self._lost:
            self._turn.give_back(holder)
            return None
        return self._next_sequence

    def drop_run(self, holder: object) -> None:
        """Gives back the holder's turn, if it has it, of which nothing came. From any thread."""
        self._turn.give_back(holder)

    def end_run(self, holder: object, next_sequence: int, lost: Sequence[Lost] = ()) -> None:
        """Gives the turn back, from any thread. next_sequence: after the last one that the daemon answered to have run.
        lost: those sent after it that were not answered; asks the daemon which of them have run."""
        if not self._turn.is_of(holder):
            return
        try:
            self._next_sequence = next_sequence
            if lost and self.over() is None:
                self._lost.extend(lost)
                self._drop_lost(self.ping())
        except LaminaError:
            pass  # the next mutation finds out, or that the session has ended
        finally:
            self._turn.give_back(holder)

    def _drop_lost(self, applied: int) -> None:
        """The sequences up to `applied` are used. A lost Forward that used one has a context that nobody can reach: asks
        for its answer once more and releases it."""
        dropped = [one for one in self._lost if one.request.mutation.sequence <= applied]
        self._lost = [one for one in self._lost if one.request.mutation.sequence > applied]
        self._next_sequence = applied + 1
        for one in dropped:
            if not isinstance(one.request, layer_pb.ForwardRequest):
                continue
            try:
                answer = call_with_retries(one.call, one.request, self._timeout, self.lease)
            except LaminaError:
                continue  # it was another one
            self.discard(one.request.stack, answer.context_id)
        if dropped:
            self.release_garbage()  # now: whoever counts the contexts must not find one that nobody has

    # --- contexts that nobody will use ---

    def discard(self, stack: str, context_id: str) -> None:
        """Releases a context soon; may be called from a finalizer."""
        self._garbage.append((stack, context_id))

    def take_garbage(self) -> Iterator[layer_pb.ReleaseContextRequest]:
        """Requests to release what was discarded, each for the caller to send."""
        while True:
            try:
                stack, context_id = self._garbage.popleft()
            except IndexError:
                return
            yield layer_pb.ReleaseContextRequest(stack=stack, session_id=self.id, context_id=context_id)

    def release_garbage(self) -> bool:
        """Releases what was discarded; whether there was any."""
        any_released = False
        for request in self.take_garbage():
            try:
                call_with_retries(self._stubs.layer.ReleaseContext, request, self._timeout, self.lease)
                any_released = True
            except (Unavailable, DeadlineExceeded):
                self.discard(request.stack, request.context_id)  # it may be there still
                break
            except LaminaError:
                pass  # spent, or gone with its stack
        return any_released

    def mutate_with_room(self, call: Callable, request: Any, keep: Sequence[Any] = ()) -> Any:
        """mutate for a Forward: where contexts ran out, those held by unreachable Python objects alone are released."""
        try:
            return self.mutate(call, request, keep)
        except ResourceExhausted:
            gc.collect()
            if not self.release_garbage():
                raise
        return self.mutate(call, request, keep)

    # --- tensors ---

    def _create_region(self, size_bytes: int, kind: Any = pb.REGION_KIND_MEMFD) -> str:
        """The new region's id."""
        with self._creating:
            return self._create_region_alone(size_bytes, kind)

    def _create_region_alone(self, size_bytes: int, kind: Any) -> str:
        request = pb.CreateRegionRequest(session_id=self.id, kind=kind, size_bytes=size_bytes)
        repeated = False

        def create(request: Any, timeout: Optional[float]) -> Any:
            nonlocal repeated
            if repeated:
                self._release_unheard_of(timeout)
            repeated = True
            return self._stubs.session.CreateRegion(request, timeout=timeout)

        region_id: str = call_with_retries(create, request, self._timeout, self.lease).region.region_id
        self._regions.add(region_id)
        return region_id

    def _release_unheard_of(self, timeout: Optional[float]) -> None:
        """Gives up regions that were made but whose ids were lost on their way here. grpc.RpcError."""
        listed = self._stubs.session.ListRegions(pb.ListRegionsRequest(session_id=self.id), timeout=timeout).regions
        for region in listed:
            if region.region_id not in self._regions:
                self._stubs.session.ReleaseRegion(
                    pb.ReleaseRegionRequest(session_id=self.id, region_id=region.region_id), timeout=timeout)

    def _release_region(self, region_id: str) -> None:
        self._regions.discard(region_id)  # a repeat of CreateRegion may be what gives it up
        request = pb.ReleaseRegionRequest(session_id=self.id, region_id=region_id)
        try:
            call_with_retries(self._stubs.session.ReleaseRegion, request, self._timeout, self.lease)
        except LaminaError:
            pass  # gone already, if only with the session

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        """An array that calls can read and write without a copy, or a plain one without regions."""
        if self.pool is None:
            return np.empty(shape, dtypes.numpy_type(dtype))
        return self.pool.empty(shape, dtype)

    def empty_on_device(self, shape: Any, dtype: Any) -> DeviceArray:
        """A DeviceArray. Unavailable: no device regions."""
        return self._needed_device_pool().empty(shape, dtype)

    def trim(self) -> int:
        """See Client.trim."""
        return sum(pool.trim() for pool in (self.pool, self._device_pool) if pool is not None)

    def tensor(self, array: np.ndarray, dtype: Any, message: tensor_pb2.Tensor) -> np.ndarray:
        """Fills `message` for an array of the type's numpy dtype: in place where it lies in a region, copied into one or
        into the message else. Returns the array to keep alive during the call."""
        message.dtype = dtypes.to_proto(dtype)
        message.shape.extend(array.shape)
        if self.pool is None:
            message.inline_data = array.tobytes()
            return array
        place = self.pool.find(array)
        if place is None:
            if array.size == 0:
                message.inline_data = b""  # for the daemon to refuse
                return array
            copy = self.pool.empty(array.shape, dtype)
            copy[...] = array
            array, place = copy, self.pool.find(copy)
        assert place is not None
        message.slice.region_id, message.slice.offset_bytes = place
        message.slice.size_bytes = array.nbytes
        return array

    def device_tensor(self, given: Given, dtype: str, message: tensor_pb2.Tensor) -> Any:
        """`tensor` for a tensor in device memory, which is not converted (TypeError). Unavailable: no device regions."""
        if given.dtype != dtype:
            raise TypeError(f"a device tensor of {given.dtype} can't stand for {dtype}: convert it")
        pool = self._needed_device_pool()
        message.dtype = dtypes.to_proto(dtype)
        message.shape.extend(given.shape)
        if given.nbytes == 0:
            message.inline_data = b""  # for the daemon to refuse
            return given
        resident = pool.resident(given)
        self._device_slice(pool, resident, message.slice)
        return resident

    def device_target(self, shape: Tuple[int, ...], dtype: str, out: Any, message: tensor_pb2.TensorTarget) -> DeviceArray:
        """`target` in device memory. out: a DeviceArray or a tensor over one, or None."""
        pool = self._needed_device_pool()
        if out is None:
            out = pool.empty(shape, dtype)
        elif tuple(out.shape) != tuple(shape) or dtypes.canonical(out.dtype) != dtype:
            raise ValueError(f"out: is {dtypes.canonical(out.dtype)} {tuple(out.shape)}, the result {dtype} {tuple(shape)}")
        self._device_slice(pool, out, message.slice)
        return out

    def _needed_device_pool(self) -> DevicePool:
        pool = self.device_pool()
        if pool is None:
            raise Unavailable(f"no device regions: {self.no_device}")
        return pool

    @staticmethod
    def _device_slice(pool: DevicePool, array: Any, message: tensor_pb2.Slice) -> None:
        place = pool.place_of(array.address, array.nbytes)
        if place is None:
            raise ValueError("out: must lie in memory from Client.empty(..., device=True)")
        message.region_id, message.offset_bytes = place
        message.size_bytes = array.nbytes

    def mark_ready(self, stream: int, fence: tensor_pb2.Fence) -> None:
        """Fills `fence` so that a call waits until the caller's stream has come to here."""
        self._needed_device_pool().fences.mark(stream, fence)

    def target(self, shape: Tuple[int, ...], dtype: Any, out: Optional[np.ndarray],
               message: tensor_pb2.TensorTarget) -> Optional[np.ndarray]:
        """Fills `message` for a result; returns the array that it will land in, or None for inline."""
        if out is not None and (out.shape != tuple(shape) or out.dtype != dtypes.numpy_type(dtype)):
            raise ValueError(f"out: is {out.dtype} {out.shape}, the result {dtypes.numpy_type(dtype)} {tuple(shape)}")
        if self.pool is None or 0 in shape:
            message.inline.SetInParent()
            return None
        if out is None:
            out = self.pool.empty(shape, dtype)
        place = self.pool.find(out)
        if place is None:
            raise ValueError("out: must be a contiguous array from Client.empty")
        message.slice.region_id, message.slice.offset_bytes = place
        message.slice.size_bytes = out.nbytes
        return out

    @staticmethod
    def result(message: tensor_pb2.Tensor, array: Optional[np.ndarray], out: Optional[np.ndarray] = None) -> np.ndarray:
        """The array that a result landed in. out: where the caller wants an inline one."""
        if array is not None:
            return array
        dtype = dtypes.numpy_type(dtypes.from_proto(message.dtype))
        received = np.frombuffer(message.inline_data, dtype).reshape(tuple(message.shape))
        if out is None:
            return received.copy()
        out[...] = received
        return out
