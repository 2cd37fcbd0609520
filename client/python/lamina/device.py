"""Arrays in device memory that the daemon maps too, and how its stream and a caller's are kept in order.

A DeviceArray comes from Client.empty(..., device=True) and from calls that were given device tensors. It speaks DLPack and
__cuda_array_interface__: torch.from_dlpack(array), cupy.asarray(array), without a copy.

Order. When a call is back, the daemon's stream has done its work: results are there for every stream. What a call reads
and overwrites must be ready when the daemon begins: the caller's stream (PyTorch's current one; else what `stream` says)
stores a number in host memory that the daemon maps, behind all that was enqueued on it, and the call names that number
for the daemon to wait for. Nobody waits for the whole device, nor this process for its stream. Work on *other* streams
that writes a call's input, or still reads memory that a result may take, the caller orders before the call's stream, as
for any kernel.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from lamina import dtypes
from lamina.cuda import LEGACY_STREAM, Device

if TYPE_CHECKING:
    from lamina.v1 import tensor_pb2

_CPU, _CUDA = 1, 2  # DLPack's device types
_DLPACK_CODES = {"fp32": 2, "fp16": 2, "bf16": 4, "int32": 0}
_TYPESTR = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2", "int32": "<i4"}


class DeviceArray:
    """A dense row-major array in device memory that the daemon maps too.

    shape; dtype: "fp32", "bf16", "fp16" or "int32"; address: in this process; device: its ordinal here; nbytes. Its memory
    is used again when no array, tensor or capsule over it is left.
    """

    def __init__(self, owner: Any, address: int, shape: Sequence[int], dtype: str, device: Device) -> None:
        self.address = address
        self.shape = tuple(shape)
        self.dtype = dtype
        self._owner = owner
        self._device = device

    @property
    def device(self) -> int:
        return self._device.ordinal

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * dtypes.numpy_type(self.dtype).itemsize

    def __repr__(self) -> str:
        return f"<lamina.DeviceArray of {self.dtype} {list(self.shape)} on cuda:{self.device}>"

    @property
    def __cuda_array_interface__(self) -> Dict[str, Any]:
        """Version 3. bf16 reads as uint16 bits, which numpy has no other name for. No stream: see the module."""
        return {"version": 3, "shape": self.shape, "typestr": _TYPESTR[self.dtype], "data": (self.address, False),
                "strides": None, "stream": None}

    def __dlpack_device__(self) -> Tuple[int, int]:
        return _CUDA, self.device

    def __dlpack__(self, stream: Optional[int] = None, max_version: Any = None, dl_device: Any = None,
                   copy: Optional[bool] = None) -> Any:
        """A capsule. stream: of whoever takes it; there is nothing to wait for (see the module)."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("a DeviceArray is handed out as it is: no copy, no other device")
        return dlpack_capsule(self, self.address, self.shape, self.dtype, (_CUDA, self.device))

    def part(self, begin: int, shape: Sequence[int]) -> DeviceArray:
        """An array of that shape over the elements from `begin` on. ValueError: beyond the end."""
        if begin < 0 or begin + math.prod(shape) > self.size:
            raise ValueError(f"part: elements {begin} to {begin + math.prod(shape)} of {self.size}")
        itemsize = dtypes.numpy_type(self.dtype).itemsize
        return DeviceArray(self._owner, self.address + begin * itemsize, shape, self.dtype, self._device)

    def fill_from(self, values: Any, stream: int = LEGACY_STREAM) -> DeviceArray:
        """Copies an array of this shape in, from the host; float32 is rounded to bf16 or fp16. Done when this returns."""
        array = np.ascontiguousarray(dtypes.as_stack_type(values, self.dtype) if self.dtype != "int32"
                                     else np.asarray(values, np.int32))
        if array.shape != self.shape:
            raise ValueError(f"values: shape {list(array.shape)} must be {list(self.shape)}")
        self._device.copy_in(self.address, array.__array_interface__["data"][0], self.nbytes, stream)
        return self

    def numpy(self, stream: int = LEGACY_STREAM) -> np.ndarray:
        """A copy on the host; bf16 as uint16 bits."""
        array = np.empty(self.shape, dtypes.numpy_type(self.dtype))
        if array.size:
            self._device.copy_out(array.__array_interface__["data"][0], self.address, self.nbytes, stream)
        return array


