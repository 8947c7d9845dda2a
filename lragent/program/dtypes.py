"""Names of cache layouts and of supported dtypes."""

from __future__ import annotations

import torch

from lragent.errors import RequestError
from lragent.program.cache_schema import Layout

LAYOUTS: tuple[Layout, ...] = ("split", "dense")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """Returns a dtype by name.

    Raises:
        RequestError: the dtype is not supported.
    """
    if name not in DTYPES:
        raise RequestError(f"unknown dtype {name!r}", f"Use auto, or one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, without "torch."."""
    return str(dtype).removeprefix("torch.")
