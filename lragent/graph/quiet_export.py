"""torch warns about its own internals while it exports and compiles; users can do nothing about that."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_exporter_noise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # Programs are saved with hollow tensors on purpose.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        yield
