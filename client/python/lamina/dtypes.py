"""Element types by name ("fp32", "bf16", "fp16", "int32") and what numpy calls them.

numpy has no bfloat16: such arrays are uint16 holding the bits. ml_dtypes.bfloat16 arrays are accepted too.
"""

from __future__ import annotations

from typing import Any, Dict, Optional

import numpy as np

from lamina.v1 import tensor_pb2 as pb

_ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float": "fp32"}
_PROTO = {"fp32": pb.DATA_TYPE_FLOAT32, "bf16": pb.DATA_TYPE_BFLOAT16, "fp16": pb.DATA_TYPE_FLOAT16,
          "int32": pb.DATA_TYPE_INT32}
_NAMES = {number: name for name, number in _PROTO.items()}
_NUMPY: Dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "fp16": np.dtype(np.float16),
          "int32": np.dtype(np.int32)}


def canonical(dtype: Any) -> str:
    """ "fp32", "bf16", "fp16" or "int32" for any usual spelling, numpy's and PyTorch's types too. ValueError for others.

    >>> canonical("bfloat16"), canonical(np.float32)
    ('bf16', 'fp32')
    """
    if type(dtype) is str and dtype in _PROTO:
        return dtype  # every call's way: numpy's names take long to make
    if isinstance(dtype, (type, np.dtype)):
        dtype = np.dtype(dtype).name
    name = str(dtype).replace("torch.", "")
    name = _ALIASES.get(name, name)
    if name not in _PROTO:
        raise ValueError(f"dtype: {name!r} must be one of {', '.join(_PROTO)}")
    return name


def to_proto(dtype: Any) -> pb.DataType:
    """The contract's number of a type; canonical's spellings."""
    return _PROTO[canonical(dtype)]


def from_proto(number: pb.DataType) -> str:
    """The name of a contract's number."""
    return _NAMES[number]


def numpy_type(dtype: Any) -> np.dtype:
    """numpy's type for a name; uint16 for "bf16"."""
    return _NUMPY[canonical(dtype)]


def from_float32(values: Any, dtype: Any) -> np.ndarray:
    """float32 values rounded to nearest even into `dtype` ("bf16": bits in uint16).

    >>> from_float32([1.0, 3.14159], "bf16")
    array([16256, 16457], dtype=uint16)
    """
    values = np.asarray(values, np.float32)
    dtype = canonical(dtype)
    if dtype == "bf16":
        bits = values.view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded)
    return values.astype(_NUMPY[dtype])


def to_float32(values: Any, dtype: Optional[Any] = None) -> np.ndarray:
    """float32 of an array; uint16 is read as bf16 bits unless dtype says otherwise.

    >>> to_float32(np.array([16256, 16457], np.uint16))
    array([1.      , 3.140625], dtype=float32)
    """
    values = np.asarray(values)
    if values.dtype == np.uint16 and (dtype is None or canonical(dtype) == "bf16"):
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def as_stack_type(values: Any, dtype: str) -> np.ndarray:
    """`values` as an array of the stack's type: unchanged where it is one, rounded from float32 or float64, TypeError
    else. Does not copy what need not be copied."""
    values = np.asarray(values)
    wanted = _NUMPY[dtype]
    if values.dtype == wanted:
        return values
    if dtype == "bf16" and values.dtype.name == "bfloat16":
        return values.view(np.uint16)
    if values.dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        return from_float32(values.astype(np.float32, copy=False), dtype)
    raise TypeError(f"an array of {values.dtype} can't stand for {dtype}: give {wanted} or float32")
