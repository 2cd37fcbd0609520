"""Memory shared with the daemon: regions mapped through the broker socket, and pools of buffers in them."""

from __future__ import annotations

import bisect
import collections.abc
import contextlib
import ctypes
import gc
import math
import mmap
import operator
import os
import socket
import struct
import threading
import weakref
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from lamina import dtypes
from lamina.cuda import CudaError, Device
from lamina.device import DeviceArray, DeviceMapping, Given, StreamFences
from lamina.errors import ResourceExhausted, Unavailable

_SMALLEST_REGION = 4 << 20
_ALIGNMENT = 64
# Kernels take device memory in place where it is aligned so; else the daemon copies it, on the device.
_DEVICE_ALIGNMENT = 256
_DEVICE_PAGE = 2 << 20


@contextlib.contextmanager
def _descriptor(broker_path: str, session_id: str, region_id: str) -> Iterator[Tuple[int, int]]:
    """(descriptor, length) of a region, closed afterwards. Unavailable where the broker can't be reached or is another
    daemon's; docs/broker.md."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.settimeout(10)
            s.connect(broker_path)
            s.sendall(b"LMN1" + session_id.encode() + region_id.encode())
            answer, descriptors, _, _ = socket.recv_fds(s, 12, 1)
    except OSError as error:
        raise Unavailable(f"broker socket {broker_path}: {error.strerror or error}") from None
    try:
        if len(answer) != 12:
            raise Unavailable(f"broker socket {broker_path}: refused this user")
        status, length = struct.unpack("<IQ", answer)
        if status != 0 or len(descriptors) != 1:
            # A daemon on another host whose broker has the same path as the one here.
            raise Unavailable(f"broker socket {broker_path}: does not know the region (status {status})")
        yield descriptors[0], length
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def map_region(broker_path: str, session_id: str, region_id: str) -> mmap.mmap:
    """A memfd region's memory, shared. Unavailable: see docs/broker.md."""
    with _descriptor(broker_path, session_id, region_id) as (descriptor, length):
        return mmap.mmap(descriptor, length)


class _HostMapping:
    """A memfd region, mapped here."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.length = len(memory)

    def buffer(self, offset: int, size: int) -> Any:
        return (ctypes.c_char * size).from_buffer(self._memory, offset)

    def close(self) -> None:
        pass  # with the last buffer


class _Region:
    def __init__(self, region_id: str, memory: Any) -> None:
        self.id = region_id
        self.memory = memory
        self.base: int = memory.base
        self.end: int = memory.base + memory.length
        self.live = 0  # buffers handed out


def _size_class(size: int, alignment: int = _ALIGNMENT) -> int:
    """`size` rounded up so that at most an eighth is wasted and few sizes occur."""
    if size <= 8 * alignment:
        step = alignment
    else:
        step = 1 << ((size - 1).bit_length() - 4)
    return -(-size // step) * step


def _extents(shape: Union[int, Sequence[int]]) -> Tuple[int, ...]:
    extents = tuple(map(operator.index, shape if isinstance(shape, collections.abc.Sequence) else (shape,)))
    if any(n < 0 for n in extents):
        raise ValueError(f"shape: {extents} has a negative extent")
    return extents


class _Pool:
    """Buffers in regions. A buffer goes back when the last object over it is gone.

    Threads: any. Finalizers run wherever the garbage collector does, also inside a locked part, so they only append
    to `_returned`.
    """

    def __init__(self, create_region: Callable[[int], str], release_region: Callable[[str], None],
                 map_memory: Callable[[str], Any], alignment: int, smallest: int) -> None:
        """create_region(size_bytes) makes one through the daemon and returns its id; release_region(id) gives it up;
        map_memory(id): its mapping. smallest: bytes of a region."""
        self._create_region = create_region
        self._release_region = release_region
        self._map_memory = map_memory
        self._alignment = alignment
        self._smallest = smallest
        self._growing = threading.Lock()  # before _lock; held while the daemon makes a region
        self._lock = threading.Lock()
        self._regions: List[_Region] = []  # by base address
        self._bases: List[int] = []
        self._free: Dict[int, List[Tuple[_Region, int]]] = {}  # size class -> (region, offset)
        self._returned: Deque[Tuple[int, _Region, int]] = collections.deque()

    def _buffer(self, size: int) -> Tuple[Any, int]:
        """(owner, address) of `size` > 0 bytes, which are handed out until the owner is gone. ResourceExhausted: the
        session's cap."""
        rounded = _size_class(size, self._alignment)
        region, offset = self._take(rounded)
        owner = region.memory.buffer(offset, size)
        weakref.finalize(owner, self._returned.append, (rounded, region, offset)).atexit = False
        return owner, region.base + offset

    def place_of(self, address: int, size: int) -> Optional[Tuple[str, int]]:
        """(region id, offset) of memory that lies inside a region, else None."""
        with self._lock:
            i = bisect.bisect_right(self._bases, address) - 1
            if i < 0 or address + size > self._regions[i].end:
                return None
            return self._regions[i].id, address - self._regions[i].base

    def trim(self) -> int:
        """Gives regions without a live array back to the daemon; returns their bytes."""
        with self._lock:
            self._collect()
            idle = [r for r in self._regions if r.live == 0]
            self._regions = [r for r in self._regions if r.live != 0]
            self._bases = [r.base for r in self._regions]
            self._free = {size: [slot for slot in slots if slot[0].live != 0] for size, slots in self._free.items()}
        for region in idle:
            region.memory.close()
            self._release_region(region.id)
        return sum(r.end - r.base for r in idle)

    def _take(self, rounded: int) -> Tuple[_Region, int]:
        slot = self._pop(rounded)
        if slot is not None:
            return slot
        with self._growing:
            slot = self._pop(rounded)  # another thread may have grown it meanwhile
            if slot is not None:
                return slot
            length = max(rounded, self._smallest)
            try:
                region_id = self._create_region(length)
            except ResourceExhausted:
                gc.collect()
                if self.trim() == 0:
                    raise
                region_id = self._create_region(length)
            try:
                region = _Region(region_id, self._map_memory(region_id))
            except BaseException:
                self._release_region(region_id)
                raise
            region.live = 1
            with self._lock:
                at = bisect.bisect(self._bases, region.base)
                self._bases.insert(at, region.base)
                self._regions.insert(at, region)
                slots = self._free.setdefault(rounded, [])
                slots.extend((region, offset) for offset in range(rounded, length - rounded + 1, rounded))
            return region, 0

    def _pop(self, rounded: int) -> Optional[Tuple[_Region, int]]:
        with self._lock:
            self._collect()
            slots = self._free.get(rounded)
            if not slots:
                return None
            region, offset = slots.pop()
            region.live += 1
            return region, offset

    def _collect(self) -> None:
        while self._returned:
            rounded, region, offset = self._returned.popleft()
            region.live -= 1
            self._free.setdefault(rounded, []).append((region, offset))


