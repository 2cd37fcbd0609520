"""The little of the CUDA driver that device regions need, by ctypes: mapping memory of another process, numbers that
streams write and await, copies. No CUDA package is needed; libcuda comes with the driver."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import uuid
from typing import Any, Dict, Iterator, List, Optional, Tuple

_NOT_READY = 600
_POSIX_DESCRIPTOR = 1
_LOCATION_DEVICE = 1
_READ_WRITE = 3
_REGISTER_PORTABLE_AND_MAPPED = 3
_AT_LEAST = 0  # cuStreamWaitValue64's comparison
_LAZY_PEER_ACCESS = 1
# The first stream of every context, which waits for all others that want to be waited for.
LEGACY_STREAM = 1


class CudaError(RuntimeError):
    """What the driver says no to. code: its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 16)]


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * 64)]


class _AccessDesc(ctypes.Structure):
    _fields_ = [("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int)]


_P, _I, _U, _U64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_size_t
_TO = ctypes.POINTER
_SIGNATURES: Dict[str, List[Any]] = {
    "cuInit": [_U], "cuDeviceGetCount": [_TO(_I)], "cuDeviceGet": [_TO(_I), _I],
    "cuDeviceGetUuid_v2": [_TO(_Uuid), _I], "cuGetErrorName": [_I, _TO(ctypes.c_char_p)],
    "cuDevicePrimaryCtxRetain": [_TO(_P), _I], "cuCtxPushCurrent_v2": [_P], "cuCtxPopCurrent_v2": [_TO(_P)],
    "cuCtxSynchronize": [],
    "cuMemImportFromShareableHandle": [_TO(_U64), _P, _I],
    "cuMemAddressReserve": [_TO(_U64), _SIZE, _SIZE, _U64, _U64], "cuMemAddressFree": [_U64, _SIZE],
    "cuMemMap": [_U64, _SIZE, _SIZE, _U64, _U64], "cuMemUnmap": [_U64, _SIZE],
    "cuMemSetAccess": [_U64, _SIZE, _TO(_AccessDesc), _SIZE], "cuMemRelease": [_U64],
    "cuIpcOpenMemHandle_v2": [_TO(_U64), _IpcHandle, _U], "cuIpcCloseMemHandle": [_U64],
    "cuMemHostRegister_v2": [_P, _SIZE, _U], "cuMemHostGetDevicePointer_v2": [_TO(_U64), _P, _U],
    "cuMemHostUnregister": [_P],
    "cuStreamQuery": [_P], "cuStreamSynchronize": [_P],
    "cuStreamWriteValue64_v2": [_P, _U64, _U64, _U], "cuStreamWaitValue64_v2": [_P, _U64, _U64, _U],
    "cuMemcpyDtoDAsync_v2": [_U64, _U64, _SIZE, _P], "cuMemcpyHtoDAsync_v2": [_U64, _P, _SIZE, _P],
    "cuMemcpyDtoHAsync_v2": [_P, _U64, _SIZE, _P],
}


class Driver:
    """libcuda, initialised. OSError where there is none; CudaError where it finds no device. Threads: any."""

    _one: Optional[Driver] = None
    _loading = threading.Lock()

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise OSError(f"libcuda.so.1 has no {name}: the driver is too old") from None
            function.argtypes, function.restype = arguments, _I
        self("cuInit", 0)

    @classmethod
    def get(cls) -> Driver:
        """The process's one."""
        with cls._loading:
            if cls._one is None:
                cls._one = cls()
            return cls._one

    def __call__(self, name: str, *arguments: Any) -> None:
        code = self.code(name, *arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(name, code, (text.value or b"?").decode())

    def code(self, name: str, *arguments: Any) -> int:
        """What the call returns."""
        return int(getattr(self._library, name)(*arguments))

    def ordinal_of(self, device_uuid: str) -> Optional[int]:
        """This process's number for the device of that UUID ("GPU-..."); None where it sees no such device."""
        count = _I()
        self("cuDeviceGetCount", ctypes.byref(count))
        for ordinal in range(count.value):
            device, found = _I(), _Uuid()
            self("cuDeviceGet", ctypes.byref(device), ordinal)
            self("cuDeviceGetUuid_v2", ctypes.byref(found), device)
            if device_uuid.lower() == f"gpu-{uuid.UUID(bytes=bytes(found.bytes))}":
                return ordinal
        return None


class Device:
    """One device, in the context that the CUDA runtime and PyTorch use. Streams are the driver's handles, as integers
    (torch.cuda.Stream.cuda_stream). Threads: any. CudaError."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self._driver = Driver.get()
        self._context = _P()
        # Never given up: memory that is mapped in it may live as long as the process.
        self._driver("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ordinal)

    @contextlib.contextmanager
    def current(self) -> Iterator[Driver]:
        """The device's context, current in this thread; the one before is so again afterwards."""
        self._driver("cuCtxPushCurrent_v2", self._context)
        try:
            yield self._driver
        finally:
            self._driver("cuCtxPopCurrent_v2", ctypes.byref(_P()))

    # --- memory of another process ---

    def map(self, descriptor: int, length: int) -> int:
        """Maps what the descriptor stands for; its address. The descriptor may be closed afterwards."""
        with self.current() as cu:
            allocation, address = _U64(), _U64()
            cu("cuMemImportFromShareableHandle", ctypes.byref(allocation), descriptor, _POSIX_DESCRIPTOR)
            try:
                cu("cuMemAddressReserve", ctypes.byref(address), length, 0, 0, 0)
                try:
                    cu("cuMemMap", address, length, 0, allocation, 0)
                    try:
                        access = _AccessDesc(_LOCATION_DEVICE, self.ordinal, _READ_WRITE)
                        cu("cuMemSetAccess", address, length, ctypes.byref(access), 1)
                    except BaseException:
                        cu("cuMemUnmap", address, length)
                        raise
                except BaseException:
                    cu("cuMemAddressFree", address, length)
                    raise
            finally:
                cu("cuMemRelease", allocation)  # the mapping holds it
            return address.value

    def unmap(self, address: int, length: int) -> None:
        """Undoes map, once this process's work on the device is done."""
        with self.current() as cu:
            cu("cuCtxSynchronize")
            cu("cuMemUnmap", address, length)
            cu("cuMemAddressFree", address, length)

    def open(self, handle: bytes) -> int:
        """Opens a CUDA IPC handle; its memory's address."""
        with self.current() as cu:
            address, given = _U64(), _IpcHandle()
            ctypes.memmove(ctypes.byref(given), handle, ctypes.sizeof(given))
            cu("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
            return address.value

    def close(self, address: int) -> None:
        """Undoes open, once this process's work on the device is done."""
        with self.current() as cu:
            cu("cuCtxSynchronize")
            cu("cuIpcCloseMemHandle", address)

    def register(self, address: int, length: int) -> int:
        """Pins host memory, whole pages; its address for streams."""
        with self.current() as cu:
            seen = _U64()
            cu("cuMemHostRegister_v2", address, length, _REGISTER_PORTABLE_AND_MAPPED)
            cu("cuMemHostGetDevicePointer_v2", ctypes.byref(seen), address, 0)
            return seen.value

    def unregister(self, address: int) -> None:
        """Undoes register, once this process's work on the device is done."""
        with self.current() as cu:
            cu("cuCtxSynchronize")
            cu("cuMemHostUnregister", address)

    # --- streams ---

    def idle(self, stream: int) -> bool:
        """Whether all that was enqueued on it is done."""
        with self.current() as cu:
            code = cu.code("cuStreamQuery", stream)
            if code not in (0, _NOT_READY):
                cu("cuStreamQuery", stream)  # says what is wrong
            return code == 0

    def synchronize(self, stream: int) -> None:
        """Waits for it."""
        with self.current() as cu:
            cu("cuStreamSynchronize", stream)

    def write_value(self, stream: int, address: int, value: int) -> None:
        """Has the stream store a number, after what was enqueued before and visible after all of that."""
        with self.current() as cu:
            cu("cuStreamWriteValue64_v2", stream, address, value, 0)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """Has the stream wait until the number is `value` or more."""
        with self.current() as cu:
            cu("cuStreamWaitValue64_v2", stream, address, value, _AT_LEAST)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """On the device, in the stream's order."""
        with self.current() as cu:
            cu("cuMemcpyDtoDAsync_v2", to, source, size, stream)

    def copy_in(self, to: int, host: int, size: int, stream: int) -> None:
        """From host memory; it is done when this returns."""
        with self.current() as cu:
            cu("cuMemcpyHtoDAsync_v2", to, host, size, stream)
            cu("cuStreamSynchronize", stream)

    def copy_out(self, host: int, source: int, size: int, stream: int) -> None:
        """To host memory; it is done when this returns."""
        with self.current() as cu:
            cu("cuMemcpyDtoHAsync_v2", host, source, size, stream)
            cu("cuStreamSynchronize", stream)


def shared_device(device_uuid: str) -> Tuple[Optional[Device], str]:
    """(the Device of that UUID in this process, ""), or (None, why there is none)."""
    try:
        ordinal = Driver.get().ordinal_of(device_uuid)
        if ordinal is None:
            return None, f"this process does not see the daemon's device {device_uuid}"
        return Device(ordinal), ""
    except (OSError, CudaError) as error:
        return None, f"no CUDA driver here: {error}"
