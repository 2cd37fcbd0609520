"""Memory shared with the daemon: regions mapped through the broker socket, and a pool of buffers in them."""

import bisect
import ctypes
import mmap
import os
import socket
import struct
import threading
import weakref

import numpy as np

from lamina import dtypes
from lamina.errors import Internal, Unavailable
from lamina.v1 import session_service_pb2 as pb

_SMALLEST_REGION = 4 << 20
_ALIGNMENT = 64


def map_region(broker_path, session_id, region_id):
    """The region's memory as a shared mmap. Unavailable where the broker can't be reached; docs/broker.md."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.settimeout(10)
            s.connect(broker_path)
            s.sendall(b"LMN1" + session_id.encode() + region_id.encode())
            answer, descriptors, _, _ = socket.recv_fds(s, 12, 1)
    except OSError as error:
        raise Unavailable(f"broker socket {broker_path}: {error.strerror or error}") from None
    if len(answer) != 12:
        raise Unavailable(f"broker socket {broker_path}: refused this user")
    status, length = struct.unpack("<IQ", answer)
    if status != 0 or len(descriptors) != 1:
        raise Internal(f"the broker did not hand out a region that was just made (status {status})")
    try:
        return mmap.mmap(descriptors[0], length)
    finally:
        os.close(descriptors[0])


class _Region:
    def __init__(self, region_id, memory):
        self.id = region_id
        self.memory = memory
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.end = self.base + len(memory)


class RegionPool:
    """Buffers in regions, handed out as numpy arrays. A buffer goes back when the last array over it is gone.

    Threads: any.
    """

    def __init__(self, create_region, broker_path, session_id):
        """create_region(size_bytes) makes one through the daemon and returns its id."""
        self._create_region = create_region
        self._broker_path = broker_path
        self._session_id = session_id
        self._lock = threading.RLock()  # a finalizer may run inside a locked part
        self._regions = []  # by base address
        self._bases = []
        self._free = {}  # rounded size -> [(region, offset)]

    def empty(self, shape, dtype):
        """An uninitialised array in shared memory, 64-byte aligned."""
        numpy_type = dtypes.numpy_type(dtype)
        shape = tuple(int(n) for n in np.atleast_1d(shape)) if np.ndim(shape) == 0 else tuple(shape)
        count = int(np.prod(shape, dtype=np.int64))
        size = max(count * numpy_type.itemsize, 1)
        rounded = max(1 << (size - 1).bit_length(), _ALIGNMENT)
        region, offset = self._take(rounded)
        # numpy keeps this object as the array's base: its end is the end of every view of the buffer.
        owner = (ctypes.c_char * size).from_buffer(region.memory, offset)
        weakref.finalize(owner, self._give_back, rounded, region, offset).atexit = False
        return np.frombuffer(owner, numpy_type, count).reshape(shape)

    def find(self, address, size):
        """(region id, offset) of memory that lies inside a region, else None."""
        with self._lock:
            i = bisect.bisect_right(self._bases, address) - 1
            if i < 0 or address + size > self._regions[i].end:
                return None
            return self._regions[i].id, address - self._regions[i].base

    def _take(self, rounded):
        with self._lock:
            free = self._free.setdefault(rounded, [])
            if not free:
                length = max(rounded, _SMALLEST_REGION)
                region_id = self._create_region(length)
                region = _Region(region_id, map_region(self._broker_path, self._session_id, region_id))
                at = bisect.bisect(self._bases, region.base)
                self._bases.insert(at, region.base)
                self._regions.insert(at, region)
                free.extend((region, offset) for offset in range(0, length - rounded + 1, rounded))
            return free.pop()

    def _give_back(self, rounded, region, offset):
        with self._lock:
            self._free[rounded].append((region, offset))


def region_request(session_id, size_bytes):
    return pb.CreateRegionRequest(session_id=session_id, kind=pb.REGION_KIND_MEMFD, size_bytes=size_bytes)
