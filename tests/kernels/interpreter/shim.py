"""Triton's interpreter with exact bfloat16, and with an eye on memory.

As it is, version 3.7.1 computes with the bit patterns of bfloat16 and truncates when it casts. `exact_bfloat16`
replaces the private methods concerned; `check_shim.py` beside this file fails when a new version needs another shim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _to_float32(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    contiguous = np.ascontiguousarray(data, np.float32)
    return torch.from_numpy(contiguous).bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """bfloat16 in casts and products as hardware has it; any other arithmetic on it raises."""
    plain_cast, plain_binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op

    def cast(self: Any, src: TensorHandle, dst_type: Any, *rounding: Any) -> TensorHandle:
        target = dst_type.scalar
        if tl.bfloat16 not in (src.dtype.scalar, target):
            return plain_cast(self, src, dst_type)
        data = _to_float32(src)
        if target == tl.bfloat16:
            return TensorHandle(_to_bfloat16(data), target)
        return TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)

    def binary(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError(f"{op.__name__} of bfloat16: cast to float32 first")
        return plain_binary(self, lhs, rhs, op)

    def dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
        return TensorHandle(np.matmul(_to_float32(a), _to_float32(b)) + d.data, d.dtype.scalar)

    casts = ("cast_impl", "create_fp_to_fp", "create_fp_ext", "create_fp_trunc")
    with _replaced(dict.fromkeys(casts, cast) | {"binary_op": binary, "create_dot": dot}):
        yield


@contextmanager
def _replaced(methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    before = {name: getattr(InterpreterBuilder, name) for name in methods}
    for name, method in methods.items():
        setattr(InterpreterBuilder, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)


@dataclass
class Traffic:
    """Bytes that programs asked for, by tensor name, each time they asked."""

    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)


@contextmanager
def watched(tensors: dict[str, torch.Tensor]) -> Iterator[Traffic]:
    """Raises IndexError where a program reaches outside all `tensors`; counts bytes.

    Tensors that are made meanwhile belong to them, under the name "made", and begin as NaN.
    """
    traffic = Traffic()
    ranges = [_range(name, tensor) for name, tensor in tensors.items()]
    plain_load, plain_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(counts: dict[str, int], pointers: TensorHandle, mask: TensorHandle) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        at = at[np.broadcast_to(mask.data.astype(bool), at.shape)]
        if at.size == 0:
            return
        for name, start, end in ranges:
            if start <= int(at.min()) < end:
                if int(at.max()) + size > end:
                    raise IndexError(f"access beyond the end of {name}")
                counts[name] = counts.get(name, 0) + at.size * size
                return
        raise IndexError("access outside every tensor")

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        count(traffic.loaded, pointers, mask)
        return plain_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        count(traffic.stored, pointers, mask)
        return plain_store(self, pointers, value, mask, *rest)

    plain_empty = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = plain_empty(self, *args, **kwargs)
        if made.numel():
            ranges.append(_range("made", made.fill_(torch.nan)))
            kept.append(made)
        return made

    kept: list[torch.Tensor] = []
    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign, assignment]
    try:
        with _replaced({"create_masked_load": load, "create_masked_store": store}):
            yield traffic
    finally:
        torch.Tensor.new_empty = plain_empty  # type: ignore[method-assign]


def _range(name: str, tensor: torch.Tensor) -> tuple[str, int, int]:
    """First and last byte that a tensor may be read at: a view may have gaps."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return name, tensor.data_ptr(), tensor.data_ptr() + (elements if tensor.numel() else 0) * tensor.element_size()
