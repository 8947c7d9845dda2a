"""Stage 4b: an exported program becomes something that runs: a `Program` for the runtime.

`backend="compiled"` is AOTInductor: one package for prefill, decode and mixed steps, without weights, which are given
to it as they lie in mapped files. `backend="eager"` runs the same lowered graph op by op.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lragent.errors import CompilerMissing, InternalError
from lragent.exported import StepKind, export_graph
from lragent.exporter_noise import without_exporter_noise
from lragent.homogeneous import homogeneous_call
from lragent.kernels.cache_schema import CacheSchema
from lragent.kernels.step import AgentFacts, Program, run_flat

# Version of the custom ops' signatures and meaning: a package compiled against another one is not loaded.
OP_ABI = 2
# Graphs that serve one kind of step only.
STEPS: dict[str, StepKind] = {"inductor_decode": "decode", "inductor_prefill": "prefill"}


@dataclass(frozen=True)
class ProgramFacts:
    """What a `Program` says of itself beside the callable."""

    schema: CacheSchema
    agents: tuple[AgentFacts, ...]
    max_positions: int
    vocab_size: int
    dtype: torch.dtype
    attention: str


def target_name(device: str = "cpu") -> str:
    """Names what a compiled package depends on: device, instruction set, torch version, op signatures."""
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")
    version = torch.__version__.split("+")[0]
    return f"{device}-{capability}-torch{version}-abi{OP_ABI}"


def require_compiler() -> None:
    """Raises CompilerMissing if Inductor would find no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompilerMissing("no C++ compiler was found", _COMPILER_HINT) from error
    if shutil.which(compiler) is None:
        raise CompilerMissing(f"the C++ compiler {compiler!r} can't be run", _COMPILER_HINT)


_COMPILER_HINT = 'Install g++ (or set CXX), or use backend="eager", which needs none but is slower.'


def compile_package(
    graph: fx.GraphModule, schema: CacheSchema, kv_dtype: torch.dtype, graph_name: str, path: Path
) -> None:
    """Compiles a lowered graph into an AOTInductor package at `path` (.pt2), which holds no weights.

    Args:
        graph_name: which of an attention implementation's graphs it is (`lragent.kernels.dispatch.graphs`).

    Raises:
        CompilerMissing: there is no C++ compiler.
    """
    require_compiler()
    program = export_graph(graph, schema, kv_dtype, STEPS.get(graph_name, "any"))
    with without_exporter_noise():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )


def load_package(path: Path, weights: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """Loads a package and lets it read `weights` where they are; nothing is copied.

    The returned callable keeps the tensors alive.
    """
    runner = torch._inductor.aoti_load_package(str(path))
    names = runner.get_constant_fqns()
    missing = [name for name in names if name not in weights]
    if missing:
        raise InternalError(f"package {path.name} wants weight {missing[0]}, which the artifact does not hold")
    held = {name: weights[name].detach() for name in names}
    runner.load_constants(held, check_full_update=True, user_managed=True)
    return _PackageCall(runner, held)


class _PackageCall:
    """A loaded package together with the weights that it reads."""

    def __init__(self, runner: Any, weights: Mapping[str, Tensor]) -> None:
        self._runner = runner
        self._weights = weights
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            logits: Tensor = self._runner(*inputs)
        return logits


def eager_call(graph: fx.GraphModule) -> Callable[..., Tensor]:
    """Runs a lowered graph op by op."""

    def call(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = graph(*inputs)
        return logits

    return call


def join(calls: Mapping[str, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """One callable out of an implementation's graphs, by graph name."""
    if len(calls) == 1:
        return next(iter(calls.values()))
    return homogeneous_call(calls["inductor_decode"], calls["inductor_prefill"])


def program(call: Callable[..., Tensor], facts: ProgramFacts, backend: str, device: str) -> Program:
    """Wraps a callable over all graph inputs as the runtime's `Program`."""
    return Program(
        schema=facts.schema,
        agents=facts.agents,
        max_positions=facts.max_positions,
        vocab_size=facts.vocab_size,
        run=run_flat(call),
        facts={
            "backend": backend,
            "attention": facts.attention,
            "device": device,
            "dtype": str(facts.dtype).removeprefix("torch."),
        },
    )
