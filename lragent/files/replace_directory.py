"""Replaces a directory by another one, atomically where the system supports it."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def put_in_place(finished: Path, out: Path) -> None:
    """Renames `finished` to `out` and deletes the former `out`, if any. Both must have the same parent directory.

    On Linux the two names are exchanged atomically: `out` is the old or the new directory at any time, even if the
    process is killed. On other systems `out` is missing for a moment.

    Raises:
        OSError: a directory can't be renamed or deleted.
    """
    if not out.exists():
        finished.rename(out)
    elif _exchange(finished, out):
        shutil.rmtree(finished)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
        out.rename(old / out.name)
        finished.rename(out)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names atomically; returns False if the system or the file system does not support it."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
