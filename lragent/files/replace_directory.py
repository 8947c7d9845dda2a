"""Puts a finished directory in the place of another one, in one step where the system can."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def put_in_place(finished: Path, out: Path) -> None:
    """`finished` becomes `out`; what `out` was before is removed. Both lie in one directory.

    Where names can be exchanged (Linux), whoever looks at `out`, or is killed on the way, finds the old directory or
    the new one. Elsewhere `out` is missing for a moment.
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
    """Exchanges two names; False if the system or the file system can't."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
