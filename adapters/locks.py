"""A lock that one thread holds alone, or several share."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Self


class SharedLock:
    """`with lock:` holds it alone, `with lock.shared():` together with others who share it.

    Both may be nested, and sharing within holding alone. Who waits to hold it alone comes before those who come later
    to share it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None  # the thread that holds it alone
        self._depth = 0  # how often it does
        self._sharing: dict[int, int] = {}  # threads that share it, and how often
        self._waiting = 0  # threads that wait to hold it alone

    def __enter__(self) -> Self:
        """Raises RuntimeError in a thread that shares it, which would wait for itself."""
        me = threading.get_ident()
        with self._changed:
            if me in self._sharing:
                raise RuntimeError("A thread that shares the lock cannot hold it alone as well.")
            if self._owner != me:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._owner is None and not self._sharing)
                finally:
                    self._waiting -= 1
                self._owner = me
            self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Within, no other thread holds it alone."""
        me = threading.get_ident()
        if self._owner == me:
            with self:
                yield
            return
        with self._changed:
            if me not in self._sharing:
                self._changed.wait_for(lambda: self._owner is None and not self._waiting)
            self._sharing[me] = self._sharing.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing[me] -= 1
                if not self._sharing[me]:
                    del self._sharing[me]
                    self._changed.notify_all()