# --- DLPack ---


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_id", ctypes.c_int),
                ("ndim", ctypes.c_int), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [("tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter)]
_CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_python = ctypes.pythonapi
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _CapsuleDestructor]
_python.PyCapsule_IsValid.restype = ctypes.c_int
_python.PyCapsule_IsValid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]

# What capsules stand for, by the address of their structure: held until its deleter was called.
_exported: Dict[int, Tuple[Any, ...]] = {}


@_Deleter
def _delete(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


@_CapsuleDestructor
def _drop_capsule(capsule: int) -> None:
    # One that was taken is called "used_dltensor", and its taker calls the deleter.
    if _python.PyCapsule_IsValid(capsule, b"dltensor"):
        _exported.pop(_python.PyCapsule_GetPointer(capsule, b"dltensor"), None)


def dlpack_capsule(owner: Any, address: int, shape: Sequence[int], dtype: str, device: Tuple[int, int]) -> Any:
    """A DLPack capsule over memory that `owner` keeps. device: DLPack's (type, ordinal)."""
    managed = _DLManagedTensor()
    extents = (ctypes.c_int64 * len(shape))(*shape)
    tensor = managed.tensor
    tensor.data, tensor.device_type, tensor.device_id, tensor.ndim = address, *device, len(shape)
    tensor.code, tensor.bits, tensor.lanes = _DLPACK_CODES[dtype], dtypes.numpy_type(dtype).itemsize * 8, 1
    tensor.shape = ctypes.cast(extents, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _delete
    where = ctypes.addressof(managed)
    _exported[where] = (managed, extents, owner)
    return _python.PyCapsule_New(where, b"dltensor", _drop_capsule)


# --- what callers pass ---


class Given:
    """A caller's tensor in device memory. address, shape, dtype (by our names), device (ordinal; None: not known); stream:
    whose order it is in; like(result): a DeviceArray as the caller's kind of tensor."""

    def __init__(self, value: Any, address: int, shape: Sequence[int], dtype: str, device: Optional[int], stream: int,
                 like: Callable[[DeviceArray], Any]) -> None:
        self.value = value  # keeps the memory
        self.address, self.shape, self.dtype, self.device = address, tuple(shape), dtype, device
        self.stream, self.like = stream, like

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtypes.numpy_type(self.dtype).itemsize


def given(name: str, value: Any, stream: Optional[int]) -> Optional[Given]:
    """`value` as device memory; None where it is not in any. TypeError, ValueError: a type or layout that calls don't
    take."""
    if isinstance(value, np.ndarray):
        return None
    if isinstance(value, DeviceArray):
        return Given(value, value.address, value.shape, value.dtype, value.device,
                     LEGACY_STREAM if stream is None else stream, lambda result: result)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if not value.is_cuda:
            return None
        if not value.is_contiguous():
            raise ValueError(f"{name}: is not contiguous")
        if stream is None:
            stream = torch.cuda.current_stream(value.device).cuda_stream
        return Given(value, value.data_ptr(), value.shape, dtypes.canonical(value.dtype), value.device.index, stream,
                     torch.from_dlpack)
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    if interface.get("strides") is not None:
        raise ValueError(f"{name}: is not contiguous")
    if stream is None:
        stream = interface.get("stream") or LEGACY_STREAM
    names = {text: ours for ours, text in _TYPESTR.items()}
    if interface["typestr"] not in names:
        raise TypeError(f"{name}: elements of type {interface['typestr']} can't be passed")
    return Given(value, interface["data"][0], interface["shape"], names[interface["typestr"]], None, stream,
                 lambda result: result)


# --- memory ---


class DeviceMapping:
    """A region of device memory, mapped here. base, length; buffer(offset, size): something that keeps it mapped."""

    class Buffer:
        """A part that is handed out."""

        def __init__(self, mapping: DeviceMapping) -> None:
            self._mapping = mapping

    def __init__(self, device: Device, descriptor: int, length: int) -> None:
        self.base = device.map(descriptor, length)
        self.length = length
        self._unmap = weakref.finalize(self, device.unmap, self.base, length)
        self._unmap.atexit = False

    def buffer(self, offset: int, size: int) -> DeviceMapping.Buffer:
        return DeviceMapping.Buffer(self)

    def close(self) -> None:
        """When no buffer of it is left; else it closes with the last."""
        self._unmap()


# --- order ---


class StreamFences:
    """Numbers in a page of memory that the daemon maps too, one for each of the caller's streams. Threads: any."""

    def __init__(self, device: Device, memory: mmap.mmap, region_id: str) -> None:
        self._device = device
        self._memory = memory  # kept mapped
        self._region_id = region_id
        self._numbers = (ctypes.c_uint64 * (len(memory) // 8)).from_buffer(memory)
        host = ctypes.addressof(self._numbers)
        self._seen = device.register(host, len(memory))
        weakref.finalize(self, device.unregister, host).atexit = False
        self._lock = threading.Lock()
        # The first half of the page is for what streams of ours store, the second for what the daemon's does.
        half = len(self._numbers) // 2
        self._slots: Dict[int, int] = {}  # stream -> index; guarded by _lock, as what follows
        self._values = [0] * len(self._numbers)  # by index: the last that was asked for
        self._first_done = half
        self._free = list(range(half, len(self._numbers)))

    def mark(self, stream: int, fence: tensor_pb2.Fence) -> None:
        """Has the stream say when it has come here, and fills `fence` so that a call waits for it; leaves it alone where
        the stream has done all its work."""
        # The legacy stream waits for others, whose work a look at it alone does not show.
        if stream not in (0, LEGACY_STREAM) and self._device.idle(stream):
            return
        with self._lock:
            index = self._slots.setdefault(stream, len(self._slots))
            if index < self._first_done:
                self._device.write_value(stream, self._seen + 8 * index, self._fill(fence, index))
                return
            del self._slots[stream]
        self._device.synchronize(stream)  # more streams than there are numbers

    def _fill(self, fence: tensor_pb2.Fence, index: int) -> int:
        """Needs _lock."""
        self._values[index] += 1
        fence.slice.region_id, fence.slice.offset_bytes, fence.slice.size_bytes = self._region_id, 8 * index, 8
        fence.value = self._values[index]
        return self._values[index]

    def done(self, fence: tensor_pb2.Fence) -> Optional[Done]:
        """A number for the daemon to store when a call has run, in `fence`; None where all are in use."""
        with self._lock:
            if not self._free:
                return None
            index = self._free.pop()
            return Done(self, index, self._fill(fence, index))

    def _wait(self, stream: int, index: int, value: int) -> None:
        self._device.wait_value(stream, self._seen + 8 * index, value)

    def _give_back(self, index: int, value: int) -> None:
        # The daemon, which had it for one call, stores nothing in it any more: whoever waits is let go.
        if self._numbers[index] < value:
            self._numbers[index] = value
        with self._lock:
            self._free.append(index)


class Done:
    """The number that one call leaves behind. Threads: any."""

    def __init__(self, fences: StreamFences, index: int, value: int) -> None:
        self._fences, self._index, self._value = fences, index, value

    def wait_on(self, stream: int) -> None:
        """Has a stream of ours wait for it."""
        self._fences._wait(stream, self._index, self._value)

    def over(self) -> None:
        """When the call was answered, or never will be: streams that wait go on. Once."""
        self._fences._give_back(self._index, self._value)
