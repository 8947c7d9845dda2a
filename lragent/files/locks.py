"""Locks on files and directories that end with the process that holds them, however it ends.

Windows, and file systems without locks, have none: callers go on as if they held one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def try_lock(descriptor: int) -> bool:
    """Locks an open file or directory until it is closed; False if somebody else has it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


@contextmanager
def directory_lock(directory: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a directory's lock; yields False if somebody else has it and `wait` is False."""
    if sys.platform == "win32":
        yield True
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if wait:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield True
        else:
            yield try_lock(descriptor)
    finally:
        os.close(descriptor)
