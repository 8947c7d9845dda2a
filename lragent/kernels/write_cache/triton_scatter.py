"""Launches the Triton cache writes; the host reads no values from the device.

A GPU can't raise an error. A slot outside the cache is skipped and never overwrites another block.
"""

from __future__ import annotations

import triton
from torch import Tensor

from lragent.kernels.write_cache.triton_kernels import write_kv_kernel, write_lr_kernel

# Numbers of a token that a program copies per iteration.
RANKS = 64


def write_kv(key_THDk: Tensor, value_THDv: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
    """See `lragent.kernels.write_cache.torch_scatter.write_kv`."""
    key, value = _dense_rows(key_THDk), _dense_rows(value_THDv)
    tokens, heads, k_dim = key.shape
    v_dim = value.shape[2]
    if tokens == 0:
        return
    write_kv_kernel[(heads, tokens)](
        key, value, k_cache, v_cache, slots_T.contiguous(), k_cache.shape[0],
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        H=heads, P=k_cache.shape[2], DK=k_dim, DV=v_dim, D=triton.next_power_of_2(max(k_dim, v_dim)), num_warps=1,
    )  # fmt: skip


def write_lr(lr_TR: Tensor, lr_cache: Tensor, lr_table: Tensor, slots_NT: Tensor) -> None:
    """See `lragent.kernels.write_cache.torch_scatter.write_lr`."""
    lr = _dense_rows(lr_TR)
    agents, tokens = slots_NT.shape
    if tokens == 0 or agents == 0:
        return
    write_lr_kernel[(agents, tokens)](
        lr, lr_cache, lr_table, slots_NT.contiguous(), lr_cache.numel(), tokens, lr.stride(0), agents,
        ROWS=triton.next_power_of_2(agents + 1), R=RANKS, num_warps=1,
    )  # fmt: skip


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
