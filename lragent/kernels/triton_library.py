"""Registers the Triton kernels for CUDA and HIP devices. Triton compiles each kernel at its first launch.

Call `load` before a program with a Triton op runs.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from lragent.compat.torch import has_kernel
from lragent.errors import RequestError
from lragent.kernels import ops
from lragent.kernels.attention_call import attention_function, attention_op

ATTENTION = attention_op("flash_lora_attention_triton", None)


def is_loaded() -> bool:
    return has_kernel(ATTENTION, "CUDA")


def is_installed() -> bool:
    return find_spec("triton") is not None


def load() -> None:
    """Registers the Triton kernels with PyTorch.

    Raises:
        RequestError: the package `triton` is missing.
    """
    if is_loaded():
        return
    if not is_installed():
        raise RequestError(
            "attention 'triton' needs the package triton, which isn't installed",
            'Install lragent[gpu], or use attention="torch".',
        )
    from lragent.kernels.flash_lora_attention.triton.launch import flash_lora_attention
    from lragent.kernels.write_cache import triton_scatter

    torch.library.impl(ATTENTION.name(), "CUDA", attention_function(flash_lora_attention))
    torch.library.impl(ops.write_kv.name(), "CUDA", triton_scatter.write_kv)
    torch.library.impl(ops.write_lr.name(), "CUDA", triton_scatter.write_lr)
