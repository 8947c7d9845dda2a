"""Private APIs of torch, and texts of its export errors. Seen in torch 2.13."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload as OpOverload  # the type of an op in a graph
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree

# Errors of an op on fake tensors whose output shape depends on values.
# Private API: `torch._subclasses.fake_tensor`, seen in torch 2.13.
SHAPE_DEPENDS_ON_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class OpArgument:
    """An argument in an op's schema.

    Args:
        default: the schema's default; None if it has none.
        is_written: True if the op writes into this argument.
    """

    name: str
    default: object
    is_written: bool


@cache
def arguments_of(op: OpOverload) -> tuple[OpArgument, ...]:
    """All arguments of an op, in the order of its schema.

    Private API: `OpOverload._schema`, seen in torch 2.13.
    """
    return tuple(
        OpArgument(entry.name, entry.default_value, entry.alias_info is not None and entry.alias_info.is_write)
        for entry in op._schema.arguments
    )


def has_kernel(op: OpOverload, device: str) -> bool:
    """True if a kernel of the op is registered for a dispatch key ("CPU" or "CUDA").

    Private API: `torch._C._dispatch_has_kernel_for_dispatch_key`, seen in torch 2.13.
    """
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), device))


def require_in_graph(condition: bool | torch.SymBool) -> None:
    """Checks a condition on sizes; the exporter relies on it.

    Private API: `torch._check`, seen in torch 2.13.

    Raises:
        RuntimeError: the condition is false.
    """
    torch._check(condition)


def leaves(value: object) -> list[Any]:
    """All leaves of nested tuples, lists and dicts, in order.

    Private API: `torch.utils._pytree.tree_flatten`, seen in torch 2.13.
    """
    return _pytree.tree_flatten(value)[0]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested tuples, lists and dicts with `function` applied to every leaf.

    Private API: `torch.utils._pytree.tree_map`, seen in torch 2.13.
    """
    return _pytree.tree_map(function, value)


def fake_mode() -> FakeTensorMode:
    """A context in which ops compute shapes and dtypes only.

    Private API: `torch._subclasses.fake_tensor.FakeTensorMode`, seen in torch 2.13.
    """
    return FakeTensorMode()


def as_fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A tensor of the mode with the same shape and dtype; all its sizes are fixed.

    Private API: `FakeTensorMode.from_tensor`, seen in torch 2.13.
    """
    return mode.from_tensor(tensor, static_shapes=True)


def find_cpp_compiler() -> str | None:
    """Command of the C++ compiler that Inductor uses; None if it finds none.

    Private API: `torch._inductor.cpp_builder.get_cpp_compiler` and `torch._inductor.exc.InvalidCxxCompiler`, seen in
    torch 2.13.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def empty_inductor_cache() -> AbstractContextManager[None]:
    """A context in which Inductor starts with an empty cache.

    Private API: `torch._inductor.utils.fresh_cache`, seen in torch 2.13.
    """
    from torch._inductor.utils import fresh_cache

    return fresh_cache()


def compile_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles an exported program into an AOTInductor package without weights.

    Private API: `torch._inductor.aoti_compile_and_package`, with the option `aot_inductor.package_constants_in_so`,
    seen in torch 2.13.

    Raises:
        RuntimeError, OSError: the compiler failed, or a file can't be written.
    """
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={"aot_inductor.package_constants_in_so": False},
    )


def load_package(path: Path, device: torch.device) -> Any:
    """Loads an AOTInductor package; its weights are bound by `bind_weights`.

    Private API: `torch._inductor.aoti_load_package`, seen in torch 2.13.
    """
    # Multi-threaded runs record events for other threads, which can't be captured in a CUDA graph.
    on_gpu = device.type == "cuda"
    return torch._inductor.aoti_load_package(
        str(path), run_single_threaded=on_gpu, device_index=device.index if on_gpu else -1
    )


def weight_names(package: Any) -> list[str]:
    """Names of the weights that a loaded package reads.

    Private API: `AOTICompiledModel.get_constant_fqns`, seen in torch 2.13.
    """
    names: list[str] = package.get_constant_fqns()
    return names


def bind_weights(package: Any, weights: Mapping[str, Tensor]) -> None:
    """Makes a loaded package read `weights` in place; the caller must keep them alive.

    Private API: `AOTICompiledModel.load_constants`, seen in torch 2.13.
    """
    package.load_constants(dict(weights), check_full_update=True, user_managed=True)


def run_function(package: Any) -> Callable[[list[Any]], list[Tensor]]:
    """A function that runs a loaded package; it takes the list of inputs and empties it.

    The package's own call parses the input tree spec each time, which takes longer than running a small segment.

    Private API: `AOTICompiledModel.loader.boxed_run`, seen in torch 2.13.
    """
    run: Callable[[list[Any]], list[Tensor]] = package.loader.boxed_run
    return run


def export_refused() -> type[Exception]:
    """The error class of code that `torch.export` refuses. Imported late: it takes a second.

    Private API: `torch._dynamo.exc.UserError`, seen in torch 2.13.
    """
    from torch._dynamo.exc import UserError

    return UserError


def is_constraint_violation(error: Exception) -> bool:
    """True if an export failed because the code holds for some values of a dynamic size only.

    Private API: text of `torch.fx.experimental.symbolic_shapes.ConstraintViolationError`, seen in torch 2.13.
    """
    return "Constraints violated" in str(error)


def violated_guard(error: Exception) -> str | None:
    """The first condition on sizes that a constraint violation names; None if it names none.

    Private API: text of `torch.fx.experimental.symbolic_shapes.ConstraintViolationError`, seen in torch 2.13.
    """
    found = re.search(r"satisfy the generated guard (.+?)(?:Specializations|$)", str(error), re.MULTILINE)
    return found[1] if found else None


def branches_on_values(error: Exception) -> bool:
    """True if an export failed because the code branches on the values of tensors.

    Private API: text of `torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode`, seen in torch 2.13.
    """
    return "data-dependent" in str(error).strip().partition("\n")[0]


def branching_line(error: Exception) -> str | None:
    """The line of code that branches on the values of tensors; None if the error shows none.

    Private API: text of `torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode`, seen in torch 2.13.
    """
    found = re.search(r"The following call raised this error:\n.*\n *(.+)", str(error).strip())
    return found[1].strip() if found else None


def asserted_condition(message: str) -> str:
    """The condition in the message of an `aten._assert_scalar` call that the exporter added.

    Private API: text of `torch.fx.passes.runtime_assert`, seen in torch 2.13.
    """
    return message.removeprefix("Runtime assertion failed for expression ").split(" on node")[0]
