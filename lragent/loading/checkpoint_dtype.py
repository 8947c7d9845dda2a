"""The dtype that "auto" stands for: the checkpoint's, as in transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from lragent.errors import ModelError
from lragent.loading.checkpoint import Checkpoint, read_config
from lragent.program.dtypes import DTYPES, dtype_name

# Floating dtypes by their names in safetensors files.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Names, in `torch.cpu.get_capabilities`, of instructions that multiply float16 numbers without widening each one.
_FLOAT16_ARITHMETIC = ("avx512_fp16", "amx_fp16", "fp16_arith")


def auto_dtype(checkpoint: Checkpoint) -> tuple[torch.dtype, str]:
    """The dtype for a checkpoint on this machine, and a note if it is not the checkpoint's; "" if it is.

    It is that of the config or, without one, the most frequent in the weight files. GGUF becomes float32.

    Raises:
        ModelError: the config or a weight file can't be read; see `checkpoint.read_config`.
    """
    if checkpoint.gguf is not None:
        return torch.float32, ""
    stored = getattr(read_config(checkpoint), "dtype", None)
    if isinstance(stored, Mapping):  # by part of the model; "" is for all others
        stored = stored.get("")
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if not isinstance(stored, torch.dtype):
        stored = most_frequent_dtype(checkpoint.directory) or torch.float32
    return supported_dtype(stored, torch.cpu.get_capabilities())


def supported_dtype(stored: torch.dtype, capabilities: Mapping[str, Any]) -> tuple[torch.dtype, str]:
    """The dtype in which weights of dtype `stored` are converted, and a note if it is another one.

    Args:
        capabilities: the CPU's, as `torch.cpu.get_capabilities` gives them.
    """
    name = dtype_name(stored)
    if stored == torch.float16 and not any(capabilities.get(each) for each in _FLOAT16_ARITHMETIC):
        return torch.bfloat16, (
            "the checkpoint is float16, for which this CPU has no arithmetic: its weights become bfloat16 "
            "(--dtype float16 keeps them)"
        )
    if stored not in DTYPES.values():
        return torch.float32, f"the checkpoint is {name}, which is not supported: its weights become float32"
    return stored, ""


def most_frequent_dtype(directory: Path) -> torch.dtype | None:
    """The floating dtype of most numbers in a folder's weight files; None if they hold none. Only headers are read.

    Raises:
        ModelError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    counts: Counter[torch.dtype] = Counter()
    for file in sorted(directory.glob("model*.safetensors")):
        try:
            with safe_open(file, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 -- not a mapping
                    tensor = shard.get_slice(key)
                    if tensor.get_dtype() in _FLOATS:
                        counts[_FLOATS[tensor.get_dtype()]] += prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged: {error}", "Copy the checkpoint again.") from error
    return counts.most_common(1)[0][0] if counts else None
