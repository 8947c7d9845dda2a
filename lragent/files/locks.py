"""Advisory locks on files and directories. The system releases them when the process ends, even if it is killed.

On Windows and on file systems without locks, nothing is locked, and callers proceed as if they held the lock.
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
    """Locks an open file or directory until it is closed.

    Returns:
        False if another process holds the lock; True otherwise, also where locks are not supported.
    """
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
    """Holds the lock of a directory inside the context.

    Args:
        wait: True to wait for the lock; False to yield False if another process holds it.

    Raises:
        OSError: the directory can't be opened.
    """
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


@contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Holds a lock that a file of its own stands for; the file is made for it and removed at the end.

    Yields:
        False if another process holds the lock.

    Raises:
        OSError: the file can't be made.
    """
    descriptor = _locked(path)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int | None:
    """A locked descriptor of the file that is at `path`; None if another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not try_lock(descriptor):
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its last holder has removed it meanwhile
