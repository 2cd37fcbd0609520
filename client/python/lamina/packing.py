"""Batches of sequences of different lengths without their padding: what Stack.forward takes with cumulative_lengths.

>>> import numpy as np
>>> x = np.arange(6.0).reshape(2, 3, 1)                      # [B, S, H]; the second sequence has one token
>>> packed, cumulative_lengths = pack(x, [3, 1])
>>> packed[:, 0], cumulative_lengths
(array([0., 1., 2., 3.]), array([0, 3, 4], dtype=int32))
>>> unpack(packed, cumulative_lengths)[:, :, 0]
array([[0., 1., 2.],
       [3., 0., 0.]])
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import numpy as np


def pack(x: Any, lengths: Any) -> Tuple[np.ndarray, np.ndarray]:
    """The first lengths[b] tokens of each sequence of x [B, S, ...] one after another, [T, ...], and where each begins
    and the last one ends, int32 [B + 1]. ValueError: a length outside 1..S, or not one for each sequence."""
    x = np.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x: shape {list(x.shape)} must be [B, S, ...]")
    offsets = offsets_of(lengths)
    return x[kept(lengths_of(offsets), x.shape[0], x.shape[1])], offsets


def unpack(packed: Any, cumulative_lengths: Any, seq: Optional[int] = None) -> np.ndarray:
    """What pack made of a batch, as [B, seq, ...] with zeros for padding; seq None: the longest sequence's length.
    ValueError: cumulative lengths that fall, stand still or do not end at T, or a sequence longer than seq."""
    packed = np.asarray(packed)
    lengths = lengths_of(cumulative_lengths, len(packed))
    seq = int(lengths.max()) if seq is None else seq
    padded = np.zeros((len(lengths), seq, *packed.shape[1:]), packed.dtype)
    padded[kept(lengths, len(lengths), seq)] = packed
    return padded


def offsets_of(lengths: Any) -> np.ndarray:
    """The cumulative lengths, int32 [n + 1], of sequences' lengths [n]. ValueError: one below 1, or none at all.

    >>> offsets_of([3, 1])
    array([0, 3, 4], dtype=int32)
    """
    return _checked(np.concatenate([[0], np.cumsum(_integers("lengths", lengths))])).astype(np.int32)


def lengths_of(cumulative_lengths: Any, tokens: Optional[int] = None) -> np.ndarray:
    """The sequences' lengths, int64 [n], of cumulative lengths [n + 1]; tokens: what they must end at. ValueError.

    >>> lengths_of([0, 3, 4])
    array([3, 1])
    """
    offsets = _checked(_integers("cumulative_lengths", cumulative_lengths))
    if tokens is not None and offsets[-1] != tokens:
        raise ValueError(f"cumulative_lengths[{len(offsets) - 1}]: {offsets[-1]} must be {tokens}, the number of tokens")
    return np.diff(offsets)


def kept(lengths: np.ndarray, batch: int, seq: int) -> np.ndarray:
    """bool [batch, seq]: which tokens of a padded batch are no padding. ValueError: not one length for each sequence, or
    one above seq."""
    if len(lengths) != batch:
        raise ValueError(f"lengths: {len(lengths)} are given for a batch of {batch}")
    if lengths.max() > seq:
        index = int(lengths.argmax())
        raise ValueError(f"lengths[{index}]: {lengths[index]} must be in 1..{seq}")
    return np.arange(seq)[None, :] < lengths[:, None]


def _integers(name: str, given: Any) -> np.ndarray:
    values = np.asarray(given)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{name}: {values.dtype} {list(values.shape)} must be integers in one dimension")
    return values.astype(np.int64)


def _checked(offsets: np.ndarray) -> np.ndarray:
    if len(offsets) < 2 or offsets[0] != 0:
        raise ValueError(f"cumulative_lengths: must be 0 and the end of one sequence or more, is {offsets.tolist()[:8]}")
    short = np.flatnonzero(np.diff(offsets) < 1)
    if len(short):
        raise ValueError(f"lengths[{short[0]}]: {np.diff(offsets)[short[0]]} must be at least 1")
    if offsets[-1] >= 2**31:
        raise ValueError(f"lengths: their sum {offsets[-1]} must be below 2^31")
    return offsets
