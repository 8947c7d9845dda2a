"""float64 all the way: Hugging Face's norms, rotary tables and softmax cast to float32 on purpose, which would leave
about half of float32's own error in a "float64" reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _TrueFloat64(TorchFunctionMode):
    """Whoever asks for float32 gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def computing_in(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside, a float64 model computes in float64 only; other dtypes compute as the model says."""
    return _all_in_float64() if dtype == torch.float64 else nullcontext()


@contextmanager
def _all_in_float64() -> Iterator[None]:
    """Also new tensors of Python numbers: a float64's lowest value, a usual mask, is no float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _TrueFloat64():
            yield
    finally:
        torch.set_default_dtype(before)
