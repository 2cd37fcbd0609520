"""Locks that a KeyboardInterrupt can't leave locked for ever.

The interpreter raises it in the main thread between any two of Python's own instructions. `with lock:` of threading.Lock has
none between taking the lock and the block, but that of threading.Condition has: its __enter__ is a function in Python.
"""

from __future__ import annotations

import threading
from typing import Any, Optional


class Condition(threading.Condition):
    """threading.Condition whose `with` takes and leaves the lock as a threading.RLock's does."""

    @property
    def __enter__(self) -> Any:  # type: ignore[override]
        return self._lock.__enter__  # type: ignore[attr-defined]

    @property
    def __exit__(self) -> Any:  # type: ignore[override]
        return self._lock.__exit__  # type: ignore[attr-defined]

    def wait(self, timeout: Optional[float] = None) -> bool:
        """As threading.Condition's; an interrupt out of it, too, finds the lock taken, once. The base's gives it up in front
        of the block that takes it back. What waited so is woken with the others by the next notify_all, to no effect."""
        try:
            return super().wait(timeout)
        except BaseException:
            if not self._is_owned():  # type: ignore[attr-defined]
                self.acquire()
            raise


class Turn:
    """Something that one holder has at a time. Whoever asks for it again has it already, and any thread may give it back
    for its holder: one that was interrupted on the way from taking it loses nothing. Threads: any."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._holder: Optional[object] = None  # guarded by _changed

    def take(self, holder: object) -> None:
        """Waits while another one has it."""
        with self._changed:
            self._changed.wait_for(lambda: self._holder is None or self._holder is holder)
            self._holder = holder

    def is_of(self, holder: object) -> bool:
        return self._holder is holder

    def give_back(self, holder: object) -> None:
        """Nothing where it is not the holder's."""
        with self._changed:
            if self._holder is holder:
                self._holder = None
                self._changed.notify_all()
