"""Memory shared with the daemon: regions mapped through the broker socket, and a pool of buffers in them."""

from __future__ import annotations

import bisect
import collections.abc
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
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from lamina import dtypes
from lamina.errors import ResourceExhausted, Unavailable

_SMALLEST_REGION = 4 << 20
_ALIGNMENT = 64


def map_region(broker_path: str, session_id: str, region_id: str) -> mmap.mmap:
    """The region's memory, shared. Unavailable where the broker can't be reached or is another daemon's; docs/broker.md."""
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
        return mmap.mmap(descriptors[0], length)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class _Region:
    def __init__(self, region_id: str, memory: mmap.mmap) -> None:
        self.id = region_id
        self.memory = memory
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.end = self.base + len(memory)
        self.live = 0  # buffers handed out


def _size_class(size: int) -> int:
    """`size` rounded up so that at most an eighth is wasted and few sizes occur."""
    if size <= 8 * _ALIGNMENT:
        step = _ALIGNMENT
    else:
        step = 1 << ((size - 1).bit_length() - 4)
    return -(-size // step) * step


class RegionPool:
    """Buffers in regions, handed out as numpy arrays. A buffer goes back when the last array over it is gone.

    Threads: any. Finalizers run wherever the garbage collector does, also inside a locked part, so they only append
    to `_returned`.
    """

    def __init__(self, create_region: Callable[[int], str], release_region: Callable[[str], None], broker_path: str,
                 session_id: str) -> None:
        """create_region(size_bytes) makes one through the daemon and returns its id; release_region(id) gives it up."""
        self._create_region = create_region
        self._release_region = release_region
        self._broker_path = broker_path
        self._session_id = session_id
        self._growing = threading.Lock()  # before _lock; held while the daemon makes a region
        self._lock = threading.Lock()
        self._regions: List[_Region] = []  # by base address
        self._bases: List[int] = []
        self._free: Dict[int, List[Tuple[_Region, int]]] = {}  # size class -> (region, offset)
        self._returned: Deque[Tuple[int, _Region, int]] = collections.deque()

    def empty(self, shape: Union[int, Sequence[int]], dtype: Any) -> np.ndarray:
        """An uninitialised array in shared memory, 64-byte aligned. ResourceExhausted: the session's cap."""
        numpy_type = dtypes.numpy_type(dtype)
        extents = tuple(map(operator.index, shape if isinstance(shape, collections.abc.Sequence) else (shape,)))
        if any(n < 0 for n in extents):
            raise ValueError(f"shape: {extents} has a negative extent")
        count = math.prod(extents)
        if count == 0:
            return np.empty(extents, numpy_type)
        size = count * numpy_type.itemsize
        rounded = _size_class(size)
        region, offset = self._take(rounded)
        # numpy keeps this object as the array's base: its end is the end of every view of the buffer.
        owner = (ctypes.c_char * size).from_buffer(region.memory, offset)
        weakref.finalize(owner, self._returned.append, (rounded, region, offset)).atexit = False
        return np.frombuffer(owner, numpy_type, count).reshape(extents)

    def find(self, array: np.ndarray) -> Optional[Tuple[str, int]]:
        """(region id, offset) of a contiguous array that lies inside a region, else None."""
        if not array.flags.c_contiguous or array.size == 0:
            return None
        address = array.__array_interface__["data"][0]
        with self._lock:
            i = bisect.bisect_right(self._bases, address) - 1
            if i < 0 or address + array.nbytes > self._regions[i].end:
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
            length = max(rounded, _SMALLEST_REGION)
            try:
                region_id = self._create_region(length)
            except ResourceExhausted:
                gc.collect()
                if self.trim() == 0:
                    raise
                region_id = self._create_region(length)
            try:
                region = _Region(region_id, map_region(self._broker_path, self._session_id, region_id))
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
