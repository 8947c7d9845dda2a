"""Defines the project's ops: schemas from dataclasses, kernels and fake kernels, no autograd.

`torch.library.custom_op` is not used: its dispatch layers take longer than the work of a decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from lragent.compat.torch import OpOverload

Arguments = TypeVar("Arguments")

_SCHEMA_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    bool: "bool",
}


def schema_of(arguments: type) -> str:
    """Schema of an op that takes the fields of a dataclass in order and returns one tensor.

    Raises:
        KeyError: a field has a type other than Tensor, Tensor | None, float, int or bool.
    """
    types = get_type_hints(arguments)
    listed = [
        f"{_SCHEMA_TYPES[types[field.name]]} {field.name}{'' if field.default is MISSING else f'={field.default}'}"
        for field in fields(arguments)
    ]
    return f"({', '.join(listed)}) -> Tensor"


def unpacked(arguments: Callable[..., Arguments], kernel: Callable[[Arguments], Tensor]) -> Callable[..., Tensor]:
    """Wraps a kernel of one dataclass as a function of the dataclass's fields; it keeps the kernel's name."""

    def function(*values: Any, **named: Any) -> Tensor:
        return kernel(arguments(*values, **named))

    function.__module__, function.__name__, function.__qualname__ = (
        kernel.__module__,
        kernel.__name__,
        kernel.__qualname__,
    )
    return function


def define_op(name: str, schema: str, kernel: Callable[..., object] | None, fake: Callable[..., object]) -> OpOverload:
    """Defines `lragent::name`.

    Args:
        kernel: the default for devices without a dedicated kernel; None: no default.
        fake: returns an empty result of the right shape, for `torch.export`.
    """
    qualified = f"lragent::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    if kernel is not None:
        torch.library.impl(qualified, "default", kernel)
    torch.library.register_fake(qualified, fake)
    op: OpOverload = getattr(torch.ops.lragent, name).default
    return op