class RegionPool(_Pool):
    """Buffers in memfd regions, handed out as numpy arrays. Threads: any."""

    def __init__(self, create_region: Callable[[int], str], release_region: Callable[[str], None], broker_path: str,
                 session_id: str) -> None:
        def map_memory(region_id: str) -> _HostMapping:
            return _HostMapping(map_region(broker_path, session_id, region_id))

        super().__init__(create_region, release_region, map_memory, _ALIGNMENT, _SMALLEST_REGION)

    def empty(self, shape: Union[int, Sequence[int]], dtype: Any) -> np.ndarray:
        """An uninitialised array in shared memory, 64-byte aligned. ResourceExhausted: the session's cap."""
        numpy_type = dtypes.numpy_type(dtype)
        extents = _extents(shape)
        count = math.prod(extents)
        if count == 0:
            return np.empty(extents, numpy_type)
        # numpy keeps the owner as the array's base: its end is the end of every view of the buffer.
        owner, _ = self._buffer(count * numpy_type.itemsize)
        return np.frombuffer(owner, numpy_type, count).reshape(extents)

    def find(self, array: np.ndarray) -> Optional[Tuple[str, int]]:
        """(region id, offset) of a contiguous array that lies inside a region, else None."""
        if not array.flags.c_contiguous or array.size == 0:
            return None
        return self.place_of(array.__array_interface__["data"][0], array.nbytes)


class DevicePool(_Pool):
    """Buffers in regions of device memory, handed out as DeviceArrays, and the fences of the streams that use them.
    Threads: any."""

    def __init__(self, create_region: Callable[[int], str], release_region: Callable[[str], None], broker_path: str,
                 session_id: str, device: Device, fences: StreamFences) -> None:
        def map_memory(region_id: str) -> DeviceMapping:
            with _descriptor(broker_path, session_id, region_id) as (descriptor, length):
                try:
                    return DeviceMapping(device, descriptor, length)
                except CudaError as error:
                    raise Unavailable(f"the daemon's device memory can't be mapped here: {error}") from None

        super().__init__(create_region, release_region, map_memory, _DEVICE_ALIGNMENT, _DEVICE_PAGE)
        self.device = device
        self.fences = fences

    def empty(self, shape: Union[int, Sequence[int]], dtype: Any) -> DeviceArray:
        """An uninitialised array, 256-byte aligned. ResourceExhausted: the session's cap. ValueError: no elements."""
        name = dtypes.canonical(dtype)
        extents = _extents(shape)
        size = math.prod(extents) * dtypes.numpy_type(name).itemsize
        if size == 0:
            raise ValueError(f"shape: {extents} has no elements")
        owner, address = self._buffer(size)
        return DeviceArray(owner, address, extents, name, self.device)

    def resident(self, given: Given) -> Any:
        """What holds the tensor's memory, in a region: the caller's own, or a copy, made on the device in the order of the
        tensor's stream."""
        if given.device not in (None, self.device.ordinal):
            raise ValueError(f"a tensor on cuda:{given.device}: the daemon's device is cuda:{self.device.ordinal} here")
        if self.place_of(given.address, given.nbytes) is not None:
            return given
        copy = self.empty(given.shape, given.dtype)
        self.device.copy(copy.address, given.address, given.nbytes, given.stream)
        return copy
